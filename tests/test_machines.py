"""Machines that lack something: commands work without it, or end with a line that names it."""

import errno
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing import process
from unittest.mock import Mock

import pytest
import torch
from test_checkpoint import ROOT

import isaid
import train
from util import cli
from util.files import DataError

resource = pytest.importorskip("resource")  # Windows has no such limits
needs_forks = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork",
    reason="loading processes see no patches, no capfd",
)

TINY = (
    "--image_size 64 --epochs 1 --batch_size 2 --num_queries 5 --hidden_dim 32 --nheads 2 "
    "--enc_layers 1 --dec_layers 1 --dim_feedforward 32 --limit_train 4 --limit_val 2"
).split()


# ---------------------------------------------------------------- what a loading process lacks
def open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def shared_memory():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def short_name_for_a_socket(folder):
    tempfile.tempdir = tempfile.mkdtemp(prefix=100 * "x", dir=folder)
    process.current_process()._config.pop("tempdir", None)


class Lacking(torch.utils.data.Dataset):
    """Images and boxes; the process that loads one does without something from then on."""

    def __init__(self, lack=None, make_value=str):
        self.lack = lack
        self.make_value = make_value  # of a further value of the target

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if self.lack:
            self.lack()
        boxes = torch.full((2000, 4), i)  # as many as need shared memory, and few
        target = {"boxes": boxes, "few": boxes[:2], "value": self.make_value()}
        return torch.full((3, 99, 100), 0.5 + i), target


@pytest.mark.parametrize("lack", [None, open_files, shared_memory, short_name_for_a_socket])
def test_batches_arrive(lack, tmp_path):
    if lack is short_name_for_a_socket:
        lack = functools.partial(lack, tmp_path)
    options = {"batch_size": 2, "timeout": 60}
    num_targets = 0
    for images, padding, targets in isaid.data_loader(Lacking(lack), 2, **options):
        assert images.shape == (2, 3, 99, 100)
        assert not padding.any()
        for image, target in zip(images, targets):
            assert (image == 0.5 + num_targets).all()
            assert target["boxes"].shape == (2000, 4)
            assert (target["boxes"] == num_targets).all()
            assert (target["few"] == num_targets).all()
            num_targets += 1
    assert num_targets == 4


class Unsendable:
    def __reduce__(self):
        raise MemoryError


@needs_forks
def test_a_batch_that_cannot_be_sent_is_not_waited_for(capfd):
    loader = isaid.data_loader(Lacking(make_value=Unsendable), 1, batch_size=2, timeout=60)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iter(loader))
    assert capfd.readouterr().err == "a batch could not be sent: MemoryError: MemoryError()\n"


LOAD_AND_DIE = """
import multiprocessing, os, signal
import isaid

multiprocessing.set_start_method("forkserver")
data = isaid.synthetic_dataset("train", 200, 64, isaid.make_transforms(True, 64))
batches = iter(isaid.data_loader(data, 1, batch_size=4))
print(tuple(next(batches)[0].shape), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_loading_processes_that_are_no_forks():
    """As on Linux from Python 3.14 on. They get the dataset, and end when the command is killed."""
    command = [sys.executable, "-c", LOAD_AND_DIE]
    # returns when all processes that could write to the pipe have ended
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "(4, 3, 64, 64)\n"


# ---------------------------------------------------------------- training
def assert_one_line(flags, line):
    """Training with these flags ends with an error of this one line."""
    with pytest.raises(SystemExit, match=rf"^error: {line}[^\n]*\Z"):
        train.main(TINY + flags)


def test_memory_that_is_full(monkeypatch, tmp_path):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "compute_losses", lambda *_: torch.empty(2**50))
    line = r"out of memory \(no room for 4503599627370496 bytes\); lower --batch_size"
    assert_one_line(["--out", str(out)], line)
    assert not out.exists()


def test_memory_too_small_for_a_checkpoint(monkeypatch, tmp_path):
    """The checkpoint is not called corrupted."""
    torch.save({"model": {}}, tmp_path / "weights.pt")
    error = RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    line = r"out of memory \(no room for 9 bytes\)"
    assert_one_line(["--init", str(tmp_path / "weights.pt")], line)


@needs_forks
def test_a_loading_process_that_is_killed(monkeypatch, tmp_path):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(isaid.SyntheticDataset, "load_image", die)
    line = "a data loading process was killed, probably out of memory.*lower --workers"
    assert_one_line(["--workers", "1", "--out", str(tmp_path / "run")], line)


def test_training_in_a_thread(tmp_path):
    """Only the main thread may handle signals."""
    thread = threading.Thread(target=train.main, args=[TINY + ["--out", str(tmp_path / "run")]])
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "best.pt").exists()


# ---------------------------------------------------------------- messages
CUDA = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.74 GiB of which"
ERRORS = [
    (torch.OutOfMemoryError(f"CUDA out of memory. {CUDA}"), "out of GPU memory (no room for 2.00"),
    (RuntimeError("CUDA error: out of memory\nCompile with"), "out of GPU memory; lower --batch"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "out of GPU memory; lower --"),
    (MemoryError("Unable to allocate 7.4 GiB for"), "out of memory (no room for 7.4 GiB); lower"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; lower --batch_size"),
    (RuntimeError("received 0 items of ancdata"), "too many open files; lower --workers"),
    (OSError(errno.EMFILE, "Too many open files", "a.png"), "too many open files; lower"),
    (RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.1]"), "another process of this"),
    (torch.distributed.DistNetworkError("no\nport"), "the processes cannot communicate (no port)"),
    (DataError("a.json: out of memory"), "a.json: out of memory"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a"), "a: No such file; choose a different"),
]


@pytest.mark.parametrize("error, line", ERRORS)
def test_lines_of_errors(error, line):
    message = cli.error_message(error)
    assert message.startswith(line)
    assert "\n" not in message


def test_bugs_keep_their_traceback():
    @cli.cli_main
    def main(argv=None):
        torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="must match the size"):
        main()
