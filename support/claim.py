"""A folder that one process holds alone: two runs that write into one --out would mix their files.

    claim("out/run")              # until this process ends, however it ends; ValueError if another holds it
    is_claimed("out/run")         # no longer, once the folder was renamed or removed
    lock(file)                    # wait until no other rank writes

The lock is flock's, on the file .lock in the folder: the kernel lets go of it when the process ends (over NFS
the server does), so what a killed run leaves blocks nobody. The file says who holds it. Where a file system
has no locks, that note is all there is: if it names a process of this machine that still runs, the claim is
refused; if it names one of another machine, of which nothing can be known, a warning says so.

To copy: this file. It needs nothing but Python, on Linux.
"""
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_claimed = {}           # folder -> the descriptor of its lock, which is never closed: the lock would end
_warned = set()


def claim(folder):
    """Hold the folder, which is made if it is not there. To claim it once more is no error."""
    file = Path(folder) / ".lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    if is_claimed(folder):
        return
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    holder = _read(file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(_held(folder, holder)) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        here = holder.get("host") == socket.gethostname()
        if here and holder["start"] and _start_time(holder["pid"]) == holder["start"]:
            os.close(descriptor)
            raise ValueError(_held(folder, holder)) from None
        _warn_once(folder, error, f" The last to write there was {_who(holder)}." if holder else "")
    _claimed[str(folder)] = descriptor
    os.ftruncate(descriptor, 0)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid()),
          "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.pwrite(descriptor, json.dumps(me, indent=2).encode(), 0)


def is_claimed(folder):
    """Is this still the folder that this process has claimed, and no other of its name?"""
    try:
        return os.path.samestat(os.fstat(_claimed[str(folder)]), os.stat(Path(folder) / ".lock"))
    except (KeyError, OSError):
        return False


def lock(file):
    """Wait for the lock of an open file; it is released when that is closed. Without locks: a warning."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn_once(Path(file.name).parent, error)


def _start_time(pid):
    """Ticks from boot to the start of a process of this machine, which tell it from a later one that has got
    the same number. None if there is none, or it has ended."""
    try:
        # "pid (name) state ..." where the name may hold blanks and brackets; state is field 3, start is 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _read(file):
    """Who holds it, {} if that cannot be read."""
    try:
        holder = json.loads(file.read_text())
        return {name: holder[name] for name in ("host", "pid", "start", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _who(holder):
    if not holder:
        return "a process that has left no note"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _held(folder, holder):
    return (f"{folder}: {_who(holder)}, writes there; wait until it has ended, end it, or use another --out")


def _warn_once(folder, error, then=""):
    if str(folder) not in _warned:
        _warned.add(str(folder))
        warnings.warn(f"{folder}: this file system has no locks ({error}); make sure that nothing else "
                      f"writes there.{then}")
