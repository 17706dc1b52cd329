"""model.py: packing, sharded policies against transformers' own forward; support/checkpoint.py.

    pytest tests/test_model.py

One process, a gloo group of one rank, models of 30,000 random weights. What needs several ranks is tested
elsewhere; the head, token_logprobs, in test_logprobs.py.
"""
import itertools
import json
import os
import pickle
import random
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import model as M
from config import Config, keeps_own_rope
from model import Sequence, collate, pack
from paper import figures
from support.checkpoint import inspect_checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from support.packing import karmarkar_karp
from support.processes import init_distributed, seed_everything
from tiny import task

CPU = torch.device("cpu")
VOCAB = 97


# ----------------------------------------------------------------------------------------------------------
# pack and collate.

def of_length(n, marker=0):
    return Sequence([marker], [0] * (n - 1))


def prompts_of(packs):
    return [[s.prompt for s in p] for p in packs]


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
        assert prompts_of(pack(sequences, budget, ranks)) == prompts_of(packs)


def test_no_more_micro_batches_than_first_fit_needs():
    assert len(pack([of_length(n) for n in (7, 6, 4, 3)], 10)) == 2
    assert [len(p) for p in pack([], 10, 3)] == [0, 0, 0]
    assert [len(p) for p in pack([of_length(4)], 10, 2)] == [1, 0]


def test_first_fit_stands_where_evening_out_would_overflow():
    """Differencing gives 3+2+2 and 3+2; first-fit 3+3 and 2+2+2."""
    assert [sum(map(len, p)) for p in pack([of_length(n) for n in (3, 3, 2, 2, 2)], 6)] == [6, 6]


def test_no_rank_is_left_idle_while_another_could_share_its_load():
    assert [len(p) for p in pack([of_length(10) for _ in range(8)], 100, 4)] == [2, 2, 2, 2]
    fours = [of_length(4) for _ in range(4)]
    assert [sum(map(len, p)) for p in pack(fours, 12)] == [8, 8]                         # first-fit: 12 and 4


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
    costs = [8, 7, 6, 5, 4]
    assert sorted(sum(costs[i] for i in part) for part in karmarkar_karp(costs, 2)) == [14, 16]


def test_ranks_work_side_by_side_on_equal_costs_not_on_equal_tokens():
    """Where attention is all there is, 300 tokens cost as much as nine times 100."""
    sequences = [of_length(100) for _ in range(9)] + [of_length(300) for _ in range(3)]

    def square(sequence):
        return len(sequence)**2

    def costs(packs):
        return [sum(map(square, p)) for p in packs]

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
    sequences = [Sequence(kind([5, 6]), kind([7, 8, 0])), Sequence(kind([1]), kind([0]))]   # 0: EOS, padding
    batch = collate(sequences, CPU)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.where.tolist() == [1, 2, 3, 5] and batch.targets.tolist() == [7, 8, 0, 0]
    assert batch.lengths == [3, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 7] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 5


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("lengths, calls", [
    ([5], 1), ([5, 5, 5], 1), ([5, 5, 3, 1, 1, 7, 5], 5), ([1], 1)], ids=str)
def test_packed_attention_and_its_gradients_are_those_of_each_sequence_alone_one_call_a_run_of_one_length(
        monkeypatch, lengths, calls, kv_heads):
    attention, seen, n = torch.nn.functional.scaled_dot_product_attention, [], sum(lengths)
    g = torch.Generator().manual_seed(n)
    heads = (4, kv_heads, kv_heads)
    q, k, v = ins = [torch.randn(1, number, n, 8, generator=g, requires_grad=True) for number in heads]
    where = torch.tensor([0] + lengths).cumsum(0).to(torch.int32)
    weights = torch.randn(1, n, 4, 8, generator=g)
    alone = []
    for s, e in zip(where, where[1:]):
        causal = torch.ones(e - s, e - s).tril().log()
        key, value = (x[:, :, s:e].repeat_interleave(4 // kv_heads, 1) for x in (k, v))
        alone.append((0.3 * q[:, :, s:e] @ key.mT + causal).softmax(-1) @ value)
    expected = torch.cat(alone, 2).transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **b: seen.append(1) or attention(*a, **b))
    out, _ = M.packed_attention(None, *ins, None, 0.3, cu_seq_lens_q=where, max_length_q=max(lengths))
    assert len(seen) == calls
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad((weights * x).sum(), ins) for x in (out, expected))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------
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
    """A random model in a folder: 2 layers, 4 heads, 2 key-value heads, weights large enough that every part
    matters."""
    fields = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                  bos_token_id=None, eos_token_id=0, pad_token_id=0)
    config = getattr(transformers, kind + "Config")(**fields | overrides)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.15 * torch.randn_like(p))
    lm.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


