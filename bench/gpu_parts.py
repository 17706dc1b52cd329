"""The parts of bench/gpu.py: each task is a function of (report, device), run in a process of its own."""
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import common

import model as M
import srft
from bench import plan
from config import TINY, Config
from support import logprobs
from support.device import memory_gb, peak_flops
from support.processes import init_distributed
from tiny.task import make_tokenizer

# ----------------------------------------------------------------------------------------------------------
# Sizes: those of a GPU, and small ones, which a CPU takes in seconds.

@dataclass(frozen=True)
class Sizes:
    wide: dict                    # what differs from the config of the paper's 7B model
    tied: dict
    preset: dict                  # config of --preset one_gpu's model, as a Llama
    lengths: tuple                # attention: tokens of each sequence of the pack
    head: tuple                   # (N, chunk): the chunk does not divide N
    seeds: int                    # packs of random sequences
    batch: dict                   # limits of a full micro-batch, as fields of Config
    mfu: tuple                    # packed tokens
    prompts: tuple                # (prompts, samples of each)
    tokens: int                   # of a response
    decode: tuple                 # sequences at once


GPU = Sizes(
    wide=dict(num_hidden_layers=4),
    tied=dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
              num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    preset=dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2, vocab_size=151936),
    lengths=(1, 7, 300, 8192), head=(300, 128), seeds=20, batch=dict(micro_batch_tokens=16384),
    mfu=(8192, 16384), prompts=(16, 4), tokens=512, decode=(128, 256))
CPU = Sizes(
    wide=dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=515),
    tied=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, vocab_size=259, tie_word_embeddings=True),
    preset=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, vocab_size=259),
    lengths=(1, 7, 30, 64), head=(30, 8), seeds=2,
    batch=dict(max_prompt_tokens=16, max_response_tokens=48, micro_batch_tokens=128), mfu=(128, 256),
    prompts=(2, 2), tokens=16, decode=(2, 4))
HEADS = (28, 4, 128)              # query heads, key and value heads, head width: those of the 7B model
PROMPT = 64                       # tokens of a prompt of the engine
ENGINE_MEMORY = 0.4               # of the card, beside the trainer's 23 GB of weights and moments
# Bytes that an update of GPU.wide takes on one rank: what plan.simulate says, as a test makes sure.
PLANNED_PEAK = 46.53e9


def sizes(device):
    return GPU if device.type == "cuda" else CPU


def shape(device, name):
    """Config of the "wide" or the "tied" model, with App. B's theta and window; nothing ends a response."""
    fields = plan.DEFAULT_CONFIG | {"max_position_embeddings": 16384} | getattr(sizes(device), name)
    return Qwen2Config(**fields, rope_parameters={"rope_type": "default", "rope_theta": 40_000.0},
                       use_cache=False, bos_token_id=None, eos_token_id=None)


# ----------------------------------------------------------------------------------------------------------
# kernels

def kernels(report, device):
    """Attention, packing, matrix products and heads, each against another way to compute the same."""
    attention(report, device)
    no_sequences(report, device)
    products(report, device)
    heads(report, device)


