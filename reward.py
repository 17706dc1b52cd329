r"""The binary reward of Eq. A2, computed where hostile text can do no harm.

    R(x, y) = 1 if the answer in response y equals the reference answer of x, else 0        (Eq. A2)

"Equals" is Math-Verify's verdict on the text after the last `</think>`; A2 has no reward for format.

    with Grader() as grader:
        grader.grade([r"so it is $\boxed{\frac12}$", r"\boxed{7}"], ["0.5", "8"])
        # [Verdict(reward=1.0, reason='ok', ms=3.1), Verdict(reward=0.0, reason='wrong', ms=2.2)]

Why processes, and not a call, a thread or a signal: a response is text that a model wrote, and Math-Verify
hands it to a LaTeX parser and to sympy. `9**9**9**9` or 100,000 open parentheses may run for ever, eat all
memory or crash the interpreter. Math-Verify's own timeouts are SIGALRM: main thread only, cancelling any
other alarm, and not delivered while C code runs (with gmpy2 `(10^9)!` hangs past them). The one limit that
always holds is SIGKILL, so the text is parsed by workers that can be killed and replaced. Only JSON comes
back: unpickling a reply would let a compromised worker run code here.
"""
import ctypes
import json
import logging
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass

MAX_CHARS = 50_000      # of a longer text only the end is graded: answers stand at the end
STARTUP_S = 120.0       # importing sympy takes 0.5 s, but minutes for 200 workers on a cold network disk
SEND_S = 2.0            # a worker that has not read its item by then is stuck
MAX_FAILURES = 3        # workers lost in a row before they did anything: the installation, not a response
REASONS = ("ok", "wrong", "no_box", "unclosed", "parse_fail", "timeout")    # what a worker may answer


@dataclass
class Verdict:
    r"""`reward` is 1.0 or 0.0 (Eq. A2), `ms` the milliseconds from hand-out to verdict, `reason` one of

    ok          equal to the reference answer; the only reason with reward 1.0
    wrong       something was extracted, and it is not equal
    no_box      nothing could be extracted, and there is no \boxed{...}
    unclosed    nothing could be extracted, and the last \boxed{ is never closed; or a missing </think>
    parse_fail  a closed box that is no mathematics, or a reference answer that cannot be parsed
    timeout     stopped by Math-Verify's timeout, or killed at the deadline
    killed      the worker died on it (memory, crash) or answered nonsense
    truncated   never from `Grader`: for callers who know that the generation hit its token limit
    """
    reward: float
    reason: str
    ms: float


def answer_text(response):
    """The graded part of a response: what follows the last "</think>", or all of it if there is none."""
    return response.rpartition("</think>")[2]


