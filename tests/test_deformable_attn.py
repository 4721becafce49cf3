"""The operator against plain loops and the reference, on every backend that runs here; builds."""

import contextlib
import ctypes
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deformable_attn
from deformable_attn import MSDeformAttn, cpu, cuda, ms_deform_attn
from deformable_attn.reference import ms_deform_attn_reference
from detr import DeformableEncoderLayer

ROOT = Path(__file__).resolve().parents[1]
HARNESS = Path(__file__).with_name("cuda_on_cpu.cpp")
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
needs_nvrtc = pytest.mark.skipif(not torch.version.cuda, reason="torch is not built for CUDA")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PLACES = [("cpu", "torch"), pytest.param(("cpu", "cpu"), marks=needs_compiler),
          pytest.param(("cuda", "cuda"), marks=needs_gpu)]  # fmt: skip
on_every_backend = pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
on_every_kernel = pytest.mark.parametrize("place", PLACES[1:], ids=lambda place: place[1])
WIDTHS = (1, 3, 30, 32, 64, 71, 256, 1025)  # channels of a head
LEVELS = (((4, 4),), ((1, 1), (7, 2)), ((3, 5), (1, 1), (2, 4)),
          ((16, 9), (8, 5), (4, 3), (2, 2)), ((9, 9), (5, 6), (3, 3), (2, 1), (1, 1)))  # fmt: skip


def make(n=2, q=3, m=2, d=4, p=2, shapes=((3, 5), (1, 1), (2, 4)), dtype=torch.float64,
         spread=1.6, device="cpu"):  # fmt: skip
    """Random arguments; locations reach beyond the maps. q=None: a query for each cell."""
    generator, real = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    cells = sum(h * w for h, w in shapes)
    places = n, cells if q is None else q, m, len(shapes), p
    value = torch.randn(n, cells, m, d, generator=generator, dtype=torch.float64).to(dtype)
    locations = (torch.rand(*places, 2, generator=generator, dtype=real) - 0.5) * spread + 0.5
    weights = torch.rand(*places, generator=generator, dtype=real)
    return value.to(device), shapes, locations.to(device), weights.to(device)


def gradients(function, value, shapes, locations, weights, **options):
    """The output, and gradients of value, locations and weights for a random gradient of it."""
    leaves = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    out = function(leaves[0], shapes, *leaves[1:], **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def double(value, shapes, locations, weights):
    return value.double(), shapes, locations.double(), weights.double()


def assert_near(found, expected, bounds):
    """Relative distance of the output and of each gradient within the two bounds."""
    for tensor, right, bound in zip(found, expected, (bounds[0], *[bounds[1]] * 3)):
        right = right.to(tensor.device, torch.float64)
        assert (tensor.double() - right).norm() <= bound * right.norm()


def by_loops(value, shapes, locations, weights):
    """Equation 3 of the paper, pixel by pixel."""
    n, _, m, d = value.shape
    _, q, _, levels, p, _ = locations.shape
    starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
    out = torch.zeros(n, q, m, d, dtype=value.dtype)
    for i, j, head, level, point in itertools.product(*map(range, (n, q, m, levels, p))):
        h, w = shapes[level]
        x, y = locations[i, j, head, level, point].tolist()
        x, y = x * w - 0.5, y * h - 0.5
        corners = ((math.floor(v), math.floor(v) + 1) for v in (x, y))
        for cx, cy in itertools.product(*corners):
            if 0 <= cx < w and 0 <= cy < h:
                share = (1 - abs(x - cx)) * (1 - abs(y - cy))
                share = share * weights[i, j, head, level, point]
                out[i, j, head] += share * value[i, starts[level] + cy * w + cx, head]
    return out.flatten(2)


@on_every_backend
@pytest.mark.parametrize(
    "options", [{}, {"d": 1}, {"shapes": ((4, 4),)}, {"q": 1, "p": 1}, {"spread": 6.0}, {"q": None}],
    ids=["usual", "one channel", "one level", "one point", "mostly outside", "encoder"])  # fmt: skip
def test_equals_loops(place, options):
    device, backend = place
    arguments = make(**options)
    there = (x.to(device) if torch.is_tensor(x) else x for x in arguments)
    found = ms_deform_attn(*there, backend=backend)
    torch.testing.assert_close(found.cpu(), by_loops(*arguments))


@on_every_kernel
@pytest.mark.parametrize("shapes", LEVELS, ids=len)
@pytest.mark.parametrize("d", WIDTHS)
def test_kernel_equals_reference(place, d, shapes):
    device, backend = place
    p = 45 if d == 30 else 3  # 45: more points than a kernel works on at a time
    arguments = make(n=3, q=13, m=3, d=d, p=p, shapes=shapes, device=device)
    expected = gradients(ms_deform_attn_reference, *arguments)
    assert_near(gradients(ms_deform_attn, *arguments, backend=backend), expected, (1e-12, 1e-12))


BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 3e-2), torch.bfloat16: (3e-2, 8e-2)}


