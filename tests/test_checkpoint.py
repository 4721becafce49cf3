"""Stopped runs resume bit for bit; checkpoints are whole or absent, never half read."""

import atexit
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
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, default_int_handler, signal
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

import isaid
import train
from util import checkpoint, loader_processes
from util.files import FolderLock

ROOT = Path(__file__).resolve().parents[1]
TINY = "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 32".split()
TINY += "--num_queries 8 --image_size 64 --limit_train 8 --limit_val 3 --batch_size 4".split()


# ---------------------------------------------------------------- commands in processes
FORKS = multiprocessing.get_context("forkserver")  # it imports torch once for all of them
FORKS.set_forkserver_preload(["train", "test_checkpoint"])


class Strike(NamedTuple):
    """Signals that a process receives just before a certain call of a function."""

    function: str  # "module.name"
    call: int  # 1: the first call
    signals: list


def strike_function(strike):
    """Replace the strike's function by one that also sends the signals to this process group."""
    original = pkgutil.resolve_name(strike.function)
    num_calls = 0

    def struck(*args):
        nonlocal num_calls
        num_calls += 1
        if num_calls == strike.call:
            for number in strike.signals:  # from outside to all of the group, as launchers do
                kill = f"kill -s {number:d} -- -{os.getpid()}; sleep 0.3"
                subprocess.call(kill, shell=True, start_new_session=True)
        return original(*args)

    patch(strike.function, struck).start()


def _child(script, flags, output_path, environment, strike):
    """Run `python SCRIPT FLAGS` in this process; its output goes to output_path.out and .err."""
    os.setsid()
    signal(SIGINT, default_int_handler)  # which a shell's background jobs ignore
    for descriptor, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{output_path}.{suffix}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # loader processes start as usual
    atexit.register(loader_processes.kill_all)  # Python 3.13 forgets this in a fork
    if strike:
        strike_function(strike)
    sys.argv = [script] + flags
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves these out


class Command:
    """A command in one process or, as torchrun starts it, in several; a strike hits the last."""

    def __init__(self, folder, script, flags, processes=1, strike=None):
        self.output_dir = Path(tempfile.mkdtemp(dir=folder))
        self.processes = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(processes):
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            args = {
                "script": script,
                "flags": [str(flag) for flag in flags],
                "output_path": self.output_dir / str(rank),
                "environment": environment,
                "strike": strike if rank == processes - 1 else None,
            }
            process = FORKS.Process(target=_child, kwargs=args)
            self.processes.append(process)
            with patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
                process.start()  # the first one starts the server, which needs the path

    def end(self, status=0):
        """Wait until all processes have ended with this exit status.

        Returns what the first one printed to stdout and what all of them printed to stderr.
        """
        for process in self.processes:
            process.join(100)
        errors = ""
        for path in self.output_dir.glob("*.err"):
            errors += path.read_text(encoding="utf-8")
        assert {process.exitcode for process in self.processes} == {status}, errors
        assert "Traceback" not in errors
        return (self.output_dir / "0.out").read_text(encoding="utf-8"), errors


# ---------------------------------------------------------------- runs that are the same
MAY_DIFFER = {
    "seconds",
    "data_seconds",
    "eval_seconds",
    "images_per_second",
    "data_wait",
    "out",
    "resume",
    "workers",
}


