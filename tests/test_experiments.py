"""experiments/: the rule of the claims, the statistics, the variants of the data; everything in miniature.

    pytest tests/test_experiments.py          # -m "not slow" without the miniature
"""
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import claims as C
import questions as Q
import runs as R
import seeds as S
import tiny_paper as P
from config import TINY, Config
from conftest import ROOT
from data import load_examples
from records import Records


@pytest.mark.parametrize("mean, half, least, says", [
    (2.0, 1.0, 0.0, "holds"), (-2.0, 1.0, 0.0, "does not hold"), (0.5, 1.0, 0.0, "cannot tell"),
    (5.0, None, 0.0, "cannot tell"), (-1.0, 1.0, -3.0, "holds"), (-5.0, 1.0, -3.0, "does not hold"),
    (-3.0, 1.0, -3.0, "cannot tell")])
def test_a_claim_holds_only_if_the_whole_interval_lies_on_its_side(mean, half, least, says):
    assert S.verdict(mean, half, least) == says


def test_intervals_are_students_and_differences_paired_over_common_seeds():
    mean, half, n = S.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, n) == (3.0, 5) and half == pytest.approx(2.776 * np.sqrt(2.5) / np.sqrt(5))
    assert S.interval([4.0]) == (4.0, None, 1) and S.interval([]) == (None, None, 0)
    mean, half, n = S.difference({0: 10.0, 1: 20.0, 2: 30.0, 7: 99.0}, {0: 9.0, 1: 19.0, 2: 29.0})
    assert (mean, half, n) == (1.0, 0.0, 3)


def test_every_run_can_be_trained():
    """What it starts from exists and has the same steps in all; learning rates are its own or another's."""
    starts = {run.start for run in R.RUNS.values()}
    for name, run in R.RUNS.items():
        assert isinstance(run.lr, float) or not run.lr or not R.RUNS[run.lr].lr, name
        assert not run.near or not (run.lr or R.RUNS[run.near].lr), name
        if R.table_of(name) in ("equal_compute", "trials", "larger", "quality"):
            continue                                            # equal compute, not equal steps
        if run.start:
            stages_in_full = run.start in ("sft", "grpo")
            assert R.RUNS[run.start].steps + run.steps == (1 + stages_in_full) * R.STEPS, name
        elif ">" not in name and name not in starts and name not in R.EXPERTS:
            assert run.steps == R.STEPS, name
    for part, runs in R.PARTS.items():
        assert all(not run.start or run.start in runs for run in runs.values()), part


def test_the_second_family_is_another_architecture_of_the_same_size_and_tokens():
    other = ROOT / R.SECOND_FAMILY["srft qwen3"].flags[1]
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (TINY, other))
    assert (first.config.model_type, second.config.model_type) == ("llama", "qwen3")
    assert 1 < second.num_parameters() / first.num_parameters() < 1.01
    assert AutoTokenizer.from_pretrained(TINY).get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()


def share_right(examples):
    return np.mean([re.search(r"boxed\{(-?\d+)\}", e.demo)[1] == e.answer for e in examples])


def test_weak_demonstrations_answer_the_same_problems_and_are_mostly_wrong():
    weak, good = P.weak_demonstrations(), load_examples("tiny:train")
    assert [(e.problem, e.answer) for e in weak] == [(e.problem, e.answer) for e in good]
    assert 0.78 < share_right(good) < 0.88 and 0.2 < share_right(weak) < 0.5


@pytest.mark.parametrize("style", ["careful", "plain"])
def test_experts_see_no_problem_of_the_task_and_make_no_mistake(style):
    expert = P.expert_demonstrations(style)
    known = {e.problem for split in P.SPLITS for e in load_examples(f"tiny:{split}")}
    assert len(expert) == len({e.problem for e in expert}) == 2048 and not known & {e.problem for e in expert}
    assert share_right(expert) == 1


def test_held_out_demonstrations_are_of_the_held_out_problems_and_as_good_as_those_of_training():
    demonstrated = P.held_out_demonstrations()
    assert [e.problem for e in demonstrated] == [e.problem for e in load_examples("tiny:heldout")]
    assert 0.75 < share_right(demonstrated) < 0.9


