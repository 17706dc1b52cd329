r"""The binary reward of Eq. A2, computed where hostile text can do no harm.

    R(x, y) = 1 if the answer in response y equals the reference answer of x, else 0        (Eq. A2)

"Equals" is the verdict of Math-Verify in training, of the OAT-Grader in the final evaluation (Sec. 5.1), or,
for multiple choice, of comparing letters (grading/answers.py). A2 has no reward for format. The +1 and -1 of
Sec. 4.2 are the signs of the two sums of Eq. 12, and stand in srft.py.

    with Grader() as grader:
        grader.grade([r"so it is $\boxed{\frac12}$", r"\boxed{7}"], ["0.5", "8"])
        # [Verdict(reward=1.0, reason='ok', ms=3.1, ...), Verdict(reward=0.0, reason='wrong', ms=2.2, ...)]
        grader.submit([...], [...])     # the same without waiting, while the engine decodes other responses;
        verdicts = grader.collect()     # waits for the rest

    python reward.py --response FILE --answer TEXT     # what was extracted and compared, and the verdict

To copy the Grader into another project, take this file and the folder grading/, side by side, and install
math-verify and, for "oat", pylatexenc. Neither imports anything else of this project.

Why processes, and not a call, a thread or a signal: a response is text that a model wrote, and graders
hand it to a LaTeX parser and to sympy. `9**9**9**9` or 100,000 open parentheses may run for ever, eat all
memory or crash the interpreter. Math-Verify's own timeouts are SIGALRM: main thread only, cancelling any
other alarm, and not delivered while C code runs (with gmpy2 `(10^9)!` hangs past them). The one limit that
always holds is SIGKILL, so each response is graded by a process of its own, a child of a worker, that can be
killed, that can do nothing but compute (grading/fence.py), and that ends with its verdict. Only JSON comes
back: unpickling a reply would let a compromised process run code here.
"""
import argparse
import functools
import math
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace

from grading import custom
from grading.answers import FAILED, KINDS
from grading.cpus import usable_cpus
from grading.fence import UNFENCED
from grading.notation import says_nothing, undollar
from grading.worker import Worker

MAX_CHARS = 50_000      # of a longer text only the end is graded: answers stand at the end
STARTUP_S = 120.0       # importing sympy takes 0.5 s, but minutes for 200 workers on a cold network disk
BACKSTOP_S = 1.0        # a worker kills a late child itself; one that is later by this is stopped or stuck
MAX_FAILURES = 3        # workers lost in a row before they did anything: the installation, not a response
TEXTS = ("after_think", "whole", "require_think")


@dataclass
class Verdict:
    r"""`reward` is 1.0 or 0.0 (Eq. A2), `ms` the milliseconds it took, `reason` one of

    ok          equal to the reference answer; the only reason with reward 1.0
    wrong       something was extracted, and it is not equal
    unevaluated it is equal, and not worked out: 47+35-60 for 22 (grading/statement.py)
    ambiguous   it is equal, and not stated as the one answer: `41 = 42`, `> 42`, `42 or not` for 42
    no_box      nothing could be extracted: no \boxed{...}, no letter
    unclosed    the last \boxed{ is never closed; or no </think> where it is required
    truncated   the generation hit its token limit, and such a one cannot score
    parse_fail  a closed box that is no mathematics, or a reference answer that cannot be parsed
    timeout     stopped by a time limit, or killed at the deadline
    killed      twice, the process that graded it died (memory, crash) or answered nonsense
    reward_error  the function of --reward raised, or returned no truth value; `trace` says what

    `extracted` is the answer found in the response (its first 200 characters), `trace` one line for each
    comparison tried, for a person to read. `fault` is "unevaluated" or "ambiguous" where that is so, also
    where it costs no reward.
    """
    reward: float
    reason: str
    ms: float
    extracted: str = ""
    trace: list = field(default_factory=list)
    fault: str = ""


def graded_text(response, text="after_think"):
    """The part of a response that is graded. text: "after_think" or "require_think", what follows the last
    "</think>", or all of it if there is none; "whole", always all of it."""
    if text == "whole":
        return response
    return response.rpartition("</think>")[2]