def assert_equal(a, b, place):
    """Two checkpoints or logs are the same to the bit, apart from times and folders."""
    if isinstance(a, (list, tuple)):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a.keys() - MAY_DIFFER:
            assert_equal(a[name], b[name], f"{place}/{name}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), place
    else:
        assert a == b, place


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").open("rb")]


def same_run(run, other):
    for name in ("last.pt", "best.pt"):
        assert_equal(torch.load(run / name), torch.load(other / name), name)
    assert_equal(log_of(run), log_of(other), "log")


# ---------------------------------------------------------------- stopping and resuming
class Stop(NamedTuple):
    """How a run is stopped, and how its resumption begins."""

    strike: Strike
    status: int
    resumed: str  # what the resumed run prints first, after "init"


class Kind(NamedTuple):
    flags: str
    stops: list
    processes: int = 1


CLIP = "torch.nn.utils.clip_grad_norm_"  # is called once per step
FLAGS = TINY + "--limit_train 16 --epochs 2 --dropout 0.1 --augment aerial".split()
KINDS = {
    "detect": Kind(
        "--workers 2",
        [
            # within its first last.pt
            Stop(Strike("torch.save", 1, [SIGKILL]), -SIGKILL, "random weights"),
            Stop(Strike(CLIP, 2, [SIGTERM]), 143, "resumed in epoch 1 after 2 of 4"),
        ],
    ),
    "pretrain": Kind(
        "--setting pretrain --ssl_task mim-discrete --vocab_size 4 --model detr",
        [
            # between epochs, saved but not yet in the log
            Stop(
                Strike("util.checkpoint.write_log", 1, [SIGKILL]),
                -SIGKILL,
                "resumed in epoch 1 after 4 of 4",
            ),
            # within last.pt of the second epoch
            Stop(Strike("torch.save", 3, [SIGKILL]), -SIGKILL, "resumed in epoch 1 after 4 of 4"),
        ],
    ),
    "multitask": Kind(
        "--setting multitask --ssl_task jigsaw-discrete --grad_accum_steps 2 --workers 2",
        [Stop(Strike(CLIP, 3, [SIGINT]), 130, "resumed in epoch 2 after 1 of 2")],
    ),
    "two processes": Kind(
        "--setting multitask --workers 1",
        [Stop(Strike(CLIP, 3, [SIGTERM]), 143, "resumed in epoch 2 after 1 of 2")],
        processes=2,
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function that returns the folder of a run that was not stopped, by kind."""
    folder = tmp_path_factory.mktemp("undisturbed")
    commands = {}
    for name, kind in KINDS.items():
        flags = FLAGS + kind.flags.split() + ["--out", folder / name]
        commands[name] = Command(folder, "train.py", flags, processes=kind.processes)

    def finished_run(name):
        commands[name].end()
        return folder / name

    return finished_run


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_equals_an_undisturbed_one(kind, undisturbed, tmp_path):
    """Weights, optimizer, schedule, random numbers, log and best.pt are the same to the bit."""
    flags, stops, processes = KINDS[kind]
    out = tmp_path / "run"
    flags = FLAGS + flags.split() + ["--out", out, "--resume"]
    start = "random weights"  # if there is no run yet, --resume starts one
    for stop in stops:
        command = Command(tmp_path, "train.py", flags, processes, stop.strike)
        printed, _ = command.end(stop.status)
        if stop.status != -SIGKILL:  # which leaves no time to print
            stopped = stop.resumed.replace("resumed", "stopped")
            advice = f"to resume, run the same command with --out {out} --resume"
            assert f"init        {start}" in printed
            assert f"{stopped} steps; {advice}" in printed
        start = stop.resumed
        config = (out / "config.json").read_bytes()
    printed, _ = Command(tmp_path, "train.py", flags, processes).end()
    assert f"init        {start}" in printed
    assert (out / "config.json").read_bytes() == config
    same_run(undisturbed(kind), out)


@pytest.mark.parametrize("signals, status", [([SIGINT] * 2, 130), ([SIGTERM] * 2, -SIGTERM)])
def test_a_second_signal_does_not_wait(signals, status, tmp_path):
    out = tmp_path / "run"
    strike = Strike(CLIP, 1, signals)
    printed, _ = Command(tmp_path, "train.py", FLAGS + ["--out", out], strike=strike).end(status)
    assert "stopped" not in printed
    assert not (out / "last.pt").exists()


# ---------------------------------------------------------------- resuming a complete run
@pytest.fixture
def complete_run(undisturbed, tmp_path):
    """A copy of a complete run."""
    return Path(shutil.copytree(undisturbed("detect"), tmp_path / "run"))


def assert_error(run, message, *flags):
    """Training into this run folder with these flags ends with a message in one line."""
    with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*\Z"):
        train.main(FLAGS + ["--out", str(run), *flags])


def test_resuming_a_complete_run_changes_nothing(complete_run, undisturbed, tmp_path):
    before = undisturbed("detect")
    may_differ = ["--workers", 1, "--device", "cpu"]
    flags = FLAGS + ["--out", complete_run, "--resume"] + may_differ
    printed, _ = Command(tmp_path, "train.py", flags).end()
    assert "resumed in epoch 3 after 0 of 4 steps" in printed
    same_run(before, complete_run)
    config = (complete_run / "config.json").read_bytes()
    assert config == (before / "config.json").read_bytes()


def test_a_run_is_not_overwritten_or_resumed_with_other_flags(complete_run):
    last = complete_run / "last.pt"
    content = last.read_bytes()
    message = f"{last}: cannot resume with different flags .--epochs was 2, now 4."
    assert_error(complete_run, message, "--resume", "--epochs", "4")
    message = "already exists; choose a new folder, or continue that run with --resume"
    assert_error(complete_run, f"--out {complete_run} {message}")
    assert last.read_bytes() == content


def test_a_damaged_checkpoint_is_not_resumed(complete_run):
    last = complete_run / "last.pt"
    content = last.read_bytes()
    damaged = bytearray(content)
    damaged[10**7] ^= 255
    message = f"{last}: not a weights-only checkpoint, or the file is corrupted "
    for other_content in (damaged, content[:5000], b"", b"text"):
        last.write_bytes(other_content)
        assert_error(complete_run, message, "--resume")

    args, _ = train.parse([])
    torch.save({"model": {}, "args": args}, last)  # as the official ones
    message = f"{last}: not a train.py checkpoint, cannot resume; .*--init"
    assert_error(complete_run, message, "--resume")
    last.unlink()
    message = f"{last}: not found, but log.jsonl shows that this run has already started"
    assert_error(complete_run, message, "--resume")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_last_checkpoint(complete_run, monkeypatch):
    last = complete_run / "last.pt"
    temporary = complete_run / "temporary"
    content = last.read_bytes()

    def full(target):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to("/dev/full")
        return temporary

    monkeypatch.setattr("util.files.temporary_name", full)
    message = f"{last}: cannot write checkpoint .*is the disk full?"
    assert_error(complete_run, message, "--resume")
    assert last.read_bytes() == content
    assert not os.path.lexists(temporary)


def without(record, name):
    """Return the dict without one of its keys."""
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize("kind", ["detect", "pretrain", "multitask"])
def test_an_incomplete_or_different_state_is_not_resumed(kind, undisturbed, tmp_path):
    """A checkpoint that lacks something, or is of other data, is refused; nothing is filled in."""
    state = torch.load(undisturbed(kind) / "last.pt")
    flags = KINDS[kind].flags.split() + ["--workers", "0", "--out", str(tmp_path)]
    args, _ = train.parse(FLAGS + flags)
    train_set, _ = isaid.load_train_and_val(args)
    run = train.build_run(args, train_set)
    (own,) = state["processes"]

    def assert_refused(changed, message=" "):
        with pytest.raises(ValueError, match=f"^cannot resume from last.pt{message}"):
            checkpoint.resume(run, changed, "cpu")

    assert_refused({**state, "steps_per_epoch": 9}, ": steps per epoch was 9, is now")
    message = ": number of processes was 2, is now 1; resume with"
    assert_refused({**state, "processes": [own, own]}, message)
    boats = [{"id": 1, "name": "boat"}]
    assert_refused({**state, "categories": boats}, ": classes was .*boat")
    for name in ("backbone.0.body.conv1.weight", "transformer.encoder.layers.0.norm1.bias"):
        assert_refused({**state, "model": without(state["model"], name)})
    for name in own:
        assert_refused({**state, "processes": [without(own, name)]})
    if run.task:
        assert_refused({**state, "task_state": {}})
    else:
        assert_refused({**state, "model": {}})
    required = {"model", "optimizer", "schedule"}.union(checkpoint.PROGRESS)
    for name in required - {"steps_per_epoch", "skipped_steps"}:
        assert_refused(without(state, name), f" .'{name}'")
    assert_refused({**state, "log": "x"}, " .'log' is 'x'")
    before_fp16 = without(without(state, "scaler"), "skipped_steps")
    checkpoint.resume(run, before_fp16, "cpu")


# ---------------------------------------------------------------- two processes
def hold_lock(folder, locked):
    """Lock a folder, in a process that has another one, and wait."""
    os.setsid()
    lock = FolderLock(folder)
    if os.fork() > 0:
        locked.set()
    time.sleep(100)
    lock.close()


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked on Windows")
def test_a_run_belongs_to_one_process(complete_run):
    """A second one is refused; when the first one is killed, its place is free at once."""
    last = complete_run / "last.pt"
    content = last.read_bytes()
    locked = FORKS.Event()
    process = FORKS.Process(target=hold_lock, args=(complete_run, locked))
    process.start()
    assert locked.wait(60)
    try:
        owner = f"process {process.pid} on {socket.gethostname()}"
        assert_error(complete_run, f"{complete_run}: is in use by {owner}; wait", "--resume")
        assert last.read_bytes() == content
        process.kill()
        process.join()
        lock = FolderLock(complete_run)
        lock.close()
    finally:
        os.killpg(process.pid, SIGKILL)
    assert not (complete_run / ".lock").exists()


# ---------------------------------------------------------------- the processor
def git(folder, command):
    """Run a command of git in a folder; returns what it prints."""
    words = ["git", "-c", "user.name=n", "-c", "user.email=e", *command.split()]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_revisions_are_of_this_code(tmp_path, monkeypatch):
    """A repository around the code, or the one of a hook that starts a command, is another."""
    code = tmp_path / "project/code"
    (code / "util").mkdir(parents=True)
    (code / "train.py").touch()
    monkeypatch.setattr(checkpoint, "__file__", str(code / "util/checkpoint.py"))
    commits = {}
    for folder in (code.parent, code):
        git(folder, "init -q")
        (folder / "file").touch()
        git(folder, "add file")
        git(folder, "commit -qm one")
        commits[folder] = git(folder, "rev-parse HEAD")
        if folder == code.parent:
            assert checkpoint.revision() == "unknown"
    monkeypatch.setenv("GIT_DIR", str(code.parent / ".git"))
    revision = checkpoint.revision()
    assert len(revision) >= 7 and commits[code].startswith(revision)
    (code / "file").write_text("changed")
    assert checkpoint.revision() == f"{revision} with changes"


def test_device_name_of_a_processor(tmp_path):
    """Its name and its bf16 instructions, each once; on other systems its architecture."""
    core = "model name\t: A CPU @ 2 GHz\nflags\t\t: sse amx_bf16 avx512_bf16 amx_int8\n"
    info = tmp_path / "cpuinfo"
    info.write_text(2 * core)
    with patch("util.checkpoint.Path", lambda _: info):
        assert checkpoint.device_name("cpu") == "cpu, A CPU @ 2 GHz, amx_bf16, avx512_bf16"
        info.unlink()
        assert checkpoint.device_name("mps") == f"mps, {platform.machine()}"
