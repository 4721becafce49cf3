"""Draw the comparisons of the published experiments in one figure.

    python -m results.forest

Reads the results next to each experiment and writes results/forest.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is started by its path

import reproduce
from util.tables import compare, draw_forest

TITLES = {  # of the families: {experiment: {family: title}}
    "scenes": {
        "detr": "DETR, as in the paper",
        "deformable_detr": "Deformable DETR, as in the paper",
        "other": "Deformable DETR, further tasks",
        "aux": "DETR with auxiliary losses",
        "features": "DETR, feature maps corrupted",
        "place": "feature maps minus image corrupted",
    },
    "again": {"detr": "ten new seeds"},
    "tiles": {"deformable_detr": "real tiles", "detr": "real tiles"},
}


def main():
    made = []
    for name, titles in TITLES.items():
        experiment = reproduce.find_experiment(name)
        results = reproduce.read_results([reproduce.RESULTS / name], experiment)
        for comparison in compare(results, experiment.comparisons):
            comparison.family = titles[comparison.family]
            made.append(comparison)
    draw_forest(reproduce.RESULTS / "forest.png", made)


if __name__ == "__main__":
    main()
