"""bench/plan.py: the 7B plan comes out on a laptop without network or weights, and its numbers obey
arithmetic.

    pytest tests/test_plan.py                 # -m "not slow" leaves out the whole command line
"""
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from bench import plan
from config import Config

ROOT = Path(plan.__file__).resolve().parents[1]
# No network, whatever the machine has: an address that nothing answers, and an empty hub cache.
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(tmp_path, *command):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path,
                          env=os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "hub")})


@pytest.fixture
def small(tmp_path):
    """A folder with nothing but the config.json of a 2-layer Qwen2, and a Config that names it."""
    config = plan.DEFAULT_CONFIG | dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
                                        vocab_size=8192, num_attention_heads=4, num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Config(model=str(tmp_path), max_prompt_tokens=128, max_response_tokens=384,
                  micro_batch_tokens=2048)


def simulate(cfg, world=8, per_node=8, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    return plan.simulate(plan.read_config(cfg.model, cfg.rope_theta, cfg.window)[0], cfg, world, per_node)


def test_shards_are_an_eighth_of_what_the_formulas_say(small):
    memory = simulate(small)
    expected = 4 * memory["parameters"] / 8
    attention, mlp, norms = 2 * 256 * 256 + 2 * 256 * 128 + 256 + 2 * 128, 3 * 256 * 1024, 2 * 256
    assert memory["parameters"] == 2 * 8192 * 256 + 2 * (attention + mlp + norms) + 256
    assert memory["vocabulary"] == 2 * 8192 * 256
    assert memory["weights"] == pytest.approx(expected, rel=0.01)
    assert memory["gradients"] == pytest.approx(expected, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * expected, rel=0.01)
    parts = ("weights", "gradients", "optimizer", "activations")
    assert memory["peak"] == sum(memory[part] for part in parts)


def test_shards_shrink_with_the_ranks_of_a_node_and_not_with_nodes(small):
    two, eight, nodes = simulate(small, 2), simulate(small), simulate(small, 4, per_node=2)
    for part in ("weights", "optimizer", "gradients"):
        assert two[part] == pytest.approx(4 * eight[part], rel=0.01)
        assert nodes[part] == two[part]


def test_offload_moves_the_three_parts_to_the_host_and_nothing_else(small):
    here, there = simulate(small, 4), simulate(small, 4, offload=True)
    parts = ("weights", "gradients", "optimizer")
    assert here["host"] == 0
    assert there["host"] == sum(here[part] for part in parts)
    assert there["host"] == pytest.approx(16 * here["parameters"] / 4, rel=0.01)
    assert all(there[part] == 0 for part in parts)
    assert there["peak"] == there["activations"] == here["activations"]
    config, _ = plan.read_config(small.model)
    small.offload = True
    text = "\n".join(plan.report(config, small, there, "model", 4))
    assert "4 ranks, shard 4 (FSDP2)" in text
    assert "in host memory (--offload)" in text and "optimizer: two" not in text


@pytest.mark.slow
def test_activations_grow_with_the_micro_batch_but_not_with_its_square(small):
    sizes = [simulate(small, micro_batch_tokens=n)["activations"] for n in (8192, 16384, 32768)]
    assert sizes[0] < sizes[1] < sizes[2]
    # No N x N mask, no (N, V) logits beyond a chunk: the second doubling adds twice what the first added.
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)


def test_recomputation_saves_memory_and_shards_are_the_same_without_it(small):
    with_it, without = (simulate(small, activation_checkpointing=on) for on in (True, False))
    assert with_it["activations"] < without["activations"]
    assert with_it["weights"] == without["weights"]


def test_the_unsharded_fakes_by_which_dtensor_finds_shapes_are_not_counted(small):
    """The tracker counts those of clip and AdamW, where it sees these."""
    memory = simulate(small, micro_batch_tokens=64)
    assert memory["peak"] < 12 * memory["parameters"]      # 6.1; 17 and more with them


def test_the_simulation_leaves_the_process_as_it_was(small):
    simulate(small)
    assert not plan.dist.is_initialized()
    assert not plan.torch.zeros(1).is_cuda and type(plan.torch.zeros(1)) is plan.torch.Tensor
    assert simulate(small) == simulate(small)


