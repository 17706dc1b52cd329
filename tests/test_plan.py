"""bench/plan.py, search.py, dry_run.py and cards.py: the 7B plan comes out on a laptop without network or
weights, its numbers obey arithmetic, and the flags that it proposes fit.

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

from bench import cards, dry_run, plan, search, steptime
from config import Config, check_config, keeps_own_rope, parse_args

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


def report(config, cfg, memory, text="8x80"):
    return "\n".join(dry_run.report(config, cfg, memory, "model", search.read_cards(text)))


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


@pytest.mark.slow
def test_shards_shrink_with_the_ranks_of_a_node_and_not_with_nodes(small):
    two, eight, nodes = simulate(small, 2), simulate(small), simulate(small, 4, per_node=2)
    for part in ("weights", "optimizer", "gradients"):
        assert two[part] == pytest.approx(4 * eight[part], rel=0.01)
        assert nodes[part] == two[part]


@pytest.mark.slow
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
    text = report(config, small, there, "4x80")
    assert "4 ranks, shard 4 (FSDP2)" in text
    assert "a rank for weights, optimizer, gradients (--offload)" in text and "optimizer: two" not in text


@pytest.mark.slow
def test_activations_grow_with_the_micro_batch_but_not_with_its_square(small):
    sizes = [simulate(small, micro_batch_tokens=n)["activations"] for n in (8192, 16384, 32768)]
    assert sizes[0] < sizes[1] < sizes[2]
    # No N x N mask, no (N, V) logits beyond a chunk: the second doubling adds twice what the first added.
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)


@pytest.mark.slow
def test_recomputation_saves_memory_and_shards_are_the_same_without_it(small):
    with_it, without = (simulate(small, recompute=recompute) for recompute in ("all", "none"))
    assert with_it["activations"] < without["activations"]
    assert with_it["weights"] == without["weights"]


def test_the_unsharded_fakes_by_which_dtensor_finds_shapes_are_not_counted(small):
    """The tracker counts those of clip and AdamW, where it sees these."""
    memory = simulate(small, micro_batch_tokens=64)
    assert memory["peak"] < 12 * memory["parameters"]      # 6.1; 17 and more with them


@pytest.mark.slow
def test_the_simulation_leaves_the_process_as_it_was(small):
    simulate(small)
    assert not plan.dist.is_initialized()
    assert not plan.torch.zeros(1).is_cuda and type(plan.torch.zeros(1)) is plan.torch.Tensor
    assert simulate(small) == simulate(small)


def test_tokens_per_step_count_the_demonstration_that_joins_or_replaces():
    cfg = Config()
    assert plan.tokens_per_step(cfg, 8, 9216) == (1152, 1152 * 9216, 144)    # one sequence a micro-batch
    assert plan.tokens_per_step(cfg, 8, 2048) == (1152, 1152 * 2048, 36)      # four
    cfg.demo_in_group = "replaces"
    assert plan.tokens_per_step(cfg, 8, 9216)[0] == 1024


@pytest.mark.slow
def test_the_verdict_is_of_each_phase_and_of_the_engine(small):
    config, _ = plan.read_config(small.model)
    memory = simulate(small)

    def text(cfg, **changes):
        return report(config, cfg, memory | changes)

    assert "training    fits 80 GB, 7" in text(small) and "generating  fits 80 GB, 2" in text(small)
    assert "training    fits 80 GB, but too tightly" in text(small, activations=70e9)
    assert "training    DOES NOT FIT 80 GB, 1" in text(small, activations=90e9)
    assert "generating  DOES NOT FIT 80 GB, " in text(small, weights=40e9)
    small.engine_memory = 0.1
    assert "no KV cache for one whole sequence" in text(small, parameters=5e9)
    assert "reference model" in text(small, reference=plan.GIB) and "reference model" not in text(small)
    assert "1 of 2 blocks recomputed" in text(dataclasses.replace(small, recompute="1"))


def test_what_the_simulation_cannot_see_is_counted_by_formula_or_as_an_assumption_that_is_named(small):
    config, _ = plan.read_config(small.model)
    memory = simulate(small)
    # tokens x heads x width x (dq in fp32; dk, dv of each query head in bf16)
    assert memory["attention"] == 2048 * 4 * 64 * (4 + 2 * 2)
    config.num_key_value_heads = 4
    assert plan.attention_backward(config, 2048) == 2048 * 4 * 64 * 4
    rows, (training, generating), room = plan.budget(small, memory, 80e9)
    assert training == memory["peak"] + memory["attention"] + plan.GRAPHS + plan.RESIDUAL
    assert room == 0.6 * 80e9 - 2 * memory["parameters"] - plan.GRAPHS - plan.WORKSPACE
    text = report(config, small, memory)
    assert "flash attention's own, in backward" in text
    assert "1.00 CUDA graphs and 2.00 workspace\n  (both assumed)" in text
    small.engine_eager = True                                                    # no graphs, awake or asleep
    _, without, more_room = plan.budget(small, memory, 80e9)
    assert without == [training - plan.GRAPHS, generating - plan.GRAPHS] and more_room == room + plan.GRAPHS


def test_other_ranks_print_nothing(small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    dry_run.show(small)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text, number, memory", [("8x80", 8, 80e9), ("1x24", 1, 24e9), ("4x141", 4, 141e9),
                                                  ("64x80", 64, 80e9), ("3x39.6", 3, 39.6e9)])
def test_cards_are_their_number_and_size(text, number, memory):
    assert search.read_cards(text) == search.Cards(number, pytest.approx(memory))


@pytest.mark.slow
def test_a_row_of_the_table_of_cards_is_what_its_command_prints():
    row = cards.row("Qwen/Qwen2.5-0.5B", "1x24")
    assert "| " + " | ".join(row) + " |" in (ROOT / "docs" / "running.md").read_text()


@pytest.mark.parametrize("text", ["8", "x80", "8x", "0x80", "8x0", "12x80", "8x80GB", "-8x80", "8 80", "",
                                  "8 x 80", "8X80", "1e9x80", "9x80", "x", "8x" + "9" * 400])
def test_what_are_no_cards_or_no_whole_nodes_is_refused_with_an_example(text, small):
    small.dry_run_cards = text
    with pytest.raises(ValueError, match=f"--dry_run_cards {text}: .*as 8x80.*whole nodes of 8"):
        dry_run.show(small)


@pytest.mark.parametrize("text, name", [("8x80", "8 x H100"), ("2x48", "2 x L40S"), ("1x24", "1 x RTX 4090"),
                                        ("1x16", "1 x RTX 4090"), ("8x40", "8 x A100"), ("4x141", "4 x H200"),
                                        ("4x96", "4 x H100")])
def test_a_card_is_taken_for_one_of_its_size_or_of_the_next_smaller_one(text, name):
    asked = search.read_cards(text)
    m = steptime.machine(asked.number, asked.memory)
    assert m.name == name and m.memory == asked.memory


def test_the_plan_is_for_the_cards_asked_for_in_whole_nodes(small):
    config, _ = plan.read_config(small.model)
    text = report(config, small, simulate(small, 16), "16x80")
    assert "16 ranks, shard 8 (x 2 copies, HSDP)" in text and "16 x H100" in text and "to other nodes" in text


# ----------------------------------------------------------------------------------------------------------
# The search.

@pytest.fixture
def deeper(small):
    """The same with 7 blocks: more than what the search simulates."""
    file = Path(small.model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 7}))
    return small


@pytest.mark.slow
def test_activations_of_any_flags_follow_from_five_small_simulations(deeper):
    config, _ = plan.read_config(deeper.model)
    formula = search.Activations(config, deeper, 8, 2048, 8192)
    for tokens, recomputed in ((2048, 6), (4096, 3), (8192, 7), (8192, 0)):
        found = simulate(deeper, micro_batch_tokens=tokens, recompute=str(recomputed))
        assert formula(tokens, recomputed) == pytest.approx(found["activations"], rel=0.03)
    # In between the peak may pass from the head to a block: then it lies below the line, not above.
    found = simulate(deeper, micro_batch_tokens=4096, recompute="all")["activations"]
    assert found < formula(4096, 7) < 1.2 * found


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(folder with the config.json of a Qwen2.5-0.5B of 5 blocks and few words, Activations on a card)."""
    folder = tmp_path_factory.mktemp("wide")
    fields = plan.SHAPES["Qwen/Qwen2.5-0.5B"] | dict(num_hidden_layers=5, vocab_size=16_384)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder, search.Activations(plan.read_config(str(folder))[0], Config(), 1)