class Grader:
    """Grades responses with Math-Verify in worker processes of its own; a context manager.

    workers     processes that grade at the same time; default: CPUs / LOCAL_WORLD_SIZE (set by torchrun)
    deadline_s  a response unfinished after this is killed together with its worker: "timeout", reward 0.0
    memory_mb   address space of one worker; what needs more ends as parse_fail or killed
    require_think_end   a response without "</think>" is "unclosed", reward 0.0 (LUFFY; not in A2)

    n responses, however hostile, take at most deadline_s * ceil(n / workers) + 2 s, provided a replacement
    can start (0.6 s of CPU) within half a deadline: for each response that has used half of its deadline a
    spare is launched, which is ready when that worker is killed. So up to 2 * workers processes exist, and
    `workers` of them grade. Linux. Not thread-safe. Workers die with the process (strictly, the thread)
    that started them.
    """

    def __init__(self, workers=None, deadline_s=10.0, memory_mb=2048, require_think_end=False):
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = workers or max(1, len(os.sched_getaffinity(0)) // ranks_here)
        self.deadline_s, self.memory_mb, self.require_think_end = deadline_s, memory_mb, require_think_end
        self._pool, self._dying, self._failures, self._closed = [], [], 0, False
        self._selector = selectors.DefaultSelector()
        self._refill()          # launches, without waiting: they import sympy while the model loads

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Kills every worker. May be called twice; `grade` raises afterwards."""
        self._closed = True
        for worker in list(self._pool):
            self._discard(worker)
        for proc in self._dying:
            try:
                proc.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                pass                    # stuck in the kernel; SIGKILL is pending, and no one can do more

    def grade(self, responses, answers):
        """list[str], list[str] -> list[Verdict], in order. No content makes it raise.

        ValueError: lengths differ. TypeError: not all str. RuntimeError: workers cannot start, or it
        is closed. After any exception but the last, Ctrl-C included, `grade` can be called again.
        """
        if len(responses) != len(answers):
            raise ValueError(f"grade: {len(responses)} responses but {len(answers)} answers; one for each")
        for i, pair in enumerate(zip(responses, answers)):
            if not all(isinstance(text, str) for text in pair):
                raise TypeError(f"grade: item {i}: expected str, str; found {[type(t) for t in pair]}")
        if self._closed:
            raise RuntimeError("grade: this Grader is closed; make a new one")
        texts = [answer_text(response)[-MAX_CHARS:] for response in responses]
        unclosed = lambda response: self.require_think_end and "</think>" not in response
        verdicts = [Verdict(0.0, "unclosed", 0.0) if unclosed(response) else None for response in responses]
        todo = deque(i for i, verdict in enumerate(verdicts) if verdict is None)
        left = len(todo)

        def settle(worker, reason):
            nonlocal left
            verdicts[worker.item] = Verdict(float(reason == "ok"), reason, 1e3 * worker.age())
            worker.item, self._failures, left = None, 0, left - 1

        self._failures = 0
        for worker in [w for w in self._pool if w.proc.poll() is not None]:     # died idle: costs no item
            self._discard(worker)
        try:
            while left:
                self._refill()
                busy = sum(w.item is not None for w in self._pool)
                for worker in [w for w in self._pool if w.ready and w.item is None][:self.workers - busy]:
                    if todo:
                        self._hand_out(worker, todo, texts, answers, settle)
                for key, _ in self._selector.select(self._time_to_next_event()):
                    self._take_reply(key.data, settle)
                for worker in list(self._pool):     # after the replies: one that waited for us is not late
                    if worker.item is not None and worker.age() >= self.deadline_s:
                        settle(worker, "timeout")
                        self._discard(worker)
                    elif not worker.ready and worker.age() >= STARTUP_S:
                        self._discard(worker, failed=True)
                if self._failures >= MAX_FAILURES:
                    raise RuntimeError(
                        f"grade: {self._failures} workers in a row died before they worked (see stderr). "
                        f"Check `{sys.executable} -c 'import math_verify'` and memory_mb={self.memory_mb}")
            self._refill()      # replacements start now, in the time until the next call
        finally:                # after an exception: a late reply must not answer an item of the next call
            for worker in [w for w in self._pool if w.item is not None]:
                self._discard(worker)
        return verdicts

    # A worker is starting (not ready), idle (ready, no item) or busy, a suspect once busy for half of the
    # deadline. One rule replaces the dead and provides the spares: at least workers + suspects processes.
    def _refill(self):
        self._dying = [proc for proc in self._dying if proc.poll() is None]     # reaps the dead
        suspects = [w for w in self._pool if w.item is not None and w.age() >= self.deadline_s / 2]
        for worker in suspects:
            worker.step_back()
        while len(self._pool) < self.workers + len(suspects):
            self._pool.append(_Worker(self.memory_mb, self.deadline_s))
            self._selector.register(self._pool[-1].sock, selectors.EVENT_READ, self._pool[-1])

    def _discard(self, worker, failed=False):
        self._failures += failed
        self._pool.remove(worker)
        self._selector.unregister(worker.sock)
        worker.sock.close()
        worker.proc.kill()
        self._dying.append(worker.proc)     # no wait: giving back gigabytes takes the kernel up to 0.5 s

    def _hand_out(self, worker, todo, texts, answers, settle):
        worker.item, worker.since = todo.popleft(), time.monotonic()
        try:
            worker.send({"id": (i := worker.item), "response": texts[i], "answer": answers[i]})
        except TimeoutError:            # alive, but it does not read
            settle(worker, "killed")
            self._discard(worker)
        except OSError:                 # died while idle, without having seen the item: that goes back
            todo.appendleft(worker.item)
            self._discard(worker, failed=True)

    def _take_reply(self, worker, settle):
        reply = worker.receive()
        if reply is None and worker.item is not None:
            settle(worker, "killed")
            self._discard(worker)
        elif reply is None:
            self._discard(worker, failed=not worker.ready)
        elif not worker.ready:
            worker.ready = True
        else:
            settle(worker, reply["reason"])
            if reply.get("retire"):
                self._discard(worker)

    def _time_to_next_event(self):
        ages, half = [w.age() for w in self._pool if w.item is not None], self.deadline_s / 2
        waits = [(half if age < half else 2 * half) - age for age in ages]
        return max(0.0, min(waits + [STARTUP_S - w.age() for w in self._pool if not w.ready], default=0.0))


class _Worker:
    """The parent's end of one worker: newline-delimited JSON over a socket pair."""

    def __init__(self, memory_mb, deadline_s):
        # An int >= 1: a float makes Math-Verify's `parse` return [] in silence, and every reward 0.
        seconds = min(5, max(1, int(deadline_s / 2)))
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.proc = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--worker",
                 str(theirs.fileno()), str(memory_mb), str(seconds)],
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
            message = json.loads(self.sock.recv(4096))          # 50 bytes: a message arrives in one piece
            if not self.ready:
                return message if message == {"ready": True} else None
            valid = self.item is not None and message["id"] == self.item and message["reason"] in REASONS
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

