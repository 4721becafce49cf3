"""Files: JSON in, text out whole or not at all, and errors that name the file."""

import contextlib
import json
import os
from pathlib import Path

from util.cli import one_line


class DataError(ValueError):
    """Something is wrong with the data; the message names the file, the value and what to do."""


@contextlib.contextmanager
def wrap_read_errors(path, what):
    """Whatever a library raises while it reads a file becomes a DataError of one line.
    Only calls of libraries, and looks at what they give, belong into it: our own mistakes elsewhere
    stay visible."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except Exception as error:  # Pillow, json and torch raise a dozen kinds
        why = f"{type(error).__name__}: {one_line(error):.150}"
        raise DataError(f"{path}: is not {what}, or it is damaged ({why})") from None


def read_json(path):
    with wrap_read_errors(path, "valid JSON"):
        return json.loads(Path(path).read_bytes())  # in any of Unicode's encodings


def write_text(path, text):
    """A file that is whole or not there, whenever the process ends. Links are followed, and what
    is no ordinary file stays as it is. Raises DataError."""
    target = resolve_regular_file(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def resolve_regular_file(path):
    """Where a file is behind links. DataError if a device, a pipe or a folder is there."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise DataError(f"{path}: cannot be written, it is no ordinary file; name another one")
    return target


def check_writable(path):
    """Whether a file can be written, before hours of work depend on it. Raises DataError."""
    target = resolve_regular_file(path)
    there = target.exists()
    try:
        open(target, "a").close()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    if not there:
        target.unlink()
