"""The CUDA kernel: cuda.cu, compiled at first use by NVRTC and launched on torch's stream.

NVRTC, CUDA's compiler as a library, comes with torch's packages for CUDA and is called through
ctypes, as the driver is: neither a toolkit nor another package is needed.
"""

import ctypes
import functools
import re
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cuda.cu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # places: the kernel's DTYPE
THREADS = 128  # in a block
TILE = 64  # neighbouring queries that are worked on together, head by head
MAX_LEVELS = 16
pointer = ctypes.c_void_p


class Sizes(ctypes.Structure):
    """The kernel's first argument, as cuda.cu declares it."""

    _fields_ = [(name, ctypes.c_int) for name in "NSMQLP"]
    _fields_ += [(name, ctypes.c_int * MAX_LEVELS) for name in ("height", "width", "start")]


# ---------------------------------------------------------------- NVRTC and the driver
@functools.cache
def nvrtc():
    """CUDA's compiler of torch's own CUDA version, beside torch or the system's; RuntimeError."""
    if not torch.version.cuda:
        raise RuntimeError("torch is not built for CUDA; install a torch that is")
    major = torch.version.cuda.split(".")[0]
    folders = {Path(torch.__file__).parent / "lib"}
    folders |= {path for root in sys.path for path in Path(root).glob("nvidia/*/lib")}
    folders |= {path for root in sys.path for path in Path(root).glob("nvidia/*/bin")}
    names = rf"(libnvrtc\.so\.{major}|nvrtc64_{major}\d*_0\.dll)"
    found = [path for x in folders if x.is_dir() for path in x.iterdir()]
    found = [str(path) for path in found if re.fullmatch(names, path.name)]
    for name in [*found, f"libnvrtc.so.{major}"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"NVRTC {major} is not found; it comes with torch's packages for CUDA")


@functools.cache
def driver():
    """NVIDIA's driver. Raises RuntimeError."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise RuntimeError(f"NVIDIA's driver ({name}) is not installed") from None


def call(library, name, *arguments):
    """Call a function of NVRTC or the driver. Raises RuntimeError with the error's number."""
    error = getattr(library, name)(*arguments)
    if error:
        raise RuntimeError(f"{name} failed with CUDA's error {error}")


