"""Every backend that runs here, compared with plain loops and with the reference; builds."""

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

import numpy as np
import pytest
import torch

import deformable_attn
from deformable_attn import MSDeformAttn, cpu, cuda, ms_deform_attn
from deformable_attn.reference import ms_deform_attn_reference
from detr import DeformableEncoderLayer

ROOT = Path(__file__).resolve().parents[1]
HARNESS = Path(__file__).with_name("cuda_on_cpu.cpp")
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
needs_nvrtc = pytest.mark.skipif(not torch.version.cuda, reason="torch is not built for CUDA")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PLACES = [  # device, backend
    pytest.param("cpu", "torch"),
    pytest.param("cpu", "cpu", marks=needs_compiler),
    pytest.param("cuda", "cuda", marks=needs_gpu),
]
on_every_backend = pytest.mark.parametrize("device, backend", PLACES)
on_every_kernel = pytest.mark.parametrize("device, backend", PLACES[1:])
CHANNELS = [1, 3, 30, 32, 64, 71, 256, 1025]  # per head
LEVELS = [  # (height, width) of one to five levels
    [(4, 4)],
    [(1, 1), (7, 2)],
    [(3, 5), (1, 1), (2, 4)],
    [(16, 9), (8, 5), (4, 3), (2, 2)],
    [(9, 9), (5, 6), (3, 3), (2, 1), (1, 1)],
]
# relative errors of output and gradients
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 3e-2), torch.bfloat16: (3e-2, 8e-2)}
CASES = [{}, {"D": 1}, {"shapes": LEVELS[0]}, {"Q": 1, "P": 1}, {"spread": 6.0}, {"Q": None}]


def make_inputs(
    B=2, Q=3, M=2, D=4, P=2, spread=1.6, shapes=LEVELS[2], dtype=torch.float64, device="cpu"
):
    """Draw value, spatial_shapes, locations and weights.

    Q:      None: a query for each cell, as in the encoder
    spread: locations lie within a square of this side around the map, whose side is 1
    """
    generator = torch.Generator().manual_seed(0)
    S = sum(height * width for height, width in shapes)
    L = len(shapes)
    if Q is None:
        Q = S
    sum_dtype = torch.promote_types(dtype, torch.float32)
    value = torch.randn(B, S, M, D, generator=generator, dtype=torch.float64).to(dtype)
    locations = torch.rand(B, Q, M, L, P, 2, generator=generator, dtype=sum_dtype)
    locations = (locations - 0.5) * spread + 0.5
    weights = torch.rand(B, Q, M, L, P, generator=generator, dtype=sum_dtype)
    return value.to(device), shapes, locations.to(device), weights.to(device)


def convert(inputs, target):
    """Convert the tensors among the inputs to a dtype or device."""
    value, shapes, locations, weights = inputs
    return value.to(target), shapes, locations.to(target), weights.to(target)


def output_and_gradients(function, value, shapes, locations, weights, **options):
    """Call an operator; then backpropagate a random gradient of its output.

    Returns [output, gradient of value, of locations, of weights].
    """
    leaves = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    out = function(leaves[0], shapes, leaves[1], leaves[2], **options)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def check_against_reference(inputs, backend, out_bound, grad_bound):
    """Compare output and gradients with the reference in fp64; bounds of the relative errors."""
    actual = output_and_gradients(ms_deform_attn, *inputs, backend=backend)
    exact_inputs = convert(inputs, torch.float64)
    expected = output_and_gradients(ms_deform_attn_reference, *exact_inputs)
    bounds = [out_bound, grad_bound, grad_bound, grad_bound]
    for tensor, right, bound in zip(actual, expected, bounds):
        assert (tensor.double() - right).norm() <= bound * right.norm()
    return actual


