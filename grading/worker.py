"""One grading process: both ends."""
import ctypes
import json
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time

if __name__ == "__main__":      # started by path: look for `grading` in the project, not in this file's folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from grading.answers import KINDS, REASONS, judge  # noqa: E402

MAX_REPLY = 8192        # bytes of a reply; a longer trace is cut
SEND_S = 2.0            # a worker that has not read its item by then is stuck


class Worker:
    """The parent's end of one worker: newline-delimited JSON over a socket pair."""

    def __init__(self, memory_mb, deadline_s):
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.proc = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), str(theirs.fileno()), str(memory_mb), str(deadline_s)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.sock.settimeout(SEND_S)
        self.ready, self.item, self.since = False, None, time.monotonic()   # since: of it, then its item

    def age(self):
        return time.monotonic() - self.since

    def send(self, item):
        self.sock.sendall(json.dumps(item).encode() + b"\n")    # ASCII: lone surrogates and NULs survive

    def receive(self):
        """The next message, or None if the worker died or broke the protocol: no reply is trusted."""
        try:
            message = json.loads(self.sock.recv(MAX_REPLY))     # short: it arrives in one piece
            if not self.ready:
                return message if message == {"ready": True} else None
            valid = (self.item is not None and message["id"] == self.item and message["reason"] in REASONS
                     and isinstance(message["ms"], float) and message["ms"] >= 0
                     and all(isinstance(text, str) for text in [message["extracted"], *message["trace"]]))
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None
        return message if valid else None

    def step_back(self):
        """Lowest priority for a suspect: it must not slow the start of the spare that may replace it."""
        try:
            os.setpriority(os.PRIO_PROCESS, self.proc.pid, 19)
        except OSError:
            pass                                                # it has just died


# ---- In the worker ------------------------------------------------------------------------------------

def _address_space():
    """Bytes that count against RLIMIT_AS. (Not ru_maxrss, which starts at the size of the parent.)"""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _forbid(event, args):
    """Audit hook: what sympy's parser evaluates may compute, and nothing else: no network, no processes.

    A fence, not a wall: Python raises no event for a few calls, and none for what C code does. The filters in
    front of the parsers, the limits of the process and its user's rights are the others.
    """
    if event.startswith(("socket.", "subprocess.", "ctypes.", "shutil.", "sqlite3.", "os.")):
        if event != "os.listdir":                               # which imports need
            raise PermissionError(f"a grader must not: {event}")
    if event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        raise PermissionError("a grader must not write files")


def _limit(which, value):
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, hard if which == resource.RLIMIT_CPU else value))


def main(fd, memory_mb, deadline_s):
    """Answers the items that arrive on socket `fd`, until the parent closes it."""
    for ignored in (signal.SIGINT, signal.SIGTERM):         # the parent handles them, and kills us
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # PR_SET_PDEATHSIG: die with it, mid-hang too
    _limit(resource.RLIMIT_AS, memory_mb << 20)
    _limit(resource.RLIMIT_CORE, 0)
    logging.disable(logging.CRITICAL)
    for kind in KINDS[:2]:                                  # warms up; no run is lost to silent zeros
        half = {"response": r"\boxed{\frac{2}{4}}", "answer": r"\frac{1}{2}", "strict_box": True}
        if (found := judge({"kind": kind} | half, 60))[0] != "ok":
            raise SystemExit(f"grading/worker.py: {kind} denies 2/4 = 1/2 ({found}): wrong version, or memory_mb "
                             "too low")
    _limit(resource.RLIMIT_FSIZE, 0)                        # after the imports, which may write .pyc files
    _limit(resource.RLIMIT_NPROC, 0)                        # root is not bound by it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)            # start-up errors were shown; no more is wanted
    # An int >= 1: a float makes Math-Verify's `parse` return [] in silence, and every reward 0.
    seconds = min(5, max(1, int(deadline_s / 2)))
    with socket.socket(fileno=fd) as sock:
        sys.addaudithook(_forbid)
        sock.sendall(b'{"ready": true}\n')
        for line in sock.makefile("rb"):
            item = json.loads(line)
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + deadline_s) + 1)
            start = time.monotonic()
            reason, extracted, trace = judge(item, seconds)
            # Parser caches grow for days, and at the limit every answer would fail: ask to be replaced.
            reply = {"id": item["id"], "reason": reason, "ms": 1e3 * (time.monotonic() - start),
                     "retire": _address_space() > memory_mb << 19, "extracted": extracted[:200],
                     "trace": [step[:300] for step in trace[:20]]}
            message = json.dumps(reply).encode() + b"\n"
            if len(message) > MAX_REPLY:
                message = json.dumps(reply | {"trace": []}).encode() + b"\n"
            sock.sendall(message)


if __name__ == "__main__":
    del sys.path[0]             # the project's data.py must not shadow a package's
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
