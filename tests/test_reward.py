r"""reward.py and grading/worker.py: which responses earn a reward, and that no response can hurt the run.

    pytest tests/test_reward.py               # 7 minutes on 2 cores; -m "not slow": half a minute
"""
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import reward
from grading import worker as grading_worker
from grading.answers import KINDS, REASONS
from grading.cpus import usable_cpus
from grading.notation import repair_scientific
from grading.statement import FAULTS
from reward import Grader, graded_text

ROOT = Path(reward.__file__).resolve().parent
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not on this machine")
KNOWN = {*REASONS, *FAULTS, "truncated", "killed"}
SLOW = r"$\boxed{9^{9^{9^{9}}}}$"       # Math-Verify spends its whole timeout on it: 5 s at deadline_s=10


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as shared:
        yield shared


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def boxed(text):
    return rf"so it is $\boxed{{{text}}}$."


def rewards(verdicts):
    return [v.reward for v in verdicts]


def reasons(verdicts):
    return [v.reason for v in verdicts]


def each_its_own(text, n):
    """n texts that say the same: of equal ones, only the first would be graded."""
    return [text + " " * i for i in range(n)]


def gone(pid, patience_s=5.0):
    """True once the process has ended (a zombie that nobody reaps has)."""
    end = time.monotonic() + patience_s
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)


def start_in_time(grader):
    """Waits for both workers; returns the seconds. Skips where others use the CPUs: no bound holds there."""
    start = time.monotonic()
    while not all(worker.ready for worker in grader._pool):
        grader.grade(each_its_own("1", 2), ["1"] * 2)
    if (took := time.monotonic() - start) > 4:
        pytest.skip(f"others load this machine: its workers start in {took:.1f} s, not in 1.5 s")


def children(worker):
    """The processes that a worker grades in, one at a time; those that ended may be among them."""
    pid = worker.proc.pid
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:                                             # the worker has ended
        return []


def signal_item_0(grader, signum, whom, times=1):
    """In a thread: waits until item 0 is being graded, then sends its worker or its child a signal. `times`:
    also when it is graded again."""
    def run():
        met = set()                                             # the children that have graded it
        while len(met) < times:
            for worker in list(grader._pool):
                if worker.item != 0:
                    continue
                time.sleep(0.3)                                 # by now it has forked
                grading = [child for child in children(worker) if child not in met and not gone(child, 0)]
                if worker.item == 0 and grading:
                    met.update(grading)
                    os.kill(worker.proc.pid if whom == "worker" else grading[-1], signum)
            time.sleep(0.01)
    threading.Thread(target=run, daemon=True).start()


# ---- The reward of Eq. A2 ----------------------------------------------------------------------

