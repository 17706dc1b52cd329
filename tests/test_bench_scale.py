"""bench/scale.py: its counter finds the bytes that the formulas say; bench/steptime.py: its model of time
obeys arithmetic.

    pytest tests/test_bench_scale.py            # -m "not slow" leaves out real ranks and the 7B simulation
"""
import dataclasses
from unittest import mock

import numpy as np
import pytest
from transformers import LlamaConfig

import scale
from bench import plan, steptime
from config import Config
from conftest import run

# 250 rows in the vocabulary: neither 8 ranks nor 2 x 8 divide them, so padding must be right too.
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=250, tie_word_embeddings=False)
# Parameters of blocks and root, norms and biases aside.
SEVEN_B = (28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944), 2 * 152064 * 3584)


@pytest.mark.slow
@pytest.mark.parametrize("world, w, nodes", [(1, 1, 1), (2, 2, 1), (8, 8, 1), (64, 8, 8)])
def test_simulated_ranks_move_the_bytes_of_the_formula(world, w, nodes):
    found, sizes = scale.simulated_traffic(CONFIG, Config(), world)
    assert found == steptime.formula(*sizes, w, nodes)
    every, once, sync = ({kind for kind, _ in phase} for phase in found)
    if world > 1:                                        # across nodes, gradients are reduced once an update
        assert every == {"all-gather", "reduce-scatter"}
        assert once == {"all-gather", "all-reduce"} and sync == {"all-gather"}


def test_a_ring_sends_less_than_the_whole_and_twice_to_reduce_everywhere():
    assert steptime.sent({("all-gather", 8): 800}) == steptime.sent({("reduce-scatter", 8): 800}) == 700
    assert steptime.sent({("all-reduce", 8): 800}) == 1400
    assert steptime.sent({("all-gather", 1): 800}) == 0


def machine(**changes):
    return dataclasses.replace(scale.MACHINES[0], **changes)


def qwen():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_hub_config", mock.Mock(side_effect=OSError("no network")))
        return plan.read_config(Config.model, 40_000, 16_384)[0]


def generate(m, responses, capacity=1e9, limit=256):
    return steptime.generate(m, qwen(), 7.6e9, 256, responses, len(responses), capacity, limit)


def test_decoding_is_bytes_over_bandwidth(monkeypatch):
    monkeypatch.setattr(steptime, "STEP_OVERHEAD", 0)
    monkeypatch.setattr(steptime, "SEQUENCE_OVERHEAD", 0)
    one = generate(machine(prefill=1e6), [1000])[0]     # no FLOPs bound: weights and a little KV, 1,000 times
    assert one == pytest.approx(1000 * 2 * 7.6e9 / (0.7 * 3.35e12), rel=0.01)
    assert generate(machine(prefill=1e6, hbm=6.7e12), [1000])[0] == pytest.approx(one / 2)
    assert generate(machine(prefill=1e6, decode=0.35), [1000])[0] == pytest.approx(one * 2)
    batched = generate(machine(prefill=1e6), [1000] * 64)[0]                # decoding shares the weights
    assert one < batched < 2 * one


def test_places_and_kv_cache_make_waves():
    m, responses = machine(), [400] * 16
    free, _, preempted = generate(m, responses)
    assert preempted == 0
    assert generate(m, responses, limit=8)[0] > 1.8 * free           # two waves
    tight, _, preempted = generate(m, responses, capacity=16 * 400)  # 256 + 400 each: ten fit, sixteen start
    assert preempted > 0 and tight > 1.3 * free
    assert generate(m, [2000], capacity=10)[0] > 0                   # one sequence always runs


def test_the_longest_response_decides_and_shows_as_tail():
    even, long = generate(machine(), [1000] * 64), generate(machine(), [1000] * 63 + [8000])
    assert even[1] == 0 and long[0] > 4 * even[0]
    assert long[1] == pytest.approx(long[0] - even[0], rel=0.05)


def test_every_assumption_is_printed_with_the_value_in_use():
    printed = str(steptime.assumptions([machine(mfu=0.123, decode=0.456, hbm=7e12)], Config(), 3210))
    for value in ("H100 0.123", "0.456", "H100 7e+12", "3,210", "hidden", "0.09 in model FLOPs"):
        assert value in printed


