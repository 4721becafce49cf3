"""Times and checks deformable attention on this machine: the reference and the kernel.

E is the encoder, D the decoder of Deformable DETR with four levels of stride 8 to 64, for images of
512 x 512 pixels (one) and about 800 x 1066 (two). Times are medians; on a GPU of graphs of calls,
so Python is not timed; on the CPU memory that is freed is kept, as in training. "x ref" is the
reference's time over this one's. "multiply" and "move" are the shares of the time that the machine
needs at least to do the multiplications, at the rate of its matrix product, and to move every
operand once, at that of a copy; forward, backward. "error" is the relative distance from the fp64
reference: output, worst gradient."""

import argparse
import functools
import itertools
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from util import distributed

from . import MSDeformAttn, backend, cuda, ms_deform_attn
from .reference import ms_deform_attn_reference

SMALL = (64, 64), (32, 32), (16, 16), (8, 8)
LARGE = (100, 134), (50, 67), (25, 34), (13, 17)
SHAPES = {"E512": (1, SMALL, None), "D512": (1, SMALL, 300), "E800": (2, LARGE, None)}
HEADS, CHANNELS, POINTS = 8, 32, 4
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16, fp64=torch.float64)


def operands(name, dtype, device):
    """value, spatial_shapes, locations, weights as a trained model has them; see ms_deform_attn."""
    torch.manual_seed(0)
    images, shapes, queries = SHAPES[name]
    grids = (((torch.arange(n) + 0.5) / n for n in shape) for shape in shapes)
    centres = torch.cat([torch.cartesian_prod(*grid).flip(1) for grid in grids])  # of cells (S, 2)
    value = torch.randn(images, len(centres), HEADS, CHANNELS)
    centres = torch.rand(queries, 2) if queries else centres
    star = MSDeformAttn(HEADS * CHANNELS, len(shapes), HEADS, POINTS).sampling_offsets.bias.detach()
    places = images, len(centres), HEADS, len(shapes), POINTS
    offsets = star.view(*places[2:], 2) + 2 * torch.randn(*places, 2)  # in pixels
    locations = centres[:, None, None, None] + offsets / torch.tensor(shapes).flip(1)[:, None]
    weights = torch.randn(places).flatten(3).softmax(-1).view(places)
    real = torch.promote_types(dtype, torch.float32)
    return value.to(device, dtype), shapes, locations.to(device, real), weights.to(device, real)


