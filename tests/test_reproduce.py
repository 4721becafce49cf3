"""Tables of runs: rows are run once, what others start from first; what is stale is refused."""

import itertools
import json
import math
import os
import re
import shutil
import statistics
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.stats
import torch

import isaid
import reproduce
import train
from util import checkpoint

TINY = "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --epochs 1"
TINY += " --num_queries 5 --image_size 64 --limit_train 4 --limit_val 2 --batch_size 4"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    (tmp_path / "recipe.txt").write_text(f"# small\n{TINY}\n")
    recipe = f"@{os.path.relpath(tmp_path / 'recipe.txt', reproduce.ROOT)}"
    (tmp_path / "small.txt").write_text(f"""deformable-scratch: {recipe} --epochs 2  # a comment
model = deformable
start: {recipe} --setting pretrain --ssl_task mim-discrete --vocabulary 4
<model>-after: {recipe} --init {{start}} --freeze backbone --epochs 2
compare few: <model>-after - <model>-scratch  # another
authors v1: 1:13.6 2:16.2 25:28.5""")
    return tmp_path / "small.txt"


def test_a_table(table, tmp_path, capsys):
    runs, shipped, recipe = (tmp_path / x for x in ("runs/small", "results/small", "recipe.txt"))
    shown = runs / "table.md"

    def call(flags):
        """The results that a call makes anew, and what it prints."""
        before = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
        with pytest.raises(SystemExit) as end:
            reproduce.main([str(table), *flags.split()])
        assert not end.value.code, end.value.code
        made = {x.stem for x in runs.glob("*.json") if x.stat().st_mtime_ns != before.get(x)}
        return made, capsys.readouterr().out

    def refused(message):
        with pytest.raises(SystemExit, match=message):
            reproduce.main([str(table), "--no_run"])

    assert call("--rows scratch")[0] == {"deformable-scratch-0"}
    made, printed = call("--seeds 1 --jobs 2")
    assert made == {"deformable-scratch-1", "start-1", "deformable-after-1"}
    content = {path.stem: json.loads(path.read_bytes()) for path in runs.glob("*.json")}
    after, start = content["deformable-after-1"], content["start-1"]
    assert "runs/small/start-1 --freeze backbone --epochs 2 --seed 1 --out" in after["command"]
    assert after["flags"]["starts"] == [start["flags"]] and after["flags"]["hidden_dim"] == 32
    states = [torch.load(runs / f"{x}-1/last.pt") for x in ("deformable-after", "start")]
    frozen = "backbone.0.body.layer1.0.conv1.weight"
    assert torch.equal(*(state["model"][frozen] for state in states))
    whole, guess = shown.read_text(encoding="utf-8"), start["log"][-1]["ssl_baseline"]
    last = [100 * content[f"deformable-scratch-{seed}"]["log"][-1]["ap50"] for seed in (0, 1)]
    assert f"{sum(last) / 2:.1f} ± {statistics.stdev(last):.1f} | not by all | 2 |" in whole
    assert f"| {guess:.3f} | 0.250 |" in whole and 0.25 <= guess <= 1
    assert "| authors v1 | 13.6 | 16.2 | 28.5 |  |  | 1 |" in whole
    assert (runs / "curves.png").stat().st_size > 1000

    for path in filter(Path.is_dir, [*runs.iterdir()]):  # the results are enough …
        shutil.rmtree(path)
    made, printed = call("--seeds 0 1 --rows scratch")
    assert not made and "± " in printed and shown.read_text(encoding="utf-8") == whole
    (runs / "start-1").mkdir(parents=True)  # … but not to start from, nor is half a run
    (runs / "deformable-after-1.json").unlink()
    assert not call("--seeds 1 --rows start")[0]  # what starts from it is not asked for
    made, printed = call("--seeds 1 --rows after")
    assert made == {"start-1", "deformable-after-1"} and "| start |" not in printed
    shutil.copy(runs / "start-1.json", runs / "start-0-0.json")  # of another row, start-0
    shipped.mkdir(parents=True)  # published results are taken as they are
    (shipped / "start-1.json").write_text(json.dumps({**start, "revision": "abc12"}))
    (runs / "start-1.json").unlink()
    recipe.write_text(f"# another comment\n{TINY}")
    made, printed = call("--rows start --seeds 1")
    assert not made and "scratch" not in printed and printed.count("| start |") == 1
    assert f"1 results are of revision abc12, yours is {checkpoint.revision()}" in printed
    assert b"| deformable-scratch |" in shown.read_bytes()  # always holds all
    recipe.write_text(f"{TINY} --lr 2e-3")
    refused("scratch-0.json was made with --lr 0.001, now 0.002; delete it")
    recipe.write_text(TINY)
    table.write_text(table.read_text(encoding="utf-8").replace("--vocabulary 4", "--vocabulary 5"))
    refused("start-1.json was made with --vocabulary 4, now 5; delete it")
    (shipped / "start-1.json").unlink()
    refused("after-1.json .* in what it starts from --vocabulary 4, now 5; delete it")


