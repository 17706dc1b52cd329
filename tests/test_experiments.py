"""experiments/: the rule of the claims, the statistics, the variants of the data; and everything once, in miniature."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_paper as P
from conftest import ROOT

from data import tiny_examples


@pytest.mark.parametrize("mean, half, least, says", [
    (2.0, 1.0, 0.0, "holds"), (-2.0, 1.0, 0.0, "does not hold"), (0.5, 1.0, 0.0, "cannot tell"), (5.0, None, 0.0, "cannot tell"),
    (-1.0, 1.0, -3.0, "holds"), (-5.0, 1.0, -3.0, "does not hold"), (-3.0, 1.0, -3.0, "cannot tell")])
def test_a_claim_holds_only_if_the_whole_interval_lies_on_its_side(mean, half, least, says):
    assert P.verdict(mean, half, least) == says


def test_intervals_are_students_and_differences_paired_over_common_seeds():
    mean, half, n = P.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, n) == (3.0, 5) and half == pytest.approx(2.776 * np.sqrt(2.5) / np.sqrt(5))
    assert P.interval([4.0]) == (4.0, None, 1) and P.interval([]) == (None, None, 0)
    mean, half, n = P.difference({0: 10.0, 1: 20.0, 2: 30.0, 7: 99.0}, {0: 9.0, 1: 19.0, 2: 29.0})
    assert (mean, half, n) == (1.0, 0.0, 3)


def test_every_run_can_be_trained():
    """What it starts from exists and has the same steps in all; learning rates are its own or another's."""
    for name, run in P.RUNS.items():
        assert not run.lr or (run.lr in P.TUNED), name
        if run.start:
            assert P.RUNS[run.start].steps + run.steps == P.STEPS, name
        elif ">" not in name and not any(other.start == name for other in P.RUNS.values()) and name not in P.EXPERTS:
            assert run.steps == P.STEPS, name
    for part, runs in P.PARTS.items():
        assert all(not run.start or run.start in runs for run in runs.values()), part


def test_weak_demonstrations_answer_the_same_problems_and_are_mostly_wrong():
    weak, good = P.weak_demonstrations(), tiny_examples("train")
    right = lambda examples: np.mean([re.search(r"boxed\{(-?\d+)\}", e.demo)[1] == e.answer for e in examples])
    assert [(e.problem, e.answer) for e in weak] == [(e.problem, e.answer) for e in good]
    assert 0.78 < right(good) < 0.88 and 0.2 < right(weak) < 0.5


@pytest.mark.parametrize("style", ["careful", "plain"])
def test_experts_see_no_problem_of_the_task_and_make_no_mistake(style):
    expert, known = P.expert_demonstrations(style), {e.problem for split in P.TINY_SPLITS for e in tiny_examples(split)}
    assert len(expert) == len({e.problem for e in expert}) == 2048 and not known & {e.problem for e in expert}
    assert all(re.search(r"boxed\{(-?\d+)\}", e.demo)[1] == e.answer for e in expert)


def test_steps_to_a_level():
    rows = [{"step": s, "eval/heldout": s / 10, "eval/long": s / 20} if s % 2 == 0 else {"step": s} for s in range(9)]
    assert P.steps_to(rows, 30) == 4 and P.steps_to(rows, 99) == 12


@pytest.mark.slow
def test_the_paper_in_miniature_runs_from_one_command_to_tables_figures_and_claims():
    command = [sys.executable, "experiments/tiny_paper.py", "--quick"]
    subprocess.run(["rm", "-rf", ROOT / "out/tiny_paper_quick"], check=True)
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = ROOT / "out/tiny_paper_quick/results"
    for figure in ("fig2a-SFT", "fig2a-RL", "fig2a-SRFT", "fig2b-demo-0", "fig2b-own-0", "fig3", "fig4", "fig5", "fig6", "figA2"):
        assert (results / f"{figure}.png").stat().st_size > 5000, figure
        assert json.loads((results / f"{figure}.json").read_text())
    tables, claims = (results / "tables.md").read_text(), (results / "claims.md").read_text()
    for title, runs in (("Table 1", P.TABLE1), ("Table 2", P.TABLE2), ("Table 3", P.TABLE3)):
        assert f"**{title}" in tables and all(f"| {name} |" in tables for name in runs)
    assert claims.count("cannot tell") >= 25 and "| holds" not in claims          # one seed proves nothing
    path = json.loads((results / "fig3.json").read_text())["runs"]
    assert set(path) == {"SFT", "RL", "SRFT", "SFT->RL"} and len(path["SFT->RL"]) == 3
    again = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "eval/heldout" not in again.stdout           # nothing is left to train
