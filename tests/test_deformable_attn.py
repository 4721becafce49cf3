"""The operator against four nested loops and the reference, on every backend that runs here; its gradients; builds; the module."""
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
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
needs_nvrtc = pytest.mark.skipif(not torch.version.cuda, reason="torch's build for CUDA brings the compiler along; this is another build")
PLACES = [("cpu", "torch"), pytest.param(("cpu", "cpu"), marks=needs_compiler),
          pytest.param(("cuda", "cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
on_every_backend = pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])
on_every_kernel = pytest.mark.parametrize("place", PLACES[1:], ids=lambda place: place[1])
WIDTHS = (1, 3, 30, 32, 64, 71, 256, 1025)  # channels of a head
LEVELS = (((4, 4),), ((1, 1), (7, 2)), ((3, 5), (1, 1), (2, 4)), ((16, 9), (8, 5), (4, 3), (2, 2)),
          ((9, 9), (5, 6), (3, 3), (2, 1), (1, 1)))


def make(n=2, q=3, m=2, d=4, p=2, shapes=((3, 5), (1, 1), (2, 4)), dtype=torch.float64, spread=1.6, device="cpu"):
    """Random arguments; locations reach beyond the maps. q=None: a query for each cell of the maps, as in an encoder."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in shapes)
    q = cells if q is None else q
    real = torch.promote_types(dtype, torch.float32)
    value = torch.randn(n, cells, m, d, generator=generator, dtype=torch.float64).to(dtype)
    locations = (torch.rand(n, q, m, len(shapes), p, 2, generator=generator, dtype=real) - 0.5) * spread + 0.5
    weights = torch.rand(n, q, m, len(shapes), p, generator=generator, dtype=real)
    return value.to(device), shapes, locations.to(device), weights.to(device)


def gradients(function, value, shapes, locations, weights, **options):
    """The output and the gradients of value, locations and weights for a fixed random gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in (value, locations, weights)]
    out = function(leaves[0], shapes, *leaves[1:], **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
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
    for i, j, head, level, point in itertools.product(range(n), range(q), range(m), range(levels), range(p)):
        h, w = shapes[level]
        x, y = locations[i, j, head, level, point].tolist()
        x, y = x * w - 0.5, y * h - 0.5
        for cx, cy in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= cx < w and 0 <= cy < h:
                share = (1 - abs(x - cx)) * (1 - abs(y - cy)) * weights[i, j, head, level, point]
                out[i, j, head] += share * value[i, starts[level] + cy * w + cx, head]
    return out.flatten(2)


@on_every_backend
@pytest.mark.parametrize("options", [{}, {"d": 1}, {"shapes": ((4, 4),)}, {"q": 1, "p": 1}, {"spread": 6.0}, {"q": None}],
                         ids=["usual", "one channel", "one level", "one point", "mostly outside", "encoder"])
def test_equals_loops(place, options):
    device, backend = place
    arguments = make(**options)
    found = ms_deform_attn(*(x.to(device) if torch.is_tensor(x) else x for x in arguments), backend=backend)
    torch.testing.assert_close(found.cpu(), by_loops(*arguments))


@on_every_kernel
@pytest.mark.parametrize("shapes", LEVELS, ids=len)
@pytest.mark.parametrize("d", WIDTHS)
def test_kernel_equals_reference(place, d, shapes):
    device, backend = place
    arguments = make(n=3, q=13, m=3, d=d, p=3, shapes=shapes, device=device)
    expected = gradients(ms_deform_attn_reference, *arguments)
    assert_near(gradients(ms_deform_attn, *arguments, backend=backend), expected, (1e-12, 1e-12))


@on_every_backend
@pytest.mark.parametrize("dtype, bounds", [(torch.float32, (1e-5, 1e-4)), (torch.float16, (5e-3, 3e-2)), (torch.bfloat16, (3e-2, 8e-2))],
                         ids=lambda x: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else "")
@pytest.mark.parametrize("q", [None, 50], ids=["encoder", "decoder"])
def test_precision(place, dtype, bounds, q):
    device, backend = place
    arguments = make(q=q, m=8, d=32, p=4, shapes=((12, 9), (6, 5), (3, 3), (2, 2)), dtype=dtype, spread=1.2, device=device)
    found = gradients(ms_deform_attn, *arguments, backend=backend)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    assert_near(found, gradients(ms_deform_attn_reference, *double(*arguments)), bounds)


@on_every_backend
def test_half_precision_finds_its_pixels(place):
    """At column 200 of 256 a bf16 location would be a pixel off; ours are fp32 whatever the values are."""
    device, backend = place
    value = torch.arange(256.0, device=device).view(1, 256, 1, 1).bfloat16()
    location = torch.tensor([(200 + 0.5) / 256, 0.5], device=device).view(1, 1, 1, 1, 1, 2)
    assert ms_deform_attn(value, [(1, 256)], location, torch.ones(1, 1, 1, 1, 1, device=device), backend=backend).item() == 200


@on_every_backend
def test_no_queries_no_images(place):
    device, backend = place
    for options, shape in (({"q": 0}, (2, 0, 8)), ({"n": 0}, (0, 3, 8))):
        found = gradients(ms_deform_attn, *make(**options, device=device), backend=backend)
        assert found[0].shape == shape and not found[1].any()


@on_every_backend
def test_pixel_centres_are_exact(place):
    device, backend = place
    shapes = ((2, 3),)
    value = torch.arange(6.0, device=device).view(1, 6, 1, 1)
    centres = torch.tensor([[(x + 0.5) / 3, (y + 0.5) / 2] for y in range(2) for x in range(3)], device=device).view(1, 6, 1, 1, 1, 2)
    found = ms_deform_attn(value, shapes, centres, torch.ones(1, 6, 1, 1, 1, device=device), backend=backend)
    torch.testing.assert_close(found.flatten(), value.flatten())


@on_every_backend
def test_corners_and_borders(place):
    """A corner of the map is the middle between one pixel and three that are outside, so a quarter; beyond half a pixel nothing."""
    device, backend = place
    value = torch.ones(1, 12, 1, 1, device=device, dtype=torch.float64)
    places = [((0.0, 0.0), 0.25), ((1.0, 1.0), 0.25), ((0.0, 0.5), 0.5), ((0.5, 1.0), 0.5), ((-0.5 / 4, 0.5), 0.0),
              ((0.5, 1 + 0.5 / 3), 0.0)]
    locations = torch.tensor([at for at, _ in places], device=device, dtype=torch.float64).view(1, -1, 1, 1, 1, 2)
    found = ms_deform_attn(value, [(3, 4)], locations, torch.ones(1, len(places), 1, 1, 1, device=device), backend=backend)
    torch.testing.assert_close(found.flatten().cpu(), torch.tensor([share for _, share in places], dtype=torch.float64))


@on_every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_points_nowhere_add_nothing(place, bad):
    device, backend = place
    value, shapes, locations, weights = make(q=None, d=32, device=device)
    locations[:, ::3, :, :, 0, 1] = bad
    without = weights.clone()
    without[:, ::3, :, :, 0] = 0
    found = gradients(ms_deform_attn, value, shapes, locations, weights, backend=backend)
    expected = gradients(ms_deform_attn, value, shapes, locations.clamp(-9, 9).nan_to_num(9), without, backend=backend)
    torch.testing.assert_close(found[:2], expected[:2])
    assert not found[2][:, ::3, :, :, 0].any() and not found[3][:, ::3, :, :, 0].any()


@on_every_backend
def test_strides_do_not_matter(place):
    device, backend = place
    value, shapes, locations, weights = make(n=2, q=3, device=device)
    others = (value.transpose(0, 1).contiguous().transpose(0, 1), shapes, locations.flip(1).flip(1).mT.contiguous().mT,
              torch.stack([weights, weights], -1)[..., 0])
    found = gradients(ms_deform_attn, *others, backend=backend)
    torch.testing.assert_close(found, gradients(ms_deform_attn, value, shapes, locations, weights, backend=backend))
    moved = torch.cat([value.new_zeros(1), value.flatten()])[1:].view_as(value)  # does not start at 16 bytes
    torch.testing.assert_close(ms_deform_attn(moved, shapes, locations, weights, backend=backend), found[0])


@on_every_backend
def test_gradients(place):
    device, backend = place
    value, shapes, locations, weights = (x.requires_grad_() if torch.is_tensor(x) else x for x in make(device=device))
    assert torch.autograd.gradcheck(lambda v, l, w: ms_deform_attn(v, shapes, l, w, backend=backend), (value, locations, weights),
                                    nondet_tol=0 if device == "cpu" else 1e-12)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    arguments = make(n=2, q=None, m=3, d=32, shapes=((9, 7), (5, 4)), dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(ms_deform_attn, *arguments, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
def test_many_points():
    """More points than the kernel works on at a time."""
    arguments = make(q=5, d=40, p=45)
    assert_near(gradients(ms_deform_attn, *arguments, backend="cpu"), gradients(ms_deform_attn_reference, *arguments), (1e-12, 1e-12))


@needs_compiler
def test_more_than_32_bits_of_elements():
    """Memory that is only read as zeros costs nothing, so this needs little."""
    h, w, m, d = 17, 2048, 2048, 32
    value = torch.zeros(1, h * w, m, d)  # 2.3 billion
    assert value.numel() > 2**31
    value[0, -1, -1] = torch.arange(32.0)
    corner = torch.tensor([(w - 0.5) / w, (h - 0.5) / h]).expand(1, 1, m, 1, 1, 2)
    found = ms_deform_attn(value, [(h, w)], corner, torch.ones(1, 1, m, 1, 1), backend="cpu").view(m, d)
    torch.testing.assert_close(found[-1], torch.arange(32.0), rtol=0, atol=0.1)  # the corner itself is rounded to fp32
    assert not found[:-1].any()


# ---------------------------------------------------------------- as an operator of torch

@on_every_kernel
def test_opcheck(place):
    value, shapes, locations, weights = (x.requires_grad_() if torch.is_tensor(x) else x for x in make(device=place[0]))
    flat = [size for shape in shapes for size in shape]
    torch.library.opcheck(deformable_attn._forward, (value, flat, locations, weights))
    detached = [x.detach() for x in (value, locations, weights)]
    grad = torch.randn(2, 3, 8, dtype=torch.float64, device=place[0])
    torch.library.opcheck(deformable_attn._backward, (grad, detached[0], flat, *detached[1:]),
                          test_utils=("test_schema", "test_faketensor"))


@on_every_kernel
def test_compiled_encoder_layer(place):
    torch.manual_seed(0)
    device = place[0]
    layer = DeformableEncoderLayer(32, nheads=4, dim_feedforward=64, dropout=0.0, n_levels=2, n_points=3).to(device)
    shapes = [(6, 5), (3, 3)]
    x, position = torch.randn(2, 2, 39, 32, device=device)
    reference, padding = torch.rand(2, 39, 2, 2, device=device), torch.zeros(2, 39, dtype=torch.bool, device=device)
    x.requires_grad_()
    eager = layer(x, position, reference, shapes, padding)
    compiled = torch.compile(layer, fullgraph=True)(x, position, reference, shapes, padding)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), x), torch.autograd.grad(eager.square().sum(), x),
                               rtol=1e-4, atol=1e-4)


