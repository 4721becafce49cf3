"""The CPU kernel: cpu.cpp, built at first use by a C++ compiler and called through ctypes."""

import contextlib
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
FLAGS = "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -shared -fPIC -pthread".split()
NATIVE = ["-march=native"], ["-mcpu=native"], []  # this machine's instructions; compilers differ


def compiler():
    """The C++ compiler's command: $CXX, else c++, g++ or clang++. RuntimeError without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f"CXX={named[0]} is not found" if named else "found no c++, g++ or clang++")


def cache_folder():
    """Where built kernels are kept, or a folder for this process alone if that is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deformable_attn"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="deformable_attn"))


def run(*command):
    """The output of a compiler's run. Raises RuntimeError with its first complaint, or OSError."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace")
    if done.returncode:
        lines = (line for line in done.stderr.splitlines() if "error" in line)
        complaint = next(lines, done.stderr.strip()[:200])
        raise RuntimeError(f"{Path(command[0]).name} failed: {complaint}")
    return done.stdout


def build():
    """The built kernel's file: cached or compiled now (seconds). Raises RuntimeError or OSError."""
    cxx = compiler()
    for native in NATIVE:  # the last one works everywhere
        flags = [*FLAGS, *native]
        try:  # the macros tell the compiler's version and, with these flags, the processor
            macros = run(*cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull)
            break
        except RuntimeError:
            if not native:
                raise
    key = hashlib.sha256(SOURCE.read_bytes() + f"{macros}{flags}".encode()).hexdigest()[:16]
    file = cache_folder() / f"cpu-{key}.so"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            run(*cxx, *flags, str(SOURCE), "-o", f"{folder}/{file.name}")
            os.replace(f"{folder}/{file.name}", file)  # at once: others find a whole file or none
    return file


@functools.cache
def load():
    """The kernel's functions. Raises RuntimeError or OSError that says what is missing."""
    file = build()
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # what is in the cache is no library
        file.unlink(missing_ok=True)
        return ctypes.CDLL(str(build()))


def description():
    """What has been built, in words."""
    load()
    return f"cpu.cpp, built by {Path(compiler()[0]).name}, {torch.get_num_threads()} threads"


def call(name, spatial_shapes, inputs, results):
    """Run a function of the kernel on contiguous tensors; the last inputs are those of forward."""
    value, locations, _ = inputs[-3:]
    (N, S, M, D), (_, Q, _, L, P, _) = value.shape, locations.shape
    threads = torch.get_num_threads()
    sizes = (ctypes.c_int64 * (8 + 2 * L))(threads, N, S, M, D, Q, L, P, *spatial_shapes)
    addresses = [tensor.data_ptr() for tensor in (*inputs, *results)]
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    function = getattr(load(), f"{name}_f64" if value.dtype == torch.float64 else f"{name}_f32")
    function.restype = ctypes.c_bool
    if not function(sizes, pointers):
        raise MemoryError(f"no memory for {threads} times one or two maps of {S} x {D} values")


def forward(value, spatial_shapes, locations, weights):
    """The operator on contiguous tensors; locations and weights in fp32, or fp64 as value."""
    real = value.to(locations.dtype)
    out = real.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    call("forward", spatial_shapes, (real, locations, weights), [out])
    return out.to(value.dtype)


def backward(grad, value, spatial_shapes, locations, weights):
    """The gradients of value, locations and weights."""
    inputs = grad.to(locations.dtype), value.to(locations.dtype), locations, weights
    grads = [torch.empty_like(x) for x in inputs[1:]]
    call("backward", spatial_shapes, inputs, grads)
    return grads[0].to(value.dtype), *grads[1:]
