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
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
)
NATIVE = ("-march=native", "-mcpu=native")  # this machine's instructions, as a compiler knows them


def compiler():
    """The C++ compiler's command: $CXX, else c++, g++ or clang++. RuntimeError without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={named[0]} is not found" if named else "no C++ compiler (c++, g++, clang++)"
    raise RuntimeError(missing)


def cache_folder():
    """Where built kernels are kept, or a folder for this process alone if that is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deformable_attn"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="deformable_attn"))


def run(*command):
    """The output of a compiler's run. Raises RuntimeError with its first complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              stdin=subprocess.DEVNULL)  # fmt: skip
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        lines = (line for line in done.stderr.splitlines() if "error" in line)
        complaint = next(lines, done.stderr.strip()[:200])
        raise RuntimeError(f"{Path(command[0]).name} failed: {complaint}")
    return done.stdout


def build():
    """The built kernel's file: from the cache, if source, flags, compiler and processor are the
    same, else compiled now (seconds). Raises RuntimeError."""
    cxx = compiler()
    for native in (*NATIVE, None):
        flags = (*FLAGS, native) if native else FLAGS
        try:  # a compiler's macros tell its version and, with these flags, the processor
            macros = run(*cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull)
            break
        except RuntimeError:
            if native is None:
                raise
    key = hashlib.sha256(
        "\n".join([SOURCE.read_text(encoding="utf-8"), macros, *flags]).encode()
    ).hexdigest()[:16]
    file = cache_folder() / f"cpu-{key}.so"
    if not file.exists():
        descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=file.parent)
        os.close(descriptor)
        try:
            run(*cxx, *flags, str(SOURCE), "-o", unfinished)
            os.replace(unfinished, file)  # at once: another process finds a whole file or none
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return file


@functools.cache
def load():
    """The kernel's functions. Raises RuntimeError that says what is missing."""
    file = build()
    try:
        library = ctypes.CDLL(str(file))
    except OSError:  # what is in the cache is no library
        file.unlink(missing_ok=True)
        try:
            library = ctypes.CDLL(str(build()))
        except OSError as error:
            raise RuntimeError(f"the built kernel cannot be loaded: {error}") from None
    for name in ("forward_f32", "forward_f64", "backward_f32", "backward_f64"):
        getattr(library, name).restype = ctypes.c_bool
    return library


def description():
    """What has been built, in words."""
    load()
    return f"cpu.cpp, built by {Path(compiler()[0]).name}, {torch.get_num_threads()} threads"


def call(name, value, spatial_shapes, locations, *tensors):
    """Run a function of the kernel on contiguous tensors; the last of them take its results."""
    N, S, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    sizes = (ctypes.c_int64 * (7 + 2 * L))(N, S, M, D, Q, L, P, *spatial_shapes)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function = getattr(load(), f"{name}_f64" if value.dtype == torch.float64 else f"{name}_f32")
    if not function(sizes, *pointers, ctypes.c_int64(torch.get_num_threads())):
        threads = torch.get_num_threads()
        raise MemoryError(f"no memory for {threads} times one or two maps of {S} x {D} values")


def forward(value, spatial_shapes, locations, weights):
    """The operator on contiguous tensors; locations and weights in fp32, or fp64 as value."""
    real = value.to(locations.dtype)
    N, _, M, D = value.shape
    out = real.new_empty(N, locations.shape[1], M * D)
    call("forward", real, spatial_shapes, locations, real, locations, weights, out)
    return out.to(value.dtype)


def backward(grad, value, spatial_shapes, locations, weights):
    """The gradients of value, locations and weights."""
    real, grad = value.to(locations.dtype), grad.to(locations.dtype)
    grads = [torch.empty_like(x) for x in (real, locations, weights)]
    call("backward", real, spatial_shapes, locations, grad, real, locations, weights, *grads)
    return grads[0].to(value.dtype), *grads[1:]
