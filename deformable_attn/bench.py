"""Times and checks deformable attention on this machine: every backend, and others' on a GPU.

    python -m deformable_attn.bench                        a table
    python -m deformable_attn.bench --check                the operator's tests first, on a GPU
                                                           under compute-sanitizer too
    python -m deformable_attn.bench --compile sm_80 sm_90  only compile the CUDA kernel: registers,
                                                           spills, seconds; needs no GPU

Shapes: E, the encoder, and D, the decoder, of Deformable DETR with four levels of stride 8 to 64,
for images of 512 x 512 pixels (one) and about 800 x 1066 (two); 8 heads of 32 channels, 4 points.
Queries look where those of a trained model do: around themselves. Times are medians; on a GPU of
graphs of calls, so that Python is not timed. "x ref" is the reference's time over this one's.
"floor" is the share of the time that the machine needs at least: on the CPU for the
multiplications (at the rate of its matrix product), on a GPU for moving every operand once.
"error" is the relative distance from the fp64 reference: output, worst gradient.
"""

import argparse
import functools
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import BACKENDS, backend, cuda, ms_deform_attn
from .reference import ms_deform_attn_reference

LEVELS = {
    512: ((64, 64), (32, 32), (16, 16), (8, 8)),
    800: ((100, 134), (50, 67), (25, 34), (13, 17)),
}
SHAPES = {"E512": (1, 512, None), "D512": (1, 512, 300), "E800": (2, 800, None)}  # images, queries
HEADS, CHANNELS, POINTS = 8, 32, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES.update(fp16=torch.float16, fp64=torch.float64)


def operands(name, dtype, device):
    """value, spatial_shapes, locations, weights as a trained model has them; see ms_deform_attn."""
    N, size, Q = SHAPES[name]
    shapes, generator = LEVELS[size], torch.Generator().manual_seed(0)
    real, L = torch.promote_types(dtype, torch.float32), len(shapes)
    if Q is None:  # the centres of the cells
        grids = (((torch.arange(n) + 0.5) / n for n in shape) for shape in shapes)
        centres = torch.cat([torch.cartesian_prod(*grid).flip(1) for grid in grids])
    else:
        centres = torch.rand(Q, 2, generator=generator)
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    star = torch.stack([angles.cos(), angles.sin()], -1)[:, None, None]
    star = star * torch.arange(1.0, POINTS + 1)[:, None]  # (M, 1, P, 2)
    places = N, len(centres), HEADS
    offsets = star + 2 * torch.randn(*places, L, POINTS, 2, generator=generator)  # in pixels
    offsets = offsets / torch.tensor([(w, h) for h, w in shapes])[:, None]
    locations = centres[:, None, None, None] + offsets
    weights = torch.randn(*places, L * POINTS, generator=generator).softmax(-1)
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(N, cells, HEADS, CHANNELS, generator=generator).to(device, dtype)
    weights = weights.unflatten(-1, (L, POINTS)).to(device, real)
    return value, shapes, locations.to(device, real), weights


def candidates(device, shapes):
    """What runs here, the reference first: {name: function of value, locations, weights}."""

    def ours(which, value, locations, weights):
        return ms_deform_attn(value, shapes, locations, weights, which)

    names = ("torch", backend(device)[0])
    found = {which: functools.partial(ours, which) for which in names}
    try:
        from deformops.registry import msda
    except ImportError:
        return found
    if device == "cuda":
        sizes = torch.tensor(shapes, device=device)
        starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
        found["deformops"] = lambda value, locations, weights: msda(
            value, sizes, starts, locations, weights.flatten(3).to(value.dtype)
        )
    return found


def seconds(function, device, repeats):
    """Median time of a call."""
    function()
    times, calls = [], 1 if device == "cpu" else 10
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
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


def floor(name, dtype, device):
    """The least seconds of forward and backward."""
    N, size, Q = SHAPES[name]
    cells = sum(h * w for h, w in LEVELS[size])
    queries = N * (Q or cells) * HEADS
    points = queries * len(LEVELS[size]) * POINTS
    if device == "cpu":
        a = torch.randn(2048, 2048, dtype=torch.promote_types(dtype, torch.float32))
        rate = 2048**3 / seconds(lambda: a @ a, device, 5)  # multiplications a second
        return points * 4 * CHANNELS / rate, 2 * points * 4 * CHANNELS / rate
    big = torch.empty(2**28, dtype=torch.int32, device=device)
    rate = 2 * big.nbytes / seconds(lambda: big.clone(), device, 5)
    value, out = (n * CHANNELS * dtype.itemsize for n in (N * cells * HEADS, queries))
    moved = 3 * points * max(4, dtype.itemsize)  # locations and weights
    return (value + out + moved) / rate, (2 * value + out + 2 * moved) / rate


