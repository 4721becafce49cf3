"""Runs that stop and go on: killed processes, the same bits; checkpoints whole or absent; NaN, bad images, full disks, overfitting."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import isaid
import run_state
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "1", "--dim_feedforward", "32", "--num_queries", "8",
        "--image_size", "64", "--limit_train", "32", "--limit_val", "3", "--batch_size", "4", "--dropout", "0.1", "--vflip"]
KINDS = {"detect": ["--ema", "0.9"],
         "multitask": ["--setting", "multitask", "--ssl_task", "jigsaw-discrete", "--ssl_patch", "16", "--accumulate", "2"],
         "pretrain": ["--setting", "pretrain", "--ssl_task", "mim-discrete", "--vocabulary", "4", "--model", "detr"]}


def start(out, *flags):
    return subprocess.Popen([sys.executable, "train.py", *TINY, "--epochs", "3", "--out", str(out), *map(str, flags)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            start_new_session=True)


def finish(process, status=0):
    out, errors = process.communicate(timeout=200)
    assert process.returncode == status and "Traceback" not in errors, (process.returncode, errors)
    return out + errors


def equal(a, b, path=""):
    """Whether two checkpoints are the same to the bit, apart from times and flags of how they are run."""
    if isinstance(a, dict):
        skip = {"seconds", "waited", "eval_seconds", "images_per_second", "data_wait", "args"}
        assert a.keys() == b.keys(), path
        for name in a.keys() - skip:
            equal(a[name], b[name], f"{path}/{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            equal(x, y, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs that nobody stopped, by kind; made when first asked for."""
    folder, made = tmp_path_factory.mktemp("undisturbed"), {}

    def get(kind):
        if kind not in made:
            finish(start(folder / kind, *KINDS[kind]))
            made[kind] = folder / kind
        return made[kind]
    return get


def same_run(one, other, epochs=3):
    for name in ("last.pt", "best.pt"):
        equal(*(torch.load(run / name, weights_only=True) for run in (one, other)))
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [line["epoch"] for line in logs[0]] == [*range(1, epochs + 1)]
    equal(*logs)


def wait_for(process, condition):
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it did not get that far")


@pytest.mark.parametrize("kind, how, workers, moment", [
    ("detect", signal.SIGKILL, 0, "within an epoch"), ("detect", signal.SIGTERM, 2, "within an epoch"),
    ("multitask", signal.SIGINT, 0, "within an epoch"), ("multitask", signal.SIGKILL, 2, "between epochs"),
    ("pretrain", signal.SIGTERM, 0, "between epochs"), ("pretrain", signal.SIGKILL, 0, "within an epoch")],
    ids=lambda x: getattr(x, "name", str(x)))
def test_stopped_and_resumed_is_undisturbed(kind, how, workers, moment, undisturbed, tmp_path):
    out, flags = tmp_path / "run", [*KINDS[kind], "--workers", workers, *(["--save_every", 1] if moment == "within an epoch" else [])]
    process = start(out, *flags, "--resume")  # with nothing there yet it is the start
    place = {}

    def arrived():
        if moment == "between epochs":
            return (out / "log.jsonl").exists()
        try:
            place.update(torch.load(out / "last.pt", weights_only=True)["place"])
        except (OSError, RuntimeError, EOFError):
            return False
        return place["epoch"] == 2 or place["step"] >= 2
    wait_for(process, arrived)
    if how == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, how)  # as terminals and launchers do: the loader processes get it too
    said = finish(process, {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how])
    assert how == signal.SIGKILL or "to go on, the same command" in said
    assert "resumed" in finish(start(out, *flags, "--resume"))
    same_run(undisturbed(kind), out)
    evaluation.main([str(out)])


