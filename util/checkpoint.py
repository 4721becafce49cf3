"""Runs on disk: the run folder, its checkpoints and its log; stopping and resuming.

last.pt holds the full training state for an exact resume. best.pt holds what inference needs:
weights, architecture, class names and flags. Both hold tensors and plain values only.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import torch
import torchvision

from util import distributed
from util.cli import is_out_of_memory, one_line
from util.files import LOCK_NAME, FolderLock, remove_unfinished, replace_file, write_text
from util.weights import load_checkpoint, part_of

MAY_CHANGE_ON_RESUME = {"resume", "out", "workers", "device", "data", "tokenizer_weights"}
RESUME_RULE = "resume with the original flags, data and number of processes"


@dataclasses.dataclass
class Run:
    """A model in training, and how far it has come."""

    model: torch.nn.Module
    task: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # of the loss in fp16; otherwise it does nothing
    metadata: dict  # of the checkpoint: "args", "detector", "task", "categories", "window"
    steps_per_epoch: int
    images_per_step: int  # in all processes
    notes: dict = dataclasses.field(default_factory=dict)  # lines of the summary: {title: text}
    out: Path | None = None  # the run folder
    epoch: int = 1
    steps_done: int = 0  # of this epoch
    skipped_steps: int = 0  # of these steps, since the gradient was infinite in fp16
    loss_sums: dict = dataclasses.field(default_factory=dict)  # over these steps
    seconds: float = 0.0  # of these steps …
    data_seconds: float = 0.0  # … and how many of them were spent waiting for data
    first_loss: float = 0.0  # of the first step of the run
    best_score: float = -math.inf
    log: list = dataclasses.field(default_factory=list)  # one dict per epoch

    def timed_batches(self, loader):
        """Yield the batches; count the seconds of the epoch and those spent waiting for data."""
        start = time.perf_counter()
        for batch in loader:
            self.data_seconds += time.perf_counter() - start
            yield batch
            now = time.perf_counter()
            self.seconds += now - start
            start = now

    def add_losses(self, losses, share):
        """Add the losses of a batch, {name: scalar tensor}; the batch is this share of a step."""
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0) + share * value.detach()

    def log_line(self):
        """Return the log's line of this epoch; losses are means over steps and processes."""
        line = {"epoch": self.epoch}
        for name, total in self.loss_sums.items():
            line[f"train_{name}"] = distributed.mean_over_ranks(total) / self.steps_per_epoch
        if self.skipped_steps:
            line["skipped_steps"] = self.skipped_steps
        seconds = max(self.seconds, 1e-9)
        line["seconds"] = round(self.seconds, 2)
        line["data_wait"] = round(self.data_seconds / seconds, 4)
        images = self.steps_per_epoch * self.images_per_step
        line["images_per_second"] = round(images / seconds, 2)
        return line

    def next_epoch(self):
        self.epoch += 1
        self.steps_done = 0
        self.skipped_steps = 0
        self.loss_sums = {}
        self.seconds = 0.0
        self.data_seconds = 0.0


# The fields of a run that are saved as they are.
PROGRESS = (
    "steps_per_epoch",
    "epoch",
    "steps_done",
    "skipped_steps",
    "seconds",
    "data_seconds",
    "first_loss",
    "best_score",
    "log",
)


# ---------------------------------------------------------------- saving
def inference_state(run):
    """Return the content of best.pt. The decoder of a pretraining is left out: it is untrained."""
    weights = run.model.state_dict()
    if run.metadata["args"]["setting"] == "pretrain":
        weights = {name: x for name, x in weights.items() if part_of(name) != "decoder"}
    task_state = run.task.state_dict() if run.task else None
    return {**run.metadata, "model": weights, "task_state": task_state, "epoch": run.epoch}


