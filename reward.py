r"""The binary reward of Eq. A2, computed where hostile text can do no harm.

    R(x, y) = 1 if the answer in response y equals the reference answer of x, else 0        (Eq. A2)

"Equals" is the verdict of Math-Verify in training, of the OAT-Grader in the final evaluation (Sec. 5.1), or,
for multiple choice, of comparing letters (grading/answers.py). A2 has no reward for format.

    with Grader() as grader:
        grader.grade([r"so it is $\boxed{\frac12}$", r"\boxed{7}"], ["0.5", "8"])
        # [Verdict(reward=1.0, reason='ok', ms=3.1, ...), Verdict(reward=0.0, reason='wrong', ms=2.2, ...)]
        grader.submit([...], [...])     # the same without waiting, while the engine decodes other responses;
        verdicts = grader.collect()     # waits for the rest

    python reward.py --response FILE --answer TEXT     # what was extracted and compared, and the verdict

Why processes, and not a call, a thread or a signal: a response is text that a model wrote, and graders
hand it to a LaTeX parser and to sympy. `9**9**9**9` or 100,000 open parentheses may run for ever, eat all
memory or crash the interpreter. Math-Verify's own timeouts are SIGALRM: main thread only, cancelling any
other alarm, and not delivered while C code runs (with gmpy2 `(10^9)!` hangs past them). The one limit that
always holds is SIGKILL, so the text is parsed by workers that can be killed and replaced. Only JSON comes
back: unpickling a reply would let a compromised worker run code here.
"""
import argparse
import math
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from grading.answers import KINDS, undollar
from grading.cpus import usable_cpus
from grading.worker import Worker

MAX_CHARS = 50_000      # of a longer text only the end is graded: answers stand at the end
STARTUP_S = 120.0       # importing sympy takes 0.5 s, but minutes for 200 workers on a cold network disk
MAX_FAILURES = 3        # workers lost in a row before they did anything: the installation, not a response
TEXTS = ("after_think", "whole", "require_think")


@dataclass
class Verdict:
    r"""`reward` is 1.0 or 0.0 (Eq. A2), `ms` the milliseconds it took, `reason` one of

    ok          equal to the reference answer; the only reason with reward 1.0
    wrong       something was extracted, and it is not equal
    no_box      nothing could be extracted: no \boxed{...}, no letter
    unclosed    the last \boxed{ is never closed; or no </think> where it is required
    truncated   the generation hit its token limit, and such a one cannot score
    parse_fail  a closed box that is no mathematics, or a reference answer that cannot be parsed
    timeout     stopped by a time limit, or killed at the deadline
    killed      the worker died on it (memory, crash) or answered nonsense

    `extracted` is the answer found in the response (its first 200 characters), `trace` one line for each
    comparison tried, for a person to read.
    """
    reward: float
    reason: str
    ms: float
    extracted: str = ""
    trace: list = field(default_factory=list)


def graded_text(response, text="after_think"):
    """The part of a response that is graded. text: "after_think" or "require_think", what follows the last
    "</think>", or all of it if there is none; "whole", always all of it."""
    return response if text == "whole" else response.rpartition("</think>")[2]


