"""Benchmark deformable attention on this machine: the reference and the kernel.

Shapes: E512 and D512 are the encoder and the decoder of Deformable DETR for one image of 512 x 512
pixels, E800 the encoder for two of about 800 x 1066; four levels of stride 8 to 64.

Times are medians. On a GPU they are of CUDA graphs of ten calls, so that Python is not timed; on a
CPU freed memory is kept, as in training. Columns:
  x ref     the reference's time divided by this one's
  multiply  share of the time that the multiplications alone would take, at the speed of torch's
            matrix product: forward, backward
  move      share of the time that reading and writing every tensor once would take, at the speed of
            a copy: forward, backward
  error     relative distance from the reference in fp64: output, worst gradient
"""

import argparse
import functools
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import MSDeformAttn, choose_backend, cpu, cuda, ms_deform_attn
from .reference import ms_deform_attn_reference

SMALL = [(64, 64), (32, 32), (16, 16), (8, 8)]
LARGE = [(100, 134), (50, 67), (25, 34), (13, 17)]
# images, levels, queries; None: every cell is a query, as in the encoder
SHAPES = {"E512": (1, SMALL, None), "D512": (1, SMALL, 300), "E800": (2, LARGE, None)}
HEADS = 8
CHANNELS = 32
POINTS = 4
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
ROOT = Path(__file__).resolve().parents[1]


def make_inputs(shape_name, dtype, device):
    """Draw arguments of ms_deform_attn as a trained model has them, for one of SHAPES.

    Returns (value, spatial_shapes, locations, weights).
    """
    torch.manual_seed(0)
    images, shapes, queries = SHAPES[shape_name]
    centers = []  # of all cells
    for H, W in shapes:
        y = (torch.arange(H) + 0.5) / H
        x = (torch.arange(W) + 0.5) / W
        centers.append(torch.cartesian_prod(y, x).flip(1))  # (H*W, 2) as x, y
    centers = torch.cat(centers)  # (S, 2)
    value = torch.randn(images, len(centers), HEADS, CHANNELS)
    if queries:
        centers = torch.rand(queries, 2)
    Q = len(centers)
    L = len(shapes)

    # Points lie around their query: where they start, plus two pixels of noise.
    star = MSDeformAttn(HEADS * CHANNELS, L, HEADS, POINTS).sampling_offsets.bias.detach()
    noise = torch.randn(images, Q, HEADS, L, POINTS, 2)
    offsets = star.view(HEADS, L, POINTS, 2) + 2 * noise  # in pixels
    widths_heights = torch.tensor(shapes).flip(1)  # (L, 2)
    locations = centers[:, None, None, None] + offsets / widths_heights[:, None]
    weights = torch.randn(images, Q, HEADS, L * POINTS).softmax(-1)
    weights = weights.view(images, Q, HEADS, L, POINTS)

    sum_dtype = torch.promote_types(dtype, torch.float32)
    locations = locations.to(device, sum_dtype)
    weights = weights.to(device, sum_dtype)
    return value.to(device, dtype), shapes, locations, weights


def median_seconds(function, device, repeats):
    """Return the median time of a call, after one call to warm up."""
    function()
    calls = 1
    if device == "cuda":
        calls = 10
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                function()
        function = graph.replay
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def roofline_seconds(value, locations, weights, device):
    """Estimate the least time that this machine needs.

    Returns {"multiply": [forward, backward], "move": [forward, backward]} in seconds.
    """
    a = torch.randn(2048, 2048, dtype=locations.dtype, device=device)
    multiplications_per_second = 2048**3 / median_seconds(lambda: a @ a, device, 5)
    multiply = 4 * weights.numel() * CHANNELS / multiplications_per_second  # four pixels per point

    source = torch.ones(2**27 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), device, 5)
    bytes_per_second = 2 * source.nbytes / copy_seconds  # reads and writes
    out_bytes = weights[..., 0, 0].numel() * CHANNELS * value.itemsize
    point_bytes = locations.nbytes + weights.nbytes
    forward_bytes = value.nbytes + point_bytes + out_bytes
    backward_bytes = 2 * value.nbytes + 2 * point_bytes + out_bytes
    return {
        "multiply": [multiply, 2 * multiply],
        "move": [forward_bytes / bytes_per_second, backward_bytes / bytes_per_second],
    }


def relative_error(tensor, expected):
    """Return the distance from the expected tensor, divided by its norm."""
    return ((tensor.double().cpu() - expected).norm() / expected.norm()).item()


def measure(backend_name, inputs, expected, args):
    """Time one backend and compare it with the reference.

    inputs:   what make_inputs returns
    expected: in fp64 {"out", "grad_out" (random), "grads" of value, locations, weights}
    Returns {"forward", "backward": seconds, "out_error", "grad_error"}.
    """
    value, shapes, locations, weights = inputs
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    forward = functools.partial(
        ms_deform_attn, leaves[0], shapes, leaves[1], leaves[2], backend_name
    )
    out = forward()
    backward = functools.partial(
        torch.autograd.grad, out, leaves, expected["grad_out"].to(out), retain_graph=True
    )
    grad_errors = []
    for grad, expected_grad in zip(backward(), expected["grads"]):
        grad_errors.append(relative_error(grad, expected_grad))
    with torch.no_grad():
        forward_seconds = median_seconds(forward, args.device, args.repeats)
    return {
        "forward": forward_seconds,
        "backward": median_seconds(backward, args.device, args.repeats),
        "out_error": relative_error(out, expected["out"]),
        "grad_error": max(grad_errors),
    }