def test_a_complete_run_and_other_flags(undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed("detect"), out)

    def again(*flags):
        train.main([*TINY, "--epochs", "3", "--out", str(out), *KINDS["detect"], *flags])
    again("--resume")
    assert "the run is complete" in capsys.readouterr().out
    same_run(undisturbed("detect"), out)
    with pytest.raises(SystemExit, match="last.pt: was made with --epochs 3, not 4, --lr 0.0005, not 0.001; a run goes on with"):
        again("--resume", "--lr", "1e-3", "--epochs", "4")
    with pytest.raises(SystemExit, match="run exists already"):
        again()
    state = torch.load(out / "last.pt", weights_only=True)
    state["categories"][0]["name"] = "boat"
    torch.save(state, out / "other.pt")
    with pytest.raises(SystemExit, match="other.pt: was made with other classes than the data's"):
        again("--resume", "other.pt")
    torch.save({**state, "args": Namespace()}, out / "official.pt")
    with pytest.raises(SystemExit, match="official.pt: is not a checkpoint of train.py; start from its weights with --init"):
        again("--resume", "official.pt")
    whole = bytearray((out / "last.pt").read_bytes())
    whole[len(whole) // 2] ^= 255
    for damaged, message in ((whole, r"damaged \(checksum of"), (whole[:5000], "damaged")):
        (out / "last.pt").write_bytes(damaged)
        with pytest.raises(SystemExit, match=f"last.pt: not a checkpoint of tensors and plain values, or {message}"):
            again("--resume")
    (out / "last.pt").unlink()
    with pytest.raises(SystemExit, match="last.pt: is gone, but its run has been going"):
        again("--resume")


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = "import sys, run_state, pathlib; run_state.enter(pathlib.Path(sys.argv[1])); print('in', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(SystemExit, match="another process is training in it"):
        train.main([*TINY, "--epochs", "1", "--out", str(tmp_path), "--resume"])
    other.kill()
    other.communicate()
    run_state.enter(tmp_path)
    run_state.leave(tmp_path)
    assert not tmp_path.exists()


def test_a_folder_with_files_of_others_is_left_alone(tmp_path):
    """Also where a run fails before its first checkpoint; one of its own is removed, so that the same command works again."""
    isaid.main(["scenes", str(tmp_path / "data"), "--train", "8", "--val", "3", "--image_size", "64"])
    for path in (tmp_path / "data/train/images").iterdir():
        path.write_bytes(path.read_bytes()[:-99])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    flags = [*TINY, "--data", str(tmp_path / "data"), "--epochs", "1", "--resume", "--out"]
    for name in ("mine", "new"):
        with pytest.raises(SystemExit, match="png: is damaged .*; nothing was saved yet"):
            train.main([*flags, str(tmp_path / name)])
    assert (tmp_path / "mine/notes.txt").read_text() == "precious" and not (tmp_path / "new").exists()


def test_signals_wait_for_files():
    """One interrupts at once only where nothing is lost, a second one everywhere; none while a file is written."""
    with run_state.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            with signals.held():
                os.kill(os.getpid(), signal.SIGINT)
                written = True
        signals.number, signals.at_once = 0, True
        with pytest.raises(KeyboardInterrupt):
            with signals.held():
                os.kill(os.getpid(), signal.SIGINT)
                written += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert written == 2


def test_checkpoints_are_whole_or_absent(tmp_path):
    """A writer killed in the middle leaves the old file."""
    code = ("import os, signal, sys, torch, run_state\n"
            "from pathlib import Path\n"
            "path = Path(sys.argv[1])\n"
            "run_state.save(path, {'n': 1, 'x': torch.zeros(10)})\n"
            "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
            "run_state.save(path, {'n': 2, 'x': torch.zeros(10 ** 6)})\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt")], cwd=ROOT)
    assert done.returncode == -9 and torch.load(tmp_path / "a.pt", weights_only=True)["n"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    run_state.save(path, {"n": 1})
    (tmp_path / "a.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="a.pt: cannot be written"):
        run_state.save(path, {"n": 2, "x": torch.zeros(10 ** 6)})
    assert torch.load(path, weights_only=True)["n"] == 1 and not (tmp_path / "a.tmp").exists()


def test_a_disk_that_is_too_small_is_met_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 ** 6))
    with pytest.raises(SystemExit, match="1 MB are free on its disk, checkpoints need up to"):
        train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_replaced_need_no_room_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state.shutil, "disk_usage", lambda _: SimpleNamespace(free=13 * 10 ** 6))
    model = torch.nn.Linear(1000, 1000)  # 4 MB; with the optimizer's averages 12
    with pytest.raises(ValueError, match="13 MB are free on its disk, checkpoints need up to 28"):
        run_state.check_disk(tmp_path, model, None)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).touch()
    run_state.check_disk(tmp_path, model, None)
    with pytest.raises(ValueError, match="need up to 16"):
        run_state.check_disk(tmp_path, model, 0.9)


@pytest.mark.parametrize("said, message", [
    ("DataLoader worker (pid 9) is killed by signal: Killed.", "a loader process was killed"),
    ("[gloo/transport/tcp/pair.cc:5] Connection reset by peer", "another process has ended"),
    ("CUDA out of memory. Tried to allocate 2 GiB", "the device's memory is too small")])
def test_failures_of_the_surroundings_get_one_line(said, message, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError(said)
    monkeypatch.setattr(train, "fit", fail)
    with pytest.raises(SystemExit, match=f"error: {message}.*nothing was saved yet"):
        train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "run")])


def test_folders_that_cannot_be_written(tmp_path):
    for path in ("/proc/run", "/dev/null/run"):
        if Path(path).parent.exists():
            with pytest.raises(SystemExit, match="cannot be made"):
                train.main([*TINY, "--epochs", "1", "--out", path])