def _judge(response, answer, seconds):
    """One of REASONS; `seconds` (int) limits each of: parse the answer, parse the response, compare."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException
    try:
        # The reference as inline math: suits numbers and LaTeX, but would end at a newline. Else as it is.
        gold = (parse(f"${' '.join(answer.split())}$", parsing_timeout=seconds)
                or parse(answer, parsing_timeout=seconds))
        if not gold:
            return "parse_fail"
        prediction = parse(response, parsing_timeout=seconds, raise_on_error=True)
        if not prediction:
            return _why_nothing(response)
        start = time.monotonic()
        if verify(gold, prediction, timeout_seconds=seconds):   # asymmetric: the reference comes first
            return "ok"
        return "timeout" if time.monotonic() - start >= seconds else "wrong"    # verify hides its timeouts
    except TimeoutException:            # derives from BaseException
        return "timeout"
    except Exception:                   # what sympy raises on nonsense; MemoryError, RecursionError
        return "parse_fail"


def _why_nothing(text):
    """no_box, unclosed or parse_fail, for a text from which nothing could be extracted."""
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        return "no_box"
    depth = 1
    for token in re.findall(r"\\.|[{}]", text[boxes[-1].end():], re.DOTALL):    # \{ and \} are not braces
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth == 0:
            return "parse_fail"
    return "unclosed"


def _address_space():
    """Bytes that count against RLIMIT_AS. (Not ru_maxrss, which starts at the size of the parent.)"""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _worker_main(fd, memory_mb, seconds):
    """Answers the items that arrive on socket `fd`, until the parent closes it."""
    for ignored in (signal.SIGINT, signal.SIGTERM):         # the parent handles them, and kills us
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # PR_SET_PDEATHSIG: die with it, mid-hang too
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]                                     # our data.py must not shadow a package's
    memory, hard = memory_mb << 20, resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    if _judge(r"$\boxed{\frac{1}{2}}$", "0.5", 60) != "ok":     # warms up; no run is lost to silent zeros
        raise SystemExit("reward.py: Math-Verify denies 1/2 = 0.5: wrong version, or memory_mb too low")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))       # after the imports, which may write .pyc files
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))       # root is not bound by it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)            # start-up errors were shown; no more is wanted
    with socket.socket(fileno=fd) as sock:
        sock.sendall(b'{"ready": true}\n')
        for line in sock.makefile("rb"):
            item = json.loads(line)
            reason = _judge(item["response"], item["answer"], seconds)
            # Parser caches grow for days, and at the limit every answer would fail: ask to be replaced.
            reply = {"id": item["id"], "reason": reason, "retire": _address_space() > memory // 2}
            sock.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] != "--worker":
        sys.exit("reward.py is a module: from reward import Grader")
    _worker_main(*map(int, sys.argv[2:]))
