"""One grading process, both ends: `Worker` is the end of the parent, `main` runs in the process itself.

    worker = Worker(memory_mb=1000, deadline_s=10.0)        # launched, not waited for
    worker.receive()                                        # {"ready": True, ...}, when all is loaded
    worker.send({"id": 0, "kind": "oat", "response": ..., "answer": ..., "strict_box": True})
    worker.receive()                                        # {"id": 0, "reason": "ok", ...}; None: it is lost

    python grading/worker.py FD MEMORY_MB DEADLINE_S [FILE FUNCTION]      # how Worker launches it

    run -- Grader (reward.py)
            |-- worker                  loads sympy and warms up once; reads no response itself
            |     '-- child             grades one response behind a fence, writes its verdict, ends
            '-- worker ...

Text from outside is parsed in a child alone. The child is forked from the worker, so it is warm from the
start, and it ends with its response: no cache, no patched function, no leftover of one grading reaches the
next. One that is late is killed, which costs a fork (2 ms) and not a start (1 s). The parent is the Grader of
reward.py, which says why these are processes, and keeps a pool of workers.

The worker itself is started afresh and by path. Forked, it would inherit the parent's CUDA context, the
locks that its threads hold, and its memory, which counts against the limit; by module name (python -m), it
would have to be told where the project lies. Of the environment it gets what it needs (KEPT): no tokens.

To copy the Grader, take reward.py and all of grading/, side by side. Needed from elsewhere: math_verify, and
for the whole of the fence pyseccomp.
"""
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time

# Python looks for the modules of a script in the script's own folder, but the package `grading` lies in the
# folder above. That one goes first: no other package called grading, on PYTHONPATH, shall stand in.
if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from grading import custom, fence, warmup  # noqa: E402  (after the line above)
from grading.answers import KINDS, REASONS, judge, misstated  # noqa: E402
from grading.statement import FAULTS  # noqa: E402

MAX_REPLY = 8192        # bytes of a reply; a longer trace is cut
SEND_S = 2.0            # a worker that has not read its item by then is stuck
# Of the environment: what Python and the system's loader need to find their files, and to read text.
KEPT = ("PATH", "HOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LANGUAGE")
KEPT_PREFIXES = ("PYTHON", "LC_")


def well_formed(reply, number):
    """Whether this is a verdict on item `number`. It may be anything that JSON can say."""
    try:
        texts = [reply["extracted"], *reply["trace"]]
        ours = reply["id"] == number
        known = reply["reason"] in (*REASONS, "killed") and reply["fault"] in ("", *FAULTS)
        took = reply["ms"]
    except (TypeError, LookupError):
        return False
    if not ours or not known:
        return False
    if not isinstance(took, float) or not took >= 0:        # not >=: nan is refused, too
        return False
    return all(isinstance(text, str) for text in texts)


class Worker:
    """The parent's end of one worker: one JSON object a line, each way, over a pair of connected sockets.

    ready   whether the process has said that it can grade
    item    number of the item that it is grading, or None
    since   when it was launched, or when it was given its item (seconds of time.monotonic)
    """

    def __init__(self, memory_mb, deadline_s, reward=None):
        """Launch the process, with the limits of `main`, and return at once. reward: a custom.Reward."""
        self.sock, theirs = socket.socketpair()
        script = os.path.abspath(__file__)
        command = [sys.executable, script, str(theirs.fileno()), str(memory_mb), str(deadline_s)]
        stdin = subprocess.DEVNULL
        if reward is not None:
            command += [reward.path, reward.name]
            stdin = os.memfd_create("reward")           # a file in memory; a pipe may be too small
            os.write(stdin, reward.source)
        # This end of `theirs` is closed as soon as the process has its own: then, when the process dies, the
        # system closes the last one, and our recv returns nothing instead of waiting for ever.
        with theirs:
            self.proc = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],             # every other file of ours is closed in the process
                stdin=stdin,
                stdout=subprocess.DEVNULL,              # stderr stays: a failed start is to be seen
                env=_environment())
        if reward is not None:
            os.close(stdin)
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

        To be called when the socket has something to read.
        """
        try:
            message = json.loads(self.sock.recv(MAX_REPLY))     # short: it arrives in one piece
        except (OSError, ValueError, RecursionError):           # no JSON; of the dead, nothing at all
            return None
        if self.ready:
            return message if self.busy and well_formed(message, self.item) else None
        if not isinstance(message, dict) or message.get("ready") is not True and "error" not in message:
            return None
        return message


def _environment():
    """What a worker's environment holds."""
    kept = {"OMP_NUM_THREADS": "1"}             # grading is one thread's work, and only one thread may fork
    for name, value in os.environ.items():
        if name in KEPT or name.startswith(KEPT_PREFIXES):
            kept[name] = value
    return kept


# ---- In the process -----------------------------------------------------------------------------------

