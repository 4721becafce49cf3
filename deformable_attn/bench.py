"""Times and checks deformable attention on this machine: every backend, and on a GPU others' implementations too.

    python -m deformable_attn.bench                              a table
    python -m deformable_attn.bench --check                      the operator's tests first, on a GPU under compute-sanitizer too
    python -m deformable_attn.bench --compile sm_80 sm_90        only compile the CUDA kernel: registers, spills, seconds; needs no GPU

Shapes: E, the encoder, and D, the decoder, of Deformable DETR with four levels of stride 8 to 64, for images of 512 x 512 pixels
(one) and about 800 x 1066 (two); 8 heads of 32 channels, 4 points. Queries look where those of a trained model do: around
themselves. Times are medians; on a GPU of graphs of calls, so that Python is not timed. "x ref" is the reference's time over this
one's. "floor" is the share of the time that the machine needs at least: on the CPU for the multiplications (at the rate of its
matrix product), on a GPU for moving every operand once (at the rate of its copies). "memory" is the peak of forward and backward
beyond the operands (–: not told, or what the process had was enough). "error" is the relative distance from the fp64 reference:
output, worst gradient.
"""
import argparse
import ctypes
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

LEVELS = {512: ((64, 64), (32, 32), (16, 16), (8, 8)), 800: ((100, 134), (50, 67), (25, 34), (13, 17))}
SHAPES = {"E512": (1, 512, None), "D512": (1, 512, 300), "E800": (2, 800, None)}  # images, levels, queries
HEADS, CHANNELS, POINTS = 8, 32, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# A thread for each output channel, one atomic addition for each pixel and channel: how the operator is usually written.
BASELINE = r"""
struct At { int row[4]; float share[4], x[4], y[4]; };

__device__ At at(const float* xy, int h, int w, int start) {
  const float px = xy[0] * w - 0.5f, py = xy[1] * h - 0.5f;
  const int x0 = int(floorf(px)), y0 = int(floorf(py));
  At a;
  for (int k = 0; k < 4; ++k) {
    const int x = x0 + k % 2, y = y0 + k / 2;
    const float sx = k % 2 ? px - x0 : x0 + 1 - px, sy = k / 2 ? py - y0 : y0 + 1 - py;
    const bool inside = x >= 0 && x < w && y >= 0 && y < h;
    a.row[k] = inside ? start + y * w + x : -1, a.share[k] = sx * sy;
    a.x[k] = (k % 2 ? sy : -sy) * w, a.y[k] = (k / 2 ? sx : -sx) * h;
  }
  return a;
}

extern "C" __global__ void forward(int S, int M, int Q, int L, int P, const int* shapes, const float* value, const float* xy,
                                   const float* weight, float* out) {
  const long long query = blockIdx.x, n = query / Q;  // a block for each query, a thread for each channel of all heads
  const int m = threadIdx.x / 32;
  float sum = 0;
  for (int l = 0, start = 0; l < L; start += shapes[2 * l] * shapes[2 * l + 1], ++l) {
    for (int p = 0; p < P; ++p) {
      const long long point = ((query * M + m) * L + l) * P + p;
      const At a = at(xy + 2 * point, shapes[2 * l], shapes[2 * l + 1], start);
      for (int k = 0; k < 4; ++k) {
        if (a.row[k] >= 0) sum += weight[point] * a.share[k] * value[(n * S + a.row[k]) * M * 32 + threadIdx.x];
      }
    }
  }
  out[query * M * 32 + threadIdx.x] = sum;
}

extern "C" __global__ void backward(int S, int M, int Q, int L, int P, const int* shapes, const float* grad, const float* value,
                                    const float* xy, const float* weight, float* grad_value, float* grad_xy, float* grad_weight) {
  const long long query = blockIdx.x, n = query / Q;
  const int m = threadIdx.x / 32;
  const float g = grad[query * M * 32 + threadIdx.x];
  for (int l = 0, start = 0; l < L; start += shapes[2 * l] * shapes[2 * l + 1], ++l) {
    for (int p = 0; p < P; ++p) {
      const long long point = ((query * M + m) * L + l) * P + p;
      const At a = at(xy + 2 * point, shapes[2 * l], shapes[2 * l + 1], start);
      float dw = 0, dx = 0, dy = 0;
      for (int k = 0; k < 4; ++k) {
        if (a.row[k] < 0) continue;
        const long long place = (n * S + a.row[k]) * M * 32 + threadIdx.x;
        const float v = g * value[place];
        dw += a.share[k] * v, dx += a.x[k] * v, dy += a.y[k] * v;
        atomicAdd(grad_value + place, g * weight[point] * a.share[k]);
      }
      for (int step = 16; step; step /= 2) {
        dw += __shfl_xor_sync(~0u, dw, step), dx += __shfl_xor_sync(~0u, dx, step), dy += __shfl_xor_sync(~0u, dy, step);
      }
      if (threadIdx.x % 32 == 0) {
        grad_weight[point] = dw, grad_xy[2 * point] = weight[point] * dx, grad_xy[2 * point + 1] = weight[point] * dy;
      }
    }
  }
}
"""


