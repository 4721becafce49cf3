"""Multi-scale deformable attention in pure PyTorch: the specification of the kernels.

Deformable DETR (arXiv 2010.04159), equation 3. Every query looks at a few points of the value maps
and returns the weighted sum of what it finds there, for every head on its own:

    out[b, q, m] = sum over levels l and points p of
                   weights[b, q, m, l, p] * map[b, l, m](locations[b, q, m, l, p])

where map(location) interpolates the four pixels around the location bilinearly.

Letters: B batch size, Q queries, M heads, D channels per head, L levels (feature maps), P points
per level, H x W size of a level, S = sum of H * W over all levels.
"""

import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum bilinear samples of the value maps, each times its weight, over levels and points.

    value:          (B, S, M, D)        the maps of all levels, each flattened row by row
    spatial_shapes: [(H, W), ...]       size of each level
    locations:      (B, Q, M, L, P, 2)  x, y in 0..1 of the level; outside of it the value is 0
    weights:        (B, Q, M, L, P)
    Returns (B, Q, M * D) in the dtype of `value`; the sums are in the dtype of `locations`.
    """
    B, S, M, D = value.shape
    Q = locations.shape[1]
    # Heads do not mix, so they become images of the batch: B*M maps of D channels.
    maps = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
    # With align_corners=False grid_sample counts from -1 to 1 between the outer edges of the map,
    # where we count from 0 to 1. The center of pixel i is at (i + 0.5) / size.
    grid = 2 * locations - 1

    out = maps.new_zeros(B * M, D, Q)
    start = 0  # where the level begins in `maps`
    for level, (H, W) in enumerate(spatial_shapes):
        level_map = maps[:, :, start : start + H * W].unflatten(2, (H, W))  # (B*M, D, H, W)
        level_grid = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        level_weights = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P)
        samples = F.grid_sample(
            level_map, level_grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (B*M, D, Q, P)
        out = out + (samples * level_weights[:, None]).sum(-1)  # (B*M, D, Q)
        start += H * W

    return out.view(B, M * D, Q).transpose(1, 2).to(value.dtype)  # (B, Q, M*D)
