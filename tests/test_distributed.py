"""One process is the reference: any number of ranks, any split into micro-batches must compute the same."""
import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import SMALL, metrics, run


def run_stale(since, factor, rank, *flags, **kwargs):
    """conftest.run of a run whose engine gets other weights: see ranks.stale."""
    return run(["tests/ranks.py", "stale", since, factor, rank, *SMALL[1:], *flags], **kwargs)


def assert_same(split, whole, name):
    # One reduction across nodes an update.
    assert split["last"] == [False] * (split["micro_batches"] - 1) + [True], name
    for key, value in whole["gradients"].items():
        torch.testing.assert_close(split["gradients"][key], value, rtol=0, atol=1e-6,
                                   msg=lambda m: f"{name} {key} {m}")
    for key, value in whole["stats"].items():
        expected = None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
        assert split["stats"][key] == expected, (name, key)
    assert any(whole["stats"][key] > 0 for key in whole["stats"] if key.startswith("grad_norm/"))


FLAGS = {
    "srft": [],
    "token, batch": ["--loss_norm", "token", "--entropy_level", "batch"],
    "sft_kl": ["--method", "sft_kl"],
    "sft+rl": ["--method", "sft+rl", "--entropy_quantile", "0.6"],
    "luffy": ["--method", "luffy", "--loss_norm", "token"]}
WHOLE, ONE_SEQUENCE = "in one micro-batch", "one sequence"
SMALL_MICRO_BATCHES, OFFLOADED = "small micro-batches", "small micro-batches, offloaded"


def gradients(folder, jobs, ranks=1, per_node=None):
    """ranks.gradients of the jobs, all in the same processes. jobs: name -> (budget, count, flags)."""
    asked = {}
    for name, (budget, count, flags) in jobs.items():
        asked[name] = {"budget": budget, "count": count, "flags": flags}
    run(["tests/ranks.py", "gradients", folder / "out", json.dumps(asked)], ranks, per_node)
    return torch.load(folder / "out")


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    jobs = {f"{name} {WHOLE}": (4096, 30, flags) for name, flags in FLAGS.items()}
    jobs |= {f"{name} {SMALL_MICRO_BATCHES}": (64, 30, flags) for name, flags in FLAGS.items()}
    jobs[f"srft {ONE_SEQUENCE}"] = (4096, 1, [])
    return gradients(tmp_path_factory.mktemp("one"), jobs)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    jobs = {f"{name} {SMALL_MICRO_BATCHES}": (100, 30, flags) for name, flags in FLAGS.items()}
    jobs[f"srft {WHOLE}"] = (4096, 30, [])
    # On a CPU, host and device memory are one: this runs FSDP2's offloading, not the transfer.
    jobs[f"srft {OFFLOADED}"] = (100, 30, ["--offload"])
    jobs[f"srft {ONE_SEQUENCE}"] = (4096, 1, [])
    return gradients(tmp_path_factory.mktemp("two"), jobs, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", FLAGS)
def test_gradients_do_not_depend_on_ranks_or_micro_batches(method, on_one, on_two):
    whole, name = on_one[f"{method} {WHOLE}"], f"{method} {SMALL_MICRO_BATCHES}"
    assert whole["micro_batches"] == 1 < on_one[name]["micro_batches"]
    assert_same(on_one[name], whole, name)
    assert_same(on_two[name], whole, f"two ranks, {name}")


@pytest.mark.slow
def test_nor_on_offloading_or_on_nodes_within_which_shards_lie_and_across_which_they_are_replicated(
        on_one, on_two, tmp_path):
    whole = on_one[f"srft {WHOLE}"]
    assert_same(on_two[f"srft {WHOLE}"], whole, "two ranks")
    assert_same(on_two[f"srft {OFFLOADED}"], whole, "two ranks, offloaded")
    nodes = gradients(tmp_path, {"nodes": (100, 30, [])}, ranks=4, per_node=2)
    assert_same(nodes["nodes"], whole, "two nodes of two, sharded within, replicated across")


@pytest.mark.slow
def test_a_rank_without_work_still_joins_every_collective(on_one, on_two):
    assert_same(on_two[f"srft {ONE_SEQUENCE}"], on_one[f"srft {ONE_SEQUENCE}"], "one sequence, two ranks")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_agrees_with_the_trainer_exactly_when_it_was_synced(tmp_path, ranks):
    run(["tests/ranks.py", "engine", tmp_path / "found"], ranks)
    found = torch.load(tmp_path / "found")
    assert found["refuses before the first sync"] and found["refuses a version it does not hold"]
    assert found["after the first sync"] < 1e-3
    assert found["after a change of the trainer alone"] > 0.1        # what the check of every step catches
    assert found["after the next sync"] < 1e-3
    assert found["each response is handed out once, when it ends"]
    assert found["what a prompt yields depends on its seed alone"]


@pytest.mark.slow
def test_one_and_two_ranks_agree_over_five_steps_of_the_same_rollouts(tmp_path):
    flags = [*SMALL[1:], "--steps", "5", "--save_every", "5"]
    for ranks in (1, 2):
        run(["tests/ranks.py", "recorded", tmp_path / "tape", *flags, "--out", tmp_path / f"{ranks}"], ranks)
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        for name in a:
            if a[name] is not None:
                assert b[name] == pytest.approx(a[name], rel=0, abs=1e-5), (a["step"], name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / r / "hf") for r in "12")
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m: f"{name} {m}")