def save_resume_state(path, run):
    """Write last.pt. Every process calls this, since each has random numbers of its own."""
    cuda_rng_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    loss_sums = {name: total.cpu() for name, total in run.loss_sums.items()}
    own = {"cpu": torch.get_rng_state(), "cuda": cuda_rng_state, "loss_sums": loss_sums}
    processes = distributed.all_gather(own)
    if distributed.rank() == 0:
        state = inference_state(run)
        state["optimizer"] = run.optimizer.state_dict()
        state["schedule"] = run.schedule.state_dict()
        state["scaler"] = run.scaler.state_dict()
        state["processes"] = processes
        for name in PROGRESS:
            state[name] = getattr(run, name)
        save(path, state)


def save(path, state):
    """Write a checkpoint whole or not at all. Raises OSError."""
    try:
        with replace_file(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if the disk is full
        message = f"{path}: cannot write checkpoint ({error}); is the disk full?"
        raise OSError(message) from None


def write_log(path, log):
    """Write log.jsonl, all of it each time, so that no epoch is doubled or lost on resuming."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in log))


# ---------------------------------------------------------------- loading
def require_train_checkpoint(state, path):
    """Raise ValueError unless `state` is a checkpoint of train.py."""
    for name in ("args", "detector", "categories", "window", "model", "task"):
        if name not in state:
            message = f"{path}: not a train.py checkpoint: missing key {name!r}"
            raise ValueError(f"{message}; use its weights with train.py --init {path}")


def load(model, task, state):
    """Load the weights of a checkpoint into model and task; only a pretraining lacks the decoder's.

    Raises RuntimeError if they do not fit.
    """
    weights = dict(state["model"])
    if state["args"]["setting"] == "pretrain":
        for name, tensor in model.state_dict().items():
            if part_of(name) == "decoder":
                weights[name] = tensor
    model.load_state_dict(weights)
    if task:
        task.load_state_dict(state["task_state"])


def load_resume_state(args, defaults):
    """Return the content of last.pt in args.out, or None if there is none yet.

    defaults: {flag: default}; a flag that the run does not know, since it is new, had its default
    Raises ValueError if the run was started with other flags.
    """
    path = Path(args.out, "last.pt")
    if not path.exists():
        if path.with_name("log.jsonl").exists():
            message = "not found, but log.jsonl shows that this run has already started"
            raise ValueError(f"{path}: {message}; choose a different --out")
        return None
    state = load_checkpoint(path)
    if not isinstance(state.get("args"), dict):
        message = "not a train.py checkpoint, cannot resume"
        raise ValueError(f"{path}: {message}; to use its weights, pass it to --init")
    before = {**defaults, **state["args"]}
    changes = []
    for name, value in vars(args).items():
        if before[name] != value and name not in MAY_CHANGE_ON_RESUME:
            changes.append(f"--{name} was {before[name]}, now {value}")
    if changes:
        message = f"cannot resume with different flags ({', '.join(changes)})"
        raise ValueError(f"{path}: {message}; {RESUME_RULE}")
    return state


def resume(run, state, device):
    """Put a run where its last.pt was saved, including random numbers. Raises ValueError."""
    processes = state.get("processes", ())
    for name, before, now in (
        ("steps per epoch", state.get("steps_per_epoch"), run.steps_per_epoch),
        ("number of processes", len(processes), distributed.world_size()),
        ("classes", state.get("categories"), run.metadata["categories"]),
    ):
        if before != now:
            message = f"cannot resume from last.pt: {name} was {before}, is now {now}"
            raise ValueError(f"{message}; {RESUME_RULE}")
    # absent from checkpoints of versions without fp16
    state = {"scaler": {}, "skipped_steps": 0, **state}
    try:
        load(run.model, run.task, state)
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        run.scaler.load_state_dict(state["scaler"])
        for name in PROGRESS:
            if not isinstance(state[name], type(getattr(run, name))):
                raise TypeError(f"{name!r} is {state[name]!r:.60}")
            setattr(run, name, state[name])
        own = processes[distributed.rank()]
        run.loss_sums = {name: total.to(device) for name, total in own["loss_sums"].items()}
        torch.set_rng_state(own["cpu"])
        if own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        message = f"cannot resume from last.pt ({one_line(error)})"
        raise ValueError(f"{message}; to reuse only its weights, pass it to --init") from None


# ---------------------------------------------------------------- stopping
class GracefulStop:
    """Within this context the first SIGINT or SIGTERM is only noted; a second one interrupts.

    Python allows this in the main thread alone; in another one the context has no effect.

    received: the number of the signal, 0 for none.
    """

    def __enter__(self):
        self.received = 0
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.received = number
        self.restore()

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        self.restore()


# ---------------------------------------------------------------- the run folder
@contextlib.contextmanager
def run_folder(args):
    """Make a run folder, or accept that of the run to resume; yield its path.

    Within this context no other training can use the folder. If it has no checkpoint at the end,
    it is removed, so that its name is free.
    Raises ValueError if the folder exists, is in use or cannot be written.
    """
    out = Path(distributed.run_on_rank0(make_run_folder, args))
    lock = distributed.run_on_all_ranks(lock_run_folder, out)
    try:
        distributed.run_on_rank0(write_config, out, args)
        yield out
    finally:
        if lock:
            with contextlib.suppress(FileNotFoundError):  # the user has deleted the folder
                if set(os.listdir(out)) <= {"config.json", LOCK_NAME}:
                    (out / "config.json").unlink()
            lock.close()
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


def make_run_folder(args):
    """Make --out or the next folder in runs/; return its path as text. Raises ValueError."""
    if args.out:
        out = Path(args.out)
    else:
        out = next_run_folder(args)
    try:
        out.mkdir(parents=True, exist_ok=args.resume)
    except FileExistsError:
        if not args.out:  # another training has made it just now
            return make_run_folder(args)
        remedy = "choose a new folder"
        if out.is_dir():
            remedy += ", or continue that run with --resume"
        raise ValueError(f"--out {out} already exists; {remedy}") from None
    except OSError as error:
        message = f"cannot create --out {out} ({error.strerror})"
        raise ValueError(f"{message}; choose a different folder") from None
    return str(out)


def next_run_folder(args):
    """Return the first of runs/MODEL-SETTING-1, -2, … that does not exist."""
    kind = f"{args.model}-{args.setting}"
    if args.setting != "detect":
        kind += f"-{args.ssl_task}"
    number = 1
    while os.path.lexists(f"runs/{kind}-{number}"):
        number += 1
    return Path(f"runs/{kind}-{number}")


def lock_run_folder(out):
    """Return the lock of a run folder in the first process, None in the others."""
    if distributed.rank() > 0:
        return None
    return FolderLock(out)


def write_config(out, args):
    """Write config.json, unless the run has a checkpoint: it may end before its first one."""
    remove_unfinished(out)
    if not (out / "last.pt").exists():
        write_text(out / "config.json", json.dumps(run_config(args), indent=1))


def run_config(args):
    """Return the content of config.json."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": device_name(args.device),
    }
    return {"args": vars(args), "versions": versions, "revision": revision()}


def revision():
    """Return the commit of this code and whether it has been changed since.

    It is "unknown" unless the folder of the code is the top of a repository: git must not look for
    one further up, or where its variables point.
    """
    command = ["git", "describe", "--always", "--exclude=*", "--dirty= with changes"]
    folder = Path(__file__).resolve().parents[1]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
    options = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 60}
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, **options)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def device_name(device):
    """Return the name of the GPU or of the processor (on Linux) with its bf16 instructions.

    Another kind rounds differently, so the same seed gives a different run there.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    parts = [device, name[1] if name else platform.machine()]
    parts += sorted(set(re.findall(r"\w+_bf16", text)))
    return ", ".join(parts)
