"""model.py: log-probs, packing, sharded policies and checkpoints, against transformers' own forward and plain formulas.

    pytest tests/test_model.py

One process, a gloo group of one rank, models of 30,000 random weights. What needs several ranks is tested elsewhere.
"""
import itertools
import json
import os
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from tiny import task
import model as M
from support.checkpoint import inspect_checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from support.device import peak_flops
from support.logprobs import _ChunkedLogProbs
from model import Sequence, collate, karmarkar_karp, pack, token_logprobs
from support.processes import init_distributed, seed_everything

CPU = torch.device("cpu")
VOCAB = 97


# ---------------------------------------------------------------------------------------------------------------
# token_logprobs.

def head_inputs(n=37, width=16, vocab=1003, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, width, generator=g).to(dtype), torch.randn(vocab, width, generator=g).to(dtype)
    return hidden, weight, torch.randint(vocab, (n,), generator=g), torch.randn(n, generator=g), torch.randn(n, generator=g)


def plain_head(hidden, weight, targets, temperature):
    """(log-probs, entropies) in float64 by log_softmax of the whole (N, V)."""
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def head_gradients(function, hidden, weight, targets, a, b, **kwargs):
    """(log-probs, entropies, d/d hidden, d/d weight) of sum(a logp) + sum(b H); the entropy only where it has a gradient."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = function(hidden, weight, targets, **kwargs)
    ((a.to(logp.dtype) * logp).sum() + ((b.to(logp.dtype) * entropy).sum() if entropy.requires_grad and b is not None else 0)).backward()
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_log_probs_entropies_and_gradients_equal_a_plain_log_softmax_for_any_chunk(temperature, chunk, entropy_grad):
    hidden, weight, targets, a, b = head_inputs()
    got = head_gradients(token_logprobs, hidden, weight, targets, a, b, temperature=temperature, chunk=chunk, entropy_grad=entropy_grad)
    expected = head_gradients(plain_head, hidden.double(), weight.double(), targets, a, b if entropy_grad else 0 * b, temperature=temperature)
    for x, y in zip(got, expected):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, atol=5e-5, rtol=2e-5)


def test_the_entropy_has_a_gradient_only_on_request():
    hidden, weight, targets, *_ = head_inputs()
    hidden.requires_grad_()
    assert not token_logprobs(hidden, weight, targets)[1].requires_grad
    assert token_logprobs(hidden, weight, targets, entropy_grad=True)[1].requires_grad


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient(grads):
    hidden, weight, targets, a, _ = head_inputs()
    hidden.requires_grad_(grads[0]), weight.requires_grad_(grads[1])
    (token_logprobs(hidden, weight, targets, chunk=5)[0] * a).sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == grads


def test_no_tokens_give_no_log_probs_and_zero_gradients():
    got = head_gradients(token_logprobs, *head_inputs(n=0), chunk=8)
    assert got[0].shape == got[1].shape == (0,) and got[2].shape == (0, 16) and got[3].eq(0).all()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0], [0.0]])
    logp, entropy, *grads = head_gradients(token_logprobs, hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0, 0]),
                                           torch.ones(3), torch.ones(3), entropy_grad=True)
    assert logp.tolist() == pytest.approx([0, -600, -np.log(2)], abs=1e-5)
    assert entropy.tolist() == pytest.approx([0, 0, np.log(2)], abs=1e-5) and all(g.isfinite().all() for g in grads)


def test_in_bf16_the_head_s_gradient_is_as_exact_in_many_chunks_as_in_one():
    inputs = head_inputs(n=1024, dtype=torch.bfloat16)
    exact = head_gradients(plain_head, *(x.double() if x.is_floating_point() else x for x in inputs[:4]), torch.zeros(1024), temperature=1.0)[3]
    many, one = ((head_gradients(token_logprobs, *inputs, chunk=c)[3].double() - exact).norm() for c in (8, 1024))
    assert many <= 1.05 * one


def peak_bytes(n, vocab, dtype=torch.float32, width=16, **kwargs):
    """Most bytes of tensors alive at once in forward and backward, less the gradients (that of the head in fp32) and inputs."""
    inputs = head_inputs(n, width, vocab, dtype)
    with MemTracker() as tracker:
        head_gradients(token_logprobs, *inputs, **kwargs)
    copies = sum(x.nbytes for x in inputs[:2])                           # head_gradients clones the inputs
    gradients = inputs[0].nbytes + 4 * vocab * width
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"] - copies - gradients


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_blocks_of_a_chunk_by_the_vocabulary_whatever_the_number_of_tokens(entropy_grad, dtype):
    block, vocab = 4 * 16 * 10_007, 10_007
    few, many = (peak_bytes(n, vocab, dtype, width=4, chunk=16, entropy_grad=entropy_grad) for n in (48, 160))
    assert few < (2.1 if dtype == torch.float32 else 4.1) * block        # bf16 on a CPU: copies of operands in fp32
    assert many < few + 0.1 * block                                      # (160, vocab) would be 10 blocks


@pytest.mark.parametrize("vocab", [2_000, 32_000, 151_936, 600_000])
def test_the_default_chunk_keeps_the_two_blocks_under_1_gib_and_is_at_most_1024_tokens(monkeypatch, vocab):
    seen = []
    monkeypatch.setattr(_ChunkedLogProbs, "apply", lambda *args: seen.append(args[4]))
    token_logprobs(None, torch.empty(vocab, 1), None)
    assert seen[0] == 1024 or 2**29 < 2 * 4 * (seen[0] + 128) * vocab and 2 * 4 * seen[0] * vocab <= 2**30
    assert 128 <= seen[0] <= 1024 and seen[0] % 128 == 0               # whole tiles of the GPU's matrix products


@pytest.mark.parametrize("name, card, teraflops", [
    ("NVIDIA H100 80GB HBM3", "H100", 989), ("NVIDIA H100 PCIe", "H100 PCIe", 756), ("NVIDIA H100 NVL", "H100 NVL", 835),
    ("NVIDIA H200", "H200", 989), ("NVIDIA H200 NVL", "H200 NVL", 835), ("NVIDIA B200", "B200", 2250), ("NVIDIA GB200", "GB200", 2500),
    ("NVIDIA GH200 480GB", "GH200", 989), ("NVIDIA A100-SXM4-80GB", "A100", 312), ("NVIDIA A100 80GB PCIe", "A100", 312),
    ("NVIDIA L40S", "L40S", 362), ("NVIDIA GeForce RTX 4090", "RTX 4090", 165), ("NVIDIA A10", None, None), ("Tesla T4", None, None)])
def test_the_peak_is_that_of_the_very_card(name, card, teraflops):
    assert peak_flops(name) == (card, teraflops and teraflops * 1e12)


# ---------------------------------------------------------------------------------------------------------------
# pack and collate.

def of_length(n, marker=0):
    return Sequence([marker], [0] * (n - 1))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_packing_loses_nothing_stays_in_budget_serves_every_rank_and_is_deterministic(ranks):
    rng = random.Random(ranks)
    for _ in range(100):
        budget = rng.randint(10, 200)
        sequences = [of_length(rng.randint(2, rng.choice((5, budget))), i) for i in range(rng.randint(0, 40))]
        packs = pack(sequences, budget, ranks)
        assert sorted(s.prompt[0] for p in packs for s in p) == list(range(len(sequences)))
        loads = [sum(map(len, p)) for p in packs]
        assert max(loads) <= budget and len(packs) % ranks == 0 and packs
        assert loads == sorted(loads, reverse=True)                      # equal loads side by side
        assert [[s.prompt for s in p] for p in pack(sequences, budget, ranks)] == [[s.prompt for s in p] for p in packs]


def test_no_more_micro_batches_than_first_fit_needs():
    assert len(pack([of_length(n) for n in (7, 6, 4, 3)], 10)) == 2
    assert [len(p) for p in pack([], 10, 3)] == [0, 0, 0] and [len(p) for p in pack([of_length(4)], 10, 2)] == [1, 0]


def test_first_fit_stands_where_evening_out_would_overflow():
    """Differencing gives 3+2+2 and 3+2; first-fit 3+3 and 2+2+2."""
    assert [sum(map(len, p)) for p in pack([of_length(n) for n in (3, 3, 2, 2, 2)], 6)] == [6, 6]


def test_no_rank_is_left_idle_while_another_could_share_its_load():
    assert [len(p) for p in pack([of_length(10) for _ in range(8)], 100, 4)] == [2, 2, 2, 2]
    assert [sum(map(len, p)) for p in pack([of_length(4) for _ in range(4)], 12)] == [8, 8]           # first-fit: 12 and 4


@pytest.mark.parametrize("seed", range(5))
def test_heavy_tailed_lengths_are_spread_evenly(seed):
    rng = random.Random(seed)
    sequences = [of_length(2 + min(8190, int(rng.lognormvariate(7, 1)))) for _ in range(200)]
    loads = [sum(map(len, p)) for p in pack(sequences, 16_384, 8)]
    assert max(loads) <= 1.02 * sum(loads) / len(loads)


def best_split(costs, k):
    """The lowest possible highest sum of `costs` in k parts, by trying all."""
    return min(max(sum(c for c, part in zip(costs, parts) if part == p) for p in range(k))
               for parts in itertools.product(range(k), repeat=len(costs)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_karmarkar_karp_is_close_to_the_best_of_all_partitions(k):
    rng, excess = random.Random(k), []
    for _ in range(60):
        costs = [rng.randint(1, 100) for _ in range(rng.randint(0, 8))]
        parts = karmarkar_karp(costs, k)
        assert len(parts) == k and sorted(i for part in parts for i in part) == list(range(len(costs)))
        if costs:
            excess.append(max(sum(costs[i] for i in part) for part in parts) / best_split(costs, k))
    assert 1 <= sum(excess) / len(excess) < 1.03 and max(excess) < 1.25


def test_karmarkar_karp_splits_the_textbook_example():
    """8, 7, 6, 5, 4: differencing ends at 16 and 14, greedy (each to the lightest) at 17 and 13."""
    assert sorted(sum((8, 7, 6, 5, 4)[i] for i in part) for part in karmarkar_karp([8, 7, 6, 5, 4], 2)) == [14, 16]


def test_ranks_work_side_by_side_on_equal_costs_not_on_equal_tokens():
    """Where attention is all there is, 300 tokens cost as much as nine times 100, and equal tokens are unequal costs."""
    sequences, square = [of_length(100) for _ in range(9)] + [of_length(300) for _ in range(3)], lambda s: len(s)**2
    costs = lambda packs: [sum(map(square, p)) for p in packs]
    assert costs(pack(sequences, 1200, 2, square)) == [180_000, 180_000]
    by_tokens = costs(pack(sequences, 1200, 2))
    assert max(by_tokens) > 180_000
    tight = pack(sequences, 900, 2, square)                         # 1,200 tokens on one side do not fit here
    assert [sum(map(len, p)) for p in tight] == [900, 900] and costs(tight) == sorted(by_tokens, reverse=True)


def test_a_sequence_over_the_budget_is_an_error_that_names_the_flag():
    assert len(pack([of_length(10)], 10)) == 1
    with pytest.raises(ValueError, match="11 tokens exceeds --micro_batch_tokens 10"):
        pack([of_length(11), of_length(3)], 10)


@pytest.mark.parametrize("kind", [list, np.array])
def test_a_packed_batch_points_at_the_hidden_state_that_predicts_each_response_token(kind):
    batch = collate([Sequence(kind([5, 6]), kind([7, 8, 0])), Sequence(kind([1]), kind([0]))], CPU)      # 0: EOS and padding
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0, 1, 0]] and batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.where.tolist() == [1, 2, 3, 5] and batch.targets.tolist() == [7, 8, 0, 0] and batch.lengths == [3, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 7] and batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == 5


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("lengths, calls", [([5], 1), ([5, 5, 5], 1), ([5, 5, 3, 1, 1, 7, 5], 5), ([1], 1)], ids=str)
def test_packed_attention_and_its_gradients_are_those_of_each_sequence_alone_with_one_call_a_run_of_one_length(
        monkeypatch, lengths, calls, kv_heads):
    attention, seen, n = torch.nn.functional.scaled_dot_product_attention, [], sum(lengths)
    g = torch.Generator().manual_seed(n)
    q, k, v = ins = [torch.randn(1, heads, n, 8, generator=g, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    where, weights = torch.tensor([0] + lengths).cumsum(0).to(torch.int32), torch.randn(1, n, 4, 8, generator=g)
    alone = []
    for s, e in zip(where, where[1:]):
        causal = torch.ones(e - s, e - s).tril().log()
        key, value = (x[:, :, s:e].repeat_interleave(4 // kv_heads, 1) for x in (k, v))
        alone.append((0.3 * q[:, :, s:e] @ key.mT + causal).softmax(-1) @ value)
    expected = torch.cat(alone, 2).transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **b: seen.append(1) or attention(*a, **b))
    out, _ = M.packed_attention(None, *ins, None, 0.3, cu_seq_lens_q=where, max_length_q=max(lengths))
    assert len(seen) == calls
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad((weights * x).sum(), ins) for x in (out, expected))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Policies.

@pytest.fixture(scope="module")
def mesh():
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        rank, world, device, mesh = init_distributed("cpu")
        assert (rank, world, device.type) == (0, 1, "cpu")
        yield mesh
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def save_model(folder, kind="Qwen2", dtype=torch.float32, shard="1GB", **overrides):
    """A random model in a folder: 2 layers, 4 heads, 2 key-value heads, weights large enough that every part matters."""
    config = getattr(transformers, kind + "Config")(**dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0) | overrides)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.15 * torch.randn_like(p))
    lm.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


MODELS = [dict(kind=k, tie_word_embeddings=t) for k in ("Qwen2", "Llama") for t in (True, False)]
model_name = lambda m: f"{m['kind']}-{'tied' if m['tie_word_embeddings'] else 'untied'}"


def load(folder, mesh, checkpointing=False, **overrides):
    return M.load_policy(folder, M.load_config(folder, **overrides), mesh, CPU, checkpointing)


def some_sequences(seed=0, lengths=((3, 5), (1, 1), (9, 2), (4, 12))):
    rng = np.random.default_rng(seed)
    return [Sequence(rng.integers(0, VOCAB, p), rng.integers(0, VOCAB, r)) for p, r in lengths]


def unpacked(lm, sequence, temperature=1.0):
    """(log-probs, entropies) of the response by transformers' own forward of this sequence alone."""
    ids = torch.tensor(np.concatenate([sequence.prompt, sequence.response]))
    log_p = torch.log_softmax(lm(ids[None]).logits[0] / temperature, -1)[len(sequence.prompt) - 1:-1]
    return log_p.gather(1, ids[len(sequence.prompt):, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def gradients(policy):
    return {n.removeprefix("lm."): p.grad.full_tensor().clone() for n, p in policy.named_parameters()}


def one_step(policy, optimizer, seed=0):
    policy(collate(some_sequences(seed), CPU))[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_recomputation_keeps_a_blocks_input_and_no_generators_state(tmp_path, mesh):
    policy = load(save_model(tmp_path), mesh, checkpointing=True)
    assert all(block._gradient_checkpointing_func.keywords == {"use_reentrant": False, "preserve_rng_state": False}
               for block in policy.lm.base_model.layers)


def test_check_packing_averages_over_64_tokens_of_a_response_and_more(tmp_path, mesh, monkeypatch):
    seen, collate = [], M.collate
    policy = load(save_model(tmp_path), mesh)
    monkeypatch.setattr(M, "collate", lambda sequences, device: seen.extend(sequences) or collate(sequences, device))
    M.check_packing(policy, CPU, VOCAB)
    assert len(seen) == 9 and min(len(s.response) for s in seen) >= 64 and policy.lm.config._attn_implementation == "packed"


@pytest.mark.parametrize("spec", [dict(kind="Llama", attention_dropout=0.5), dict(kind="Phi3", resid_pdrop=0.5, embd_pdrop=0.5)],
                         ids=lambda spec: spec["kind"])
def test_a_model_with_dropout_is_trained_without_it_recomputed_or_not(tmp_path, mesh, spec):
    """The engine has none, and a recomputed block would draw another one than its forward did."""
    save_model(tmp_path, **spec)
    grads = []
    for checkpointing in (False, True):
        policy = load(tmp_path, mesh, checkpointing)
        M.check_packing(policy, CPU, VOCAB)                                      # through transformers' own attention, too
        policy(collate(some_sequences(), CPU))[0].sum().backward()
        grads.append([p.grad.full_tensor() for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("spec", MODELS, ids=model_name)
@pytest.mark.parametrize("temperature, checkpointing", [(1.0, True), (0.7, False)])
def test_a_packed_forward_and_its_gradients_equal_transformers_own_on_each_sequence_alone(tmp_path, mesh, spec, temperature, checkpointing):
    save_model(tmp_path, **spec)
    policy, sequences = load(tmp_path, mesh, checkpointing), some_sequences()
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    logp, entropy, _ = policy(collate(sequences, CPU), temperature, entropy_grad=True)
    assert logp.shape == entropy.shape == (4, 12)
    weights = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    expected = [unpacked(lm, s, temperature) for s in sequences]
    for i, (lp, h) in enumerate(expected):
        torch.testing.assert_close(logp[i, :len(lp)], lp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[i, :len(h)], h, atol=1e-5, rtol=1e-5)
        assert logp[i, len(lp):].eq(0).all() and entropy[i, len(h):].eq(0).all()
    (weights * (logp + entropy)).sum().backward()
    sum((weights[i, :len(lp)] * (lp + h)).sum() for i, (lp, h) in enumerate(expected)).backward()
    own = {n: p.grad for n, p in lm.named_parameters()}
    assert gradients(policy).keys() == own.keys()
    for name, grad in gradients(policy).items():                         # summed over tokens and sequences, never averaged
        torch.testing.assert_close(grad, own[name], atol=1e-5 * own[name].abs().max().item(), rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_gradients_of_micro_batches_add_up_and_one_without_sequences_adds_nothing(tmp_path, mesh):
    policy, sequences = load(save_model(tmp_path), mesh), some_sequences()
    policy(collate(sequences, CPU))[0].sum().backward()
    whole = gradients(policy)
    policy.zero_grad()
    for part in (sequences[:1], [], sequences[1:]):
        logp, entropy, _ = policy(collate(part, CPU))
        assert len(part) or (logp.shape == entropy.shape == (1, 0))
        logp.sum().backward()
    for name, grad in gradients(policy).items():
        torch.testing.assert_close(grad, whole[name], atol=1e-5 * whole[name].abs().max().item(), rtol=1e-4)


def one_sequence_sees_another(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    return M.packed_attention(module, query, key, value, mask, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)


def not_causal(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    parts = [torch.nn.functional.scaled_dot_product_attention(query[:, :, s:e], key[:, :, s:e], value[:, :, s:e])
             for s, e in zip(cu_seq_lens_q, cu_seq_lens_q[1:])]
    return torch.cat(parts, 2).transpose(1, 2), None


def nan_after_the_first_sequence(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    out, _ = M.packed_attention(module, query, key, value, mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
    return torch.where(torch.arange(out.shape[1])[None, :, None, None] < cu_seq_lens_q[1], out, float("nan")), None


@pytest.mark.parametrize("spec", MODELS[:1] + MODELS[3:], ids=model_name)
@pytest.mark.parametrize("attention", [one_sequence_sees_another, not_causal, nan_after_the_first_sequence])
def test_check_packing_passes_a_right_attention_and_aborts_on_a_wrong_one(tmp_path, mesh, monkeypatch, spec, attention):
    policy = load(save_model(tmp_path, **spec), mesh)
    M.check_packing(policy, CPU, VOCAB)
    assert policy.lm.config._attn_implementation == "packed"
    assert all(hasattr(p, "full_tensor") for p in policy.parameters())   # resharded: an optimizer made now holds masters
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", attention)
    with pytest.raises(RuntimeError, match="packed sequences see each other"):
        M.check_packing(policy, CPU, VOCAB)


@pytest.mark.parametrize("spec", MODELS, ids=model_name)
@pytest.mark.parametrize("file", [dict(), dict(dtype=torch.bfloat16), dict(shard="20KB")], ids=["fp32", "bf16", "several files"])
def test_full_parameters_after_a_forward_are_the_fp32_master_weights_each_once(tmp_path, mesh, spec, file):
    policy = load(save_model(tmp_path, **spec, **file), mesh)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in file)
    with torch.no_grad():
        policy(collate(some_sequences(), CPU))                           # no backward: the root stays gathered
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    stream = list(M.full_parameters(policy, torch.float32))
    assert len(stream) == len(expected) and dict(stream).keys() == expected.keys()
    assert all(t.dtype == torch.float32 and torch.equal(t, expected[n]) for n, t in stream)
    assert ("lm_head.weight" in expected) != spec["tie_word_embeddings"]
    assert all(t.dtype == torch.bfloat16 for _, t in M.full_parameters(policy, torch.bfloat16))


@pytest.mark.parametrize("spec", MODELS, ids=model_name)
def test_a_trained_policy_is_exported_as_transformers_reads_it(tmp_path, mesh, spec):
    tokenizer = task.make_tokenizer()
    policy = load(save_model(tmp_path / "base", **spec), mesh)
    before = {n: t.clone() for n, t in M.full_parameters(policy, torch.float32)}
    one_step(policy, torch.optim.AdamW(policy.parameters(), lr=0.01))
    for _ in range(2):                                                   # the second export replaces the first
        M.export_hf(tmp_path / "out" / "hf", policy, tokenizer, torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype="auto")
    own, after = dict(lm.named_parameters()), dict(M.full_parameters(policy, torch.float32))
    assert own.keys() == after.keys() and all(torch.equal(own[n], t) and not torch.equal(before[n], t) for n, t in after.items())
    sequence = some_sequences()[3]
    torch.testing.assert_close(policy(collate([sequence], CPU))[0][0], unpacked(lm, sequence)[0], atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert config["use_cache"] and config["dtype"] == "float32" and "packed" not in json.dumps(config)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "hf").decode([2]) == "<think>"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize("old_format", [True, False])
def test_the_overrides_of_rope_and_window_reach_the_policy_and_the_exported_config(tmp_path, mesh, kind, old_format):
    save_model(tmp_path / "base", kind)
    if old_format:                                                       # as Qwen2.5-Math-7B's config.json has it
        file = tmp_path / "base" / "config.json"
        config = json.loads(file.read_text())
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"]}
        file.write_text(json.dumps(config))
    unchanged = M.load_config(tmp_path / "base")
    assert unchanged.max_position_embeddings == 512 and unchanged.rope_parameters["rope_theta"] == 10_000
    policy = load(tmp_path / "base", mesh, rope_theta=40_000.0, window=16_384)
    M.export_hf(tmp_path / "hf", policy, task.make_tokenizer(), torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.rope_parameters["rope_theta"] == 40_000 and config.max_position_embeddings == 16_384
    lm, base = (AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("hf", "base"))
    torch.testing.assert_close(lm.model.rotary_emb.inv_freq, 40_000.0 ** (-torch.arange(0, 8, 2) / 8))
    sequence = some_sequences()[3]
    logp = policy(collate([sequence], CPU))[0][0]
    torch.testing.assert_close(logp, unpacked(lm, sequence)[0], atol=1e-5, rtol=1e-5)
    assert (logp - unpacked(base, sequence)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("theta, override, refused", [(10_000.0, 40_000, False), (40_000.0, 40_000, False),
                                                      (500_000.0, 40_000, True), (500_000.0, 0, False)])
def test_a_rope_override_that_is_not_the_papers_is_refused(tmp_path, theta, override, refused):
    transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": theta}).save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ValueError, match="--rope_theta 0 --window 0"):
            M.load_config(tmp_path, override, 0)
    else:
        assert M.load_config(tmp_path, override, 0).rope_parameters["rope_theta"] == (override or theta)


@pytest.mark.parametrize("override", [0, 10_000])
def test_a_longer_window_with_the_model_s_own_rope_is_refused(tmp_path, override):
    transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                             max_position_embeddings=4096).save_pretrained(tmp_path)
    assert M.load_config(tmp_path, override, 2048).max_position_embeddings == 2048
    with pytest.raises(ValueError, match="--window 16384 is over its 4096 tokens"):
        M.load_config(tmp_path, override, 16_384)


def test_a_model_without_one_rope_theta_is_refused_by_name(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no single RoPE theta"):
        M.load_config(tmp_path, 40_000, 0)


@pytest.mark.parametrize("kind, overrides, refused", [
    ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), True),
    ("Qwen2", dict(use_sliding_window=False, sliding_window=8), False), ("Llama", {}, False),
    ("Mistral", dict(sliding_window=8), True),
    ("Mistral", dict(sliding_window=None), False)])
def test_sliding_window_attention_is_refused(tmp_path, kind, overrides, refused):
    getattr(transformers, kind + "Config")(**overrides).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding-window attention is not supported") if refused else nullcontext():
        M.load_config(tmp_path)


@pytest.mark.parametrize("change", [dict(vocab_size=VOCAB + 3), dict(vocab_size=VOCAB - 3), dict(intermediate_size=64),
                                    dict(num_hidden_layers=3), dict(tie_word_embeddings=False)], ids=str)
def test_weights_that_do_not_fit_the_config_are_refused_by_folder(tmp_path, mesh, change):
    save_model(tmp_path, tie_word_embeddings=True)
    config = M.load_config(tmp_path)
    for name, value in change.items():
        setattr(config, name, value)
    if "num_hidden_layers" in change:
        config.layer_types = ["full_attention"] * 3
    with pytest.raises(ValueError, match=f"{tmp_path}: the weights do not fit"):
        M.load_policy(tmp_path, config, mesh, CPU)


def test_a_folder_without_weights_is_refused(tmp_path, mesh):
    transformers.Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no .*safetensors"):
        load(tmp_path, mesh)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints.

def trained(folder, mesh, steps=1, **spec):
    policy = load(save_model(folder, **spec), mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, weight_decay=0.01, fused=True)
    for step in range(steps):
        one_step(policy, optimizer, step)
    return policy, optimizer


def everything(policy, optimizer):
    """Copies of all weights and Adam moments."""
    full = lambda t: t.full_tensor().clone() if hasattr(t, "full_tensor") else torch.as_tensor(t).clone()
    return {n: [full(p.detach())] + [full(t) for _, t in sorted(optimizer.state[p].items())] for n, p in policy.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(len(a[n]) == len(b[n]) and all(map(torch.equal, a[n], b[n])) for n in a)


@pytest.fixture
def checkpoints(tmp_path, mesh):
    """(folder with step-2 and step-4, policy, optimizer)."""
    policy, optimizer = trained(tmp_path / "model", mesh)
    for step in (2, 4):
        save_checkpoint(tmp_path / "c", policy, optimizer, {"step": step}, keep=2)
    return tmp_path / "c", policy, optimizer


@pytest.mark.parametrize("spec", MODELS[:1] + MODELS[3:], ids=model_name)
def test_a_checkpoint_restores_weights_moments_generators_and_state_bit_by_bit(tmp_path, mesh, spec):
    policy, optimizer = trained(tmp_path / "model", mesh, steps=2, **spec)
    saved, state = everything(policy, optimizer), {"step": 7, "position": 3, "data": ["x", 1, 0]}
    save_checkpoint(tmp_path / "c", policy, optimizer, state, keep=1)
    assert same(everything(policy, optimizer), saved)                    # saving changes nothing
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    drawn = draw()
    one_step(policy, optimizer, 9)
    continued = everything(policy, optimizer)
    other, other_optimizer = trained(tmp_path / "model", mesh, steps=0, **spec)
    seed_everything(5)
    assert load_checkpoint(*newest_checkpoint(tmp_path / "c"), other, other_optimizer) == state
    assert draw() == drawn and same(everything(other, other_optimizer), saved)
    one_step(other, other_optimizer, 9)
    assert same(everything(other, other_optimizer), continued) and not same(continued, saved)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "rng-0.pt"])
@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(b""), lambda f: f.unlink()],
                         ids=["one byte short", "empty", "missing"])
def test_a_cut_or_missing_file_is_refused_by_name_and_the_checkpoint_before_it_is_used(checkpoints, name, damage):
    folder, said = checkpoints[0], []
    damage(folder / "step-4" / name)
    with pytest.raises(ValueError, match=f"{folder / 'step-4' / name}: truncated checkpoint"):
        inspect_checkpoint(folder / "step-4")
    path, manifest = newest_checkpoint(folder, said.append)
    assert path == folder / "step-2" and manifest["state"] == {"step": 2}
    assert len(said) == 1 and str(folder / "step-4" / name) in said[0]
    damage(folder / "step-2" / name)
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole"):
        newest_checkpoint(folder, said.append)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_whose_content_is_damaged_is_an_error_that_names_the_checkpoint(checkpoints, name):
    folder, *training = checkpoints
    (folder / "step-4" / name).write_bytes(b"\xff" * (folder / "step-4" / name).stat().st_size)
    with pytest.raises(ValueError, match=f"{folder / 'step-4'}: cannot be read"):
        load_checkpoint(*newest_checkpoint(folder), *training)


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '{"files": []}'])
def test_a_folder_without_a_manifest_of_ours_is_no_checkpoint(checkpoints, manifest):
    folder = checkpoints[0]
    (folder / "step-4" / "manifest.json").unlink()
    if manifest is not None:
        (folder / "step-4" / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=f"{folder / 'step-4'}: not a complete checkpoint of this program .manifest.json"):
        inspect_checkpoint(folder / "step-4")
    assert newest_checkpoint(folder, lambda _: None)[0] == folder / "step-2"


@pytest.mark.parametrize("spec, named", [(dict(vocab_size=VOCAB + 1), "embed_tokens"), (dict(intermediate_size=64), "gate_proj"),
                                         (dict(num_hidden_layers=1), "number of parameters"), (dict(kind="Llama"), "number of parameters")],
                         ids=lambda s: str(s))
def test_a_checkpoint_of_another_model_is_refused_and_the_policy_left_alone(tmp_path, mesh, checkpoints, spec, named):
    policy, optimizer = trained(tmp_path / "other", mesh, **spec)
    before = everything(policy, optimizer)
    with pytest.raises(ValueError, match=f"step-4: a checkpoint of another model: .*{named}"):
        load_checkpoint(*newest_checkpoint(checkpoints[0]), policy, optimizer)
    assert same(everything(policy, optimizer), before)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_no_checkpoint_at_all_is_no_error_and_leftovers_of_a_killed_save_are_ignored(tmp_path, checkpoints):
    assert newest_checkpoint(tmp_path / "nothing here") is None
    folder, *training = checkpoints
    (folder / ".partial-step-6" / "junk").mkdir(parents=True)
    (folder / "step-4").rename(folder / ".partial-step-9")               # whole, but never renamed
    assert newest_checkpoint(folder)[0] == folder / "step-2"
    save_checkpoint(folder, *training, {"step": 6}, keep=2)            # clears what kills have left
    path, manifest = newest_checkpoint(folder)
    assert path == folder / "step-6" and "junk" not in manifest["files"] and names(folder) == ["step-2", "step-6"]


def test_only_the_newest_checkpoints_are_kept_by_number_not_by_name(checkpoints):
    folder, *training = checkpoints
    for step in (6, 10):
        save_checkpoint(folder, *training, {"step": step}, keep=2)
    assert names(folder) == ["step-10", "step-6"]
    save_checkpoint(folder, *training, {"step": 10}, keep=1)           # the same step again replaces it
    assert names(folder) == ["step-10"]


def test_a_copy_that_the_user_has_renamed_is_not_deleted(checkpoints):
    folder, *training = checkpoints
    (folder / "step-2").rename(folder / "step-2-mine")
    save_checkpoint(folder, *training, {"step": 6}, keep=2)
    assert names(folder) == ["step-2-mine", "step-4", "step-6"]


def test_the_checkpoint_just_written_is_kept_though_a_broken_one_has_a_higher_number(checkpoints):
    folder, *training = checkpoints
    (folder / "step-4" / ".metadata").unlink()                           # resumed from step-2, saved at step 3
    save_checkpoint(folder, *training, {"step": 3}, keep=1)
    assert newest_checkpoint(folder, lambda _: None)[0] == folder / "step-3"
