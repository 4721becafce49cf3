"""Compare the CUDA kernel's speed with that of deformops, a package with Triton kernels.

    python -m results.cuda.beside_deformops

Both get the inputs of deformable_attn.bench and are timed in the same way. Needs a GPU and
deformops.
"""

import functools

import torch
from deformops.registry import Backend, msda

from deformable_attn import bench, ms_deform_attn

REPEATS = 15


def print_row(title, attention, leaves, expected):
    """Print a row of the table: times of forward and backward, and the error of the output.

    attention: computes the output from the leaves, which need a gradient
    """
    out = attention()
    grad_out = torch.randn(out.shape).to(out)
    backward = functools.partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)
    with torch.no_grad():
        forward_us = bench.median_seconds(attention, "cuda", REPEATS) * 1e6
    backward_us = bench.median_seconds(backward, "cuda", REPEATS) * 1e6
    error = ((out.double() - expected).norm() / expected.norm()).item()
    print(f"| {title} | {forward_us:.1f} us | {backward_us:.1f} us | {error:.0e} |", flush=True)


def compare(shape_name, dtype_name):
    """Print the rows of a shape and dtype: ours, and two of deformops' backends."""
    dtype = bench.DTYPES[dtype_name]
    value, shapes, locations, weights = bench.make_inputs(shape_name, dtype, "cuda")
    expected = ms_deform_attn(value.double(), shapes, locations.double(), weights.double(), "torch")
    title = f"{shape_name} | {dtype_name}"

    leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
    ours = functools.partial(ms_deform_attn, leaves[0], shapes, leaves[1], leaves[2])
    print_row(f"{title} | ours", ours, leaves, expected)

    sizes = torch.tensor(shapes, device="cuda")
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    leaves = [x.clone().requires_grad_() for x in (value, locations, weights.to(dtype))]
    theirs = functools.partial(msda, leaves[0], sizes, starts, leaves[1], leaves[2])
    print_row(f"{title} | deformops, its choice", theirs, leaves, expected)
    triton = functools.partial(theirs, backend=Backend.TRITON)
    print_row(f"{title} | deformops, Triton", triton, leaves, expected)


if __name__ == "__main__":
    torch.cuda.set_stream(torch.cuda.Stream())
    for shape_name in bench.SHAPES:
        for dtype_name in ("fp32", "bf16", "fp16"):
            compare(shape_name, dtype_name)
