"""Several processes, as torchrun starts them: who this one is, and what all of them have.
Alone, every function is trivial."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import time

import torch
import torch.distributed as dist


def init(device):
    """Join the other processes, if torchrun started this one; returns the device to use.
    Only the first process prints."""
    several, cuda = int(os.environ.get("WORLD_SIZE", 1)) > 1, device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if several else device
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(shutdown)
        if rank():
            sys.stdout = open(os.devnull, "w")
    if device == "cpu":
        keep_freed_memory()
    return device


def shutdown():
    """Leave the other processes. Before version 2.8 torch holds Python's lock (GIL) while it waits
    for gloo's thread, which may need that lock to free its last tensors; so it gets time before."""
    time.sleep(0.1)
    dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(value):
    """The values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def run_on_all_ranks(function, *arguments):
    """What a function returns here.
    A ValueError in any process is raised in the first one, which says it, and ends the others."""
    try:
        value, error = function(*arguments), None
    except ValueError as caught:
        value, error = None, str(caught)
    errors = [text for text in all_gather(error) if text]
    if errors:
        raise SystemExit(1) if rank() else ValueError(errors[0])
    return value


def run_on_rank0(function, *arguments):
    """What a function returns in the first process, for all of them."""
    return all_gather(run_on_all_ranks(lambda: function(*arguments) if rank() == 0 else None))[0]


def mean_over_ranks(number):
    """The mean over processes of a number or a tensor of one element."""
    number = torch.as_tensor(number, dtype=torch.float32)
    if dist.is_initialized():
        number = number.cuda() if dist.get_backend() == "nccl" else number.clone()
        dist.all_reduce(number)
    return float(number) / world_size()


def average_gradients(parameters):
    """Replace each gradient by its mean over processes, all in one transfer."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient) / world_size())


def broadcast_buffers(module):
    """Batch norm's statistics, of which every process has its own, become the first one's."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def keep_freed_memory():
    """Tell glibc to keep what is freed, on a CPU: by default the system hands out every large
    activation anew, page by page, a fifth of a training step of Deformable DETR at 512 pixels."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # the numbers of its options are those of malloc.h
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing apart from the heap …
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: … and nothing of the heap given back


def ignore_signals(worker_id):
    """Leave signals that go to all processes to the main process; runs in a worker of a loader."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """End the workers that are left; they ignore SIGTERM, with which multiprocessing ends them."""
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an error
    for worker in workers:
        worker.kill()