FINAL = {                # accuracies that agree with the paper
    "srft": 0.9, "sft-12>srft": 0.9, "srft weak": 0.96, "srft qwen3": 0.9, "sft+rl": 0.8, "luffy": 0.75,
    "relift": 0.7, "sft-12>grpo": 0.72, "sft-20>grpo": 0.72, "sft-28>grpo": 0.72, "sft>grpo": 0.72,
    "sft_kl": 0.48, "grpo>sft": 0.4, "grpo>sft_kl": 0.45, "grpo-truncated": 0.66, "grpo": 0.6, "sft": 0.5,
    "grpo-12>sft": 0.4, "grpo-12>sft_kl": 0.45,
    **dict.fromkeys(R.TABLE3, 0.6), **dict.fromkeys(R.SWITCHES, 0.95)}
TERMS = ("sft_demo", "rl_demo", "rl_pos", "rl_neg")
CHANGES = ("changed by more than 0.1", "changed by more than 0.5", "mean |change|")


def synthetic(folder, true):
    """Results of five seeds, every statement of which is the paper's (true), or its opposite."""
    def swap(x):
        return x if true else 1 - x

    results = S.Results.__new__(S.Results)
    results.bench, results.seeds = SimpleNamespace(results=folder, steps=lambda run: run.steps), range(5)
    results.rows = {}
    for name, run in R.RUNS.items():
        for seed in range(5):
            jitter = 0.001 * ((7 * seed + len(name)) % 5)
            results.rows[name, seed] = [evaluated(row, jitter) for row in course(name, run, true, swap)]
    for seed in range(5):
        for source in ("demo", "own"):
            changed = {label: dict.fromkeys(CHANGES, swap(x) + seed / 1000)
                       for label, x in (("SFT", 0.7), ("SRFT", 0.55), ("RL", 0.4))}
            (folder / f"fig2b-{source}-{seed}.json").write_text(json.dumps(changed))
        paths = {"SFT": (0.7, 0.7), "RL": (0.4, 0.4), "SRFT": (0.4, 0.5), "SFT->RL": (0.7, 0.6)}
        runs = {}
        for label, path in paths.items():
            runs[label] = [{"step": step, "distances": [swap(x) + seed / 1000, 0.0, 0.0]}
                           for step, x in zip((28, 40), path)]
        (folder / f"fig3-{seed}.json").write_text(json.dumps({"runs": runs}))
    return results


def course(name, run, true, swap):
    """The rows of a run, with one "accuracy" and one "entropy"."""
    # When it reaches what it reaches in the end: at its first evaluation, or at its last.
    late, end = (name == "sft+rl") != true, swap(FINAL.get(name, 0.6))
    rows = [{"step": 0, "entropy": 0.5, "accuracy": 0.0}]
    for step in range(4, run.steps + 1, 4):
        accuracy = end if step == run.steps or not late else 0.0
        rows.append({"step": step, "entropy": 0.5, "accuracy": accuracy,
                     "response_len/mean": 50.0, "reward/mean": 0.5, "entropy/rollout": 0.3})
        for norm, term in enumerate(TERMS if step <= 20 else TERMS[::-1], 1):
            rows[-1][f"grad_norm/{term}"] = norm
    if name in ("grpo-12>sft", "grpo>sft", "sft-28>grpo"):
        rows[0] |= {"accuracy": swap(0.7), "entropy": swap(0.2)}
        for row in rows[1:3]:
            row |= {"accuracy": swap(0.3), "entropy": swap(0.8)}
    if name in ("grpo", "srft"):
        up = (name == "srft") == true
        rows[0]["entropy"], rows[-1]["entropy"] = swap(0.8), swap(0.2)
        rows[-1]["response_len/mean"] += 10 if up else -10
        for row in rows[1:]:
            row |= {"reward/mean": 0.8 if up else 0.2, "entropy/rollout": 0.8 if up else 0.2}
    return rows


def evaluated(row, jitter):
    """The row as a run logs it: both of each split."""
    row = dict(row)
    accuracy, entropy = row.pop("accuracy") + jitter, row.pop("entropy") + jitter
    for split in ("heldout", "long"):
        row |= {f"eval/{split}": accuracy, f"eval_entropy/{split}": entropy}
    return row


