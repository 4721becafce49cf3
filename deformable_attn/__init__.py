"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): the operator, the choice of its backend, the module.

N images, Q queries, M heads, D channels a head, L levels, P points, S = sum of H*W over the levels.
"""
import functools
import math

import torch
from torch import nn

from .reference import ms_deform_attn_reference

__all__ = ["MSDeformAttn", "backend", "ms_deform_attn"]


def backend(device):
    """Which implementation runs on `device`, and why: (name, reason)."""
    return "torch", f"grid_sample, the pure-PyTorch reference, runs on any device ({torch.device(device).type} here)"


def ms_deform_attn(value, spatial_shapes, locations, weights):
    """Sum over levels and points of weight x bilinear sample of the value maps (Deformable DETR, equation 3).

    value           (N, S, M, D)        the maps of all levels, flattened and concatenated
    spatial_shapes  L x (height, width) Python integers, so that no device synchronisation is needed
    locations       (N, Q, M, L, P, 2)  x, y in 0..1 of the level; pixel = x * width - 0.5; zero outside the map
    weights         (N, Q, M, L, P)
    returns         (N, Q, M*D)
    """
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


@functools.lru_cache(maxsize=256)
def _widths_heights(spatial_shapes, device):
    """(L, 2) tensor of width, height; cached, so that the copy to the device happens once per shape."""
    return torch.tensor([(w, h) for h, w in spatial_shapes], dtype=torch.float32, device=device)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections; parameter names and initialisation as in the official code."""

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
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))
