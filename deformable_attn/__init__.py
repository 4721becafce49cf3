"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): operator and module.

Letters: B batch size, Q queries, M heads, D channels per head, C = M * D channels, L levels
(feature maps), P points per level, H x W size of a level, S = sum of H * W over all levels.

reference.py specifies the operator; cpu.cpp and cuda.cu compute the same faster.
"""

import functools
import math
import warnings
from typing import List, Tuple  # noqa: UP035

import torch
from torch import Tensor, nn

from . import cpu, cuda
from .reference import ms_deform_attn_reference

__version__ = "1.0.0"
__all__ = [
    "BACKENDS",
    "MSDeformAttn",
    "choose_backend",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "set_attention_backend",
    "use_in_transformers",
]
KERNELS = {"cpu": cpu, "cuda": cuda}  # by the type of device that they run on
BACKENDS = ("auto", "cpu", "cuda", "torch")


# ---------------------------------------------------------------- choice of the backend
@functools.cache
def _build_kernel(device_type):
    """Build the kernel for "cpu" or "cuda", once per process.

    Returns (True, its description) or (False, the reason why it cannot run).
    """
    try:
        return True, KERNELS[device_type].description()
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: CXX has an open quote
        return False, str(error)


def choose_backend(device: torch.device | str, wanted: str = "auto") -> tuple[str, str]:
    """Choose what computes the operator on a device.

    device: torch device or its name
    wanted: one of BACKENDS; "auto" is the kernel, or the reference where no kernel runs
    Returns (name, reason): "cpu", "cuda" or "torch", and a text for the user.
    Raises ValueError if `wanted` cannot run on the device.
    """
    device_type = torch.device(device).type
    if wanted not in BACKENDS:
        raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
    if wanted in KERNELS and wanted != device_type:
        raise ValueError(
            f"the {wanted} kernel of deformable attention does not run on {device_type} tensors; "
            'use "auto" or "torch"'
        )
    if wanted == "torch":
        return "torch", "pure-PyTorch reference (as requested)"
    if device_type not in KERNELS:
        return "torch", f"pure-PyTorch reference (there is no kernel for {device_type})"
    runs, description = _build_kernel(device_type)
    if runs:
        return device_type, description
    if wanted == device_type:
        raise ValueError(f"the {wanted} kernel of deformable attention cannot run: {description}")
    return "torch", f"slower pure-PyTorch reference (no {device_type} kernel: {description})"


def set_attention_backend(
    model: nn.Module, device: torch.device | str, wanted: str = "auto"
) -> str:
    """Choose the backend of all deformable attention in a model; see `choose_backend`.

    Returns "name: reason", or "" for a model without deformable attention.
    Raises ValueError if `wanted` cannot run on the device.
    """
    modules = [module for module in model.modules() if isinstance(module, MSDeformAttn)]
    if not modules:
        return ""
    name, reason = choose_backend(device, wanted)
    for module in modules:
        module.backend = name
    return f"{name}: {reason}"


@torch.compiler.assume_constant_result  # torch.compile calls it instead of tracing into it
def _resolve_backend(device_type, wanted):
    """Return the name of the backend for tensors of this device type.

    A module hands over the name that `set_attention_backend` chose, which is only checked here. For
    "auto" this warns if there is no kernel where there should be one.
    """
    name, reason = choose_backend(device_type, wanted)
    if name == "torch" and wanted == "auto" and device_type in KERNELS:
        warnings.warn(f"deformable attention: {reason}", stacklevel=3)
    return name


# ---------------------------------------------------------------- the operator
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Sum bilinear samples of the value maps, each times its weight, over levels and points.

    value:          (B, S, M, D)        the maps of all levels, flattened: fp64, fp32, fp16, bf16
    spatial_shapes: [(H, W), ...]       Python integers, so that the CPU need not wait for a GPU
    locations:      (B, Q, M, L, P, 2)  x, y in 0..1 of the level, fp32 or fp64; pixel i is at
                                        (i + 0.5) / size; outside of the level the value is 0
    weights:        (B, Q, M, L, P)
    backend:        "auto", "cpu", "cuda" or "torch"
    Returns (B, Q, M * D) in the dtype of `value`. The sums are in fp32, or in fp64 if value is.
    Raises ValueError for shapes and dtypes that do not fit, or a backend that cannot run.

    With the kernels a point at infinity or NaN adds nothing and has no gradient; with "torch" the
    result may be NaN.
    """
    _check_arguments(value, spatial_shapes, locations, weights)
    sum_dtype = torch.promote_types(value.dtype, torch.float32)
    locations = locations.to(sum_dtype)
    weights = weights.to(sum_dtype)
    if _resolve_backend(value.device.type, backend) == "torch":
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
    sizes = []  # an operator of torch takes no list of pairs
    for H, W in spatial_shapes:
        sizes += [H, W]
    return _forward_op(value.contiguous(), sizes, locations.contiguous(), weights.contiguous())


def _check_arguments(value, spatial_shapes, locations, weights):
    """Raise ValueError with the argument's name if a shape, dtype or device does not fit."""
    if isinstance(spatial_shapes, torch.Tensor):
        raise ValueError("spatial_shapes is a tensor; give (height, width) integers instead")
    for H, W in spatial_shapes:
        if H < 1 or W < 1:
            raise ValueError(f"spatial_shapes is {spatial_shapes}; expected sizes of at least 1")
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(
            f"value has shape {tuple(value.shape)}, locations {tuple(locations.shape)}; "
            "expected (B, S, M, D) and (B, Q, M, L, P, 2)"
        )
    B, _, M, D = value.shape
    Q = locations.shape[1]
    P = locations.shape[4]
    L = len(spatial_shapes)
    S = sum(H * W for H, W in spatial_shapes)
    if L == 0 or P == 0:
        raise ValueError(
            "locations must have at least one level and one point, "
            f"got shape {tuple(locations.shape)}"
        )
    for name, tensor, expected in [
        ("value", value, (B, S, M, D)),
        ("locations", locations, (B, Q, M, L, P, 2)),
        ("weights", weights, (B, Q, M, L, P)),
    ]:
        shape = tuple(tensor.shape)
        if shape != expected:
            raise ValueError(f"{name} has shape {shape}; expected {expected} for {spatial_shapes}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point one")
    if locations.dtype in (torch.float16, torch.bfloat16):  # too coarse to find the right pixel
        raise ValueError(f"locations has dtype {locations.dtype}; expected float32")