@pytest.mark.parametrize("true, says", [(True, "holds"), (False, "does not hold")])
def test_every_claim_has_the_direction_of_the_paper(tmp_path, true, says):
    results = synthetic(tmp_path, true)
    claims = C.claims(results)
    assert {text: verdict for text, _, verdict in claims if verdict != says} == {}
    assert len(claims) == 61 and sum(text.endswith("\u2020") for text, *_ in claims) == 28
    asked = C.reviews(results)
    assert {text: verdict for text, _, verdict in asked if "SRFT" in text and verdict != says} == {}
    assert [found for text, found, _ in asked if "distillation" in text] == [
        f"{early}.0 \u00b1 0.0 % in the first half of the steps, {late}.0 \u00b1 0.0 % in the second, 5 seeds"
        for early, late in ((10, 40), (20, 30), (30, 20), (40, 10), (30, 70))]
    ahead = {verdict for text, _, verdict in asked if text.startswith("RL against SFT")}
    assert ahead == {"RL ahead" if true else "SFT ahead"}
    assert {verdict for text, _, verdict in asked if text.startswith("`")} == {"better" if true else "worse"}


def test_steps_are_counted_through_a_sequence_at_multiples_of_8(tmp_path):
    results = synthetic(tmp_path, True)

    def row(step, accuracy):
        return {"step": step, "eval/heldout": accuracy, "eval/long": accuracy}

    results.rows["sft-12", 0] = [row(0, 0.0), row(8, 0.1), row(12, 0.4)]
    results.rows["sft-12>grpo", 0] = [row(0, 0.4), row(4, 0.2), row(8, 0.9), row(12, 0.5), row(28, 0.6)]
    for level, step in ((10, 8), (15, 16), (45, 24), (60, 40), (99, 48)):
        assert results.steps_to("sft-12>grpo", level)[0] == step


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A Bench that writes to out/ and results/ in tmp_path."""
    monkeypatch.chdir(ROOT)
    bench = P.Bench(SimpleNamespace(quick=False, jobs=1, seeds=5))
    bench.out, bench.results = tmp_path / "out", tmp_path / "results"
    bench.tuning = tmp_path / "tuning.json"
    bench.records = Records(bench.results / "runs")
    return bench


def test_results_are_a_line_a_run_and_a_file_a_table_and_read_back_as_they_were(tmp_path):
    rows = [{"step": 0, "eval/long": 0.5}, {"step": 1, "grad_norm": 2.0}, {"step": 2, "eval/long": 0.75}]
    records = Records(tmp_path / "runs")
    records.add("table1", "sft", 1, {"seconds": 3}, rows[:1])
    records.add("table1", "sft", 0, {"seconds": 4}, rows)
    records.add("table1", "sft", 1, {"seconds": 5}, rows)                   # in the place of the first
    records.add("table2", "srft", 0, {"seconds": 6}, rows)
    assert len((tmp_path / "runs/table1.jsonl").read_text().splitlines()) == 2
    again = Records(tmp_path / "runs")
    assert again.rows == dict.fromkeys([("sft", 0), ("sft", 1), ("srft", 0)], rows)
    assert again.facts["sft", 1] == {"seconds": 5} and again.tables["srft", 0] == "table2"


def test_flops_are_of_the_tokens_generated_and_of_those_trained_on():
    row = {"step": 1, "response_len/mean": 10.0, "perf/tokens_per_s": 200.0, "time/step": 2.0}
    config = vars(Config(method="luffy", n_rollouts=8, demo_in_group="replaces", prompts_per_step=4))
    found = P.with_flops([{"step": 0}, row, row], 1_000_000, config)
    one = 2e6 * (10 * 7 * 4 + 3 * 400) / 1e12
    assert [row["tflop"] for row in found] == pytest.approx([0.0, one, 2 * one])


@pytest.mark.parametrize("name, steps", [("srft", [0, 1, 2]), ("srft 0 % wrong", [0, 2])])
def test_only_tables_whose_curves_are_drawn_keep_steps_without_evaluation(name, steps, bench, monkeypatch):
    def train(name, seed, lr, evaluation, folder):
        folder.mkdir(parents=True)
        rows = [{"step": 0, "eval/heldout": 0.1}]
        for step in (1, 2):
            rows.append({"step": step, "perf/tokens_per_s": 100.0, "time/step": 1.0, "time/grade": 0.5})
        rows[2]["eval/heldout"] = 0.2
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = vars(Config(model=TINY)) | {"git_commit": None, "machine": "this"}
        (folder / "config.json").write_text(json.dumps(config))
        Path(f"{folder}.json").write_text(json.dumps({"recipe": bench.recipe(name), "seconds": 1}))

    monkeypatch.setattr(bench, "train", train)
    bench.tuning.write_text(json.dumps({"srft 0.001": 0.5}))
    P.one(bench, name, 4, "", {})
    rows = bench.records.rows[name, 4]
    assert [row["step"] for row in rows] == steps and "time/grade" not in rows[-1]
    parameters = P.parameters(Path(TINY))
    assert rows[-1]["tflop"] == pytest.approx(2 * 6 * parameters * 100 / 1e12, rel=1e-4)       # of both steps


def test_a_rate_near_another_is_looked_for_by_halves_and_doubles_until_the_best_is_inside(bench, monkeypatch):
    trained, accuracy = [], {1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.7, 8e-3: 0.8, 1.6e-2: 0.9}

    def train(name, seed, lr, evaluation, folder):
        trained.append((name, lr))
        write_accuracy(folder, accuracy.get(lr, 0.0))

    monkeypatch.setattr(bench, "train", train)
    wanted = {name: R.RUNS[name] for name in ("srft long", "srft 256")}
    with ThreadPoolExecutor(1) as pool:
        P.tune(bench, pool, wanted)
    assert trained == [*(("srft", lr) for lr in R.GRID),
                       *(("srft trial", lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
                       *(("srft 256", lr) for lr in (8e-3, 1.6e-2, 3.2e-2))]
    assert bench.lr("srft") == 1e-3 and bench.lr("srft long") == bench.lr("srft 256") == 1.6e-2


def made_up(rows):
    """Results of these rows by (run, seed)."""
    results = S.Results.__new__(S.Results)
    results.rows, results.seeds = rows, range(5)
    return results


def evaluations(*points):
    return [{"step": step, "tflop": tflop, "eval/heldout": accuracy, "eval/long": accuracy}
            for step, tflop, accuracy in points]


def test_accuracy_at_equal_compute_lies_between_evaluations_counts_both_stages_and_ends_with_the_run():
    results = made_up({
        ("srft long", 0): evaluations((0, 0.0, 0.1), (40, 2.0, 0.5), (80, 4.0, 0.6), (168, 9.0, 0.8)),
        ("sft 48", 0): evaluations((0, 0.0, 0.1), (48, 0.5, 0.3)),
        ("sft 48>grpo", 0): evaluations((0, 0.0, 0.3), (48, 1.0, 0.5), (96, 2.0, 0.7)),   # 0.5 to 2.5 TFLOP
        ("sft 400", 0): evaluations((0, 0.0, 0.1), (400, 2.01, 0.4)),
        ("grpo long", 0): evaluations((0, 0.0, 0.1), (208, 8.0, 0.9))})
    assert Q.budget(results) == 2.0
    assert Q.at_budget(results, "sft 48>grpo", 2.0)[0] == pytest.approx(60.0)
    assert Q.at_budget(results, "sft 48>grpo", 4.0) == {}
    found = Q.equal_compute(results)
    assert found[1, "SFT->RL"][0] == "sft 48>grpo" and found[1, "SFT"][1][0] == pytest.approx(40, abs=0.5)
    assert found[2, "RL"][1][0] == pytest.approx(50.0) and (2, "SFT") not in found
    # Of several it is the best in the mean over both sets, also where one set alone is looked at.
    uneven = evaluations((0, 0.0, 0.3), (160, 1.0, 0.5), (208, 1.5, 0.5))
    results.rows["sft 160", 0] = evaluations((0, 0.0, 0.1), (160, 0.5, 0.3))
    results.rows["sft 160>grpo", 0] = [{**row, "eval/heldout": 0.0, "eval/long": 0.9} for row in uneven]
    assert Q.equal_compute(results, Q.on("long"))[1, "SFT->RL"] == ("sft 48>grpo", {0: pytest.approx(60.0)})
    # What was trained for longer is read at one budget, too; a larger model at that of its own SRFT.
    results.rows["luffy 60 % wrong", 0] = evaluations((0, 0.0, 0.1), (48, 1.5, 0.3), (56, 2.5, 0.5))
    assert Q.with_wrong(results, 60)["LUFFY"][0] == pytest.approx(40.0)
    results.rows["srft 256", 0] = evaluations((0, 0.0, 0.1), (40, 8.0, 0.7), (48, 9.0, 0.8))
    results.rows["grpo 256", 0] = evaluations((0, 0.0, 0.1), (56, 7.0, 0.4), (64, 9.0, 0.6))
    assert Q.of_size(results, 1)["SRFT"][0] == pytest.approx(70.0)
    assert Q.of_size(results, 1)["RL"][0] == pytest.approx(50.0)
    asked = []
    Q.ask_all(results, lambda text, a, b: asked.append((text, a, b)))
    of_larger = {0: pytest.approx(70.0)}, {0: pytest.approx(50.0)}
    assert ("with 3.1M parameters, SRFT beats RL", *of_larger) in asked
    assert ("with 2 x the compute of 40 steps of SRFT, SRFT beats RL", found[2, "SRFT"][1],
            found[2, "RL"][1]) in asked


def test_the_highest_stable_rate_is_counted_from_the_best_one_on():
    def runs(*accuracies):
        return [evaluations((0, 0.0, 0.1), (40, 2.0, accuracy)) for accuracy in accuracies]

    rates = {3e-4: runs(0.2, 0.3), 6e-4: runs(0.8, 0.8), 1.2e-3: runs(0.7, 0.8), 2.4e-3: runs(0.9, 0.1)}
    assert Q.highest_stable(rates) == 1.2e-3

    def said(rates):
        known = {}
        for rate, seeds in rates.items():
            for seed, rows in enumerate(seeds):
                known[f"SRFT, 2 x {rate:g}", seed] = rows
        [(text, says, _)] = Q.stable_rates(made_up(known))
        assert text == "SRFT, 2 updates a step: the highest stable rate"
        return says

    assert said(rates) == "0.0012, of 4 rates, 2 seeds"
    good = rates | {2.4e-3: runs(0.7, 0.7), 4.8e-3: runs(0.7, 0.7)}
    assert said(good) == "at least 0.0048, of 5 rates, 2 seeds"
    assert Q.highest_stable(rates | {2.4e-3: runs(0.7, 0.7), 4.8e-3: runs(0.1, 0.1)}) == 2.4e-3
    died = evaluations((0, 0.0, 0.1), (12, 1.0, 0.9))
    assert Q.heldout(died) == 0.0
    chance = {3e-4: runs(0.0, 0.0), 6e-4: runs(0.0, 0.1)}
    for nowhere in ({3e-4: [died, died]}, chance, {3e-4: runs(0.9, 0.0)}):
        assert Q.highest_stable(nowhere) is None and said(nowhere).startswith("none")


def test_pictures_are_drawn_of_what_is_known(tmp_path):
    rows = {}
    for seed in range(2):
        rows["srft long", seed] = evaluations((0, 0.0, 0.1), (40, 2.0, 0.5 + seed / 10), (168, 8.4, 0.8))
        for name in ("srft 40 % wrong", "srft 256", "srft-w_rl-1"):
            rows[name, seed] = evaluations((0, 0.0, 0.1), (40, 2.0, 0.4))
        for rate in (6e-4, 1.2e-3):
            broken = evaluations((0, 0.0, 0.1), (40, 2.0, rate * 100))
            rows[f"SRFT, 2 x {rate:g}", seed] = [{**row, "grad_norm": 2.0} for row in broken]
    rows["SRFT, 2 x 0.0012", 0].insert(1, {"step": 39, "grad_norm": 9.0, "loss/rl_neg": -30.0})
    results = made_up(rows)
    for name, panels in Q.pictures(results).items():
        Q.draw(tmp_path / f"{name}.png", panels)
    Q.draw_differences(tmp_path / "weights.png", {"a": (2.0, 1.0, 5), "one seed": (0.5, None, 1)}, "points")
    drawn = {file.stem for file in tmp_path.iterdir()}
    assert drawn == {"equal_compute", "stability-2", "quality", "size", "weights"}
    panels = {title: lines for title, _, lines in Q.stability_panels(results, 2)}
    largest = panels["gradient norm, the largest finite one"]
    assert largest == {"SRFT": [(6e-4, [2.0, 2.0]), (1.2e-3, [9.0, 2.0])]}
    lowest = "the term of wrong rollouts (Eq. 12), the lowest"
    assert panels[lowest] == {"SRFT": [(1.2e-3, [-30.0])]}                  # of the seed that has it
    panel = lowest, "learning rate", {"SRFT": [(6e-4, [1.0, 1.0]), (1.2e-3, [-30.0])]}
    shown = Q.table("stability-2", panel)
    assert shown.splitlines() == [
        f"**stability-2: {lowest}** (2 seeds)", "", "| learning rate | 0.0006 | 0.0012 |", "|---|---|---|",
        "| SRFT | 1.0 \u00b1 0.0 | -30.0 (1 seed) |"]
    (_, _, lines), _ = Q.size_panels(results)                       # only what is known at both sizes
    assert lines == {"SRFT": [(0.8, [pytest.approx(50.0), pytest.approx(60.0)]), (3.1, [40.0, 40.0])]}
    assert Q.pictures(made_up({})) == {}


def test_a_run_that_dies_is_a_result_where_that_is_asked_and_an_error_elsewhere(bench, monkeypatch):
    def train(name, seed, lr, evaluation, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "grad_norm": 9.0}) + "\n")
        config = vars(Config(model=TINY)) | {"git_commit": None, "machine": "this"}
        (folder / "config.json").write_text(json.dumps(config))
        raise RuntimeError(says)

    monkeypatch.setattr(bench, "train", train)
    name = "SRFT, 1 x 0.0048"
    for says in ("srft-0: stopped before its end; the same command starts it again",
                 "srft.py failed; the end of its log:\nWARNING: engine and trainer disagree\nMemoryError"):
        with pytest.raises(RuntimeError, match=re.escape(says)):            # which says nothing of the rate
            P.one(bench, name, 0, "", R.STABILITY)
        assert not bench.done(name, 0)
    says = "srft.py failed; its end:\n[rank0]: RuntimeError: the policy is dead: of nan.\n[W1128] NCCL"
    P.one(bench, name, 0, "", R.STABILITY)
    assert bench.done(name, 0) and bench.records.facts[name, 0]["died"] == "the policy is dead: of nan."
    assert bench.records.rows[name, 0][-1]["step"] == 7
    bench.tuning.write_text(json.dumps({"srft 0.001": 0.5}))
    with pytest.raises(RuntimeError, match="the policy is dead"):
        P.one(bench, "srft 0 % wrong", 0, "", R.QUALITY)


def write_accuracy(folder, accuracy):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 80, "eval/valid": accuracy}) + "\n")


def test_each_rate_is_tuned_once_for_what_is_wanted_and_second_stages_start_from_the_best(bench, monkeypatch):
    trained, accuracy = [], {1e-4: 0.1, 3e-4: 0.7, 1e-3: 0.7, 3e-3: 0.0}

    def train(name, seed, lr, evaluation, folder):
        assert seed == R.TUNING_SEED and evaluation == "tiny:valid"
        trained.append((name, lr, folder.name))
        write_accuracy(folder, accuracy[lr])

    monkeypatch.setattr(bench, "train", train)
    wanted = {name: R.RUNS[name] for name in ("sft", "sft-28", "sft-28>grpo", "srft --eq12_advantage")}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):                                          # the second time, nothing is left
            P.tune(bench, pool, wanted)
    expected = []
    for name in ("sft", "srft", "sft-28>grpo"):
        expected += [(name, lr, bench.folder(name, 100, lr).name) for lr in R.GRID]
    assert sorted(trained[:8] + trained[9:]) == sorted(expected)
    assert trained[8] == ("sft-28", 3e-4, "sft-28-100")             # the smaller of the best two
    assert bench.lr("sft-28>grpo") == bench.lr("srft --eq12_advantage") == 3e-4


@pytest.mark.parametrize("best, more", [(1e-4, 3e-5), (3e-3, 1e-2), (3e-4, None)])
def test_a_best_rate_at_an_edge_of_the_grid_is_tried_one_further(best, more, bench, monkeypatch):
    trained = []

    def train(name, seed, lr, evaluation, folder):
        trained.append(lr)
        write_accuracy(folder, {more: 0.9, best: 0.5}.get(lr, 0.1))

    monkeypatch.setattr(bench, "train", train)
    with ThreadPoolExecutor(1) as pool:
        P.tune(bench, pool, {"sft": R.RUNS["sft"]})
    assert trained == [*R.GRID, *([more] if more else [])] and bench.lr("sft") == (more or best)


def test_what_has_changed_since_is_made_again_and_nothing_else(bench, monkeypatch):
    """A second stage: its own rate, its first stage's rate, the definition of either; and a figure of a model
    that is no more."""
    trained, stages = [], {name: R.RUNS[name] for name in ("sft-28", "sft-28>grpo")}

    def train(command, log):                                        # what srft.py would write
        folder = Path(command[-1])
        trained.append(folder.name)
        (folder / "hf").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 40, "eval/long": 0.5}) + "\n")
        config = vars(Config(model=TINY, lr=command[command.index("--lr") + 1]))
        config |= {"git_commit": None, "machine": "this"}
        (folder / "config.json").write_text(json.dumps(config))

    def again(**best):
        best, scores = {"sft": 1e-3, "grpo": 3e-4} | best, {}
        for lr in R.GRID:
            for name in best:
                scores[f"{name} {lr:g}"] = float(lr == best[name])
            for first in R.GRID:
                scores[f"sft-28>grpo {lr:g} after {first:g}"] = float(lr == 1e-4)
        bench.tuning.write_text(json.dumps(scores))
        trained.clear()
        for name in stages:
            P.one(bench, name, 3, "", {name: R.RUNS[name] for name in stages})
        return trained

    monkeypatch.setattr(bench, "start", train)
    assert again() == ["sft-28-3", "sft-28_to_grpo-3"] and again() == []
    (bench.results / "fig3-3.json").touch()
    shutil.rmtree(bench.out)                                        # results are enough
    assert again() == [] and bench.measured(3)
    assert again(sft=3e-4) == ["sft-28-3", "sft-28_to_grpo-3"]
    assert not bench.measured(3) and again(sft=3e-4) == []
    assert set(S.Results(bench).rows) == {("sft-28", 3), ("sft-28>grpo", 3)}
    monkeypatch.setitem(R.RUNS, "sft-28>grpo", R.Run("grpo", 12, "sft-28", ("--clip_eps", "0.1")))
    assert set(S.Results(bench).rows) == {("sft-28", 3)}            # no report of what was another run
    assert again(sft=3e-4) == ["sft-28_to_grpo-3"] and again(sft=3e-4) == []


def test_a_child_ends_with_the_process_that_started_it(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
if __name__ == "__main__":
    import preloaded
    preloaded.context.set_forkserver_preload([])
    child = preloaded.start(["-c", "import time; time.sleep(100)"])
    print(child.pid, flush=True)
    os._exit(9)
"""
    (tmp_path / "starter.py").write_text(code)
    started = subprocess.run([sys.executable, tmp_path / "starter.py"], stdout=subprocess.PIPE, timeout=60)
    pid = int(started.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail("it is still there after 10 seconds")


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (ROOT / "out/tiny_paper_quick").mkdir(parents=True, exist_ok=True)
    with open(ROOT / "out/tiny_paper_quick/lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(sys, "argv", ["tiny_paper.py", "--quick"])
        with pytest.raises(SystemExit, match="another one is at work"):
            P.main()


def test_a_run_that_a_signal_stopped_is_no_result(bench, tmp_path, monkeypatch):
    def stopped(command, log):                                      # as srft.py: exit code 0, no hf/
        (tmp_path / "run").mkdir()

    monkeypatch.setattr(bench, "start", stopped)
    with pytest.raises(RuntimeError, match="stopped before its end"):
        bench.train("sft", 0, 1e-3, "tiny:valid", tmp_path / "run")


def test_the_front_page_has_the_numbers_of_the_tables():
    def cells(line):
        return [cell.strip() for cell in line.strip("|\n").split("|")]

    tables, _, _ = (ROOT / "experiments/results/tables.md").read_text().partition("A second family")
    rows = {cells(line)[0]: cells(line)[1:] for line in tables.splitlines() if "|" in line}
    page = (ROOT / "docs" / "paper.md").read_text()
    shown = page.split("The paper's comparison at that size")[1].splitlines()
    runs = ["base", "sft", "grpo", C.FORWARD, C.BACKWARD, "luffy", "relift", "sft+rl", "srft", "srft-w_sft-1",
            "srft-w_rl-1"]
    for column, name in enumerate(("held-out", "long")):
        found = next(cells(line) for line in shown if line.startswith(f"| {name} |"))
        assert found == [name, *(rows[run][column] for run in runs)]


@pytest.mark.slow
def test_the_paper_in_miniature_runs_from_one_command_to_tables_figures_and_claims():
    command = [sys.executable, "experiments/tiny_paper.py", "--quick"]
    subprocess.run(["rm", "-rf", ROOT / "out/tiny_paper_quick"], check=True)
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = ROOT / "out/tiny_paper_quick/results"
    for figure in ("fig2a-SFT", "fig2a-RL", "fig2a-SRFT", "fig2b-demo-0", "fig2b-own-0", "fig3-0", "fig4",
                   "fig5", "fig6", "figA2", "terms"):
        assert (results / f"{figure}.png").stat().st_size > 5000, figure
        assert json.loads((results / f"{figure}.json").read_text())
    tables, claims = (results / "tables.md").read_text(), (results / "claims.md").read_text()
    for title, runs in (("Table 1", R.TABLE1), ("Table 2", R.TABLE2), ("Table 3", R.TABLE3)):
        assert f"**{title}" in tables and all(f"| {name} |" in tables for name in runs)
    hours = re.search(r"^(\d+) runs, one core each: 0\.\d hours, without tuning.$", tables, re.M)
    assert int(hours[1]) == len(R.TABLE1 | R.TABLE2 | R.TABLE3)
    records = Records(results / "runs")
    assert len(records.facts) == int(hours[1]) and all(of["seconds"] > 0 for of in records.facts.values())
    assert all(rows[-1]["tflop"] > 0 for rows in records.rows.values())
    assert claims.count("cannot tell") == 62 and "| holds" not in claims          # one seed proves nothing
    path = json.loads((results / "fig3-0.json").read_text())["runs"]
    assert set(path) == {"SFT", "RL", "SRFT", "SFT->RL"} and len(path["SFT->RL"]) == 3
    again = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "eval/heldout" not in again.stdout           # nothing is left to train


@pytest.mark.slow
def test_the_comparison_on_a_pretrained_model_runs_from_one_command_and_goes_on_where_it_stopped(tmp_path):
    """The tiny model with a chat template in the place of SmolLM2."""
    shutil.copytree(TINY, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    P.write_examples(tmp_path / "train.jsonl", load_examples("tiny:train")[:32])
    P.write_examples(tmp_path / "test.jsonl", load_examples("tiny:heldout")[:9])
    command = [sys.executable, "experiments/smollm2_gsm8k.py", "--cpu", "--model", tmp_path / "model",
               "--train", tmp_path / "train.jsonl", "--test", tmp_path / "test.jsonl", "--limit", "4",
               "--steps", "2", "--only", "sft+rl", "--only", "sft->rl", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^(sft\+rl|sft->rl) +\d+\.\d %   response \d+ tokens$", done.stdout, re.M)) == 2
    assert all((tmp_path / "out" / f"{figure}.png").stat().st_size > 5000 for figure in ("fig5", "fig6"))
    assert len(list((tmp_path / "out").glob("*/hf"))) == 3
    shutil.rmtree(tmp_path / "out" / "sft-rl-grpo" / "hf")                     # stopped before its end
    again = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("srft.py --method") == 1, again.stderr[-3000:]
    command[command.index("--steps") + 1] = "3"
    other = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert other.returncode == 1 and "was trained with {'steps': 2}" in other.stderr
