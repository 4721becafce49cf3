"""The specification of deformable attention (arXiv 2010.04159, equation 3) in pure PyTorch."""

import torch.nn.functional as F


def ms_deform_attn_reference(value, spatial_shapes, locations, weights):
    """Weighted sum of bilinear samples; arguments and result as in `ms_deform_attn`."""
    N, S, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, N*M, Q, P, 2), -1..1
    weights = weights.permute(3, 0, 2, 1, 4).reshape(L, N * M, 1, Q, P)
    flat = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (N*M, D, S)
    maps = flat.split([h * w for h, w in spatial_shapes], dim=2)  # L x (N*M, D, H*W)
    out = grid.new_zeros(N * M, D, Q)
    for level, shape, points, weight in zip(maps, spatial_shapes, grid, weights):
        # align_corners=False puts pixel i at (i + 0.5) / size; zeros outside the map
        sampled = F.grid_sample(level.unflatten(2, tuple(shape)), points, align_corners=False)
        out = out + (sampled * weight).sum(-1)  # (N*M, D, Q)
    return out.view(N, M * D, Q).transpose(1, 2).to(value.dtype)  # (N, Q, M*D)