def read(library, size_name, name, program):
    """The bytes of which one function tells the number and another one gives the content."""
    size = ctypes.c_size_t()
    call(library, size_name, program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    call(library, name, program, content)
    return content.raw


def compile_source(source, arch, options=()):
    """(binary, what the assembler reports) of CUDA C++ for an architecture such as "sm_90".
    Needs no GPU. Raises RuntimeError."""
    library, program = nvrtc(), pointer()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", *options]
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    name = SOURCE.name.encode()
    call(library, "nvrtcCreateProgram", ctypes.byref(program), source.encode(), name, 0, None, None)
    try:
        failed = library.nvrtcCompileProgram(program, len(options), texts)
        log = read(library, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
        log = log.decode(errors="replace").strip("\0\n ")
        if failed:
            raise RuntimeError(f"{SOURCE.name} does not compile for {arch}: {log or failed}")
        return read(library, "nvrtcGetCUBINSize", "nvrtcGetCUBIN", program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def supported():
    """The architectures that this NVRTC compiles for, such as "sm_90"."""
    number = ctypes.c_int()
    call(nvrtc(), "nvrtcGetNumSupportedArchs", ctypes.byref(number))
    found = (ctypes.c_int * number.value)()
    call(nvrtc(), "nvrtcGetSupportedArchs", found)
    return [f"sm_{arch}" for arch in found]


# ---------------------------------------------------------------- the kernel
def geometry(dtype, channels):
    """(channels that a thread loads at once, up to 16 bytes; threads that share one head)."""
    wide = 16 // dtype.itemsize
    width = wide if channels % wide == 0 else 1
    lanes = 1
    while lanes < min(32, channels // width):
        lanes *= 2
    return width, lanes


def macros(dtype, channels):
    """What cuda.cu is compiled with."""
    width, lanes = geometry(dtype, channels)
    numbers = {"DTYPE": DTYPES.index(dtype), "D": channels, "WIDTH": width, "LANES": lanes}
    numbers.update(THREADS=THREADS, TILE=TILE, LEVELS=MAX_LEVELS)
    return [f"-D{name}={number}" for name, number in numbers.items()]


def compile_kernel(arch, dtype, channels):
    """`compile_source` of cuda.cu for a dtype and a number of channels."""
    return compile_source(SOURCE.read_text(encoding="utf-8"), arch, macros(dtype, channels))


def architecture(device):
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def functions(device, dtype, channels):
    """(forward, backward) of the kernel, compiled and loaded for a device's index."""
    binary, _ = compile_kernel(architecture(device), dtype, channels)
    module, found = pointer(), [pointer(), pointer()]
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context, should nothing have run on it
        call(driver(), "cuModuleLoadData", ctypes.byref(module), binary)
    for function, name in zip(found, (b"forward", b"backward")):
        call(driver(), "cuModuleGetFunction", ctypes.byref(function), module, name)
    return found


def description():
    """What has been compiled, in words. Raises RuntimeError that says what is missing."""
    device = torch.cuda.current_device()
    functions(device, torch.float32, 32)
    return f"cuda.cu, compiled by NVRTC for {architecture(device)}"


@functools.lru_cache(maxsize=64)
def neighbours(spatial_shapes, device):
    """(S,) int32: the cells of every level in tiles of 8 x 8.
    So queries that read the same pixels follow each other."""
    order, start = [], 0
    for h, w in zip(spatial_shapes[::2], spatial_shapes[1::2]):
        y, x = torch.arange(h)[:, None], torch.arange(w)
        tile = (y // 8 * -(-w // 8) + x // 8).flatten()
        order.append(tile.argsort(stable=True) + start)
        start += h * w
    return torch.cat(order).to(device, torch.int32)


def start(function, blocks, *arguments):
    """Start a function on the current stream. Arguments: a Sizes, tensors, or None for null."""
    sizes, *tensors = arguments
    values = [sizes, *(pointer(None if x is None else x.data_ptr()) for x in tensors)]
    addresses = (pointer * len(values))(*map(ctypes.addressof, values))
    stream = pointer(torch.cuda.current_stream().cuda_stream)
    grid = blocks, 1, 1, THREADS, 1, 1
    call(driver(), "cuLaunchKernel", function, *grid, 0, stream, addresses, None)


def launch(which, spatial_shapes, value, locations, *tensors):
    """Start a function of the kernel (0 forward, 1 backward) on the tensors' device."""
    (N, S, M, D), (_, Q, _, L, P, _) = value.shape, locations.shape
    if L > MAX_LEVELS:
        raise ValueError(f"locations has {L} levels; the CUDA kernel takes up to {MAX_LEVELS}")
    if N * Q * M == 0:
        return
    heights, widths = spatial_shapes[::2], spatial_shapes[1::2]
    starts = [sum(h * w for h, w in zip(heights[:level], widths)) for level in range(L)]
    arrays = ((ctypes.c_int * MAX_LEVELS)(*numbers) for numbers in (heights, widths, starts))
    sizes = Sizes(N, S, M, Q, L, P, *arrays)
    encoder = Q == S  # its queries are the cells of the maps
    order = neighbours(tuple(spatial_shapes), value.device) if encoder else None
    groups = N * -(-Q // TILE) * TILE * M
    blocks = -(-groups * geometry(value.dtype, D)[1] // THREADS)
    with torch.cuda.device(value.device):
        function = functions(value.device.index, value.dtype, D)[which]
        start(function, blocks, sizes, order, *tensors)


def aligned(tensor):
    """Itself, or a copy if it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def forward(value, spatial_shapes, locations, weights):
    """The operator on contiguous tensors; locations and weights in fp32, or fp64 as value."""
    value, locations, weights = map(aligned, (value, locations, weights))
    out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    launch(0, spatial_shapes, value, locations, value, locations, weights, out)
    return out


def backward(grad, value, spatial_shapes, locations, weights):
    """The gradients of value, locations and weights.
    That of value is summed in fp32 at least, in an order that varies."""
    given = grad, value, locations, weights = tuple(map(aligned, (grad, value, locations, weights)))
    grad_value = torch.zeros_like(value, dtype=locations.dtype)
    found = grad_value, torch.empty_like(locations), torch.empty_like(weights)
    launch(1, spatial_shapes, value, locations, *given, *found)
    return grad_value.to(value.dtype), *found[1:]
