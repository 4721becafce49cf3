"""Runs that stop and go on with the same bits; checkpoints whole or absent, none half read."""

import atexit
import itertools
import json
import multiprocessing
import os
import pkgutil
import platform
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, default_int_handler, signal
from unittest.mock import patch

import pytest
import torch

import isaid
import train
from util import checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 32".split()
TINY += "--num_queries 8 --image_size 64 --limit_train 8 --limit_val 3 --batch_size 4".split()
FORKS = multiprocessing.get_context("forkserver")  # it imports torch once for all of them
FORKS.set_forkserver_preload(["train", "test_checkpoint"])


def _child(script, flags, said, names, strike):
    """python SCRIPT FLAGS; strike: (function of a module, at which call of it, signals to send)."""
    os.setsid()
    signal(SIGINT, default_int_handler)  # which a shell's background jobs ignore
    for fd, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{end}", os.O_WRONLY | os.O_CREAT), fd)
    os.environ.update(names)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # loader processes start as usual
    if strike:
        target, at, signals = strike
        original, calls = pkgutil.resolve_name(target), itertools.count(1)

        def struck(*args):
            if next(calls) == at:
                for number in signals:  # from outside to all of the group, as launchers do
                    kill = f"kill -s {number:d} -- -{os.getpid()}; sleep 0.3"
                    subprocess.call(kill, shell=True, start_new_session=True)
            return original(*args)

        patch(target, struck).start()
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves these out


