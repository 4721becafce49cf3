"""The operator against four nested loops, its gradients against finite differences, the module's geometry."""
import itertools
import math

import pytest
import torch

from deformable_attn import MSDeformAttn, ms_deform_attn


def make(n=2, q=3, m=2, d=4, p=2, shapes=((3, 5), (1, 1), (2, 4)), dtype=torch.float64, spread=1.6):
    """Random arguments; locations reach beyond the maps."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(n, sum(h * w for h, w in shapes), m, d, generator=generator, dtype=dtype)
    locations = (torch.rand(n, q, m, len(shapes), p, 2, generator=generator, dtype=dtype) - 0.5) * spread + 0.5
    weights = torch.rand(n, q, m, len(shapes), p, generator=generator, dtype=dtype)
    return value, shapes, locations, weights


def by_loops(value, shapes, locations, weights):
    """Equation 3 of the paper, pixel by pixel."""
    n, _, m, d = value.shape
    _, q, _, levels, p, _ = locations.shape
    starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
    out = torch.zeros(n, q, m, d, dtype=value.dtype)
    for i, j, head, level, point in itertools.product(range(n), range(q), range(m), range(levels), range(p)):
        h, w = shapes[level]
        x, y = locations[i, j, head, level, point].tolist()
        x, y = x * w - 0.5, y * h - 0.5
        for cx, cy in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= cx < w and 0 <= cy < h:
                share = (1 - abs(x - cx)) * (1 - abs(y - cy)) * weights[i, j, head, level, point]
                out[i, j, head] += share * value[i, starts[level] + cy * w + cx, head]
    return out.flatten(2)


@pytest.mark.parametrize("options", [{}, {"d": 1}, {"shapes": ((4, 4),)}, {"q": 1, "p": 1}, {"spread": 6.0}])
def test_equals_loops(options):
    arguments = make(**options)
    torch.testing.assert_close(ms_deform_attn(*arguments), by_loops(*arguments))


def test_no_queries_no_images():
    assert ms_deform_attn(*make(q=0)).shape == (2, 0, 8)
    assert ms_deform_attn(*make(n=0)).shape == (0, 3, 8)


def test_pixel_centres_are_exact():
    shapes = ((2, 3),)
    value = torch.arange(6.0).view(1, 6, 1, 1)
    centres = torch.tensor([[(x + 0.5) / 3, (y + 0.5) / 2] for y in range(2) for x in range(3)]).view(1, 6, 1, 1, 1, 2)
    torch.testing.assert_close(ms_deform_attn(value, shapes, centres, torch.ones(1, 6, 1, 1, 1)).flatten(), torch.arange(6.0))


def test_gradients():
    value, shapes, locations, weights = (x.requires_grad_() if torch.is_tensor(x) else x for x in make())
    assert torch.autograd.gradcheck(lambda v, l, w: ms_deform_attn(v, shapes, l, w), (value, locations, weights), nondet_tol=0)


def test_module_starts_as_a_star():
    """With the initial weights every head samples 1, 2, … pixels away, in a direction of its own, with equal weights."""
    module = MSDeformAttn(16, n_levels=1, n_heads=4, n_points=2)
    with torch.no_grad():
        module.value_proj.weight.copy_(torch.eye(16))
        module.output_proj.weight.copy_(torch.eye(16))
    source = torch.zeros(1, 9 * 9, 16)
    source[0, 4 * 9 + 6] = 1.0  # a pixel two to the right of the centre
    centre = torch.tensor([4.5 / 9, 4.5 / 9]).view(1, 1, 1, 2)
    out = module(torch.zeros(1, 1, 16), centre, source, [(9, 9)], torch.zeros(1, 81, dtype=torch.bool))
    expected = torch.tensor([0.5] * 4 + [0.0] * 12)  # head 0 looks right; its second of two points hits
    torch.testing.assert_close(out.flatten(), expected, rtol=0, atol=1e-5)


def test_module_boxes_scale_offsets():
    """With boxes as reference the outermost point lies on the border of the box, whatever the size of the map."""
    module = MSDeformAttn(4, n_levels=1, n_heads=1, n_points=2)
    with torch.no_grad():
        module.value_proj.weight.copy_(torch.eye(4))
        module.output_proj.weight.copy_(torch.eye(4))
    columns = torch.arange(8.0).repeat(8)[None, :, None].expand(1, 64, 4)  # every pixel holds its column
    box = torch.tensor([0.5, 0.5, 0.5, 0.5]).view(1, 1, 1, 4)
    out = module(torch.zeros(1, 1, 4), box, columns, [(8, 8)], torch.zeros(1, 64, dtype=torch.bool))
    assert out[0, 0, 0].item() == pytest.approx((8 * 0.625 - 0.5 + 8 * 0.75 - 0.5) / 2, abs=1e-4)


def test_module_ignores_padding():
    torch.manual_seed(0)
    module, shapes = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3), [(4, 4), (2, 2)]
    query, source = torch.randn(1, 5, 8), torch.randn(1, 20, 8)
    reference, padding = torch.rand(1, 5, 2, 2), torch.zeros(1, 20, dtype=torch.bool)
    padding[0, [3, 7, 11, 15, 17, 19]] = True
    changed = source + 100 * padding[..., None]
    torch.testing.assert_close(module(query, reference, source, shapes, padding),
                               module(query, reference, changed, shapes, padding), rtol=0, atol=0)