def test_comparisons_by_hand():
    """Differences paired by seed; the exact p flips all signs; Holm's is over the family."""
    rng, results = np.random.default_rng(0), {}
    for row, gain in (("scratch", 0), ("better", 0.05), ("same", 0)):
        aps = 0.3 + rng.normal(scale=0.01, size=(6, 2)) + gain
        logs = [[{"epoch": i + 1, "ap": ap} for i, ap in enumerate(run)] for run in aps]
        results[row] = {seed: {"log": log} for seed, log in enumerate(logs)}
    pairs = [("few", "better", "scratch"), ("few", "same", "scratch")]
    lines = [line.split(" | ") for line in reproduce.compare(results, pairs)[2:-1]]
    assert [line[1] for line in lines] == ["last epoch", "mean of the epochs"] * 2
    take = {"last epoch": lambda log: log[-1]["ap"],
            "mean of the epochs": lambda log: (log[0]["ap"] + log[1]["ap"]) / 2}  # fmt: skip
    ps = {}
    for name, measure, difference, interval, p, *_ in lines:
        row, other = name.removeprefix("| ").split(" - ")
        d = np.array([100 * take[measure](results[row][s]["log"]) - 100 * take[measure](
            results[other][s]["log"]) for s in range(6)])  # fmt: skip
        half = 2.5706 * d.std(ddof=1) / 6**0.5  # the quantile of Student's t for 5 degrees
        assert difference == f"{d.mean():+.1f}"
        assert interval == f"{d.mean() - half:+.1f} to {d.mean() + half:+.1f}"
        means = [abs((d * signs).mean()) for signs in itertools.product((1, -1), repeat=6)]
        ps[row, measure] = np.mean(np.array(means) >= abs(d.mean()) - 1e-12)
        assert p == f"{ps[row, measure]:.3f}"
    for line in lines:
        row, measure = line[0].removeprefix("| ").split(" - ")[0], line[1]
        low, high = sorted(ps[x, measure] for x in ("better", "same"))
        mine = ps[row, measure]
        assert line[5] == f"{min(1, 2 * low) if mine == low else max(min(1, 2 * low), high):.3f}"


def test_a_family_is_what_was_declared():
    """What has not been run counts in Holm's p; a longer run is compared at the shared epochs."""
    runs = {"scratch": (0.1, 0.2), "better": (0.2, 0.3, 0.9)}
    results = {row: {seed: {"log": [{"epoch": i, "ap": ap + seed / 500 * (row == "better")}
                                    for i, ap in enumerate(aps)]} for seed in range(6)}
               for row, aps in runs.items()}  # fmt: skip
    pairs = [("few", row, "scratch") for row in ("better", "not run", "nor this")]
    for line in reproduce.compare(results, pairs)[2:-1]:
        _, _, difference, _, p, holm, _ = line.split(" | ")
        assert difference == "+10.5" and p == "0.031" and holm == f"{3 * 2 / 64:.3f}"