RIGHT = [
    (r"The answer: $\boxed{1/2}$.", "0.5"), (r"\boxed{0.5}", r"\frac{1}{2}"),
    ("It is 41, no: \\boxed{42}", "42"),
    (r"\boxed{\dfrac{14}{3}}", "14/3"), (r"\[\boxed{2\sqrt{3}}\]", r"\sqrt{12}"), (r"\boxed{\pi}", r"\pi"),
    (r"so $x = \boxed{x+1}$", "1+x"), (r"\boxed{(1, 2)}", "(1,2)"), (r"\boxed{1,000}", "1000"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", "\\begin{pmatrix}\n1 \\\\ 2\n\\end{pmatrix}"),
    (r"\boxed{-3}", "$-3$")]


@pytest.mark.parametrize("response, answer", RIGHT)
def test_a_right_answer_in_another_dress_earns_one(grader, response, answer):
    verdict, = grader.grade([response], [answer])
    assert (verdict.reward, verdict.reason) == (1.0, "ok") and 0 < verdict.ms < 10_000


@pytest.mark.parametrize("response, answer, reason", [
    (r"\boxed{1/3}", "0.5", "wrong"), ("It is 42.", "42", "no_box"), (r"\boxed{x+2}", "1+x", "wrong"),
    ("I do not know", "42", "no_box"), ("", "42", "no_box"), (r"it is \boxed{\frac{x", "x", "unclosed"),
    (r"it is \boxed{\{x", "x", "unclosed"),
    (r"it is \boxed{}", "2", "parse_fail"), (r"\boxed{2}", "", "parse_fail"),
    (r"\boxed{42} or rather \boxed{4", "42", "unclosed")])
def test_a_response_that_earns_nothing_is_told_why(grader, response, answer, reason):
    verdict, = grader.grade([response], [answer])
    assert (verdict.reward, verdict.reason) == (0.0, reason)


def test_only_the_text_after_the_last_think_tag_is_graded(grader):
    right, wrong = r"$\boxed{42}$", r"$\boxed{41}$"
    responses = [f"<think>{right}</think>{wrong}", f"<think>{wrong}</think>{right}",
                 f"{right}</think>{right}</think>{wrong}", f"<think>{right}</think>",
                 f"<think>{right}", right]
    assert rewards(grader.grade(responses, ["42"] * 6)) == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert graded_text("a</think>b</think>c") == "c" and graded_text("<think>a") == "<think>a"


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


# ---- What counts is a choice -------------------------------------------------------------------

def test_without_a_strict_box_an_answer_without_a_box_counts(grader):
    responses = ["The answer is 42.", "It is 41.", boxed("42"), r"\boxed{42} or rather \boxed{4",
                 "I do not know"]
    assert reasons(grader.grade(responses, ["42"] * 5)) == ["no_box", "no_box", "ok", "unclosed", "no_box"]
    with Grader(workers=1, strict_box=False) as loose:
        assert reasons(loose.grade(responses, ["42"] * 5)) == ["ok", "wrong", "ok", "ok", "no_box"]
        assert rewards(loose.grade([r for r, _ in RIGHT], [a for _, a in RIGHT])) == [1.0] * len(RIGHT)


@pytest.mark.parametrize("text, want", [
    ("after_think", ["ok", "wrong", "no_box", "ok", "no_box"]),
    ("whole", ["ok", "wrong", "ok", "ok", "no_box"]),
    ("require_think", ["ok", "wrong", "no_box", "unclosed", "unclosed"])])
def test_what_is_graded_is_what_follows_the_thought_or_everything(text, want):
    responses = [r"<think>\boxed{1}</think>\boxed{42}", r"<think>\boxed{42}</think>\boxed{1}",
                 r"<think>\boxed{42}</think>It is so.", r"<think>\boxed{42}", ""]
    with Grader(workers=1, text=text) as grader:
        assert reasons(grader.grade(responses, ["42"] * 5)) == want
    assert graded_text("a</think>b", text) == ("a</think>b" if text == "whole" else "b")


def test_a_response_cut_at_its_token_limit_earns_nothing_unless_it_is_to_be_graded(grader):
    responses, finished = [boxed("5"), boxed("5"), boxed("6"), r"\boxed{5"], [True, False, False, False]
    verdicts = grader.grade(responses, ["5"] * 4, finished)
    assert reasons(verdicts) == ["ok", "truncated", "truncated", "truncated"]
    assert rewards(verdicts) == [1.0, 0.0, 0.0, 0.0] and verdicts[1].ms == 0.0
    with Grader(workers=1, score_unfinished=True) as lenient:
        assert reasons(lenient.grade(responses, ["5"] * 4, finished)) == ["ok", "ok", "wrong", "unclosed"]


@pytest.mark.slow
def test_the_kind_is_that_of_the_grader_unless_the_call_asks_for_another(grader):
    response, answer = boxed(r"\text{C) 204}"), "C"         # the OAT-Grader denies it
    assert [rewards(grader.grade([response], [answer], kind=kind)) for kind in KINDS] == [[1.0], [0.0], [1.0]]
    assert rewards(grader.grade([boxed(r"\frac{2}{4}")], ["0.5"])) == [1.0]
    for kind in KINDS:
        with Grader(kind, workers=1) as other:
            verdict, half = other.grade([response, boxed(r"\frac{2}{4}")], [answer, "0.5"])
            assert verdict.reward == (kind != "oat") and half.trace[0].startswith(
                {"math-verify": "reference, parsed", "oat": "string", "choice": "letter"}[kind])


def test_an_unknown_kind_or_text_is_refused(grader):
    with pytest.raises(ValueError, match="'math'.*math-verify"):
        Grader("math")
    with pytest.raises(ValueError, match="'all'.*whole"):
        Grader(text="all")
    with pytest.raises(ValueError, match="'math'.*math-verify"):
        grader.grade(["1"], ["1"], kind="math")
    with pytest.raises(ValueError, match="1 finished"):
        grader.grade(["1", "2"], ["1", "2"], [True])


@pytest.mark.parametrize("kind", KINDS)
def test_every_verdict_tells_what_was_extracted_and_what_was_tried_in_few_words(grader, kind):
    responses = [boxed("C"), boxed("D"), boxed(r"C" + r"+\text{no, C}" * 2000), boxed("😀" * 3000), "",
                 r"\boxed{C"]
    verdicts = grader.grade(responses, ["C"] * 6, kind=kind)
    assert [v.extracted for v in verdicts[:2]] == ["C", "D"] and all(v.trace for v in verdicts[:2])
    assert reasons(verdicts)[:2] == ["ok", "wrong"] and {v.reason for v in verdicts} <= KNOWN - {"killed"}
    for verdict in verdicts:
        assert len(verdict.extracted) <= 200 and len(verdict.trace) <= 20
        assert all(isinstance(step, str) and len(step) <= 300 for step in verdict.trace)


# ---- Reference answers -------------------------------------------------------------------------

@pytest.mark.parametrize("kind, bad", [
    ("math-verify", [r"\frac{", "", r"\text{", " ", "{", r"\boxed{}", "$$", "~"]),
    ("oat", [r"\frac{", r"\text{", "{", "", " ", r"\boxed{}"]), ("choice", ["5", "AC", "", r"\frac{", "K"])])
def test_check_names_the_references_that_cannot_be_matched_and_no_other(grader, kind, bad):
    good = ["5", r"\frac{1}{2}", "$x$", "4.5e33", "C", "x+$ $y", r"\text{yes}"]
    if kind == "choice":
        good = ["A", "J"]
    answers = [good[0], *bad, *good[1:]]
    found = grader.check(answers, kind)
    assert sorted(found) == list(range(1, 1 + len(bad))) and "ok" not in found.values()
    assert grader.check(good, kind) == {} == grader.check([], kind)


def test_check_does_not_name_a_reference_whose_trace_is_too_long_for_a_reply(grader):
    assert grader.check([r"\text{" + "😀" * 300 + "}"]) == {}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "minerva", "olympiad"])
def test_every_reference_of_the_benchmarks_equals_itself(grader, name):
    answers = [row["answer"] for row in rows(name)]
    for kind in ("math-verify", "oat"):
        assert {answers[i]: reason for i, reason in grader.check(answers, kind).items()} == {}, kind