def operands(name, dtype, device):
    """value, spatial_shapes, locations, weights as a trained encoder or decoder has them; see ms_deform_attn."""
    N, size, Q = SHAPES[name]
    shapes, generator = LEVELS[size], torch.Generator().manual_seed(0)
    real = torch.promote_types(dtype, torch.float32)
    if Q is None:  # the centres of the cells
        centres = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in shapes])
    else:
        centres = torch.rand(Q, 2, generator=generator)
    cells, L = sum(h * w for h, w in shapes), len(shapes)
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    star = torch.stack([angles.cos(), angles.sin()], -1)[:, None, None] * torch.arange(1.0, POINTS + 1)[:, None]  # (M, 1, P, 2)
    offsets = star + 2 * torch.randn(N, len(centres), HEADS, L, POINTS, 2, generator=generator)  # in pixels
    locations = centres[:, None, None, None] + offsets / torch.tensor([(w, h) for h, w in shapes])[:, None]
    weights = torch.randn(N, len(centres), HEADS, L * POINTS, generator=generator).softmax(-1).unflatten(-1, (L, POINTS))
    value = torch.randn(N, cells, HEADS, CHANNELS, generator=generator)
    return value.to(device, dtype), shapes, locations.to(device, real), weights.to(device, real)


class Baseline(torch.autograd.Function):
    """The plain CUDA kernel above, fp32 only."""

    @staticmethod
    @functools.cache
    def functions():
        device = torch.cuda.current_device()
        return cuda.load(device, cuda.compile_source(BASELINE, cuda.architecture(device))[0])

    @staticmethod
    def launch(which, value, shapes, locations, *tensors):
        (_, S, M, _), (N, Q, _, L, P, _) = value.shape, locations.shape
        cuda.start(Baseline.functions()[which], N * Q, M * CHANNELS, *map(ctypes.c_int, (S, M, Q, L, P)), shapes, *tensors)

    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        ctx.save_for_backward(value, shapes, locations, weights)
        out = value.new_empty(*locations.shape[:2], HEADS * CHANNELS)
        Baseline.launch(0, value, shapes, locations, value, locations, weights, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        value, shapes, locations, weights = ctx.saved_tensors
        grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
        Baseline.launch(1, value, shapes, locations, grad.contiguous(), value, locations, weights, *grads)
        return grads[0], None, *grads[1:]


def candidates(device, dtype, shapes):
    """What runs here, the reference first: {name: function of value, locations, weights}."""
    found = {which: lambda value, locations, weights, which=which: ms_deform_attn(value, shapes, locations, weights, which)
             for which in ("torch", backend(device)[0])}
    if device != "cuda":
        return found
    sizes = torch.tensor(shapes, device=device)
    if dtype == torch.float32:
        flat = sizes.int()
        found["baseline"] = lambda value, locations, weights: Baseline.apply(value, flat, locations, weights)
    try:
        from deformops.registry import msda
    except ImportError:
        return found
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    found["deformops"] = lambda value, locations, weights: msda(value, sizes, starts, locations, weights.flatten(3).to(value.dtype))
    return found


def seconds(function, device, repeats):
    """Median time of a call."""
    function()
    times = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    calls, graph = 10, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def peak_memory(function, device):
    """Bytes that a call needs at most, beyond what is there before; None where it cannot be told."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:  # Linux keeps the peak of a process and lets it start anew
        Path("/proc/self/clear_refs").write_text("5")
        peak = [int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])]
        function()
        peak.append(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
    except (OSError, TypeError):
        return None
    return (peak[1] - peak[0]) * 1024


def floor(name, dtype, device):
    """The least seconds of forward and backward."""
    N, size, Q = SHAPES[name]
    L, cells = len(LEVELS[size]), sum(h * w for h, w in LEVELS[size])
    points = N * (Q or cells) * HEADS * L * POINTS
    if device == "cpu":
        a = torch.randn(2048, 2048, dtype=torch.promote_types(dtype, torch.float32))
        rate = 2048**3 / seconds(lambda: a @ a, device, 5)  # multiplications a second
        return points * 4 * CHANNELS / rate, 2 * points * 4 * CHANNELS / rate
    big = torch.empty(2**28, dtype=torch.int32, device=device)
    rate = 2 * big.nbytes / seconds(lambda: big.clone(), device, 5)
    real = max(4, dtype.itemsize)
    value, out = N * cells * HEADS * CHANNELS * dtype.itemsize, N * (Q or cells) * HEADS * CHANNELS * dtype.itemsize
    return (value + out + 3 * points * real) / rate, (2 * value + out + 6 * points * real) / rate


def measure(function, value, locations, weights, right, args):
    """(forward seconds, backward seconds, peak bytes, error of the output, of the worst gradient)."""
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    out = function(*leaves)
    grad = right[0].to(out)

    def both():
        return torch.autograd.grad(function(*leaves), leaves, grad)

    def forward():
        with torch.no_grad():
            function(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, grad, retain_graph=True)]
    errors = [((x.double().cpu() - y).norm() / y.norm()).item() for x, y in zip(found, right[1:])]
    times = seconds(forward, args.device, args.repeats), seconds(
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), args.device, args.repeats)
    return *times, peak_memory(both, args.device), errors[0], max(errors[1:])


def truth(value, shapes, locations, weights):
    """A gradient of the output, then output and gradients of the reference in fp64 on the CPU."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn_reference(leaves[0], shapes, *leaves[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return grad, out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def compile_only(archs):
    print(f"{'':8} {'':5} {'seconds':>8} {'forward: registers':>19} {'spills':>7} {'backward: registers':>20} {'spills':>7}")
    for arch in archs:
        for name, dtype in DTYPES.items():
            start = time.perf_counter()
            _, log = cuda.compile_kernel(arch, dtype, CHANNELS)
            taken = time.perf_counter() - start
            found = {}  # by function: bytes spilled, registers
            for function, text in re.findall(r"entry function '(\w+)'(.*?) registers", log, re.S):
                found[function] = re.search(r"Used (\d+)$", text)[1], sum(map(int, re.findall(r"(\d+) bytes spill", text)))
            print(f"{arch:8} {name:5} {taken:8.2f} {found['forward'][0]:>19} {found['forward'][1]:>7} "
                  f"{found['backward'][0]:>20} {found['backward'][1]:>7}")


def check(device):
    """Run the tests of the operator, on a GPU also under compute-sanitizer where that is installed; ends the program if one fails."""
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_deformable_attn.py", "-p", "no:cacheprovider"]
    commands, sanitizer = [tests], shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer:
        commands += [[sanitizer, "--tool", tool, "--error-exitcode", "1", *tests, "-k", "cuda and (reference or precision or gradients)"]
                     for tool in ("memcheck", "racecheck")]
    elif device == "cuda":
        print("compute-sanitizer is not installed: no check of memory and races")
    for command in commands:
        print(" ".join(command), flush=True)
        if subprocess.run(command, cwd=Path(__file__).resolve().parents[1]).returncode:
            sys.exit("error: a test failed; nothing was timed")


def positive(text):
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="+", metavar="ARCH", help="only compile the CUDA kernel for these, such as sm_90")
    parser.add_argument("--check", action="store_true", help="run the tests of the operator before")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default here: %(default)s)")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="(default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="(default: fp32; on a GPU all)")
    parser.add_argument("--repeats", type=positive, default=9, metavar="N", help="after one to warm up (default %(default)s)")
    args = parser.parse_args()
    if args.compile:
        try:
            return compile_only(args.compile)
        except RuntimeError as error:
            sys.exit(f"error: {error}")
    if args.check:
        check(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}; {': '.join(backend(args.device))}; median of {args.repeats}\n")
    print(f"| shape | dtype | {'backend':10} | forward ms | backward ms | x ref forward | x ref both | floor forward | backward "
          "| memory MB | error |\n" + "|---" * 11 + "|")
    for name in args.shapes:
        for dtype_name in args.dtypes or (["fp32"] if args.device == "cpu" else DTYPES):
            print_rows(name, dtype_name, args)


def print_rows(name, dtype_name, args):
    """The rows of a shape and dtype: one for everything that runs here."""
    dtype = DTYPES[dtype_name]
    value, shapes, locations, weights = operands(name, dtype, args.device)
    right, least = truth(value, shapes, locations, weights), floor(name, dtype, args.device)
    base = None
    for which, function in candidates(args.device, dtype, shapes).items():
        start = f"| {name} | {dtype_name} | {which:10} |"
        try:
            forward, backward, memory, *errors = measure(function, value, locations, weights, right, args)
        except Exception as error:  # others' code, on any machine
            if which in BACKENDS:
                raise
            print(f"{start} {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        base = base or (forward, backward)
        print(f"{start} {forward * 1e3:10.3f} | {backward * 1e3:11.3f} "
              f"| {base[0] / forward:13.1f} | {sum(base) / (forward + backward):10.1f} "
              f"| {least[0] / forward:13.0%} | {least[1] / backward:8.0%} | {f'{memory / 1e6:.0f}' if memory else '–':>9} "
              f"| {errors[0]:.0e}, {errors[1]:.0e} |", flush=True)


if __name__ == "__main__":
    main()
