"""Run train.py with the backbones of this experiment: python -m results.leaks.train FLAGS

FLAGS are those of train.py; --backbone also accepts the variants in results/leaks/backbones.py.
"""

import train
from results.leaks.backbones import VARIANTS
from util.cli import cli_main


@cli_main
def main(argv=None):
    """Train. Raises ValueError for one of the variants in Deformable DETR."""
    args, _ = train.parse(argv)
    if args.backbone in VARIANTS and args.model == "deformable_detr":
        raise ValueError(
            f"backbone {args.backbone!r} is only meaningful with DETR: Deformable DETR's GroupNorm "
            "mixes all cells, which defeats its purpose; add --model detr"
        )
    train.main(argv)


if __name__ == "__main__":
    main()