def compare(function, reference, leaves, precise):
    """Relative errors, |x - exact| / |exact| in 2-norms, of what `function` returns and of the gradients of
    a random combination of it for each of `leaves`. exact: by `reference`, on the same numbers in `precise`.
    """
    combination = []

    def run(f, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        outputs = f(*leaves)
        if not combination:                    # by the first call, for both
            combination.extend(torch.randn_like(x) for x in outputs)
        weights = [g.to(x.dtype) for g, x in zip(combination, outputs)]
        grads = torch.autograd.grad(outputs, leaves, weights)
        return [x.detach().double() for x in (*outputs, *grads)]

    found = run(function, leaves)
    exact = run(reference, [x.to(precise) for x in leaves])
    return [((x - y).norm() / y.norm()).item() for x, y in zip(found, exact)]


def random_qkv(tokens, device):
    """Query, key, value in bf16, each (1, heads, tokens, d): views of (1, tokens, heads, d), as in models."""
    heads, kv_heads, width = HEADS
    return [torch.randn(1, tokens, n, width, device=device).bfloat16().transpose(1, 2)
            for n in (heads, kv_heads, kv_heads)]


def attention(report, device):
    """model.packed_attention in bf16 against SDPA's plain path in fp32, one sequence at a time."""
    heads, kv_heads, width = HEADS
    every = list(sizes(device).lengths)
    for lengths in [*([n] for n in every), every]:
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)

        def packed(*qkv):
            return M.packed_attention(None, *qkv, None, width**-0.5, cu_seq_lens_q=cu_seqlens,
                                      max_length_q=max(lengths))[:1]                     # (1, N, heads, d)

        def separate(*qkv):
            outs = []
            for q, k, v in zip(*(x.split(lengths, 2) for x in qkv)):
                # One group of query heads at a time: all scores of 8,192 tokens are 7.5 GB, several times.
                groups = zip(q.split(heads // kv_heads, 1), k.split(1, 1), v.split(1, 1))
                with sdpa_kernel(SDPBackend.MATH):
                    parts = [F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q),
                                                            is_causal=True) for q, k, v in groups]
                outs.append(torch.cat(parts, 1))
            return [torch.cat(outs, 2).transpose(1, 2)]

        what = f"packed attention, {heads}/{kv_heads} heads, {' + '.join(f'{n:,}' for n in lengths)} tokens"
        with report.attempt(what):
            errors = compare(packed, separate, random_qkv(sum(lengths), device), torch.float32)
            if max(lengths) == 1:              # the gradients of q and k are 0: nothing to divide an error by
                errors = [errors[0], errors[3]]
            report.below(f"{what}: output, dq, dk, dv, the worst", max(errors), 0.02, errors=errors)


