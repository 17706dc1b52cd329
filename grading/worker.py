"""One grading process, both ends: `Worker` is the end of the parent, `main` runs in the process itself.

    worker = Worker(memory_mb=1000, deadline_s=10.0)        # launched, not waited for
    worker.receive()                                        # {"ready": True}, when it has imported sympy
    worker.send({"id": 0, "kind": "oat", "response": ..., "answer": ..., "strict_box": True})
    worker.receive()                                        # {"id": 0, "reason": "ok", ...}; None: it is lost

    python grading/worker.py FD MEMORY_MB DEADLINE_S        # how Worker launches it; of no use by hand

The parent is the Grader of reward.py, which says why these are processes, keeps a pool of them and kills the
late. The process is started afresh and by path. Forked, it would inherit the parent's CUDA context, the locks
that its threads hold, and its memory, which counts against the limit; by module name (python -m), it would
have to be told where the project lies.

To copy the Grader, take reward.py and all of grading/, side by side. Needed from elsewhere: math_verify.
"""
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

# Python looks for the modules of a script in the script's own folder, but the package `grading` lies in the
# folder above. That one goes first: no other package called grading, on PYTHONPATH, shall stand in.
if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from grading.answers import REASONS, judge  # noqa: E402  (after the line above)

MAX_REPLY = 8192        # bytes of a reply; a longer trace is cut
SEND_S = 2.0            # a worker that has not read its item by then is stuck


class Worker:
    """The parent's end of one worker: one JSON object a line, each way, over a pair of connected sockets.

    ready   whether the process has said that it can grade
    item    number of the item that it is grading, or None
    since   when it was launched, or when it was given its item (seconds of time.monotonic)
    """

    def __init__(self, memory_mb, deadline_s):
        """Launch the process, with the limits of `main`, and return at once."""
        self.sock, theirs = socket.socketpair()
        script = os.path.abspath(__file__)
        # This end of `theirs` is closed as soon as the process has its own: then, when the process dies, the
        # system closes the last one, and our recv returns nothing instead of waiting for ever.
        with theirs:
            self.proc = subprocess.Popen(
                [sys.executable, script, str(theirs.fileno()), str(memory_mb), str(deadline_s)],
                pass_fds=[theirs.fileno()],             # every other file of ours is closed in the process
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,              # stderr stays: a failed start is to be seen
                env={**os.environ, "OMP_NUM_THREADS": "1"})     # grading is one thread's work
        self.sock.settimeout(SEND_S)
        self.ready = False
        self.item = None
        self.since = time.monotonic()

    @property
    def idle(self):
        return self.ready and self.item is None

    @property
    def busy(self):
        return self.item is not None

    def age(self):
        """Seconds since it was launched or, once it has an item, since it was given that."""
        return time.monotonic() - self.since

    def send(self, item):
        """Give it an item to grade. OSError: it has died. TimeoutError, which is one: it is stuck."""
        # json.dumps writes ASCII: lone surrogates and NULs, which no encoding takes, arrive as they are.
        self.sock.sendall(json.dumps(item).encode() + b"\n")

    def receive(self):
        """The next message, or None if the process died or broke the protocol.

        To be called when the socket has something to read. What comes is not trusted: the text that was
        graded may have taken over the process.
        """
        try:
            message = json.loads(self.sock.recv(MAX_REPLY))     # short: it arrives in one piece
            if self._follows_protocol(message):
                return message
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            pass                                                # no JSON (nothing at all, from the dead), or
        return None                                             # JSON of another shape

    def _follows_protocol(self, message):
        if not self.ready:
            return message == {"ready": True}
        if self.item is None or message["id"] != self.item:     # nobody asked, or not for this
            return False
        if message["reason"] not in REASONS:
            return False
        if not isinstance(message["ms"], float) or not message["ms"] >= 0:      # not >=: nan is refused, too
            return False
        texts = [message["extracted"], *message["trace"]]
        return all(isinstance(text, str) for text in texts)

    def step_back(self):
        """Lowest priority for a suspect: it must not slow the start of the spare that may replace it."""
        try:
            os.setpriority(os.PRIO_PROCESS, self.proc.pid, 19)
        except OSError:
            pass                                                # it has just died


# ---- In the process -----------------------------------------------------------------------------------