@on_every_backend
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("q", [None, 50], ids=["encoder", "decoder"])
def test_precision(place, dtype, q):
    device, backend = place
    sizes = {"q": q, "m": 8, "d": 32, "p": 4, "shapes": ((12, 9), (6, 5), (3, 3), (2, 2))}
    arguments = make(**sizes, spread=1.2, dtype=dtype, device=device)
    found = gradients(ms_deform_attn, *arguments, backend=backend)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    expected = gradients(ms_deform_attn_reference, *double(*arguments))
    assert_near(found, expected, BOUNDS[dtype])


@on_every_backend
def test_no_queries_no_images(place):
    device, backend = place
    for options, shape in (({"q": 0}, (2, 0, 8)), ({"n": 0}, (0, 3, 8))):
        found = gradients(ms_deform_attn, *make(**options, device=device), backend=backend)
        assert found[0].shape == shape and not found[1].any()


@on_every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_points_nowhere_add_nothing(place, bad):
    device, backend = place
    value, shapes, locations, weights = make(q=None, d=32, device=device)
    locations[:, ::3, :, :, 0, 1] = bad
    without = weights.clone()
    without[:, ::3, :, :, 0] = 0
    found = gradients(ms_deform_attn, value, shapes, locations, weights, backend=backend)
    near = locations.clamp(-9, 9).nan_to_num(9)
    expected = gradients(ms_deform_attn, value, shapes, near, without, backend=backend)
    torch.testing.assert_close(found[:2], expected[:2])
    assert not found[2][:, ::3, :, :, 0].any() and not found[3][:, ::3, :, :, 0].any()


@on_every_backend
def test_strides_do_not_matter(place):
    device, backend = place
    value, shapes, locations, weights = make(n=2, q=3, device=device)
    other = value.transpose(0, 1).contiguous().transpose(0, 1), shapes
    other += locations.mT.contiguous().mT, torch.stack([weights, weights], -1)[..., 0]
    found = gradients(ms_deform_attn, *other, backend=backend)
    usual = gradients(ms_deform_attn, value, shapes, locations, weights, backend=backend)
    torch.testing.assert_close(found, usual)
    moved = torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value)  # not at 16 bytes
    again = ms_deform_attn(moved, shapes, locations, weights, backend=backend)
    torch.testing.assert_close(again, found[0])