def test_goals_by_hand(tmp_path):
    """AP50 over all seeds, time over those that both rows have run in one go."""
    now = {0: (0.82, 60), 1: (0.83, 66), 2: (0.81, None)}
    results = {"now": {}, "first": {seed: {"seconds": 120} for seed in (0, 1, 2)}}
    for seed, (ap50, seconds) in now.items():
        results["now"][seed] = {
            "log": [{"ap50": ap50}],
            **({"seconds": seconds} if seconds else {}),
        }
    (line,) = reproduce.speed(results, [("now", "first", 80.0)])[2:-1]
    p = scipy.stats.t.sf(2.0 / (1.0 / 3**0.5), 2)  # mean 82, deviation 1, three seeds
    half = 12.7062 * (0.05 / 2**0.5) / 2**0.5  # shares 0.50 and 0.55; the quantile for 1 degree
    share = f"0.53, {0.525 - half:.2f} to {0.525 + half:.2f} (2)"
    cells = ["now", "82.0 ± 1.0 (3)", "80", f"{p:.4f}", "1.05 ± 0.07", "2.00 ± 0.00", share]
    assert line == f"| {' | '.join(cells)} |"
    (line,) = reproduce.speed({"now": results["now"]}, [("now", "first", 80.0)])[2:-1]
    assert line == f"| {' | '.join([*cells[:4], '', '', ''])} |"  # without a pair only AP50
    (table := tmp_path / "t.txt").write_text("a: --lr 1\nb: --lr 1\ngoal: b / a, 75.5\n")
    rows = reproduce.read_table(table)
    assert reproduce.read_goals(table, rows) == [("b", "a", 75.5)]
    table.write_text("a: --lr 1\ngoal: a / c, 80\n")
    with pytest.raises(ValueError, match="line 2: expected is ROW / OTHER ROW, AP50, not 'a / c"):
        reproduce.read_goals(table, reproduce.read_table(table))


def test_a_row_with_the_code_of_another_revision(table, tmp_path, capsys):
    """--code: another folder's train.py is run, the result comes here, with the time it took."""
    (code := tmp_path / "code").mkdir()
    (code / "train.py").write_text(OTHER_CODE)
    table.write_text("quick: --epochs 1")
    with pytest.raises(SystemExit):
        reproduce.main([str(table), "--code", str(code), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "quick-0.json").read_text())
    assert result["revision"] == "another" and 0 <= result["seconds"] < 60
    assert result["log"] == [{"epoch": 1, "ap": 0.5, "ap50": 0.5, "eval_seconds": 0.01}]


def test_results_on_other_data_or_devices_are_said(table, tmp_path, capsys):
    (code := tmp_path / "code").mkdir()
    (code / "train.py").write_text(OTHER_CODE)
    (code / "own").mkdir()
    table.write_text("quick: --epochs 1 --data {data}\nother: --epochs 1 --data own")
    (a := tmp_path / "a").mkdir()
    (b := tmp_path / "b").mkdir()
    for seed, data in enumerate((a, b)):
        flags = ["--code", code, "--out", tmp_path / "out", "--seeds", seed, "--data", data]
        with pytest.raises(SystemExit):
            reproduce.main([str(table), *map(str, flags)])
        assert "of data" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main([str(table), "--no_run", "--out", str(tmp_path / "out"), "--data", str(b)])
    said = capsys.readouterr().out
    assert f"1 results are of data {a}, yours is {b}" in said
    assert "4 results are of device an abacus, yours is " in said and "data own" not in said


