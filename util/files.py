"""Read and write files: errors name the file, and no file is left half written."""

import contextlib
import json
import os
from pathlib import Path

from util.cli import one_line


class DataError(ValueError):
    """An error in the user's files; its message names the file, the value and what to do."""


@contextlib.contextmanager
def wrap_read_errors(path, expected):
    """Turn whatever a library raises while it reads a file into a DataError of one line.

    Put only calls of libraries, and checks of what they return, into the block: bugs of our own
    must stay visible.

    path:     the file, named in the message
    expected: what the file should be, e.g. "valid JSON"
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: file not found") from None
    except Exception as error:  # Pillow, json and torch raise a dozen kinds
        reason = f"{type(error).__name__}: {one_line(error):.150}"
        raise DataError(f"{path}: not {expected}, or corrupted ({reason})") from None


def read_json(path):
    """Return the content of a JSON file in UTF-8, UTF-16 or UTF-32. Raises DataError."""
    with wrap_read_errors(path, "valid JSON"):
        return json.loads(Path(path).read_bytes())


def write_text(path, text):
    """Write a text file completely or not at all, even if the process is killed.

    A symbolic link stays, and the file that it points to is written. Raises DataError.
    """
    target = resolve_regular_file(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot write file ({error.strerror})") from None


def resolve_regular_file(path):
    """Return the path of a file with all symbolic links followed; the file need not exist.

    Raises DataError if a device, a pipe or a folder has this path.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise DataError(f"{path}: cannot write, not a regular file; choose a different path")
    return target


def check_writable(path):
    """Raise DataError unless a file can be written; called before a long computation."""
    target = resolve_regular_file(path)
    existed = target.exists()
    try:
        open(target, "a").close()
    except OSError as error:
        raise DataError(f"{path}: cannot write file ({error.strerror})") from None
    if not existed:
        target.unlink()
