"""Several processes give what one gives: gradients, AP, one run folder; an error in one of them ends all."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume import same_run, wait_for

import isaid
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "1", "--dim_feedforward", "32", "--num_queries", "8",
        "--image_size", "64", "--limit_train", "16", "--limit_val", "7", "--batch_size", "4"]
TASK = ["--setting", "multitask", "--ssl_task", "mim-continuous", "--ssl_patch", "16", "--dropout", "0.1"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")


def start(processes, script, *flags):
    """A script in that many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    return subprocess.Popen([sys.executable, *map(str, [*launcher, script, *flags])], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def command(*how):
    process = start(*how)
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(how, process.returncode, out, errors)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    done = command(1, "tests/gradients.py", folder, 1)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("processes, accumulate", [(2, 1), (1, 2)], ids=["two processes", "two batches a step"])
def test_gradients_of_parts_are_those_of_the_whole(processes, accumulate, alone, tmp_path):
    """All settings and tasks; the second half of the images holds no objects."""
    done = command(processes, "tests/gradients.py", tmp_path, accumulate)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == alone.keys() and len(found) == 9
    for kind in found:
        for (name, mine), (other, right) in zip(found[kind].items(), alone[kind].items()):
            if name == "losses":
                assert mine == pytest.approx(right, rel=1e-4), kind
                continue
            assert name.removeprefix("module.") == other
            assert (mine - right).norm() <= 1e-3 * right.norm() + 1e-6, (kind, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = command(2, "train.py", *TINY, *TASK, "--epochs", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_one_run_folder(run):
    out, printed = run
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "config.json", "curves.png", "detections.png", "last.pt", "log.jsonl",
                                                         "ssl.png"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert printed.count("epoch   1/2") == 1 and "8 images a step, 2 steps an epoch, 2 epochs: 32 images in all" in printed


def test_evaluation_counts_every_image_once(run):
    """Seven images, in one, two and three processes."""
    metrics = []
    for processes in (1, 2, 3):
        done = command(processes, "eval.py", run[0])
        assert done.returncode == 0 and done.stdout.count("AP50") == 2, done.stderr
        metrics.append(json.loads((run[0] / "metrics.json").read_text()))
    tasks = [found.pop("ssl_loss") for found in metrics]
    assert metrics[0]["images"] == 7 and metrics[0] == metrics[1] == metrics[2] and tasks == pytest.approx([tasks[0]] * 3, rel=1e-6)
    log = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda line: (line["ap"], line["epoch"]))  # its weights and batch statistics are best.pt's
    assert (metrics[0]["ap"], metrics[0]["ar"]) == pytest.approx((best["ap"], best["ar"]), abs=1e-9)
    assert tasks[0] == pytest.approx(best["ssl_loss"], rel=1e-6)


def test_stopped_and_resumed_is_undisturbed(run, tmp_path):
    """SIGTERM to the launcher, as a cluster sends it; then the same bits, and each process's own losses in the log."""
    out, flags = tmp_path / "run", [*TINY, *TASK, "--epochs", 2, "--save_every", 1, "--workers", 1]
    process = start(2, "train.py", *flags, "--out", out)
    wait_for(process, (out / "last.pt").exists)
    process.terminate()
    printed, _ = process.communicate(timeout=100)
    assert "to go on, the same command" in printed
    done = command(2, "train.py", *flags, "--out", out, "--resume")
    assert done.returncode == 0 and "resumed     in epoch 1" in done.stdout, done.stderr
    same_run(run[0], out, epochs=2)
    with pytest.raises(SystemExit, match="was made with 2 steps an epoch in 2 processes, not 4 in 1"):
        train.main([*map(str, flags), "--out", str(out), "--resume"])


def test_an_error_in_one_process_ends_all(tmp_path):
    isaid.main(["scenes", str(tmp_path / "data"), "--train", "8", "--val", "2", "--image_size", "64"])
    (tmp_path / "data/train/images/scene_000003.png").write_bytes(b"nonsense")
    start = time.monotonic()
    done = command(2, "train.py", *TINY, "--data", tmp_path / "data", "--limit_train", 8, "--epochs", 1, "--out", tmp_path / "run")
    assert done.returncode and "scene_000003.png: is not an image that can be read" in done.stderr
    assert time.monotonic() - start < 100
    assert not (tmp_path / "run").exists()  # nothing was learnt, and the same command works once the image is mended
    (tmp_path / "elsewhere.py").write_text(  # the data are not there for the second process only, as on another machine
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nos.chdir({str(tmp_path)!r} if os.environ['RANK'] == '0' else '/')\n"
        "import train\ntrain.main(sys.argv[1:])\n")
    done = command(2, tmp_path / "elsewhere.py", *TINY, "--data", "data", "--out", tmp_path / "other")
    assert done.returncode and done.stderr.count("error: ") == 1 and "train.json: cannot be read" in done.stderr
    assert not (tmp_path / "other").exists()
