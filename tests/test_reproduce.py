"""Experiments: rows run once, after those they start from; results of other flags are refused."""

import json
import math
import os
import re
import shutil
import statistics
import traceback
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import isaid
import reproduce
import train
from util import checkpoint, cli
from util.experiments import dependencies, load_experiment, start_from
from util.tables import make_tables

TINY = "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --epochs 1"
TINY += " --num_queries 5 --image_size 64 --limit_train 4 --limit_val 2 --batch_size 4"

SMALL_EXPERIMENT = """
from util.experiments import start_from

rows = {"deformable-scratch": "RECIPE --epochs 2"}
rows["start"] = "RECIPE --setting pretrain --ssl_task mim-discrete --vocabulary 4"
rows["deformable-after"] = "RECIPE --init {start} --freeze backbone --epochs 2"
comparisons = [("few", "deformable-after", "deformable-scratch")]
authors = {"v1": {1: 13.6, 2: 16.2, 25: 28.5}}
"""

# A train.py that writes a run without training.
OTHER_CODE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
config = {"revision": "another", "versions": {"device": "an abacus"}}
(out / "config.json").write_text(json.dumps(config))
line = {"epoch": 1, "ap": 0.5, "ap50": 0.5, "eval_seconds": 0.01}
(out / "log.jsonl").write_text(json.dumps(line))
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The path of an experiment.py of three rows; its runs go to tmp_path/runs."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(f"# small\n{TINY}\n")
    path = tmp_path / "small" / "experiment.py"
    path.parent.mkdir()
    relative = os.path.relpath(recipe, reproduce.ROOT)
    path.write_text(SMALL_EXPERIMENT.replace("RECIPE", f"@{relative}"))
    return path


def call(experiment, flags):
    """Run reproduce.py with these flags; it must succeed."""
    with pytest.raises(SystemExit) as end:
        reproduce.main([str(experiment.parent), *flags.split()])
    assert not end.value.code, end.value.code


def new_results(experiment, flags):
    """The names of the results that a call writes."""
    runs = reproduce.RUNS / "small"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    call(experiment, flags)
    written = set()
    for path in runs.glob("*.json"):
        if path.stat().st_mtime_ns != before.get(path):
            written.add(path.stem)
    return written