def planned(model, text, *flags):
    """(the model's config, Config, cards, memory) as srft.py --dry_run makes them of its command line."""
    cfg, there = parse_args(["--model", str(model), *flags]), search.read_cards(text)
    config, _ = plan.read_config(cfg.model, cfg.rope_theta, cfg.window, keeps_own_rope(cfg))
    check_config(cfg, there.number, config.max_position_embeddings)
    return config, cfg, there, plan.simulate(config, cfg, there.number)


@pytest.mark.slow
@pytest.mark.parametrize("text, flags, fitted, says", [
    ("1x24", ["--engine_memory", "0.25"], True, "faster with"),
    ("1x8", [], False, "It fits with"),
    ("1x5.6", ["--max_response_tokens", "30000", "--window", "32768", "--micro_batch_tokens", "32768",
               "--engine_eager"], False, "yours to decide"),
    ("1x3", [], False, "No flags make it fit these cards")])
def test_every_line_that_is_proposed_is_accepted_and_fits_when_it_is_planned_again(
        wide, monkeypatch, text, flags, fitted, says):
    model, activations = wide
    monkeypatch.setattr(search, "Activations", lambda *_: activations)
    config, cfg, there, memory = planned(model, text, *flags)
    assert search.fits(config, cfg, there, memory) is fitted
    advice = dry_run.advice(config, cfg, memory, there)
    assert says in "\n".join(advice)
    lines = [line for line in advice if line.startswith("    --")]
    assert len(lines) == (not says.startswith("No flags"))
    for line in lines:
        assert search.fits(*planned(model, text, *flags, *line.split())), line


def test_flags_are_those_that_differ_and_can_be_parsed():
    asked = parse_args(["--offload"])
    proposed = dataclasses.replace(asked, offload=False, recompute="7", engine_memory=0.75)
    line = search.flags(asked, proposed)
    assert line == "--recompute 7 --no-offload --engine_memory 0.75"
    assert parse_args(["--offload", *line.split()]) == proposed


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
    for line in ("parameters  7.62 B", "10,616,832", "6 of 28 blocks recomputed", "on disk     91 GB",
                 "8 x H100", "training    fits 80 GB,", "none of the flags that were searched makes a step"):
        assert done.stdout.count(line) == 1
    assert list(tmp_path.glob("out*")) == []
