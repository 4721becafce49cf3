"""The operator under the names and arguments of the official CUDA extension.

Deformable DETR, DINO, Grounding DINO, Mask2Former and their forks import `MSDeformAttnFunction` or
`MSDeformAttn` from a compiled extension. They run with this one if they import these names from
`deformable_attn.compat` instead.
"""

import torch
from torch import Tensor

from . import MSDeformAttn as _MSDeformAttn
from . import ms_deform_attn


def sizes_of(spatial_shapes) -> list[tuple[int, int]]:
    """Return the sizes of the levels as Python integers.

    spatial_shapes: integer tensor (L, 2) of heights and widths, or a list of pairs

    To read a tensor on a GPU the CPU has to wait for it. This is done once per tensor, not once per
    call: all layers of a model are handed the same one.
    """
    if not isinstance(spatial_shapes, Tensor):
        return [(int(H), int(W)) for H, W in spatial_shapes]
    known = getattr(spatial_shapes, "_known_sizes", None)
    if known is None or known[0] != spatial_shapes._version:  # changed in place since
        sizes = [(H, W) for H, W in spatial_shapes.tolist()]
        known = (spatial_shapes._version, sizes)
        spatial_shapes._known_sizes = known
    return known[1]


class MSDeformAttnFunction:
    """The operator as the official autograd function: call `MSDeformAttnFunction.apply`."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """Return the sum of bilinear samples; see `deformable_attn.ms_deform_attn`.

        value:                   (B, S, M, D)
        value_spatial_shapes:    (L, 2)  heights and widths
        value_level_start_index: (L,)    unused; the levels stand one after the other in `value`
        sampling_locations:      (B, Q, M, L, P, 2)  in 16 bits they are computed with in fp32
        attention_weights:       (B, Q, M, L, P)
        im2col_step:             unused; the images of a batch need not be computed in steps
        Returns (B, Q, M * D).
        """
        if sampling_locations.dtype in (torch.float16, torch.bfloat16):
            sampling_locations = sampling_locations.float()
        sizes = sizes_of(value_spatial_shapes)
        return ms_deform_attn(value, sizes, sampling_locations, attention_weights)


class MSDeformAttn(_MSDeformAttn):
    """The official module: the same parameters, arguments and initial weights.

    d_model:  channels of queries and maps
    n_levels, n_heads, n_points: levels, heads, and points per head and level
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4):
        if d_model % n_heads != 0:
            raise ValueError(f"d_model must be divisible by n_heads, got {d_model} and {n_heads}")
        super().__init__(d_model, n_levels, n_heads, n_points)
        self.d_model = d_model
        self.im2col_step = 64

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Let queries attend to a few points of the maps.

        query:                   (B, Q, C)
        reference_points:        (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh, in 0..1
        input_flatten:           (B, S, C)  the maps of all levels, flattened
        input_spatial_shapes:    (L, 2)     heights and widths
        input_level_start_index: (L,)       unused
        input_padding_mask:      (B, S)     True = padding, whose value is 0; or None
        Returns (B, Q, C).
        """
        if input_padding_mask is None:
            input_padding_mask = torch.zeros(
                input_flatten.shape[:2], dtype=torch.bool, device=input_flatten.device
            )
        sizes = sizes_of(input_spatial_shapes)
        return super().forward(query, reference_points, input_flatten, sizes, input_padding_mask)
