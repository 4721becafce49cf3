"""Checkpoints by path or URL, and the loading of their weights into a detector."""

import argparse
import hashlib
import zipfile
from pathlib import Path

import torch
from torch import Tensor

PARTS = ("backbone", "encoder", "decoder")  # of a detector, see part_of


def part_of(name):
    """Return the part of a detector that the parameter `name` belongs to."""
    if name.startswith("backbone."):
        return "backbone"
    if name.startswith(("input_proj.", "transformer.level_embed", "transformer.encoder.")):
        return "encoder"
    return "decoder"


# ---------------------------------------------------------------- files
def load_checkpoint(path):
    """Load a checkpoint as a dict.

    path: path or URL of a file. Only tensors and plain values are loaded; no code is executed.
    Raises ValueError that names the file if it is not found or is not a checkpoint.
    """
    if "://" in str(path):
        path = download(str(path))
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such run folder or checkpoint file")
    try:
        check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files contain one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError
    except Exception as error:  # torch raises half a dozen types for a corrupted file
        reason = f"not a weights-only checkpoint, or the file is corrupted ({type(error).__name__})"
        raise ValueError(f"{path}: {reason}") from None
    return checkpoint


def check_zip(path):
    """Compare the checksums in a file of torch.save, as torch.load does not. Raises BadZipFile."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile


def download(url):
    """Return the path of a URL's file in torch's cache, downloaded if needed. Raises ValueError."""
    key = hashlib.sha256(url.encode()).hexdigest()[:8]  # many files are called checkpoint.pth
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{Path(url).name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target))
        except OSError as error:
            raise ValueError(f"{url}: download failed ({error})") from None
    return target


def unwrap_state_dict(checkpoint):
    """Return the state dict in a checkpoint, official ({"model": …}) or wrapped by other tools."""
    state = checkpoint
    for key in ("model", "state_dict", "ema", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
    for prefix in ("module.", "model.", "module.", "_orig_mod."):  # DDP, Lightning, torch.compile
        wrapped = {}
        for name, tensor in state.items():
            if name.startswith(prefix):
                wrapped[name.removeprefix(prefix)] = tensor
        if wrapped:
            state = wrapped
    return state


# ---------------------------------------------------------------- weights into a model
def init_from_checkpoint(model, path, parts=None):
    """Initialize a detector, or parts of it, from a checkpoint trained on any number of classes.

    model: the detector
    path:  path or URL of the checkpoint
    parts: some of PARTS; default: all that the checkpoint contains
    Returns (parts taken, names of reinitialized parameters): class heads that are missing in the
    checkpoint or have a different number of classes keep the model's initial weights.
    Raises ValueError if anything else does not fit; the weights that fit are in the model then.
    """
    state = unwrap_state_dict(load_checkpoint(path))
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: no state dict found (expected under "model")')
    parts = choose_parts(model, state, path, parts)
    state = {name: tensor for name, tensor in state.items() if part_of(name) in parts}
    not_finite = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if not_finite:
        message = f"{len(not_finite)} of {len(state)} tensors contain NaN or Inf"
        raise ValueError(f"{path}: {message} (first: {not_finite[0]}); use a different checkpoint")
    return parts, load_parts(model, state, path, parts)


def architecture(state):
    """Return the name of the detector that a state dict belongs to."""
    if "transformer.level_embed" in state:
        return "deformable_detr"
    return "detr"


def choose_parts(model, state, path, parts):
    """Return the parts to load from a state dict: those asked for, or all that it contains.

    Raises ValueError if a part is missing or belongs to the other detector.
    """
    contained = {part_of(name) for name in state}
    available = [part for part in PARTS if part in contained]
    if not parts:
        parts = available
    missing = [part for part in parts if part not in available]
    if missing:
        message = f"no weights for {' and '.join(missing)}"
        raise ValueError(f"{path}: {message}; the checkpoint contains {' and '.join(available)}")
    model_name = architecture(model.state_dict())
    checkpoint_name = architecture(state)
    # a file with nothing but a backbone fits both detectors
    if model_name != checkpoint_name and "encoder" in available and parts != ["backbone"]:
        advice = f"{model_name} can load only its backbone (--init_parts backbone)"
        raise ValueError(f"{path}: is a {checkpoint_name} checkpoint; {advice}")
    return parts


def load_parts(model, state, path, parts):
    """Load a state dict of some parts into a model; return the names of reinitialized parameters.

    Raises ValueError that lists what does not fit, class heads excepted.
    """
    own = model.state_dict()
    fitting = {}
    for name, tensor in state.items():
        if name not in own or tensor.shape == own[name].shape:
            fitting[name] = tensor
    not_loaded, unexpected = model.load_state_dict(fitting, strict=False)
    reinitialized = []
    missing = []
    mismatched = []
    for name in not_loaded:
        if part_of(name) not in parts:
            continue
        if "class_embed" in name:
            reinitialized.append(name)
        elif name in state:
            shapes = f"is {tuple(state[name].shape)}, the model's {tuple(own[name].shape)}"
            mismatched.append(f"{name} {shapes}")
        else:
            missing.append(f"missing {name}")
    problems = missing + [f"unexpected {name}" for name in unexpected] + mismatched
    if problems:
        listed = "; ".join(problems[:6])
        if len(problems) > 6:
            listed += f" and {len(problems) - 6} more"
        advice = "Use the checkpoint's model flags, or load only matching parts with --init_parts"
        raise ValueError(f"{path} is incompatible with this model: {listed}. {advice}")
    return reinitialized
