"""Runs that stop and go on with the same bits; checkpoints whole or absent, none half read."""

import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch
from test_train import TINY, Command, same_run

import checkpoint
import train

FLAGS = [*TINY, *"--limit_train 16 --epochs 2 --dropout 0.1 --augment aerial".split()]
# processes, flags, and how the run is stopped: at which call of a function, by which signals,
# with which status; then how the next one starts
KINDS = {
    "detect": (1, "--workers 2", [
        ("os.fsync", 1, [SIGKILL], -9, "random weights"),  # within its first last.pt
        ("parallel.average_gradients", 2, [SIGTERM], 143, "resumed in epoch 1 after 2 of 4")]),
    "pretrain": (1, "--setting pretrain --ssl_task mim-discrete --vocabulary 4 --model detr", [
        # between epochs, saved but not yet in the log; then within last.pt of the second epoch
        ("checkpoint.write_log", 1, [SIGKILL], -9, "resumed in epoch 1 after 4 of 4"),
        ("os.fsync", 3, [SIGKILL], -9, "resumed in epoch 1 after 4 of 4")]),
    "multitask": (1, "--setting multitask --ssl_task jigsaw-discrete --accumulate 2", [
        ("parallel.average_gradients", 3, [SIGINT], 130, "resumed in epoch 2 after 1 of 2")]),
    "two processes": (2, "--setting multitask --workers 1", [
        ("parallel.average_gradients", 3, [SIGTERM], 143, "resumed in epoch 2 after 1 of 2")]),
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs that nobody stopped, by kind."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {kind: Command(folder, "train.py", *FLAGS, *flags.split(), "--out", folder / kind,
                          processes=n) for kind, (n, flags, _) in KINDS.items()}  # fmt: skip
    return lambda kind: (runs[kind].end(), folder / kind)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_undisturbed(kind, undisturbed, tmp_path):
    """Weights, optimizer, schedule, random numbers, log and best.pt, all to the bit."""
    processes, flags, strikes = KINDS[kind]
    out, start = tmp_path / "run", "random weights"
    command = ["train.py", *FLAGS, *flags.split(), "--out", out, "--resume"]
    for *strike, status, then in strikes:  # with nothing there yet --resume is the start
        said, _ = Command(tmp_path, *command, processes=processes, strike=strike).end(status)
        assert status < 0 or f"start       {start}" in said
        stopped = f"{then} steps; to go on, the same command with --out {out} --resume"
        assert status < 0 or stopped.replace("resumed", "stopped") in said
        start, config = then, (out / "config.json").read_text()
    said, _ = Command(tmp_path, *command, processes=processes).end()
    assert f"start       {start}" in said
    assert (out / "config.json").read_text() == config
    same_run(undisturbed(kind), out)


@pytest.mark.parametrize("signals, status", [([SIGINT] * 2, 130), ([SIGTERM] * 2, -SIGTERM)])
def test_a_second_signal_does_not_wait(signals, status, tmp_path):
    strike = "parallel.average_gradients", 1, signals
    said, _ = Command(tmp_path, "train.py", *FLAGS, "--out", tmp_path / "run", strike=strike).end(
        status
    )
    assert "stopped" not in said and not (tmp_path / "run/last.pt").exists()


@pytest.fixture
def again(undisturbed, tmp_path, capsys):
    """Go on with a copy of the complete run: (a function of flags, the copy)."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed("detect"), out)
    return lambda *flags: train.main([*FLAGS, "--out", str(out), *flags]), out


def test_a_complete_run_stays_as_it_is(again, undisturbed, capsys):
    (go_on, out), before = again, undisturbed("detect")
    go_on("--resume", "--workers", "1")  # these may differ
    assert "resumed in epoch 3 after 0 of 4 steps" in capsys.readouterr().out
    same_run(before, out)
    assert (out / "config.json").read_text() == (before / "config.json").read_text()


def test_what_cannot_be_gone_on_with_is_refused(again):
    go_on, out = again

    def refused(message, *flags):
        with pytest.raises(SystemExit) as stop:
            go_on(*flags)
        assert re.fullmatch(f"error: {message}", stop.value.code), stop.value.code

    last, whole = out / "last.pt", (out / "last.pt").read_bytes()
    other = "--resume", "--lr", "1e-3", "--epochs", "4"
    refused(f"{last}: was made with --epochs 2, not 4, --lr 0.0005, not 0.001; a run .*", *other)
    refused("--out .*run exists already; name a new folder, or go on with its run: --resume")
    assert last.read_bytes() == whole
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for content in (damaged, whole[:5000], b"", b"text"):
        last.write_bytes(content)
        refused(f"{last}: not a checkpoint of tensors and plain values, or damaged .*", "--resume")
    torch.save({"model": {}, "args": Namespace(lr=1)}, last)  # as the official ones
    refused(f"{last}: is not a checkpoint of train.py; start from it with --init", "--resume")
    last.unlink()
    refused(f"{last}: is gone, but its run has been going; name another folder", "--resume")


@pytest.mark.parametrize("kind", ["detect", "pretrain", "multitask"])
def test_nothing_is_filled_in(kind, undisturbed, tmp_path):
    """A checkpoint that lacks something, or is of other data, is refused."""
    state = torch.load(undisturbed(kind) / "last.pt", weights_only=True)
    flags = [*FLAGS, *KINDS[kind][1].split(), "--workers", "0", "--out", str(tmp_path)]
    run, *_ = train.prepare(train.parse(flags)[0])

    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            checkpoint.resume(run, {**state, **changed}, "cpu")

    weights, (own,) = state["model"], state["processes"]
    refused("last.pt: was made with 9 steps an epoch, not", steps=9)
    refused("last.pt: was made with 2 processes, not 1; a run goes on", processes=[own, own])
    classes = [{"id": 1, "name": "boat"}]
    refused("last.pt: was made with .*'boat'.* classes, not", categories=classes)
    for name in ("backbone.0.body.conv1.weight", "transformer.encoder.layers.0.norm1.bias"):
        refused("last.pt: cannot", model={k: x for k, x in weights.items() if k != name})
    for name in own:
        refused("last.pt: cannot", processes=[{k: x for k, x in own.items() if k != name}])
    for name in {*checkpoint.PLAIN, "model", "optimizer", "schedule"} - {"steps"}:
        del state[name]  # from here on they lack more and more
        refused("last.pt: cannot be gone on from")
    if run.task:
        refused("last.pt: cannot", task_state={})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_last_good_checkpoint(again):
    go_on, out = again
    before = (out / "last.pt").read_bytes()
    (out / "last.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        go_on("--resume")
    said = stop.value.code
    assert said.startswith(f"error: {out}/last.pt: cannot be written; is the disk full? (")
    assert "\n" not in said and not os.path.lexists(out / "last.tmp")
    assert (out / "last.pt").read_bytes() == before


@pytest.mark.parametrize("path", ["/proc/run", "/dev/null/run"])
def test_folders_that_cannot_be_written(path):
    if not Path(path).parent.exists():
        pytest.skip("no such place here")
    with pytest.raises(SystemExit, match=f"error: --out {path} cannot be made"):
        train.main([*FLAGS, "--out", path])
