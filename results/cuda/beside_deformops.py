"""Times deformops (a package with Triton kernels) beside the CUDA kernel, on the operands and by
the clock of deformable_attn.bench. From the repository's root, with deformops installed:
PYTHONPATH=. python results/cuda/beside_deformops.py"""

import functools

import torch
from deformops.registry import Backend, msda

from deformable_attn import bench, ms_deform_attn


def row(name, dtype, label, call, leaves, right):
    """A line of the table: seconds forward and backward, distance of the output from `right`."""
    out = call()
    grad = torch.randn(out.shape).to(out)
    backward = functools.partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
    with torch.no_grad():
        forward = bench.seconds(call, "cuda", 15)
    error = ((out.double() - right).norm() / right.norm()).item()
    times = f"{forward * 1e6:.1f} us | {bench.seconds(backward, 'cuda', 15) * 1e6:.1f} us"
    print(f"| {name} | {dtype} | {label} | {times} | {error:.0e} |", flush=True)


torch.cuda.set_stream(torch.cuda.Stream())
for name in bench.SHAPES:
    for dtype in ("fp32", "bf16", "fp16"):
        value, shapes, locations, weights = bench.operands(name, bench.DTYPES[dtype], "cuda")
        right = ms_deform_attn(
            value.double(), shapes, locations.double(), weights.double(), "torch"
        )
        sizes = torch.tensor(shapes, device="cuda")
        starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
        leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
        ours = functools.partial(ms_deform_attn, leaves[0], shapes, *leaves[1:])
        row(name, dtype, "ours", ours, leaves, right)
        leaves = [x.clone().requires_grad_() for x in (value, locations, weights.to(value.dtype))]
        for label, which in (("its choice", {}), ("Triton", {"backend": Backend.TRITON})):
            call = functools.partial(msda, leaves[0], sizes, starts, *leaves[1:], **which)
            row(name, dtype, f"deformops, {label}", call, leaves, right)
