"""The operator against plain loops and the reference, on every backend that runs here; builds."""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

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
PLACES = [pytest.param("cpu", "torch"), pytest.param("cpu", "cpu", marks=needs_compiler),
          pytest.param("cuda", "cuda", marks=needs_gpu)]  # fmt: skip
on_every_backend = pytest.mark.parametrize("device, backend", PLACES)
on_every_kernel = pytest.mark.parametrize("device, backend", PLACES[1:])
WIDTHS = (1, 3, 30, 32, 64, 71, 256, 1025)  # channels of a head
LEVELS = (((4, 4),), ((1, 1), (7, 2)), ((3, 5), (1, 1), (2, 4)),
          ((16, 9), (8, 5), (4, 3), (2, 2)), ((9, 9), (5, 6), (3, 3), (2, 1), (1, 1)))  # fmt: skip
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 3e-2), torch.bfloat16: (3e-2, 8e-2)}
CASES = [{}, {"d": 1}, {"shapes": ((4, 4),)}, {"q": 1, "p": 1}, {"spread": 6.0}, {"q": None}]


def make(n=2, q=3, m=2, d=4, p=2, spread=1.6, shapes=LEVELS[2], dtype=torch.float64, device="cpu"):
    """Random arguments; locations reach beyond the maps. q=None: a query for each cell."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in shapes)
    q = cells if q is None else q
    real = torch.promote_types(dtype, torch.float32)
    value = torch.randn(n, cells, m, d, generator=generator, dtype=torch.float64).to(dtype)
    places = torch.rand(n, q, m, len(shapes), p, 2, generator=generator, dtype=real)
    locations = (places - 0.5) * spread + 0.5
    weights = torch.rand(n, q, m, len(shapes), p, generator=generator, dtype=real)
    return value.to(device), shapes, locations.to(device), weights.to(device)


def gradients(function, value, shapes, locations, weights, **options):
    """The output, and gradients of value, locations and weights for a random gradient of it."""
    leaves = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    out = function(leaves[0], shapes, *leaves[1:], **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(arguments, backend, bounds):
    """Relative distances of output and gradients from the fp64 reference's within two bounds."""
    found = gradients(ms_deform_attn, *arguments, backend=backend)
    exact = (x.double() if torch.is_tensor(x) else x for x in arguments)
    expected = gradients(ms_deform_attn_reference, *exact)
    for tensor, right, bound in zip(found, expected, (bounds[0], *[bounds[1]] * 3)):
        assert (tensor.double() - right).norm() <= bound * right.norm()
    return found


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
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_loops(device, backend, options):
    arguments = make(**options)
    there = (x.to(device) if torch.is_tensor(x) else x for x in arguments)
    found = ms_deform_attn(*there, backend=backend)
    torch.testing.assert_close(found.cpu(), by_loops(*arguments))


@on_every_kernel
@pytest.mark.parametrize("shapes", LEVELS, ids=len)
@pytest.mark.parametrize("d, p", [*((d, 3) for d in WIDTHS), (40, 45)])
def test_kernel_equals_reference(device, backend, d, p, shapes):
    """45 points a level are more than a kernel works on at a time."""
    arguments = make(n=3, q=13, m=3, d=d, p=p, shapes=shapes, device=device)
    check(arguments, backend, (1e-12, 1e-12))


@on_every_backend
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("q", [None, 50], ids=["encoder", "decoder"])
def test_precision(device, backend, dtype, q):
    sizes = {"q": q, "m": 8, "d": 32, "p": 4, "shapes": ((12, 9), (6, 5), (3, 3), (2, 2))}
    arguments = make(**sizes, spread=1.2, dtype=dtype, device=device)
    found = check(arguments, backend, BOUNDS[dtype])
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32