@on_every_backend
def test_autocast_keeps_locations(place, monkeypatch):
    """Under autocast the values are bf16, the locations that reach the operator are not."""
    device, backend = place
    seen = []
    monkeypatch.setattr(deformable_attn, "ms_deform_attn", lambda *a, **k: seen.append(a) or ms_deform_attn(*a, **k))
    monkeypatch.setattr(MSDeformAttn, "backend", backend)
    module = MSDeformAttn(32, n_levels=1, n_heads=2, n_points=2).to(device)
    source = torch.randn(1, 100 * 100, 32, device=device)
    reference, padding = torch.rand(1, 7, 1, 2, device=device), torch.zeros(1, 100 * 100, dtype=torch.bool, device=device)
    with torch.autocast(device, torch.bfloat16):
        module(source[:, :7], reference, source, [(100, 100)], padding)
    (value, _, locations, *_), = seen
    assert (value.dtype, locations.dtype) == (torch.bfloat16, torch.float32)
    offsets = locations - reference[:, :, None, :, None]
    torch.testing.assert_close(offsets[0], offsets[0, :1].expand_as(offsets[0]), rtol=0, atol=1e-6)  # the star, at every query


def test_arguments_that_do_not_fit():
    value, shapes, locations, weights = make()
    for change, message in [
            ({"value": value[0]}, r"value has shape \(24, 2, 4\).*expected \(N, S, M, D\)"),
            ({"value": value[:, 1:]}, r"value has shape \(2, 23, 2, 4\); expected S = 24"),
            ({"locations": locations[:, :, :, :2]}, r"locations has shape .*; expected \(2, 3, 2, 3, 2, 2\)"),
            ({"weights": weights[:, :2]}, r"weights has shape .*; expected \(2, 3, 2, 3, 2\)"),
            ({"locations": locations[:, :, :, :, :0], "weights": weights[..., :0]}, "at least one level and one point"),
            ({"locations": locations.bfloat16()}, "locations has dtype torch.bfloat16; expected float32"),
            ({"value": value.long()}, "value has dtype torch.int64"),
            ({"spatial_shapes": torch.tensor(shapes)}, "spatial_shapes is a tensor"),
            ({"weights": weights.to("meta")}, "weights is on meta, value on cpu"),
            ({"backend": "fast"}, "backend 'fast' is not one of auto, cpu, cuda, torch")]:
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(**{"value": value, "spatial_shapes": shapes, "locations": locations, "weights": weights, **change})
    with pytest.raises(ValueError, match="the cuda kernel of deformable attention does not run on cpu tensors"):
        ms_deform_attn(value, shapes, locations, weights, backend="cuda")