MODELS = [dict(kind=k, tie_word_embeddings=t) for k in ("Qwen2", "Llama") for t in (True, False)]


def model_name(spec):
    return f"{spec['kind']}-{'tied' if spec['tie_word_embeddings'] else 'untied'}"


def load(folder, mesh, recompute=0, **overrides):
    return M.load_policy(folder, M.load_config(folder, **overrides), mesh, CPU, recompute)


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
    policy = load(save_model(tmp_path), mesh, recompute=None)
    expected = {"use_reentrant": False, "preserve_rng_state": False}
    for block in policy.lm.base_model.layers:
        assert block._gradient_checkpointing_func.keywords == expected


@pytest.mark.parametrize("spec", MODELS, ids=model_name)
def test_the_first_so_many_blocks_are_recomputed_and_gradients_are_the_same_bits(tmp_path, mesh, spec):
    save_model(tmp_path, **spec)
    found, runs = {}, []
    for recompute in (None, 2, 1, 0):
        policy, runs[:] = load(tmp_path, mesh, recompute), []
        for number, block in enumerate(policy.lm.base_model.layers):
            block.mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
        policy(collate(some_sequences(), CPU))[0].sum().backward()
        found[recompute] = gradients(policy)
        again = {None: [1, 0], 2: [1, 0], 1: [0], 0: []}           # backward comes to the last one first
        assert runs == [0, 1, *again[recompute]]
    for name, gradient in found[0].items():
        assert all(torch.equal(gradient, found[recompute][name]) for recompute in (None, 2, 1)), name


def test_check_packing_averages_over_64_tokens_of_a_response_and_more(tmp_path, mesh, monkeypatch):
    seen, collate = [], M.collate
    policy = load(save_model(tmp_path), mesh)
    monkeypatch.setattr(M, "collate",
                        lambda sequences, device: seen.extend(sequences) or collate(sequences, device))
    M.check_packing(policy, CPU, VOCAB)
    assert len(seen) == 9 and min(len(s.response) for s in seen) >= 64
    assert policy.lm.config._attn_implementation == "packed"


@pytest.mark.parametrize("spec", [
    dict(kind="Llama", attention_dropout=0.5), dict(kind="Phi3", resid_pdrop=0.5, embd_pdrop=0.5)],
    ids=lambda spec: spec["kind"])