class Command:
    """A command in one process or, as torchrun starts it, in several; a strike hits the last."""

    def __init__(self, folder, script, *flags, processes=1, strike=()):
        self.said, flags = Path(tempfile.mkdtemp(dir=folder)), [str(flag) for flag in flags]
        with socket.create_server(("127.0.0.1", 0)) as free:
            names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes, names["WORLD_SIZE"] = [], str(processes)
        for rank in range(processes):
            mine = {**names, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            call = script, flags, self.said / str(rank), mine, strike * (rank == processes - 1)
            self.processes.append(FORKS.Process(target=_child, args=call))
            with patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
                self.processes[-1].start()  # the first one starts the server, which needs it

    def end(self, status=0):
        """What the first one printed, and all of them to stderr, when they have ended so."""
        for process in self.processes:
            process.join(100)
        errors = "".join(path.read_text(encoding="utf-8") for path in self.said.glob("*.err"))
        assert {process.exitcode for process in self.processes} == {status}, errors
        assert "Traceback" not in errors
        return (self.said / "0.out").read_text(encoding="utf-8"), errors


def equal(a, b, path=""):
    """Whether two checkpoints or logs are the same to the bit, apart from times and folders."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        times = {"seconds", "data_seconds", "eval_seconds", "images_per_second", "data_wait"}
        for name in a.keys() - times - {"out", "resume", "workers"}:
            equal(a[name], b[name], f"{path}/{name}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").open("rb")]


def same_run(one, other):
    for name in ("last.pt", "best.pt"):
        equal(torch.load(one / name), torch.load(other / name), name)
    equal(log_of(one), log_of(other), "log")


FLAGS = [*TINY, *"--limit_train 16 --epochs 2 --dropout 0.1 --augment aerial".split()]
# processes, flags, stops (at a call of a function, by signals, with status, how the next starts)
KINDS = {
    "detect": (1, "--workers 2", [
        ("os.fsync", 1, [SIGKILL], -9, "random weights"),  # within its first last.pt
        ("torch.nn.utils.clip_grad_norm_", 2, [SIGTERM], 143, "resumed in epoch 1 after 2 of 4")]),
    "pretrain": (1, "--setting pretrain --ssl_task mim-discrete --vocab_size 4 --model detr", [
        # between epochs, saved but not yet in the log; then within last.pt of the second epoch
        ("util.checkpoint.write_log", 1, [SIGKILL], -9, "resumed in epoch 1 after 4 of 4"),
        ("os.fsync", 3, [SIGKILL], -9, "resumed in epoch 1 after 4 of 4")]),
    "multitask": (1, "--setting multitask --ssl_task jigsaw-discrete --grad_accum_steps 2 "
                     "--workers 2", [
        ("torch.nn.utils.clip_grad_norm_", 3, [SIGINT], 130, "resumed in epoch 2 after 1 of 2")]),
    "two processes": (2, "--setting multitask --workers 1", [
        ("torch.nn.utils.clip_grad_norm_", 3, [SIGTERM], 143, "resumed in epoch 2 after 1 of 2")]),
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
    (processes, flags, strikes), out, start = KINDS[kind], tmp_path / "run", "random weights"
    command = ["train.py", *FLAGS, *flags.split(), "--out", out, "--resume"]
    for *strike, status, then in strikes:  # with nothing there yet --resume is the start
        said, _ = Command(tmp_path, *command, processes=processes, strike=strike).end(status)
        stopped = (
            f"{then.replace('resumed', 'stopped')} steps; to resume, run the same command with"
        )
        for text in (f"init        {start}", f"{stopped} --out {out} --resume"):
            assert text in said or status == -SIGKILL  # which leaves no time to say it
        start, config = then, (out / "config.json").read_bytes()
    said, _ = Command(tmp_path, *command, processes=processes).end()
    assert f"init        {start}" in said and (out / "config.json").read_bytes() == config
    same_run(undisturbed(kind), out)


@pytest.mark.parametrize("signals, status", [([SIGINT] * 2, 130), ([SIGTERM] * 2, -SIGTERM)])
def test_a_second_signal_does_not_wait(signals, status, tmp_path):
    strike, out = ("torch.nn.utils.clip_grad_norm_", 1, signals), tmp_path / "run"
    said, _ = Command(tmp_path, "train.py", *FLAGS, "--out", out, strike=strike).end(status)
    assert "stopped" not in said and not (out / "last.pt").exists()


@pytest.fixture
def again(undisturbed, tmp_path):
    """A copy of a complete run, and to go on with it: a function of what is said, and flags."""
    out = Path(shutil.copytree(undisturbed("detect"), tmp_path / "run"))

    def go_on(message, *flags):
        with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*\Z"):
            train.main([*FLAGS, "--out", str(out), *flags])

    return out, go_on


def test_going_on_with_a_complete_run(again, undisturbed, tmp_path):
    (out, go_on), resume, before = again, "--resume", undisturbed("detect")
    flags = "--out", out, resume, "--workers", 1, "--device", "cpu"  # these may differ
    said, _ = Command(tmp_path, "train.py", *FLAGS, *flags).end()
    assert "resumed in epoch 3 after 0 of 4 steps" in said
    same_run(before, out)
    assert (out / "config.json").read_bytes() == (before / "config.json").read_bytes()
    last, whole = out / "last.pt", (out / "last.pt").read_bytes()
    go_on(
        f"{last}: cannot resume with different flags .--epochs was 2, now 4.",
        resume,
        "--epochs",
        "4",
    )
    go_on(f"--out {out} already exists; choose a new folder, or continue that run with --resume")
    assert last.read_bytes() == whole
    damaged = whole[: 10**7] + bytes([whole[10**7] ^ 255]) + whole[10**7 + 1 :]
    for content in (damaged, whole[:5000], b"", b"text"):
        last.write_bytes(content)
        go_on(f"{last}: not a weights-only checkpoint, or the file is corrupted ", resume)
    torch.save({"model": {}, "args": train.parse([])[0]}, last)  # as the official ones
    go_on(f"{last}: not a train.py checkpoint, cannot resume; .*--init", resume)
    last.unlink()
    go_on(f"{last}: not found, but log.jsonl shows that this run has already started", resume)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_where_nothing_can_be_written(again):
    out, go_on = again
    before = (out / "last.pt").read_bytes()
    (out / "last.tmp").symlink_to("/dev/full")
    go_on(f"{out}/last.pt: cannot write checkpoint .*is the disk full?", "--resume")
    assert (out / "last.pt").read_bytes() == before and not os.path.lexists(out / "last.tmp")


@pytest.mark.parametrize("kind", ["detect", "pretrain", "multitask"])
def test_nothing_is_filled_in(kind, undisturbed, tmp_path):
    """A checkpoint that lacks something, or is of other data, is refused."""
    state = torch.load(undisturbed(kind) / "last.pt")
    flags = [*FLAGS, *KINDS[kind][1].split(), "--workers", "0", "--out", str(tmp_path)]
    args, _ = train.parse(flags)
    train_set, _ = isaid.load_train_and_val(args)
    run = train.build_run(args, train_set)
    (own,) = state["processes"]

    def refused(message, without="", **changed):
        changed = {key: x for key, x in {**state, **changed}.items() if key != without}
        with pytest.raises(ValueError, match=f"^cannot resume from last.pt{message}"):
            checkpoint.resume(run, changed, "cpu")

    refused(": steps per epoch was 9, is now", steps_per_epoch=9)
    refused(": number of processes was 2, is now 1; resume with", processes=[own, own])
    refused(": classes was .*boat", categories=[{"id": 1, "name": "boat"}])
    for name in ("backbone.0.body.conv1.weight", "transformer.encoder.layers.0.norm1.bias"):
        refused(" ", model={k: x for k, x in state["model"].items() if k != name})
    for name in own:
        refused(" ", processes=[{k: x for k, x in own.items() if k != name}])
    refused(" ", **({"task_state": {}} if run.task else {"model": {}}))
    for name in {*checkpoint.PROGRESS, "model", "optimizer", "schedule"} - {"steps_per_epoch"}:
        refused(f" .'{name}'", without=name)
    refused(" .'log' is 'x'", log="x")


def test_a_processor_is_named(tmp_path):
    """Once, by its name and what it has for bf16; where the system says neither, by its kind."""
    core = "model name\t: A CPU @ 2 GHz\nflags\t\t: sse amx_bf16 avx512_bf16 amx_int8\n"
    (info := tmp_path / "cpuinfo").write_text(2 * core)
    with patch("util.checkpoint.Path", lambda _: info):
        assert checkpoint.device_name("cpu") == "cpu, A CPU @ 2 GHz, amx_bf16, avx512_bf16"
        info.unlink()
        assert checkpoint.device_name("mps") == f"mps, {platform.machine()}"
