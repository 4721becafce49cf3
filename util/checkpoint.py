"""What a run keeps on disk: its folder, its checkpoints, its log; how it stops and goes on.

last.pt holds all it takes to go on exactly; best.pt what others need of the run: weights,
architecture, classes, flags. Both hold tensors and plain values only.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import time
from pathlib import Path

import torch
import torchvision

from util import coco, distributed
from util.cli import one_line
from util.files import check_writable, write_text
from util.weights import load_checkpoint, part_of

MAY_CHANGE_ON_RESUME = {
    "resume",
    "out",
    "workers",
    "device",
    "data",
    "tokenizer_weights",
}  # files may move
NEED_SAME = "a run goes on with the flags, data and number of processes it was started with"


@dataclasses.dataclass
class Run:
    """A model in training, and how far it has come."""

    model: torch.nn.Module
    task: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    metadata: dict  # for others: "args", "detector", "categories", "task", "window"
    steps_per_epoch: int
    epoch: int = 1
    step: int = 0  # those of this epoch that are done
    sums: dict = dataclasses.field(default_factory=dict)  # of losses over these steps
    seconds: float = 0.0  # of these steps …
    waited: float = 0.0  # … and how many of them for data
    first_loss: float = 0.0  # of the first batch of all
    best: float = -math.inf
    log: list = dataclasses.field(default_factory=list)  # a dict an epoch

    def timed_batches(self, loader):
        """The batches; counts the seconds of the epoch, and those in which it waits for data."""
        start = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - start
            yield batch
            self.seconds, start = self.seconds + time.perf_counter() - start, time.perf_counter()

    def add_losses(self, terms, share):
        """Count the losses of a batch, which is a share of a step."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + share * value.detach()

    def log_line(self, batch):
        """The log's line of this epoch; losses are means over batches and processes."""
        losses = {
            f"train_{name}": distributed.mean_over_ranks(x) / self.steps_per_epoch
            for name, x in self.sums.items()
        }
        seconds = max(self.seconds, 1e-9)
        times = {"seconds": round(self.seconds, 2), "data_wait": round(self.waited / seconds, 4)}
        rate = round(self.steps_per_epoch * batch * distributed.world_size() / seconds, 2)
        return {"epoch": self.epoch, **losses, **times, "images_per_second": rate}

    def next_epoch(self):
        self.epoch += 1
        self.step, self.sums, self.seconds, self.waited = 0, {}, 0.0, 0.0


PLAIN = "steps_per_epoch", "epoch", "step", "seconds", "waited", "first_loss", "best", "log"


def inference_state(run):
    """What others need of a run; the decoder of a pretraining is left out."""
    weights, task = run.model.state_dict(), run.task and run.task.state_dict()
    if run.metadata["args"]["setting"] == "pretrain":
        weights = {k: x for k, x in weights.items() if part_of(k) != "decoder"}
    return {**run.metadata, "model": weights, "task_state": task, "epoch": run.epoch}


def save_resume_state(path, run):
    """Write what it takes to go on; every process calls this, the first one writes."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    sums = {name: value.cpu() for name, value in run.sums.items()}
    processes = distributed.all_gather({"cpu": torch.get_rng_state(), "cuda": cuda, "sums": sums})
    if distributed.rank() == 0:
        training = {name: getattr(run, name).state_dict() for name in ("optimizer", "schedule")}
        plain = {name: getattr(run, name) for name in PLAIN}
        save(path, {**inference_state(run), **training, **plain, "processes": processes})


def save(path, content):
    """Write a checkpoint whole or not at all. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written; is the disk full? ({error})") from None


def load_resume_state(args):
    """The checkpoint to go on from, or None yet. ValueError if it was made with other flags."""
    path = Path(args.out, "last.pt")
    if not path.exists():
        if path.with_name("log.jsonl").exists():
            raise ValueError(f"{path}: is gone, but its run has been going; name another folder")
        return None
    state, now = load_checkpoint(path), vars(args)
    before = state.get("args")
    if not isinstance(before, dict):
        raise ValueError(f"{path}: is not a checkpoint of train.py; start from it with --init")
    differ = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    changes = [
        f"--{k} {before.get(k)}, not {now.get(k)}" for k in differ if k not in MAY_CHANGE_ON_RESUME
    ]
    if changes:
        raise ValueError(f"{path}: was made with {', '.join(changes)}; {NEED_SAME}")
    return state


# the flags of a run that others read
KINDS = {"setting": str, "augment": str, "seed": int, "batch_size": int, "data": str | None}
KINDS |= dict.fromkeys(("image_size", "overfit", "limit_train", "limit_val"), int | None)


