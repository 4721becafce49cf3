"""The CPU kernel: cpu.cpp, built at first use by a C++ compiler and called through ctypes."""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-shared", "-fPIC", "-pthread"]
NATIVE_FLAGS = [["-march=native"], ["-mcpu=native"], []]  # for this processor; compilers differ


# ---------------------------------------------------------------- build
def compilers():
    """Return the commands of C++ compilers, lists of words: $CXX, else c++, g++ and clang++.

    CXX may be several words, as in CXX="ccache g++". Raises RuntimeError if there is no compiler.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if not shutil.which(command[0]):
            raise RuntimeError(f"C++ compiler not found: CXX={command[0]}")
        return [command]
    commands = {}  # by the file that is run: c++ and g++ are often the same
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            commands.setdefault(os.path.realpath(path), [name])
    if not commands:
        raise RuntimeError("C++ compiler not found: no c++, g++ or clang++ on PATH")
    return list(commands.values())


def run(command):
    """Run a compiler and return its output. Raises RuntimeError with its first error message."""
    name = Path(command[0]).name
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "errors": "replace"}
    try:
        done = subprocess.run(command, **options)
    except OSError as error:
        raise RuntimeError(f"{name} cannot be started ({error.strerror})") from None
    if done.returncode == 0:
        return done.stdout
    message = done.stderr.strip()[:200]
    for line in done.stderr.splitlines():
        if "error" in line.lower():
            message = line
            break
    raise RuntimeError(f"{name} failed: {message}")


def build_key(command):
    """Return a key of what a command builds: it depends on the source, the flags, the compiler's
    version and the processor. The macros that the compiler defines tell the last two.

    Raises RuntimeError if the compiler does not accept the flags.
    """
    macros = run(command + ["-dM", "-E", "-x", "c++", os.devnull])
    return hashlib.sha256(SOURCE.read_bytes() + f"{macros}{command}".encode()).hexdigest()[:16]


def checksum(content):
    """Return a checksum of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def find_built(folder, key):
    """Return the built kernel with this key in a folder, or None. Its name ends with its checksum.

    A damaged file is removed, since loading it may kill the process.
    """
    for file in sorted(folder.glob(f"cpu-{key}-*.so")):
        if file.stem.endswith(checksum(file.read_bytes())):
            return file
        file.unlink(missing_ok=True)
    return None


def compile_into(folder, command, key):
    """Compile the kernel (seconds) and return its file in a folder.

    Other processes, also after a power loss, find all of the file or nothing.
    Raises RuntimeError if it cannot be compiled, OSError if the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / "cpu.so"
        run(command + [str(SOURCE), "-o", str(built)])
        content = built.read_bytes()
    file = folder / f"cpu-{key}-{checksum(content)}.so"
    unfinished = folder / f".{file.name}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as output:
            output.write(content)
            output.flush()
            os.fsync(output.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def build(folder):
    """Return the file of the kernel in a folder, compiled now if it is not there.

    Raises RuntimeError if it cannot be compiled, OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commands = {}  # by key, best first
    for compiler in compilers():
        for native in NATIVE_FLAGS:
            command = compiler + FLAGS + native
            try:
                key = build_key(command)
            except RuntimeError as error:
                last_error = error
                continue
            file = find_built(folder, key)
            if file:
                return file
            commands[key] = command
    for key, command in commands.items():
        try:
            return compile_into(folder, command, key)
        except RuntimeError as error:  # an old assembler may not know what -march=native emits
            last_error = error
    raise last_error


@functools.cache
def temporary_folder():
    """Return a folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="deformable_attn-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cache_folder():
    """Return the folder of built kernels; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not cache:
        cache = os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home
        return temporary_folder()
    return Path(cache) / "deformable_attn"


@functools.cache
def load():
    """Return the library with the kernel's functions, built if necessary.

    Raises RuntimeError or OSError if it cannot be built.
    """
    try:
        return ctypes.CDLL(str(build(cache_folder())))
    except OSError:  # the cache cannot be written, or nothing in it may be executed
        return ctypes.CDLL(str(build(temporary_folder())))


def description():
    """Build the kernel and describe it. Raises RuntimeError or OSError if it cannot be built."""
    load()
    return f"cpu.cpp, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------- call
def call(name, sizes, value, locations, tensors):
    """Call a function of the kernel.

    name:             "forward" or "backward"
    sizes:            height, width of every level in one list
    value, locations: two of the tensors, which tell the other sizes
    tensors:          inputs and results, contiguous, all of one dtype, in the order of cpu.cpp
    Raises MemoryError.
    """
    B, S, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    threads = torch.get_num_threads()
    numbers = [threads, B, S, M, D, Q, L, P] + sizes
    addresses = [tensor.data_ptr() for tensor in tensors]
    suffix = "f64" if value.dtype == torch.float64 else "f32"
    function = getattr(load(), f"{name}_{suffix}")
    function.restype = ctypes.c_bool
    if not function(c_array(ctypes.c_int64, numbers), c_array(ctypes.c_void_p, addresses)):
        raise MemoryError(
            f"out of memory allocating per-thread buffers ({threads} threads x {S} x {D} values)"
        )


def c_array(kind, numbers):
    """Return the numbers as an array of C."""
    return (kind * len(numbers))(*numbers)


def forward(value, sizes, locations, weights):
    """Return the operator's output.

    All tensors are contiguous; locations and weights are fp32, or fp64 if value is fp64.
    sizes: height, width of every level in one list
    """
    B, _, M, D = value.shape
    Q = locations.shape[1]
    real_value = value.to(locations.dtype)
    out = real_value.new_empty(B, Q, M * D)
    call("forward", sizes, real_value, locations, [real_value, locations, weights, out])
    return out.to(value.dtype)


def backward(grad_out, value, sizes, locations, weights):
    """Return the gradients of value, locations and weights; arguments as in `forward`."""
    real_grad_out = grad_out.to(locations.dtype)
    real_value = value.to(locations.dtype)
    grad_value = torch.empty_like(real_value)
    grad_locations = torch.empty_like(locations)
    grad_weights = torch.empty_like(weights)
    inputs = [real_grad_out, real_value, locations, weights]
    results = [grad_value, grad_locations, grad_weights]
    call("backward", sizes, real_value, locations, inputs + results)
    return grad_value.to(value.dtype), grad_locations, grad_weights


# ---------------------------------------------------------------- the machine
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")  # widest vectors last


def processor():
    """Return this processor's name, vector instructions and caches, as far as Linux knows them."""
    info = Path("/proc/cpuinfo")
    text = ""
    if info.exists():
        text = info.read_text()
    name = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    parts = [platform.machine()]
    if name:
        parts = [name[1]]
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    if flags:
        parts += [x for x in INSTRUCTIONS if x in flags[1].split()]
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level = (cache / "level").read_text().strip()
        size = (cache / "size").read_text().strip()
        if (cache / "type").read_text().strip() != "Instruction":
            parts.append(f"L{level} {size}")
    return ", ".join(parts)


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the system.

    By default every large activation is requested again, page by page, which took a fifth of a
    training step of Deformable DETR on a CPU with images of 512 pixels.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # the numbers of the options are those of malloc.h
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is allocated outside the heap …
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: … and nothing of the heap is returned
