"""The CUDA kernel: cuda.cu, compiled at first use by NVRTC and launched on torch's stream.

NVRTC is NVIDIA's CUDA compiler as a library; it comes with torch. NVRTC and the driver are called
through ctypes.
"""

import ctypes
import functools
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cuda.cu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # as DTYPE counts in cuda.cu
FUNCTIONS = ("forward", "backward")
THREADS = 128  # per block
TILE = 64  # neighboring queries that are worked on together, head by head
MAX_LEVELS = 16
WINDOWS = sys.platform == "win32"
LIBRARY_FOLDERS = ["torch/lib", "nvidia/*/lib", "nvidia/*/bin", "nvidia/*/bin/*"]  # of packages
Pointer = ctypes.c_void_p


# ---------------------------------------------------------------- NVRTC and the driver
@functools.cache
def nvrtc():
    """Return NVRTC of the CUDA version that torch was built with.

    The name alone is enough if torch has loaded it or CUDA is installed. Otherwise it is in torch
    or in NVIDIA's packages beside it.
    Raises RuntimeError if torch was built without CUDA, OSError if the library cannot be loaded.
    """
    if not torch.version.cuda:
        raise RuntimeError("PyTorch was built without CUDA; install a CUDA-enabled build")
    major = torch.version.cuda.split(".")[0]
    name = f"libnvrtc.so.{major}"
    builtins = f"libnvrtc-builtins.so.{major}.*"
    if WINDOWS:
        name = f"nvrtc64_{major}0_0.dll"
        builtins = f"nvrtc-builtins64_{major}*.dll"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        reason = str(error)
    packages = Path(torch.__file__).parents[1]
    for folder in LIBRARY_FOLDERS:
        for path in packages.glob(f"{folder}/{name}"):
            for part in path.parent.glob(builtins):  # NVRTC opens it by its name alone
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(path))
    raise OSError(f"NVIDIA's compiler NVRTC cannot be loaded ({reason}); reinstall torch")


@functools.cache
def driver():
    """Return NVIDIA's driver. Raises OSError where there is none."""
    if WINDOWS:
        return ctypes.CDLL("nvcuda.dll")
    return ctypes.CDLL("libcuda.so.1")


def call(library, name, *arguments):
    """Call a function of NVRTC or the driver. Raises RuntimeError with the error's number."""
    error = getattr(library, name)(*arguments)
    if error:
        raise RuntimeError(f"{name} failed with CUDA error {error}")


