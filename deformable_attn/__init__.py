"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): the operator, the choice of its backend, the module.

N images, Q queries, M heads, D channels a head, L levels, P points, S = sum of H*W over the levels.
"""
import functools
import math
import warnings

import torch
from torch import nn

from . import cpu, cuda
from .reference import ms_deform_attn_reference

__all__ = ["BACKENDS", "MSDeformAttn", "backend", "ms_deform_attn"]

KERNELS = {"cpu": cpu, "cuda": cuda}  # by the kind of device they run on
BACKENDS = ("auto", *KERNELS, "torch")


# ---------------------------------------------------------------- which backend runs

@functools.cache
def _kernel(kind):
    """(whether the kernel for this kind of device runs, what it is or why it does not); built at the first call."""
    try:
        return True, KERNELS[kind].description()
    except RuntimeError as error:
        return False, str(error)


def backend(device, wanted="auto"):
    """Which implementation runs on `device`, and why: (name, reason). Raises ValueError if `wanted` cannot run there."""
    kind = torch.device(device).type
    if wanted not in BACKENDS:
        raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
    if wanted == "torch":
        return "torch", "the pure-PyTorch reference, as asked for"
    if wanted in KERNELS and wanted != kind:
        raise ValueError(f"the {wanted} kernel of deformable attention does not run on {kind} tensors; choose auto or torch")
    if kind not in KERNELS:
        return "torch", f"the pure-PyTorch reference; there is no kernel for {kind}"
    runs, reason = _kernel(kind)
    if not runs and wanted == kind:
        raise ValueError(f"the {kind} kernel of deformable attention cannot run: {reason}")
    return (kind, reason) if runs else ("torch", f"the pure-PyTorch reference, which is slower; no {kind} kernel: {reason}")


@functools.cache
def _chosen(kind, wanted):
    """The name alone; says once what runs instead of a kernel that cannot."""
    name, reason = backend(kind, wanted)
    if name == "torch" and wanted == "auto" and kind in KERNELS:
        warnings.warn(f"deformable attention: {reason}", stacklevel=4)
    return name


@torch.compiler.assume_constant_result  # torch.compile calls it instead of looking inside
def _choose(kind, wanted):
    return _chosen(kind, wanted)


# ---------------------------------------------------------------- the operator

def ms_deform_attn(value, spatial_shapes, locations, weights, backend="auto"):
    """Sum over levels and points of weight x bilinear sample of the value maps (Deformable DETR, equation 3).

    value           (N, S, M, D)        the maps of all levels, flattened and concatenated: fp64, fp32, fp16 or bf16
    spatial_shapes  L x (height, width) Python integers, so that no device synchronisation is needed
    locations       (N, Q, M, L, P, 2)  x, y in 0..1 of the level; pixel = x * width - 0.5; zero outside the map; never in half
                                        precision, whose step is half a pixel from x = 64 (bf16) on
    weights         (N, Q, M, L, P)
    backend         "auto", "cuda", "cpu" or "torch"
    returns         (N, Q, M*D)         as value; sums are in fp32, or fp64 if value is

    With the kernels a point at infinity or NaN adds nothing and has no gradient; with "torch" the result may be NaN.
    Raises ValueError for shapes or dtypes that do not fit and for a backend that cannot run here.
    """
    _check(value, spatial_shapes, locations, weights)
    real = torch.promote_types(value.dtype, torch.float32)
    locations, weights = locations.to(real), weights.to(real)
    if _choose(value.device.type, backend) == "torch":
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
    flat = [size for shape in spatial_shapes for size in shape]
    return _forward(value.contiguous(), flat, locations.contiguous(), weights.contiguous())


def _check(value, spatial_shapes, locations, weights):
    """Shapes and dtypes fit, or one message that names the argument."""
    if isinstance(spatial_shapes, torch.Tensor):
        raise ValueError("spatial_shapes is a tensor; give (height, width) integers, which need no copy from the device")
    if any(size < 1 for shape in spatial_shapes for size in shape):
        raise ValueError(f"spatial_shapes is {list(spatial_shapes)}; expected (height, width) of at least 1")
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(f"value has shape {tuple(value.shape)} and locations {tuple(locations.shape)}; "
                         "expected (N, S, M, D) and (N, Q, M, L, P, 2)")
    N, S, M, _ = value.shape
    Q, L, P = locations.shape[1], *locations.shape[3:5]
    cells = sum(h * w for h, w in spatial_shapes)
    if S != cells:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected S = {cells}, the cells of levels {list(spatial_shapes)}")
    for name, tensor, shape in (("locations", locations, (N, Q, M, len(spatial_shapes), P, 2)), ("weights", weights, (N, Q, M, L, P))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; move one of them")
    if L == 0 or P == 0:
        raise ValueError(f"locations has shape {tuple(locations.shape)}; at least one level and one point are needed")
    for name, tensor in (("value", value), ("locations", locations), ("weights", weights)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point one")
    if locations.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"locations has dtype {locations.dtype}; expected float32: in half precision they miss their pixels")


@torch.library.custom_op("deformable_attn::forward", mutates_args=(), device_types=tuple(KERNELS))
def _forward(value: torch.Tensor, shapes: list[int], locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return KERNELS[value.device.type].forward(value, shapes, locations, weights)


@torch.library.custom_op("deformable_attn::backward", mutates_args=(), device_types=tuple(KERNELS))
def _backward(grad: torch.Tensor, value: torch.Tensor, shapes: list[int], locations: torch.Tensor,
              weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return KERNELS[value.device.type].backward(grad, value, shapes, locations, weights)


@_forward.register_fake
def _(value, shapes, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@_backward.register_fake
def _(grad, value, shapes, locations, weights):
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _keep(ctx, inputs, output):
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _backward(grad.contiguous(), value, ctx.shapes, locations, weights)
    return grad_value, None, grad_locations, grad_weights


_forward.register_autograd(_gradients, setup_context=_keep)


# ---------------------------------------------------------------- the module

@functools.lru_cache(maxsize=256)
def _widths_heights(spatial_shapes, device):
    """(L, 2) tensor of width, height; cached, so that the copy to the device happens once per shape."""
    return torch.tensor([(w, h) for h, w in spatial_shapes], dtype=torch.float32, device=device)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections; parameter names and initialisation as in the official code."""

    backend = "auto"  # of the operator; set it here for all modules or on one of them

    def __init__(self, hidden_dim, n_levels, n_heads, n_points):
        super().__init__()
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(hidden_dim, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self):
        """At first every head looks in a direction of its own, its n-th point n pixels away, all with equal weight."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1.0, self.n_points + 1)
        star = direction[:, None, None] * steps[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(star.expand(-1, self.n_levels, -1, -1).flatten())

    def forward(self, query, reference, source, spatial_shapes, padding):
        """Attend from `query` to points of `source` around `reference`.

        query (N, Q, C); reference (N, Q, L, 2) points or (N, Q, L, 4) boxes cxcywh, in 0..1 of each padded level;
        source (N, S, C); spatial_shapes L x (height, width); padding (N, S), True = padding. Returns (N, Q, C).
        """
        N, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(source).masked_fill(padding[..., None], 0).unflatten(-1, (M, -1))  # (N, S, M, D)
        offsets = self.sampling_offsets(query).view(N, Q, M, L, P, 2)
        weights = self.attention_weights(query).view(N, Q, M, L * P).softmax(-1).view(N, Q, M, L, P)
        centre = reference[:, :, None, :, None, :2]  # (N, Q, 1, L, 1, 2)
        if reference.shape[-1] == 2:  # offsets in pixels of the level
            locations = centre + offsets / _widths_heights(tuple(spatial_shapes), query.device)[:, None]
        else:  # offsets in units of the box: P of them reach its border
            locations = centre + offsets * (reference[:, :, None, :, None, 2:] * (0.5 / P))
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights, self.backend))