def bilinear(value_map, x, y):
    """Interpolate a map (H, W, D) at a point in pixels, pixel by pixel; 0 outside of the map."""
    H, W, D = value_map.shape
    sample = torch.zeros(D, dtype=value_map.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < H and 0 <= column < W:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                sample += share * value_map[row, column]
    return sample


def by_loops(value, shapes, locations, weights):
    """Compute equation 3 of the paper with plain loops."""
    B, _, M, D = value.shape
    _, Q, _, _, P, _ = locations.shape
    out = torch.zeros(B, Q, M, D, dtype=value.dtype)
    start = 0
    for level, (H, W) in enumerate(shapes):
        maps = value[:, start : start + H * W].unflatten(1, (H, W))  # (B, H, W, M, D)
        start += H * W
        for b, q, m, p in itertools.product(range(B), range(Q), range(M), range(P)):
            x, y = locations[b, q, m, level, p].tolist()
            sample = bilinear(maps[b, :, :, m], x * W - 0.5, y * H - 0.5)
            out[b, q, m] += weights[b, q, m, level, p] * sample
    return out.flatten(2)


@on_every_backend
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_loops(device, backend, options):
    inputs = make_inputs(**options)
    out = ms_deform_attn(*convert(inputs, device), backend=backend)
    torch.testing.assert_close(out.cpu(), by_loops(*inputs))


@on_every_kernel
@pytest.mark.parametrize("shapes", LEVELS, ids=len)
@pytest.mark.parametrize("D, P", [(D, 3) for D in CHANNELS] + [(40, 45)])
def test_kernel_equals_reference(device, backend, D, P, shapes):
    """45 points per level are more than a kernel handles at a time."""
    inputs = make_inputs(B=3, Q=13, M=3, D=D, P=P, shapes=shapes, device=device)
    check_against_reference(inputs, backend, 1e-12, 1e-12)


@on_every_backend
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("Q", [None, 50], ids=["encoder", "decoder"])
def test_precision(device, backend, dtype, Q):
    shapes = [(12, 9), (6, 5), (3, 3), (2, 2)]
    inputs = make_inputs(Q=Q, M=8, D=32, P=4, shapes=shapes, spread=1.2, dtype=dtype, device=device)
    out_bound, grad_bound = BOUNDS[dtype]
    results = check_against_reference(inputs, backend, out_bound, grad_bound)
    out, grad_value, grad_locations, _ = results
    assert out.dtype == grad_value.dtype == dtype
    assert grad_locations.dtype == torch.float32


@on_every_backend
def test_half_precision_finds_its_pixels(device, backend):
    """At column 200 of 256 a bf16 location would be a pixel off; ours are fp32."""
    value = torch.arange(256.0, device=device).view(1, 256, 1, 1).bfloat16()
    location = torch.tensor([(200 + 0.5) / 256, 0.5], device=device).view(1, 1, 1, 1, 1, 2)
    one = torch.ones(1, 1, 1, 1, 1, device=device)
    assert ms_deform_attn(value, [(1, 256)], location, one, backend=backend).item() == 200


@on_every_backend
def test_no_queries_no_images(device, backend):
    for options, shape in [({"Q": 0}, (2, 0, 8)), ({"B": 0}, (0, 3, 8))]:
        inputs = make_inputs(**options, device=device)
        out, grad_value, *_ = output_and_gradients(ms_deform_attn, *inputs, backend=backend)
        assert out.shape == shape
        assert not grad_value.any()


@on_every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_points_nowhere_add_nothing(device, backend, bad):
    value, shapes, locations, weights = make_inputs(Q=None, D=32, device=device)
    locations[:, ::3, :, :, 0, 1] = bad
    out, grad_value, grad_locations, grad_weights = output_and_gradients(
        ms_deform_attn, value, shapes, locations, weights, backend=backend
    )
    finite = locations.clamp(-9, 9).nan_to_num(9)
    without = weights.clone()
    without[:, ::3, :, :, 0] = 0
    expected_out, expected_grad_value, *_ = output_and_gradients(
        ms_deform_attn, value, shapes, finite, without, backend=backend
    )
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(grad_value, expected_grad_value)
    assert not grad_locations[:, ::3, :, :, 0].any()
    assert not grad_weights[:, ::3, :, :, 0].any()


@on_every_backend
def test_strides_do_not_matter(device, backend):
    value, shapes, locations, weights = make_inputs(device=device)
    expected = output_and_gradients(
        ms_deform_attn, value, shapes, locations, weights, backend=backend
    )
    strided_value = value.transpose(0, 1).contiguous().transpose(0, 1)
    strided_locations = locations.mT.contiguous().mT
    strided_weights = torch.stack([weights, weights], -1)[..., 0]
    actual = output_and_gradients(
        ms_deform_attn, strided_value, shapes, strided_locations, strided_weights, backend=backend
    )
    torch.testing.assert_close(actual, expected)
    moved = torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value)  # not at 16 bytes
    out = ms_deform_attn(moved, shapes, locations, weights, backend=backend)
    torch.testing.assert_close(out, expected[0])


