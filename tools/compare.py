"""Compare runs: their curves in one figure, their last metrics and differing flags in a table.

    python -m tools.compare RUN RUN ... [--out FILE]

RUN is a run folder of train.py, finished or not. The table has a column for each flag in which the
runs differ, and for the code's revision if it differs. For experiments over several seeds, with
confidence intervals, see reproduce.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is started by its path

from eval import format_metric
from reproduce import read_log
from util import cli, plots
from util.files import check_writable, read_json

TITLES = {
    "train_loss": "training loss",
    "ap": "AP",
    "ap50": "AP50",
    "ssl_loss": "held-out task loss",
}


def open_runs(folders):
    """Return {folder: flags} and {folder: log} of run folders. Raises ValueError."""
    flags = {}
    logs = {}
    for folder in folders:
        logs[folder] = read_log(Path(folder))
        if not logs[folder]:
            message = "log.jsonl is missing or empty; is this a train.py run folder?"
            raise ValueError(f"{folder}: {message}")
        config = read_json(Path(folder, "config.json"))
        if not isinstance(config, dict) or "args" not in config or "revision" not in config:
            raise ValueError(f"{folder}/config.json: not written by train.py")
        flags[folder] = {**config["args"], "code": config["revision"]}
    return flags, logs


def differing_flags(flags):
    """Return the names of the flags in which runs differ; a run may lack some of them."""
    names = set()
    for run_flags in flags.values():
        names.update(run_flags)
    differing = []
    for name in sorted(names - {"out", "resume"}):
        values = {str(run_flags.get(name)) for run_flags in flags.values()}
        if len(values) > 1:
            differing.append(name)
    return differing


def last_value(log, name):
    """Return a metric in the last line of a log that contains it, or None."""
    for line in reversed(log):
        if name in line:
            return line[name]
    return None


def comparison_table(flags, logs):
    """Return a row per run, with its last metrics and its differing flags; the header first."""
    logged = set()
    for log in logs.values():
        for line in log:
            logged.update(line)
    metrics = [name for name in TITLES if name in logged]
    differing = differing_flags(flags)

    header = ["run", "epoch"]
    for name in metrics:
        header.append(TITLES[name])
    for name in differing:
        header.append(name if name == "code" else f"--{name}")
    rows = [header]
    for run, log in logs.items():
        row = [run, str(log[-1]["epoch"])]
        for name in metrics:
            row.append(format_metric(last_value(log, name)))
        for name in differing:
            row.append(str(flags[run].get(name)))
        rows.append(row)
    return rows


def markdown(rows):
    """Return the rows of a table, lists of cells with the header first, as Markdown."""
    widths = []
    for column in zip(*rows):
        widths.append(max(map(len, column)))
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"| {' | '.join(cells)} |")
    ruler = ["-" * width for width in widths]
    lines.insert(1, f"| {' | '.join(ruler)} |")
    return "\n".join(lines)


def parse(argv):
    parser = cli.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", type=Path, default="compare.png", help="figure of the curves")
    return parser.parse_args(argv)


@cli.cli_main
def main(argv=None):
    args = parse(argv)
    flags, logs = open_runs(args.runs)
    check_writable(args.out)
    panels = {}
    for name, title in TITLES.items():
        panels[title] = {run: plots.points_of(log, name) for run, log in logs.items()}
    plots.draw_panels(args.out, panels)
    print(markdown(comparison_table(flags, logs)))
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
