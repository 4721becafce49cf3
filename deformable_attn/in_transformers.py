"""Deformable attention of the package transformers, computed by this operator.

    deformable_attn.use_in_transformers()       # in every model that is built afterwards
    deformable_attn.use_in_transformers(False)  # as before

transformers has the operator in three forms, with a copy in the file of every model: the module
`MultiScaleDeformableAttention` and two functions. All copies are replaced.
"""

import importlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import MSDeformAttnFunction

MODULE = "MultiScaleDeformableAttention"
FUNCTION = "multi_scale_deformable_attention"
FUNCTION_V2 = "multi_scale_deformable_attention_v2"

_originals = {}  # {(module or class, name of its attribute): what was there}


# ---------------------------------------------------------------- the three forms
def _module_forward(
    self,
    value,
    value_spatial_shapes,
    value_spatial_shapes_list,
    level_start_index,
    sampling_locations,
    attention_weights,
    im2col_step,
):
    """Stand in for MultiScaleDeformableAttention.forward."""
    return _attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _attend(value, value_spatial_shapes, sampling_locations, attention_weights):
    """Stand in for multi_scale_deformable_attention. Returns (B, Q, M * D)."""
    return MSDeformAttnFunction.apply(
        value, value_spatial_shapes, None, sampling_locations, attention_weights
    )


def _replacement_v2(original):
    """Return what stands in for multi_scale_deformable_attention_v2.

    There the number of points may differ between levels, and the points of all levels are one
    axis: locations (B, Q, M, points, 2), weights (B, Q, M, points).
    """

    def multi_scale_deformable_attention_v2(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        method="default",
    ):
        if method != "default":  # "discrete" takes the nearest pixel instead of four
            return original(
                value,
                value_spatial_shapes,
                sampling_locations,
                attention_weights,
                num_points_list,
                method,
            )
        weights = _split_levels(attention_weights, num_points_list)  # (B, Q, M, L, P)
        locations = _split_levels(sampling_locations.movedim(3, -1), num_points_list)
        locations = locations.movedim(3, -1)  # (B, Q, M, L, P, 2)
        return _attend(value, value_spatial_shapes, locations, weights)

    return multi_scale_deformable_attention_v2


def _split_levels(x: Tensor, num_points_list: list[int]) -> Tensor:
    """Turn (..., points of all levels) into (..., L, P); P is the largest number of points.

    Levels with fewer points get further ones, which are 0; so is their weight.
    """
    P = max(num_points_list)
    levels = [F.pad(level, (0, P - level.shape[-1])) for level in x.split(num_points_list, -1)]
    return torch.stack(levels, -2)


# ---------------------------------------------------------------- replacing them
def use_in_transformers(enabled: bool = True) -> list[str]:
    """Compute the deformable attention of all models of transformers with this operator, or not.

    Call it before models are built: D-FINE and DEIMv2 keep the function that they were built with.

    enabled: False restores what transformers had
    Returns the names of the models, such as "deformable_detr". Warns of models with deformable
    attention in a form that is not known here. Raises ImportError without transformers.
    """
    if not enabled:
        for (owner, name), original in _originals.items():
            setattr(owner, name, original)
        _originals.clear()
        return []
    served = []
    unknown = []
    for module in _modules_with_deformable_attention():
        name = module.__name__.split(".")[-2]
        if _replace_forms(module):
            served.append(name)
        else:
            unknown.append(name)
    if unknown:
        models = ", ".join(unknown)
        message = f"deformable attention of an unknown form is left as it is: {models}"
        warnings.warn(message, stacklevel=2)
    return served


def _modules_with_deformable_attention():
    """Import and return the files of transformers' models that mention deformable attention."""
    import transformers  # not needed for anything else here

    models = Path(transformers.__file__).parent / "models"
    modules = []
    for path in sorted(models.glob("*/modeling_*.py")):
        if b"eformableAttention(" in path.read_bytes():  # a class or a call
            name = f"transformers.models.{path.parent.name}.{path.stem}"
            modules.append(importlib.import_module(name))
    return modules


def _replace_forms(module) -> bool:
    """Replace all forms that a file of transformers has. Return False if it has none."""
    found = False
    if hasattr(module, MODULE):
        _replace(getattr(module, MODULE), "forward", _module_forward)
        found = True
    if hasattr(module, FUNCTION):
        _replace(module, FUNCTION, _attend)
        found = True
    if hasattr(module, FUNCTION_V2):
        original = _originals.get((module, FUNCTION_V2), getattr(module, FUNCTION_V2))
        _replace(module, FUNCTION_V2, _replacement_v2(original))
        found = True
    return found


def _replace(owner, name, replacement):
    """Set an attribute and keep what was there, once."""
    _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, replacement)