@pytest.mark.slow
@needs_data
def test_the_floats_of_minerva_are_matched_by_their_latex_spelling_and_by_no_zero(grader):
    floats = [row["answer"] for row in rows("minerva") if repair_scientific(row["answer"]) != row["answer"]]
    latex = [repair_scientific(answer) for answer in floats]
    assert len(floats) == 58
    for kind, answers in [("math-verify", floats), ("math-verify", latex), ("oat", latex)]:
        assert sum(rewards(grader.grade([boxed(text) for text in latex], answers, kind=kind))) == 58, kind
        assert sum(rewards(grader.grade([boxed("0")] * 58, answers, kind=kind))) == 0, kind


@pytest.fixture(scope="module")
def case_file():
    """(cases, kind -> verdicts, seconds): the 750 cases graded once by each kind. (One worker takes twice as
    long.)"""
    cases, verdicts, start = rows("grader_cases"), {}, time.monotonic()
    for kind, text in [("math-verify", "after_think"), ("oat", "whole"), ("choice", "after_think")]:
        verdicts[kind] = [None] * len(cases)
        for deadline_s, is_bomb in ((10.0, False), (2.0, True)):         # a bomb gets no more by waiting
            some = [i for i, case in enumerate(cases) if (case["category"] == "bomb") == is_bomb]
            responses, answers = [cases[i]["response"] for i in some], [cases[i]["gold"] for i in some]
            finished = [kind != "math-verify" or "truncated" not in cases[i]["note"] for i in some]
            # The file says what is equal. What of it is not worked out, is a verdict's fault.
            with Grader(kind, workers=2, deadline_s=deadline_s, text=text, strict_answer=False) as grader:
                for i, verdict in zip(some, grader.grade(responses, answers, finished)):
                    verdicts[kind][i] = verdict
    return cases, verdicts, time.monotonic() - start


def different(cases, verdicts, want):
    """The cases, to be read, whose reward is not what `want` says."""
    return [(case["category"], case["gold"], case["response"][-80:], verdict.reason)
            for case, verdict in zip(cases, verdicts) if verdict.reward != float(want(case))]


@pytest.mark.slow
@needs_data
def test_the_training_reward_is_true_to_the_mathematics_of_the_case_file(case_file):
    pairs = [(case, verdict) for case, verdict in zip(case_file[0], case_file[1]["math-verify"])
             if not ("POLICY" in case["note"] or "AMBIGUOUS" in case["note"])]
    cases, verdicts = zip(*pairs)
    errors = different(cases, verdicts, lambda case: case["expected"])
    assert len(cases) > 600 and len(errors) <= 0.05 * len(cases), errors
    false = [(case, verdict) for case, verdict in pairs if not case["expected"]]
    false_positives = different(*zip(*false), lambda case: False)
    assert len(false) > 300 and len(false_positives) <= 0.015 * len(false), false_positives


@pytest.mark.slow
@needs_data
def test_bombs_empty_and_truncated_responses_of_the_case_file_never_earn_anything(case_file):
    cases = case_file[0]
    bomb = [case["category"] == "bomb" and not case["expected"] for case in cases]
    empty = [not case["response"].strip() for case in cases]
    truncated = ["truncated" in case["note"] for case in cases]
    assert sum(bomb) > 50 and sum(empty) >= 3 and sum(truncated) >= 7
    for kind, verdicts in case_file[1].items():
        for verdict, is_bomb, is_empty in zip(verdicts, bomb, empty):
            assert not (verdict.reward and (is_bomb or is_empty)), kind
    assert {v.reason for v, cut in zip(case_file[1]["math-verify"], truncated) if cut} == {"truncated"}


@pytest.mark.slow
@needs_data
def test_the_oat_kind_agrees_with_its_recorded_verdicts(case_file):
    pairs = [pair for pair in zip(case_file[0], case_file[1]["oat"]) if pair[0]["oat"] != "HANG"]
    deviations = different(*zip(*pairs), lambda case: case["oat"])
    assert len(pairs) > 700 and len(deviations) <= 0.02 * len(pairs), deviations


@pytest.mark.slow
@needs_data
def test_the_choice_kind_is_right_on_every_multiple_choice_case(case_file):
    pairs = [pair for pair in zip(case_file[0], case_file[1]["choice"]) if pair[0]["category"] == "mcq"]
    assert len(pairs) > 30 and different(*zip(*pairs), lambda case: case["expected"]) == []


@pytest.mark.slow
@needs_data
def test_the_case_file_by_both_graders_and_by_what_the_boxes_state(case_file):
    """Prints the figures of docs/evaluation.md: pytest -s -k case_file_by_both tests/test_reward.py"""
    figures = {}
    for kind in ("math-verify", "oat"):
        pairs = [(case, verdict) for case, verdict in zip(case_file[0], case_file[1][kind])
                 if case["category"] != "bomb"]                                         # all of them wrong
        clear = [(case, verdict) for case, verdict in pairs
                 if not ("POLICY" in case["note"] or "AMBIGUOUS" in case["note"])]
        for name, strict in [(kind, False), (f"{kind}, strict", True)]:
            accepted = [bool(verdict.reward and not (strict and verdict.fault)) for _, verdict in clear]
            expected = [case["expected"] for case, _ in clear]
            wrong = sum(ours and not theirs for ours, theirs in zip(accepted, expected))
            denied = sum(theirs and not ours for ours, theirs in zip(accepted, expected))
            figures[name] = (wrong, denied)
            print(f"{name}: {len(clear) - wrong - denied} of {len(clear)} agree; wrong answers accepted: "
                  f"{wrong}, right ones denied: {denied}")
        for case, verdict in pairs:
            if verdict.reward and verdict.fault and case["expected"]:
                print("  ", verdict.fault, verdict.extracted, "for", case["gold"], case["note"])
    for name, most in (("math-verify", (3, 9)), ("math-verify, strict", (2, 32))):
        assert all(found <= limit for found, limit in zip(figures[name], most)), figures
    assert figures["oat, strict"][0] < figures["oat"][0] == 21


