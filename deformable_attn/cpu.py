"""The CPU kernel: cpu.cpp, built at first use by a C++ compiler and called through ctypes."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-shared", "-fPIC", "-pthread"]
NATIVE_FLAGS = [["-march=native"], ["-mcpu=native"], []]  # for this processor; compilers differ


# ---------------------------------------------------------------- build
def compiler():
    """Return the command of the C++ compiler, a list of words: $CXX, else c++, g++ or clang++.

    CXX may be several words, as in CXX="ccache g++". Raises RuntimeError if there is no compiler.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if not shutil.which(command[0]):
            raise RuntimeError(f"C++ compiler not found: CXX={command[0]}")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("C++ compiler not found: no c++, g++ or clang++ on PATH")


def run(command):
    """Run a compiler and return its output.

    Raises RuntimeError with its first error message, or OSError if it cannot be started.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace")
    if done.returncode == 0:
        return done.stdout
    message = done.stderr.strip()[:200]
    for line in done.stderr.splitlines():
        if "error" in line:
            message = line
            break
    raise RuntimeError(f"{Path(command[0]).name} failed: {message}")


def find_flags(cxx):
    """Return (flags, macros) for a compiler: the first NATIVE_FLAGS that it accepts are included.

    The macros, which it defines with these flags, tell its version and the processor.
    Raises RuntimeError if it accepts none.
    """
    for native in NATIVE_FLAGS:
        flags = FLAGS + native
        try:
            return flags, run(cxx + flags + ["-dM", "-E", "-x", "c++", os.devnull])
        except RuntimeError as error:
            last_error = error
    raise last_error


def cache_folder():
    """Return the folder of built kernels; if it is read-only, one for this process alone."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not cache:
        cache = Path.home() / ".cache"
    folder = Path(cache) / "deformable_attn"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="deformable_attn"))


def build():
    """Return the file of the built kernel, compiled now (seconds) if it is not in the cache.

    Raises RuntimeError or OSError if it cannot be built.
    """
    cxx = compiler()
    flags, macros = find_flags(cxx)
    key = hashlib.sha256(SOURCE.read_bytes() + f"{macros}{flags}".encode()).hexdigest()[:16]
    file = cache_folder() / f"cpu-{key}.so"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            unfinished = Path(folder) / file.name
            run(cxx + flags + [str(SOURCE), "-o", str(unfinished)])
            os.replace(unfinished, file)  # atomic: other processes find all of the file or nothing
    return file


@functools.cache
def load():
    """Return the library with the kernel's functions, built if necessary.

    Raises RuntimeError or OSError if it cannot be built.
    """
    file = build()
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # the file in the cache is corrupted
        file.unlink(missing_ok=True)
        return ctypes.CDLL(str(build()))


def description():
    """Build the kernel and describe it. Raises RuntimeError or OSError if it cannot be built."""
    load()
    return f"cpu.cpp, built by {Path(compiler()[0]).name}, {torch.get_num_threads()} threads"


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
