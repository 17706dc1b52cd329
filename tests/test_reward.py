"""reward.py: answers in their usual dresses, and the promise that no response can hurt the run.

    pytest tests/test_reward.py               # about a minute on 2 cores; -m "not slow" for the quick ones
"""
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import reward
from reward import Grader, answer_text

ROOT = Path(reward.__file__).resolve().parent
CASES = ROOT.parent / "shared" / "data" / "grader_cases.jsonl"
SLOW = r"$\boxed{9^{9^{9^{9}}}}$"       # Math-Verify spends its whole timeout on it: 5 s at deadline_s=10


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as shared:
        yield shared


def rewards(verdicts):
    return [v.reward for v in verdicts]


def reasons(verdicts):
    return [v.reason for v in verdicts]


def gone(pid, patience_s=5.0):
    """True once the process has ended (a zombie that nobody reaps has)."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def signal_the_worker_of_item_0(grader, signum, delay_s=0.3):
    """In a thread: waits until item 0 is being graded, then sends its worker a signal from outside."""
    def run():
        while True:
            for worker in list(grader._pool):
                if worker.item == 0:
                    time.sleep(delay_s)
                    return os.kill(worker.proc.pid, signum)
            time.sleep(0.01)
    threading.Thread(target=run, daemon=True).start()


# ---- The reward of Eq. A2 ----------------------------------------------------------------------

RIGHT = [
    (r"The answer: $\boxed{1/2}$.", "0.5"), (r"\boxed{0.5}", r"\frac{1}{2}"), ("The answer is 42.", "42"),
    (r"\boxed{\dfrac{14}{3}}", "14/3"), (r"\[\boxed{2\sqrt{3}}\]", r"\sqrt{12}"), (r"\boxed{\pi}", r"\pi"),
    (r"so $x = \boxed{x+1}$", "1+x"), (r"\boxed{(1, 2)}", "(1,2)"), (r"\boxed{1,000}", "1000"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", "\\begin{pmatrix}\n1 \\\\ 2\n\\end{pmatrix}"),
    (r"\boxed{-3}", "$-3$")]


@pytest.mark.parametrize("response, answer", RIGHT)
def test_a_right_answer_in_another_dress_earns_one(grader, response, answer):
    verdict, = grader.grade([response], [answer])
    assert (verdict.reward, verdict.reason) == (1.0, "ok") and 0 < verdict.ms < 10_000


@pytest.mark.parametrize("response, answer, reason", [
    (r"\boxed{1/3}", "0.5", "wrong"), ("It is 41.", "42", "wrong"), (r"\boxed{x+2}", "1+x", "wrong"),
    ("I do not know", "42", "no_box"), ("", "42", "no_box"), (r"it is \boxed{\frac{x", "x", "unclosed"),
    (r"it is \boxed{\{x", "x", "unclosed"),
    (r"it is \boxed{}", "2", "parse_fail"), (r"\boxed{2}", "", "parse_fail")])
def test_a_response_that_earns_nothing_is_told_why(grader, response, answer, reason):
    verdict, = grader.grade([response], [answer])
    assert (verdict.reward, verdict.reason) == (0.0, reason)


def test_only_the_text_after_the_last_think_tag_is_graded(grader):
    right, wrong = r"$\boxed{42}$", r"$\boxed{41}$"
    responses = [f"<think>{right}</think>{wrong}", f"<think>{wrong}</think>{right}",
                 f"{right}</think>{right}</think>{wrong}", f"<think>{right}</think>",
                 f"<think>{right}", right]
    assert rewards(grader.grade(responses, ["42"] * 6)) == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert answer_text("a</think>b</think>c") == "c" and answer_text("<think>a") == "<think>a"


def test_only_the_end_of_a_very_long_response_is_graded(grader):
    filler = "so we go on. " * 10_000                   # 130,000 characters
    verdicts = grader.grade([filler + r"\boxed{42}", r"\boxed{42}" + filler], ["42", "42"])
    assert rewards(verdicts) == [1.0, 0.0]


def test_verdicts_come_in_the_order_of_the_responses(grader):
    rng = random.Random(0)
    hits = [rng.random() < 0.5 for _ in range(400)]
    responses = [f"Thus $\\boxed{{{i if hit else i + 1}}}$" + " " * rng.randrange(3000)
                 for i, hit in enumerate(hits)]
    assert rewards(grader.grade(responses, [str(i) for i in range(400)])) == [float(hit) for hit in hits]


def test_a_fractional_deadline_does_not_turn_every_reward_to_zero():
    with Grader(workers=1, deadline_s=2.5) as grader:       # a float inside makes Math-Verify return []
        assert rewards(grader.grade([r for r, _ in RIGHT], [a for _, a in RIGHT])) == [1.0] * len(RIGHT)


def test_misuse_raises_and_an_empty_batch_does_not(grader):
    assert grader.grade([], []) == []
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        grader.grade(["1", "2"], ["1"])
    with pytest.raises(TypeError, match="item 1"):
        grader.grade(["1", None], ["1", "2"])
    with Grader(workers=1) as closed:
        pass
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.grade(["1"], ["1"])


@pytest.mark.slow
@pytest.mark.skipif(not CASES.exists(), reason=f"{CASES} is not on this machine")
def test_the_reward_agrees_with_recorded_verdicts_of_math_verify():
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    cases = random.Random(0).sample([case for case in cases if case["math_verify"] != "HANG"], 100)
    with Grader(workers=2, deadline_s=4.0) as grader:
        verdicts = grader.grade([case["response"] for case in cases], [case["gold"] for case in cases])
    assert sum(v.reward == float(case["math_verify"]) for v, case in zip(verdicts, cases)) >= 95


# ---- Hostile responses -------------------------------------------------------------------------

def hostile_responses(marker):
    """Responses whose answer is never 5, most of them made to hang, exhaust, crash or execute."""
    code = f"__import__('os').system('touch {marker}')"
    n = 50_000
    boxed = ["9**9**9**9", "9^{9^{9^{9}}}", "(10^9)!", "99999999!", "9!!!!!!", "2^{10^9}", "2^{-10^{10}}",
             "1e999999999", r"\binom{10^9}{5\cdot 10^8}", r"\sum_{n=1}^{10^9} \frac{1}{n}", "9" * n,
             r"3^{10^{12}} \bmod 7",
             "(" * n + "1" + ")" * n, "{" * n + "1" + "}" * n, r"\frac{1}{" * 11_000 + "1" + "}" * 11_000,
             "(" * 300 + "1" + ")" * 300, r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{1000000}",
             "x+" * 10_000 + "x", code, rf"\text{{{code}}}", f"eval({code!r})", f"lambda: {code}",
             f"sympify({code!r})", "\0", "\0" * 1000, "\ud800", "\udfff\ud800" * 1000, "5\nimport os\n",
             "\r\n", "\u202e\u0665\u0301" * 1000, '"}\n{"ready": true}']
    plain = ["", "\0", "\ud800\udfff", "\n" * 1000, code, f"Answer: {code}", f"${code}$", f"1+{code}",
             "9^9^9^9^9 ", "(9**9**9**9) ", "1e999999999", "the answer is \\boxed{" * 2000, "\\boxed{{{{6",
             "answer: " * 6000, "1 000 " * 8000, "1+" * 25_000, "$" * n, "\u0301" * n,
             "<think>" * 1000 + r"\boxed{6}", r"\boxed" * 8000,
             '{"id": 0, "reason": "ok"}\n' * 50, "\\" * n]
    responses = [rf"so it is $\boxed{{{text}}}$" for text in boxed] + plain
    return (responses + [rf"\boxed{{{text}}}" for text in boxed])[:64]


@pytest.mark.slow
def test_64_hostile_responses_change_no_other_reward_and_keep_the_time_bound(tmp_path):
    marker, deadline_s, workers = tmp_path / "executed", 2.0, 2
    responses = [(text, 0.0) for text in hostile_responses(marker)]
    responses += [(r"thus $\boxed{\frac{10}{2}}$", 1.0)] * 20
    assert len(responses) == 84
    random.Random(1).shuffle(responses)
    with Grader(workers=workers, deadline_s=deadline_s) as grader:
        start = time.monotonic()
        verdicts = grader.grade([text for text, _ in responses], ["5"] * 84)
        took = time.monotonic() - start
        assert [(r, v.reward) for (r, want), v in zip(responses, verdicts) if v.reward != want] == []
        assert took < deadline_s * math.ceil(84 / workers) + 2
        assert all(v.ms < deadline_s * 1e3 + 500 for v in verdicts)
        assert "timeout" in reasons(verdicts) and not marker.exists()
        assert rewards(grader.grade([r"\boxed{5}", r"\boxed{6}"], ["5", "5"])) == [1.0, 0.0]


def test_the_time_bound_holds_when_every_response_must_be_killed():
    with Grader(workers=2, deadline_s=1.0) as grader:           # Math-Verify's own 1 s comes too late
        grader.grade(["1"], ["1"])                              # both workers are up
        start = time.monotonic()
        verdicts = grader.grade([SLOW] * 8, ["5"] * 8)
        assert time.monotonic() - start < 1.0 * 8 / 2 + 2       # without spares, 0.7 s more for every kill
        assert reasons(verdicts) == ["timeout"] * 8
        assert len(grader._pool) <= 4                           # at most one spare a worker


def test_a_worker_in_which_no_alarm_can_fire_is_killed_at_the_deadline():
    with Grader(workers=2, deadline_s=2.0) as grader:
        signal_the_worker_of_item_0(grader, signal.SIGSTOP)     # SIGALRM stays pending, as in a C loop
        start = time.monotonic()
        verdicts = grader.grade([SLOW] + [r"\boxed{5}"] * 20, ["5"] * 21)
        assert 1.9 < time.monotonic() - start < 3.0
        assert reasons(verdicts) == ["timeout"] + ["ok"] * 20
        assert rewards(grader.grade([r"\boxed{5}"], ["5"])) == [1.0]


def test_a_worker_killed_while_grading_loses_its_own_item_only():
    with Grader(workers=2) as grader:
        signal_the_worker_of_item_0(grader, signal.SIGKILL)
        verdicts = grader.grade([SLOW] + [r"\boxed{5}"] * 200, ["5"] * 201)
        assert reasons(verdicts) == ["killed"] + ["ok"] * 200 and verdicts[0].reward == 0.0


def test_workers_killed_while_idle_lose_nothing():
    with Grader(workers=4) as grader:
        for _ in range(2):                                      # right after their launch, and after work
            for worker in grader._pool:
                os.kill(worker.proc.pid, signal.SIGKILL)
                assert gone(worker.proc.pid)
            assert reasons(grader.grade([r"\boxed{5}"] * 20, ["5"] * 20)) == ["ok"] * 20


def test_an_interrupted_grade_leaves_no_stale_verdict_behind():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job starts with it ignored
    with Grader(workers=1) as grader:
        grader.grade(["1"], ["1"])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([SLOW], ["5"])
        assert reasons(grader.grade([r"\boxed{5}", r"\boxed{6}"], ["5", "5"])) == ["ok", "wrong"]
    signal.signal(signal.SIGINT, before)


def test_a_reply_that_breaks_the_protocol_is_not_believed(grader, monkeypatch):
    grader.grade(["1"], ["1"])
    for line in (b'{"id": 7, "reason": "ok"}\n', b'{"id": 0, "reason": "perfect"}\n', b"[" * 4000 + b"\n",
                 b"ok\n", b"[0]\n", b'{"id": 0}\n', b"\xff\xfe\n", b"7\n"):
        with monkeypatch.context() as patch:        # what a worker under a response's control could send
            patch.setattr(reward._Worker, "send", lambda worker, item: None)
            theirs, real = socketpair_with(line)
            worker = next(w for w in grader._pool if w.ready)
            grader._selector.unregister(worker.sock)
            worker.sock.close()
            worker.sock = real
            grader._selector.register(real, reward.selectors.EVENT_READ, worker)
            grader._pool.sort(key=lambda w: w is not worker)
            verdict, = grader.grade([r"\boxed{5}"], ["5"])
            theirs.close()
        assert (verdict.reward, verdict.reason) == (0.0, "killed"), line
        assert rewards(grader.grade([r"\boxed{5}"], ["5"])) == [1.0]


def socketpair_with(line):
    theirs, real = reward.socket.socketpair()
    theirs.sendall(line)
    return theirs, real


def test_workers_that_cannot_start_raise_instead_of_respawning_for_ever(capfd):
    with Grader(workers=2, memory_mb=16) as grader:             # too little to import sympy
        with pytest.raises(RuntimeError, match="import math_verify"):
            grader.grade([r"\boxed{5}"], ["5"])
        assert capfd.readouterr().err                           # the workers' complaint is not swallowed
        grader.memory_mb = 2048
        assert rewards(grader.grade([r"\boxed{5}"], ["5"])) == [1.0]


def test_a_worker_that_has_grown_is_replaced_and_no_item_is_lost():
    with Grader(workers=1, memory_mb=110) as grader:            # a new worker's 64 MB are over half
        pids = set()
        for _ in range(3):
            assert reasons(grader.grade([r"\boxed{5}"], ["5"])) == ["ok"]
            pids.add(grader._pool[0].proc.pid)
        assert len(pids) == 3


def test_workers_die_with_a_killed_parent_even_in_the_middle_of_a_hang():
    script = ("from reward import Grader\ng = Grader(workers=2)\ng.grade(['1'], ['1'])\n"
              "print(*[w.proc.pid for w in g._pool], flush=True)\n" f"g.grade([{SLOW!r}] * 2, ['5'] * 2)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.5)                                             # both are busy for another 4 s
    assert len(pids) == 2 and not any(gone(pid, 0.1) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid, 2.0) for pid in pids)


def test_close_ends_every_process():
    grader = Grader(workers=2)
    pids = [worker.proc.pid for worker in grader._pool]
    grader.close()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_response_that_never_ends_its_thought_earns_nothing_where_that_is_required():
    with Grader(workers=1, require_think_end=True) as grader:
        verdicts = grader.grade([r"<think>\boxed{7}", r"<think>hm</think>\boxed{7}", r"\boxed{7}"], ["7"] * 3)
    assert [v.reward for v in verdicts] == [0.0, 1.0, 0.0]
    assert verdicts[0].reason == "unclosed"