# ---------------------------------------------------------------- builds

CALL = ("import torch\nfrom deformable_attn import ms_deform_attn\n"
        "centre, one = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)\n"
        "print(ms_deform_attn(torch.ones(1, 4, 1, 8), [(2, 2)], centre, one, {}).sum().item())")


def start(code, **environment):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_without_a_compiler_the_reference_runs(tmp_path):
    out, errors = start(CALL.format(""), CXX="no-such-compiler").communicate()
    assert out == "8.0\n" and "the pure-PyTorch reference, which is slower; no cpu kernel: CXX=no-such-compiler is not found" in errors
    out, errors = start(CALL.format("'cpu'"), CXX="no-such-compiler").communicate()
    assert not out and "ValueError: the cpu kernel of deformable attention cannot run: CXX=no-such-compiler" in errors
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    out, errors = start(CALL.format(""), CXX=str(broken)).communicate()
    assert out == "8.0\n" and "c++ failed: fatal error: no headers" in errors


@needs_compiler
def test_processes_build_at_once_and_share_the_result(tmp_path):
    processes = [start(CALL.format("'cpu'"), XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [process.communicate() for process in processes] == [("8.0\n", "")] * 2
    (built,) = (tmp_path / "deformable_attn").iterdir()
    time = built.stat().st_mtime_ns
    assert start(CALL.format("'cpu'"), XDG_CACHE_HOME=str(tmp_path)).communicate() == ("8.0\n", "")
    assert built.stat().st_mtime_ns == time  # taken as it was
    built.write_bytes(b"damaged")  # made anew
    assert start(CALL.format("'cpu'"), XDG_CACHE_HOME=str(tmp_path)).communicate() == ("8.0\n", "")
    assert built.stat().st_size > 10_000


@needs_compiler
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "deformable_attn").write_text("a file in the way")
    assert start(CALL.format("'cpu'"), XDG_CACHE_HOME=str(tmp_path)).communicate() == ("8.0\n", "")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_cuda_kernel_compiles(arch, dtype):
    """For 32 channels without spilling a register; for other numbers at all."""
    binary, log = cuda.compile_kernel(arch, dtype, 32)
    assert binary[:4] == b"\x7fELF"
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0", "0")] * 2
    if dtype == torch.float32:
        for d in WIDTHS:
            cuda.compile_kernel(arch, dtype, d)


@needs_nvrtc
def test_cuda_kernel_that_does_not_compile():
    with pytest.raises(RuntimeError, match="cuda.cu does not compile for sm_1:"):
        cuda.compile_kernel("sm_1", torch.float32, 32)


def bench(*flags):
    """Lines that `python -m deformable_attn.bench` prints."""
    return subprocess.run([sys.executable, "-m", "deformable_attn.bench", *flags], cwd=ROOT, check=True, text=True,
                          capture_output=True).stdout.splitlines()


@needs_compiler
def test_bench_prints_a_table():
    head, rule, *rows = bench("--device", "cpu", "--shapes", "D512", "--repeats", "1")[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert [row[:3] for row in cells[1:]] == [["D512", "fp32", "torch"], ["D512", "fp32", "cpu"]]
    assert {len(row) for row in cells} == {rule.count("|---")} and all(float(cell) >= 0 for cell in cells[2][3:7])


@needs_nvrtc
def test_bench_compiles_without_a_gpu():
    rows = bench("--compile", "sm_80", "sm_90")[1:]
    assert [row.split()[:2] for row in rows] == [[arch, dtype] for arch in ("sm_80", "sm_90") for dtype in ("fp32", "bf16", "fp16", "fp64")]
    assert all(row.split()[4] == row.split()[6] == "0" for row in rows)  # nothing spilled
    from deformable_attn.bench import BASELINE
    binary, log = cuda.compile_source(BASELINE, "sm_90")
    assert binary[:4] == b"\x7fELF" and "0 bytes spill stores" in log


@pytest.fixture
def cuda_on_cpu(tmp_path, monkeypatch):
    """cuda.py and cuda.cu on CPU tensors: the kernel compiled as C++, its threads run one by one."""
    from cuda.bindings import driver

    @contextlib.contextmanager
    def no_device(_):
        yield

    def functions(_, dtype, channels):
        built = tmp_path / f"{dtype}-{channels}.so"
        if not built.exists():
            subprocess.run([cpu.compiler(), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *cuda.macros(dtype, channels),
                            f'-DKERNEL="{cuda.SOURCE}"', str(Path(__file__).with_name("cuda_on_cpu.cpp")), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
        return [(library, which) for which in (0, 1)]

    def launch(function, blocks, _1, _2, threads, _3, _4, _5, _6, arguments, _7):
        library, which = function
        library.launch(which, blocks, threads, ctypes.c_void_p(arguments))
        return driver.CUresult.CUDA_SUCCESS,

    monkeypatch.setattr(cuda, "functions", functions)
    monkeypatch.setattr(driver, "cuLaunchKernel", launch)
    monkeypatch.setattr(torch.cuda, "device", no_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(deformable_attn.KERNELS, "cpu", cuda)


@needs_compiler
@needs_nvrtc
@pytest.mark.skipif(sys.platform != "linux", reason="the coroutines of cuda_on_cpu.cpp are Linux's")
@pytest.mark.parametrize("d, dtype, bound", [(32, torch.float64, 1e-12), (71, torch.float64, 1e-12), (1, torch.float64, 1e-12),
                                             (1025, torch.float64, 1e-12), (32, torch.float32, 1e-5), (32, torch.bfloat16, 3e-2),
                                             (8, torch.bfloat16, 3e-2)], ids=str)
def test_cuda_kernel_thread_by_thread(cuda_on_cpu, d, dtype, bound):
    """What the CUDA kernel computes, without a GPU: not its speed and not its races, but every index and formula."""
    for q in (None, 5):
        arguments = make(n=1, q=q, m=3, d=d, p=7, shapes=((9, 10), (1, 1), (2, 3)), dtype=dtype)
        found = gradients(ms_deform_attn, *arguments, backend="cpu")
        assert_near(found, gradients(ms_deform_attn_reference, *double(*arguments)), (bound, bound))


# ---------------------------------------------------------------- the module

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
