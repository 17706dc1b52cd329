"""Files on a disk that may be full, or slow to let go of what is removed.

    free_bytes("out/run")                            # of the disk that it lies, or will lie, on
    with words_if_full("out/run/hf"): ...            # an error for want of room says so, and how much is free
    append_whole(path, "a line\\n"); write_whole(path, text)      # all of it or nothing
    discard("out/run/checkpoints/step-50")           # warns where it cannot, and the next one tries again

To copy: this file. It needs nothing but Python.
"""
import errno
import json
import math
import os
import re
import shutil
import time
import warnings
from contextlib import contextmanager
from pathlib import Path


def free_bytes(path):
    """Bytes that this user may still write where `path` lies, or its nearest folder that exists. inf where
    the file system does not say. A quota of the user is not in it."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else math.inf


def amount(size):
    """
    >>> amount(91_440_000_000), amount(1_900_000), amount(math.inf)
    ('91.4 GB', '1.9 MB', 'an unknown amount')
    """
    if size == math.inf:
        return "an unknown amount"
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# A disk or a quota is full; a file may not get larger (ulimit -f, some file systems).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error):
    """Is this error, or one that caused it, for want of room (NO_ROOM)?"""
    while error is not None:
        if getattr(error, "errno", None) in NO_ROOM:
            return True
        # safetensors is written in Rust, whose errors carry the number in their text alone.
        number = re.search(r"os error (\d+)\b", str(error))
        if number and int(number[1]) in NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def words_if_full(path):
    """Inside, an error for want of room becomes an OSError that says where, how much is free, what to do. A
    folder .partial-NAME beside `path`, which may be what fills the disk, is removed."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        discard(Path(path).with_name(f".partial-{Path(path).name}"))
        raise OSError(f"{path}: no room on the disk (or in a quota, or for a file of that size), "
                      f"{amount(free_bytes(path))} free; make room, then start the same command again "
                      "(srft.py with --resume)") from error


def append_whole(file, text):
    """Append to a file, opened for that without a buffer, all of `text`; where the disk is full, nothing."""
    left, end = text.encode(), file.seek(0, os.SEEK_END)
    with words_if_full(file.name):
        try:
            while left:
                left = left[file.write(left):]        # a disk that fills up takes a part first
            os.fsync(file.fileno())                   # some file systems find out only now
        except OSError:
            file.truncate(end)                        # the next line would be glued to half a line
            raise


def write_whole(path, text):
    """Write a file at once: no reader, no kill and no full disk sees or leaves a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")        # beside it: a rename is whole only within a file system
    with words_if_full(path):
        try:
            with new.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())              # else a power cut may leave the new name without content
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)              # it may be what fills the disk
            raise


def read_json(path):
    """A JSON file's content. Raises ValueError, naming the file, if it is empty, cut short or no JSON."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not whole ({error}); put it back as it was") from None


def discard(path):
    """Remove a folder, file or link, if it is there (of a link not what it leads to). Where that fails (files
    open over NFS, or not ours), warn and go on.

    It gets a hidden name first: half removed under its own name, it would still look like what it was.
    """
    hidden = path = Path(path)
    try:
        if os.path.lexists(path) and not path.name.startswith(".removing-"):
            hidden = path.with_name(f".removing-{path.name.lstrip('.')}-{time.time_ns()}")
            path.rename(hidden)
        if hidden.is_dir() and not hidden.is_symlink():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed, and takes room on the disk: {error}")


def discard_leftovers(folder):
    """Remove what a kill has left half written in a folder, and, once more, what could not be removed."""
    for path in [*Path(folder).glob(".partial-*"), *Path(folder).glob(".removing-*")]:
        discard(path)