def main(fd, memory_mb, deadline_s):
    """Grade the items that arrive on socket `fd`, until the parent closes it.

    memory_mb   MiB of address space: what needs more ends in a MemoryError, or in a crash
    deadline_s  after which the parent kills. Here it sets an earlier limit on each parse and comparison (half
                of it, but 1 to 5 s), so that most items end without a kill, and a later one on CPU time
    SystemExit, with the reason on stderr, if a grader does not work.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM):             # the parent handles them, and kills us
        signal.signal(ignored, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)   # die with the parent, in mid-hang, too
    _limit(resource.RLIMIT_AS, memory_mb << 20)
    _limit(resource.RLIMIT_CORE, 0)                             # no dump of a gigabyte for every crash
    logging.disable(logging.CRITICAL)
    _grade_a_half()
    _limit(resource.RLIMIT_FSIZE, 0)                            # after the imports: they may write .pyc files
    _limit(resource.RLIMIT_NPROC, 0)                            # no processes; root is not bound by it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)                # no stderr: start-up errors were shown
    # An int >= 1: a float makes Math-Verify's `parse` return [] in silence, and every reward 0.
    seconds = min(5, max(1, int(deadline_s / 2)))
    with socket.socket(fileno=fd) as sock:
        sys.addaudithook(_forbid)                               # for good: a hook cannot be removed
        sock.sendall(b'{"ready": true}\n')
        for line in sock.makefile("rb"):
            item = json.loads(line)
            # It ends a process that hangs and that nobody kills, because the parent was stopped itself. It is
            # on all CPU time since the launch, so it moves with each item.
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + deadline_s) + 1)
            sock.sendall(_reply(item, seconds, memory_mb))


def _grade_a_half():
    """Import and warm up both graders, and see them work: no run is lost to silent zeros."""
    item = {"response": r"\boxed{\frac{2}{4}}", "answer": r"\frac{1}{2}", "strict_box": True}
    for kind in ("math-verify", "oat"):
        found = judge({"kind": kind, **item}, 60)
        if found[0] != "ok":
            raise SystemExit(f"grading/worker.py: {kind} denies 2/4 = 1/2 ({found}): wrong version, or "
                             "memory_mb too low")


def _reply(item, seconds, memory_mb):
    """Grade one item -> its reply, a line of at most MAX_REPLY bytes."""
    start = time.monotonic()
    reason, extracted, trace = judge(item, seconds)
    reply = {"id": item["id"], "reason": reason, "ms": 1e3 * (time.monotonic() - start)}
    # Parser caches grow for days, and at the limit every answer would fail: ask to be replaced at half of it.
    reply["retire"] = _address_space() > (memory_mb << 20) // 2
    reply["extracted"] = extracted[:200]
    reply["trace"] = [step[:300] for step in trace[:20]]
    message = json.dumps(reply).encode() + b"\n"
    if len(message) > MAX_REPLY:                # in JSON, a character may take 12 bytes
        reply["trace"] = []
        message = json.dumps(reply).encode() + b"\n"
    return message


def _address_space():
    """Bytes that count against RLIMIT_AS. (Not ru_maxrss, which starts at the size of the parent.)"""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _limit(which, value):
    """Set a limit of this process: the soft one, which binds, and the hard one, to which it may be raised."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)                # whoever started the run may have set a lower one
    if which != resource.RLIMIT_CPU:            # which has to be raised for the next item
        hard = value
    resource.setrlimit(which, (value, hard))


def _forbid(event, args):
    """Audit hook, which Python calls before it does what `event` names: what sympy's parser evaluates may
    compute, and nothing else: no network, no processes, no writing.

    A fence, not a wall: Python raises no event for a few calls, and none for what C code does. The filters in
    front of the parsers, the limits of the process and its user's rights are the others.
    """
    if event.startswith(("socket.", "subprocess.", "ctypes.", "shutil.", "sqlite3.", "os.")):
        if event != "os.listdir":               # which imports need
            raise PermissionError(f"a grader must not: {event}")
    if event == "open":
        flags = args[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            raise PermissionError("a grader must not write files")


def _leave_project():
    """Take the project's folders off sys.path, wherever they are on it.

    sympy and Math-Verify are imported only now, and what they import must not be found in the project's
    data.py, model.py or eval.py. `grading`, imported by now, keeps its own folder.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    project = os.path.dirname(here)
    del sys.path[0]                             # which was inserted above
    unwanted = [os.path.realpath(here)]         # which Python has put there, for its script
    # PYTHONPATH may name the project. It stays if it was copied to where the packages themselves lie.
    if not os.path.isdir(os.path.join(project, "math_verify")):
        unwanted.append(os.path.realpath(project))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) not in unwanted]


if __name__ == "__main__":
    _leave_project()
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