def compute_expected(inputs):
    """Compute output and gradients with the reference in fp64; see `measure`."""
    value, shapes, locations, weights = inputs
    leaves = [x.double().cpu().requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn_reference(leaves[0], shapes, leaves[1], leaves[2])
    grad_out = torch.randn(out.shape).to(value.dtype)  # rounded as every backend will see it
    grads = torch.autograd.grad(out, leaves, grad_out.double())
    return {"out": out.detach(), "grad_out": grad_out, "grads": grads}


def print_rows(shape_name, dtype_name, args):
    """Print the rows of a shape and dtype: the reference's and the kernel's."""
    inputs = make_inputs(shape_name, DTYPES[dtype_name], args.device)
    value, _, locations, weights = inputs
    expected = compute_expected(inputs)
    least = roofline_seconds(value, locations, weights, args.device)
    backend_names = ["torch"]
    kernel, _ = choose_backend(args.device)
    if kernel != "torch":
        backend_names.append(kernel)
    reference = None  # the times of the first row
    for backend_name in backend_names:
        times = measure(backend_name, inputs, expected, args)
        if reference is None:
            reference = times
        forward = times["forward"]
        backward = times["backward"]
        reference_both = reference["forward"] + reference["backward"]
        cells = [
            shape_name,
            dtype_name,
            f"{backend_name:5}",
            f"{forward * 1e3:.3f}",
            f"{backward * 1e3:.3f}",
            f"{reference['forward'] / forward:.1f}",
            f"{reference_both / (forward + backward):.1f}",
        ]
        for least_forward, least_backward in (least["multiply"], least["move"]):
            cells.append(f"{least_forward / forward:.0%}, {least_backward / backward:.0%}")
        cells.append(f"{times['out_error']:.0e}, {times['grad_error']:.0e}")
        print(f"| {' | '.join(cells)} |", flush=True)


def compile_only(archs):
    """Compile the CUDA kernel for each architecture and dtype; print registers and spills."""
    print("architecture, dtype, seconds; registers and bytes spilled, forward and backward")
    pattern = r"(\d+) bytes spill stores.*?Used (\d+) registers"
    for arch in archs:
        for dtype_name, dtype in DTYPES.items():
            start = time.perf_counter()
            logs = [cuda.compile_kernel(arch, dtype, CHANNELS, name)[1] for name in cuda.FUNCTIONS]
            seconds = time.perf_counter() - start
            row = f"{arch:8} {dtype_name:5} {seconds:6.2f}"
            for log in logs:
                spilled, registers = re.search(pattern, log, re.DOTALL).groups()
                row += f" {registers:>5} {spilled:>5}"
            print(row)


def check(device):
    """Run the operator's tests, on a GPU under compute-sanitizer too; exit if one fails."""
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_deformable_attn.py"]
    gpu_tests = tests + ["-k", "cuda and (reference or precision or gradients)"]
    commands = [tests]
    if device == "cuda":
        for tool in ("memcheck", "racecheck"):
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
            commands.append(sanitizer + gpu_tests)
    for command in commands:
        print(" ".join(command), flush=True)
        if not shutil.which(command[0]):
            print(f"skipping: {command[0]} is not installed")
        elif subprocess.run(command, cwd=ROOT).returncode != 0:
            sys.exit("error: a test failed; nothing was timed")


def parse():
    """Parse the command line."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--compile",
        nargs="+",
        metavar="ARCH",
        help="only compile the CUDA kernel, for sm_90 for example; needs no GPU",
    )
    add("--check", action="store_true", help="run the operator's tests first")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default=default_device,
        help="device to benchmark (default here: %(default)s)",
    )
    add(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        default=list(SHAPES),
        help="shapes to benchmark (default: all)",
    )
    add("--repeats", type=int, default=9, help="timed calls (default: %(default)s)")
    return parser.parse_args()


def main():
    """Compile, or run the tests if asked to, and print the table."""
    args = parse()
    if args.compile:
        compile_only(args.compile)
        return
    if args.check:
        check(args.device)
    if args.device == "cuda":
        device_name = torch.cuda.get_device_name()
        dtype_names = list(DTYPES)
        # a CUDA graph must not contain work of the default stream; the backward pass runs on the
        # stream of its forward pass
        torch.cuda.set_stream(torch.cuda.Stream())
    else:
        device_name = cpu.processor()
        dtype_names = ["fp32"]
        cpu.keep_freed_memory()
    backend_name, reason = choose_backend(args.device)
    print(
        f"{device_name}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{backend_name}: {reason}; median of {args.repeats}\n"
    )
    columns = ["shape", "dtype", "backend", "forward ms", "backward ms"]
    columns += ["x ref forward", "x ref both", "multiply", "move", "error"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for shape_name in args.shapes:
        for dtype_name in dtype_names:
            print_rows(shape_name, dtype_name, args)


if __name__ == "__main__":
    main()