@pytest.mark.slow
@pytest.mark.parametrize("method, since", [("srft", 0), ("grpo", 1)])
def test_a_run_whose_engine_gets_other_weights_stops_at_that_step_before_its_checkpoint(
        method, since, tmp_path):
    out = tmp_path / "run"
    output = run_stale(since, 1.5, "all", "--method", method, "--steps", "3", "--save_every", "1",
                       "--out", out, ok=False)
    assert "engine and trainer disagree" in output and f"over the rollouts of step {since + 1}, " in output
    assert [row["step"] for row in metrics(out)] == list(range(since + 2))
    assert metrics(out)[-1]["engine/mismatch"] == 1
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ["step-1"] * since


@pytest.mark.slow
@pytest.mark.parametrize("since", [1, 6])                      # in a fresh run; 6: at once, after a resume
def test_a_transfer_that_lacks_a_weight_ends_the_run_before_that_steps_checkpoint(since, whole_run, tmp_path):
    out, more = tmp_path / "run", []
    if since == 6:
        shutil.copytree(whole_run, out)
        more = ["--resume"]
    output = run_stale(since, "missing", "all", "--steps", "8", "--save_every", "1",
                       "--out", out, *more, ok=False)
    says = r"1 of \d+ weights did not come, such as model.layers.0.self_attn.k_proj"
    assert re.search(says, output), output[-2000:]
    assert [row["step"] for row in metrics(out)] == list(range(since + (since == 6)))
    checkpoints = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    assert checkpoints == ([] if since == 1 else ["step-4", "step-6"])


@pytest.mark.slow
def test_so_does_a_resumed_run_and_the_last_good_checkpoint_goes_on(whole_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    flags = ["--out", out, "--steps", "8", "--resume"]
    output = run_stale(6, 1.5, "all", *flags, ok=False)
    assert "over the rollouts of step 7, " in output and not (out / "checkpoints" / "step-7").exists()
    assert f"resumed {out}/checkpoints/step-6" in run([*SMALL, *flags])
    assert metrics(out)[-1]["step"] == 8 and metrics(out)[-1]["engine/mismatch"] == 0


@pytest.mark.slow
def test_a_small_difference_is_said_once_marked_at_each_step_and_trained_through(tmp_path):
    output = run_stale(1, 1.1, "all", "--steps", "3", "--out", tmp_path / "run")
    assert output.count("WARNING: engine and trainer disagree") == 1
    assert "over the rollouts of step 2, " in output
    assert [row["engine/mismatch"] for row in metrics(tmp_path / "run")[1:]] == [0, 1, 1]


@pytest.mark.slow
def test_one_bad_engine_of_two_ends_the_run_though_the_mean_over_both_would_not(tmp_path):
    output = run_stale(1, 1.25, 1, "--steps", "3", "--out", tmp_path / "run", ranks=2, ok=False)
    last = metrics(tmp_path / "run")[-1]
    assert "engine and trainer disagree" in output and last["step"] == 2
    assert last["engine/logp_diff_mean"] < 0.15 < last["engine/logp_diff_rank"]


@pytest.mark.slow
def test_an_evaluation_of_other_weights_is_not_measured_not_even_where_a_method_has_no_rollouts(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"problem": "11+11=?\\n", "answer": "22"}\n')
    output = run_stale(2, 1.5, "all", "--method", "sft", "--steps", "4", "--out", tmp_path / "run",
                       "--eval_data", held, "--eval_every", "2", ok=False)
    assert "before the evaluation of step 2, " in output
    assert ["eval/held" in row for row in metrics(tmp_path / "run")] == [True, False]