def seconds(function, device, repeats):
    """Median time of a call."""
    function()
    times, calls = [], 1 if device == "cpu" else 10
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                function()
        function = graph.replay
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def floors(value, locations, weights, device):
    """The least seconds of forward and backward: (to multiply), (to move every operand once)."""
    a = torch.randn(2048, 2048, dtype=locations.dtype, device=device)
    rate = 2048**3 / seconds(lambda: a @ a, device, 5)  # multiplications a second
    needed = 4 * weights.numel() * CHANNELS / rate
    big = torch.ones(2**27 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    copy = torch.empty_like(big)
    rate = 2 * big.nbytes / seconds(lambda: copy.copy_(big), device, 5)
    out = weights[..., 0, 0].numel() * CHANNELS * value.itemsize
    points = locations.nbytes + weights.nbytes
    moved = value.nbytes + out + points, 2 * value.nbytes + out + 2 * points
    return (needed, 2 * needed), (moved[0] / rate, moved[1] / rate)


def measure(which, value, shapes, others, right, args):
    """(forward seconds, backward seconds, (error of the output, of the worst gradient)).
    right: a gradient of the output, then the right output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (value, *others)]
    forward = functools.partial(ms_deform_attn, leaves[0], shapes, *leaves[1:], which)
    out = forward()
    grad = right[0].to(out)
    backward = functools.partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
    found = zip([out, *backward()], right[1:])
    errors = [((x.double().cpu() - y).norm() / y.norm()).item() for x, y in found]
    with torch.no_grad():
        taken = seconds(forward, args.device, args.repeats)
    return taken, seconds(backward, args.device, args.repeats), (errors[0], max(errors[1:]))


def print_rows(name, dtype_name, args):
    """The rows of a shape and dtype: the reference's and the kernel's."""
    value, shapes, *others = operands(name, DTYPES[dtype_name], args.device)
    leaves = [x.double().cpu().requires_grad_() for x in (value, *others)]
    out = ms_deform_attn_reference(leaves[0], shapes, *leaves[1:])
    grad = torch.randn(out.shape).to(value.dtype)
    right = grad, out.detach(), *torch.autograd.grad(out, leaves, grad.double())
    least, base = floors(value, *others, args.device), None
    for which in dict.fromkeys(("torch", backend(args.device)[0])):
        forward, backward, errors = measure(which, value, shapes, others, right, args)
        base = base or (forward, backward)
        cells = f"{forward * 1e3:.3f}", f"{backward * 1e3:.3f}", f"{base[0] / forward:.1f}"
        cells += (f"{sum(base) / (forward + backward):.1f}",)
        cells += tuple(f"{x / forward:.0%}, {y / backward:.0%}" for x, y in least)
        cells += ("{:.0e}, {:.0e}".format(*errors),)
        print(f"| {name} | {dtype_name} | {which:5} |", " | ".join(cells), "|", flush=True)


def compile_only(archs):
    """Compile the CUDA kernel for each architecture and dtype."""
    print("architecture, dtype, seconds; registers and bytes spilled, forward and backward")
    numbers = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    for arch, name in itertools.product(archs, DTYPES):
        start = time.perf_counter()
        _, log = cuda.compile_kernel(arch, DTYPES[name], CHANNELS)
        taken = time.perf_counter() - start
        found = sorted(re.findall(numbers, log, re.S), reverse=True)  # forward, backward
        cells = (f"{registers:>5} {spilled:>5}" for _, spilled, registers in found)
        print(f"{arch:8} {name:5} {taken:6.2f}", *cells)


def check(device):
    """Run the operator's tests, on a GPU under compute-sanitizer too; ends if one fails."""
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_deformable_attn.py"]
    chosen = [*tests, "-k", "cuda and (reference or precision or gradients)"]
    commands = [tests]
    for tool in ("memcheck", "racecheck") if device == "cuda" else ():
        commands.append(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *chosen])
    for command in commands:
        print(" ".join(command), flush=True)
        if not shutil.which(command[0]):
            print(f"{command[0]} is not installed: left out")
        elif subprocess.run(command, cwd=Path(__file__).resolve().parents[1]).returncode:
            sys.exit("error: a test failed; nothing was timed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    device, add = "cuda" if torch.cuda.is_available() else "cpu", parser.add_argument
    add("--compile", nargs="+", metavar="ARCH", help="only compile the kernel, for sm_90, say")
    add("--check", action="store_true", help="run the tests of the operator before")
    add("--device", choices=("cpu", "cuda"), default=device, help="(default here: %(default)s)")
    add("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="(all)")
    add("--repeats", type=int, default=9, help="after one to warm up (default %(default)s)")
    args = parser.parse_args()
    if args.compile:
        return compile_only(args.compile)
    if args.check:
        check(args.device)
    if args.device == "cpu":
        distributed.keep_freed_memory()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"{': '.join(backend(args.device))}; median of {args.repeats}\n")  # fmt: skip
    print("| shape | dtype | backend | forward ms | backward ms | x ref forward | x ref both | "
          "multiply | move | error |\n" + "|---" * 10 + "|")  # fmt: skip
    # a graph may not hold work of the default stream, and backward runs on its forward's
    with torch.cuda.stream(torch.cuda.Stream() if args.device == "cuda" else None):
        for name in args.shapes:
            for dtype_name in ["fp32"] if args.device == "cpu" else DTYPES:
                print_rows(name, dtype_name, args)


if __name__ == "__main__":
    main()
