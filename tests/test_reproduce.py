"""Tables of runs: rows are run once, what others start from first; what is stale is refused."""

import json
import os
import shutil
import statistics
from unittest.mock import Mock

import pytest
import torch

import checkpoint
import reproduce
import train

TINY = "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --epochs 1"
TINY += " --num_queries 5 --image_size 64 --limit_train 4 --limit_val 2 --batch_size 4"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    (tmp_path / "recipe.txt").write_text(f"# small\n{TINY}\n")
    recipe = f"@{os.path.relpath(tmp_path / 'recipe.txt', reproduce.ROOT)}"
    (tmp_path / "small.txt").write_text(f"""deformable-scratch: {recipe} --epochs 2  # a comment

start: {recipe} --setting pretrain --ssl_task mim-discrete --vocabulary 4
deformable-after: {recipe} --init {{start}} --freeze backbone""")
    return tmp_path / "small.txt"


def test_a_table(table, tmp_path, capsys):
    results, runs, recipe = (tmp_path / x for x in ("results/small", "runs/small", "recipe.txt"))
    shown = results / "table.md"

    def call(flags):
        """The results that a call makes anew, and what it prints."""
        before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
        reproduce.main([str(table), *flags.split()])
        made = {x.stem for x in results.glob("*.json") if x.stat().st_mtime_ns != before.get(x)}
        return made, capsys.readouterr().out

    def refused(message):
        with pytest.raises(SystemExit, match=message):
            call("--no_run")

    assert call("--rows scratch")[0] == {"deformable-scratch-0"}
    made, printed = call("--seeds 1 --jobs 2")
    assert made == {"deformable-scratch-1", "start-1", "deformable-after-1"}
    content = {path.stem: json.loads(path.read_bytes()) for path in results.glob("*.json")}
    after, start = content["deformable-after-1"], content["start-1"]
    assert "runs/small/start-1 --freeze backbone --seed 1 --out" in after["command"]
    assert after["flags"]["starts"] == [start["flags"]] and after["flags"]["hidden_dim"] == 32
    states = [torch.load(runs / f"{x}-1/last.pt") for x in ("deformable-after", "start")]
    frozen = "backbone.0.body.layer1.0.conv1.weight"
    assert torch.equal(*(state["model"][frozen] for state in states))
    whole, guess = shown.read_text(encoding="utf-8"), start["guess"]
    last = [100 * content[f"deformable-scratch-{seed}"]["log"][-1]["ap50"] for seed in (0, 1)]
    assert f"{sum(last) / 2:.1f} ± {statistics.stdev(last):.1f} | 2 |" in whole
    assert f"| {guess['acc']:.3f} | 0.250 |" in whole and 0.25 <= guess["acc"] <= 1

    shutil.rmtree(runs)  # the results are enough …
    made, printed = call("--seeds 0 1 --rows scratch")
    assert not made and "± " in printed and shown.read_text(encoding="utf-8") == whole
    (runs / "start-1").mkdir(parents=True)  # … but not to start from, nor is half a run
    (runs / "start-1/log.jsonl").write_text("")
    (results / "deformable-after-1.json").unlink()
    made, printed = call("--seeds 1 --rows after")
    assert made == {"start-1", "deformable-after-1"} and "| start |" not in printed
    shutil.copy(results / "start-1.json", results / "start-0-0.json")  # of another row, start-0
    (results / "start-1.json").write_text(json.dumps({**start, "revision": "abc12"}))
    recipe.write_text(f"# another comment\n{TINY}")
    made, printed = call("--no_run --rows start --seeds 1")
    assert not made and "scratch" not in printed and printed.count("| start |") == 1
    assert f"1 results are of revision abc12, yours is {checkpoint.revision()}; they" in printed
    assert b"| deformable-scratch |" in shown.read_bytes()  # always holds all
    recipe.write_text(f"{TINY} --lr 1e-3")
    refused("scratch-0.json was made with --lr 0.0005, now 0.001; delete it")
    recipe.write_text(TINY)
    table.write_text(table.read_text(encoding="utf-8").replace("--vocabulary 4", "--vocabulary 5"))
    refused("start-1.json was made with --vocabulary 4, now 5; delete it")
    (results / "start-1.json").unlink()
    refused("after-1.json .* in what it starts from --vocabulary 4, now 5; delete it")


@pytest.mark.parametrize("name", ["tasks", "first_epochs"])
def test_published_results_are_of_their_rows(name):
    rows = reproduce.read_table(reproduce.ROOT / f"recipes/{name}.txt")
    results = {row: [*runs.values()] for row, runs in reproduce.read_results(name, rows).items()}
    written = (reproduce.RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert results.keys() == rows.keys() and written.strip() == reproduce.tables(results).strip()


def test_the_mean_patch_by_hand(tmp_path):
    """The loss of a guess is that of predicting the mean of all counted patches."""
    flags = TINY.replace("64", "80")  # a border of 16 pixels belongs to no whole patch
    train.main(f"{flags} --setting pretrain --ssl_task reconstruct --out {tmp_path}/run".split())
    data = reproduce.isaid.synthetic("val", 2, 80, reproduce.isaid.transforms(False, 80))
    images = torch.stack([data[i][0][:, :64, :64] for i in range(2)])
    patches = images.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    expected = float((patches - patches.mean(0)).abs().mean())
    assert reproduce.guess(tmp_path / "run")["loss"] == pytest.approx(expected, rel=1e-5)


def test_mistakes_get_one_line(table, capsys, monkeypatch):
    died = Mock(return_value=Mock(returncode=-9, stderr=""))
    monkeypatch.setattr(reproduce.subprocess, "run", died)
    for text, flags, message in (
        ("a --epochs 1", "", "line 1: expected is a new name"),
        ("a: x\na: y", "", "line 2: expected is a new name"),
        ("a: --init {b}", "", "line 1: {b} is not a row above it"),
        ("a: --epochs nine", "", "--epochs: expected is a whole number of at least 1, not 'nine'"),
        ("a: --epochs 1", "--rows b", "--rows b: no row of"),
        ("", "", "has no results of these rows and seeds"),
        ("a: --epochs 1", "", "exit status -9"),
    ):
        table.write_text(text)
        with pytest.raises(SystemExit) as stop:
            reproduce.main([str(table), *flags.split()])
        said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
        assert said.startswith("error: ") and message in said and "Traceback" not in said
    with pytest.raises(SystemExit, match="none.txt: cannot be read as a table"):
        reproduce.main([str(table.with_name("none.txt"))])
