"""The CUDA path on one GPU: does each piece of it work, is it right, what does it cost?

    python bench/gpu.py --out out/gpu                     # all parts, about 8 minutes on an H100
    python bench/gpu.py kernels trainer --out out/gpu     # these alone; the first four need no vLLM
    python bench/gpu.py table --out out/gpu               # gpu.md anew, from the JSON files gathered in --out

  kernels     packed attention against fp32, products with fp32 output, head and KL against float64
  trainer     packed against separate forwards, memory against the plan, synchronisations a micro-batch
  mfu         forward and backward at two sizes of micro-batch, with recomputation and without
  offload     one update with --offload beside the same one without
  engine      start, log-probs beside the trainer's, twice sleep - update - sync - the same tokens again
  warm        start once more, in another process: what the compile cache saves
  end-to-end  srft.py --preset tiny, then --resume, then eval.py
  decode      tokens a second

No hub and no weights on disk: random weights in the widths of Qwen2.5-7B, 4 layers deep, and in the shape of
Qwen2.5-0.5B, whose head is tied; end-to-end trains tiny/. Without a GPU, or with --device cpu, the same parts
run on small shapes and CPU kernels: that proves this script, and nothing of CUDA.

Each part has a time limit and processes of its own. Every row goes to OUT/PART.json and OUT/gpu.md as soon as
it is known, so whatever is killed keeps what it had. A check that fails is a row FAIL, the rest goes on, and
the exit code is 1.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Qwen2Config

import model as M
import plan
import srft
import update
from config import TINY, Config
from data import tiny_tokenizer
from processes import init_distributed, memory_gb


# ----------------------------------------------------------------------------------------------------------------
# Sizes: of a GPU, and small ones that a CPU takes in seconds.

@dataclass(frozen=True)
class Sizes:
    wide: dict                    # what differs from the paper's model
    tied: dict
    lengths: tuple                # attention: tokens of each sequence in the pack
    head: tuple                   # (N, chunk): the chunk does not divide N
    seeds: int                    # packs of random sequences
    batch: dict                   # limits of a full micro-batch, as flags of Config
    mfu: tuple                    # packed tokens
    prompts: tuple                # (prompts, samples of each)
    tokens: int                   # of a response
    decode: tuple                 # sequences at once


GPU = Sizes(
    wide=dict(num_hidden_layers=4),
    tied=dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
              num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    lengths=(1, 7, 300, 8192), head=(300, 128), seeds=20, batch=dict(), mfu=(8192, 16384), prompts=(16, 4),
    tokens=512, decode=(128, 256))
CPU = Sizes(
    wide=dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=515),
    tied=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, vocab_size=259, tie_word_embeddings=True),
    lengths=(1, 7, 30, 64), head=(30, 8), seeds=2,
    batch=dict(max_prompt_tokens=16, max_response_tokens=48, micro_batch_tokens=128), mfu=(128, 256),
    prompts=(2, 2), tokens=16, decode=(2, 4))
HEADS = (28, 4, 128)              # query heads, key and value heads, width: those of the 7B model, on a CPU, too
PROMPT = 64                       # tokens of a prompt for the engine


def sizes(device):
    return GPU if device.type == "cuda" else CPU


def shape(device, name):
    """Config of the "wide" or the "tied" model, with App. B's theta and window."""
    return Qwen2Config(**plan.DEFAULT_CONFIG | {"max_position_embeddings": 16384} | getattr(sizes(device), name),
                       rope_parameters={"rope_type": "default", "rope_theta": 40_000.0}, use_cache=False,
                       bos_token_id=None, eos_token_id=None)


# ----------------------------------------------------------------------------------------------------------------
# Rows.

class Report:
    """The rows of one part. Each is in OUT/PART.json and OUT/gpu.md from the moment it is known."""

    def __init__(self, folder, part, machine=None):
        self.folder, self.part, self.path = Path(folder), part, Path(folder) / f"{part}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {"machine": machine, "rows": []}
        self.rows, self.machine = known["rows"], machine or known["machine"]

    def add(self, what, found, expected="", ok=None, **numbers):
        """One row. ok: True, False, or None for a figure of which nothing is expected."""
        self.rows.append({"what": what, "found": found, "expected": expected, "ok": ok} | numbers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"part": self.part, "machine": self.machine, "rows": self.rows}, indent=1))
        write_whole(self.folder / "gpu.md", markdown(self.folder))
        print(f"{self.part:<12}{verdict(ok):<6}{what}: {found}" + f" ({expected})" * bool(expected), flush=True)

    def below(self, what, error, limit, **numbers):
        """A row that is right if error < limit; nan is not."""
        self.add(what, f"{error:.2g}", f"below {limit:g}", bool(error < limit), error=error, **numbers)

    @contextmanager
    def attempt(self, what):
        """An exception inside becomes a row FAIL, and what follows goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", ok=False)

    def number(self, what):
        """What an earlier process of this part measured; None if it did not."""
        return next((row["number"] for row in self.rows if row["what"] == what), None)


def write_whole(path, text):
    """At once: who kills this process finds the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def verdict(ok):
    return {True: "ok", False: "FAIL", None: "-"}[ok]


