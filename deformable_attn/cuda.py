"""The CUDA kernel: cuda.cu, compiled at first use by NVRTC (which torch's packages bring along) and launched on torch's stream."""
import ctypes
import functools
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cuda.cu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # their places are the kernel's DTYPE
THREADS = 128  # in a block
TILE = 64  # neighbouring queries that are worked on together, head by head
MAX_LEVELS = 16


class Sizes(ctypes.Structure):
    """The kernel's first argument, as cuda.cu declares it."""

    _fields_ = [*((name, ctypes.c_int) for name in "NSMQLP"),
                *((name, ctypes.c_int * MAX_LEVELS) for name in ("height", "width", "start"))]


def geometry(dtype, channels):
    """(channels that a thread loads at once, up to 16 bytes; threads that share one head of one query)."""
    wide = 16 // dtype.itemsize
    width = wide if channels % wide == 0 else 1
    lanes = 1
    while lanes < min(32, channels // width):
        lanes *= 2
    return width, lanes


def macros(dtype, channels):
    """What cuda.cu is compiled with."""
    width, lanes = geometry(dtype, channels)
    numbers = {"DTYPE": DTYPES.index(dtype), "D": channels, "WIDTH": width, "LANES": lanes, "THREADS": THREADS, "TILE": TILE,
               "LEVELS": MAX_LEVELS}
    return [f"-D{name}={number}" for name, number in numbers.items()]


def check(result):
    """The values of a call into CUDA. Raises RuntimeError with the name of its error."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"{type(error).__name__} {error.name} ({int(error)})")
    return values[0] if len(values) == 1 else values


def compile_source(source, arch, options=()):
    """(binary, what the assembler reports) of CUDA C++ for an architecture such as "sm_90"; needs no GPU. Raises RuntimeError."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise RuntimeError("the package cuda-bindings is not installed (pip install cuda-bindings)") from None
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", *options]
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), SOURCE.name.encode(), 0, [], []))
    result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    log = log.decode(errors="replace").strip("\0\n ")
    if int(result[0]):
        raise RuntimeError(f"{SOURCE.name} does not compile for {arch}: {log or result[0].name}")
    binary = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
    check(nvrtc.nvrtcGetCUBIN(program, binary))
    check(nvrtc.nvrtcDestroyProgram(program))
    return bytes(binary), log


def compile_kernel(arch, dtype, channels):
    """The same of cuda.cu for a dtype and a number of channels."""
    return compile_source(SOURCE.read_text(), arch, macros(dtype, channels))


def architecture(device):
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def load(device, binary):
    """The functions "forward" and "backward" of a binary, on a device."""
    from cuda.bindings import driver
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context, should nothing have run on it yet
        module = check(driver.cuModuleLoadData(binary))
    return [check(driver.cuModuleGetFunction(module, name)) for name in (b"forward", b"backward")]


@functools.cache
def functions(device, dtype, channels):
    """(forward, backward) of the kernel, compiled and loaded for a device's index."""
    return load(device, compile_kernel(architecture(device), dtype, channels)[0])


def description():
    """What has been compiled, in words. Raises RuntimeError that says what is missing."""
    device = torch.cuda.current_device()
    functions(device, torch.float32, 32)
    return f"cuda.cu, compiled by NVRTC for {architecture(device)}"


def aligned(tensor):
    """Itself, or a copy if it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@functools.lru_cache(maxsize=64)
def neighbours(spatial_shapes, device):
    """(S,) int32: the cells of every level in tiles of 8 x 8, so that queries that read the same pixels follow each other."""
    order, start = [], 0
    for h, w in zip(spatial_shapes[::2], spatial_shapes[1::2]):
        y, x = torch.arange(h)[:, None], torch.arange(w)
        tile = (y // 8 * -(-w // 8) + x // 8).flatten()
        order.append(tile.argsort(stable=True) + start)
        start += h * w
    return torch.cat(order).to(device, torch.int32)


def start(function, blocks, threads, *arguments):
    """Start a function on the current stream of the current device. Arguments: of ctypes, tensors, or None for a null pointer."""
    from cuda.bindings import driver
    arguments = [ctypes.c_void_p(argument if argument is None else argument.data_ptr())
                 if argument is None or torch.is_tensor(argument) else argument for argument in arguments]
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    check(driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, torch.cuda.current_stream().cuda_stream,
                                ctypes.addressof(pointers), 0))


def launch(which, spatial_shapes, value, locations, *tensors):
    """Start a function of the kernel (0 forward, 1 backward) on the tensors' device."""
    N, S, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    if L > MAX_LEVELS:
        raise ValueError(f"locations has {L} levels; the CUDA kernel takes up to {MAX_LEVELS}")
    if N * Q * M == 0:
        return
    heights, widths = spatial_shapes[::2], spatial_shapes[1::2]
    starts = [sum(h * w for h, w in zip(heights[:level], widths)) for level in range(L)]
    sizes = Sizes(N, S, M, Q, L, P, *((ctypes.c_int * MAX_LEVELS)(*numbers) for numbers in (heights, widths, starts)))
    order = neighbours(tuple(spatial_shapes), value.device) if Q == S else None  # an encoder's queries are the cells of the maps
    _, lanes = geometry(value.dtype, D)
    groups = N * -(-Q // TILE) * TILE * M
    with torch.cuda.device(value.device):
        start(functions(value.device.index, value.dtype, D)[which], -(-groups * lanes // THREADS), THREADS, sizes, order, *tensors)


def forward(value, spatial_shapes, locations, weights):
    """The operator on contiguous tensors, locations and weights in fp32, or fp64 as value; see ms_deform_attn."""
    value, locations, weights = map(aligned, (value, locations, weights))
    N, _, M, D = value.shape
    out = value.new_empty(N, locations.shape[1], M * D)
    launch(0, spatial_shapes, value, locations, value, locations, weights, out)
    return out


def backward(grad, value, spatial_shapes, locations, weights):
    """The gradients of value, locations and weights. That of value is summed in fp32 at least, in an order that varies."""
    grad, value, locations, weights = map(aligned, (grad, value, locations, weights))
    grad_value = torch.zeros_like(value, dtype=locations.dtype)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    launch(1, spatial_shapes, value, locations, grad, value, locations, weights, grad_value, grad_locations, grad_weights)
    return grad_value.to(value.dtype), grad_locations, grad_weights