def no_sequences(report, device):
    """What a rank without work attends to: one token, and that only to itself."""
    what = "packed attention, batch without sequences"
    with report.attempt(what):
        batch, (query, key, value) = M.collate([], device), random_qkv(1, device)
        out, _ = M.packed_attention(None, query, key, value, None, cu_seq_lens_q=batch.cu_seqlens,
                                    max_length_q=batch.max_seqlen)
        same = torch.equal(out, value.repeat_interleave(HEADS[0] // HEADS[1], 1).transpose(1, 2))
        report.add(what, "its value" if same else "something else", "its value", same)


def vocabularies(device):
    """(V, D) of the 7B model and of tiny/, whose 21 columns no kernel likes."""
    wide = shape(device, "wide")
    return (wide.vocab_size, wide.hidden_size), (21, 128)


def products(report, device):
    """The three branches of logprobs._addmm_fp32 against float64."""
    n = sizes(device).head[0]
    for vocab, width in vocabularies(device):
        a, b, out = (torch.randn(*x, device=device) for x in ((n, width), (vocab, width), (n, vocab)))
        # Tensor cores add up in fp32, but drop what does not fit instead of rounding: 1e-5 over 3,584 terms.
        # A product that is rounded to bf16 is 2e-3 off.
        for name, dtype, beta, limit in (("fp32", torch.float32, 1.0, 1e-5),
                                         ("bf16, added to", torch.bfloat16, 1.0, 1e-4),
                                         ("bf16, written over", torch.bfloat16, 0.0, 1e-4)):
            what = f"product {n} x {width:,} x {vocab:,}, {name}"
            with report.attempt(what):
                left, right, found = a.to(dtype), b.to(dtype).T, out.clone()
                logprobs._addmm_fp32(found, left, right, beta=beta, alpha=0.7)
                exact = beta * out.double() + 0.7 * (left.double() @ right.double())
                report.below(what, ((found - exact).norm() / exact.norm()).item(), limit)


def heads(report, device):
    """token_logprobs and token_kl in bf16 against log_softmax and autograd in float64."""
    n, chunk = sizes(device).head
    for vocab, width in vocabularies(device):
        targets = torch.randint(vocab, (n,), device=device)
        hidden, ref_hidden = (torch.randn(n, width, device=device).bfloat16() for _ in range(2))
        weight, ref_weight = (torch.randn(vocab, width, device=device).mul_(3 * width**-0.5).bfloat16()
                              for _ in range(2))

        def log_softmax(hidden, weight):
            return torch.log_softmax(hidden @ weight.T / 0.9, -1)

        def plain(hidden, weight):
            log_p = log_softmax(hidden, weight)
            return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

        def plain_logp(hidden, weight):
            return plain(hidden, weight)[:1]

        def plain_kl(hidden, weight):
            log_p, log_q = log_softmax(hidden, weight), log_softmax(ref_hidden.double(), ref_weight.double())
            return [(log_p.exp() * (log_p - log_q)).sum(-1)]

        def ours_logp(hidden, weight):
            return logprobs.token_logprobs(hidden, weight, targets, 0.9, chunk)[:1]

        def ours(hidden, weight):
            return logprobs.token_logprobs(hidden, weight, targets, 0.9, chunk, entropy_grad=True)

        def ours_kl(hidden, weight):
            return [logprobs.token_kl(hidden, weight, ref_hidden, ref_weight, 0.9, chunk)]

        for name, values, reference, function in (
                ("token_logprobs", 1, plain_logp, ours_logp),
                ("token_logprobs, entropy with gradient", 2, plain, ours),
                ("token_kl", 1, plain_kl, ours_kl)):
            what = f"{name}, {n} tokens in chunks of {chunk}, V = {vocab:,}, D = {width:,}"
            with report.attempt(what):
                errors = compare(function, reference, (hidden, weight), torch.float64)
                report.below(f"{what}: values", max(errors[:values]), 1e-5, errors=errors)
                # bf16 gradients are rounded to 8 bits, and so is what they are products of.
                report.below(f"{what}: gradients", max(errors[values:]), 0.01, errors=errors)


# ----------------------------------------------------------------------------------------------------------
# trainer, mfu, offload

def trainer(config, device, mesh, lr=1e-6, offload=False, weights=None):
    """What an update asks of a run, with the weights of the policy `weights`, or random ones."""
    policy = M.build_policy(config, mesh, device, offload=offload)
    with torch.no_grad():
        if weights:
            for p, source in zip(policy.parameters(), weights.parameters()):
                p.to_local().copy_(source.to_local())
        else:
            for name, p in policy.named_parameters():
                randomize(name, p.to_local())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=Config.weight_decay, fused=True)
    return SimpleNamespace(policy=policy, optimizer=optimizer, device=device)


def randomize(name, tensor):
    """Norms 1; matrices that keep the size of what they multiply, whatever the width: attention then matters
    as much as in a trained model, and so does an error in it."""
    if "norm" in name:
        return tensor.fill_(1.0)
    return tensor.normal_(0, tensor.shape[-1]**-0.5)


def full_micro_batch(cfg, vocabulary, seed=0):
    """The sequences of plan.full_micro_batch with random tokens: demonstrations and rollouts in turn."""
    rng, sequences = np.random.default_rng(seed), []
    for i, s in enumerate(plan.full_micro_batch(cfg)):
        prompt, response = (rng.integers(0, vocabulary, len(part)) for part in (s.prompt, s.response))
        demo = i % 2 == 0
        engine_logp = None if demo else np.full(len(response), -np.log(vocabulary))
        sequences.append(M.Sequence(prompt, response, is_demo=demo, group=i // 2, reward=float(i % 4 < 2),
                                    advantage=1.0, engine_logp=engine_logp))
    return sequences


def update(run, cfg, batches):
    """Metrics of one optimizer update by the paper's loss."""
    everything = [s for batch in batches for s in batch]
    return srft.update_policy(run.policy, run.optimizer, srft.srft_loss, everything, batches,
                              [{}] * len(batches), None, cfg, run.device)


def one_update(run, cfg, batches):
    """(metrics, seconds) of one optimizer update."""
    began = common.clock(run.device)
    metrics = update(run, cfg, batches)
    return metrics, common.clock(run.device) - began


def trained(report, device):
    """The trainer part: packing, one update's memory, and where it waits for the device."""
    _, _, device, mesh = init_distributed(device.type)
    config, cfg = shape(device, "wide"), Config(**sizes(device).batch)
    run = trainer(config, device, mesh)
    with report.attempt("7B widths"):
        packing(report, run.policy, "7B widths", config.vocab_size)
    batches = [full_micro_batch(cfg, config.vocab_size, seed) for seed in range(2)]
    with report.attempt("one update"):
        peak_of_update(report, run, cfg, batches)
    with report.attempt("synchronisations"):
        waits_of_update(report, run, cfg, batches)
    del run
    with report.attempt("tied"):
        config = shape(device, "tied")
        packing(report, trainer(config, device, mesh).policy, "tied", config.vocab_size)
    with report.attempt("tiny"):
        config = M.load_config(TINY)
        packing(report, M.load_policy(TINY, config, mesh, device), "tiny", config.vocab_size)


def peak_of_update(report, run, cfg, batches):
    """Memory of the second update beside the plan's: the first makes AdamW's moments, there as here."""
    one_update(run, cfg, batches)
    torch.cuda.empty_cache()
    with common.PeakMemory(run.device) as memory:
        metrics, seconds = one_update(run, cfg, batches)
    numbers = [x for x in metrics.values() if x is not None]
    finite = bool(np.isfinite(numbers).all())
    report.add("one update: gradient norm", f"{metrics['grad_norm']:.3g}", "all metrics finite", finite,
               metrics=metrics, seconds=seconds)
    peak = memory.before_gb + memory.gb
    near, ok = "", None                                # on a CPU it is all that Python and torch hold
    if run.device.type == "cuda":
        near = f"{PLANNED_PEAK / 1e9:.1f} GB, the plan's, +- 10 %"
        ok = abs(peak / PLANNED_PEAK * 1e9 - 1) < 0.1
    report.add("its measured peak", f"{peak:.2f} GB", near, ok, number=peak)
    torch.cuda.empty_cache()
    if run.device.type == "cuda":                      # what the moments pin: see srft.update_policy
        pinned = (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 1e9
        report.add("after it, free in blocks that are in use", f"{pinned:.2f} GB", "under 1 GB", pinned < 1,
                   number=pinned)


def waits_of_update(report, run, cfg, batches):
    """Where an update makes the host wait. Untimed, since a clock would wait, too."""
    with synchronisations(run.device) as places:
        update(run, cfg, batches)
    what = f"synchronisations of an update of {len(batches)} micro-batches"
    if run.device.type == "cpu":
        return report.add(what, "-")
    where = ", ".join(f"{place} x {n}" for place, n in places.most_common())
    report.add(what, f"{places.total()}; {where}", "a read for each, and the gradient's norm",
               places.total() <= len(batches) + 1, number=places.total(), places=dict(places))


@torch.no_grad()
def packing(report, policy, name, vocabulary):
    """check_packing as it stands, then how far such differences reach over many packs."""
    device, found = next(policy.parameters()).device, {"packed": [], "sdpa": []}
    with report.attempt(f"{name}: check_packing"):
        M.check_packing(policy, device, vocabulary)
        report.add(f"{name}: check_packing", "passes", "passes", True)
    for seed in range(sizes(device).seeds):
        rng, sequences = np.random.default_rng(seed), []
        for i in range(3):
            prompt, response = (rng.integers(0, vocabulary, n) for n in (3 + i, 64 + 4 * i))
            sequences.append(M.Sequence(prompt, response))
        packed = policy(M.collate(sequences, device))[0]
        for kind, errors in found.items():
            policy.lm.set_attn_implementation(kind)
            alone = [policy(M.collate([s], device))[0][0] for s in sequences]
            errors += [(row[:len(a)] - a).abs().mean().item() for row, a in zip(packed, alone)]
        policy.lm.set_attn_implementation("packed")
    policy.reshard()
    for kind, errors in found.items():
        what = f"{name}: {len(errors)} packed sequences beside each alone ({kind}), mean and worst"
        report.add(what, f"{statistics.mean(errors):.2g}, {max(errors):.2g} nats a token", errors=errors)


@contextmanager
def synchronisations(device):
    """Counter of the places where the processor waits for the GPU, file:line -> times; empty on a CPU."""
    places = Counter()
    if device.type != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught
                  if "called a synchronizing CUDA operation" in str(w.message))


def mfu(report, device):
    """Forward and backward as srft.py runs them, AdamW left out. Against the 7B model's 28 layers, the head
    weighs seven times as much here."""
    _, _, device, mesh = init_distributed(device.type)
    config = shape(device, "wide")
    run = trainer(config, device, mesh)
    parameters, peak = sum(p.numel() for p in run.policy.parameters()), None
    if device.type == "cuda":
        _, peak = peak_flops(torch.cuda.get_device_name(device))
    blocks = run.policy.lm.base_model.layers
    for recomputed in (len(blocks), len(blocks) // 2, 0):
        for i, block in enumerate(blocks):                     # as build_policy does it
            block.gradient_checkpointing = i < recomputed
        for tokens in sizes(device).mfu:
            length = min(2048, tokens // 4)                    # of each sequence; an eighth of it is prompt
            cfg = Config(max_prompt_tokens=length // 4, max_response_tokens=length - length // 8,
                         micro_batch_tokens=tokens)
            sequences = full_micro_batch(cfg, config.vocab_size)
            flops = M.forward_backward_flops(config, parameters, sequences)
            what = f"{tokens:,} tokens, {recomputed} of {len(blocks)} blocks recomputed"
            with report.attempt(what):
                with common.PeakMemory(device) as memory:
                    seconds = [forward_backward(run, cfg, sequences) for _ in range(4)][1:]
                took = statistics.median(seconds)
                share = f"{flops / took / peak:.1%}" if peak else "-"
                report.add(what, f"MFU {share}, {tokens / took:,.0f} tokens/s, {memory.gb:.1f} GB "
                           "with gradients", number=flops / took, seconds=seconds, gb=memory.gb)
            run.optimizer.zero_grad(set_to_none=True)


def forward_backward(run, cfg, sequences):
    """Seconds of one micro-batch; its gradients stay."""
    n_demo = sum(s.is_demo for s in sequences)
    began = common.clock(run.device)
    srft.backward(srft.srft_loss, run.policy, [sequences], [{}], n_demo, len(sequences) - n_demo, None, cfg,
                  run.device)
    return common.clock(run.device) - began


def offload(report, device):
    """The same update of the same weights, on the GPU and offloaded. AdamW's first step moves each weight by
    lr along the sign of its gradient: where that is noise, the two may end 2 lr apart."""
    _, _, device, mesh = init_distributed(device.type)
    config, cfg = shape(device, "wide"), Config(**sizes(device).batch, lr=1e-4)
    here, norms = trainer(config, device, mesh, cfg.lr), {}
    with report.attempt("one update with --offload"):
        there = trainer(config, device, mesh, cfg.lr, offload=True, weights=here.policy)
        batches = [full_micro_batch(cfg, config.vocab_size)]
        for name, run in (("without", here), ("with", there)):
            with common.PeakMemory(device) as memory:
                metrics, seconds = one_update(run, cfg, batches)
            norms[name] = metrics["grad_norm"]
            report.add(f"first update {name} --offload", f"{seconds:.2f} s, {memory.gb:.1f} GB on top",
                       seconds=seconds, gb=memory.gb)
        report.below("gradient norms, relative difference", abs(norms["with"] / norms["without"] - 1), 1e-3)
        apart = [(b.detach().to_local().to(device) - a.detach().to_local()).abs().div_(cfg.lr)
                 for a, b in zip(here.policy.parameters(), there.policy.parameters())]
        mean = sum(x.double().sum().item() for x in apart) / sum(x.numel() for x in apart)
        report.below("updated weights, mean difference in units of lr", mean, 0.05,
                     worst=max(x.max().item() for x in apart))
        _, seconds = one_update(there, cfg, batches)
        report.add("second update with --offload, memory pinned and moments there", f"{seconds:.2f} s",
                   seconds=seconds)


# ----------------------------------------------------------------------------------------------------------
# engine, warm, decode

def start_engine(config, device):
    """(engine without weights, seconds), as srft.setup starts one; vLLM has been imported before.

    Every part asks for the same engine, so that vLLM's compile cache can know it again.
    """
    from rollout import RolloutEngine, check_environment
    check_environment(device)
    began = common.clock(device)
    engine = RolloutEngine(config, make_tokenizer(), M.compute_dtype(device), PROMPT + sizes(device).tokens,
                           max(sizes(device).decode), ENGINE_MEMORY, device.type == "cpu", seed=0)
    return engine, common.clock(device) - began


def random_prompts(config, count):
    return np.random.default_rng(0).integers(0, config.vocab_size, (count, PROMPT)).tolist()


def wide_engine(report, device):
    colocated(report, device, "wide", "7B widths")


def tied_engine(report, device):
    colocated(report, device, "tied", "tied")


def colocated(report, device, kind, name):
    """Engine and trainer in one process: their log-probs, and what sleep and sync must leave as it was."""
    _, _, device, mesh = init_distributed(device.type)
    config, (prompts, group), tokens = shape(device, kind), sizes(device).prompts, sizes(device).tokens
    cfg = Config(micro_batch_tokens=max(2 * (PROMPT + tokens), 16384 if device.type == "cuda" else 0))
    run, ids = trainer(config, device, mesh, lr=0.0), random_prompts(config, prompts)
    engine, seconds = start_engine(config, device)
    report.add(f"{name}: start", f"{seconds:.1f} s", number=seconds)

    def sync(version):
        began = common.clock(device)
        engine.sync_weights(M.full_parameters(run.policy, M.compute_dtype(device)), version)
        return common.clock(device) - began

    def sample():
        return engine.generate(ids, group, 1.0, tokens, seed=1)

    first_sync, began = sync(0), common.clock(device)
    first = sample()
    seconds = common.clock(device) - began
    report.add(f"{name}: first sync; first {prompts * group} x {tokens} tokens",
               f"{first_sync:.2f} s; {seconds:.1f} s", sync=first_sync, generate=seconds)
    with report.attempt(f"{name}: the same seeds again"):      # what differs here is the kernels' own noise
        engine.llm.reset_prefix_cache()
        same_tokens(report, f"{name}: the same seeds again, before any sleep", first, sample())
    for version in (1, 2):
        with report.attempt(f"{name}: sleep {version}"):
            awake = memory_gb(device)
            engine.sleep()
            freed = awake - memory_gb(device)
            metrics = learn_nothing(run, cfg, ids, first)
            seconds = sync(version)
            report.add(f"{name}: sleep {version} frees; sync then takes",
                       f"{freed:.1f} of {awake:.1f} GB; {seconds:.2f} s", freed=freed, seconds=seconds)
            if version == 1:
                mismatch(report, f"{name}, the product's head", metrics, device)
            same_tokens(report, f"{name}: the same seeds after sync {version}", first, sample())
    if device.type == "cuda" and kind == "wide":               # on a CPU the head is in fp32, and repacked
        for dtype in (torch.bfloat16, torch.float32):
            with report.attempt(f"{name}, a head in {dtype}"), head_in(dtype):
                groups = sample()
                engine.sleep()
                metrics = learn_nothing(run, cfg, ids, groups)
                mismatch(report, f"{name}, a head in {dtype}", metrics, device)
                sync(3)


def learn_nothing(run, cfg, ids, groups):
    """Metrics of an update at lr 0 on the engine's samples: they say how far engine and trainer are apart."""
    sequences = []
    for g, (prompt, rollouts) in enumerate(zip(ids, groups)):
        for k, r in enumerate(rollouts):
            sequences.append(M.Sequence(prompt, r.tokens, group=g, reward=float(k % 2),
                                        engine_logp=r.logprobs))
    return one_update(run, cfg, M.pack(sequences, cfg.micro_batch_tokens))[0]


def mismatch(report, what, metrics, device):
    """On a GPU the mean may be what srft.py's own check, at every step, does not warn of."""
    mean, worst = metrics["engine/logp_diff_mean"], metrics["engine/logp_diff_max"]
    limit = 0.05 if device.type == "cuda" else 1e-4
    what = f"{what}: log p of engine less trainer's, mean and worst size"
    report.add(what, f"{mean:.2g}, {worst:.2g} nats", f"mean below {limit:g}", mean < limit, number=mean,
               worst=worst)


def same_tokens(report, what, first, again):
    """Equal tokens, and equal log-probs as far as the tokens of a response are equal."""
    pairs = [pair for group, its_like in zip(first, again) for pair in zip(group, its_like)]
    equal, apart = sum(a.tokens == b.tokens for a, b in pairs), []
    for a, b in pairs:
        for x, y, log_p, log_q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs):
            if x != y:
                break
            apart.append(abs(log_p - log_q))
    worst = max(apart, default=float("nan"))
    report.add(what, f"{equal} of {len(pairs)} responses equal, log-probs within {worst:.2g}",
               "all, within 0", equal == len(pairs) and worst == 0, equal=equal, worst=worst)


@contextmanager
def head_in(dtype):
    """Inside, vLLM's logits are fp32 sums rounded to `dtype`, whatever the engine was started with.

    For this measurement alone, as no flag of the product chooses the head, this replaces a private method of
    vLLM. The head runs behind the compiled and captured part of the model, so the patch does reach it.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def logits(self, hidden, head, *_, **__):
        out = hidden.new_empty(len(hidden), len(head.weight), dtype=torch.float32)
        logprobs._addmm_fp32(out, hidden, head.weight.T, beta=0)
        return out.to(dtype)[:, :self.org_vocab_size]

    with mock.patch.object(LogitsProcessor, "_get_logits", logits):
        yield


def random_tensors(config, device):
    """(name, tensor) of a whole model, for an engine without a trainer."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    for name, p in lm.named_parameters():
        yield name, randomize(name, torch.empty(p.shape, dtype=M.compute_dtype(device), device=device))


def engine_alone(device):
    """(engine with random weights, its config, seconds that its start took)."""
    init_distributed(device.type)
    config = shape(device, "wide")
    engine, seconds = start_engine(config, device)
    engine.sync_weights(random_tensors(config, device), 0)
    return engine, config, seconds


def warm(report, device):
    """A start in another process, beside the first one of the part `engine`, if this folder knows it."""
    *_, seconds = engine_alone(device)
    first = report.number("engine", "7B widths: start")
    beside = f"; the first took {first:.1f} s" if first else ""
    report.add("7B widths: another start", f"{seconds:.1f} s{beside}", number=seconds)


def decode(report, device):
    """The decode part: tokens a second at several numbers of sequences."""
    tokens, (engine, config, seconds) = sizes(device).tokens, engine_alone(device)
    report.add("7B widths: start", f"{seconds:.1f} s", number=seconds)
    engine.generate(random_prompts(config, 2), 1, 1.0, 8, seed=0)                      # the first is slow
    for count in sizes(device).decode:
        what = f"{count} sequences of {PROMPT} + {tokens} tokens, {config.num_hidden_layers} layers"
        with report.attempt(what):
            began = common.clock(device)
            groups = engine.generate(random_prompts(config, count), 1, 1.0, tokens, seed=0)
            took = common.clock(device) - began
            rate = sum(len(r.tokens) for rollouts in groups for r in rollouts) / took
            report.add(what, f"{rate:,.0f} tokens/s, {1e3 * took / tokens:.1f} ms a step", number=rate)


# ----------------------------------------------------------------------------------------------------------
# end-to-end

def end_to_end(report, device):
    """The command lines, as a user types them."""
    flags = ["--preset", "tiny", "--prompts_per_step", "8", "--n_rollouts", "4", "--save_every", "2",
             "--eval_data", "", "--grader_workers", "1", "--device", device.type]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for what, last, more in (("2 steps", 2, []), ("--resume, 2 more", 4, ["--resume"])):
            with report.attempt(f"srft.py: {what}"):
                seconds = command(report, "srft.py", *flags, *more, "--steps", str(last), "--out", str(out))
                last_step(report, f"srft.py: {what}", out / "metrics.jsonl", last, seconds, device)
        with report.attempt("eval.py"):
            seconds = command(report, "eval.py", "--model", str(out), "--benchmarks", "tiny:heldout",
                              "--limit", "16", "--template", "none", "--max_tokens", "160",
                              "--grader_workers", "1", "--device", device.type)
            count = len((out / "eval" / "results.jsonl").read_text().splitlines())
            report.add("eval.py on it", f"{count} responses, {seconds:.1f} s", "16 responses", count == 16,
                       seconds=seconds)


def one_gpu(report, device):
    """--preset one_gpu on random weights of its model's shape. They hardly ever end a response: it is cut."""
    tokens, prompts = 2 * sizes(device).tokens, sizes(device).prompts[0]
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), device)
        out = Path(folder) / "run"
        seconds = command(report, "srft.py", "--preset", "one_gpu", "--model", folder, "--data", "tiny:train",
                          "--eval_data", "", "--template", "none", "--steps", "2", "--save_every", "2",
                          "--prompts_per_step", str(prompts), "--max_prompt_tokens", "48",
                          "--max_response_tokens", str(tokens), "--window", str(48 + tokens),
                          "--grader_workers", "1", "--device", device.type, "--out", str(out))
        row = last_step(report, "srft.py --preset one_gpu", out / "metrics.jsonl", 2, seconds, device)
        took = ", ".join(f"{name} {row[f'time/{name}']:.1f}" for name in ("rollout", "train", "sync", "step"))
        share = f"{row['perf/mfu']:.1%}" if row["perf/mfu"] else "-"
        report.add(f"its second step, {prompts} prompts x 8 x {tokens:,} tokens", f"{took} s; MFU {share}; "
                   f"{row['perf/peak_memory_gb']:.1f} GB at most", number=row["time/step"], metrics=row)