def test_a_model_with_dropout_is_trained_without_it_recomputed_or_not(tmp_path, mesh, spec):
    """The engine has none, and a recomputed block would draw another one than its forward did."""
    save_model(tmp_path, **spec)
    grads = []
    for recompute in (0, 1, None):
        policy = load(tmp_path, mesh, recompute)
        M.check_packing(policy, CPU, VOCAB)                  # through transformers' own attention, too
        policy(collate(some_sequences(), CPU))[0].sum().backward()
        grads.append([p.grad.full_tensor() for p in policy.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


@pytest.mark.parametrize("spec", MODELS, ids=model_name)
@pytest.mark.parametrize("temperature, recompute", [(1.0, None), (0.7, 0)])
def test_a_packed_forward_and_its_gradients_equal_transformers_own_on_each_sequence_alone(
        tmp_path, mesh, spec, temperature, recompute):
    save_model(tmp_path, **spec)
    policy, sequences = load(tmp_path, mesh, recompute), some_sequences()
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
    for name, grad in gradients(policy).items():           # summed over tokens and sequences, never averaged
        torch.testing.assert_close(grad, own[name], atol=1e-5 * own[name].abs().max().item(), rtol=1e-4,
                                   msg=lambda m: f"{name}: {m}")


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


@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_counts_its_own_weights_for_its_flops_and_a_tied_head_once(tmp_path, mesh, tied):
    policy, sequences = load(save_model(tmp_path, tie_word_embeddings=tied), mesh), some_sequences()
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert policy.flops(sequences) == M.forward_backward_flops(policy.lm.config, weights, sequences)
    head, body = VOCAB * 32, weights - VOCAB * 32 * (1 if tied else 2)
    assert policy.flops([Sequence([1], [2, 3])]) == 6 * body * 3 + 6 * head * 2 + 6 * 2 * 32 * 3**2


def test_the_engine_and_exports_are_bf16_on_a_gpu_and_fp32_on_a_cpu():
    assert M.compute_dtype(torch.device("cuda", 3)) == torch.bfloat16
    assert M.compute_dtype(CPU) == torch.float32


def one_sequence_sees_another(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    return M.packed_attention(module, query, key, value, mask, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)


def not_causal(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    parts = []
    for s, e in zip(cu_seq_lens_q, cu_seq_lens_q[1:]):
        q, k, v = query[:, :, s:e], key[:, :, s:e], value[:, :, s:e]
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return torch.cat(parts, 2).transpose(1, 2), None


def nan_after_the_first_sequence(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    out, _ = M.packed_attention(module, query, key, value, mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
    first = torch.arange(out.shape[1])[None, :, None, None] < cu_seq_lens_q[1]
    return torch.where(first, out, float("nan")), None


@pytest.mark.parametrize("spec", MODELS[:1] + MODELS[3:], ids=model_name)
@pytest.mark.parametrize("attention", [one_sequence_sees_another, not_causal, nan_after_the_first_sequence])
def test_check_packing_passes_a_right_attention_and_aborts_on_a_wrong_one(
        tmp_path, mesh, monkeypatch, spec, attention):
    policy = load(save_model(tmp_path, **spec), mesh)
    M.check_packing(policy, CPU, VOCAB)
    assert policy.lm.config._attn_implementation == "packed"
    assert all(hasattr(p, "full_tensor") for p in policy.parameters())        # an optimizer now holds masters
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", attention)
    with pytest.raises(RuntimeError, match="packed sequences see each other"):
        M.check_packing(policy, CPU, VOCAB)


@pytest.mark.parametrize("spec", MODELS, ids=model_name)
@pytest.mark.parametrize("file", [dict(), dict(dtype=torch.bfloat16), dict(shard="20KB")],
                         ids=["fp32", "bf16", "several files"])
def test_full_parameters_after_a_forward_are_the_fp32_master_weights_each_once(tmp_path, mesh, spec, file):
    policy = load(save_model(tmp_path, **spec, **file), mesh)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in file)
    with torch.no_grad():
        policy(collate(some_sequences(), CPU))                 # no backward: the root stays gathered
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
    for _ in range(2):                 # the second export replaces the first
        M.export_hf(tmp_path / "out" / "hf", policy, tokenizer, torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype="auto")
    own, after = dict(lm.named_parameters()), dict(M.full_parameters(policy, torch.float32))
    assert own.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(own[name], tensor) and not torch.equal(before[name], tensor)
    sequence = some_sequences()[3]
    logp = policy(collate([sequence], CPU))[0][0]
    torch.testing.assert_close(logp, unpacked(lm, sequence)[0], atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert config["use_cache"] and config["dtype"] == "float32" and "packed" not in json.dumps(config)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "hf").decode([2]) == "<think>"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@pytest.mark.parametrize("old_format", [True, False])
def test_the_overrides_of_rope_and_window_reach_the_policy_and_the_exported_config(
        tmp_path, mesh, kind, old_format):
    save_model(tmp_path / "base", kind)
    if old_format:                 # as Qwen2.5-Math-7B's config.json has it
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
    rope = {"rope_type": "default", "rope_theta": theta}
    transformers.LlamaConfig(rope_parameters=rope).save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ValueError, match="--rope_theta 0 --window 0"):
            M.load_config(tmp_path, override, 0)
    else:
        assert M.load_config(tmp_path, override, 0).rope_parameters["rope_theta"] == (override or theta)


@pytest.mark.parametrize("own, window", [(4096, 4096), (32_768, 16_384)])
def test_a_model_with_another_rope_keeps_it_at_the_defaults_and_the_window_within_its_own(
        tmp_path, own, window):
    transformers.Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                             max_position_embeddings=own).save_pretrained(tmp_path)
    config = M.load_config(tmp_path, Config.rope_theta, Config.window, keeps_own_rope(Config()))
    assert not keeps_own_rope(Config(rope_theta=50_000.0))
    assert config.rope_parameters["rope_theta"] == 1e6 and config.max_position_embeddings == window


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
    found = pytest.raises(ValueError, match="sliding-window attention is not supported")
    with found if refused else nullcontext():
        M.load_config(tmp_path)


@pytest.mark.parametrize("change", [
    dict(vocab_size=VOCAB + 3), dict(vocab_size=VOCAB - 3), dict(intermediate_size=64),
    dict(num_hidden_layers=3), dict(num_hidden_layers=1), dict(attention_bias=False),
    dict(tie_word_embeddings=False)], ids=str)
def test_weights_that_do_not_fit_the_config_are_refused_by_folder(tmp_path, mesh, change):
    save_model(tmp_path, "Llama", tie_word_embeddings=True, attention_bias=True)
    config = M.load_config(tmp_path)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{tmp_path}: the weights do not fit"):
        M.load_policy(tmp_path, config, mesh, CPU)


def test_a_folder_without_weights_is_refused(tmp_path, mesh):
    transformers.Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: lacks model.safetensors"):
        load(tmp_path, mesh)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints.

def trained(folder, mesh, steps=1, **spec):
    policy = load(save_model(folder, **spec), mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, weight_decay=0.01, fused=True)
    for step in range(steps):
        one_step(policy, optimizer, step)
    return policy, optimizer


def everything(policy, optimizer):
    """Copies of all weights and Adam moments."""
    def full(t):
        return t.full_tensor().clone() if hasattr(t, "full_tensor") else torch.as_tensor(t).clone()

    found = {}
    for name, p in policy.named_parameters():
        found[name] = [full(p.detach())] + [full(t) for _, t in sorted(optimizer.state[p].items())]
    return found


def same(a, b):
    if a.keys() != b.keys():
        return False
    return all(len(a[n]) == len(b[n]) and all(map(torch.equal, a[n], b[n])) for n in a)


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

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

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
@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(b""), lambda f: f.unlink()],
    ids=["one byte short", "empty", "missing"])
def test_a_cut_or_missing_file_is_refused_by_name_and_the_checkpoint_before_it_is_used(
        checkpoints, name, damage):
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


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "rng-0.pt", "manifest.json"])
@pytest.mark.parametrize("where", [0.3, 0.6, 0.99])
def test_one_flipped_bit_anywhere_is_found_and_the_checkpoint_before_is_used(checkpoints, name, where):
    folder, said = checkpoints[0], []
    content = bytearray((folder / "step-4" / name).read_bytes())
    content[int(where * len(content))] ^= 1
    (folder / "step-4" / name).write_bytes(content)
    path, _ = newest_checkpoint(folder, said.append)
    assert path == folder / "step-2" and len(said) == 1
    assert str(folder / "step-4") in said[0] and name in said[0]


