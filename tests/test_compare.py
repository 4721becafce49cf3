"""Runs side by side: the last figures there are, and the flags in which they differ, no others."""

import json
import shutil

import pytest
from matplotlib.axes import Axes
from PIL import Image

from tools import compare


def make(folder, flags, log):
    folder.mkdir()
    args = {"seed": 0, "out": str(folder), "resume": False, "init": [], **flags}
    (folder / "config.json").write_text(json.dumps({"args": args, "revision": "abc"}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def test_figures_flags_and_curves(tmp_path, monkeypatch, capsys):
    """Three runs: one evaluated every second epoch, one of a pretraining, one of a flag more."""
    first, second = {"train_loss": 9.5}, {"train_loss": 7.25, "ap": 0.125, "ap50": 0.5}
    log = [{"epoch": 1, **first}, {"epoch": 2, **second}, {"epoch": 3, "train_loss": 6.5}]
    make(tmp_path / "a", {"lr": 1e-3}, log)
    task = [{"epoch": 1, "train_loss": 0.5, "ssl_loss": 0.25}]
    make(tmp_path / "longer", {"lr": 1e-4, "init": [["x", None]]}, task)
    make(tmp_path / "c", {"lr": 1e-4, "new": 5}, [{"epoch": 1, **second, "ap50": None}])
    plot, curves = Axes.plot, []

    def draw(axes, epochs, values, **style):
        curves.append((style["label"], [*epochs], [*values]))
        return plot(axes, epochs, values, **style)

    monkeypatch.setattr(Axes, "plot", draw)
    monkeypatch.chdir(tmp_path)
    compare.main(["a", "longer", "c", "--out", "x.png"])
    head, _, *rows, _, end = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, *rows)]
    assert cells == [
        ["run", "epoch", "training loss", "AP", "AP50", "held-out task", "--init", "--lr", "--new"],
        ["a", "3", "6.500", "0.125", "0.500", "n/a", "[]", "0.001", "None"],
        ["longer", "1", "0.500", "n/a", "n/a", "0.250", "[['x', None]]", "0.0001", "None"],
        ["c", "1", "7.250", "0.125", "n/a", "n/a", "[]", "0.0001", "5"],
    ]
    assert len({len(line) for line in (head, *rows)}) == 1 and end == "written: x.png"
    assert curves[:4] == [("a", [1, 2, 3], [9.5, 7.25, 6.5]), ("longer", [1], [0.5]),
                          ("c", [1], [7.25]), ("a", [2], [0.125])]  # fmt: skip
    assert len(curves) == 12 and Image.open("x.png").width == 4 * 5 * 110
    compare.main(["a"])
    assert Image.open("compare.png").width == 3 * 5 * 110  # nothing of a task
    for name, text in (("config.json", "[1]"), ("log.jsonl", '{"a": 1}'), ("log.jsonl", "no")):
        shutil.copytree("c", "d", dirs_exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
        with pytest.raises(SystemExit, match=f"^error: d/{name}: is not of train.py"):
            compare.main(["a", "d"])
    with pytest.raises(SystemExit, match="^1$"):
        compare.main(["a", "--out", "x.y"])
    assert not (tmp_path / "x.y").exists()
    (tmp_path / "c/log.jsonl").unlink()
    with pytest.raises(SystemExit, match="^error: c: has no epoch in a log.jsonl; is it a run"):
        compare.main(["a", "c"])