OTHER_CODE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
config = {"revision": "another", "versions": {"device": "an abacus"}}
(out / "config.json").write_text(json.dumps(config))
line = {"epoch": 1, "ap": 0.5, "ap50": 0.5, "eval_seconds": 0.01}
(out / "log.jsonl").write_text(json.dumps(line))
"""


def test_the_papers_table(tmp_path, capsys):
    """Each of its rows parses, as does what it starts from; what is missing is said; and each
    kind of row takes a step, at a small size."""
    with pytest.raises(SystemExit, match="1"):
        reproduce.main(["paper", "--dry_run", "--data", str(tmp_path)])
    out, errors = capsys.readouterr()
    commands = [line for line in out.splitlines() if line]
    assert len(commands) == len(reproduce.read_table(reproduce.RECIPES / "paper.txt")) == 24
    assert errors.count("is not there") == 8  # COCO model, DALL-E's encoder, ImageNet
    with pytest.raises(SystemExit) as stop:  # at once, not when their turn comes
        reproduce.main(f"paper --data {tmp_path} --out {tmp_path}/out".split())
    assert str(stop.value) == f"error: {'; '.join(errors.splitlines())}"
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(SystemExit) as end:  # their figures, also without a run of ours
        reproduce.main(f"paper --no_run --out {tmp_path}/theirs".split())
    assert not end.value.code
    assert "| authors deformable_detr-v0, printed | 13.6 | 16.2 | 20.4 |" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "theirs")) == ["curves.png", "table.md"]
    isaid.main(f"scenes {tmp_path}/data --train 2 --val 1 --image_size 64".split())
    small = "--backbone resnet18 --no-frozen_bn --hidden_dim 32 --enc_layers 1 --dec_layers 1 "
    small += "--dim_feedforward 32 --num_queries 5 --image_size 64 --batch_size 2 --epochs 1"
    small += " --vocabulary 4"
    for n in (0, 1, 2, 3, 4, 5, 10, 13, 14, 15, 16):
        start = f"--init {tmp_path}/0 --init_parts"
        flags = re.sub(r"--init http\S+ --init_parts", start, commands[n])
        flags = re.sub(r"--(init|tokenizer_weights) (http|weights)\S+|--resume", "", flags)
        flags = flags.split()[2:]
        flags += [*small.split(), "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/{n}"]
        train.main(flags)
        log = [json.loads(line) for line in (tmp_path / f"{n}/log.jsonl").open(encoding="utf-8")]
        assert len(log) == 1 and math.isfinite(log[0]["train_loss"])


def test_processes_and_folder_of_a_run(tmp_path, capsys):
    """--nproc starts each row in several processes, --out is where runs and results go."""
    flags = f"tasks --dry_run --rows backbone --nproc 2 --seeds 3 3 --out {tmp_path}/there"
    with pytest.raises(SystemExit, match="0"):
        reproduce.main(flags.split())
    start = "python -m torch.distributed.run --standalone --nproc_per_node 2 train.py --image_size"
    (command,) = capsys.readouterr().out.strip().splitlines()
    assert command.startswith(start) and f"--seed 3 --out {tmp_path}/there/backbone-3" in command
    with pytest.raises(SystemExit, match="take --jobs"):
        reproduce.main([*flags.split(), "--jobs", "2"])


def test_tables_are_listed(capsys):
    with pytest.raises(SystemExit):
        reproduce.main([])
    out = capsys.readouterr().out
    assert re.search("paper +24 rows, 0 results published; needs --data", out)
    assert re.search("tasks +41 rows, 41 results published\n", out) and "detr.txt" not in out


@pytest.mark.parametrize("name", ["tasks", "scenes", "again", "tiles", "leaks"])
def test_published_results_are_of_their_rows(name):
    """Every row has some, table.md says what they say, and each names its commit."""
    rows = reproduce.read_table(reproduce.ROOT / f"recipes/{name}.txt")
    results = reproduce.read_results([reproduce.RESULTS / name], rows)
    written = (reproduce.RESULTS / name / "table.md").read_text(encoding="utf-8")
    comparisons = reproduce.read_comparisons(reproduce.RECIPES / f"{name}.txt", rows)
    expected = reproduce.tables(results, comparisons)
    assert written.strip() == expected.strip()
    assert rows.keys() == results.keys()
    revisions = {run["revision"] for runs in results.values() for run in runs.values()}
    assert all(re.fullmatch("[0-9a-f]{7,}", revision) for revision in revisions)


def test_the_mean_patch_by_hand(tmp_path):
    """The loss of a guess is that of predicting the mean of all counted patches."""
    flags = TINY.replace("64", "80")  # a border of 16 pixels belongs to no whole patch
    train.main(f"{flags} --setting pretrain --ssl_task reconstruct --out {tmp_path}/run".split())
    data = isaid.synthetic_dataset("val", 2, 80, isaid.make_transforms(False, 80))
    images = torch.stack([data[i][0][:, :64, :64] for i in range(2)])
    patches = images.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    expected = float((patches - patches.mean(0)).abs().mean())
    (line,) = reproduce.read_log(tmp_path / "run")
    assert line["ssl_baseline"] == pytest.approx(expected, rel=1e-5) and line["ssl_chance"] is None


def test_mistakes_get_one_line(table, capsys, monkeypatch):
    """Those of a row name its line, also where nothing would be run."""
    died = Mock(return_value=Mock(returncode=-9, stderr=""))
    monkeypatch.setattr(reproduce.subprocess, "run", died)
    table.with_name("more.txt").write_text("--out x")
    for text, flags, message in (
        ("a --epochs 1", "", "line 1: expected is a new name"),
        ("a: --lr 1\na: --lr 1", "", "small.txt, line 2: expected is a new name"),
        ("a: --init {b}", "", "line 1: {b} is not a row above it"),
        ("a: --epochs nine", "--dry_run", "small.txt, line 1: argument --epochs: expected is a"),
        ("# a\na: --epochz 1", "--no_run", "line 2: unknown: --epochz 1; did you mean --epochs?"),
        ("a: --lr 1\nb: --seed=1", "--dry_run", "line 2: --seed is not the row's; reproduce.py"),
        (f"a: @{table.with_name('more.txt')}", "--no_run", "line 1: --out is not the row's"),
        ("# detr\n--lr 1", "", "line 2: has flags, as a recipe has: python train.py @"),
        ("a: --data {data}", "--dry_run --data gone", f"--data {os.path.abspath('gone')}: is not"),
        ("a: --lr 1", "--dry_run --no_run", "--no_run: not allowed with argument --dry_run"),
        ("a: --epochs 1", "--rows b", "--rows b: no row of"),
        ("a: --epochs 1\nauthors v0: 1:20 21", "", "line 2: expected are EPOCH:AP"),
        ("a: --epochs 1\nauthors v0: 1:2.0.1", "", "line 2: expected are EPOCH:AP"),
        ("a: --epochs 1\ngoal: a / a, 8.0.0", "", "line 2: expected is ROW / OTHER ROW"),
        ("a: --epochs 1\ncompare few: a - a", "", "line 2: expected are two rows"),
        ("x = 1\nx = 2\na<x>: --lr <x>", "", "line 2: x is a list above"),
        ("a<y>: --lr 1", "", "line 1: no line above it is `y = words`"),
        ("", "", "has no rows"),
        ("a: --init {a}", "", "line 1: {a} is not a row above it"),
        ('a: "" --lr 1', "", "line 1: an argument is empty"),
        ("a: --epochs 1", "--no_run", "no results; name a folder with some"),
        ("a: --epochs 1", "", "exit status -9"),
    ):
        table.write_text(text)
        with pytest.raises(SystemExit) as stop:
            reproduce.main([str(table), *flags.split()])
        said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
        assert said.startswith("error: ") and message in said and "Traceback" not in said
    for name, message in (("none", "without a name"), ("scene", "did you mean scenes")):
        with pytest.raises(SystemExit, match=f"{name}: no such table; {message}"):
            reproduce.main([name])
    table.write_text("a: --data gone --init nowhere")
    with pytest.raises(SystemExit, match="^1$"):
        reproduce.main([str(table), "--dry_run"])
    said = capsys.readouterr().err
    assert "--data gone is not there\na: --init nowhere is not" in said
    assert f"may stand at the top of {table}" in said
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["--seeds", "3"])
    assert "error: flags without a table" in capsys.readouterr().err