def faults(state):
    """What a checkpoint says of its run that cannot be, one message after the other."""
    for name in ("args", "detector", "categories", "window", "model", "task"):
        if name not in state or name in ("args", "detector") and not isinstance(state[name], dict):
            yield f"is not a checkpoint of train.py, which has {name!r}"
            return
    for name, kind in KINDS.items():
        value, least = state["args"].get(name), 0 if name == "seed" else 1
        there = name in state["args"] and isinstance(value, kind)
        if not there or isinstance(value, int) and value < least:
            yield f"its 'args' have no usable {name!r}, but {value!r:.60}"
    classes = {"images": [], "annotations": [], "categories": state["categories"]}
    yield from coco.validation_errors(classes, require_annotations=False)
    if max(1, len(state["categories"])) != state["detector"].get("num_classes"):
        yield "'categories' are more or fewer than its detector has classes"
    window = state["window"]
    if state["args"]["setting"] != "pretrain" and not (isinstance(window, int) and window > 0):
        yield f"'window' is {window!r:.60}, not the side of its images in pixels"


def load(model, task, state):
    """The weights of a checkpoint into model and task; a pretraining alone lacks the decoder's."""
    pretrain, own = state["args"]["setting"] == "pretrain", model.state_dict()
    left = {k: x for k, x in own.items() if pretrain and part_of(k) == "decoder"}
    model.load_state_dict({**left, **state["model"]})
    if task:
        task.load_state_dict(state["task_state"])


def resume(run, state, device):
    """Put a run where the checkpoint was saved, random numbers too. Raises ValueError."""
    processes = state.get("processes", ())
    for name, before, now in (
        ("steps an epoch", state.get("steps_per_epoch"), run.steps_per_epoch),
        ("processes", len(processes), distributed.world_size()),
        ("classes", state.get("categories"), run.metadata["categories"]),
    ):
        if before != now:
            raise ValueError(f"last.pt: was made with {before} {name}, not {now}; {NEED_SAME}")
    try:
        load(run.model, run.task, state)
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        for name in PLAIN:
            if type(state[name]) is not type(getattr(run, name)):
                raise TypeError(f"{name!r} is {state[name]!r:.60}")
            setattr(run, name, state[name])
        own = processes[distributed.rank()]
        run.sums = {name: value.to(device) for name, value in own["sums"].items()}
        torch.set_rng_state(own["cpu"])
        if own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        why = one_line(error)
        raise ValueError(f"last.pt: cannot be gone on from ({why}); use --init") from None


class GracefulStop:
    """Within this context the first SIGINT or SIGTERM is noted only; a second one interrupts."""

    def __enter__(self):
        self.received = 0
        self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the run folder
def make_run_folder(args):
    """A new folder for the run with its config.json, or the one to go on with. ValueError."""
    if args.out is None:
        kind = args.setting if args.setting == "detect" else f"{args.setting}-{args.ssl_task}"
        names = (Path(f"runs/{args.model}-{kind}-{n}") for n in itertools.count(1))
        args.out = next(str(name) for name in names if not name.exists())
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=args.resume)
        if not (out / "last.pt").exists():  # a run may end before its first checkpoint
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            versions |= {"torchvision": torchvision.__version__, "device": device_name(args.device)}
            config = {"args": vars(args), "versions": versions, "revision": revision()}
            write_text(out / "config.json", json.dumps(config, indent=1))
    except FileExistsError:
        advice = ", or go on with its run: --resume" if out.is_dir() else ""
        raise ValueError(f"--out {out} exists already; name a new folder{advice}") from None
    except OSError as error:
        why = f"cannot be made ({error.strerror}); name another folder"
        raise ValueError(f"--out {out} {why}") from None
    check_writable(out / ".tried")
    return str(out)


@contextlib.contextmanager
def remove_if_unused(out):
    """Remove the folder of a run that ends before its first checkpoint: its name is free then."""
    try:
        yield
    finally:
        if distributed.rank() == 0 and os.listdir(out) == ["config.json"]:
            Path(out, "config.json").unlink()
            Path(out).rmdir()


def revision():
    """The commit of this code, and whether it was changed since."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty= with changes"]
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=where, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def device_name(device):
    """What a run computes on; another kind rounds otherwise, so that a seed gives another run.
    Of a processor (on Linux) its name and its instructions for bf16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)[:1] or [platform.machine()]
    return ", ".join([device, *names, *sorted({*re.findall(r"\w+_bf16", text)})])


def write_log(path, log):
    """log.jsonl, anew each time, so that no epoch is doubled or missing after an interruption."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in log))
