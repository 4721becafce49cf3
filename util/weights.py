"""Weights from elsewhere: checkpoints by path or URL, and their parts into a detector."""

import argparse
import hashlib
import zipfile
from pathlib import Path

import torch
from torch import Tensor


def load_checkpoint(path):
    """A checkpoint as a dict, by path or URL; only tensors and plain values, nothing executes.
    Raises ValueError naming the file if there is none or it is not a checkpoint."""
    path = download(str(path)) if "://" in str(path) else Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such run folder or checkpoint file")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # torch does not compare the checksums
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official files have one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        why = f"not a checkpoint of tensors and plain values, or damaged ({type(error).__name__})"
        raise ValueError(f"{path}: {why}") from None
    return checkpoint


def download(url):
    """The file of a URL in torch's cache. Raises ValueError."""
    key = hashlib.sha256(url.encode()).hexdigest()[:8]  # many files are called checkpoint.pth
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{Path(url).name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target))
        except OSError as error:
            raise ValueError(f"{url}: cannot be downloaded ({error})") from None
    return target


ENCODER = ("input_proj.", "transformer.level_embed", "transformer.encoder.")


PARTS = {"backbone": ("backbone.",), "encoder": ENCODER, "decoder": ("",)}  # beginnings of names


def part_of(name):
    """The part of a detector that a parameter belongs to: "backbone", "encoder" or "decoder"."""
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def unwrap_state_dict(state):
    """The weights in a checkpoint: the official {"model": …} or as other tools wrap them."""
    for key in ("model", "state_dict", "ema", "module"):
        state = state[key] if isinstance(state.get(key), dict) else state
    for prefix in ("module.", "model.", "module.", "_orig_mod."):  # DDP, Lightning, torch.compile
        inner = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
        state = inner or state
    return state


def init_from_checkpoint(model, path, parts=None):
    """Start `model`, or parts of it, from a checkpoint trained on any number of classes.
    parts: of PARTS, by default those that are in the file. Returns (parts taken, names that start
    anew: class heads that are absent or of another number of classes). Raises ValueError if
    anything else does not fit; what does fit is in the model then."""
    state, own = unwrap_state_dict(load_checkpoint(path)), model.state_dict()
    if not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f'{path}: holds no weights under "model"')
    there = [part for part in PARTS if part in map(part_of, state)]
    parts = parts or there
    if lacking := [part for part in parts if part not in there]:
        raise ValueError(f"{path}: holds no {' and no '.join(lacking)}, only {' and '.join(there)}")
    kinds = ["detr", "deformable_detr"]
    mine, theirs = (kinds["transformer.level_embed" in names] for names in (own, state))
    if mine != theirs and "encoder" in there and parts != ["backbone"]:
        raise ValueError(f"{path}: is of {theirs}, of which {mine} can take the backbone alone")
    state = {name: x for name, x in state.items() if part_of(name) in parts}
    if bad := [name for name, x in state.items() if not x.isfinite().all()]:
        message = f"{len(bad)} of these {len(state)} tensors are NaN or infinite, the first is"
        raise ValueError(f"{path}: {message} {bad[0]}; take another checkpoint")
    other = [name for name, x in state.items() if name in own and x.shape != own[name].shape]
    fitting = {name: x for name, x in state.items() if name not in other}
    absent, unexpected = model.load_state_dict(fitting, strict=False)
    absent = [name for name in absent if part_of(name) in parts]
    anew = [name for name in absent if "class_embed" in name]
    problems = [f"missing {name}" for name in absent if name not in anew + other]
    problems += [f"unexpected {name}" for name in unexpected]
    shapes = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in other if k not in anew}
    problems += [f"{k} is {x}, the model's {y}" for k, (x, y) in shapes.items()]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        what = f"{path} does not fit this model: {'; '.join(problems[:6])}{more}"
        raise ValueError(f"{what}. Build it with the file's sizes, or take only parts that fit")
    return parts, anew