# ---------------------------------------------------------------- faults

def test_nan_stops_before_the_step_and_can_be_repeated(tmp_path):
    """One line names the losses, the images and a command; that command meets the same batch."""
    flags = [*TINY, "--limit_train", "8", "--out", str(tmp_path / "run"), "--lr_schedule", "step", "--epochs", "50", "--eval_every", "50"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--lr", "4e9", "--weight_decay", "4e9"])
    said = stop.value.code
    assert "NaN or infinite" in said and "in step" in said and said.count("scene_") == 4 and "The step was not taken" in said
    state = torch.load(tmp_path / "run/failed.pt", weights_only=True)
    assert f"step {state['place']['step'] + 1} of epoch {state['place']['epoch']}" in said
    again = said
    for _ in range(2):  # what the repetition says can be repeated too
        command = again.split("again: python ")[1]
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
        again = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and again.split(";")[0] == said.split(";")[0]


def test_nan_in_evaluation_gets_one_line(tmp_path):
    train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run/best.pt", weights_only=True)
    state["model"]["input_proj.0.0.bias"][:] = torch.nan
    torch.save(state, tmp_path / "run/best.pt")
    with pytest.raises(SystemExit, match="what the model finds is NaN or infinite; its training diverged"):
        evaluation.main([str(tmp_path / "run")])


def test_unreadable_images_are_left_out_if_asked(tmp_path, capsys):
    isaid.main(["scenes", str(tmp_path / "data"), "--train", "9", "--val", "3", "--image_size", "64"])
    for name in ("train/images/scene_000003.png", "val/images/scene_000001.png"):
        (tmp_path / "data" / name).write_bytes(b"nonsense")
    images, path = isaid.split_files(tmp_path / "data", "train")
    coco = json.loads(path.read_text())
    for image in coco["images"]:  # as in some of iSAID's own files
        image.update(width=None, height=None)
    coco["images"] += [{"id": 9, "file_name": "gone.png"}, {"id": 10, "file_name": "scene_000000.png", "width": 64, "height": 99}]
    coco["annotations"].append({"id": 10 ** 6, "image_id": 0, "category_id": 1, "bbox": [9, 9, 9, 0.5]})
    path.write_text(json.dumps(coco))
    flags = [*TINY, "--data", str(tmp_path / "data"), "--epochs", "1"]
    with pytest.raises(SystemExit, match="1 of 11 images are missing, the first is .*gone.png"):
        train.main([*flags, "--out", str(tmp_path / "a")])
    train.main([*flags, "--out", str(tmp_path / "b"), "--skip_bad", "--workers", "1"])
    printed = capsys.readouterr().out
    assert "left out  4 images that cannot be used, the first: " in printed and ", 1 under a pixel after resizing" in printed
    evaluation.main([str(tmp_path / "b")])
    assert "left out: 1 images that cannot be used, the first: " in capsys.readouterr().out
    assert "skipped     4 images that cannot be used, the first: " in printed and "instancesonly_filtered_train.json: 8 images" in printed
    data = isaid.load_coco(images, path, isaid.transforms(False, 64), skip_bad=True)
    assert len(data.bad) == 3 and [image["id"] for image in data.images] == [i for i in range(9) if i != 3]
    for bad, message in zip(data.bad, ("scene_000003.png: is not an image", "gone.png: is missing", "should have 64 x 99 pixels")):
        assert message in bad
    assert data[3][1]["image_id"] == 4 and {a["image_id"] for a in data.annotations} <= set(range(9)) - {3}


def test_overfitting_four_scenes(tmp_path):
    """The smoke test that the README offers: the demonstration's model learns four scenes by heart."""
    train.main(["--overfit", "4", "--image_size", "64", "--epochs", "3", "--eval_every", "3", "--out", str(tmp_path / "run")])
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert line["ap"] > 0.9
    evaluation.main([str(tmp_path / "run")])  # on the same images
    assert json.loads((tmp_path / "run/metrics.json").read_text())["ap"] == pytest.approx(line["ap"], abs=1e-6)
    data = train.prepare(train.parse(["--overfit", "4", "--repeat_factor", "0.5", "--out", str(tmp_path / "again")]))
    assert [len(data[i]) for i in (2, 3)] == [4, 4] and torch.equal(data[2][1][0], data[3][1][0]) and data[1].steps == 50


def test_collapse_is_noticed():
    data = isaid.synthetic("val", 3, 64, None)
    same = [{"image_id": i, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.1 * i} for i in range(3)]
    assert evaluation.collapsed(data, same)
    assert not evaluation.collapsed(data, same[:2])
    assert not evaluation.collapsed(data, [*same[:2], {**same[2], "bbox": [9, 2, 3, 4]}])
    assert not evaluation.collapsed(data, [])
