"""Data loading processes: what they do with signals, and how tensors are sent to and from them.

PyTorch sends every tensor of a batch through shared memory (/dev/shm), which takes an open file and
a socket. Where one of them is missing, a batch would be lost, and training would wait for it
forever. Containers have 64 MB of shared memory by default, and many systems allow 1,024 open files.
"""

import atexit
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
from torch.multiprocessing import reductions

from util.cli import one_line

SHARED_MEMORY = "/dev/shm"
SMALL = 2**16  # bytes; smaller tensors need no shared memory to be fast


def start(worker_id):
    """Prepare a data loading process; it calls this first."""
    # signals are for the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_process)
    exit_with_parent()


def exit_with_parent():
    """End this process when the command is killed; it would wait for work forever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pack_storage(storage):
    """Return how to send the memory of a tensor: a function and its arguments, for the receiver.

    Large tensors go through shared memory while there is room, all others through the pipe between
    the processes.
    """
    num_bytes = storage.nbytes()
    try:
        if storage.is_shared() or (num_bytes > SMALL and has_room(num_bytes)):
            return reductions.reduce_storage(storage)
    except (RuntimeError, OSError) as error:  # no shared memory after all, no open file, no socket
        unfinished = re.search("torch_[0-9_]+", str(error))
        if unfinished:  # PyTorch leaves the file that it could not make large enough
            Path(SHARED_MEMORY, unfinished[0]).unlink(missing_ok=True)
    return pack_for_pipe(storage)


def has_room(num_bytes):
    """Return False if shared memory has no room for two tensors of this size."""
    if not os.path.isdir(SHARED_MEMORY):  # another system than Linux
        return True
    usage = shutil.disk_usage(SHARED_MEMORY)
    is_limited = usage.total > 0
    return not is_limited or usage.free > 2 * num_bytes


def pack_for_pipe(storage):
    """Return how to send memory through the pipe, five times slower for batches of 50 MB."""
    values = torch.empty(0, dtype=torch.uint8).set_(storage)
    return unpack, (values.numpy(),)


def unpack(values):
    """Return the memory of an array, in the process that receives it."""
    return torch.from_numpy(values).untyped_storage()


# In a loading process for its batches, in the main process for the dataset: unless the loading
# processes are forks (on Linux before Python 3.14), it is sent to them, with two tensors per image.
ForkingPickler.register(torch.UntypedStorage, pack_storage)


def end_process(error, batch):
    """End a process that cannot send a batch. The main process notices this, but not the error."""
    print(f"a batch could not be sent: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


@atexit.register
def kill_all():
    """End the remaining data loading processes, which ignore SIGTERM."""
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for worker in workers:
        worker.kill()