# The two operators that torch knows, so that torch.compile and autograd need not look inside.
# torch 2.6 does not accept list[int] and tuple[...] in their signatures.
Ints = List[int]  # noqa: UP006
ThreeTensors = Tuple[Tensor, Tensor, Tensor]  # noqa: UP006


@torch.library.custom_op("deformable_attn::forward", mutates_args=(), device_types=tuple(KERNELS))
def _forward_op(value: Tensor, sizes: Ints, locations: Tensor, weights: Tensor) -> Tensor:
    """Return the output (B, Q, M * D); sizes: height, width of every level in one list."""
    return KERNELS[value.device.type].forward(value, sizes, locations, weights)


@torch.library.custom_op("deformable_attn::backward", mutates_args=(), device_types=tuple(KERNELS))
def _backward_op(
    grad_out: Tensor, value: Tensor, sizes: Ints, locations: Tensor, weights: Tensor
) -> ThreeTensors:
    """Return the gradients of value, locations and weights."""
    return KERNELS[value.device.type].backward(grad_out, value, sizes, locations, weights)


@_forward_op.register_fake
def _(value, sizes, locations, weights):
    """Give torch.compile an output of the right shape and dtype."""
    B, _, M, D = value.shape
    Q = locations.shape[1]
    return value.new_empty(B, Q, M * D)


@_backward_op.register_fake
def _(grad_out, value, sizes, locations, weights):
    """Give torch.compile gradients of the right shapes and dtypes."""
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _setup_context(ctx, inputs, output):
    """Keep for the backward pass what it needs."""
    value, sizes, locations, weights = inputs
    ctx.sizes = sizes
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_out):
    """Return the gradient of every input of the operator; the sizes have none."""
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _backward_op(
        grad_out.contiguous(), value, ctx.sizes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------- the module
@functools.lru_cache(maxsize=256)  # so that they are copied to the device once
def _widths_heights(spatial_shapes, device):
    """Return the width and height of every level as a tensor (L, 2)."""
    return torch.tensor([(W, H) for H, W in spatial_shapes], dtype=torch.float32, device=device)


class MSDeformAttn(nn.Module):
    """Multi-head deformable attention; parameter names and initialization are the official ones.

    hidden_dim: C, channels of queries and maps
    n_levels, n_heads, n_points: L, M, P
    """

    backend = "auto"  # of ms_deform_attn; set_attention_backend sets it for each module of a model

    def __init__(self, hidden_dim: int, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(hidden_dim, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Start as a star: each head looks in a direction of its own, at all levels and for all
        queries alike. Its n-th point lies n pixels away, and all its weights are equal."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the sides of a square
        distance = torch.arange(1.0, self.n_points + 1)  # (P,) in pixels
        offsets = direction[:, None, None] * distance[:, None]  # (M, 1, P, 2)
        offsets = offsets.expand(-1, self.n_levels, -1, -1)  # (M, L, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        source: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """Let queries attend to a few points of the maps.

        query:          (B, Q, C)
        reference:      (B, Q, L, 2 or 4)  points or boxes to look around, as in `sample`
        source:         (B, S, C)          the maps of all levels, flattened
        spatial_shapes: [(H, W), ...]
        padding:        (B, S)             True = padding, whose value is 0
        Returns (B, Q, C).
        """
        value = self.value_proj(source).masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.n_heads, -1))  # (B, S, M, D)
        locations, weights = self.sample(query, reference, spatial_shapes)
        attended = ms_deform_attn(value, spatial_shapes, locations, weights, self.backend)
        return self.output_proj(attended)

    def sample(
        self, query: Tensor, reference: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Compute where each query looks, and with which weights.

        query:     (B, Q, C)
        reference: (B, Q, L, 2)  points x, y, or
                   (B, Q, L, 4)  boxes cxcywh, in 0..1 of each level with its padding
        Returns locations (B, Q, M, L, P, 2) in 0..1 and weights (B, Q, M, L, P), whose sum over
        levels and points is 1.
        """
        B, Q, _ = query.shape
        L = self.n_levels
        M = self.n_heads
        P = self.n_points
        offsets = self.sampling_offsets(query).view(B, Q, M, L, P, 2)
        weights = self.attention_weights(query).view(B, Q, M, L * P).softmax(-1)
        weights = weights.view(B, Q, M, L, P)
        center = reference[:, :, None, :, None, :2]  # (B, Q, 1, L, 1, 2)
        if reference.shape[-1] == 2:  # offsets in pixels of the level
            size = _widths_heights(tuple(spatial_shapes), query.device)  # (L, 2)
            offsets = offsets / size[:, None]
        else:  # offsets in half boxes / P: an offset of P reaches the border
            box_size = reference[:, :, None, :, None, 2:]  # (B, Q, 1, L, 1, 2)
            offsets = offsets * (box_size * (0.5 / P))
        return center + offsets, weights


from .in_transformers import use_in_transformers  # noqa: E402, it needs the above