def nvrtc_output(name, program):
    """Return the bytes that a getter of NVRTC writes; the function <name>Size tells how many."""
    size = ctypes.c_size_t()
    call(nvrtc(), f"{name}Size", program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    call(nvrtc(), name, program, content)
    return content.raw


def c_array(kind, values):
    """Return the values as an array of C."""
    return (kind * len(values))(*values)


# ---------------------------------------------------------------- compile
def thread_layout(dtype, channels, function):
    """Choose how threads share the channels of a head.

    function: "forward" or "backward"
    Returns (width, lanes): the channels that a thread loads at once, 16 bytes of them or one, and
    the number of threads per head of a query, a power of two up to 32.

    The backward pass adds to a gradient in fp32 (fp64), also for a value in 16 bits. A thread with
    eight channels would add them as two vectors of 16 bytes, and each addition of neighboring
    threads would touch every other 16 bytes of memory. With four channels they touch all of them.
    """
    width = 16 // dtype.itemsize
    if function == "backward":
        width = min(width, 4)
    if channels % width != 0:
        width = 1
    lanes = 1
    while lanes < min(32, channels // width):
        lanes *= 2
    return width, lanes


def compile_defines(dtype, channels, function):
    """Return the macros of cuda.cu as the compiler's options."""
    width, lanes = thread_layout(dtype, channels, function)
    is_backward = int(function == "backward")
    return [
        f"-DBACKWARD={is_backward}",
        f"-DDTYPE={DTYPES.index(dtype)}",
        f"-DD={channels}",
        f"-DWIDTH={width}",
        f"-DLANES={lanes}",
        f"-DTHREADS={THREADS}",
        f"-DTILE={TILE}",
        f"-DLEVELS={MAX_LEVELS}",
    ]


def compile_kernel(arch, dtype, channels, function):
    """Compile a function of cuda.cu; this needs no GPU.

    arch:     of the GPU, "sm_90" for example
    channels: per head
    function: "forward" or "backward"
    Returns (the binary, the assembler's report). Raises RuntimeError with the compiler's messages.
    """
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v"]
    options += compile_defines(dtype, channels, function)
    c_options = c_array(ctypes.c_char_p, [option.encode() for option in options])
    source = SOURCE.read_bytes()
    program = Pointer()
    call(nvrtc(), "nvrtcCreateProgram", ctypes.byref(program), source, b"cuda.cu", 0, None, None)
    try:
        error = nvrtc().nvrtcCompileProgram(program, len(options), c_options)
        log = nvrtc_output("nvrtcGetProgramLog", program).decode(errors="replace").strip("\0\n ")
        if error:
            reason = log if log else f"error {error}"
            raise RuntimeError(f"compiling {SOURCE.name} for {arch} failed: {reason}")
        return nvrtc_output("nvrtcGetCUBIN", program), log
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def functions(device_index, dtype, channels):
    """Compile and load the kernel for a GPU. Returns its functions by name."""
    major, minor = torch.cuda.get_device_capability(device_index)
    loaded = {}
    for name in FUNCTIONS:
        binary, _ = compile_kernel(f"sm_{major}{minor}", dtype, channels, name)
        module = Pointer()
        loaded[name] = Pointer()
        with torch.cuda.device(device_index):
            torch.cuda.current_stream()  # makes the device's context, should nothing have run on it
            call(driver(), "cuModuleLoadData", ctypes.byref(module), binary)
        call(driver(), "cuModuleGetFunction", ctypes.byref(loaded[name]), module, name.encode())
    return loaded


def description():
    """Compile the kernel and describe it. Raises RuntimeError or OSError if it cannot run."""
    nvrtc()  # first, because its message is the clearest where torch was built without CUDA
    functions(torch.cuda.current_device(), torch.float32, 32)
    return f"cuda.cu, compiled by NVRTC for {torch.cuda.get_device_name()}"


# ---------------------------------------------------------------- launch
@functools.lru_cache(maxsize=64)
def tiled_query_order(sizes, device):
    """Order the cells of each level in tiles of 8 x 8, so that neighbors follow each other.

    sizes: height, width of every level in one tuple
    Returns the indices of the cells, (S,) int32.
    """
    order = []
    start = 0  # the level's first cell
    for H, W in zip(sizes[::2], sizes[1::2]):
        y = torch.arange(H)[:, None]
        x = torch.arange(W)
        tiles_per_row = (W + 7) // 8
        tile = (y // 8) * tiles_per_row + x // 8  # (H, W)
        order.append(tile.flatten().argsort(stable=True) + start)
        start += H * W
    return torch.cat(order).to(device, torch.int32)


def sizes_struct(B, S, M, Q, L, P, sizes):
    """Return the struct Sizes of cuda.cu; sizes: height, width of every level in one list."""
    heights = sizes[::2]
    widths = sizes[1::2]
    starts = []
    start = 0
    for H, W in zip(heights, widths):
        starts.append(start)
        start += H * W
    unused = [0] * (MAX_LEVELS - L)
    numbers = [B, S, M, Q, L, P] + heights + unused + widths + unused + starts + unused
    return c_array(ctypes.c_int, numbers)


def aligned(tensor):
    """Return the tensor, or a copy if it does not begin at 16 bytes as the kernel's loads need."""
    if tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone()


def launch(name, sizes, value, locations, inputs, results):
    """Start a function of the kernel.

    name:             "forward" or "backward"
    sizes:            height, width of every level in one list
    value, locations: two of the inputs, which tell the other sizes
    inputs, results:  contiguous tensors in the order of cuda.cu
    Raises ValueError for more than MAX_LEVELS levels.
    """
    B, S, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    if L > MAX_LEVELS:
        raise ValueError(f"locations has {L} levels; the CUDA kernel takes up to {MAX_LEVELS}")
    if B * Q * M == 0:
        return

    struct = sizes_struct(B, S, M, Q, L, P, sizes)
    order = None
    if Q == S:  # the encoder: every cell is a query
        order = tiled_query_order(tuple(sizes), value.device)
    tensors = [order] + [aligned(tensor) for tensor in inputs] + results
    arguments = [struct]
    for tensor in tensors:
        arguments.append(Pointer(None if tensor is None else tensor.data_ptr()))
    addresses = c_array(Pointer, [ctypes.addressof(argument) for argument in arguments])

    # `lanes` threads for every query of every tile and every head; the last tile may not be full
    _, lanes = thread_layout(value.dtype, D, name)
    tiles = (Q + TILE - 1) // TILE
    threads = B * tiles * TILE * M * lanes
    blocks = (threads + THREADS - 1) // THREADS
    with torch.cuda.device(value.device):
        function = functions(value.device.index, value.dtype, D)[name]
        stream = Pointer(torch.cuda.current_stream().cuda_stream)
        grid = [blocks, 1, 1]
        block = [THREADS, 1, 1]
        call(driver(), "cuLaunchKernel", function, *grid, *block, 0, stream, addresses, None)


def forward(value, sizes, locations, weights):
    """Return the operator's output.

    All tensors are contiguous; locations and weights are fp32, or fp64 if value is fp64.
    sizes: height, width of every level in one list
    """
    B, _, M, D = value.shape
    Q = locations.shape[1]
    out = value.new_empty(B, Q, M * D)
    launch("forward", sizes, value, locations, [value, locations, weights], [out])
    return out


def backward(grad_out, value, sizes, locations, weights):
    """Return the gradients of value, locations and weights; arguments as in `forward`.

    That of value is summed in the dtype of locations, in an order that varies between calls.
    """
    grad_value = torch.zeros_like(value, dtype=locations.dtype)
    grad_locations = torch.empty_like(locations)
    grad_weights = torch.empty_like(weights)
    inputs = [grad_out, value, locations, weights]
    results = [grad_value, grad_locations, grad_weights]
    launch("backward", sizes, value, locations, inputs, results)
    return grad_value.to(value.dtype), grad_locations, grad_weights