@on_every_backend
def test_half_precision_finds_its_pixels(device, backend):
    """At column 200 of 256 a bf16 location would be a pixel off; ours are fp32."""
    value = torch.arange(256.0, device=device).view(1, 256, 1, 1).bfloat16()
    location = torch.tensor([(200 + 0.5) / 256, 0.5], device=device).view(1, 1, 1, 1, 1, 2)
    one = torch.ones(1, 1, 1, 1, 1, device=device)
    assert ms_deform_attn(value, [(1, 256)], location, one, backend=backend).item() == 200


@on_every_backend
def test_no_queries_no_images(device, backend):
    for options, shape in (({"q": 0}, (2, 0, 8)), ({"n": 0}, (0, 3, 8))):
        found = gradients(ms_deform_attn, *make(**options, device=device), backend=backend)
        assert found[0].shape == shape and not found[1].any()


@on_every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_points_nowhere_add_nothing(device, backend, bad):
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
def test_strides_do_not_matter(device, backend):
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
def test_gradients(device, backend):
    value, shapes, locations, weights = make(device=device)
    for leaf in (value, locations, weights):
        leaf.requires_grad_()
    arguments, tolerance = (value, shapes, locations, weights, backend), 1e-12 * (device == "cuda")
    assert torch.autograd.gradcheck(ms_deform_attn, arguments, nondet_tol=tolerance)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    arguments = make(n=2, q=None, m=3, d=32, shapes=((9, 7), (5, 4)), dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(gradients(ms_deform_attn, *arguments, backend="cpu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
def test_more_than_32_bits_of_elements():
    """Memory that is only read as zeros costs nothing, so this needs little."""
    h, w, m, d = 17, 2048, 2048, 32
    value = torch.zeros(1, h * w, m, d)  # 2.3 billion
    assert value.numel() > 2**31
    value[0, -1, -1] = torch.arange(32.0)
    corner = torch.tensor([(w - 0.5) / w, (h - 0.5) / h]).expand(1, 1, m, 1, 1, 2)
    found = ms_deform_attn(value, [(h, w)], corner, torch.ones(1, 1, m, 1, 1), "cpu").view(m, d)
    torch.testing.assert_close(found[-1], torch.arange(32.0), rtol=0, atol=0.1)  # corner in fp32
    assert not found[:-1].any()


# ---------------------------------------------------------------- as an operator of torch
@on_every_kernel
def test_opcheck(device, backend):
    value, shapes, locations, weights = make(device=device)
    arguments = value, [size for shape in shapes for size in shape], locations, weights
    grad = torch.randn(2, 3, 8, dtype=torch.float64, device=device)
    utils = "test_schema", "test_faketensor"
    torch.library.opcheck(deformable_attn._backward, (grad, *arguments), test_utils=utils)
    for leaf in (value, locations, weights):
        leaf.requires_grad_()
    torch.library.opcheck(deformable_attn._forward, arguments)


@on_every_kernel
def test_compiled_encoder_layer(device, backend):
    torch.manual_seed(0)
    layer = DeformableEncoderLayer(32, 4, 64, dropout=0.0, n_levels=2, n_points=3).to(device)
    x, position = torch.randn(2, 2, 39, 32, device=device)
    reference = torch.rand(2, 39, 2, 2, device=device)
    padding = torch.zeros(2, 39, dtype=torch.bool, device=device)
    arguments = x.requires_grad_(), position, reference, [(6, 5), (3, 3)], padding
    outs = [run(*arguments) for run in (torch.compile(layer, fullgraph=True), layer)]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@on_every_backend
def test_autocast_keeps_locations(device, backend, monkeypatch):
    """Under autocast the values are bf16, the locations that reach the operator are not."""
    spy = mock.Mock(wraps=ms_deform_attn)
    monkeypatch.setattr(deformable_attn, "ms_deform_attn", spy)
    module = MSDeformAttn(32, n_levels=1, n_heads=2, n_points=2).to(device)
    module.backend = backend
    source = torch.randn(1, 10000, 32, device=device)
    reference = torch.rand(1, 7, 1, 2, device=device)
    padding = torch.zeros(1, 10000, dtype=torch.bool, device=device)
    with torch.autocast(device, torch.bfloat16):
        module(source[:, :7], reference, source, [(100, 100)], padding)
    value, _, locations, *_ = spy.call_args.args
    assert (value.dtype, locations.dtype) == (torch.bfloat16, torch.float32)
    offsets = locations - reference[:, :, None, :, None]
    star = offsets[0, :1].expand_as(offsets[0])  # at every query the same
    torch.testing.assert_close(offsets[0], star, rtol=0, atol=1e-6)


def test_arguments_that_do_not_fit():
    value, shapes, locations, weights = make()
    usual = {"value": value, "spatial_shapes": shapes, "locations": locations, "weights": weights}
    for change, message in [
        ({"value": value[0]}, r"value has shape \(24, 2, 4\).*expected \(N, S, M, D\)"),
        ({"value": value[:, 1:]}, r"value has shape \(2, 23, 2, 4\); expected \(2, 24, 2, 4\)"),
        ({"locations": locations[:, :, :, :2]}, r"locations has .*; expected \(2, 3, 2, 3, 2, 2\)"),
        ({"weights": weights[:, :2]}, r"weights has shape .*; expected \(2, 3, 2, 3, 2\)"),
        ({"locations": locations[:, :, :, :, :0], "weights": weights[..., :0]}, "no point"),
        ({"locations": locations.bfloat16()}, "locations has dtype .*bfloat16; expected float32"),
        ({"value": value.long()}, "value has dtype torch.int64"),
        ({"spatial_shapes": torch.tensor(shapes)}, "spatial_shapes is a tensor"),
        ({"weights": weights.to("meta")}, "weights is on meta, value on cpu"),
        ({"backend": "fast"}, "backend 'fast' is not one of auto, cpu, cuda, torch"),
        ({"backend": "cuda"}, "the cuda kernel .* does not run on cpu tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(**{**usual, **change})


# ---------------------------------------------------------------- builds
CALL = (
    "import torch\nfrom deformable_attn import ms_deform_attn\n"
    "centre, one = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)\n"
    "print(ms_deform_attn(torch.ones(1, 4, 1, 8), [(2, 2)], centre, one, {!r}).sum().item())"
)
FINE = ("8.0\n", "")  # what it prints, and no warning


def start(backend, **environment):
    command = [sys.executable, "-c", CALL.format(backend)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_without_a_compiler_the_reference_runs(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    runs = ("auto", "no-such-compiler"), ("auto", str(broken)), ("cpu", "no-such-compiler")
    started = [start(backend, CXX=compiler) for backend, compiler in runs]
    missing, failing, refused = (process.communicate() for process in started)
    assert missing[0] == failing[0] == "8.0\n" and not refused[0]
    assert "no cpu kernel: CXX=no-such-compiler is not found" in missing[1]
    assert "c++ failed: fatal error: no headers" in failing[1]
    assert "cannot run: CXX=no-such-compiler" in refused[1]


@needs_compiler
def test_processes_build_at_once_and_share_the_result(tmp_path):
    mine = {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [start("cpu", **mine) for _ in range(2)]
    assert [process.communicate() for process in processes] == [FINE] * 2
    (built,) = (tmp_path / "deformable_attn").iterdir()
    time = built.stat().st_mtime_ns
    assert start("cpu", **mine).communicate() == FINE
    assert built.stat().st_mtime_ns == time  # taken as it was
    built.write_bytes(b"damaged")  # made anew
    assert start("cpu", **mine).communicate() == FINE
    assert built.stat().st_size > 10_000


@needs_compiler
def test_compiler_with_flags_and_cache_that_cannot_be_written(tmp_path):
    """$CXX may be a command line, as with ccache."""
    (tmp_path / "deformable_attn").write_text("a file in the way")
    command = f"env {cpu.compiler()[0]} -DNOTHING"
    assert start("cpu", CXX=command, XDG_CACHE_HOME=str(tmp_path)).communicate() == FINE


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_cuda_kernel_compiles(arch, dtype):
    """For 32 channels without spilling a register; for other numbers at all."""
    known = (ctypes.c_int * 999)()  # more than there are
    cuda.call(cuda.nvrtc(), "nvrtcGetSupportedArchs", known)
    if int(arch.removeprefix("sm_")) not in known:
        pytest.skip(f"this NVRTC does not know {arch}")
    binary, log = cuda.compile_kernel(arch, dtype, 32)
    assert binary[:4] == b"\x7fELF"
    numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert re.findall(numbers, log) == [("0", "0", "0")] * 2
    if dtype == torch.float32:
        for d in WIDTHS:
            cuda.compile_kernel(arch, dtype, d)


@needs_nvrtc
def test_cuda_kernel_that_does_not_compile():
    with pytest.raises(RuntimeError, match="cuda.cu does not compile for sm_1:"):
        cuda.compile_kernel("sm_1", torch.float32, 32)


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
    assert all(float(cell) > 0 for cell in cells[2][3:7])


@needs_nvrtc
def test_bench_compiles_without_a_gpu():
    rows = bench("--compile", "sm_80", "sm_90")[1:]
    kinds = itertools.product(("sm_80", "sm_90"), ("fp32", "bf16", "fp16", "fp64"))
    assert [tuple(row.split()[:2]) for row in rows] == list(kinds)
    assert all(row.split()[4] == row.split()[6] == "0" for row in rows)  # nothing spilled


@pytest.fixture
def cuda_on_cpu(tmp_path, monkeypatch):
    """cuda.py and cuda.cu on CPU tensors: compiled as C++, its threads run one by one."""

    @functools.cache
    def functions(_, dtype, channels):
        built = tmp_path / f"{dtype}-{channels}.so"
        flags = "-std=c++17 -O1 -w -shared -fPIC".split() + cuda.macros(dtype, channels)
        files = [f'-DKERNEL="{cuda.SOURCE}"', str(HARNESS), "-o", str(built)]
        subprocess.run([*cpu.compiler(), *flags, *files], check=True)
        launch = ctypes.CDLL(str(built)).launch
        return [functools.partial(launch, which) for which in (0, 1)]

    def launch(function, blocks, _1, _2, threads, _3, _4, _5, stream, arguments, _6):
        function(blocks, threads, arguments)

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
        check(arguments, "cpu", (bound, bound))


# ---------------------------------------------------------------- the module
@pytest.mark.parametrize(
    "reference, step", [((0.5, 0.5), (0.05, 0.1)), ((0.5, 0.5, 0.4, 0.2), (0.1, 0.05))]
)
def test_module_starts_as_a_star(reference, step):
    """Every head looks its own way, weights equal. Its n-th point lies n pixels away; with boxes
    the outermost one lies on the border."""
    module = MSDeformAttn(16, n_levels=1, n_heads=4, n_points=2)
    reference = torch.tensor(reference).view(1, 1, 1, -1)
    locations, weights = module.sample(torch.randn(1, 1, 16), reference, [(10, 20)])
    steps = (locations - 0.5).view(4, 2, 2) / torch.tensor(step)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(steps, torch.stack([directions, 2 * directions], 1))
    assert (weights == 0.5).all()


def test_module_ignores_padding():
    torch.manual_seed(0)
    module, shapes = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3), [(4, 4), (2, 2)]
    query, source = torch.randn(1, 5, 8), torch.randn(1, 20, 8)
    reference, padding = torch.rand(1, 5, 2, 2), torch.zeros(1, 20, dtype=torch.bool)
    padding[0, [3, 7, 11, 15, 17, 19]] = True
    changed = source + 100 * padding[..., None]
    assert torch.equal(*(module(query, reference, x, shapes, padding) for x in (source, changed)))
