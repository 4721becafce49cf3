"""Command lines: types of flags, files of flags, and errors that end a command with one line."""

import argparse
import functools
import os
import re
import sys
from pathlib import Path

import torch

from util import distributed

ROOT = Path(__file__).resolve().parents[1]  # of this code


def one_line(error):
    """Return the message of an error in one line, without a worker process's traceback."""
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start}; save the file as UTF-8"
    _, _, text = str(error).rpartition("util.files.DataError: ")
    text = " ".join(text.split())
    if not text:
        return repr(error)
    return text


# ---------------------------------------------------------------- types of flags
LARGEST = 2**32  # of any number; only smaller limits are part of every message


def int_range(low, high=LARGEST):
    """Return an argparse type for whole numbers from `low` to `high`, both included."""

    def is_valid(value):
        return low <= value <= high

    return number_type(int, f"a whole number of at least {low}", high, is_valid)


def float_range(low, high=LARGEST, open_low=False):
    """Return an argparse type for numbers from `low` to `high`; open_low excludes `low` itself."""

    def is_valid(value):  # False for NaN
        if open_low:
            return low < value <= high
        return low <= value <= high

    if open_low:
        return number_type(float, f"a number greater than {low}", high, is_valid)
    return number_type(float, f"a number of at least {low}", high, is_valid)


def number_type(convert, expected, high, is_valid):
    """Return an argparse type: `convert` (int or float), then a check by `is_valid`.

    expected: what a valid number is, in words, without the limit `high`
    """

    def parse(text):
        message = f"expected {expected}"
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is not None and is_valid(value):
            return value
        if high < LARGEST or (value is not None and value > high):
            message += f" and at most {high}"
        raise argparse.ArgumentTypeError(f"{message}, got {text!r}")

    return parse


POSITIVE_INT = int_range(1)
NON_NEGATIVE_INT = int_range(0)
IMAGE_SIDE = int_range(1, 10_000)  # pixels
NUM_WORKERS = int_range(0, 256)  # processes
POSITIVE_FLOAT = float_range(0, open_low=True)
NON_NEGATIVE_FLOAT = float_range(0)
FRACTION = float_range(0, 1)


def parse_device(name):
    """Return the name of a device that works here; an argparse type.

    "auto" is the GPU if there is one, else the CPU. "cuda" is the GPU of this process. The device
    is tried with a kernel of torch: a copy also works on a GPU that is too old for them.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda" or (name.startswith("cuda") and distributed.launched_processes() > 1):
            name = f"cuda:{distributed.local_rank()}"
        (torch.ones(1, device=name) + 1).tolist()
    except ValueError as error:  # of the variables that torchrun sets
        raise argparse.ArgumentTypeError(str(error)) from None
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        message = f"device {name!r} is not available ({reason})"
        if "no kernel image" in reason:
            major, minor = torch.cuda.get_device_capability(name)
            message = f"this GPU cannot run torch's kernels (compute capability {major}.{minor})"
            message += "; choose another or --device cpu"
        raise argparse.ArgumentTypeError(message) from None
    return name


def default_amp(device):
    """Return the precision that is fast on a device: "bf16", "fp16" or "no".

    bf16:  CPUs with instructions for it (AVX-512 BF16, AMX), GPUs of compute capability 8.0 or more
    fp16:  older GPUs
    """
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bf16"
        return "fp16"
    if device != "cpu":
        return "no"
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if hasattr(torch.cpu, name) and getattr(torch.cpu, name)():  # missing in some versions
            return "bf16"
    return "no"


def usable_cores():
    """Return the number of cores that this process may use; a batch system may allow it only a few.

    macOS and Windows know no such limits.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    cores = os.cpu_count()  # None if unknown
    return 1 if cores is None else cores


# ---------------------------------------------------------------- parsing
class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leave the description as it is, and show defaults where there are any."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors; @FILE stands for the flags in a file with comments."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        if args is None:
            args = sys.argv[1:]
        try:
            words = self.expand_files(args)
        except RecursionError:
            self.error("a file of flags includes itself")
        self.reject_empty(words)
        return super().parse_known_args(words, namespace)

    def expand_files(self, words):
        """Replace each word @FILE by the flags in that file.

        argparse could do this, but without comments, and in the encoding of the terminal.
        """
        expanded = []
        for word in words:
            if word.startswith("@"):
                expanded += self.expand_files(self.read_flags(word[1:]))
            else:
                expanded.append(word)
        return expanded

    def read_flags(self, path):
        """Return the words in a file of flags; end with an error if it cannot be read."""
        words = []
        try:
            for line in find_recipe(path).read_text(encoding="utf-8-sig").splitlines():
                words += split_recipe_line(line)
        except (OSError, ValueError) as error:  # a missing file, a quote that is not closed …
            self.error(f"@{path}: cannot read flags file ({one_line(error)})")
        return words

    def reject_empty(self, words):
        """End with an error if a word is empty, as "$NAME" is if the variable is not set."""
        for previous, word in zip(["", *words], words):
            if word == "":
                where = previous if previous.startswith("-") else "an argument"
                self.error(f"{where} is empty; did you use an unset shell variable?")
            if word.startswith("--") and word.endswith("="):
                self.error(f"{word[:-1]} is empty; did you use an unset shell variable?")

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def find_recipe(path):
    """Return the path of a file of flags: in the current folder, else in that of this code."""
    path = Path(os.path.expanduser(path))
    if not path.exists() and (ROOT / path).exists():
        return ROOT / path
    return path


WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")  # parts with and without quotes
PART = re.compile(r"""'[^']*'|"[^"]*"|[^'"]+""")
VARIABLE = re.compile(r"\$(?:{(\w+)}|(\w+))")


def split_recipe_line(line):
    """Return the words of a line of flags, read as a shell reads it.

    Quotes keep spaces, # begins a comment, ~ and $NAME are replaced, but not in single quotes, and
    a backslash at the end is dropped. Another "\\" or "#" may be part of a path.
    Raises ValueError for a quote that is not closed, or a variable that is not set.
    """
    words = []
    rest = line.strip()
    while rest and not rest.startswith("#"):
        word = WORD.match(rest)
        if not word:
            raise ValueError(f"no closing quotation: {rest:.60}")
        words.append(expand_word(word[0]))
        rest = rest[word.end() :].strip()
    if words and words[-1] == "\\":
        words.pop()
    return words


def expand_word(word):
    """Return a word without its quotes, with variables replaced, and ~ at the beginning."""
    expanded = ""
    for part in PART.findall(os.path.expanduser(word)):
        quote = part[0]
        if quote in "'\"":
            part = part[1:-1]
        if quote != "'":
            part = VARIABLE.sub(variable_value, part)
        expanded += part
    return expanded


def variable_value(match):
    """Return the value of the variable in a match of VARIABLE. Raises ValueError."""
    name = match[1]  # of ${NAME}
    if name is None:
        name = match[2]  # of $NAME
    if name not in os.environ:
        raise ValueError(f"variable ${name} is not set; in single quotes it is no variable")
    return os.environ[name]


class InitAction(argparse.Action):
    """Collect `--init A --init_parts x --init B` as [[A, [x]], [B, None]]."""

    def __call__(self, parser, namespace, value, option=None):
        sources = list(namespace.init)
        if option == "--init":
            sources.append([value, None])
        elif not sources:
            parser.error(f"{option} must follow the --init it applies to")
        else:
            path, parts = sources.pop()
            if parts:
                parser.error(f"{option} given twice for {path}; list all parts in one {option}")
            sources.append([path, value])
        namespace.init = sources


# ---------------------------------------------------------------- errors that end a command
# Parts of the messages of PyTorch, CUDA, C++ and the system.
OUT_OF_MEMORY = (
    "out of memory",
    "tried to allocate",
    "allocate memory",
    "ALLOC_FAILED",
    "bad_alloc",
)
OPEN_FILES = ("Too many open files", "ancdata")
LOADER_PROCESS = ("DataLoader worker (pid", "Pin memory thread exited")
OTHER_PROCESS = ("closed by peer", "reset by peer")


def is_out_of_memory(error):
    """Return True if an error says that the memory of the computer or of the GPU is full."""
    return isinstance(error, MemoryError) or is_machine_error(error, OUT_OF_MEMORY)


def is_machine_error(error, parts):
    """Return True if PyTorch or the system raised an error whose message has one of these parts."""
    text = str(error)
    return isinstance(error, (RuntimeError, OSError)) and any(part in text for part in parts)


def error_message(error):
    """Return the line that an error ends a command with, or None if it is a bug."""
    text = one_line(error)
    if is_out_of_memory(error):
        message = "out of memory"
        if re.search("CUDA|CUBLAS|cuDNN|HIP|MPS", text):
            message = "out of GPU memory"
        size = re.search(r"allocate ([\d.]+ \w+)", text)
        if size:
            message += f" (no room for {size[1]})"
        remedy = "lower --batch_size (with more --grad_accum_steps), --image_size or --workers"
        return f"{message}; {remedy}; --resume continues a run with the same flags"
    if is_machine_error(error, OPEN_FILES):
        return "too many open files; lower --workers, or raise the limit (ulimit -n 65536)"
    if isinstance(error, RuntimeError) and is_machine_error(error, LOADER_PROCESS):
        message = "a data loading process was killed, probably out of memory or of /dev/shm"
        return f"{message}; lower --workers (0: none) or --batch_size; --resume continues a run"
    if isinstance(error, RuntimeError) and is_machine_error(error, OTHER_PROCESS):
        return "another process of this command has ended; its own message says why"
    if isinstance(error, torch.distributed.DistError):
        return f"the processes cannot communicate ({text:.500})"
    if isinstance(error, RuntimeError):
        return None
    if getattr(error, "filename", None):
        return f"{error.filename}: {error.strerror}; choose a different path"
    return text


# ---------------------------------------------------------------- commands
def cli_main(main):
    """Decorate the main of a script: wrong input ends it with one line, Ctrl-C with status 130."""

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # show ? for letters that the terminal cannot show
                stream.reconfigure(errors="replace")
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # as in `… | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # the status of a process that SIGPIPE ends
        except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
            message = error_message(error)
            if message is None:
                raise  # a bug, with its traceback
            sys.exit(f"error: {message}")
        except KeyboardInterrupt:
            sys.exit(130)

    return run
