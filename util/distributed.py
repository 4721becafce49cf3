"""Several processes, as torchrun starts them. With a single process every function is trivial."""

import atexit
import os
import sys
import time

import torch
import torch.distributed as dist

from deformable_attn.cpu import keep_freed_memory


def init(device):
    """Join the other processes if torchrun started this one. Only the first process prints.

    Raises ValueError if it cannot join them.
    """
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(device)
    if launched_processes() > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if is_cuda else "gloo")
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            message = f"this process cannot join the others ({reason})"
            raise ValueError(f"{message}; start all of them with torchrun") from None
        atexit.register(shutdown)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    if device == "cpu":
        keep_freed_memory()


def read_number(name):
    """Return the number in an environment variable that torchrun sets. Raises ValueError."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(
            f"environment variable {name}: expected a whole number, got {text!r}; start several "
            "processes with torchrun, which sets it, or unset WORLD_SIZE for a single one"
        )
    return int(text)


def launched_processes():
    """Return the number of processes that torchrun has started: 1 without it."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    return read_number("WORLD_SIZE")


def local_rank():
    """Return the number of this process on its machine, which is that of its GPU.

    Some launchers do not set it. It is 0 if there is a single process or a single GPU.
    """
    is_single = launched_processes() == 1 or torch.cuda.device_count() == 1
    if is_single and "LOCAL_RANK" not in os.environ:
        return 0
    return read_number("LOCAL_RANK")


def shutdown():
    """Leave the other processes.

    Before version 2.8 torch holds Python's lock (GIL) while it waits for gloo's thread, and that
    thread may need the lock to free its last tensors.
    """
    wait_for_threads()
    dist.destroy_process_group()


def wait_for_threads():
    """Let gloo's threads free their last tensors.

    Called before loader processes are forked: in some versions of Python 3.10 and 3.11 a fork never
    returns if such a thread has just begun to use Python (CPython issue 112275).
    """
    if dist.is_initialized():
        time.sleep(0.1)


def rank():
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(value):
    """Return the values of all processes, a list in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def run_on_all_ranks(function, *arguments):
    """Return what a function returns in this process.

    A ValueError in any process is raised again in the first one, which prints it; the others exit.
    """
    value = None
    error = None
    try:
        value = function(*arguments)
    except ValueError as caught:
        error = str(caught)
    errors = [text for text in all_gather(error) if text is not None]
    if errors and rank() == 0:
        raise ValueError(errors[0])
    if errors:
        raise SystemExit(1)
    return value


def run_on_rank0(function, *arguments):
    """Return, in every process, what a function returns in the first one."""

    def on_first():
        return function(*arguments) if rank() == 0 else None

    return all_gather(run_on_all_ranks(on_first))[0]


def mean_over_ranks(number):
    """Return the mean over processes of a number or a tensor with one element, as a float."""
    total = torch.as_tensor(number, dtype=torch.float32)
    if dist.is_initialized():
        total = total.cuda() if dist.get_backend() == "nccl" else total.clone()
        dist.all_reduce(total)
    return float(total) / world_size()


def broadcast_buffers(module):
    """Give every process the buffers (statistics of batch normalization) of the first one.

    DistributedDataParallel does this before each forward pass in training, so after the last
    one each process has statistics of its own again.
    """
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