def main(fd, memory_mb, deadline_s, reward=None):
    """Have the items that arrive on socket `fd` graded, each in a child, until the parent closes it.

    memory_mb   MiB of address space, of the worker and of each child: what needs more ends in a MemoryError,
                or in a crash
    deadline_s  after which a child is killed. In it, each parse and comparison has an earlier limit (half of
                it, but 1 to 5 s), so that most end without a kill, and its CPU time a later one
    reward      a custom.Reward, a kind of grader by its name; if it cannot be loaded, the parent is told why
    SystemExit, with the reason on stderr, if a grader does not work.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM):             # the parent handles them, and kills us
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # ignored, children would be gone unwaited for
    fence.die_with_parent()
    fence.limit(resource.RLIMIT_AS, memory_mb << 20)
    fence.limit(resource.RLIMIT_CORE, 0)                        # no dump of a gigabyte for every crash
    logging.disable(logging.CRITICAL)
    warmup.warm_up()
    sock = socket.socket(fileno=fd)
    own = None
    if reward is not None:
        try:
            own = custom.load(reward)
        except ValueError as error:
            sock.sendall(json.dumps({"error": str(error)[:500]}).encode() + b"\n")
            return
    children = _Children(sock, own)
    unfenced = children.try_out()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)                # no stderr: start-up errors were shown
    # A collection of garbage writes to all that it looks at, and a child's first write to a page copies it.
    gc.collect()
    gc.freeze()
    sock.sendall(json.dumps({"ready": True, "unfenced": unfenced}).encode() + b"\n")
    for line in sock.makefile("rb"):
        sock.sendall(children.grade(json.loads(line), deadline_s))


class _Children:
    """Forks a child for each item, waits for its reply, and sees to its end."""

    def __init__(self, sock, own=None):
        self.sock = sock                # to the parent: not for children
        self.own = own                  # grades by the user's function
        self.calls, self.missing = fence.call_filter()
        self.ended = []                 # those that were killed, and may not be gone yet

    def try_out(self):
        """See that a child can grade; returns what its fence lacks, or "". No run is lost to silent zeros."""
        right = warmup.lesson("oat", 0)         # this kind does all that the others do
        found = json.loads(self.grade(right, deadline_s=60.0))
        if found["reason"] != "ok" and self.calls is not None:
            self.calls = None           # a system that asks for calls that CALLS lacks, or refuses filters
            self.missing = f"the system does not take it: {found['reason']} {found['trace']}"
            found = json.loads(self.grade(right, deadline_s=60.0))
        if found["reason"] != "ok":
            raise SystemExit(f"grading/worker.py: a child denies 2/4 = 1/2 ({found}): memory_mb too low?")
        return self.missing

    def grade(self, item, deadline_s):
        """The reply to an item, as a line: its child's, or the verdict "timeout" or "killed" in its place."""
        start = time.monotonic()
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            self._be_the_child(item, deadline_s, ours, theirs)
        os.close(theirs)                # now the end of the child is the end of the file
        try:
            line, late = _read_line(ours, start + deadline_s)
        finally:
            os.close(ours)
            os.kill(child, signal.SIGKILL)      # whatever it is still at: nothing goes on beyond its verdict
            self.ended.append(child)
            self._reap()
        try:
            if well_formed(json.loads(line), item["id"]):
                return line
        except (ValueError, RecursionError):
            pass
        reply = {"id": item["id"], "reason": "timeout" if late else "killed", "extracted": "", "trace": [],
                 "fault": "", "ms": 1e3 * (time.monotonic() - start)}
        return json.dumps(reply).encode() + b"\n"

    def _be_the_child(self, item, deadline_s, ours, theirs):
        """Grade, write the reply and end, however that goes: what comes after the fork is the worker's."""
        try:
            os.dup2(theirs, fence.REPLY_FD)
            for file in (ours, theirs, self.sock.fileno()):
                if file != fence.REPLY_FD:
                    os.close(file)
            fence.die_with_parent()
            fence.put_up(self.calls, deadline_s)
            # An int >= 1: a float makes Math-Verify's `parse` return [] in silence, and every reward 0.
            seconds = min(5, max(1, int(deadline_s / 2)))
            os.write(fence.REPLY_FD, _reply(item, seconds, self.own))
        finally:
            os._exit(0)                 # not sys.exit: no handlers, no buffers

    def _reap(self):
        """Let go of those that are gone. No wait: giving back gigabytes takes the kernel up to 0.5 s."""
        left = []
        for child in self.ended:
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                left.append(child)
        self.ended = left


def _read_line(fd, deadline):
    """(what comes on fd, until it is a line, a reply long or at its end; whether the deadline came first)."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_REPLY:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return line, True
        more = os.read(fd, MAX_REPLY - len(line))
        if not more:
            break
        line += more
    return line, False


def _reply(item, seconds, own):
    """Grade one item -> its reply, a line of at most MAX_REPLY bytes."""
    start = time.monotonic()
    if item["kind"] in KINDS:
        reason, extracted, trace = judge(item, seconds)
    else:
        reason, extracted, trace = own(item)
    reply = {"id": item["id"], "reason": reason, "ms": 1e3 * (time.monotonic() - start)}
    reply["fault"] = ""
    if reason == "ok" and item["kind"] in ("math-verify", "oat"):      # a letter has no faults
        reply["fault"] = misstated(item["response"], item["answer"], extracted) or ""
    reply["extracted"] = extracted[:200]
    reply["trace"] = [step[:300] for step in trace[:20]]
    message = json.dumps(reply).encode() + b"\n"
    if len(message) > MAX_REPLY:                # in JSON, a character may take 12 bytes
        reply["trace"] = []
        message = json.dumps(reply).encode() + b"\n"
    return message


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
    given = None
    if len(sys.argv) > 4:
        given = custom.Reward(sys.argv[4], sys.argv[5], os.pread(0, os.fstat(0).st_size, 0))
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), given)
