"""Checkpoints by path, URL or name, and the loading of their weights into a detector."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.cli import is_out_of_memory
from util.download import DELETE, cached_url, check_zip, is_web_page, is_zip
from util.files import DataError
from util.pretrained import is_model_name, model_file, safetensors_works, similar_names
from util.transformers_names import has_transformers_names, to_official_names

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

    path: a file, a URL, or the name of a published model. The file is one of torch.save or in the
          format safetensors. Only tensors and plain values are loaded; no code is executed.
    Raises ValueError that names the file if it is not found or is not a checkpoint.
    """
    source = path
    if is_model_name(source):
        path = model_file(source)
    elif "://" in str(source):
        path = cached_url(str(source))
    path = Path(path)
    if not path.is_file():
        names = similar_names(source)
        raise ValueError(f"{path}: no such run folder or checkpoint file{names}")
    try:
        if is_safetensors(path):
            return load_safetensors(path)
        return load_torch_file(path)
    except DataError:
        raise
    except PermissionError:
        raise ValueError(f"{path}: cannot be read (Permission denied)") from None
    except Exception as error:  # torch raises half a dozen types for a corrupted file
        if is_out_of_memory(error):
            raise
        reason = f"not a weights-only checkpoint, or the file is corrupted ({type(error).__name__})"
        if path != Path(source):
            reason += f"; {DELETE}"
        raise ValueError(f"{path}: {reason}") from None


def load_torch_file(path):
    """Load a file of torch.save that contains a dict.

    Raises DataError if it is a web page or contains objects that could execute code, and any other
    exception if it is damaged.
    """
    if is_web_page(path):
        raise DataError(f"{path}: is a web page, not weights; download the file itself")
    if is_zip(path):  # files of old versions of torch are not
        check_zip(path)
    with torch.serialization.safe_globals(SAFE_CLASSES):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if is_zip(path):
                name_refused_classes(path)
            raise
    if not isinstance(checkpoint, dict):
        raise TypeError
    return checkpoint


def numpy_scalar_classes():
    """Return what torch has to allow so that it loads numpy's scalars, which execute nothing."""
    make_scalar, _ = np.float64(0).__reduce__()
    classes = [np.dtype]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and 2
        classes.append((make_scalar, f"{module}.scalar"))
    for letter in "?bBhHiIlLqQefdFD":  # numpy's codes of truth values, integers and numbers
        classes.append(type(np.dtype(letter)))
    return classes


SAFE_CLASSES = [argparse.Namespace, *numpy_scalar_classes()]  # official files have a Namespace


def name_refused_classes(path):
    """Raise DataError that names the classes in a file that torch refuses to load, if any."""
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if classes:
        names = ", ".join(sorted(classes))
        remedy = 'save the weights alone with torch.save({"model": model.state_dict()}, FILE)'
        message = f"contains more than tensors and plain values ({names}), which may execute code"
        raise DataError(f"{path}: {message}; {remedy}")


def is_safetensors(path):
    """Return True for a file in the format safetensors: eight bytes, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def load_safetensors(path):
    """Load a file in the format safetensors. Raises DataError without the package of this name."""
    if not safetensors_works():
        raise DataError(
            f"{path}: is in the format safetensors; pip install safetensors, "
            f"or use pytorch_model.bin of the same model"
        )
    from safetensors.torch import load_file

    return load_file(path)


def unwrap_state_dict(checkpoint):
    """Return the state dict in a checkpoint, under the official names.

    Official files contain {"model": …}; other tools wrap it in other ways.
    """
    state = checkpoint
    for key in ("model", "state_dict", "ema", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if has_transformers_names(state):
        return to_official_names(state)
    for prefix in ("module.", "model.", "module.", "_orig_mod."):  # DDP, Lightning, torch.compile
        wrapped = {}
        for name, tensor in state.items():
            if name.startswith(prefix):
                wrapped[name.removeprefix(prefix)] = tensor
        if wrapped:
            state = wrapped
    return state


def read_state_dict(path):
    """Return the state dict of a checkpoint, {official name: tensor}, see load_checkpoint.

    Raises ValueError if it has none.
    """
    checkpoint = load_checkpoint(path)
    state = unwrap_state_dict(checkpoint)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: no state dict found (expected under "model")')
    return state


# ---------------------------------------------------------------- weights into a model
def init_from_checkpoint(model, path, parts=None):
    """Initialize a detector, or parts of it, from a checkpoint trained on any number of classes.

    model: the detector
    path:  path, URL or name of the checkpoint, see load_checkpoint
    parts: some of PARTS; default: all that the checkpoint contains
    Returns (parts taken, names of reinitialized parameters): class heads that are missing in the
    checkpoint or have a different number of classes keep the model's initial weights.
    Raises ValueError if anything else does not fit; the weights that fit are in the model then.
    """
    state = read_state_dict(path)
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
    state, conflicts = fill_aliases(own, state)
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
    problems = missing + [f"unexpected {name}" for name in unexpected] + mismatched + conflicts
    if problems:
        listed = "; ".join(problems[:6])
        if len(problems) > 6:
            listed += f" and {len(problems) - 6} more"
        advice = "Use the checkpoint's model flags, or load only matching parts with --init_parts"
        raise ValueError(f"{path} is incompatible with this model: {listed}. {advice}")
    return reinitialized


def fill_aliases(own, state):
    """Give each tensor of a file to all names that the model has for it.

    own:   the model's state dict; heads that several layers share are in it under several names
    state: of the file, which may have one of these names or all of them
    Returns (the new state dict, descriptions of names that the file has different tensors for).
    """
    names_of = {}
    for name, tensor in own.items():
        names_of.setdefault(tensor.data_ptr(), []).append(name)
    filled = dict(state)
    conflicts = []
    for names in names_of.values():
        given = [name for name in names if name in state]
        for name in names:
            if given and name not in state:
                filled[name] = state[given[0]]
            elif given and not torch.equal(state[name], state[given[0]]):
                conflicts.append(f"{name} differs from {given[0]}")
    return filled, conflicts