def random_model(folder, device):
    """A model of the preset's shape, tied, with tiny/'s tokenizer. A Llama: for a Qwen2, transformers would
    take that family's own tokenizer."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(**sizes(device).preset, tie_word_embeddings=True, max_position_embeddings=16384,
                         rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command(report, *args):
    """Seconds of `python ARGS`, whose output goes to a log in DIR. RuntimeError with its last words."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, *args], cwd=common.ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    with (report.folder / f"{args[0]}.log").open("a") as log:
        log.write(done.stdout)
    if done.returncode:
        print(done.stdout[-4000:], flush=True)
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout.strip()[-250:]}")
    return time.monotonic() - began


def last_step(report, what, path, step, seconds, device):
    """The step asked for, finite numbers, an engine that agrees with the trainer. -> its row of metrics."""
    row = json.loads(path.read_text().splitlines()[-1])
    names = ["reward/mean", "grad_norm", "engine/logp_diff_mean", "engine/logp_diff_max"]
    # metrics.jsonl has null for what is not finite; as a float it is nan.
    numbers = np.array([row[name] for name in names], float)
    reward, norm, mean, _ = numbers.tolist()
    finite = bool(np.isfinite(numbers).all())
    report.add(what, f"step {row['step']}, reward {reward:.2f}, gradient norm {norm:.2g}, {seconds:.1f} s",
               f"step {step}, finite", finite and row["step"] == step and not row["steps_skipped"],
               metrics=row)
    report.below(f"{what}: log p of engine less trainer's, mean size", mean,
                 0.05 if device.type == "cuda" else 1e-3, worst=row["engine/logp_diff_max"])
    return row