class Grader:
    """Grades responses in worker processes of its own; a context manager.

    kind        "math-verify" (training; the default), "oat" (evaluation), "choice"; `grade` can ask for any
    reward      "FILE.py:FUNCTION", a function of one's own (grading/custom.py), as its file is now: another
                kind, by the name of the function, and then the default
    workers     processes that grade at the same time; default: usable_cpus() / LOCAL_WORLD_SIZE (set by
                torchrun), less one for the thread that schedules the engine's decoding steps
    deadline_s  the grading of a response is killed after this: "timeout", reward 0.0
    memory_mb   address space of one grading; what needs more ends as parse_fail or killed
    text        what is graded, see graded_text; with "require_think" (LUFFY; not in A2) a response without
                "</think>" is "unclosed", reward 0.0
    strict_box  math-verify: only the last box counts. Off, Math-Verify searches all of the text: what is
                called the answer, else the last number; then responses cut off in mid-thought score, too
    strict_answer       math-verify: an answer that is equal must also be worked out as far as the reference
                is, and be the one answer that its box states; off: its `fault` is only told
    score_unfinished    a response cut at its token limit is graded like any other; off: "truncated", 0.0

    n responses, however hostile, take at most deadline_s * (1 + ceil(n / workers)) + 2 s: a late one costs no
    more than the fork of the next. (Of equal ones the first is graded, and the others only where that failed.
    One whose process dies is graded once more, and then is "killed". A worker that something else stops costs
    its response, "timeout", 1 s and its start.) Linux. Not thread-safe. Workers die with the process
    (strictly, the thread) that started them, and their children with them. What the fence around a grading
    lacks on this system, stderr says once.
    """

    def __init__(self, kind=None, workers=None, deadline_s=10.0, memory_mb=1000, text="after_think",
                 strict_box=True, strict_answer=True, score_unfinished=False, reward=None):
        self.reward = custom.read(reward) if reward else None
        self.kinds = (*KINDS, self.reward.name) if reward else KINDS
        kind = kind or (self.reward.name if reward else "math-verify")
        if kind not in self.kinds or text not in TEXTS:
            raise ValueError(f"Grader: kind {kind!r} must be one of {self.kinds}, text {text!r} of {TEXTS}")
        if (workers is not None and workers < 1) or not deadline_s > 0:
            raise ValueError(f"Grader: expected a worker and a deadline, found {workers}, {deadline_s} s")
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))     # of this machine: they share its CPUs
        self.workers = workers or max(1, usable_cpus() // ranks_here - 1)
        self.kind = kind
        self.deadline_s = deadline_s
        self.memory_mb = memory_mb
        self.text = text
        self.strict_box = strict_box
        self.strict_answer = strict_answer
        self.score_unfinished = score_unfinished

        # What was submitted since the last `collect`, in order: its items, and their verdicts, None so far.
        self._batch = []
        self._verdicts = []
        self._waiting = deque()         # the numbers of the items that no worker has yet
        self._tried_again = set()       # the numbers of those whose process has died once
        self._first = {}                # what is graded -> the number of the first item that asked for it
        self._copies = {}               # the number of a later one that asks for the same -> of that first
        self._left = 0                  # how many items have no verdict yet: waiting, or with a worker

        self._pool = []                 # the workers
        self._dying = []                # processes that were killed, and may not have ended yet
        self._told = False              # the first error of the user's function has been said
        self._failures = 0              # workers lost in a row before they did anything
        self._closed = False
        self._selector = selectors.DefaultSelector()    # tells which of many sockets has something to read
        self._refill()                  # launches, without waiting: they import sympy while the model loads

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
        for process in self._dying:
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                pass                    # stuck in the kernel; SIGKILL is pending, and no one can do more

    def start(self):
        """Wait until a worker can grade. Raises ValueError where none starts, or cannot load the user's
        function."""
        while not any(worker.ready for worker in self._pool):
            try:
                self._advance(wait=False)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
            time.sleep(0.02)

    def grade(self, responses, answers, finished=None, kind=None, examples=None):
        """list[str], list[str] -> list[Verdict], in order. No content makes it raise.

        finished: list[bool], False for a response cut at its token limit; default: all True. examples: list
        of dict, the third argument of the user's function; default: all {}.
        ValueError: lengths differ, or unknown kind. TypeError: not all str. RuntimeError: workers cannot
        start, it is closed, or verdicts of `submit` must be collected first. After any exception that comes
        from in here, Ctrl-C included, `grade` works again unless it is closed.
        """
        if self._verdicts:
            raise RuntimeError(f"grade: collect the {len(self._verdicts)} verdicts that were submitted first")
        self.submit(responses, answers, finished, kind, examples)
        return self.collect()

    def submit(self, responses=(), answers=(), finished=None, kind=None, examples=None):
        """Queue responses, as `grade` takes them, and return at once; `collect` gives the verdicts.

        Workers get their next response, and late ones are killed, only in a call of this class: so call it
        often while other work goes on, without arguments where nothing is new.
        """
        if self._closed:
            raise RuntimeError("grade: this Grader is closed; make a new one")
        if finished is None:
            finished = [True] * len(responses)
        if examples is None:
            examples = [{}] * len(responses)
        # Raises before any is queued.
        items = self._items(responses, answers, finished, kind or self.kind, examples)
        if not self._left:
            self._failures = 0
            for worker in list(self._pool):
                if worker.proc.poll() is not None:      # it died with nothing to do: that costs no item
                    self._discard(worker)
        for item, response, is_finished in zip(items, responses, finished):
            reason = self._ruled_out(response, is_finished)
            if reason is None:
                self._verdicts.append(None)
                self._queue(len(self._batch), item)
            else:
                self._verdicts.append(Verdict(0.0, reason, 0.0))
            self._batch.append(item)
        self._advance(wait=False)

    def collect(self):
        """Wait for all that was submitted since the last `collect` -> list[Verdict], in that order."""
        self._wait()
        for number, first in self._copies.items():
            verdict = self._verdicts[first]
            if verdict.reason in FAILED:                # which says nothing about the response
                self._waiting.append(number)
                self._left += 1
            else:
                self._verdicts[number] = replace(verdict)
        self._wait()
        verdicts = self._verdicts
        self._forget()
        if not self._closed:
            self._refill()      # replacements start now, in the time until the next call
        return verdicts

    def _wait(self):
        """Until every item that is to be graded has its verdict."""
        while self._left:
            self._advance(wait=True)

    def check(self, answers, kind=None):
        """Which reference answers cannot be matched even by themselves, or are words of no answer, such as
        "proof" ("no_answer")? dict index -> reason, empty if all can be matched. A problem with such an
        answer is lost: every response to it would earn 0."""
        # Behind </think>, which a response must have where text is "require_think".
        responses = [f"</think>\\boxed{{{undollar(answer)}}}" for answer in answers]
        unmatched = {}
        for number, verdict in enumerate(self.grade(responses, answers, kind=kind)):
            if says_nothing(answers[number]):
                unmatched[number] = "no_answer"
            elif not verdict.reward:
                unmatched[number] = verdict.reason
            elif not verdict.extracted.strip():
                unmatched[number] = "parse_fail"        # of an empty answer: for oat, nothing equals nothing
        return unmatched

    # ---- Items ----------------------------------------------------------------------------------------

    def _items(self, responses, answers, finished, kind, examples):
        """What workers are sent, one for each response."""
        if not len(responses) == len(answers) == len(finished):
            raise ValueError(f"grade: {len(responses)} responses but {len(answers)} answers and "
                             f"{len(finished)} finished; one for each")
        for i, (response, answer) in enumerate(zip(responses, answers)):
            if not (isinstance(response, str) and isinstance(answer, str)):
                found = [type(response), type(answer)]
                raise TypeError(f"grade: item {i}: expected str, str; found {found}")
        if kind not in self.kinds:
            raise ValueError(f"grade: kind {kind!r} must be one of {self.kinds}")
        items = []
        for response, answer, example in zip(responses, answers, examples, strict=True):
            text = graded_text(response, self.text)[-MAX_CHARS:]
            item = {"kind": kind, "response": text, "answer": answer, "strict_box": self.strict_box}
            if kind not in KINDS:
                item["example"] = example
            items.append(item)
        return items

    def _queue(self, number, item):
        """Have it graded, unless an item of this batch says the same: then that one's verdict will do.

        Late in training, many samples of a prompt are one text. A user's function is asked about each: it
        may draw at random.
        """
        if item["kind"] in KINDS:
            first = self._first.setdefault((item["kind"], item["response"], item["answer"]), number)
            if first != number:
                self._copies[number] = first
                return
        self._waiting.append(number)
        self._left += 1

    def _ruled_out(self, response, finished):
        """The reason for a verdict without looking for an answer, or None."""
        if not finished and not self.score_unfinished:
            return "truncated"
        if self.text == "require_think" and "</think>" not in response:
            return "unclosed"
        return None

    def _settle(self, worker, reason, ms=math.inf, extracted="", trace=(), fault=""):
        """Write down the verdict on a worker's item, which is tried again when its process dies for the first
        time. ms: what the worker says that it took, if it says so. fault: of an answer that was found equal,
        how its box states it wrongly."""
        if reason == "killed" and worker.item not in self._tried_again:
            self._tried_again.add(worker.item)          # it may not have been the response that ended it
            self._waiting.appendleft(worker.item)
            worker.item = None
            return
        if fault and self.strict_answer and self._batch[worker.item]["kind"] == "math-verify":
            reason = fault
        if reason == "reward_error" and not self._told:
            self._tell(self._batch[worker.item], trace)
        age_ms = 1e3 * worker.age()     # an upper limit: the reply may have waited for us, and may lie
        verdict = Verdict(float(reason == "ok"), reason, min(ms, age_ms), extracted, list(trace), fault)
        self._verdicts[worker.item] = verdict
        worker.item = None
        self._failures = 0              # a worker that came as far as a verdict: the installation works
        self._left -= 1

    def _tell(self, item, trace):
        """Say the first error of the user's function: it may well be every response's."""
        if "example" not in item:           # of another kind, whose process made that up
            return
        self._told = True
        # repr: a model may have written what a terminal obeys.
        problem = item["example"].get("id")
        print(f"--reward: {self.reward.name} on problem {problem}: {' '.join(trace)!r}; such "
              "a response earns 0, and is counted as reward_error", file=sys.stderr)

    def _forget(self):
        """Drop what was submitted. A late reply must not answer an item of the next batch."""
        self._batch = []
        self._verdicts = []
        self._waiting = deque()
        self._tried_again = set()
        self._first = {}
        self._copies = {}
        self._left = 0
        for worker in list(self._pool):
            if worker.busy:
                self._discard(worker)

    # ---- The pool -------------------------------------------------------------------------------------
    #
    # The life of a worker (grading/worker.py), of which all but the work happens in _advance:
    #
    #   state      which means              until                               and then
    #   starting   not ready                it says "ready"                     idle
    #                                       it dies, or STARTUP_S have passed   discarded, a failure
    #   idle       ready, without an item   it is handed an item                busy
    #                                       it dies                             discarded
    #   busy       with an item             its reply comes ("timeout" and      its verdict; idle
    #                                       "killed" of its child among them)
    #                                       it dies, or breaks the protocol     discarded; its item is handed
    #                                                                           out again, or "killed"
    #                                       deadline_s + BACKSTOP_S have passed "timeout"; discarded
    #
    # Whoever is discarded leaves the pool, and _refill launches another.

    def _advance(self, wait):
        """Move everything on by one step; `wait`: until the next thing has happened, if any item is left."""
        try:
            self._take_replies(timeout_s=0)     # first: one whose reply waited for us is not late
            self._refill()
            self._hand_out_items()
            if wait and self._left:
                self._take_replies(self._time_to_next_event())
            self._discard_the_late()
            if self._failures >= MAX_FAILURES:
                own = f", and whether {self.reward.path} can be loaded" if self.reward else ""
                raise RuntimeError(
                    f"grade: {self._failures} workers in a row died before they worked (see stderr). Check "
                    f"`{sys.executable} -c 'import math_verify'`, memory_mb={self.memory_mb}{own}")
        except BaseException:                   # Ctrl-C too: what comes next must find nothing half done
            self._forget()
            raise

    def _take_replies(self, timeout_s):
        """Read what workers have sent. If nothing is there, wait for the first, but at most timeout_s."""
        for key, _ in self._selector.select(timeout_s):
            self._take_reply(key.data)

    def _take_reply(self, worker):
        reply = worker.receive()
        if reply is None:                       # it has died, or breaks the protocol
            if worker.busy:
                self._settle(worker, "killed")
                self._discard(worker)
            else:
                self._discard(worker, failed=not worker.ready)
        elif not worker.ready:
            if "error" in reply:
                raise ValueError(f"--reward: {reply['error']}")
            worker.ready = True
            _say_what_is_unfenced(reply["unfenced"])
        else:
            self._settle(worker, reply["reason"], reply["ms"], reply["extracted"], reply["trace"],
                         reply["fault"])

    def _refill(self):
        """Launch workers until there are as many as shall grade."""
        self._dying = [process for process in self._dying if process.poll() is None]    # poll reaps the dead
        while len(self._pool) < self.workers:
            worker = Worker(self.memory_mb, self.deadline_s, self.reward)
            self._pool.append(worker)
            self._selector.register(worker.sock, selectors.EVENT_READ, data=worker)

    def _hand_out_items(self):
        for worker in list(self._pool):
            if worker.idle and self._waiting:
                self._hand_out(worker, self._waiting.popleft())

    def _hand_out(self, worker, number):
        worker.item = number
        worker.since = time.monotonic()
        try:
            worker.send({"id": number, **self._batch[number]})
        except TimeoutError:                    # (an OSError, so asked first) it is alive, but does not read
            self._settle(worker, "killed")
            self._discard(worker)
        except OSError:                         # it died while idle, without having seen the item
            self._waiting.appendleft(number)
            self._discard(worker, failed=True)

    def _discard_the_late(self):
        for worker in list(self._pool):
            if self._time_left(worker) > 0:
                continue
            if worker.busy:
                self._settle(worker, "timeout")
                self._discard(worker)
            else:
                self._discard(worker, failed=True)

    def _time_left(self, worker):
        """Seconds until a busy worker, or one that starts, is too late."""
        if worker.busy:
            return self.deadline_s + BACKSTOP_S - worker.age()
        if not worker.ready:
            return STARTUP_S - worker.age()
        return math.inf

    def _time_to_next_event(self):
        """Seconds until a worker is too late. (A reply that comes earlier ends the wait.)"""
        return max(0.0, min(self._time_left(worker) for worker in self._pool))

    def _discard(self, worker, failed=False):
        """Take a worker out of the pool and kill it. failed: it was lost before it did anything."""
        if failed:
            self._failures += 1
        self._pool.remove(worker)
        self._selector.unregister(worker.sock)
        worker.sock.close()
        worker.proc.kill()
        self._dying.append(worker.proc)         # no wait: giving back gigabytes takes the kernel up to 0.5 s


@functools.cache
def _say_what_is_unfenced(missing):
    """Once a process, and of the ranks once: all have the same to say."""
    if missing and os.environ.get("RANK", "0") == "0":
        print(UNFENCED.format(missing), file=sys.stderr)


def explain(argv):
    """`python reward.py --response FILE --answer TEXT`: why a response earns what it earns."""
    parser = argparse.ArgumentParser(prog="reward.py", description="Grade one response and say why.")
    parser.add_argument("--response", required=True, help="file that holds the response; -: standard input")
    parser.add_argument("--answer", required=True, help="reference answer")
    parser.add_argument("--grader", choices=KINDS, help="default: both math-verify and oat")
    parser.add_argument("--reward", metavar="FILE.py:FUNCTION", help="a function of one's own, instead")
    parser.add_argument("--grade_text", choices=TEXTS, default="after_think", help="what is graded")
    parser.add_argument("--strict_box", action=argparse.BooleanOptionalAction, default=True,
                        help="only the last box counts, for math-verify")
    parser.add_argument("--strict_answer", action=argparse.BooleanOptionalAction, default=True,
                        help="the box must state one answer, worked out, for math-verify")
    args = parser.parse_args(argv)
    # A model may have written bytes that are no text in the terminal's encoding: show them, do not stop.
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.response == "-":
            response = sys.stdin.read()
        else:
            with open(args.response, errors="replace") as file:
                response = file.read()
    except OSError as error:
        parser.exit(2, f"reward.py: --response: {error}\n")
    text = graded_text(response, args.grade_text)
    print(f"response   {len(response)} characters; graded are the last {min(len(text), MAX_CHARS)}")
    kinds = [args.grader] if args.grader else ["math-verify", "oat"]
    try:
        grader = Grader(workers=1, text=args.grade_text, strict_box=args.strict_box,
                        strict_answer=args.strict_answer, reward=args.reward)
        grader.start()
    except ValueError as error:
        parser.exit(2, f"reward.py: {error}\n")
    if args.reward:
        kinds = [grader.kind]
    example = {"id": args.response, "problem": "", "answer": args.answer}
    with grader:
        for kind in kinds:
            verdict, = grader.grade([response], [args.answer], kind=kind, examples=[example])
            print(f"\n{kind}")
            if not args.reward:                         # a function of one's own extracts nothing
                print(f"  extracted  {verdict.extracted!r}")
            for step in verdict.trace:
                print(f"  tried      {step}")
            if verdict.fault:
                print(f"  stated     {verdict.fault} (grading/statement.py)")
            print(f"  verdict    {verdict.reason}, reward {verdict.reward:.0f}, {verdict.ms:.0f} ms")


if __name__ == "__main__":
    explain(sys.argv[1:])