def test_an_experiment(experiment, capsys):
    runs = reproduce.RUNS / "small"
    assert new_results(experiment, "--rows scratch") == {"deformable-scratch-0"}
    expected = {"deformable-scratch-1", "start-1", "deformable-after-1"}
    assert new_results(experiment, "--seeds 1 --jobs 2") == expected

    results = {path.stem: json.loads(path.read_bytes()) for path in runs.glob("*.json")}
    after = results["deformable-after-1"]
    start = results["start-1"]
    assert "runs/small/start-1 --freeze backbone --epochs 2 --seed 1 --out" in after["command"]
    assert after["flags"]["starts"] == [start["flags"]]
    assert after["flags"]["hidden_dim"] == 32
    frozen = "backbone.0.body.layer1.0.conv1.weight"
    after_state = torch.load(runs / "deformable-after-1/last.pt")
    start_state = torch.load(runs / "start-1/last.pt")
    assert torch.equal(after_state["model"][frozen], start_state["model"][frozen])

    table = (runs / "table.md").read_text(encoding="utf-8")
    baseline = start["log"][-1]["ssl_baseline"]
    ap50 = []
    for seed in (0, 1):
        ap50.append(100 * results[f"deformable-scratch-{seed}"]["log"][-1]["ap50"])
    assert f"{sum(ap50) / 2:.1f} ± {statistics.stdev(ap50):.1f} | not by all | 2 |" in table
    assert f"| {baseline:.3f} | 0.250 |" in table
    assert 0.25 <= baseline <= 1
    assert "| authors v1 | 13.6 | 16.2 | 28.5 |  |  | 1 |" in table
    assert (runs / "curves.png").stat().st_size > 1000

    # The results are enough to print the table …
    for path in list(runs.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
    capsys.readouterr()
    assert not new_results(experiment, "--seeds 0 1 --rows scratch")
    assert "± " in capsys.readouterr().out
    assert (runs / "table.md").read_text(encoding="utf-8") == table
    # … but not to start another row from, and neither is an unfinished run.
    (runs / "start-1").mkdir(parents=True)
    (runs / "deformable-after-1.json").unlink()
    assert not new_results(experiment, "--seeds 1 --rows start")  # no row needs it
    capsys.readouterr()
    assert new_results(experiment, "--seeds 1 --rows after") == {"start-1", "deformable-after-1"}
    assert "| start |" not in capsys.readouterr().out


@pytest.fixture
def results_of_small(experiment):
    """The results of an experiment's rows with seed 1, as if they had been run."""
    loaded = load_experiment(experiment)
    runs = reproduce.RUNS / "small"
    runs.mkdir(parents=True)
    detection = {"epoch": 1, "ap": 0.1, "ap50": 0.2}
    pretraining = {"epoch": 1, "ssl_loss": 1.0, "ssl_acc": None, "ssl_baseline": 2.0}
    for name in loaded.rows:
        result = {
            "command": "python train.py",
            "flags": reproduce.resolve(loaded, name),
            "revision": checkpoint.revision(),
            "versions": {},
            "log": [pretraining if name == "start" else detection],
        }
        (runs / f"{name}-1.json").write_text(json.dumps(result))
    return runs


def test_published_results_count(experiment, results_of_small, capsys):
    """They are next to experiment.py; the result of another row is not mistaken for one."""
    path = results_of_small / "start-1.json"
    shutil.copy(path, results_of_small / "start-0-0.json")  # of a row named start-0
    result = json.loads(path.read_text())
    published = {**result, "revision": "abc12"}
    (experiment.parent / "start-1.json").write_text(json.dumps(published))
    path.unlink()
    assert not new_results(experiment, "--rows start --seeds 1")
    printed = capsys.readouterr().out
    assert "scratch" not in printed
    assert printed.count("| start |") == 1
    here = checkpoint.revision()
    expected = f"1 results were produced with a different revision: abc12 (here: {here})"
    assert expected in printed
    table = (results_of_small / "table.md").read_text(encoding="utf-8")
    assert "| deformable-scratch |" in table  # it always holds all rows


def test_results_of_other_flags_are_refused(experiment, results_of_small, tmp_path):
    def refused(message):
        with pytest.raises(SystemExit, match=message):
            reproduce.main([str(experiment.parent), "--no_run"])

    recipe = tmp_path / "recipe.txt"
    recipe.write_text(f"# another comment\n{TINY}")
    call(experiment, "--no_run")
    recipe.write_text(f"{TINY} --lr 2e-3")
    refused(r"scratch-1.json was produced with different flags \(--lr 0.001, now 0.002\); delete")
    recipe.write_text(TINY)
    text = experiment.read_text(encoding="utf-8")
    experiment.write_text(text.replace("--vocabulary 4", "--vocabulary 5"), encoding="utf-8")
    refused(r"start-1.json .*--vocab\w+ 4, now 5")
    (results_of_small / "start-1.json").unlink()
    refused(r"after-1.json .*in its start, --vocab\w+ 4, now 5")
    experiment.write_text(text)
    (results_of_small / "start-2.json").write_text("[1]")
    refused("start-2.json: not a result file")
    (results_of_small / "start-2.json").write_text("[1")
    refused("start-2.json")


def test_difference():
    """A flag on one side only counts as its default there; one that is no flag is an error."""
    flags = {"epochs": 3, "starts": []}
    assert reproduce.difference(flags, flags) == ""
    assert reproduce.difference(flags, {**flags, "epochs": 4}) == "--epochs 3, now 4"
    default = train.parse([])[0].dec_layers
    with_default = {**flags, "dec_layers": default}
    with_other = {**flags, "dec_layers": default + 1}
    assert reproduce.difference(flags, with_default) == ""
    assert reproduce.difference(with_default, flags) == ""
    changed = f"--dec_layers {default}, now {default + 1}"
    assert reproduce.difference(flags, with_other) == changed
    assert reproduce.difference(with_other, flags) == f"--dec_layers {default + 1}, now {default}"
    assert "--gone" in reproduce.difference({**flags, "gone": 1}, flags)
    after = {"epochs": 3, "starts": [flags]}
    after_other = {"epochs": 3, "starts": [with_other]}
    assert reproduce.difference(after, {**after, "starts": []}) == "a different start"
    assert reproduce.difference(after, after_other) == f"in its start, {changed}"


# ---------------------------------------------------------------- running
@pytest.fixture
def other_code(tmp_path):
    """A folder with a train.py that does not train."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text(OTHER_CODE)
    return folder


def test_a_row_with_the_code_of_another_revision(experiment, other_code, tmp_path):
    """--code: another folder's train.py is run, the result comes here, with the time it took."""
    experiment.write_text('rows = {"quick": "--epochs 1"}')
    call(experiment, f"--code {other_code} --out {tmp_path}/out")
    result = json.loads((tmp_path / "out" / "quick-0.json").read_text())
    assert result["revision"] == "another"
    assert 0 <= result["seconds"] < 60
    assert result["log"] == [{"epoch": 1, "ap": 0.5, "ap50": 0.5, "eval_seconds": 0.01}]


def test_results_on_other_data_or_devices_are_reported(experiment, other_code, tmp_path, capsys):
    (other_code / "own").mkdir()
    rows = {"quick": "--epochs 1 --data {data}", "other": "--epochs 1 --data own"}
    experiment.write_text(f"rows = {rows}")
    for seed, name in enumerate(("a", "b")):
        data = tmp_path / name
        data.mkdir()
        call(experiment, f"--code {other_code} --out {tmp_path}/out --seeds {seed} --data {data}")
        assert "different dataset" not in capsys.readouterr().out
    call(experiment, f"--no_run --out {tmp_path}/out --data {tmp_path}/b")
    printed = capsys.readouterr().out
    assert f"1 results were produced with a different dataset: {tmp_path}/a" in printed
    assert "4 results were produced with a different device: an abacus (here: " in printed
    assert "dataset: own" not in printed


def test_processes_and_folder_of_a_run(tmp_path, capsys):
    """--nproc starts each row in several processes, --out is where runs and results go."""
    flags = f"tasks --dry_run --rows backbone --nproc 2 --seeds 3 3 --out {tmp_path}/there"
    with pytest.raises(SystemExit, match="0"):
        reproduce.main(flags.split())
    start = "python -m torch.distributed.run --standalone --nproc_per_node 2 train.py --image_size"
    (command,) = capsys.readouterr().out.strip().splitlines()
    assert command.startswith(start)
    assert f"--seed 3 --out {tmp_path}/there/backbone-3" in command
    with pytest.raises(SystemExit, match="--jobs"):
        reproduce.main([*flags.split(), "--jobs", "2"])


def test_the_program_of_an_experiment(experiment, capsys):
    """An experiment may start the training with a module of its own."""
    experiment.write_text('rows = {"a": "--lr 1"}\nprogram = ["-m", "results.x.train"]')
    call(experiment, "--dry_run")
    assert capsys.readouterr().out.startswith("python -m results.x.train --lr 1 --seed 0 --out ")


def test_an_interrupted_row_is_resumed_without_a_time(experiment, other_code, tmp_path):
    """The seconds of a part of a run would be mistaken for those of the whole."""
    experiment.write_text('rows = {"quick": "--epochs 1"}')
    code = OTHER_CODE.replace("parents=True", "parents=True, exist_ok=True")
    (other_code / "train.py").write_text(code)
    (tmp_path / "out" / "quick-0").mkdir(parents=True)
    call(experiment, f"--code {other_code} --out {tmp_path}/out")
    result = json.loads((tmp_path / "out" / "quick-0.json").read_text())
    assert "seconds" not in result


# ---------------------------------------------------------------- published experiments
def test_the_papers_experiment(tmp_path, capsys):
    """Each of its rows parses, missing files are reported, each kind of row takes a step."""
    with pytest.raises(SystemExit, match="1"):
        reproduce.main(["paper", "--dry_run", "--data", str(tmp_path)])
    out, errors = capsys.readouterr()
    commands = [line for line in out.splitlines() if line]
    assert len(commands) == len(reproduce.find_experiment("paper").rows) == 24
    assert errors.count("not found") == 6  # DALL-E's encoder, ImageNet
    with pytest.raises(SystemExit) as stop:  # at once, not when their turn comes
        reproduce.main(f"paper --data {tmp_path} --out {tmp_path}/out".split())
    assert str(stop.value) == f"error: {'; '.join(errors.splitlines())}"
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(SystemExit) as end:  # the authors' curves, also without a run of ours
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
        flags = re.sub(r"--init detr-r50 --init_parts", start, commands[n])
        names = "--init (detr-r50|deformable-detr)"
        flags = re.sub(rf"{names}|--tokenizer_weights weights\S+|--resume", "", flags)
        flags = flags.split()[2:]
        flags += [*small.split(), "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/{n}"]
        train.main(flags)
        (line,) = reproduce.read_log(tmp_path / str(n))
        assert math.isfinite(line["train_loss"])


def test_experiments_are_listed(capsys):
    reproduce.main([])
    out = capsys.readouterr().out
    assert re.search("paper +24 rows, 0 results published; needs --data", out)
    assert re.search("tasks +41 rows, 41 results published\n", out)


@pytest.mark.parametrize("name", ["tasks", "scenes", "again", "tiles", "leaks"])
def test_published_results_are_of_their_rows(name):
    """Every row has some, table.md is made from them, and each names its commit."""
    experiment = reproduce.find_experiment(name)
    results = reproduce.read_results([reproduce.RESULTS / name], experiment)
    published = (reproduce.RESULTS / name / "table.md").read_text(encoding="utf-8")
    tables = make_tables(results, experiment)
    assert published == tables + "\n"
    assert experiment.rows.keys() == results.keys()
    for runs in results.values():
        for result in runs.values():
            assert re.fullmatch("[0-9a-f]{7,}", result["revision"])


def test_the_mean_patch_by_hand(tmp_path):
    """The baseline of pixels is the loss of predicting the mean of all counted patches."""
    flags = TINY.replace("64", "80")  # a border of 16 pixels belongs to no whole patch
    train.main(f"{flags} --setting pretrain --ssl_task reconstruct --out {tmp_path}/run".split())
    data = isaid.synthetic_dataset("val", 2, 80, isaid.make_transforms(False, 80))
    images = torch.stack([data[i][0][:, :64, :64] for i in range(2)])
    patches = images.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    expected = float((patches - patches.mean(0)).abs().mean())
    (line,) = reproduce.read_log(tmp_path / "run")
    assert line["ssl_baseline"] == pytest.approx(expected, rel=1e-5)
    assert line["ssl_chance"] is None


# ---------------------------------------------------------------- mistakes
def test_starts_in_flags():
    flags = f"--data {{data}} {start_from('a-b', 'backbone')} {start_from('c', 'encoder')}"
    assert flags.endswith("--init {a-b} --init_parts backbone --init {c} --init_parts encoder")
    assert dependencies(flags) == ["a-b", "c"]


MISTAKES = [  # rows, flags of reproduce.py, what the message says
    ({"a": "--init {b}"}, "", "row 'a': {b} refers to a row that is not defined above"),
    ({"a": "--init {a}"}, "", "row 'a': {a} refers to a row that is not defined above"),
    ({"a": "--epochs nine"}, "--dry_run", "experiment.py, row 'a': argument --epochs: expected"),
    ({"a": "--epochz 1"}, "--no_run", "row 'a': "),
    ({"a": "--lr 1", "b": "--seed=1"}, "--dry_run", "row 'b': --seed and --out are not allowed"),
    ({"a": "@more.txt"}, "--no_run", "row 'a': --seed and --out are not allowed"),
    ({"a": '"" --lr 1'}, "", "row 'a': an argument is empty"),
    ({"a": "--data {data}"}, "--dry_run --data gone", "gone: not found"),
    ({"a": "--data {data}"}, "", "require --data DIR"),
    ({"a": "--lr 1"}, "--code .", "--code"),
    ({"a": "--lr 1"}, "--dry_run --no_run", "--no_run: not allowed with argument --dry_run"),
    ({"a": "--epochs 1"}, "--rows b", "matches --rows b"),
    ({"a": "--epochs 1"}, "--no_run", "no results found"),
    ({"a": "--epochs 1"}, "", "exit status -9"),
]


@pytest.mark.parametrize("rows, flags, message", MISTAKES)
def test_mistakes_get_one_line(experiment, capsys, monkeypatch, rows, flags, message):
    """Those of a row name it, also where nothing would be run."""
    monkeypatch.chdir(experiment.parent)
    died = Mock(return_value=Mock(returncode=-9, stderr=""))
    monkeypatch.setattr(reproduce.subprocess, "run", died)
    Path("more.txt").write_text("--out x")
    rows = {name: text.replace("@", f"@{experiment.parent}/") for name, text in rows.items()}
    experiment.write_text(f"rows = {rows}")
    error = error_of([str(experiment.parent), *flags.split()], capsys)
    assert message in error


def error_of(arguments, capsys):
    """The one line that a call of reproduce.py ends with."""
    with pytest.raises(SystemExit) as stop:
        reproduce.main(arguments)
    error = stop.value.code
    if not isinstance(error, str):
        error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    return error


def test_mistakes_of_names(experiment, capsys):
    assert "unknown experiment 'none'" in error_of(["none"], capsys)
    assert "missing name of an experiment" in error_of(["--seeds", "3"], capsys)
    rows = {"a": "--setting pretrain", "b": "--lr 1"}
    for pair in (("a", "b"), ("b", "a"), ("b", "c")):
        experiment.write_text(f"rows = {rows}\ncomparisons = [('few', *{pair})]")
        error = error_of([str(experiment.parent)], capsys)
        assert "is compared, but is not a row with detection" in error
        experiment.write_text(f"rows = {rows}\ngoals = [(*{pair}, 80)]")
        error = error_of([str(experiment.parent)], capsys)
        assert "is compared, but is not a row with detection" in error


@pytest.mark.parametrize("path", sorted(reproduce.RESULTS.glob("*/experiment.py")), ids=str)
def test_published_figures_do_not_depend_on_the_processor_s_precision(path, monkeypatch):
    """Every row names its --amp; the default differs between processors."""
    monkeypatch.chdir(reproduce.ROOT)
    monkeypatch.setattr(cli, "default_amp", Mock(side_effect=AssertionError))
    for flags in load_experiment(path).rows.values():
        args, _ = train.parse(flags.split())
        assert args.amp in ("no", "bf16")


def test_missing_files_are_named(experiment, capsys):
    experiment.write_text('rows = {"a": "--data gone --init nowhere"}')
    with pytest.raises(SystemExit, match="^1$"):
        reproduce.main([str(experiment.parent), "--dry_run"])
    errors = capsys.readouterr().err
    assert "--data: gone not found\na: --init: nowhere not found" in errors
    assert f"at the top of {experiment}" in errors


@pytest.mark.parametrize("line", ["unknown_name", "a, b = 1, 2, 3", "rows["])
def test_errors_of_python_name_their_line(experiment, line):
    """A mistake in experiment.py is an ordinary exception, not a line without its place."""
    experiment.write_text(f"rows = {{}}\n{line}")
    with pytest.raises((NameError, RuntimeError, SyntaxError)) as error:
        reproduce.main([str(experiment.parent)])
    text = "".join(traceback.format_exception(error.value))
    assert f'File "{experiment}", line 2' in text