@pytest.mark.clock
@needs_data
def test_the_case_file_is_graded_in_time(case_file):
    assert case_file[2] < 300
    assert max(v.ms for verdicts in case_file[1].values() for v in verdicts) <= (2 + 1) * 1000


@pytest.mark.slow
@needs_data
def test_without_the_strict_box_the_reward_agrees_with_recorded_verdicts_of_math_verify():
    recorded = [case for case in rows("grader_cases") if case["math_verify"] != "HANG"]
    cases = random.Random(0).sample(recorded, 100)
    with Grader(workers=2, deadline_s=4.0, strict_box=False, strict_answer=False) as grader:
        verdicts = grader.grade([case["response"] for case in cases], [case["gold"] for case in cases])
    assert sum(v.reward == float(case["math_verify"]) for v, case in zip(verdicts, cases)) >= 95


@pytest.mark.clock
@pytest.mark.slow
@needs_data
def test_two_workers_grade_100_responses_a_second():
    answers = [row["answer"] for row in rows("math500")] * 2
    right, wrong = answers[:500], answers[1:500] + answers[:1]
    responses = ["Therefore, we get the following. " * 30 + boxed(text) for text in right + wrong]
    rates, load = [], os.getloadavg()[0]
    with Grader(workers=2) as grader:
        grader.grade(responses[:20], answers[:20])
        for _ in range(3):
            start = time.monotonic()
            total = sum(rewards(grader.grade(responses, answers)))
            rates.append(len(answers) / (time.monotonic() - start))
            assert 495 < total < 550
    if max(rates) < 100 and load > len(os.sched_getaffinity(0)):
        pytest.skip(f"others load this machine ({load:.1f}): {max(rates):.0f} a second")
    assert max(rates) >= 100, rates


@pytest.mark.parametrize("cgroup, files, cpus", [
    ("0::/", {}, 8),
    ("0::/", {"cpu.max": "250000 100000"}, 2),                                      # a container's own view
    ("0::/", {"cpu.max": "max 100000"}, 8), ("0::/", {"cpu.max": "50000 100000"}, 1),
    ("0::/", {"cpu.max": "9900000 100000"}, 8),
    ("0::/../../x", {"cpu.max": "250000 100000"}, 2),
    # A parent's quota binds:
    ("0::/slurm/job", {"slurm/cpu.max": "300000 100000", "slurm/job/cpu.max": "max 100000"}, 3),
    ("3:cpu,cpuacct:/docker/x", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8), (None, {}, 8)])