class Foreign:
    """What a pickle of somebody else's may hold: reading it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("change", [
    lambda manifest: None,
    lambda manifest: manifest.update(files={name: size for name, (size, _) in manifest["files"].items()}),
    lambda manifest: manifest.pop("sha256"),
    lambda manifest: manifest.pop("files")],
    ids=["another file", "no digests", "no digest of the manifest", "no files"])
def test_nothing_of_a_checkpoint_that_is_not_as_this_program_wrote_it_is_unpickled(
        tmp_path, checkpoints, mesh, change):
    folder, *_ = checkpoints
    manifest = json.loads((folder / "step-4" / "manifest.json").read_text())
    content = pickle.dumps(Foreign(tmp_path / "ran"))
    (folder / "step-4" / ".metadata").write_bytes(content)
    manifest["files"][".metadata"][0] = len(content)
    change(manifest)
    (folder / "step-4" / "manifest.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(folder, lambda _: None)[0] == folder / "step-2"
    with pytest.raises(ValueError, match="step-4"):
        figures.Scorer.load_checkpoint(None, folder / "step-4")
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '{"files": []}'])
def test_a_folder_without_a_manifest_of_ours_is_no_checkpoint(checkpoints, manifest):
    folder = checkpoints[0]
    (folder / "step-4" / "manifest.json").unlink()
    if manifest is not None:
        (folder / "step-4" / "manifest.json").write_text(manifest)
    expected = f"{folder / 'step-4'}: not a complete checkpoint of this program .manifest.json"
    with pytest.raises(ValueError, match=expected):
        inspect_checkpoint(folder / "step-4")
    assert newest_checkpoint(folder, lambda _: None)[0] == folder / "step-2"


@pytest.mark.parametrize("spec, named", [
    (dict(vocab_size=VOCAB + 1), "embed_tokens"), (dict(intermediate_size=64), "gate_proj"),
    (dict(num_hidden_layers=1), "number of parameters"), (dict(kind="Llama"), "number of parameters")],
    ids=lambda s: str(s))
def test_a_checkpoint_of_another_model_is_refused_and_the_policy_left_alone(
        tmp_path, mesh, checkpoints, spec, named):
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
    assert path == folder / "step-6" and "junk" not in manifest["files"]
    assert names(folder) == ["step-2", "step-6"]


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


@pytest.mark.parametrize("put", [
    lambda step: (step / ".ipynb_checkpoints").mkdir(), lambda step: (step / "__1_0.distcp").mkdir(),
    lambda step: os.mkfifo(step / "pipe"), lambda step: (step / "link").symlink_to("nowhere"),
    lambda step: (step / "notes.txt").write_text("mine")], ids=["folder", "shard", "pipe", "link", "file"])
def test_what_others_put_into_a_checkpoint_does_not_spoil_it(checkpoints, put):
    folder, policy, optimizer = checkpoints
    put(folder / "step-4")
    path, manifest = newest_checkpoint(folder, pytest.fail)
    assert path == folder / "step-4" and load_checkpoint(path, manifest, policy, optimizer)["step"] == 4


def test_a_checkpoint_under_another_ones_name_is_passed_over(checkpoints):
    """Every resume would begin there anew, whatever was saved since."""
    folder, *training = checkpoints
    (folder / "step-2").rename(folder / "step-20")
    said = []
    assert newest_checkpoint(folder, said.append)[0] == folder / "step-4"
    assert "step-20: holds step 2; give it back its name, step-2" in said[0]
    (folder / "step-20").rename(folder / "mine")                    # no number, so it is a person's own
    assert inspect_checkpoint(folder / "mine")["state"]["step"] == 2


def test_a_name_whose_number_is_none_is_no_checkpoint(checkpoints):
    folder, *training = checkpoints
    for name in ("step-²", "step-٣x", "step-", "step--1", "step-1.5"):
        (folder / name).mkdir()
    assert newest_checkpoint(folder, pytest.fail)[0] == folder / "step-4"


def test_a_link_to_a_checkpoint_elsewhere_is_removed_as_a_link(tmp_path, checkpoints):
    folder, *training = checkpoints
    for step in (2, 4):
        (folder / f"step-{step}").rename(tmp_path / f"moved-{step}")
        (folder / f"step-{step}").symlink_to(tmp_path / f"moved-{step}")
    assert newest_checkpoint(folder, pytest.fail)[0] == folder / "step-4"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint(folder, *training, {"step": 4}, keep=1)
    assert names(folder) == ["step-4"] and not (folder / "step-4").is_symlink()
    assert inspect_checkpoint(tmp_path / "moved-2") and inspect_checkpoint(tmp_path / "moved-4")


@pytest.mark.parametrize("there", ["a file", "a link to nothing"])
def test_what_stands_in_the_place_of_a_checkpoint_and_is_none_gives_way(checkpoints, there):
    folder, *training = checkpoints
    if there == "a file":
        (folder / "step-6").write_text("")
    else:
        (folder / "step-6").symlink_to("nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_checkpoint(folder, *training, {"step": 6}, keep=1)
    assert names(folder) == ["step-6"] and newest_checkpoint(folder)[0] == folder / "step-6"


def test_the_checkpoint_just_written_is_kept_though_a_broken_one_has_a_higher_number(checkpoints):
    folder, *training = checkpoints
    (folder / "step-4" / ".metadata").unlink()                 # resumed from step-2, saved at step 3
    save_checkpoint(folder, *training, {"step": 3}, keep=1)
    assert newest_checkpoint(folder, lambda _: None)[0] == folder / "step-3"
