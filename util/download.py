"""Download files of weights into torch's cache.

An interrupted download is continued, and a file appears in the cache when it is whole and has the
published hash.
"""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

TIMEOUT = 60  # seconds without a byte
CHUNK = 2**20  # bytes
DELETE = "delete this file to download it again"


def cache_folder():
    """Return the folder in which torch, torchvision and this module keep weights."""
    return Path(torch.hub.get_dir(), "checkpoints")


def cached_url(url):
    """Return the path of any URL's file in the cache, see `cached_file`."""
    key = hashlib.sha256(url.encode()).hexdigest()[:8]  # many files are called checkpoint.pth
    name = Path(urllib.parse.urlsplit(url).path).name[-100:]
    return cached_file(url, cache_folder() / f"{key}-{name}")


def cached_file(url, target, sha256=None):
    """Return the path of a URL's file in the cache, `target`; download it if it is not there.

    sha256: the file's hash or its first digits, if known. It is compared at each call, since files
            are also copied into the cache by hand.
    Raises ValueError that says what to do.
    """
    if not target.exists():
        download(url, target, sha256)
        return target
    problem = file_problem(target, sha256)
    if problem:
        raise ValueError(f"{target}: {problem}; {DELETE}")
    return target


def download(url, target, sha256=None):
    """Write a URL's file to `target`; the arguments are those of `cached_file`.

    What an interrupted call has received is kept next to it, and the next call continues there.
    Several processes may call this at once: one downloads, the others wait for it.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.parent):
            if target.exists():  # another process has downloaded it
                return
            receive(url, partial)
            problem = file_problem(partial, sha256)
            if problem:
                partial.unlink()
                raise OSError(problem)
            os.replace(partial, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        remedy = f"repeat the command to continue, or save this file yourself as {target}"
        raise ValueError(f"{url}: download failed ({error}); {remedy}") from None


@contextlib.contextmanager
def exclusive(folder):
    """Let one process at a time run this block; the system releases the lock of a dead process."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def receive(url, partial):
    """Append to the file `partial` what it lacks of a URL's file. Raises OSError if it ends early.

    Where the server cannot continue, the file is received from its start.
    """
    size = 0
    if partial.exists():
        size = partial.stat().st_size
    headers = {"User-Agent": "torch.hub"}  # some servers refuse Python's own
    if size > 0:
        headers["Range"] = f"bytes={size}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if size == 0 or error.code != 416:  # 416: there is no such range
            raise
        partial.unlink()
        receive(url, partial)
        return
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the address answers with a web page, such as a network's sign-in page")
        mode = "ab"
        sent_range = response.headers.get("Content-Range", f"bytes {size}-")
        if response.status != 206 or not sent_range.startswith(f"bytes {size}-"):
            mode = "wb"  # the server sends the whole file
            size = 0
        total = None
        if "Content-Length" in response.headers:
            total = size + int(response.headers["Content-Length"])
        bar = tqdm(
            desc=partial.stem, initial=size, total=total, unit="B", unit_scale=True, disable=None
        )
        with bar, open(partial, mode) as file:
            chunk = response.read(CHUNK)
            while chunk:
                file.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
                chunk = response.read(CHUNK)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size != total:
        raise OSError(f"it ended after {size:,} of {total:,} bytes")


def file_problem(path, sha256=None):
    """Return why a file cannot be the weights that were asked for, in words, or None.

    sha256: the first digits of its hash, if known
    """
    if is_web_page(path):
        return "is a web page, such as a network's sign-in page, not weights"
    if sha256 is not None:
        if not file_sha256(path).startswith(sha256):
            return "is damaged or another file (its SHA-256 differs from the published one)"
    elif is_zip(path):
        try:
            check_zip(path)
        except zipfile.BadZipFile:
            return "is damaged or incomplete"
    return None


def is_web_page(path):
    """Return True for a file that begins as HTML does."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def is_zip(path):
    """Return True for a file that begins as torch.save writes it, also if its end is missing."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def file_sha256(path):
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        chunk = file.read(CHUNK)
        while chunk:
            digest.update(chunk)
            chunk = file.read(CHUNK)
    return digest.hexdigest()


def check_zip(path):
    """Compare the checksums in a file of torch.save, as torch.load does not. Raises BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile
