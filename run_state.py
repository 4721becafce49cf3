"""The state of a run: what a checkpoint holds, how it is written, and how a run stops and goes on."""
import collections
import contextlib
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import detr
import parallel


def parameter_groups(model, task, args):
    """As in the official recipes: a rate of its own for the CNN, a tenth for sampling offsets and reference points."""
    groups = collections.defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone"):
            groups[args.lr_backbone].append(parameter)
        elif "sampling_offsets" in name or "reference_points" in name:
            groups[args.lr * args.lr_linear_proj_mult].append(parameter)
        else:
            groups[args.lr].append(parameter)
    if task:
        groups[args.lr] += task.parameters()
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def build_schedule(optimizer, args, steps_per_epoch):
    """The learning rate of each step, as a factor of the group's rate."""
    total = args.epochs * steps_per_epoch
    warmup = max(1, total // 10)

    def onecycle(step):  # a tenth of the steps up along a line, the rest down along a cosine
        down = max(0, step - warmup) / max(1, total - warmup)
        return min((step + 1) / warmup, (1 + math.cos(math.pi * down)) / 2)

    def step(step):
        return 0.1 ** (step // (args.lr_drop * steps_per_epoch))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, {"onecycle": onecycle, "step": step}[args.lr_schedule])


class Run:
    """All that a checkpoint holds: weights, optimizer, schedule, random numbers, the place in the data, the log so far."""

    def __init__(self, model, task, args, content, steps):
        self.model, self.task, self.args, self.content, self.steps = model, task, args, content, steps
        self.optimizer = torch.optim.AdamW(parameter_groups(model, task, args), weight_decay=args.weight_decay, fused=True)
        self.schedule = build_schedule(self.optimizer, args, steps)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16")
        averaging = {"multi_avg_fn": get_ema_multi_avg_fn(args.ema), "use_buffers": True} if args.ema else {}
        self.ema = AveragedModel(model, **averaging) if args.ema else None
        self.epoch, self.best, self.log, self.random = 1, -math.inf, [], None  # random: to be restored before the next step
        self.begin_epoch()

    def begin_epoch(self):
        self.step, self.sums, self.waited, self.seconds = 0, {}, 0.0, 0.0  # sums: of losses over the steps so far

    @property
    def best_model(self):
        """The model to evaluate: with the averaged weights, if there are any."""
        return self.ema.module if self.ema else self.model

    def random_state(self):
        cuda = torch.cuda.get_rng_state() if self.args.device.startswith("cuda") else None
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def restore_random(self):
        if self.random:
            torch.set_rng_state(self.random["cpu"])
            if self.random["cuda"] is not None:
                torch.cuda.set_rng_state(self.random["cuda"])
        self.random = None

    def weights(self, model):
        """Its state; the decoder of a pretraining is left out."""
        return {name: tensor for name, tensor in model.state_dict().items()
                if self.args.setting != "pretrain" or detr.part_of(name) != "decoder"}

    def product(self, model):
        """What others need of the run."""
        task = self.task and {"config": self.task.config, "state": self.task.state_dict()}
        return {"model": self.weights(model), "task": task, "args": vars(self.args), **self.content,
                "epoch": self.epoch - 1 + (self.step == self.steps)}  # whole ones

    def state(self, alone=False):
        """What it takes to go on; a process that failed asks alone."""
        sums = {name: torch.as_tensor(value).cpu() for name, value in self.sums.items()}
        own = {"random": self.random or self.random_state(), "sums": sums}
        return {**self.product(self.model), "world": parallel.world(),
                "ema": self.ema and self.weights(self.ema.module), "averaged": self.ema and self.ema.n_averaged,
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
                "processes": [own] if alone else parallel.gather(own), "place": {"epoch": self.epoch, "step": self.step},
                "steps": self.steps, "waited": self.waited, "seconds": self.seconds, "log": self.log, "best": self.best}

    def load(self, state, path):
        """Go on from a checkpoint. Raises ValueError if it is of another run."""
        try:
            self.model.load_state_dict({**self.model.state_dict(), **state["model"]})  # a pretraining has no decoder there
            if self.task:
                self.task.load_state_dict(state["task"]["state"])
            if self.ema:
                self.ema.module.load_state_dict({**self.ema.module.state_dict(), **state["ema"]})
                self.ema.n_averaged.copy_(state["averaged"])
            for name in ("optimizer", "schedule", "scaler"):
                getattr(self, name).load_state_dict(state[name])
            self.epoch, self.step = state["place"]["epoch"], state["place"]["step"]
            self.waited, self.seconds, self.log, self.best = (state[name] for name in ("waited", "seconds", "log", "best"))
            own = state["processes"][parallel.rank() % len(state["processes"])]
            self.random, self.sums = own["random"], {name: value.to(self.args.device) for name, value in own["sums"].items()}
            before, now = (state["steps"], state["world"]), (self.steps, parallel.world())
            classes = state["categories"]
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: is not a checkpoint to go on from ({str(error).splitlines()[0]}); start from its weights with "
                             "--init") from None
        if classes != self.content["categories"]:
            raise ValueError(f"{path}: was made with other classes than the data's; a run goes on with the same data")
        if before != now:
            raise ValueError(f"{path}: was made with {before[0]} steps an epoch in {before[1]} processes, not {now[0]} in {now[1]}; a run "
                             "goes on with the same data and number of processes")


MAY_DIFFER = {"resume", "out", "workers", "prefetch", "pin_memory", "save_every", "device", "data", "data_unlabeled", "train_images",
              "train_json", "val_images", "val_json", "tokenizer_weights"}  # between a run and what resumes it; files may have moved


def open_checkpoint(args):
    """The checkpoint to resume from, or None if there is none yet. Raises ValueError if it was made with other flags."""
    path = Path(args.out, args.resume)
    if not all(seen := parallel.gather(path.exists())) and any(seen):
        raise ValueError(f"{path}: not every process can see it; --resume needs a disk that all machines share")
    if not path.exists() and args.resume == "last.pt":
        if (path.parent / "log.jsonl").exists():
            raise ValueError(f"{path}: is gone, but its run has been going; put it back or name another folder")
        return None
    state = detr.load_checkpoint(path)
    before, now = state.get("args"), vars(args)
    if not isinstance(before, dict):
        raise ValueError(f"{path}: is not a checkpoint of train.py; start from its weights with --init")
    differ = [name for name in before.keys() & now.keys() - MAY_DIFFER if before[name] != now[name]]
    if differ:
        raise ValueError(f"{path}: was made with " + ", ".join(f"--{name} {before[name]}, not {now[name]}" for name in sorted(differ))
                         + "; a run goes on with the flags and the data it was started with")
    return state


_entered = {}  # the run folder that this process is in: (its lock file, open, whether nothing else was there before)


def enter(out):
    """Keep other processes out of a run folder. Raises BlockingIOError if one is in it, OSError if nothing can be written there."""
    new = not any(path.name != ".lock" for path in out.iterdir())
    file = open(out / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows; network file systems without locks
        pass
    _entered[out] = file, new


def leave(out):
    """The opposite. A folder in which nothing came of a run is removed, so that the same command works again."""
    if out not in _entered:
        return
    file, new = _entered.pop(out)
    file.close()
    (out / ".lock").unlink(missing_ok=True)
    if new and all(path.name == "config.json" for path in out.iterdir()):
        (out / "config.json").unlink(missing_ok=True)
        out.rmdir()


def check_disk(out, model, ema):
    """Raises ValueError if the checkpoints would not fit: one that replaces last.pt, and last.pt and best.pt where they are not there."""
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    last = weights * (4 if ema else 3)  # with the optimizer's two averages
    need = last + (0 if (out / "last.pt").exists() else last) + (0 if (out / "best.pt").exists() else weights)
    free = shutil.disk_usage(out).free
    if free < need:
        raise ValueError(f"--out {out}: {free / 1e6:,.0f} MB are free on its disk, checkpoints need up to {need / 1e6:,.0f}; make room or "
                         "name another folder")


class Signals:
    """Within this context SIGINT and SIGTERM are noted, for the loop to look at after its step. A second one interrupts at once, as the
    first one does while `at_once` is set; but nothing does within `held`."""

    def __enter__(self):
        self.caught, self.number, self.at_once, self.holding = 0, 0, False, False
        here = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM) if here}
        return self

    def note(self, number, frame):
        self.caught, self.number = number, self.number + 1
        self.check()

    def check(self):
        if self.caught and not self.holding and (self.at_once or self.number > 1):
            raise KeyboardInterrupt(128 + self.caught)  # the exit status

    @contextlib.contextmanager
    def held(self):
        """For what must not be interrupted, such as writing a file."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        self.check()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


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
        if "DataLoader worker" in str(error.__context__):  # the death of a loader process, noticed here by chance
            raise error.__context__ from None
        why = error.strerror if isinstance(error, OSError) else f"is the disk full? {str(error).splitlines()[0]}"
        raise OSError(f"{path}: cannot be written ({why})") from None