@on_every_backend
def test_gradients(device, backend):
    value, shapes, locations, weights = make_inputs(device=device)
    for leaf in (value, locations, weights):
        leaf.requires_grad_()
    tolerance = 0.0
    if device == "cuda":  # the order of its sums varies
        tolerance = 1e-12
    arguments = (value, shapes, locations, weights, backend)
    assert torch.autograd.gradcheck(ms_deform_attn, arguments, nondet_tol=tolerance)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    inputs = make_inputs(Q=None, M=3, D=32, shapes=[(9, 7), (5, 4)], dtype=torch.float32)
    threads_before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(output_and_gradients(ms_deform_attn, *inputs, backend="cpu"))
    torch.set_num_threads(threads_before)
    for result in results[1:]:
        for tensor, expected in zip(result, results[0]):
            assert torch.equal(tensor, expected)


@needs_compiler
def test_more_than_32_bits_of_elements():
    """Memory that is only read as zeros costs nothing, so this needs little."""
    H, W, M, D = 17, 2048, 2048, 32
    value = torch.zeros(1, H * W, M, D)  # 2.3 billion
    assert value.numel() > 2**31
    value[0, -1, -1] = torch.arange(32.0)
    corner = torch.tensor([(W - 0.5) / W, (H - 0.5) / H]).expand(1, 1, M, 1, 1, 2)
    out = ms_deform_attn(value, [(H, W)], corner, torch.ones(1, 1, M, 1, 1), "cpu").view(M, D)
    torch.testing.assert_close(out[-1], torch.arange(32.0), rtol=0, atol=0.1)  # corner in fp32
    assert not out[:-1].any()