def test_a_quota_of_a_control_group_counts_as_fewer_cpus(cgroup, files, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    if cgroup is not None:
        (tmp_path / "cgroup").write_text(f"7:memory:/\n{cgroup}\n")
    assert usable_cpus(str(tmp_path / "fs"), str(tmp_path / "cgroup")) == cpus


@pytest.mark.parametrize("cpus, ranks, workers", [(96, 8, 11), (16, 1, 15), (2, 2, 1), (1, 1, 1)])
def test_the_graders_of_a_rank_leave_a_core_to_its_engine(cpus, ranks, workers, monkeypatch):
    monkeypatch.setattr(reward, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(Grader, "_refill", lambda self: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert Grader().workers == workers and Grader(workers=5).workers == 5


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


@pytest.mark.clock
@pytest.mark.slow
def test_64_hostile_responses_change_no_other_reward_and_keep_the_time_bound(tmp_path):
    marker, deadline_s, workers = tmp_path / "executed", 2.0, 2
    responses = [(text, 0.0) for text in hostile_responses(marker)]
    responses += [(r"thus $\boxed{\frac{10}{2}}$", 1.0)] * 20
    assert len(responses) == 84
    random.Random(1).shuffle(responses)
    with Grader(workers=workers, deadline_s=deadline_s) as grader:
        start_in_time(grader)
        start = time.monotonic()
        verdicts = grader.grade([text for text, _ in responses], ["5"] * 84)
        took = time.monotonic() - start
        assert [(r, v.reward) for (r, want), v in zip(responses, verdicts) if v.reward != want] == []
        assert took < deadline_s * math.ceil(84 / workers) + 2
        assert all(v.ms < deadline_s * 1e3 + 500 for v in verdicts)
        assert "timeout" in reasons(verdicts) and not marker.exists()
        assert rewards(grader.grade([r"\boxed{5}", r"\boxed{6}"], ["5", "5"])) == [1.0, 0.0]


def hostile_strings(n, seed=0):
    """Noise of many sorts: unicode, braces, code, formulas, terminal codes, lone surrogates; long ones."""
    rng = random.Random(seed)

    def some(words, most):
        return "".join(rng.choices(words, k=rng.randint(1, most)))

    def unicode():
        return "".join(chr(rng.randrange(0x20, rng.choice([0x250, 0x110000]))) for _ in range(30))

    def nested():
        return r"\frac{1+" * (k := rng.randint(1, 300)) + "x" + "}{2}" * k

    latex = [r"\sqrt", r"\int", r"\sum", r"\left(", r"\right]", "{", "}", "_", "^", r"\begin{pmatrix}",
             r"\end{cases}", "&", r"\\", "x", "1", r"\frac", r"\boxed{"]
    code = ["__import__('os')", ".system('id')", "lambda: 0", "eval(", "exec(", "print", ")", "\n", ";", "="]
    sorts = [unicode, nested, lambda: some("{}{}()[]\\$", 80), lambda: some(latex, 25), lambda: some(code, 9),
             lambda: some("0123456789.,+-*/^e !", 40), lambda: some("xyz01+-*^()=<>!|&", 40),
             lambda: some("\0\a\b\r\x1b\x7f\u200b\u202e7", 30),
             lambda: some(["\ud800", "\udfff", "5", "é", "😀"], 30),
             lambda: "\x1b[31m5\x1b[2J\x1b]0;" + some("ab;", 9) + "\a",
             lambda: some(["1 ", "x+", r"\cdot ", "9", "()", r"\text{a}"], 5) * rng.randint(1000, 20_000)]
    frames = ["%s", r"\boxed{%s}", r"$\boxed{%s}$", r"</think>\boxed{%s", "The answer is %s.",
              r"\boxed{5}%s\boxed{%s"]
    return [rng.choice(frames).replace("%s", rng.choice(sorts)()) for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_1000_hostile_strings_change_no_verdict_of_200_ordinary_pairs(kind):
    rng, letters = random.Random(1), "ABCDEFGHIJ"
    items = [(text, rng.choice(["5", "C", text[:300]]), None) for text in hostile_strings(1000)]
    for i in range(100):
        right, wrong = f"{i}.5", f"{i + 1}.5"
        if kind == "choice":
            right, wrong = letters[i % 10], letters[(i + 1) % 10]
        items += [(boxed(right), right, 1.0), (boxed(wrong), right, 0.0)]
    rng.shuffle(items)
    with Grader(kind, workers=2, deadline_s=2.0) as grader:
        verdicts = grader.grade([response for response, _, _ in items], [answer for _, answer, _ in items])
    assert len(verdicts) == 1200 and {v.reason for v in verdicts} <= KNOWN
    assert all(v.reward == float(v.reason == "ok") for v in verdicts)
    assert [(r, v) for (r, _, want), v in zip(items, verdicts) if want is not None and v.reward != want] == []


@pytest.mark.slow
def test_a_grading_stays_below_its_memory_limit_whatever_it_is(memory_mb=1000):
    n, peaks, done = 20_000, {}, threading.Event()
    bombs = ["2^{10^9}", "(10^9)!", "9**9**9**9", "9^{9^{9^{9}}}", "2^{-10^{10}}", "1e999999999",
             r"\binom{10^9}{5\cdot 10^8}", "(" * n + "1" + ")" * n, "{" * n + "1" + "}" * n,
             r"\frac{1}{" * 5000 + "1" + "}" * 5000, r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^9}",
             "(x+1)^{10^6}", "(1+x)^{10^6} - 1", "10^{10^{8}}", r"\prod_{n=1}^{10^8} n"]

    def watch():
        while not done.wait(0.01):
            for worker in list(grader._pool):
                try:
                    child = children(worker)[-1]
                    status = Path(f"/proc/{child}/status").read_text()
                except (OSError, IndexError):
                    continue
                if "VmHWM" in status:
                    kb = int(status.split("VmHWM:")[1].split()[0])
                    peaks[child] = max(kb, peaks.get(child, 0))
    with Grader(workers=2, deadline_s=4.0, memory_mb=memory_mb) as grader:
        threading.Thread(target=watch, daemon=True).start()
        try:
            responses, answers = [boxed(bomb) for bomb in bombs], ["5"] * len(bombs)
            for kind in ("math-verify", "oat"):
                assert not any(rewards(grader.grade(responses, answers, kind=kind)))
        finally:
            done.set()
    assert len(peaks) >= 2 and 20_000 < max(peaks.values()) <= memory_mb * 1024, peaks


@pytest.mark.clock
def test_the_time_bound_holds_when_every_response_must_be_killed():
    with Grader(workers=2, deadline_s=1.0) as grader:           # Math-Verify's own 1 s comes too late
        start_in_time(grader)
        pool, start = list(grader._pool), time.monotonic()
        verdicts = grader.grade(each_its_own(SLOW, 8), ["5"] * 8)
        assert time.monotonic() - start < 1.0 * 8 / 2 + 2
        assert reasons(verdicts) == ["timeout"] * 8
        assert grader._pool == pool                             # none is started again


def poll(grader, patience_s=30.0):
    """Calls submit, as a decoding engine does after every step, until nothing is left to be graded."""
    end = time.monotonic() + patience_s
    while grader._left and time.monotonic() < end:
        time.sleep(0.01)
        grader.submit()
    assert not grader._left


def test_submitted_responses_are_graded_while_other_work_goes_on_and_collected_in_order():
    with Grader(workers=2) as grader:
        for i in range(40):
            grader.submit([boxed(str(i))], [str(i - i % 2)], [i % 5 > 0])
            grader.submit()
        poll(grader)                                            # nothing but submit gets them graded
        want = ["wrong" if i % 2 else "ok" for i in range(40)]
        want[::5] = ["truncated"] * 8
        assert reasons(grader.collect()) == want
        assert grader.collect() == []
        assert reasons(grader.grade([boxed("1"), boxed("2")], ["1", "1"])) == ["ok", "wrong"]


def test_equal_responses_are_graded_once_a_batch_and_what_tells_them_apart_is_heeded():
    with Grader(workers=1) as grader:
        handed_out, hand_out = [], grader._hand_out
        grader._hand_out = lambda worker, number: (handed_out.append(number), hand_out(worker, number))
        thoughts = [f"<think>{thought}</think> {boxed('1')}" for thought in "ab"]
        grader.submit([boxed("1"), *thoughts], ["1"] * 3)
        grader.submit([boxed("1"), boxed("1"), boxed("1")], ["1", "2", "1"], [True, True, False])
        grader.submit([boxed("1")], ["1"], kind="oat")
        verdicts = grader.collect()
        assert reasons(verdicts) == ["ok", "ok", "ok", "ok", "wrong", "truncated", "ok"]
        assert sorted(handed_out) == [0, 1, 4, 6]
        assert verdicts[2].ms == verdicts[1].ms > 0 and verdicts[2] is not verdicts[1]
        assert reasons(grader.grade([boxed("1")], ["1"])) == ["ok"]
        assert len(handed_out) == 5                             # another batch knows nothing of it
        grader.deadline_s = 1.0
        for worker in list(grader._pool):
            grader._discard(worker)                             # the next one has this deadline
        assert reasons(grader.grade([SLOW] * 2, ["5"] * 2)) == ["timeout"] * 2
        assert len(handed_out) == 7                             # what failed says nothing about its equals


@pytest.mark.clock
def test_a_hung_response_that_was_submitted_holds_nobody_up_and_is_killed_at_its_deadline():
    with Grader(workers=2, deadline_s=4.0) as grader:
        grader.grade(each_its_own("1", 2), ["1"] * 2)
        start = time.monotonic()
        grader.submit([SLOW, *each_its_own(boxed("5"), 5)], ["5"] * 6)
        assert time.monotonic() - start < 2                     # it does not wait for the verdict
        poll(grader)
        assert reasons(grader.collect()) == ["timeout"] + ["ok"] * 5


@pytest.mark.slow
def test_a_worker_whose_reply_waited_for_a_busy_parent_is_not_late():
    with Grader(workers=1, deadline_s=1.5) as grader:
        grader.grade(["1"], ["1"])
        worker, = grader._pool
        for text in each_its_own(boxed("5"), 2):
            grader.submit([text], ["5"])
            time.sleep(3)                                   # a long decoding step: over the deadline
        assert reasons(grader.collect()) == ["ok"] * 2
        assert grader._pool == [worker]


def test_closing_with_responses_under_way_leaves_nothing_to_collect():
    grader = Grader(workers=1)
    grader.submit([SLOW], ["5"])
    grader.close()
    assert grader.collect() == [] and grader._pool == []


def test_a_call_in_between_cannot_take_the_verdicts_of_what_was_submitted(grader):
    grader.submit([boxed("1")], ["1"])
    with pytest.raises(RuntimeError, match="collect the 1 verdicts"):
        grader.grade([boxed("2")], ["1"])
    with pytest.raises(TypeError):
        grader.submit([boxed("1"), None], ["1", "1"])           # refused as a whole: nothing of it is graded
    assert reasons(grader.collect()) == ["ok"]


@pytest.mark.slow
def test_milliseconds_are_those_of_the_grading_not_of_a_parent_that_was_busy():
    with Grader(workers=1) as grader:
        grader.grade([boxed("1")], ["1"])
        grader.submit([boxed("1")], ["1"])
        time.sleep(1.0)                                         # a decoding step in which no reply is read
        verdict, = grader.collect()
        assert verdict.reward == 1 and 0 < verdict.ms < 500


@pytest.mark.clock
@pytest.mark.parametrize("whom, late_s", [("child", 0.0), ("worker", reward.BACKSTOP_S)])
def test_where_no_alarm_can_fire_the_kill_comes_at_the_deadline(whom, late_s):
    with Grader(workers=2, deadline_s=2.0) as grader:
        start_in_time(grader)
        pool = list(grader._pool)
        signal_item_0(grader, signal.SIGSTOP, whom)             # SIGALRM stays pending, as in a C loop
        start = time.monotonic()
        verdicts = grader.grade([SLOW, *each_its_own(r"\boxed{5}", 20)], ["5"] * 21)
        assert 1.9 + late_s < time.monotonic() - start < 3.0 + late_s
        assert reasons(verdicts) == ["timeout"] + ["ok"] * 20
        assert (grader._pool == pool) == (whom == "child")      # it costs a child; or a worker
        assert rewards(grader.grade([r"\boxed{5}"], ["5"])) == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["child", "worker"])
@pytest.mark.parametrize("times, reason", [(1, "timeout"), (2, "killed")])      # the first is its own
def test_a_response_whose_process_is_killed_is_graded_once_more(whom, times, reason):
    with Grader(workers=2) as grader:
        signal_item_0(grader, signal.SIGKILL, whom, times)
        verdicts = grader.grade([SLOW, *each_its_own(r"\boxed{5}", 100)], ["5"] * 101)
        assert reasons(verdicts) == [reason] + ["ok"] * 100 and verdicts[0].reward == 0.0


@pytest.mark.slow
def test_workers_killed_while_idle_lose_nothing():
    with Grader(workers=4) as grader:
        for _ in range(2):                                      # right after their launch, and after work
            for worker in grader._pool:
                os.kill(worker.proc.pid, signal.SIGKILL)
                assert gone(worker.proc.pid)
            verdicts = grader.grade(each_its_own(r"\boxed{5}", 20), ["5"] * 20)
            assert reasons(verdicts) == ["ok"] * 20


@pytest.mark.slow
def test_an_interrupted_grade_leaves_no_stale_verdict_behind():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored in a background job
    with Grader(workers=1) as grader:
        grader.grade(["1"], ["1"])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([SLOW], ["5"])
        assert reasons(grader.grade([r"\boxed{5}", r"\boxed{6}"], ["5", "5"])) == ["ok", "wrong"]
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_reply_that_breaks_the_protocol_is_not_believed(grader, monkeypatch):
    grader.grade(["1"], ["1"])
    lies = [b'{"id": 7, "reason": "ok"}\n', b'{"id": 0, "reason": "perfect"}\n', b"[" * 4000 + b"\n", b"ok\n",
            b"[0]\n", b'{"id": 0}\n', b"\xff\xfe\n", b"7\n"]
    for line in lies:
        with monkeypatch.context() as patch:        # what a worker under a response's control could send
            theirs, real = socket.socketpair()
            worker = next(w for w in grader._pool if w.ready)
            patch.setattr(worker, "send", lambda item, line=line: theirs.sendall(line))
            grader._selector.unregister(worker.sock)
            worker.sock.close()
            worker.sock = real
            grader._selector.register(real, reward.selectors.EVENT_READ, worker)
            grader._pool.sort(key=lambda w: w is not worker)
            verdict, = grader.grade([r"\boxed{5}"], ["6"])
            theirs.close()
        assert worker not in grader._pool, line
        assert (verdict.reward, verdict.reason) == (0.0, "wrong"), line             # by another, who is asked


@pytest.mark.slow
def test_workers_that_cannot_start_raise_instead_of_respawning_for_ever(capfd):
    with Grader(workers=2, memory_mb=16) as grader:             # too little to import sympy
        with pytest.raises(RuntimeError, match="import math_verify"):
            grader.grade([r"\boxed{5}"], ["5"])
        assert capfd.readouterr().err                           # the workers' complaint is not swallowed
        grader.memory_mb = 2048
        assert rewards(grader.grade([r"\boxed{5}"], ["5"])) == [1.0]


@pytest.mark.slow
def test_a_worker_does_not_grow_with_what_it_grades():
    """It used to: with each answer, the caches of parsers and of sympy grew."""
    with Grader(workers=1) as grader:
        sizes = []
        for batch in range(3):
            responses = [boxed(rf"\frac{{{batch}{i}}}{{{i + 2}}} x^{{{i}}}") for i in range(20)]
            assert len(grader.grade(responses, ["y"] * 20)) == 20
            status = Path(f"/proc/{grader._pool[0].proc.pid}/status").read_text()
            sizes.append(int(status.split("VmSize:")[1].split()[0]))
        assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.slow
def test_workers_and_their_children_die_with_a_killed_parent_even_in_the_middle_of_a_hang():
    script = ("from reward import Grader\ng = Grader(workers=2)\ng.grade([*'123456789'], ['1'] * 9)\n"
              "print(*[w.proc.pid for w in g._pool], flush=True)\n"
              f"g.grade({each_its_own(SLOW, 2)}, ['5'] * 2)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(1.0)                                             # both are busy for another 4 s
    for pid in list(pids):
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    assert len(pids) >= 4
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid, 2.0) for pid in pids)


@pytest.mark.slow
def test_close_ends_every_process():
    grader = Grader(workers=2)
    grader.grade(each_its_own("1", 9), ["1"] * 9)
    grader.submit(each_its_own(SLOW, 2), ["5"] * 2)
    time.sleep(0.5)
    pids = [worker.proc.pid for worker in grader._pool]
    for worker in grader._pool:
        pids += children(worker)
    grader.close()
    assert len(pids) >= 4 and all(gone(pid) for pid in pids)


# ---- Where a worker finds its modules ----------------------------------------------------------

STRANGER = "raise ImportError('a stranger')"


def graded_elsewhere(project, env, cwd, python=sys.executable):
    """What a Grader made of the files in `project` says, in another interpreter."""
    script = (f"import sys\nsys.path.insert(0, {str(project)!r})\nfrom reward import Grader\n"
              "responses, answers = [r'\\boxed{A}', r'\\boxed{B}'], ['A', 'A']\n"
              "with Grader(workers=1) as grader:\n"
              "    for kind in ('math-verify', 'oat', 'choice'):\n"
              "        print(*[v.reason for v in grader.grade(responses, answers, kind=kind)])\n")
    done = subprocess.run([python, "-c", script], env=os.environ | env, cwd=cwd, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def copied(tmp_path):
    """A folder with what someone takes to have the Grader."""
    shutil.copytree(ROOT / "grading", tmp_path / "copied" / "grading",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "reward.py", tmp_path / "copied")
    return tmp_path / "copied"


@pytest.mark.slow
@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("path", ["", "{strangers}", "{project}", "{strangers}:{project}",
                                  "{project}/grading:{project}"])
def test_a_worker_takes_no_file_of_the_project_for_a_package_and_no_package_for_grading(
        copied, tmp_path, path, safe_path):
    for name in ("math_verify", "sympy", "pylatexenc", "latex2sympy2_extended"):
        (copied / f"{name}.py").write_text(STRANGER)
    strangers = tmp_path / "strangers"
    (strangers / "grading").mkdir(parents=True)
    (strangers / "grading" / "__init__.py").write_text(STRANGER)
    path = path.format(strangers=strangers, project=copied)
    env = {"PYTHONSAFEPATH": safe_path, "PYTHONPATH": path}
    assert graded_elsewhere(copied, env, cwd=strangers) == ["ok wrong"] * 3


def test_a_worker_finds_the_packages_that_lie_in_the_folder_of_the_project(copied):
    """As where all was installed into one folder."""
    import math_verify
    python = sys._base_executable                               # without this environment's packages
    bare = subprocess.run([python, "-c", "import math_verify"], env={}, cwd="/", capture_output=True)
    if bare.returncode == 0:
        pytest.skip("outside of this environment there is a math_verify, too")
    for package in Path(math_verify.__file__).parents[1].iterdir():
        (copied / package.name).symlink_to(package)
    assert graded_elsewhere(copied, {"PYTHONPATH": str(copied)}, "/", python) == ["ok wrong"] * 3


# ---- What a grading may take, and say (and see tests/test_attacks.py) ------------------------

ROGUE = """
import sys
sys.path.insert(0, {root!r})
from grading import worker
honest = worker.judge
def judge(item, seconds):
    if not item["response"].startswith("run "):
        return honest(item, seconds)
    try:
        found = eval(item["response"][4:], {{"os": worker.os}})
        return "ok", "ran", found if isinstance(found, list) else []
    except Exception as error:
        return "wrong", type(error).__name__, []
worker.judge = judge
worker.main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def rogue_file(tmp_path_factory):
    """A worker that runs any Python expression: as if a response had broken out of sympy's parser."""
    path = tmp_path_factory.mktemp("rogue") / "rogue.py"
    path.write_text(ROGUE.format(root=str(ROOT)))
    return path


@pytest.fixture(scope="module")
def run(rogue_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading_worker, "__file__", str(rogue_file))
        grader = Grader(workers=1)
    with grader:
        yield lambda code: grader.grade([f"run {code}"], ["5"])[0]


def test_a_worker_cannot_take_more_memory_than_it_has(run):
    assert run("len(bytearray(2 << 30))").extracted == "MemoryError"
    assert run("len(bytearray(200 << 20))").extracted == "ran"


def test_a_trace_too_long_for_a_reply_is_cut_and_the_verdict_arrives(run):
    # Around the limit of a reply: 4 * 300 * 6 + 6 * length.
    for length in [0, 1, *range(130, 170), 300]:
        verdict = run(f"['\u00e9' * 300] * 4 + ['\u00e9' * {length}]")
        assert verdict.reason == "ok" and len(verdict.trace) in (0, 5)
    assert run("['x' * 10**6] * 10**4").trace == ["x" * 300] * 20 and run("['\u00e9' * 300] * 20").trace == []
    assert len(run("['\u00e9' * 300] * 4").trace) == 4


@pytest.mark.slow
@pytest.mark.parametrize("strict_box", [True, False])
def test_code_in_a_response_is_not_executed(tmp_path, strict_box):
    marker = tmp_path / "executed"
    codes = [code.replace("FILE", str(marker)) for code in [
        "__import__('os').system('touch FILE')", '__import__("os").system("touch FILE")', "open('FILE', 'w')",
        "eval(\"open('FILE', 'w')\")", "exec(\"open('FILE', 'w')\")", "(lambda: open('FILE', 'w'))()",
        "[open(f, 'w') for f in ['FILE']]", "sympify(\"__import__('os').system('touch FILE')\")",
        "().__class__.__base__.__subclasses__()[0]; open('FILE', 'w')",
        "Symbol('x').__init__.__globals__['os']", "1 if open('FILE', 'w') else 2", "x=open('FILE','w')",
        "f'{open(\"FILE\", \"w\")}'", "$(touch FILE)"]]
    responses = [frame.replace("%s", code) for code in codes
                 for frame in ["%s", r"\boxed{%s}", r"$\boxed{\text{%s}}$", "The answer is $%s$.",
                               r"\boxed{(%s, 1)}"]]
    with Grader(workers=2, strict_box=strict_box) as grader:
        for kind in KINDS:
            for answers in (["5"] * len(responses), [text[:300] for text in responses]):
                assert {v.reason for v in grader.grade(responses, answers, kind=kind)} <= KNOWN
    assert not marker.exists()


# ---- Why did this response earn nothing? -------------------------------------------------------

def explained(*args, stdin=""):
    return subprocess.run([sys.executable, ROOT / "reward.py", *map(str, args)], input=stdin,
                          capture_output=True, text=True, timeout=120)


def test_the_command_line_says_what_was_extracted_and_compared_and_the_verdict(tmp_path):
    file = tmp_path / "response.txt"
    file.write_text(r"<think>\boxed{3}</think> so \boxed{\frac12}")
    done = explained("--response", file, "--answer", "0.5")
    assert done.returncode == 0 and done.stderr == ""
    assert "43 characters; graded are the last 19" in done.stdout
    math_verify, oat = done.stdout.split("\noat\n")
    for part, tried in [(math_verify, "math_verify.verify: True"), (oat, "string: ")]:
        lines = [line.split(maxsplit=1) for line in part.splitlines() if line.startswith("  ")]
        assert lines[0] == ["extracted", r"'\\frac12'"]
        assert lines[-1][0] == "verdict" and "ok, reward 1" in lines[-1][1]
        assert any(word == "tried" and tried in what for word, what in lines)


@pytest.mark.slow
def test_the_command_line_reads_standard_input_and_takes_the_switches():
    args = ["--response", "-", "--answer", "42", "--grader", "math-verify"]
    done = explained(*args, stdin="The answer is 42.")
    assert "no_box, reward 0" in done.stdout and "oat" not in done.stdout
    done = explained(*args, "--no-strict_box", "--grade_text", "whole", stdin="The answer is 42.</think>")
    assert "ok, reward 1" in done.stdout


@pytest.mark.parametrize("file", ["missing.txt", "."])
def test_the_command_line_names_a_file_that_it_cannot_read_in_one_line(tmp_path, file):
    done = explained("--response", tmp_path / file, "--answer", "42")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("reward.py: --response: ") and str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