class Grader:
    """Grades responses in worker processes of its own; a context manager.

    kind        "math-verify" (training), "oat" (evaluation) or "choice"; `grade` can ask for another
    workers     processes that grade at the same time; default: usable_cpus() / LOCAL_WORLD_SIZE (set by
                torchrun), less one for the thread that schedules the engine's decoding steps
    deadline_s  a response unfinished after this is killed together with its worker: "timeout", reward 0.0
    memory_mb   address space of one worker; what needs more ends as parse_fail or killed
    text        what is graded, see graded_text; with "require_think" (LUFFY; not in A2) a response without
                "</think>" is "unclosed", reward 0.0
    strict_box  math-verify: only the last box counts. Off, Math-Verify searches all of the text: what is
                called the answer, else the last number; then responses cut off in mid-thought score, too
    score_unfinished    a response cut at its token limit is graded like any other; off: "truncated", 0.0

    n responses, however hostile, take at most deadline_s * ceil(n / workers) + 2 s, provided a replacement
    can start (0.6 s of CPU) within half a deadline: for each response that has used half of its deadline a
    spare is launched, which is ready when that worker is killed. So up to 2 * workers processes exist, and
    `workers` of them grade. Linux. Not thread-safe. Workers die with the process (strictly, the thread)
    that started them.
    """

    def __init__(self, kind="math-verify", workers=None, deadline_s=10.0, memory_mb=1000,
                 text="after_think", strict_box=True, score_unfinished=False):
        if kind not in KINDS or text not in TEXTS:
            raise ValueError(f"Grader: kind {kind!r} must be one of {KINDS}, text {text!r} one of {TEXTS}")
        if (workers is not None and workers < 1) or not deadline_s > 0:
            raise ValueError(f"Grader: expected a worker and a deadline, found {workers}, {deadline_s} s")
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = workers or max(1, usable_cpus() // ranks_here - 1)
        self.kind, self.deadline_s, self.memory_mb = kind, deadline_s, memory_mb
        self.text, self.strict_box, self.score_unfinished = text, strict_box, score_unfinished
        self._pool, self._dying, self._failures, self._closed = [], [], 0, False
        self._forget()                  # nothing is submitted yet
        self._selector = selectors.DefaultSelector()
        self._refill()          # launches, without waiting: they import sympy while the model loads

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Kills every worker. May be called twice; `grade` raises afterwards."""
        self._forget()
        self._closed = True
        for worker in list(self._pool):
            self._discard(worker)
        for proc in self._dying:
            try:
                proc.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                pass                    # stuck in the kernel; SIGKILL is pending, and no one can do more

    def grade(self, responses, answers, finished=None, kind=None):
        """list[str], list[str] -> list[Verdict], in order. No content makes it raise.

        finished: list[bool], False for a response cut at its token limit; default: all True.
        ValueError: lengths differ, or unknown kind. TypeError: not all str. RuntimeError: workers cannot
        start, it is closed, or verdicts of `submit` must be collected first. After any exception that comes
        from in here, Ctrl-C included, `grade` works again unless it is closed.
        """
        if self._verdicts:
            raise RuntimeError(f"grade: collect the {len(self._verdicts)} verdicts that were submitted first")
        self.submit(responses, answers, finished, kind)
        return self.collect()

    def submit(self, responses=(), answers=(), finished=None, kind=None):
        """Queue responses, as `grade` takes them, and return at once; `collect` gives the verdicts.

        Workers get their next response, and late ones are killed, only in a call of this class: so call it
        often while other work goes on, without arguments where nothing is new.
        """
        if self._closed:
            raise RuntimeError("grade: this Grader is closed; make a new one")
        finished = [True] * len(responses) if finished is None else finished
        items = self._items(responses, answers, finished, kind or self.kind)
        if not self._left:
            self._failures = 0
            for worker in [w for w in self._pool if w.proc.poll() is not None]:  # died idle: costs no item
                self._discard(worker)
        for item, reason in zip(items, map(self._ruled_out, responses, finished)):
            if reason is None:
                self._todo.append(len(self._batch))
                self._left += 1
            self._batch.append(item)
            self._verdicts.append(Verdict(0.0, reason, 0.0) if reason else None)
        self._advance(wait=False)

    def collect(self):
        """Wait for all that was submitted since the last `collect` -> list[Verdict], in that order."""
        while self._left:
            self._advance(wait=True)
        verdicts = self._verdicts
        self._forget()
        if not self._closed:
            self._refill()      # replacements start now, in the time until the next call
        return verdicts

    def _forget(self):
        """Drop what was submitted. A late reply must not answer an item of the next batch."""
        self._batch, self._verdicts, self._todo, self._left = [], [], deque(), 0
        for worker in [w for w in self._pool if w.item is not None]:
            self._discard(worker)

    def _advance(self, wait):
        """Take replies, hand out items, kill the late; `wait`: for the next thing to happen."""
        try:
            self._take_replies(0)       # first: one whose reply waited for us is neither suspect nor late
            self._refill()
            busy = sum(w.item is not None for w in self._pool)
            for worker in [w for w in self._pool if w.ready and w.item is None][:self.workers - busy]:
                if self._todo:
                    self._hand_out(worker)
            if wait and self._left:
                self._take_replies(self._time_to_next_event())
            for worker in list(self._pool):
                if worker.item is not None and worker.age() >= self.deadline_s:
                    self._settle(worker, "timeout")
                    self._discard(worker)
                elif not worker.ready and worker.age() >= STARTUP_S:
                    self._discard(worker, failed=True)
            if self._failures >= MAX_FAILURES:
                raise RuntimeError(
                    f"grade: {self._failures} workers in a row died before they worked (see stderr). "
                    f"Check `{sys.executable} -c 'import math_verify'` and memory_mb={self.memory_mb}")
        except BaseException:
            self._forget()
            raise

    def _settle(self, worker, reason, ms=math.inf, extracted="", trace=()):
        self._verdicts[worker.item] = Verdict(float(reason == "ok"), reason, min(ms, 1e3 * worker.age()),
                                              extracted, list(trace))
        worker.item, self._failures, self._left = None, 0, self._left - 1

    def check(self, answers, kind=None):
        """Which reference answers cannot be matched even by themselves? dict index -> reason, empty if all
        can. A problem with such an answer is lost: every response to it would earn 0."""
        # </think>, as a response must have it where text is "require_think".
        verdicts = self.grade([f"</think>\\boxed{{{undollar(answer)}}}" for answer in answers], answers,
                              kind=kind)
        return {i: "parse_fail" if verdict.reward else verdict.reason for i, verdict in enumerate(verdicts)
                if not verdict.reward or not verdict.extracted.strip()}     # oat: nothing equals nothing

    def _items(self, responses, answers, finished, kind):
        if not len(responses) == len(answers) == len(finished):
            raise ValueError(f"grade: {len(responses)} responses but {len(answers)} answers and "
                             f"{len(finished)} finished; one for each")
        for i, pair in enumerate(zip(responses, answers)):
            if not all(isinstance(text, str) for text in pair):
                raise TypeError(f"grade: item {i}: expected str, str; found {[type(t) for t in pair]}")
        if kind not in KINDS:
            raise ValueError(f"grade: kind {kind!r} must be one of {KINDS}")
        return [{"kind": kind, "response": graded_text(response, self.text)[-MAX_CHARS:], "answer": answer,
                 "strict_box": self.strict_box} for response, answer in zip(responses, answers)]

    def _ruled_out(self, response, finished):
        """The reason for a verdict without looking for an answer, or None."""
        if not finished and not self.score_unfinished:
            return "truncated"
        return "unclosed" if self.text == "require_think" and "</think>" not in response else None

    # A worker is starting (not ready), idle (ready, no item) or busy, a suspect once busy for half of the
    # deadline. One rule replaces the dead and provides the spares: at least workers + suspects processes.
    def _refill(self):
        self._dying = [proc for proc in self._dying if proc.poll() is None]     # reaps the dead
        suspects = [w for w in self._pool if w.item is not None and w.age() >= self.deadline_s / 2]
        for worker in suspects:
            worker.step_back()
        while len(self._pool) < self.workers + len(suspects):
            self._pool.append(Worker(self.memory_mb, self.deadline_s))
            self._selector.register(self._pool[-1].sock, selectors.EVENT_READ, self._pool[-1])

    def _discard(self, worker, failed=False):
        self._failures += failed
        self._pool.remove(worker)
        self._selector.unregister(worker.sock)
        worker.sock.close()
        worker.proc.kill()
        self._dying.append(worker.proc)     # no wait: giving back gigabytes takes the kernel up to 0.5 s

    def _hand_out(self, worker):
        worker.item, worker.since = self._todo.popleft(), time.monotonic()
        try:
            worker.send({"id": worker.item} | self._batch[worker.item])
        except TimeoutError:            # alive, but it does not read
            self._settle(worker, "killed")
            self._discard(worker)
        except OSError:                 # died while idle, without having seen the item: that goes back
            self._todo.appendleft(worker.item)
            self._discard(worker, failed=True)

    def _take_replies(self, timeout):
        for key, _ in self._selector.select(timeout):
            self._take_reply(key.data)

    def _take_reply(self, worker):
        reply = worker.receive()
        if reply is None and worker.item is not None:
            self._settle(worker, "killed")
            self._discard(worker)
        elif reply is None:
            self._discard(worker, failed=not worker.ready)
        elif not worker.ready:
            worker.ready = True
        else:
            self._settle(worker, reply["reason"], reply["ms"], reply["extracted"], reply["trace"])
            if reply.get("retire"):
                self._discard(worker)

    def _time_to_next_event(self):
        ages, half = [w.age() for w in self._pool if w.item is not None], self.deadline_s / 2
        waits = [(half if age < half else 2 * half) - age for age in ages]
        return max(0.0, min(waits + [STARTUP_S - w.age() for w in self._pool if not w.ready], default=0.0))


def explain(argv):
    """`python reward.py --response FILE --answer TEXT`: why a response earns what it earns."""
    parser = argparse.ArgumentParser(prog="reward.py", description="Grade one response and say why.")
    parser.add_argument("--response", required=True, help="file that holds the response; -: standard input")
    parser.add_argument("--answer", required=True, help="reference answer")
    parser.add_argument("--grader", choices=KINDS, help="default: both math-verify and oat")
    parser.add_argument("--grade_text", choices=TEXTS, default="after_think", help="what is graded")
    parser.add_argument("--strict_box", action=argparse.BooleanOptionalAction, default=True,
                        help="only the last box counts, for math-verify")
    args = parser.parse_args(argv)
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with (sys.stdin if args.response == "-" else open(args.response, errors="replace")) as file:
            response = file.read()
    except OSError as error:
        parser.exit(2, f"reward.py: --response: {error}\n")
    text = graded_text(response, args.grade_text)
    print(f"response   {len(response)} characters; graded are the last {min(len(text), MAX_CHARS)}")
    with Grader(workers=1, text=args.grade_text, strict_box=args.strict_box) as grader:
        for kind in [args.grader] if args.grader else KINDS[:2]:
            verdict, = grader.grade([response], [args.answer], kind=kind)
            print(f"\n{kind}\n  extracted  {verdict.extracted!r}")
            for step in verdict.trace:
                print(f"  tried      {step}")
            print(f"  verdict    {verdict.reason}, reward {verdict.reward:.0f}, {verdict.ms:.0f} ms")


if __name__ == "__main__":
    explain(sys.argv[1:])