@pytest.mark.parametrize("mean", [500, 2000, 5000])
def test_drawn_lengths_have_the_mean_asked_for(mean):
    drawn = steptime.lengths(50_000, mean, 8192)
    assert drawn.mean() == pytest.approx(mean, rel=0.02) and drawn.max() == 8192 and drawn.min() >= 1
    assert np.all(steptime.lengths(5, None, 8192) == 8192)


def step(mean=500, **changes):
    return steptime.step_time(machine(**changes), qwen(), Config(recompute="all"), SEVEN_B, mean)


@pytest.mark.slow
def test_phases_follow_their_rates():
    base = step()
    assert step(mfu=0.2)["train"] == pytest.approx(2 * base["train"])
    twice = step(cards=16)                                                          # the same tokens
    assert twice["train"] == pytest.approx(base["train"] / 2, rel=0.1)
    assert twice["exposed communication"] > 0
    moved = base["sync"] - steptime.SYNC_OVERHEAD
    assert step(nvlink=150e9)["sync"] - steptime.SYNC_OVERHEAD == pytest.approx(2 * moved)
    bare = step(nvlink=1e9)["exposed communication"]                                # compute hides it no more
    assert bare > 100 * base["exposed communication"]
    assert step(mean=1000)["step"] > base["step"]
    assert step(mean=None)["generate"] > step(mean=1000)["generate"]
    assert step(offload=True)["AdamW"] > base["AdamW"]
    phases = ("generate", "log-probs", "train", "exposed communication", "AdamW", "sync")
    assert base["step"] == pytest.approx(sum(base[phase] for phase in phases))
    # 6 FLOPs a weight and token, some 17 % more in attention at most; recomputation is no model FLOP.
    assert 0.95 < base["train MFU"] / (0.40 * 3 / 4) <= 1.0


def test_fewer_recomputed_blocks_take_fewer_flops_and_the_head_always_runs_twice():
    def train(recompute):
        cfg = Config(recompute=recompute)
        return steptime.step_time(machine(), qwen(), cfg, SEVEN_B, 500, sampled=(1.0, 0.0, 0))["train"]

    everything, half, none = train("all"), train("14"), train("none")
    assert half == pytest.approx((everything + none) / 2)
    assert 1 / (4 / 3) < none / everything < 0.80                  # 3/4, and a little: the head
    assert train("8") / none == pytest.approx(1 + 8 / 28 / 3, rel=0.02)


def test_one_card_has_no_links_and_offloaded_weights_cross_to_it_twice_a_micro_batch():
    here, there = step(cards=1), step(cards=1, offload=True, pcie=1e9)
    assert here["exposed communication"] == 0
    slow = step(cards=1, offload=True, pcie=0.5e9)["exposed communication"]
    assert slow > 2 * there["exposed communication"] > 0


def test_the_verdict_needs_room_in_both_phases_and_10_gb_of_kv_cache(capsys):
    P = sum(SEVEN_B)
    memory = dict(weights=P / 2, optimizer=P, gradients=P / 2, activations=13.5e9, attention=0.5e9, host=0,
                  parameters=P, reference=0)

    def fits(cfg=Config(), **changes):
        return scale.fits(qwen(), cfg, [(8, False, memory | changes)])[0]

    found = fits()
    assert found["fits"] and found["kv_gb"] > 10
    assert found["training_gb"] < 72 and found["generating_gb"] < 80
    assert not fits(activations=60e9)["fits"]
    assert not fits(weights=30e9)["fits"]
    assert not fits(Config(engine_memory=0.3))["fits"]      # 24 GB less 15 of weights: too little KV cache


@pytest.mark.slow
def test_two_real_ranks_move_the_bytes_of_the_formula_and_hold_the_simulated_memory():
    found = scale.measured(2)
    assert found["phases"] == steptime.formula(*found["sizes"], 2)
    simulated = plan.simulate(scale.SMALL, Config(**scale.SMALL_CFG), 2)["peak"]
    more = found["gb"] * 1e9 - simulated                                            # kernels', gloo's buffers
    assert -0.05 * simulated < more < min(0.10 * simulated, 60e6)


@pytest.mark.slow
def test_the_7b_run_fits_8_x_80_gb_and_the_command_line_helps():
    cfg = Config()
    found = scale.fits(qwen(), cfg, [(8, False, plan.simulate(qwen(), cfg, 8))])[0]
    assert found["fits"] and found["kv_gb"] > 10
    assert "--mean_response" in run(["bench/scale.py", "--help"])