@on_every_backend
def test_gradients(place):
    device, backend = place
    value, shapes, *others = make(device=device)
    leaves = [x.requires_grad_() for x in (value, *others)]
    function = lambda v, l, w: ms_deform_attn(v, shapes, l, w, backend=backend)  # noqa: E731
    tolerance = 0 if device == "cpu" else 1e-12
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=tolerance)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    arguments = make(n=2, q=None, m=3, d=32, shapes=((9, 7), (5, 4)), dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(gradients(ms_deform_attn, *arguments, backend="cpu"))
    torch.set_num_threads(before)
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


@needs_compiler
def test_more_than_32_bits_of_elements():
    """Memory that is only read as zeros costs nothing, so this needs little."""
    h, w, m, d = 17, 2048, 2048, 32
    value = torch.zeros(1, h * w, m, d)  # 2.3 billion
    value[0, -1, -1] = torch.arange(32.0)
    corner = torch.tensor([(w - 0.5) / w, (h - 0.5) / h]).expand(1, 1, m, 1, 1, 2)
    found = ms_deform_attn(value, [(h, w)], corner, torch.ones(1, 1, m, 1, 1), "cpu").view(m, d)
    torch.testing.assert_close(found[-1], torch.arange(32.0), rtol=0, atol=0.1)  # corner in fp32
    assert value.numel() > 2**31 and not found[:-1].any()


# ---------------------------------------------------------------- as an operator of torch


@on_every_kernel
def test_opcheck(place):
    value, shapes, locations, weights = make(device=place[0])
    for leaf in (value, locations, weights):
        leaf.requires_grad_()
    flat = [size for shape in shapes for size in shape]
    torch.library.opcheck(deformable_attn._forward, (value, flat, locations, weights))
    detached = [x.detach() for x in (value, locations, weights)]
    grad = torch.randn(2, 3, 8, dtype=torch.float64, device=place[0])
    utils, arguments = ("test_schema", "test_faketensor"), (grad, detached[0], flat, *detached[1:])
    torch.library.opcheck(deformable_attn._backward, arguments, test_utils=utils)


@on_every_kernel
def test_compiled_encoder_layer(place):
    torch.manual_seed(0)
    layer = DeformableEncoderLayer(32, 4, 64, dropout=0.0, n_levels=2, n_points=3).to(place[0])
    x, position = torch.randn(2, 2, 39, 32, device=place[0])
    reference = torch.rand(2, 39, 2, 2, device=place[0])
    padding = torch.zeros(2, 39, dtype=torch.bool, device=place[0])
    arguments = x.requires_grad_(), position, reference, [(6, 5), (3, 3)], padding
    outs = [f(*arguments) for f in (layer, torch.compile(layer, fullgraph=True))]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@on_every_backend
def test_autocast_keeps_locations(place, monkeypatch):
    """Under autocast the values are bf16, the locations that reach the operator are not."""
    device, backend = place
    seen = []
    spy = lambda *a: seen.append(a) or ms_deform_attn(*a)  # noqa: E731
    monkeypatch.setattr(deformable_attn, "ms_deform_attn", spy)
    monkeypatch.setattr(MSDeformAttn, "backend", backend)
    module = MSDeformAttn(32, n_levels=1, n_heads=2, n_points=2).to(device)
    source, reference = torch.randn(1, 10000, 32), torch.rand(1, 7, 1, 2, device=device)
    source, padding = source.to(device), torch.zeros(1, 10000, dtype=torch.bool, device=device)
    with torch.autocast(device, torch.bfloat16):
        module(source[:, :7], reference, source, [(100, 100)], padding)
    ((value, _, locations, *_),) = seen
    assert (value.dtype, locations.dtype) == (torch.bfloat16, torch.float32)
    offsets = locations - reference[:, :, None, :, None]
    star = offsets[0, :1].expand_as(offsets[0])  # at every query the same
    torch.testing.assert_close(offsets[0], star, rtol=0, atol=1e-6)


BAD = [
    (lambda a: {"value": a["value"][0]}, r"value has shape \(24, 2, 4\).*expected \(N, S, M, D\)"),
    (lambda a: {"value": a["value"][:, 1:]}, r"\(2, 23, 2, 4\); expected \(2, 24, 2, 4\)"),
    (lambda a: {"locations": a["locations"][:, :, :, :2]}, r"locations .* \(2, 3, 2, 3, 2, 2\)"),
    (
        lambda a: {"weights": a["weights"][:, :2]},
        r"weights has shape .*; expected \(2, 3, 2, 3, 2\)",
    ),
    (lambda a: {"locations": a["locations"][:, :, :, :, :0]}, "L and P not 0"),
    (
        lambda a: {"locations": a["locations"].bfloat16()},
        "locations has dtype .*; expected float32",
    ),
    (lambda a: {"value": a["value"].long()}, "value has dtype torch.int64"),
    (lambda a: {"spatial_shapes": torch.ones(3, 2)}, "spatial_shapes is a tensor"),
    (lambda a: {"spatial_shapes": [(0, 5), (1, 1), (2, 4)]}, r"expected \(height, width\) of at"),
    (lambda a: {"weights": a["weights"].to("meta")}, "weights is on meta, value on cpu"),
    (lambda a: {"backend": "fast"}, "backend 'fast' is not one of auto, cpu, cuda, torch"),
    (lambda a: {"backend": "cuda"}, "the cuda kernel does not run on cpu tensors"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_arguments_that_do_not_fit(change, message):
    usual = dict(zip(("value", "spatial_shapes", "locations", "weights"), make()))
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(**{**usual, **change(usual)})


# ---------------------------------------------------------------- builds

CALL = (
    "import torch\nfrom deformable_attn import ms_deform_attn\n"
    "centre, one = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)\n"
    "print(ms_deform_attn(torch.ones(1, 4, 1, 8), [(2, 2)], centre, one, {}).sum().item())"
)


def start(code, **environment):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                            env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def called(**environment):
    """(output, errors) of a new process that asks for the CPU kernel."""
    return start(CALL.format("'cpu'"), **environment).communicate()


def test_without_a_compiler_the_reference_runs(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    for compiler, reason in (("no-such-compiler", "CXX=no-such-compiler is not found"),
                             (str(broken), "c++ failed: fatal error: no headers")):  # fmt: skip
        out, errors = start(CALL.format(""), CXX=compiler).communicate()
        assert out == "8.0\n" and f"no cpu kernel: {reason}" in errors
    out, errors = called(CXX="no-such-compiler")
    assert not out and "cannot run: CXX=no-such-compiler" in errors


@needs_compiler
def test_processes_build_at_once_and_share_the_result(tmp_path):
    mine = {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [start(CALL.format("'cpu'"), **mine) for _ in range(2)]
    assert [process.communicate() for process in processes] == [("8.0\n", "")] * 2
    (built,) = (tmp_path / "deformable_attn").iterdir()
    time = built.stat().st_mtime_ns
    assert called(**mine) == ("8.0\n", "") and built.stat().st_mtime_ns == time  # taken as it was
    built.write_bytes(b"damaged")
    assert called(**mine) == ("8.0\n", "") and built.stat().st_size > 10_000  # made anew


@needs_compiler
def test_a_compiler_with_flags(tmp_path):
    """$CXX may be a command line, as with ccache; another one has a kernel of its own."""
    compiler, folder = cpu.compiler()[0], tmp_path / "deformable_attn"
    for i, command in enumerate((f"{compiler} -DNOTHING", f"env {compiler} -DOTHER"), 1):
        assert called(CXX=command, XDG_CACHE_HOME=str(tmp_path)) == ("8.0\n", "")
        assert len(list(folder.iterdir())) == i


@needs_compiler
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "deformable_attn").write_text("a file in the way")
    assert called(XDG_CACHE_HOME=str(tmp_path)) == ("8.0\n", "")


def supported():
    """The architectures that this NVRTC compiles for, such as "sm_90"."""
    number = ctypes.c_int()
    cuda.call(cuda.nvrtc(), "nvrtcGetNumSupportedArchs", ctypes.byref(number))
    found = (ctypes.c_int * number.value)()
    cuda.call(cuda.nvrtc(), "nvrtcGetSupportedArchs", found)
    return [f"sm_{arch}" for arch in found]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_cuda_kernel_compiles(arch, dtype):
    """For 32 channels without spilling a register; for other numbers at all."""
    if arch not in supported():
        pytest.skip(f"this NVRTC does not know {arch}")
    binary, log = cuda.compile_kernel(arch, dtype, 32)
    assert binary[:4] == b"\x7fELF"
    numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(numbers, log) == [("0", "0", "0")] * 2
    for d in WIDTHS if dtype == torch.float32 else ():
        cuda.compile_kernel(arch, dtype, d)


@needs_nvrtc
def test_cuda_errors_are_one_line(monkeypatch):
    with pytest.raises(RuntimeError, match="cuda.cu does not compile for sm_1:"):
        cuda.compile_kernel("sm_1", torch.float32, 32)
    with pytest.raises(RuntimeError, match=r"^nvrtcGetCUBIN failed: .*INVALID_PROGRAM \(\d+\)$"):
        cuda.call(cuda.nvrtc(), "nvrtcGetCUBIN", None, None)
    library = lambda *names: (_ for _ in ()).throw(OSError)  # noqa: E731
    monkeypatch.setattr(ctypes, "CDLL", library)
    for function, message in ((cuda.nvrtc, "^CUDA's compiler NVRTC .* pip install nvidia-cuda-nvrtc"),
                              (cuda.driver, "^NVIDIA's driver .* is not found")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            function.__wrapped__()


def bench(*flags):
    """Lines that `python -m deformable_attn.bench` prints."""
    command = [sys.executable, "-m", "deformable_attn.bench", *flags]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
    return done.stdout.splitlines()


@needs_compiler
def test_bench_prints_a_table():
    head, rule, *rows = bench("--device", "cpu", "--shapes", "D512", "--repeats", "1")[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert [row[:3] for row in cells[1:]] == [["D512", "fp32", "torch"], ["D512", "fp32", "cpu"]]
    assert {len(row) for row in cells} == {rule.count("|---")}
    assert all(float(error) < 1e-5 for row in cells[1:] for error in row[-1].split(","))


@needs_nvrtc
def test_bench_compiles_without_a_gpu():
    rows = bench("--compile", "sm_80", "sm_90")
    kinds = itertools.product(("sm_80", "sm_90"), ("fp32", "bf16", "fp16", "fp64"))
    assert [tuple(row.split()[:2]) for row in rows] == list(kinds)
    assert all(row.count("registers, 0 spilled") == 2 for row in rows)


@pytest.fixture
def cuda_on_cpu(tmp_path, monkeypatch):
    """cuda.py and cuda.cu on CPU tensors: compiled as C++, its threads run one by one."""

    def functions(_, dtype, channels):
        built = tmp_path / f"{dtype}-{channels}.so"
        if not built.exists():
            flags = [f"-D{name}={number}" for name, number in cuda.macros(dtype, channels).items()]
            flags += "-std=c++17 -O1 -w -shared -fPIC".split()
            files = [f'-DKERNEL="{cuda.SOURCE}"', str(HARNESS), "-o", str(built)]
            subprocess.run([*cpu.compiler(), *flags, *files], check=True)
        library = ctypes.CDLL(str(built))
        return [(library, which) for which in (0, 1)]

    def launch(function, blocks, _1, _2, threads, _3, _4, _5, stream, arguments, _6):
        library, which = function
        library.launch(which, blocks, threads, arguments)

    monkeypatch.setattr(cuda, "functions", functions)
    monkeypatch.setattr(cuda, "driver", lambda: SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(deformable_attn.KERNELS, "cpu", cuda)


@needs_compiler
@needs_nvrtc
@pytest.mark.skipif(sys.platform != "linux", reason="cuda_on_cpu.cpp is for Linux")
@pytest.mark.parametrize("d, dtype, bound", [
    *((d, torch.float64, 1e-12) for d in (1, 32, 71, 1025)),
    (32, torch.float32, 1e-5), (32, torch.bfloat16, 3e-2), (8, torch.bfloat16, 3e-2),
], ids=str)  # fmt: skip
def test_cuda_kernel_thread_by_thread(cuda_on_cpu, d, dtype, bound):
    """What the CUDA kernel computes, without a GPU: every index and formula, not its races."""
    for q in (None, 5):
        shapes = ((9, 10), (1, 1), (2, 3))
        arguments = make(n=1, q=q, m=3, d=d, p=7, shapes=shapes, dtype=dtype)
        found = gradients(ms_deform_attn, *arguments, backend="cpu")
        assert_near(found, gradients(ms_deform_attn_reference, *double(*arguments)), (bound, bound))


# ---------------------------------------------------------------- the module


def test_module_starts_as_a_star():
    """At first every head samples 1, 2, … pixels away in its own direction, weights equal."""
    module = MSDeformAttn(16, n_levels=1, n_heads=4, n_points=2)
    centre = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)
    locations, weights = module.sample(torch.randn(1, 1, 16), centre, [(10, 20)])
    pixels = (locations - centre[:, :, None, :, None])[0, 0, :, 0] * torch.tensor([20.0, 10.0])
    right, down, left, up = (
        [[1, 0], [2, 0]],
        [[0, 1], [0, 2]],
        [[-1, 0], [-2, 0]],
        [[0, -1], [0, -2]],
    )
    torch.testing.assert_close(pixels, torch.tensor([right, down, left, up]).float())
    torch.testing.assert_close(weights, torch.full((1, 1, 4, 1, 2), 0.5))


def test_module_boxes_scale_offsets():
    """With boxes as reference the outermost point lies on the border of the box."""
    module = MSDeformAttn(4, n_levels=1, n_heads=1, n_points=2)
    box = torch.tensor([0.5, 0.5, 0.4, 0.2]).view(1, 1, 1, 4)
    locations, _ = module.sample(torch.randn(1, 1, 4), box, [(8, 8)])
    torch.testing.assert_close(locations.view(2, 2), torch.tensor([[0.6, 0.5], [0.7, 0.5]]))


def test_module_ignores_padding():
    torch.manual_seed(0)
    module, shapes = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3), [(4, 4), (2, 2)]
    query, source = torch.randn(1, 5, 8), torch.randn(1, 20, 8)
    reference, padding = torch.rand(1, 5, 2, 2), torch.zeros(1, 20, dtype=torch.bool)
    padding[0, [3, 7, 11, 15, 17, 19]] = True
    changed = source + 100 * padding[..., None]
    outs = [module(query, reference, x, shapes, padding) for x in (source, changed)]
    assert torch.equal(*outs)
    source[0, 0] += 1
    assert not torch.equal(module(query, reference, source, shapes, padding), outs[0])
