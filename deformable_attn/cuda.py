"""The CUDA kernel: cuda.cu, compiled at first use by NVRTC and launched on torch's stream.
NVRTC, CUDA's compiler as a library, comes with torch; it and the driver are called by ctypes."""

import ctypes
import functools
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cuda.cu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # places: the kernel's DTYPE
THREADS = 128  # in a block
TILE = 64  # neighbouring queries that are worked on together, head by head
MAX_LEVELS = 16
WINDOWS = sys.platform == "win32"
pointer = ctypes.c_void_p


@functools.cache
def nvrtc():
    """CUDA's compiler of torch's own version, which torch has loaded. RuntimeError or OSError."""
    if not torch.version.cuda:
        raise RuntimeError("torch is not built for CUDA; install a torch that is")
    major = torch.version.cuda.split(".")[0]
    return ctypes.CDLL(f"nvrtc64_{major}0_0.dll" if WINDOWS else f"libnvrtc.so.{major}")


@functools.cache
def driver():
    """NVIDIA's driver, which torch has loaded already where there is a GPU. OSError without one."""
    return ctypes.CDLL("nvcuda.dll" if WINDOWS else "libcuda.so.1")


def call(library, name, *arguments):
    """Call a function of NVRTC or the driver. Raises RuntimeError with the error's number."""
    error = getattr(library, name)(*arguments)
    if error:
        raise RuntimeError(f"{name} failed with CUDA's error {error}")


def read(name, program):
    """The bytes that a function of NVRTC gives; another one, called ...Size, tells their number."""
    size = ctypes.c_size_t()
    call(nvrtc(), f"{name}Size", program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    call(nvrtc(), name, program, content)
    return content.raw


def geometry(dtype, channels):
    """(channels that a thread loads at once, up to 16 bytes; threads that share one head)."""
    wide = 16 // dtype.itemsize
    width = wide if channels % wide == 0 else 1
    return width, next(n for n in (1, 2, 4, 8, 16, 32) if n >= min(32, channels // width))


def macros(dtype, channels):
    """What cuda.cu is compiled with."""
    width, lanes = geometry(dtype, channels)
    numbers = {"DTYPE": DTYPES.index(dtype), "D": channels, "WIDTH": width, "LANES": lanes}
    numbers.update(THREADS=THREADS, TILE=TILE, LEVELS=MAX_LEVELS)
    return [f"-D{name}={number}" for name, number in numbers.items()]


def compile_kernel(arch, dtype, channels):
    """(binary, what the assembler reports) for "sm_90", say; needs no GPU. Raises RuntimeError."""
    program, source = pointer(), SOURCE.read_bytes()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
    options += macros(dtype, channels)
    texts = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    call(nvrtc(), "nvrtcCreateProgram", ctypes.byref(program), source, b"cuda.cu", 0, None, None)
    try:
        failed = nvrtc().nvrtcCompileProgram(program, len(options), texts)
        log = read("nvrtcGetProgramLog", program).decode(errors="replace").strip("\0\n ")
        if failed:
            raise RuntimeError(f"{SOURCE.name} does not compile for {arch}: {log or failed}")
        return read("nvrtcGetCUBIN", program), log
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def functions(device, dtype, channels):
    """(forward, backward) of the kernel, compiled and loaded for a device's index."""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    binary, _ = compile_kernel(arch, dtype, channels)
    module, found = pointer(), [pointer(), pointer()]
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context, should nothing have run on it
        call(driver(), "cuModuleLoadData", ctypes.byref(module), binary)
    for function, name in zip(found, (b"forward", b"backward")):
        call(driver(), "cuModuleGetFunction", ctypes.byref(function), module, name)
    return found


def description():
    """What has been compiled, in words. Raises RuntimeError that says what is missing."""
    nvrtc()  # first: where torch is not built for CUDA, it says so
    functions(torch.cuda.current_device(), torch.float32, 32)
    return f"cuda.cu, compiled by NVRTC for {torch.cuda.get_device_name()}"


@functools.lru_cache(maxsize=64)
def neighbours(spatial_shapes, device):
    """(S,) int32: the cells of each level in tiles of 8 x 8, so neighbours follow each other."""
    order, start = [], 0
    for h, w in zip(spatial_shapes[::2], spatial_shapes[1::2]):
        y, x = torch.arange(h)[:, None], torch.arange(w)
        tile = (y // 8 * -(-w // 8) + x // 8).flatten()
        order.append(tile.argsort(stable=True) + start)
        start += h * w
    return torch.cat(order).to(device, torch.int32)


def launch(which, spatial_shapes, inputs, results):
    """Start a function of the kernel, 0 forward, 1 backward; the last inputs are forward's."""
    value, locations, _ = inputs[-3:]
    (N, S, M, D), (_, Q, _, L, P, _) = value.shape, locations.shape
    if L > MAX_LEVELS:
        raise ValueError(f"locations has {L} levels; the CUDA kernel takes up to {MAX_LEVELS}")
    if N * Q * M == 0:
        return
    heights, widths = spatial_shapes[::2], spatial_shapes[1::2]
    starts = [sum(h * w for h, w in zip(heights[:level], widths)) for level in range(L)]
    unused = [0] * (MAX_LEVELS - L)
    numbers = [N, S, M, Q, L, P, *heights, *unused, *widths, *unused, *starts, *unused]
    sizes = (ctypes.c_int * len(numbers))(*numbers)  # Sizes of cuda.cu
    inputs = [x if x.data_ptr() % 16 == 0 else x.clone() for x in inputs]  # loads of 16 bytes
    order = neighbours(tuple(spatial_shapes), value.device) if Q == S else None  # Q == S: encoder
    tensors = order, *inputs, *results
    arguments = [sizes, *(pointer(None if x is None else x.data_ptr()) for x in tensors)]
    addresses = (pointer * len(arguments))(*map(ctypes.addressof, arguments))
    groups = N * -(-Q // TILE) * TILE * M
    blocks = -(-groups * geometry(value.dtype, D)[1] // THREADS)
    with torch.cuda.device(value.device):
        function = functions(value.device.index, value.dtype, D)[which]
        stream = pointer(torch.cuda.current_stream().cuda_stream)
        grid = blocks, 1, 1, THREADS, 1, 1
        call(driver(), "cuLaunchKernel", function, *grid, 0, stream, addresses, None)


def forward(value, spatial_shapes, locations, weights):
    """The operator on contiguous tensors; locations and weights in fp32, or fp64 as value."""
    out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    launch(0, spatial_shapes, (value, locations, weights), [out])
    return out


def backward(grad, value, spatial_shapes, locations, weights):
    """The gradients of value (summed in fp32 at least, in an order that varies), of the others."""
    grads = [torch.zeros_like(value, dtype=locations.dtype)]
    grads += torch.empty_like(locations), torch.empty_like(weights)
    launch(1, spatial_shapes, (grad, value, locations, weights), grads)
    return grads[0].to(value.dtype), *grads[1:]