def measure(function, operands, right, args):
    """(forward seconds, backward seconds, (error of the output, of the worst gradient))."""
    leaves = [x.detach().requires_grad_() for x in operands]
    out = function(*leaves)
    grad = right[0].to(out)

    def forward():
        with torch.no_grad():
            function(*leaves)

    def backward():
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    found = zip([out, *backward()], right[1:])
    errors = [((x.double().cpu() - y).norm() / y.norm()).item() for x, y in found]
    times = [seconds(x, args.device, args.repeats) for x in (forward, backward)]
    return *times, (errors[0], max(errors[1:]))


def truth(value, shapes, locations, weights):
    """A gradient of the output, then output and gradients of the reference in fp64 on the CPU."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn_reference(leaves[0], shapes, *leaves[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return grad, out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def print_rows(name, dtype_name, args):
    """The rows of a shape and dtype: one for everything that runs here."""
    dtype, base = DTYPES[dtype_name], None
    value, shapes, *others = operands(name, dtype, args.device)
    right, least = truth(value, shapes, *others), floor(name, dtype, args.device)
    for which, function in candidates(args.device, shapes).items():
        start = f"| {name} | {dtype_name} | {which:9} |"
        try:
            forward, backward, errors = measure(function, (value, *others), right, args)
        except Exception as error:  # others' code, on any machine
            if which in BACKENDS:
                raise
            print(f"{start} {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        base = base or (forward, backward)
        cells = f"{forward * 1e3:.3f}", f"{backward * 1e3:.3f}", f"{base[0] / forward:.1f}"
        cells += f"{sum(base) / (forward + backward):.1f}", f"{least[0] / forward:.0%}"
        cells += f"{least[1] / backward:.0%}", "{:.0e}, {:.0e}".format(*errors)
        print(start, " | ".join(cells), "|", flush=True)


def compile_only(archs):
    print("architecture, dtype, seconds; registers and bytes spilled, forward and backward")
    for arch in archs:
        for name, dtype in DTYPES.items():
            start = time.perf_counter()
            _, log = cuda.compile_kernel(arch, dtype, CHANNELS)
            taken, found = time.perf_counter() - start, {}
            for function, text in re.findall(r"entry function '(\w+)'(.*?) registers", log, re.S):
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
                registers = re.search(r"Used (\d+)$", text)[1]
                found[function] = f"{registers:>5} {spilled:>5}"
            print(f"{arch:8} {name:5} {taken:6.2f} {found['forward']} {found['backward']}")


def check(device):
    """Run the operator's tests, on a GPU also under compute-sanitizer; ends if one fails."""
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_deformable_attn.py"]
    commands, sanitizer = [tests], shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer:
        chosen = [*tests, "-k", "cuda and (reference or precision or gradients)"]
        commands += [[sanitizer, "--tool", tool, "--error-exitcode", "1", *chosen]
                     for tool in ("memcheck", "racecheck")]  # fmt: skip
    elif device == "cuda":
        print("compute-sanitizer is not installed: no check of memory and races")
    for command in commands:
        print(" ".join(command), flush=True)
        if subprocess.run(command, cwd=Path(__file__).resolve().parents[1]).returncode:
            sys.exit("error: a test failed; nothing was timed")


def main():
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    device, add = "cuda" if torch.cuda.is_available() else "cpu", parser.add_argument
    add("--compile", nargs="+", metavar="ARCH", help="only compile the kernel, for sm_90, say")
    add("--check", action="store_true", help="run the tests of the operator before")
    add("--device", choices=("cpu", "cuda"), default=device, help="(default here: %(default)s)")
    add("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="(all)")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), help="(fp32; on a GPU all)")
    add("--repeats", type=int, default=9, help="after one to warm up (default %(default)s)")
    args = parser.parse_args()
    try:
        if args.compile:
            return compile_only(args.compile)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    if args.check:
        check(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"{': '.join(backend(args.device))}; median of {args.repeats}\n")  # fmt: skip
    print("| shape | dtype | backend | forward ms | backward ms | x ref forward | x ref both | "
          "floor forward | floor backward | error |\n" + "|---" * 10 + "|")  # fmt: skip
    for name in args.shapes:
        for dtype_name in args.dtypes or (["fp32"] if args.device == "cpu" else DTYPES):
            print_rows(name, dtype_name, args)


if __name__ == "__main__":
    main()
