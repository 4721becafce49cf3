"""Several processes, as torchrun starts them: who this one is, and what all of them have. Alone, every function is trivial."""
import atexit
import os
import sys

import torch
import torch.distributed as dist


def start(device):
    """Join the other processes, if torchrun started this one; returns the device to use. Only the first one speaks."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}" if several else device
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def hidden():
    """For tqdm's `disable`: bars of the first process on a terminal only."""
    return True if rank() else None


def gather(value):
    """The values of all processes, in the order of their ranks."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def first(value):
    """The value of the first process, for all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def everywhere(function, *arguments):
    """What a function returns here. A ValueError in any process is raised in the first one, which says it, and ends the others."""
    value = error = None
    try:
        value = function(*arguments)
    except ValueError as caught:
        error = str(caught)
    errors = [text for text in gather(error) if text]
    if errors and rank():
        sys.exit(1)
    if errors:
        raise ValueError(errors[0])
    return value


def from_first(function, *arguments):
    """What a function returns in the first process, for all of them; a ValueError ends the others."""
    return first(everywhere(lambda: function(*arguments) if rank() == 0 else None))


def total(values):
    """Sums over all processes of a dict of numbers."""
    if not dist.is_initialized():
        return values
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    sums = sums.cuda() if dist.get_backend() == "nccl" else sums
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def share_buffers(module):
    """Batch statistics, which every process has its own of, become those of the first one: the ones that are saved."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