def test_tokens_per_step_count_the_demonstration_that_joins_or_replaces():
    cfg = Config()
    assert plan.tokens_per_step(cfg, 8, 9216) == (1152, 1152 * 9216, 144)    # one sequence a micro-batch
    assert plan.tokens_per_step(cfg, 8, 2048) == (1152, 1152 * 2048, 18)      # eight
    cfg.demo_in_group = "replaces"
    assert plan.tokens_per_step(cfg, 8, 9216)[0] == 1024


def test_the_verdict_names_the_flags_that_help(small):
    config, _ = plan.read_config(small.model)
    memory = simulate(small)

    def text(cfg, **changes):
        return "\n".join(plan.report(config, cfg, memory | changes, "model"))

    assert "DOES NOT FIT" not in text(small)
    assert "lower --micro_batch_tokens 2048" in text(small, activations=90 * plan.GIB)
    assert "lower --engine_memory 0.6" in text(small, weights=40 * plan.GIB)
    small.engine_memory = 0.1
    assert "pass --offload" in text(small, activations=90 * plan.GIB)
    assert "raise --engine_memory 0.1" in text(small, parameters=5e9)
    small.activation_checkpointing = False
    assert "pass --activation_checkpointing" in text(small, activations=90 * plan.GIB)
    assert "reference model" in text(small, reference=plan.GIB) and "reference model" not in text(small)


def test_what_the_simulation_cannot_see_is_counted_by_formula_or_as_an_assumption_that_is_named(small):
    config, _ = plan.read_config(small.model)
    memory = simulate(small)
    # tokens x heads x width x (dq in fp32; dk, dv of each query head in bf16)
    assert memory["attention"] == 2048 * 4 * 64 * (4 + 2 * 2)
    config.num_key_value_heads = 4
    assert plan.attention_backward(config, 2048) == 2048 * 4 * 64 * 4
    rows, (training, generating), room = plan.budget(small, memory)
    assert training == memory["peak"] + memory["attention"] + plan.GRAPHS + plan.RESIDUAL
    assert room == 0.6 * 80e9 - 2 * memory["parameters"] - plan.GRAPHS - plan.WORKSPACE
    text = "\n".join(plan.report(config, small, memory, "model"))
    assert "flash attention's own, in backward" in text
    assert "1.00 CUDA graphs and 2.00 workspace\n  (both assumed)" in text
    small.engine_eager = True                                                    # no graphs, awake or asleep
    _, without, more_room = plan.budget(small, memory)
    assert without == [training - plan.GRAPHS, generating - plan.GRAPHS] and more_room == room + plan.GRAPHS


def test_other_ranks_print_nothing(small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert plan.show(small) is None
    assert capsys.readouterr().out == ""


def test_the_plan_is_for_the_ranks_asked_for_in_whole_nodes(small, capsys):
    small.dry_run_ranks = 16
    plan.show(small)
    assert "16 ranks, shard 8 (x 2 copies, HSDP)" in capsys.readouterr().out
    for ranks in (0, 12):
        small.dry_run_ranks = ranks
        with pytest.raises(ValueError, match=f"--dry_run_ranks {ranks}: .*whole nodes of 8"):
            plan.show(small)


def test_a_name_that_is_neither_folder_nor_hub_model_is_refused_with_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "urlopen", mock.Mock(side_effect=OSError("no network")))
    (tmp_path / "empty").mkdir()
    for name in ("nobody/no-such-model", str(tmp_path / "empty"), "not a name"):
        with pytest.raises(FileNotFoundError, match="--model DIR"):
            plan.read_config(name)


@pytest.mark.clock
@pytest.mark.slow
def test_default_flags_print_the_7b_plan_once_without_network_and_write_nothing(tmp_path):
    started = time.monotonic()
    done = run(tmp_path, sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--local_addr=127.0.0.1", "--nproc_per_node=2", ROOT / "srft.py", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 90
    for line in ("parameters  7.62 B", "10,616,832", "training    fits 80 GB,", "generating  fits 80 GB,"):
        assert done.stdout.count(line) == 1
    assert list(tmp_path.glob("out*")) == []
