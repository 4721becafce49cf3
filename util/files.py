"""Read and write files: errors name the file, and no file is left half written."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from util.cli import is_out_of_memory, one_line


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
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error):.150}"
        raise DataError(f"{path}: not {expected}, or corrupted ({reason})") from None


def read_json(path):
    """Return the content of a JSON file in UTF-8, UTF-16 or UTF-32. Raises DataError."""
    with wrap_read_errors(path, "valid JSON"):
        return json.loads(Path(path).read_bytes())


# ---------------------------------------------------------------- writing
UNFINISHED = ".unfinished-"  # begins the names of temporary files


@contextlib.contextmanager
def replace_file(path):
    """Yield a temporary path to write to; afterwards this file takes the place of `path`.

    So the file is written completely or not at all, even if the process is killed. A symbolic link
    stays, and the file that it points to is replaced. The temporary name is short, since that of
    `path` may be the longest possible.
    Raises OSError, which names `path`, or DataError if a device, a pipe or a folder is there.
    """
    target = resolve_regular_file(path)
    temporary = temporary_name(target)
    try:
        yield temporary
        with contextlib.suppress(OSError):  # there is no file yet, or files have no permissions
            shutil.copymode(target, temporary)
        try:
            os.replace(temporary, target)
        except OSError:  # a single file mounted into a container can only be overwritten
            shutil.copyfile(temporary, target)
    except OSError as error:
        if error.filename is not None:
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # usually it has been renamed
            temporary.unlink()


def temporary_name(target):
    """Return a path next to a file that no other file and no other process has."""
    return target.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")


def remove_unfinished(folder):
    """Remove the temporary files of processes that were killed at least an hour ago."""
    for file in Path(folder).glob(f"{UNFINISHED}*"):
        # its process has finished it just now, or it is another user's
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if time.time() - file.stat().st_mtime > 3600:
                file.unlink()


def write_text(path, text):
    """Write a text file completely or not at all, see `replace_file`. Raises DataError."""
    try:
        with replace_file(path) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or else a power loss may leave an empty file
    except OSError as error:
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
    """Raise DataError unless `replace_file` can write a file; called before a long computation."""
    reason = why_not_writable(path)
    if reason:
        raise DataError(f"{path}: cannot write file ({reason}); choose a different path")


def can_write(path):
    """Return True if a file that the user has not asked for can be written; else print why not."""
    reason = why_not_writable(path)
    if reason:
        print(f"{path} is not written ({reason})", file=sys.stderr)
    return not reason


def why_not_writable(path):
    """Return the system's reason, or None if a file can be written; it is left as it is."""
    target = resolve_regular_file(path)
    temporary = temporary_name(target)
    existed = target.exists()
    try:
        temporary.touch()
        open(target, "a").close()
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if not existed:
        target.unlink()
    return None


# ---------------------------------------------------------------- one process per folder
LOCK_NAME = ".lock"


class FolderLock:
    """A lock that keeps other processes out of a folder, until it is closed.

    It ends with this process, even if that is killed. It holds on all computers that share the
    folder, if their file system has locks; elsewhere, and on Windows, nothing is locked. Threads of
    this process are not kept out.
    """

    def __init__(self, folder):
        """Lock the folder. Raises DataError if another process has, or if it cannot be written."""
        self.path = Path(folder, LOCK_NAME)
        self.file = None
        if fcntl is None:
            return
        self.file = self.open_and_lock(folder)
        while self.is_removed():
            self.file.close()
            self.file = self.open_and_lock(folder)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def open_and_lock(self, folder):
        """Return the open file of the lock. Raises DataError, see __init__."""
        try:
            file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            message = f"{folder}: cannot write into this folder ({error.strerror})"
            raise DataError(f"{message}; choose a different one") from None
        try:
            # not flock: loader processes would keep that for seconds after this one is killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            message = f"{folder}: is in use by {file.read()}"
            file.close()
            message += "; wait until it ends, or choose a different folder"
            raise DataError(message) from None
        except OSError:  # the file system has no locks
            pass
        return file

    def is_removed(self):
        """Return True if the previous owner ended just now, and removed the file that is open."""
        try:
            return not os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return True

    def close(self):
        """Let other processes into the folder, and remove the note."""
        if self.file:
            self.path.unlink(missing_ok=True)
            self.file.close()
