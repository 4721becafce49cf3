"""The comparison of runs: its table, its curves, its errors."""

import json
import shutil

import pytest
from matplotlib.axes import Axes
from PIL import Image

from tools import compare
from util.checkpoint import write_log


def make_run(folder, flags, log):
    folder.mkdir()
    args = {"seed": 0, "out": str(folder), "resume": False, "init": [], **flags}
    (folder / "config.json").write_text(json.dumps({"args": args, "revision": "abc"}))
    write_log(folder / "log.jsonl", log)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs: one evaluated every second epoch, a pretraining, one with another flag."""
    first = {"train_loss": 9.5}
    second = {"train_loss": 7.25, "ap": 0.125, "ap50": 0.5}
    log = [{"epoch": 1, **first}, {"epoch": 2, **second}, {"epoch": 3, "train_loss": 6.5}]
    make_run(tmp_path / "a", {"lr": 1e-3}, log)
    pretraining = [{"epoch": 1, "train_loss": 0.5, "ssl_loss": 0.25}]
    make_run(tmp_path / "longer", {"lr": 1e-4, "init": [["x", None]]}, pretraining)
    make_run(tmp_path / "c", {"lr": 1e-4, "new": 5}, [{"epoch": 1, **second, "ap50": None}])
    monkeypatch.chdir(tmp_path)


def test_the_table(runs, capsys):
    """It has the last metrics of each run and the flags in which they differ, no others."""
    compare.main(["a", "longer", "c", "--out", "x.png"])
    header, _, *rows, _, end = capsys.readouterr().out.splitlines()
    cells = []
    for row in (header, *rows):
        cells.append([cell.strip() for cell in row.split("|")[1:-1]])
    titles = ["training loss", "AP", "AP50", "held-out task loss"]
    assert cells == [
        ["run", "epoch", *titles, "--init", "--lr", "--new"],
        ["a", "3", "6.500", "0.125", "0.500", "n/a", "[]", "0.001", "None"],
        ["longer", "1", "0.500", "n/a", "n/a", "0.250", "[['x', None]]", "0.0001", "None"],
        ["c", "1", "7.250", "0.125", "n/a", "n/a", "[]", "0.0001", "5"],
    ]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert end == "written: x.png"


def test_the_curves(runs, monkeypatch):
    plot = Axes.plot
    curves = []

    def record(axes, epochs, values, **style):
        curves.append((style["label"], [*epochs], [*values]))
        return plot(axes, epochs, values, **style)

    monkeypatch.setattr(Axes, "plot", record)
    compare.main(["a", "longer", "c", "--out", "x.png"])
    assert curves[:4] == [
        ("a", [1, 2, 3], [9.5, 7.25, 6.5]),
        ("longer", [1], [0.5]),
        ("c", [1], [7.25]),
        ("a", [2], [0.125]),
    ]
    assert len(curves) == 12
    assert Image.open("x.png").width == 4 * 5 * 110
    compare.main(["a"])
    assert Image.open("compare.png").width == 3 * 5 * 110  # no panel of a task


def test_errors_have_one_line(runs, tmp_path):
    for name, text in (("config.json", "[1]"), ("log.jsonl", '{"a": 1}'), ("log.jsonl", "no")):
        shutil.copytree("c", "d", dirs_exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
        with pytest.raises(SystemExit, match=f"^error: d/{name}: [^\n]*train.py[^\n]*$"):
            compare.main(["a", "d"])
    with pytest.raises(SystemExit, match="^error: [^\n]*'y'[^\n]*$"):  # no format of figures
        compare.main(["a", "--out", "x.y"])
    assert not (tmp_path / "x.y").exists()
    (tmp_path / "c/log.jsonl").unlink()
    with pytest.raises(SystemExit, match="^error: c: log.jsonl is missing or empty"):
        compare.main(["a", "c"])
