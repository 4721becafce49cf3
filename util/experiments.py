"""The format of results/NAME/experiment.py, which says in Python what reproduce.py runs.

The file defines these names; only `rows` is required:

    rows         {name: flags of train.py}; every row is run once per seed
    comparisons  [(family, row, baseline)]: differences of AP; Holm's correction is per family
    interactions [(family, (row, baseline), (row, baseline))]: the first gain minus the second
    costs        [(row, baseline)]: seconds of training, with those of the rows they start from
    metrics      what is compared: "ap" (the default), "ap50", … as in log.jsonl
    goals        [(row, baseline, AP50 in %)]: what a row has to reach; its time is shown as a
                 share of the baseline's
    authors      {name: {epoch: AP in %}}: curves of the paper's authors, shown next to ours
    program      how Python starts the training; default: ["train.py"]

In the flags, {data} stands for the folder of --data and {NAME} for the run folder of row NAME
with the same seed. Names of rows consist of letters, digits, - and _.
"""

import dataclasses
import re
import runpy
from pathlib import Path


@dataclasses.dataclass
class Experiment:
    """What a file experiment.py defines."""

    path: Path
    rows: dict
    comparisons: list
    goals: list
    authors: dict
    program: list
    interactions: list
    costs: list
    metrics: list

    def all_starts(self, row):
        """Return the set of rows that a row starts from, directly or through others."""
        starts = set()
        for start in dependencies(self.rows[row]):
            starts |= {start} | self.all_starts(start)
        return starts


def load_experiment(path):
    """Run a file experiment.py and return its Experiment; an error in it gets a full traceback."""
    try:
        names = runpy.run_path(str(path))
    except ValueError as error:  # cli_main would print a ValueError without its line
        raise RuntimeError(f"{path} ends with an error") from error
    return Experiment(
        path=path,
        rows=names["rows"],
        comparisons=names.get("comparisons", []),
        goals=names.get("goals", []),
        authors=names.get("authors", {}),
        program=names.get("program", ["train.py"]),
        interactions=names.get("interactions", []),
        costs=names.get("costs", []),
        metrics=names.get("metrics", ["ap"]),
    )


def start_from(row, part):
    """Return the flags that take a part of the model from the run of another row."""
    return f"--init {{{row}}} --init_parts {part}"


def dependencies(flags):
    """Return the names of the rows whose runs these flags start from."""
    names = re.findall("{(.*?)}", flags)
    return [name for name in names if name != "data"]
