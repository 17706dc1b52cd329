"""What is said of a run that goes wrong, and what is not kept of it.

    pytest tests/test_health.py
"""
import json
import math
import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from conftest import SMALL, metrics, run
from support import runlog
from support.health import LASTING, Health, check_alive
from support.runlog import RunLog, read_rows

V, ROLLOUTS = 21, 16
HEALTHY = {"step": 3, "reward/mean": 0.0, "grader/timeouts": 0, "grader/reward_error": 0, "grader/no_box": 5,
           "grader/unclosed": 2, "grader/truncated": 8, "engine/logp_diff_rank": 0.0, "entropy/rollout": 1.0,
           "entropy/demo": 0.1}


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def said(capsys, *steps, rollouts=ROLLOUTS):
    """The warnings of steps whose metrics differ so from those of a healthy one."""
    health = Health(V, rollouts)
    for changed in steps:
        assert health.look(HEALTHY | changed, [1.0], Counter(ok=1), ["a"]) == ""
    return [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]


TROUBLES = {
    "no answers": ({"grader/no_box": 6}, "no response has had an answer.* 8 were cut .* 8 had no closed"),
    "all cut": ({"grader/no_box": 0, "grader/unclosed": 0, "grader/truncated": 16}, " 16 were cut"),
    "uniform": ({"entropy/rollout": math.log(V)}, r"pure chance, 3.04 nats, where ln V is 3.04"),
    "uniform on demonstrations, SFT": ({"entropy/rollout": None, "entropy/demo": 3.0}, "pure chance, 3.00"),
    "no number": ({"entropy/rollout": math.nan}, "pure chance, nan")}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_goes_on_in_vain_is_warned_of_once_when_it_has_lasted(name, capsys):
    trouble, words = TROUBLES[name]
    assert said(capsys, *[trouble] * (LASTING - 1), {}, *[trouble] * (LASTING - 1)) == []
    [warning] = said(capsys, *[trouble] * 3 * LASTING, {}, *[trouble] * LASTING)
    assert re.search(words, warning) and f"for {LASTING} steps" in warning


@pytest.mark.parametrize("failed", ["grader/timeouts", "grader/reward_error"])
def test_a_step_without_rewards_whose_gradings_failed_is_warned_of_at_once(failed, capsys):
    [warning] = said(capsys, {failed: 1})
    assert "every reward is 0, and 1 of 1 gradings were given up" in warning
    assert said(capsys, {failed: 1, "reward/mean": 0.5}) == []


@pytest.mark.parametrize("healthy", [{}, {"entropy/rollout": 2.5}, {"entropy/rollout": None}])
def test_a_run_that_learns_is_not_warned_of(healthy, capsys):
    assert said(capsys, *[healthy] * 3 * LASTING) == []


def test_a_method_without_rollouts_has_nothing_to_answer(capsys):
    nothing = {"grader/no_box": 0, "grader/unclosed": 0, "grader/truncated": 0, "reward/mean": None}
    assert said(capsys, *[nothing] * 3 * LASTING, rollouts=0) == []


def a_policy(**changed):
    parameters = {"embedding": torch.randn(V, 4), "norm": torch.ones(4), "empty shard": torch.zeros(0)}
    return list((parameters | changed).items())


LOGP = torch.tensor([[-0.5, -3.0, -2.0]])


@pytest.mark.parametrize("changed, logp, says", [
    ({"norm": torch.tensor([1.0, math.nan])}, LOGP, "norm holds nan or inf"),
    ({"norm": torch.tensor([1.0, -math.inf])}, LOGP, "norm holds nan or inf"),
    ({"norm": torch.tensor([1.0, -1e30])}, LOGP * math.nan, "log-probs are nan or inf, .*norm reaches 1e.30"),
    ({"norm": torch.tensor([1.0, 1e30])}, LOGP - math.inf, "log-probs are nan or inf, .*norm reaches 1e.30"),
    ({"norm": torch.tensor([1.0, 1e30])}, torch.full((1, 3), -math.log(V)), "all tokens are equally likely")])
def test_a_dead_policy_is_refused_by_the_name_of_a_tensor(changed, logp, says):
    with pytest.raises(RuntimeError, match=f"the policy is dead: .*{says}.*--resume.*--lr"):
        check_alive(a_policy(**changed), logp, V)


def test_a_living_policy_is_kept():
    check_alive(a_policy(), LOGP, V)
    check_alive(a_policy(norm=torch.full((4,), 1e9)), LOGP, V)


# ----------------------------------------------------------------------------------------------------------
# Files that any parser of JSON reads.

def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def strict(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_metrics_and_samples_are_strict_json_and_readers_and_curves_go_on(number, tmp_path):
    log = RunLog(tmp_path, active=True, step=-1)
    log.write({"step": 1, "w_sft": 0.5, "grad_norm": number}, [{"step": 1, "reward": number}])
    log.close()
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 1, "w_sft": 0.5, "grad_norm": None}]
    assert strict(tmp_path / "samples.jsonl") == [{"step": 1, "reward": None}]
    assert read_rows(tmp_path / "metrics.jsonl")[0]["grad_norm"] is None
    assert (tmp_path / "curves.png").exists()


def test_what_is_added_to_a_row_later_is_strict_json_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", str)                          # takes a second
    log = RunLog(tmp_path, active=True, step=-1)
    log.write({"step": 1})
    log.amend(1, {"eval/heldout": 0.5, "eval_entropy/heldout": math.nan})
    assert strict(tmp_path / "metrics.jsonl") == [
        {"step": 1, "eval/heldout": 0.5, "eval_entropy/heldout": None}]


def test_rows_that_an_older_version_wrote_are_strict_after_a_resume_and_so_are_settings(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "grad_norm": NaN}\n{"step": 2}\n')
    RunLog(tmp_path, active=True, step=1)
    assert strict(tmp_path / "metrics.jsonl") == [{"step": 1, "grad_norm": None}]
    RunLog(tmp_path / "new", active=True, step=-1).write_settings({"grad_clip": math.inf, "lr": 1e-6})
    settings = json.loads((tmp_path / "new" / "config.json").read_text(), parse_constant=refuse)
    assert settings == {"grad_clip": "inf", "lr": 1e-6}


@pytest.mark.slow
def test_a_run_that_kills_its_model_keeps_the_last_good_checkpoint_exports_nothing_and_can_go_on(tmp_path):
    out = tmp_path / "run"
    command = [*SMALL, "--out", out, "--grad_clip", "inf", "--keep", "1"]
    run([*command, "--steps", "2"])
    (out / "hf").rename(out / "of-step-2")
    said = run([*command, "--steps", "4", "--resume", "--lr", "1e30"], ranks=2, ok=False)
    assert "the policy is dead: all tokens are equally likely" in said and "(rank 0)" in said
    assert "with --lr 1e+30, until now" in said and "with --grad_clip" not in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"] and not (out / "hf").exists()
    rows = strict(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[4]["grad_norm"] is None
    run([*command, "--steps", "4", "--resume", "--lr", "3e-4"])       # without it: as in config.json, 1e30
    assert metrics(out)[-1]["grad_norm"] < 1e3 and (out / "hf" / "model.safetensors").exists()