def markdown(folder):
    """The table of all parts whose JSON files lie in `folder`, in the order of PARTS."""
    files = [Path(folder) / f"{part}.json" for part in PARTS]
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = [[part["part"], row["what"], row["found"], row["expected"], verdict(row["ok"])]
            for part in parts for row in part["rows"]]
    machines = {describe(part["machine"]) for part in parts if part["machine"]}
    return "\n".join([*sorted(machines), "", common.table(["part", "what", "found", "expected", ""], rows), ""])


def describe(machine):
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (f"{machine['gpu'] or machine['cpu']}; Python {machine['python']}, {versions}; "
            f"commit {(machine['git_commit'] or 'unknown')[:10]}.")


def gpu():
    """Name, driver, memory of the card; None without one."""
    if not torch.cuda.is_available():
        return None
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, check=True, text=True, capture_output=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return torch.cuda.get_device_name()


# ----------------------------------------------------------------------------------------------------------------
# kernels

def compare(function, reference, leaves, precise):
    """Relative errors, |x - exact| / |exact| (2-norms), of what `function` returns and of the gradients of a
    random combination of it, one for each of `leaves`; exact: by `reference` on the same numbers in `precise`."""
    combination = []

    def run(f, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        outputs = f(*leaves)
        if not combination:
            combination.extend(torch.randn_like(x) for x in outputs)
        grads = torch.autograd.grad(outputs, leaves, [g.to(x.dtype) for g, x in zip(combination, outputs)])
        return [x.detach() for x in (*outputs, *grads)]

    found = run(function, leaves)
    exact = run(reference, [x.to(precise) for x in leaves])
    return [((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in zip(found, exact)]


def kernels(report, device):
    attention(report, device)
    products(report, device)
    heads(report, device)


def attention(report, device):
    """model.packed_attention in bf16, as the model calls it, against SDPA's plain fp32 path, sequence by sequence."""
    heads, kv_heads, width = HEADS
    lengths = sizes(device).lengths
    for lengths in [*([n] for n in lengths), lengths]:
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)

        def packed(*qkv):                                                        # each (1, heads, N, d)
            return M.packed_attention(None, *qkv, None, width**-0.5, cu_seq_lens_q=cu_seqlens,
                                      max_length_q=max(lengths))[:1]

        def separate(query, key, value):
            outs = []
            for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value))):
                # One group of query heads at a time: all scores of 8,192 tokens would be 7.5 GB, several times.
                groups = zip(q.split(heads // kv_heads, 1), k.split(1, 1), v.split(1, 1))
                with sdpa_kernel(SDPBackend.MATH):
                    outs.append(torch.cat([F.scaled_dot_product_attention(
                        q, k.expand_as(q), v.expand_as(q), is_causal=True) for q, k, v in groups], 1))
            return [torch.cat(outs, 2).transpose(1, 2)]

        what = f"packed attention, {heads}/{kv_heads} heads, tokens {', '.join(f'{n:,}' for n in lengths)}"
        with report.attempt(what):
            qkv = [torch.randn(1, n, sum(lengths), width, device=device).bfloat16()
                   for n in (heads, kv_heads, kv_heads)]
            errors = compare(packed, separate, qkv, torch.float32)
            # The gradients of q and k are exactly 0 where a sequence has one token: nothing to divide by.
            errors = errors if max(lengths) > 1 else errors[::3]
            report.below(f"{what}: worst of output, dq, dk, dv", max(errors), 0.02, errors=errors)
    with report.attempt("packed attention, the batch without sequences"):
        batch = M.collate([], device)
        query, key, value = (torch.randn(1, n, 1, width, device=device).bfloat16() for n in (heads, kv_heads, kv_heads))
        out, _ = M.packed_attention(None, query, key, value, None, cu_seq_lens_q=batch.cu_seqlens,
                                    max_length_q=batch.max_seqlen)
        same = torch.equal(out, value.repeat_interleave(heads // kv_heads, 1).transpose(1, 2))
        report.add("packed attention, the batch without sequences", "its value" if same else "something else",
                   "its value", same)


def products(report, device):
    """The three branches of model._addmm_fp32, at the widths of the 7B model and of tiny/ (21 tokens, an odd pitch)."""
    wide = shape(device, "wide")
    for vocab, width in ((wide.vocab_size, wide.hidden_size), (21, 128)):
        n = sizes(device).head[0]
        a, b, out = (torch.randn(*size, device=device) for size in ((n, width), (width, vocab), (n, vocab)))
        for name, dtype, beta in (("fp32", torch.float32, 1.0), ("bf16, added to", torch.bfloat16, 1.0),
                                  ("bf16, written over", torch.bfloat16, 0.0)):
            what = f"{n} x {width:,} by {width:,} x {vocab:,}, {name}"
            with report.attempt(what):
                left, right, found = a.to(dtype), b.to(dtype), out.clone()
                M._addmm_fp32(found, left, right, beta=beta, alpha=0.7)
                exact = beta * out.double() + 0.7 * (left.double() @ right.double())
                report.below(what, ((found - exact).norm() / exact.norm()).item(), 1e-5)


def heads(report, device):
    """token_logprobs and token_kl in bf16 against plain float64, by log_softmax and autograd."""
    n, chunk = sizes(device).head
    wide = shape(device, "wide")
    for vocab, width in ((wide.vocab_size, wide.hidden_size), (21, 128)):
        targets = torch.randint(vocab, (n,), device=device)
        hidden, ref_hidden = (torch.randn(n, width, device=device).bfloat16() for _ in range(2))
        weight, ref_weight = (3 * torch.randn(vocab, width, device=device).div_(width**0.5).bfloat16() for _ in range(2))

        def plain(hidden, weight):
            log_p = torch.log_softmax(hidden @ weight.T / 0.9, -1)
            return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

        def plain_kl(hidden, weight):
            log_p = torch.log_softmax(hidden @ weight.T / 0.9, -1)
            log_q = torch.log_softmax(ref_hidden.double() @ ref_weight.double().T / 0.9, -1)
            return [(log_p.exp() * (log_p - log_q)).sum(-1)]

        cases = (
            ("token_logprobs", lambda *x: M.token_logprobs(*x, targets, 0.9, chunk)[:1], lambda *x: plain(*x)[:1], 1),
            ("token_logprobs, entropy with gradient",
             lambda *x: M.token_logprobs(*x, targets, 0.9, chunk, entropy_grad=True), plain, 2),
            ("token_kl", lambda *x: [M.token_kl(*x, ref_hidden, ref_weight, 0.9, chunk)], plain_kl, 1))
        for name, ours, reference, values in cases:
            what = f"{name}, {n} tokens of V = {vocab:,}, D = {width:,}, chunk {chunk}"
            with report.attempt(what):
                errors = compare(ours, reference, (hidden, weight), torch.float64)
                report.below(f"{what}: values", max(errors[:values]), 1e-5, errors=errors)
                # bf16 gradients are rounded to 8 bits, and so is what they are products of.
                report.below(f"{what}: bf16 gradients", max(errors[values:]), 0.01, errors=errors)


# ----------------------------------------------------------------------------------------------------------------
# trainer, mfu, offload

def trainer(config, device, mesh, lr=1e-6, offload=False, weights=None):
    """What update.py asks of a run, with the weights of the policy `weights`, or random ones."""
    policy = M.build_policy(config, mesh, device, offload=offload)
    sources = weights.parameters() if weights else policy.parameters()
    with torch.no_grad():
        for (name, p), source in zip(policy.named_parameters(), sources):
            p.to_local().copy_(source.to_local()) if weights else randomize(name, p.to_local())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=Config.weight_decay, fused=True)
    return SimpleNamespace(policy=policy, reference=None, optimizer=optimizer, device=device,
                           objective=srft.OBJECTIVES["srft"])


def randomize(name, tensor):
    """As models start: matrices and biases of deviation 0.02, norms 1."""
    return tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)


def full_micro_batch(cfg, vocabulary, seed=0):
    """The sequences of plan.full_micro_batch with random tokens: demonstrations and rollouts in turn."""
    rng, sequences = np.random.default_rng(seed), []
    for i, s in enumerate(plan.full_micro_batch(cfg)):
        prompt, response = rng.integers(0, vocabulary, len(s.prompt)), rng.integers(0, vocabulary, len(s.response))
        engine_logp = None if i % 2 == 0 else np.full(len(response), -np.log(vocabulary))
        sequences.append(M.Sequence(prompt, response, is_demo=i % 2 == 0, group=i // 2, reward=float(i % 4 < 2),
                                    advantage=1.0, engine_logp=engine_logp))
    return sequences


def one_update(run, cfg, batches):
    """(metrics, seconds) of one optimizer update."""
    everything = [s for batch in batches for s in batch]
    began = common.clock(run.device)
    before = update.forward_before_update(run, cfg, batches)
    metrics = update.update_policy(run, cfg, batches, before, *update.counts(everything, cfg.loss_norm))
    return metrics, common.clock(run.device) - began


def planned(report, device):
    """The plan's peak for `trained` to measure. In a process of its own: the plan makes a group of fake ranks."""
    with report.attempt("planned peak"):
        found = plan.simulate(shape(device, "wide"), Config(**sizes(device).batch), world=1)
        report.add("planned peak, full micro-batches, 1 rank", f"{found['peak'] / 1e9:.2f} GB", number=found["peak"] / 1e9)


def trained(report, device):
    *_, mesh = init_distributed()
    config, cfg = shape(device, "wide"), Config(**sizes(device).batch)
    run = trainer(config, device, mesh)
    packing(report, run.policy, "7B widths", config.vocab_size)
    with report.attempt("one update"):
        batches = [full_micro_batch(cfg, config.vocab_size, seed) for seed in range(2)]
        one_update(run, cfg, batches)                              # makes AdamW's moments, as the plan's first step
        torch.cuda.empty_cache()
        with common.PeakMemory(device) as memory:
            metrics, seconds = one_update(run, cfg, batches)
        finite = bool(np.isfinite([x for x in metrics.values() if x is not None]).all())
        report.add("one update: gradient norm", f"{metrics['grad_norm']:.3g}", "all metrics finite", finite,
                   metrics=metrics, seconds=seconds)
        peak, expected = memory.before_gb + memory.gb, report.number("planned peak, full micro-batches, 1 rank")
        plans = expected and device.type == "cuda"                 # on a CPU, PeakMemory counts Python and torch, too
        report.add("measured peak of it", f"{peak:.2f} GB", f"{expected:.2f} +- 10 %" if plans else "",
                   abs(peak / expected - 1) < 0.1 if plans else None, number=peak)
    with report.attempt("synchronisations"):
        before = update.forward_before_update(run, cfg, batches)
        with synchronisations(device) as places:
            update.backward(run, cfg, batches, before, 2, 2)
        run.optimizer.zero_grad(set_to_none=True)
        where = ", ".join(f"{place} x {count}" for place, count in places.most_common())
        report.add("synchronisations a micro-batch", f"{places.total() / len(batches):g}: {where}"
                   if device.type == "cuda" else "-", number=places.total() / len(batches), places=dict(places))
    del run
    with report.attempt("packing, tied"):
        config = shape(device, "tied")
        packing(report, trainer(config, device, mesh).policy, "tied", config.vocab_size)
    with report.attempt("packing, tiny"):
        config = M.load_config(TINY)
        packing(report, M.load_policy(TINY, config, mesh, device), "tiny", config.vocab_size)
    torch.distributed.destroy_process_group()


@torch.no_grad()
def packing(report, policy, name, vocabulary):
    """check_packing as it stands, then how far its differences reach over many packs."""
    device, found = next(policy.parameters()).device, {"packed": [], "sdpa": []}
    with report.attempt(f"{name}: check_packing"):
        M.check_packing(policy, device, vocabulary)
        report.add(f"{name}: check_packing", "passes", "passes", True)
    for seed in range(sizes(device).seeds):
        rng = np.random.default_rng(seed)
        tokens = lambda n: rng.integers(0, vocabulary, n)
        sequences = [M.Sequence(tokens(3 + i), tokens(5 + 4 * i)) for i in range(3)]
        packed = policy(M.collate(sequences, device))[0]
        for attention, errors in found.items():
            policy.lm.set_attn_implementation(attention)
            alone = [policy(M.collate([s], device))[0][0] for s in sequences]
            errors += [(row[:len(a)] - a).abs().mean().item() for row, a in zip(packed, alone)]
        policy.lm.set_attn_implementation("packed")
    policy.reshard()
    for attention, errors in found.items():
        report.add(f"{name}: packed beside separate ({attention}), nats a token, mean and worst of "
                   f"{len(errors)} sequences", f"{statistics.mean(errors):.2g}, {max(errors):.2g}", errors=errors)


@contextmanager
def synchronisations(device):
    """Counter of the places where the processor waits for the GPU: file:line -> times. Empty on a CPU."""
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
    """Forward and backward of update.py, AdamW left out; the paper's depth has seven times the layers to one head."""
    *_, mesh = init_distributed()
    config, limits = shape(device, "wide"), sizes(device).batch
    run = trainer(config, device, mesh)
    parameters, peak = sum(p.numel() for p in run.policy.parameters()), M.peak_flops(device)
    for tokens in sizes(device).mfu:
        length = min(2048, tokens // 4)                                     # of each sequence, an eighth of it prompt
        cfg = Config(**limits | dict(max_prompt_tokens=length // 4, max_response_tokens=length - length // 8,
                                     micro_batch_tokens=tokens))
        sequences = full_micro_batch(cfg, config.vocab_size)
        flops = M.forward_backward_flops(config, parameters, sequences)
        for recompute in (True, False):
            what = f"{tokens:,} tokens, blocks {'recomputed' if recompute else 'kept'}"
            with report.attempt(what):
                if recompute:
                    run.policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
                else:
                    run.policy.lm.gradient_checkpointing_disable()
                with common.PeakMemory(device) as memory:
                    seconds = [forward_backward(run, cfg, sequences) for _ in range(4)][1:]
                took = statistics.median(seconds)
                share = f"MFU {flops / took / peak:.1%}, " if peak else ""
                report.add(what, f"{share}{sum(map(len, sequences)) / took:,.0f} tokens/s, {took:.3f} s, "
                           f"{memory.gb:.1f} GB above weights", number=flops / took, seconds=seconds)
            run.optimizer.zero_grad(set_to_none=True)
    torch.distributed.destroy_process_group()


def forward_backward(run, cfg, sequences):
    """Seconds of one micro-batch, gradients left in place."""
    before = update.forward_before_update(run, cfg, [sequences])
    began = common.clock(run.device)
    update.backward(run, cfg, [sequences], before, *update.counts(sequences, cfg.loss_norm))
    return common.clock(run.device) - began


def offload(report, device):
    """The same weights and the same update, on the GPU and offloaded. After one step from moments of 0, AdamW
    moves each weight by about lr, by the sign of its gradient: where that is noise, the two may differ by 2 lr."""
    *_, mesh = init_distributed()
    config, cfg = shape(device, "wide"), Config(**sizes(device).batch, lr=1e-4)
    here = trainer(config, device, mesh, cfg.lr)
    with report.attempt("one update with --offload"):
        there = trainer(config, device, mesh, cfg.lr, offload=True, weights=here.policy)
        batches = [full_micro_batch(cfg, config.vocab_size)]
        found = {}
        for name, run in (("without", here), ("with", there)):
            with common.PeakMemory(device) as memory:
                metrics, first = one_update(run, cfg, batches)
            found[name] = metrics["grad_norm"]
            report.add(f"first update {name} --offload", f"{first:.2f} s, peak {memory.before_gb + memory.gb:.1f} GB",
                       seconds=first, metrics=metrics)
        report.below("gradient norms, relative difference", abs(found["with"] / found["without"] - 1), 1e-3)
        apart = [(b.detach().to_local().to(device) - a.detach().to_local()).abs().div_(cfg.lr)
                 for a, b in zip(here.policy.parameters(), there.policy.parameters())]
        mean = sum(x.double().sum() for x in apart) / sum(x.numel() for x in apart)
        report.below("weights after it, mean difference in units of lr", mean.item(), 0.05,
                     worst=max(x.max() for x in apart).item())
        _, second = one_update(there, cfg, batches)
        report.add("second update with --offload (memory pinned, moments there)", f"{second:.2f} s", number=second)
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------
# engine, warm, decode

def start_engine(config, device):
    """(engine without weights, seconds), as srft.setup starts it; the import of vLLM is not counted. Every part
    asks for the same engine: vLLM's compile cache knows it again, if anything does."""
    from rollout import RolloutEngine
    began = common.clock(device)
    engine = RolloutEngine(config, tiny_tokenizer(), engine_dtype(device), PROMPT + sizes(device).tokens,
                           max(sizes(device).decode), Config.engine_memory, device.type == "cpu", seed=0)
    return engine, common.clock(device) - began


def engine_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_prompts(config, count):
    return np.random.default_rng(0).integers(0, config.vocab_size, (count, PROMPT)).tolist()


def wide_engine(report, device):
    colocated(report, device, "wide", "7B widths")


def tied_engine(report, device):
    colocated(report, device, "tied", "tied")


def colocated(report, device, kind, name):
    """Engine and trainer in one process: their log-probs side by side, and what a sleep and a sync leave unchanged."""
    *_, mesh = init_distributed()
    config, (prompts, group), tokens = shape(device, kind), sizes(device).prompts, sizes(device).tokens
    cfg = Config(**sizes(device).batch | dict(max_prompt_tokens=PROMPT, max_response_tokens=tokens))
    cfg.micro_batch_tokens = max(cfg.micro_batch_tokens, PROMPT + tokens)
    run, ids = trainer(config, device, mesh, lr=0.0), random_prompts(config, prompts)
    engine, seconds = start_engine(config, device)
    report.add(f"{name}: start", f"{seconds:.1f} s", number=seconds)
    sync = lambda version: engine.sync_weights(M.full_parameters(run.policy, engine_dtype(device)), version)
    sample = lambda: engine.generate(ids, group, 1.0, tokens, seed=1)

    def learn(groups):
        """The metrics of an update of which no weight changes: engine and trainer on the engine's own tokens."""
        sequences = [M.Sequence(prompt, r.tokens, reward=float(k % 2), engine_logp=r.logprobs, group=g)
                     for g, (prompt, rollouts) in enumerate(zip(ids, groups)) for k, r in enumerate(rollouts)]
        return one_update(run, cfg, M.pack(sequences, cfg.micro_batch_tokens))[0]

    sync(0)
    began = common.clock(device)
    first = sample()
    seconds = common.clock(device) - began
    report.add(f"{name}: {prompts * group} x {tokens} tokens, the first time", f"{seconds:.1f} s", number=seconds)
    for version in (1, 2):
        with report.attempt(f"{name}: sleep, update, sync"):
            awake = memory_gb(device)
            engine.sleep()
            asleep = memory_gb(device)
            metrics = learn(first)
            began = common.clock(device)
            sync(version)
            seconds = common.clock(device) - began
            report.add(f"{name}: sleep {version} frees; wake-up and sync take",
                       f"{awake - asleep:.1f} of {awake:.1f} GB; {seconds:.2f} s", freed=awake - asleep, seconds=seconds)
            if version == 1:
                mismatch(report, name, "the product's head", metrics, device)
            again = sample()
            same_tokens(report, f"{name}: after sync {version}, the same seeds", first, again)
    if device.type == "cuda":                # on a CPU the head is in fp32, and repacked: nothing to patch
        for dtype in (torch.bfloat16, torch.float32):
            with report.attempt(f"{name}: head in {dtype}"), head_in(dtype):
                groups = sample()
                engine.sleep()
                mismatch(report, name, f"a head in {dtype}", learn(groups), device)
                sync(3)
    engine.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def mismatch(report, name, head, metrics, device):
    """The limit of the mean is that of srft.py: it stops a run that is over it."""
    mean, worst = metrics["engine/logp_diff_mean"], metrics["engine/logp_diff_max"]
    limit = 0.05 if device.type == "cuda" else 1e-4
    report.add(f"{name}: |log p(engine) - log p(trainer)|, {head}, mean and worst of a token",
               f"{mean:.2g}, {worst:.2g} nats", f"mean below {limit:g}", mean < limit, mean=mean, worst=worst)


def same_tokens(report, what, first, again):
    """Equal tokens, and equal log-probs up to the first other token of each response."""
    pairs = [pair for a, b in zip(first, again) for pair in zip(a, b)]
    equal = sum(a.tokens == b.tokens for a, b in pairs)
    apart = []
    for a, b in pairs:
        common_start = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), len(a.tokens))
        apart += [abs(x - y) for x, y in zip(a.logprobs[:common_start], b.logprobs[:common_start])]
    worst = max(apart, default=float("nan"))
    report.add(what, f"{equal} of {len(pairs)} responses equal, log-probs within {worst:.2g}",
               "all equal, within 0", equal == len(pairs) and worst == 0, equal=equal, worst=worst)


@contextmanager
def head_in(dtype):
    """Inside, vLLM's logits are rounded to `dtype` after fp32 sums, whatever the engine was started with. The
    head runs after the compiled, captured part of the model, so a patch between two calls does reach it. This
    replaces a private method of vLLM, for this measurement alone: no flag of the product chooses the head."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def logits(self, hidden, head, *_):
        out = hidden.new_empty(len(hidden), len(head.weight), dtype=torch.float32)
        M._addmm_fp32(out, hidden, head.weight.T, beta=0)
        return out.to(dtype)[:, :self.org_vocab_size]

    with mock.patch.object(LogitsProcessor, "_get_logits", logits):
        yield


def random_tensors(config, device):
    """(name, tensor) of a whole model for an engine without a trainer."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    for name, p in lm.named_parameters():
        yield name, randomize(name, torch.empty(p.shape, dtype=engine_dtype(device), device=device))


@contextmanager
def engine_alone(device):
    """(engine with random weights, config, seconds that its start took)."""
    init_distributed()
    config = shape(device, "wide")
    engine, seconds = start_engine(config, device)
    engine.sync_weights(random_tensors(config, device), 0)
    yield engine, config, seconds
    engine.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def warm(report, device):
    """A start in another process, beside the first one of the part `engine`, if that has run in this folder."""
    with engine_alone(device) as (engine, config, seconds):
        first = Report(report.folder, "engine").number("7B widths: start")
        report.add("7B widths: start again", f"{seconds:.1f} s" + (f", first {first:.1f} s" if first else ""), number=seconds)


def decode(report, device):
    tokens = sizes(device).tokens
    with engine_alone(device) as (engine, config, seconds):
        report.add("start", f"{seconds:.1f} s", number=seconds)
        engine.generate(random_prompts(config, 2), 1, 1.0, 8, seed=0)                          # the first is slow
        for count in sizes(device).decode:
            with report.attempt(f"{count} sequences"):
                began = common.clock(device)
                groups = engine.generate(random_prompts(config, count), 1, 1.0, tokens, seed=0)
                took = common.clock(device) - began
                total = sum(len(r.tokens) for rollouts in groups for r in rollouts)
                report.add(f"{count} sequences of {PROMPT} + {tokens} tokens, 7B widths, "
                           f"{config.num_hidden_layers} layers", f"{total / took:,.0f} tokens/s, "
                           f"{1e3 * took / tokens:.1f} ms a token", number=total / took)


# ----------------------------------------------------------------------------------------------------------------
# end-to-end

def end_to_end(report, device):
    """The command lines, as a user types them."""
    run = ["--preset", "tiny", "--prompts_per_step", "8", "--n_rollouts", "4", "--save_every", "2", "--eval_data", "",
           "--grader_workers", "1"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for what, last, flags in (("2 steps", 2, []), ("--resume, 2 more", 4, ["--resume"])):
            with report.attempt(f"srft.py: {what}"):
                seconds = command(report, "srft.py", *run, "--steps", str(last), *flags, "--out", str(out))
                training_rows(report, f"srft.py: {what}", out / "metrics.jsonl", last, seconds, device)
        with report.attempt("eval.py"):
            seconds = command(report, "eval.py", "--model", str(out), "--benchmarks", "tiny:heldout", "--limit", "16",
                              "--template", "none", "--max_tokens", "160", "--grader_workers", "1")
            rows = (out / "eval" / "results.jsonl").read_text().splitlines()
            report.add("eval.py on it", f"{len(rows)} responses, {seconds:.1f} s", "16 responses", len(rows) == 16,
                       seconds=seconds)


def command(report, *args):
    """Seconds of `python ARGS` in the project's folder; RuntimeError with its last words if it fails."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, *args], cwd=common.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (report.folder / f"{args[0]}.log").write_text(done.stdout)
    if done.returncode:
        print(done.stdout[-4000:], flush=True)
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout.strip()[-250:]}")
    return time.monotonic() - began


def training_rows(report, what, path, last, seconds, device):
    """The last row of a run's metrics: the step asked for, finite numbers, an engine that agrees with the trainer."""
    row = json.loads(path.read_text().splitlines()[-1])
    mean, limit = row["engine/logp_diff_mean"], 0.05 if device.type == "cuda" else 1e-3
    finite = bool(np.isfinite([row["reward/mean"], row["grad_norm"], mean, row["engine/logp_diff_max"]]).all())
    report.add(what, f"step {row['step']}, reward {row['reward/mean']:.2f}, gradient norm {row['grad_norm']:.2g}, {seconds:.1f} s",
               f"step {last}, all finite", finite and row["step"] == last and row["steps_skipped"] == 0, metrics=row)
    report.below(f"{what}: |log p(engine) - log p(trainer)|, mean", mean, limit, worst=row["engine/logp_diff_max"])


# ----------------------------------------------------------------------------------------------------------------
# Parts, each in processes of its own, under a time limit.

@dataclass(frozen=True)
class Part:
    seconds: float                # limit of all its tasks together
    tasks: tuple                  # names of functions (report, device), a process each: a process can hold one engine
    vllm: bool = False            # imports it before its time begins


PARTS = {"kernels": Part(60, ("kernels",)), "trainer": Part(90, ("planned", "trained")), "mfu": Part(60, ("mfu",)),
         "offload": Part(90, ("offload",)), "engine": Part(180, ("wide_engine", "tied_engine"), vllm=True),
         "warm": Part(60, ("warm",), vllm=True), "end-to-end": Part(120, ("end_to_end",)),
         "decode": Part(60, ("decode",), vllm=True)}


def start_worker(args, name, task):
    """The process of one task. It imports its libraries and then waits for a line."""
    # The plan is of fake tensors on a CPU.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" or task == "planned" else {}
    return subprocess.Popen([sys.executable, __file__, name, "--task", task, "--out", args.out, "--threads", str(args.threads)],
                            env=os.environ | hidden, stdin=subprocess.PIPE, text=True, process_group=0)


def work(args):
    """Be the process of args.task."""
    (name,), began = args.parts, None
    if PARTS[name].vllm:
        from vllm import LLM  # noqa: F401
    if not sys.stdin.readline():                        # nobody is there any more
        return
    device = common.start(args)
    report = Report(args.out, name, common.machine() | {"gpu": gpu()})
    with report.attempt(args.task):
        globals()[args.task](report, device)


def supervise(folder, names, start):
    """Run the tasks of all parts in turn. start(part, task) starts a process that waits for a line. The next one is
    started when the last begins to work: importing torch and vLLM takes as long as many a part. True: nothing failed."""
    queue = [(name, task) for name in names for task in PARTS[name].tasks]
    left, ahead = {name: PARTS[name].seconds for name in names}, start(*queue[0])
    process = None
    try:
        for i, (name, task) in enumerate(queue):
            process, began = ahead, time.monotonic()
            print(f"\n{name} ({task}): at most {left[name]:.0f} s", flush=True)
            process.stdin.write("go\n")
            process.stdin.flush()
            ahead = start(*queue[i + 1]) if i + 1 < len(queue) else None
            error = wait(process, left[name])
            left[name] -= (took := time.monotonic() - began)
            Report(folder, name).add(f"{task}, whole process" if len(PARTS[name].tasks) > 1 else "whole process",
                                     error or f"{took:.0f} s", f"at most {took + left[name]:.0f} s", ok=False if error else None,
                                     seconds=took)
    finally:
        for worker in filter(None, (process, ahead)):
            end(worker)
    return all(row["ok"] is not False for name in names for row in Report(folder, name).rows)


def wait(process, seconds):
    """What went wrong with it, None if nothing did."""
    try:
        code = process.wait(timeout=max(0, seconds))
    except subprocess.TimeoutExpired:
        end(process)
        return f"stopped after {max(0, seconds):.0f} s"
    return f"ended with exit code {code}" if code else None


def end(process):
    """End it and what it has started, whatever they are doing."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.stdin.close()


def main(argv=None):
    p = common.parser(__doc__, "gpu")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; or table [all but table]")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu: small shapes [a GPU if there is one]")
    p.add_argument("--task", help="internal: be the process of this task")
    p.set_defaults(out="out/bench/gpu", threads=len(os.sched_getaffinity(0)))
    args = p.parse_args(argv)
    unknown = set(args.parts) - {*PARTS, "table"}
    if unknown:
        p.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}, table")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no GPU")
    if args.task:
        return work(args)
    folder, names = Path(args.out), [name for name in args.parts or PARTS if name != "table"]
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))             # the workers, too: see supervise
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)
    fine = not names or supervise(folder, names, lambda *task: start_worker(args, *task))
    text = markdown(folder)
    write_whole(folder / "gpu.md", text)
    print(f"\n{text}\nwrote {folder}/gpu.md")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