# ---------------------------------------------------------------- as an operator of torch
@on_every_kernel
def test_opcheck(device, backend):
    value, shapes, locations, weights = make_inputs(device=device)
    sizes = np.ravel(shapes).tolist()
    arguments = (value, sizes, locations, weights)
    grad_out = torch.randn(2, 3, 8, dtype=torch.float64, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(deformable_attn._backward_op, (grad_out, *arguments), test_utils=tests)
    for leaf in (value, locations, weights):
        leaf.requires_grad_()
    torch.library.opcheck(deformable_attn._forward_op, arguments)


@on_every_kernel
def test_compiled_encoder_layer(device, backend):
    torch.manual_seed(0)
    layer = DeformableEncoderLayer(32, 4, 64, dropout=0.0, n_levels=2, n_points=3).to(device)
    x, position = torch.randn(2, 2, 39, 32, device=device)
    x.requires_grad_()
    reference = torch.rand(2, 39, 2, 2, device=device)
    padding = torch.zeros(2, 39, dtype=torch.bool, device=device)
    arguments = (x, position, reference, [(6, 5), (3, 3)], padding)
    compiled_out = torch.compile(layer, fullgraph=True)(*arguments)
    out = layer(*arguments)
    torch.testing.assert_close(compiled_out, out)
    (compiled_grad,) = torch.autograd.grad(compiled_out.square().sum(), x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(compiled_grad, grad, rtol=1e-4, atol=1e-4)


@on_every_backend
def test_autocast_keeps_locations(device, backend, monkeypatch):
    """Under autocast the values are bf16, but the locations that reach the operator are fp32."""
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
    value, shapes, locations, weights = make_inputs()
    fitting = {"value": value, "spatial_shapes": shapes, "locations": locations, "weights": weights}
    no_points = {"locations": locations[:, :, :, :, :0], "weights": weights[..., :0]}
    for change, message in [
        ({"value": value[0]}, r"value has shape \(24, 2, 4\).*expected \(B, S, M, D\)"),
        ({"value": value[:, 1:]}, r"value has shape \(2, 23, 2, 4\); expected \(2, 24, 2, 4\)"),
        ({"locations": locations[:, :, :, :2]}, r"locations has .*; expected \(2, 3, 2, 3, 2, 2\)"),
        ({"weights": weights[:, :2]}, r"weights has shape .*; expected \(2, 3, 2, 3, 2\)"),
        (no_points, r"locations .* one point, got shape \(2, 3, 2, 3, 0, 2\)"),
        ({"locations": locations.bfloat16()}, "locations has dtype .*bfloat16; expected float32"),
        ({"value": value.long()}, "value has dtype torch.int64"),
        ({"spatial_shapes": torch.tensor(shapes)}, "spatial_shapes is a tensor"),
        ({"weights": weights.to("meta")}, "weights is on meta, value on cpu"),
        ({"backend": "fast"}, "backend 'fast' is not one of auto, cpu, cuda, torch"),
        ({"backend": "cuda"}, "the cuda kernel .* does not run on cpu tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(**{**fitting, **change})


# ---------------------------------------------------------------- builds
SCRIPT = """
import torch
from deformable_attn import ms_deform_attn
center = torch.full((1, 1, 1, 1, 1, 2), 0.5)
one = torch.ones(1, 1, 1, 1, 1)
print(ms_deform_attn(torch.ones(1, 4, 1, 8), [(2, 2)], center, one, BACKEND).sum().item())
"""
FINE = ("8.0\n", "")  # what the script prints, and no warning


def start(backend, **environment):
    """Start a process that calls the operator."""
    command = [sys.executable, "-c", SCRIPT.replace("BACKEND", repr(backend))]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_without_a_compiler_the_reference_runs(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    missing = start("auto", CXX="no-such-compiler")
    failing = start("auto", CXX=str(broken))
    refused = start("cpu", CXX="no-such-compiler")

    printed, warning = missing.communicate()
    assert printed == "8.0\n"
    assert "no cpu kernel: C++ compiler not found: CXX=no-such-compiler" in warning
    printed, warning = failing.communicate()
    assert printed == "8.0\n"
    assert "c++ failed: fatal error: no headers" in warning
    printed, error = refused.communicate()
    assert not printed
    assert "cannot run: C++ compiler not found: CXX=no-such-compiler" in error


@needs_compiler
def test_processes_build_at_once_and_share_the_result(tmp_path):
    cache = str(tmp_path)
    first = start("cpu", XDG_CACHE_HOME=cache)
    second = start("cpu", XDG_CACHE_HOME=cache)
    assert first.communicate() == FINE
    assert second.communicate() == FINE
    (built,) = (tmp_path / "deformable_attn").iterdir()
    time = built.stat().st_mtime_ns
    assert start("cpu", XDG_CACHE_HOME=cache).communicate() == FINE
    assert built.stat().st_mtime_ns == time  # used as it was
    os.truncate(built, 40_000)  # as after a power loss: built again
    assert start("cpu", XDG_CACHE_HOME=cache).communicate() == FINE
    (built,) = (tmp_path / "deformable_attn").iterdir()
    assert built.stat().st_size > 40_000


@needs_compiler
def test_compiler_with_flags_and_cache_that_cannot_be_written(tmp_path):
    """$CXX may be a command line, as with ccache."""
    (tmp_path / "deformable_attn").write_text("a file in the way")
    command = f"env {cpu.compilers()[0][0]} -DNOTHING"
    assert start("cpu", CXX=command, XDG_CACHE_HOME=str(tmp_path)).communicate() == FINE


@needs_compiler
def test_an_old_assembler(tmp_path, monkeypatch):
    """It does not know what the compiler emits for a new processor, but other flags remain."""
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n"
        'case "$* " in *-E*) ;; *"-march=native "*) echo "Error: no such" >&2; exit 1 ;; '
        f'esac\nexec {cpu.compilers()[0][0]} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(cpu, "FLAGS", ["-std=c++17", "-O0", "-shared", "-fPIC", "-pthread"])
    built = cpu.build(tmp_path / "cache")
    assert ctypes.CDLL(str(built)).forward_f32
    monkeypatch.setattr(cpu, "compile_into", None)
    assert cpu.build(tmp_path / "cache") == built  # found without another attempt


def test_without_a_home_the_kernel_is_temporary(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cpu.cache_folder() == cpu.temporary_folder()
    assert cpu.cache_folder().is_dir()


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_cuda_kernel_compiles(arch, dtype):
    """For 32 channels without spilling a register; for other numbers at all."""
    known = (ctypes.c_int * 999)()  # longer than the list that NVRTC writes
    cuda.call(cuda.nvrtc(), "nvrtcGetSupportedArchs", known)
    if int(arch.removeprefix("sm_")) not in known:
        pytest.skip(f"this NVRTC does not know {arch}")
    for function in cuda.FUNCTIONS:
        binary, log = cuda.compile_kernel(arch, dtype, 32, function)
        assert binary[:4] == b"\x7fELF"
        pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        assert re.findall(pattern, log) == [("0", "0", "0")]
        if dtype == torch.float32:
            for D in CHANNELS:
                cuda.compile_kernel(arch, dtype, D, function)


def test_layout_of_threads():
    """A thread loads 16 bytes of value, and adds at most 16 bytes of an fp32 gradient."""
    for dtype in cuda.DTYPES:
        for D in (1, 8, 32, 71, 1025):
            forward_width, lanes = cuda.thread_layout(dtype, D, "forward")
            backward_width, backward_lanes = cuda.thread_layout(dtype, D, "backward")
            assert forward_width * dtype.itemsize <= 16
            assert backward_width * max(4, dtype.itemsize) <= 16
            assert D % forward_width == D % backward_width == 0
            assert lanes * forward_width <= backward_lanes * backward_width * 2
    assert cuda.thread_layout(torch.bfloat16, 32, "forward") == (8, 4)
    assert cuda.thread_layout(torch.bfloat16, 32, "backward") == (4, 8)
    assert cuda.thread_layout(torch.float32, 32, "backward") == (4, 8)
    assert cuda.thread_layout(torch.float64, 32, "backward") == (2, 16)
    assert cuda.thread_layout(torch.float32, 71, "backward") == (1, 32)


NVRTC_PLACES = [  # CUDA version of torch, system, file in the folder of packages
    ("12.8", "linux", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
    ("13.0", "linux", "nvidia/cu13/lib/libnvrtc.so.13"),
    ("12.8", "linux", "torch/lib/libnvrtc.so.12"),
    ("12.8", "win32", "torch/lib/nvrtc64_120_0.dll"),
    ("13.0", "win32", "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll"),
]


@pytest.mark.parametrize("version, system, place", NVRTC_PLACES)
def test_nvrtc_is_found_where_nothing_has_loaded_it(version, system, place, tmp_path, monkeypatch):
    def load(path):
        if not Path(path).exists():
            raise OSError(f"{path}: cannot open shared object file")
        return path

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(cuda, "WINDOWS", system == "win32")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", version)
    library = tmp_path / place
    with pytest.raises(OSError, match=f"NVRTC cannot be loaded .{library.name}: .*install torch"):
        cuda.nvrtc.__wrapped__()
    library.parent.mkdir(parents=True)
    library.touch()
    assert cuda.nvrtc.__wrapped__() == str(library)


NOTHING_LOADED = """
import runpy, sys
from unittest.mock import MagicMock
torch = MagicMock(__file__=sys.argv[1])
torch.version.cuda = sys.argv[2]
torch.float32.itemsize = 4
sys.modules["torch"] = torch
names = runpy.run_path(sys.argv[3])
binary, _ = names["compile_kernel"]("sm_80", torch.float32, 32, "forward")
print(binary[:4])
"""


@needs_nvrtc
def test_cuda_kernel_compiles_where_nothing_has_loaded_nvrtc():
    """Not even torch, which loads libraries when it is imported."""
    arguments = [torch.__file__, torch.version.cuda, str(cuda.SOURCE.with_name("cuda.py"))]
    command = [sys.executable, "-c", NOTHING_LOADED, *arguments]
    assert subprocess.check_output(command) == b"b'\\x7fELF'\n"


@needs_nvrtc
def test_cuda_kernel_that_does_not_compile():
    with pytest.raises(RuntimeError, match="compiling cuda.cu for sm_1 failed:"):
        cuda.compile_kernel("sm_1", torch.float32, 32, "forward")


def test_the_processor_is_named():
    """By its model name and vector instructions, if the system knows them."""
    described = cpu.processor()
    info = Path("/proc/cpuinfo")
    if not info.exists() or "model name" not in info.read_text():
        pytest.skip("this system has no /proc/cpuinfo with the model's name")
    assert described.split(",")[0] in info.read_text()
    for instructions in ("avx2", "avx512f", "amx_bf16"):
        assert (f", {instructions}" in described) == (f" {instructions} " in info.read_text())


def bench(*flags):
    """Return the lines that `python -m deformable_attn.bench` prints."""
    command = [sys.executable, "-m", "deformable_attn.bench", *flags]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
    return done.stdout.splitlines()


def cells_of(row):
    """Return the cells of a row of a Markdown table."""
    return [cell.strip() for cell in row.strip("|").split("|")]


@needs_compiler
def test_bench_prints_a_table():
    lines = bench("--device", "cpu", "--shapes", "D512", "--repeats", "1")
    head, rule, reference, kernel = lines[2:]
    assert cells_of(reference)[:3] == ["D512", "fp32", "torch"]
    assert cells_of(kernel)[:3] == ["D512", "fp32", "cpu"]
    for row in (head, reference, kernel):
        assert len(cells_of(row)) == rule.count("|---")
    for cell in cells_of(kernel)[3:7]:
        assert float(cell) > 0


@needs_nvrtc
def test_bench_compiles_without_a_gpu():
    rows = [line.split() for line in bench("--compile", "sm_80", "sm_90")[1:]]
    kinds = itertools.product(["sm_80", "sm_90"], ["fp32", "bf16", "fp16", "fp64"])
    assert [(row[0], row[1]) for row in rows] == list(kinds)
    for row in rows:
        assert row[4] == row[6] == "0"  # nothing spilled


@pytest.fixture
def cuda_on_cpu(tmp_path, monkeypatch):
    """Run cuda.py and cuda.cu on CPU tensors: compiled as C++, thread by thread."""

    @functools.cache
    def functions(device_index, dtype, channels):
        launchers = {}
        for name in cuda.FUNCTIONS:
            built = tmp_path / f"{name}-{dtype}-{channels}.so"
            flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
            flags += cuda.compile_defines(dtype, channels, name)
            flags += [f'-DKERNEL="{cuda.SOURCE}"', str(HARNESS), "-o", str(built)]
            subprocess.run(cpu.compilers()[0] + flags, check=True)
            launchers[name] = ctypes.CDLL(str(built)).launch
        return launchers

    def launch(function, blocks, _1, _2, threads, _3, _4, _5, stream, arguments, _6):
        function(blocks, threads, arguments)

    monkeypatch.setattr(cuda, "functions", functions)
    monkeypatch.setattr(cuda, "driver", lambda: SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(deformable_attn.KERNELS, "cpu", cuda)
    monkeypatch.setattr(deformable_attn, "_build_kernel", lambda device_type: (True, "emulated"))


@needs_compiler
@needs_nvrtc
@pytest.mark.skipif(sys.platform != "linux", reason="cuda_on_cpu.cpp is for Linux")
@pytest.mark.parametrize(
    "D, dtype, bound",
    [
        (1, torch.float64, 1e-12),
        (32, torch.float64, 1e-12),
        (71, torch.float64, 1e-12),
        (1025, torch.float64, 1e-12),
        (32, torch.float32, 1e-5),
        (32, torch.bfloat16, 3e-2),
        (8, torch.bfloat16, 3e-2),
    ],
    ids=str,
)
def test_cuda_kernel_thread_by_thread(cuda_on_cpu, D, dtype, bound):
    """Without a GPU every index and formula of the CUDA kernel is tested, but not its races."""
    for Q in (None, 5):
        shapes = [(9, 10), (1, 1), (2, 3)]
        inputs = make_inputs(B=1, Q=Q, M=3, D=D, P=7, shapes=shapes, dtype=dtype)
        check_against_reference(inputs, "cpu", bound, bound)


# ---------------------------------------------------------------- the module
@pytest.mark.parametrize(
    "reference, step",
    [
        ((0.5, 0.5), (0.05, 0.1)),  # a point: one pixel of the 10 x 20 map
        ((0.5, 0.5, 0.4, 0.2), (0.1, 0.05)),  # a box: half of the way to its border
    ],
)
def test_module_starts_as_a_star(reference, step):
    """Every head looks in a direction of its own, with equal weights. Its n-th point lies n pixels
    away; with boxes the outermost point lies on the border."""
    module = MSDeformAttn(16, n_levels=1, n_heads=4, n_points=2)
    reference = torch.tensor(reference).view(1, 1, 1, -1)
    locations, weights = module.sample(torch.randn(1, 1, 16), reference, [(10, 20)])
    steps = (locations - 0.5).view(4, 2, 2) / torch.tensor(step)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(steps, torch.stack([directions, 2 * directions], 1))
    assert (weights == 0.5).all()


def test_module_ignores_padding():
    torch.manual_seed(0)
    module = MSDeformAttn(8, n_levels=2, n_heads=2, n_points=3)
    shapes = [(4, 4), (2, 2)]
    query = torch.randn(1, 5, 8)
    source = torch.randn(1, 20, 8)
    reference = torch.rand(1, 5, 2, 2)
    padding = torch.zeros(1, 20, dtype=torch.bool)
    padding[0, [3, 7, 11, 15, 17, 19]] = True
    changed = source + 100 * padding[..., None]
    out = module(query, reference, source, shapes, padding)
    changed_out = module(query, reference, changed, shapes, padding)
    assert torch.equal(out, changed_out)
