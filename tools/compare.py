"""Runs side by side: their curves in one picture, their last figures and what differs in a table.

    python -m tools.compare RUN RUN ... [--out FILE]

RUN is a run folder of train.py, finished or not. A column of the table for each flag in which the
runs differ, or the code's revision. Rows over several seeds, with intervals, are reproduce.py's.
"""

from pathlib import Path

import reproduce
from eval import format_metric
from util import plots
from util.cli import Parser, command
from util.files import check_writable, read_json

FIGURES = {"train_loss": "training loss", "ap": "AP", "ap50": "AP50", "ssl_loss": "held-out task"}


def open_runs(folders):
    """({run: its flags}, {run: its log}) by the folders' names. Raises ValueError."""
    flags, logs = {}, {}
    for folder in folders:
        logs[folder] = reproduce.read_log(Path(folder))
        if not logs[folder]:
            raise ValueError(f"{folder}: has no epoch in a log.jsonl; is it a run of train.py?")
        config = read_json(Path(folder, "config.json"))
        if not isinstance(config, dict) or not {"args", "revision"} <= config.keys():
            raise ValueError(f"{folder}/config.json: is not of train.py")
        flags[folder] = {**config["args"], "code": config["revision"]}
    return flags, logs


def table(flags, logs):
    """Lines in Markdown: each run's last figures, and the flags in which the runs differ."""
    names = sorted(set().union(*flags.values()) - {"out", "resume"})
    differ = [name for name in names if len({str(run.get(name)) for run in flags.values()}) > 1]
    there = [key for key in FIGURES if any(key in line for log in logs.values() for line in log)]
    columns = [name if name == "code" else f"--{name}" for name in differ]
    rows = [["run", "epoch", *(FIGURES[key] for key in there), *columns]]
    for run, log in logs.items():
        last = [next((x[key] for x in reversed(log) if key in x), None) for key in there]
        other = [str(flags[run].get(name)) for name in differ]
        rows.append([run, str(log[-1]["epoch"]), *map(format_metric, last), *other])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", type=Path, default="compare.png", help="picture of the curves")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    flags, logs = open_runs(args.runs)
    check_writable(args.out)
    plots.draw_panels(args.out, {
        label: {run: plots.points_of(log, key) for run, log in logs.items()}
        for key, label in FIGURES.items()
    })  # fmt: skip
    print("\n".join(table(flags, logs)))
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
