"""bench/step.py without TRL: this project's side end to end, and what the tables are made by."""
import json
import random
import statistics
import subprocess
import sys
import time

import pytest

import step
from conftest import ENV, ROOT
from step_channel import Phases


def test_phases_within_phases_are_counted_once_and_time_before_the_step_is_not_counted():
    phases, waited = Phases(), 0
    with phases("outer"):
        time.sleep(0.2)                          # waiting for a command, as in GRPOTrainer's training_step
        phases.begin()
        waited = -time.perf_counter()
        with phases("inner"):
            time.sleep(0.02)
        time.sleep(0.05)
    time.sleep(0.01)
    waited += time.perf_counter()
    found = phases.end()
    assert found["phases"]["inner"] >= 0.02 and found["phases"]["outer"] >= 0.05
    assert found["phases"]["other"] >= 0.01
    assert sum(found["phases"].values()) == pytest.approx(found["step"])      # so nothing is counted twice
    assert found["step"] < waited + 0.2 and found["cpu_step"] < 0.05          # sleeping takes no CPU


def test_lengths_have_a_heavy_tail_and_respect_both_ends():
    lengths = step.draw_lengths(random.Random(1), 20_000, 1000)
    assert min(lengths) >= 2 and max(lengths) == 1000
    assert 230 < statistics.mean(lengths) < 300 and 165 < statistics.median(lengths) < 195
    assert 0.02 < sum(n == 1000 for n in lengths) / len(lengths) < 0.06


def test_ratios_above_one_are_in_favour_of_this_project_but_for_memory():
    def side(seconds):
        return {"phases": {"forward-backward": seconds, "generation": seconds}, "step": 2 * seconds,
                "cpu_step": seconds, "tokens": 100}

    pairs = [{"srft": side(1.0), "trl": side(r)} for r in (2.0, 3.0, 10.0)]
    rows = {row[0]: row[1:] for row in step.table(pairs, {"srft": (1.0, 0.1), "trl": (4.0, 0.0)})}
    assert rows["forward-backward, s"] == (1.0, 3.0, 3.0)
    rate = rows["log-probs + forward-backward + update, tokens/s"]
    assert rate == (100.0, pytest.approx(100 / 3), pytest.approx(3.0))
    assert rows["whole step, tokens/s"][2] == pytest.approx(3.0)
    assert rows["peak memory of the process, GB"] == (1.0, 4.0, 0.25) and rows["sync, s"][2] == "-"


@pytest.mark.slow
def test_this_side_alone_holds_the_lengths_it_was_given_and_writes_what_is_promised(tmp_path):
    out = tmp_path / "step.json"
    command = [sys.executable, "bench/step.py", "--shape", "tiny", "--pairs", "2", "--seed", "5",
               "--device", "cpu", "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| generation, s" in done.stdout and "whole step, tokens/s" in done.stdout
    found = json.loads(out.read_text())
    result, rng, shape = found["results"]["tiny"], random.Random(5), step.SHAPES["tiny"]
    assert result["sides"]["srft"]["versions"]["torch"] == found["machine"]["versions"]["torch"]
    for pair in (pair["srft"] for pair in result["pairs"]):
        assert pair["lengths"] == step.draw_lengths(rng, shape.prompts * step.GROUP, shape.max_response)
        assert pair["tokens"] == sum(pair["lengths"]) + pair["prompt_tokens"]
        assert sum(pair["phases"].values()) == pytest.approx(pair["step"], rel=1e-6)
        assert all(pair["phases"][name] > 0 for name in ("generation", "forward-backward", "update", "sync"))
        assert pair["phases"]["other"] < 0.5 * pair["step"]
        assert pair["engine_gap"] < 1e-3             # forcing a length leaves the sampling distribution alone
    memory = result["memory_gb"]["srft"]
    assert 0.3 < memory["process"] < 8 and 0.01 < memory["graders"] < 1
