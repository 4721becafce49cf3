"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): operator and module.
N images, Q queries, M heads, D channels a head, L levels, P points, S = sum of H*W over levels."""

import functools
import math
import warnings
from typing import List, Tuple  # noqa: UP035  (torch 2.6 knows no list[int] in operators)

import torch
from torch import Tensor, nn

from . import cpu, cuda
from .reference import ms_deform_attn_reference

KERNELS = {"cpu": cpu, "cuda": cuda}  # by the kind of device they run on
BACKENDS = ("auto", *KERNELS, "torch")


@functools.cache
def _kernel(kind):
    """(whether the kernel for a kind of device runs, what it is or why not); built at first use."""
    try:
        return True, KERNELS[kind].description()
    except (OSError, RuntimeError) as error:
        return False, str(error)


def backend(device, wanted="auto"):
    """What runs on `device`, and why: (name, reason). ValueError if `wanted` cannot run there."""
    kind = torch.device(device).type
    if wanted not in BACKENDS:
        raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
    if wanted in KERNELS and wanted != kind:
        message = f"the {wanted} kernel of deformable attention does not run on {kind} tensors"
        raise ValueError(f"{message}; choose auto or torch")
    if wanted == "torch" or kind not in KERNELS:
        reason = "as asked for" if wanted == "torch" else f"there is no kernel for {kind}"
        return "torch", f"the pure-PyTorch reference, {reason}"
    runs, reason = _kernel(kind)
    if not runs and wanted == kind:
        raise ValueError(f"the {kind} kernel of deformable attention cannot run: {reason}")
    slow = f"the pure-PyTorch reference, which is slower; no {kind} kernel: {reason}"
    return (kind, reason) if runs else ("torch", slow)


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


def ms_deform_attn(value, spatial_shapes, locations, weights, backend="auto"):
    """Sum over levels and points of weight x bilinear sample of the maps (equation 3).

    value           (N, S, M, D)        the maps of all levels, flattened: fp64, fp32, fp16, bf16
    spatial_shapes  L x (height, width) Python integers, so that no device has to be waited for
    locations       (N, Q, M, L, P, 2)  fp32 or fp64: x, y in 0..1 of the level; zero outside;
                                        pixel = x * width - 0.5
    weights         (N, Q, M, L, P)
    backend         "auto", "cuda", "cpu" or "torch"
    returns         (N, Q, M*D)         as value; sums are in fp32, or fp64 if value is

    With the kernels a point at infinity or NaN adds nothing and has no gradient; with "torch" the
    result may be NaN. Raises ValueError for shapes, dtypes or a backend that cannot be."""
    _check(value, spatial_shapes, locations, weights)
    real = torch.promote_types(value.dtype, torch.float32)
    locations, weights = locations.to(real), weights.to(real)
    if _choose(value.device.type, backend) == "torch":
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
    flat = [size for shape in spatial_shapes for size in shape]
    return _forward(value.contiguous(), flat, locations.contiguous(), weights.contiguous())


def _check(value, spatial_shapes, locations, weights):
    """Shapes and dtypes fit, or ValueError that names the argument."""
    if isinstance(spatial_shapes, torch.Tensor):
        raise ValueError("spatial_shapes is a tensor; give (height, width) integers instead")
    if any(size < 1 for shape in spatial_shapes for size in shape):
        raise ValueError(f"spatial_shapes is {spatial_shapes}; expected sizes of at least 1")
    if value.dim() != 4 or locations.dim() != 6:
        found = f"value has shape {tuple(value.shape)}, locations {tuple(locations.shape)}"
        raise ValueError(f"{found}; expected (N, S, M, D) and (N, Q, M, L, P, 2)")
    (N, _, M, D), (_, Q, _, _, P, _) = value.shape, locations.shape
    S, L = sum(h * w for h, w in spatial_shapes), len(spatial_shapes)
    if L == 0 or P == 0:
        raise ValueError(f"locations has shape {tuple(locations.shape)}; no level or no point")
    expected = {"value": (N, S, M, D), "locations": (N, Q, M, L, P, 2), "weights": (N, Q, M, L, P)}
    for (name, shape), tensor in zip(expected.items(), (value, locations, weights)):
        found = tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"{name} has shape {found}; expected {shape} for {spatial_shapes}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point one")
    if locations.dtype in (torch.float16, torch.bfloat16):  # they would miss their pixels
        raise ValueError(f"locations has dtype {locations.dtype}; expected float32")


@torch.library.custom_op("deformable_attn::forward", mutates_args=(), device_types=tuple(KERNELS))
def _forward(value: Tensor, shapes: List[int], locations: Tensor, weights: Tensor) -> Tensor:  # noqa: UP006
    return KERNELS[value.device.type].forward(value, shapes, locations, weights)


@torch.library.custom_op("deformable_attn::backward", mutates_args=(), device_types=tuple(KERNELS))
def _backward(grad: Tensor, value: Tensor, shapes: List[int], locations: Tensor,  # noqa: UP006
              weights: Tensor) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006 # fmt: skip
    return KERNELS[value.device.type].backward(grad, value, shapes, locations, weights)


@_forward.register_fake
def _(value, shapes, locations, weights):
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@_backward.register_fake
def _(grad, value, shapes, locations, weights):
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _keep(ctx, inputs, output):
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    grads = _backward(grad.contiguous(), value, ctx.shapes, locations, weights)
    return grads[0], None, *grads[1:]


_forward.register_autograd(_gradients, setup_context=_keep)


@functools.lru_cache(maxsize=256)
def _widths_heights(spatial_shapes, device):
    """(L, 2) tensor of width, height; cached: it is copied to the device once per shape."""
    return torch.tensor([(w, h) for h, w in spatial_shapes], dtype=torch.float32, device=device)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections; names and initialisation are official."""

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
        """At first every head looks its own way, its n-th point n pixels away, weights equal."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        star = direction[:, None, None] * torch.arange(1.0, self.n_points + 1)[:, None]
        with torch.no_grad():  # (M, 1, P, 2) to (M, L, P, 2)
            self.sampling_offsets.bias.copy_(star.expand(-1, self.n_levels, -1, -1).flatten())

    def forward(self, query, reference, source, spatial_shapes, padding):
        """What `query` (N, Q, C) finds in `source` (N, S, C) around `reference`: (N, Q, C).
        padding (N, S), True = padding; reference and spatial_shapes as in `sample`."""
        value = self.value_proj(source).masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.n_heads, -1))  # (N, S, M, D)
        sampled = self.sample(query, reference, spatial_shapes)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, *sampled, self.backend))

    def sample(self, query, reference, spatial_shapes):
        """Where each query looks: locations (N, Q, M, L, P, 2) and weights (N, Q, M, L, P).
        reference (N, Q, L, 2) points or (N, Q, L, 4) boxes cxcywh, in 0..1 of each padded level."""
        N, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        offsets = self.sampling_offsets(query).view(N, Q, M, L, P, 2)
        weights = self.attention_weights(query).view(N, Q, M, L * P).softmax(-1)
        centre = reference[:, :, None, :, None, :2]  # (N, Q, 1, L, 1, 2)
        if reference.shape[-1] == 2:  # offsets in pixels of the level
            offsets = offsets / _widths_heights(tuple(spatial_shapes), query.device)[:, None]
        else:  # offsets in units of the box: P of them reach its border
            offsets = offsets * (reference[:, :, None, :, None, 2:] * (0.5 / P))
        return centre + offsets, weights.view(N, Q, M, L, P)


def set_attention_backend(model, device, wanted="auto"):
    """Let a model's deformable attention run as `wanted`. Returns what runs and why, in words; ""
    for a model without. Raises ValueError."""
    modules = [module for module in model.modules() if isinstance(module, MSDeformAttn)]
    name, reason = backend(device, wanted) if modules else ("", "")
    for module in modules:
        module.backend = name
    return f"{name}: {reason}" if modules else ""
