"""A model of the time of a step: bytes / (bytes a second), FLOPs / (FLOPs a second), whichever is the longer.

    m = machine(cards=8, memory=80e9)                                # what such cards are taken for
    found = step_time(m, config, cfg, counts, mean=2000)             # seconds by phase

It is arithmetic over assumptions, all of which `assumptions` names; no part of it has been timed on these
machines. bench/scale.py sets it beside published steps, bench/dry_run.py searches by it.

Letters: P parameters, B of them in decoder blocks, R in the root (embedding, final norm, head), w ranks of a
shard group (a node). A collective over n ranks is counted by the bytes of its full tensor; as a ring, each
rank sends (n-1)/n of them in an all-gather or a reduce-scatter and 2 (n-1)/n in an all-reduce.
"""
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

import model as M
from bench import plan
from config import recomputed_blocks, sequences_per_prompt
from rollout import kv_bytes

GB = 1e9


def sent(traffic):
    """Bytes that one rank sends, as a ring, for {(kind, n): bytes of the full tensor}."""
    total = 0
    for (kind, n), size in traffic.items():
        times = 2 if kind == "all-reduce" else 1
        total += times * (n - 1) / n * size
    return total


def formula(B, R, T, w, nodes=1):
    """Bytes of (every micro-batch, once an update, one weight sync), each {(kind, n): of the full tensors}.

      micro-batch  all-gather      bf16: each block in forward and again in backward          2 (2B)
                   reduce-scatter  fp32 gradients                                             4 (B + R)
      update       all-gather      bf16, the root, which stays gathered                       2 R
                   all-reduce      with several nodes, each shard across them                 4 (B + R) / w
                   all-reduce      to clip: one fp32 norm a tensor                            4 T
      sync         all-gather      bf16, tensor by tensor, within each node                   2 (B + R)
    """
    if w == 1:
        return {}, {}, {}
    every = {("all-gather", w): 4 * B, ("reduce-scatter", w): 4 * (B + R)}
    once = Counter({("all-gather", w): 2 * R, ("all-reduce", w): 4 * T})
    if nodes > 1:
        once["all-reduce", nodes] += 4 * (B + R) // w
    return every, dict(once), {("all-gather", w): 2 * (B + R)}


@dataclass(frozen=True)
class Machine:
    """One GPU of a machine and its links. Rates are of one GPU and one direction, a second."""
    name: str
    cards: int
    flops: float               # dense bf16 peak, data sheet
    hbm: float                 # bytes from its memory, data sheet
    nvlink: float              # bytes to the other GPUs of its node that a collective reaches
    network: float             # bytes to other nodes that a collective reaches
    mfu: float                 # share of `flops` in training, counting recomputed FLOPs as work
    memory: float = 80e9       # bytes of its memory, as its name promises
    decode: float = 0.7        # share of `hbm` in decoding and in AdamW
    prefill: float = 0.5       # share of `flops` in prefill, and at most in decoding
    pcie: float = 25e9         # bytes between GPU and host memory, for --offload
    offload: bool = False


H100 = dict(flops=989e12, hbm=3.35e12, nvlink=300e9, network=40e9, mfu=0.40)
A100 = dict(flops=312e12, hbm=2.04e12, nvlink=200e9, network=20e9, mfu=0.45)
# Without NVLink, collectives go over PCIe: two thirds of one direction of 16 lanes of the fourth generation.
PCIE4 = dict(nvlink=20e9, network=20e9, mfu=0.40)
# GB on the card -> what a card of that size is taken for. Others count as the next smaller one.
CARDS = {
    24: ("RTX 4090", dict(flops=165e12, hbm=1.01e12, **PCIE4)),
    40: ("A100", A100 | dict(hbm=1.555e12)),
    48: ("L40S", dict(flops=362e12, hbm=0.864e12, **PCIE4)),
    80: ("H100", H100),
    141: ("H200", H100 | dict(hbm=4.8e12)),
}

STEP_OVERHEAD = 2e-3           # seconds a decoding step: scheduler, launch of the graph, sampler
SEQUENCE_OVERHEAD = 20e-6      # and for each sequence in it: Python objects, log-probs
SYNC_OVERHEAD = 2.0            # seconds a step: sleep, wake, mapping memory, some 300 small loads
HOST_ADAM = 100e9              # bytes a second that AdamW moves on the host, all ranks of a node together
SPREAD = 0.8                   # sigma of the log-normal lengths


def machine(cards, memory, offload=False):
    """The Machine that `cards` cards of `memory` bytes each are taken for."""
    known = [gb for gb in CARDS if gb * GB <= memory] or [min(CARDS)]
    name, rates = CARDS[max(known)]
    return Machine(f"{cards} x {name}", cards, memory=memory, offload=offload, **rates)


def assumptions(machines, cfg, mean):
    """Rows (what, value, why) of everything that the times rest on, as it is in this call."""
    def each(field):
        """The value of every kind of card, once."""
        values = [f"{m.name.split()[2].strip(',')} {getattr(m, field):.3g}" for m in machines]
        return ", ".join(dict.fromkeys(values))

    model = ", ".join(dict.fromkeys(f"{m.mfu * 3 / 4:.2f}" for m in machines))
    first = machines[0]
    return [
        ("bf16 peak FLOP/s", each("flops"), "data sheets, dense, SXM"),
        ("memory, bytes/s", each("hbm"), "data sheets, 80 GB SXM"),
        ("within a node, bytes/s", each("nvlink"), "two thirds of one direction of NVLink (450e9, 300e9)"),
        ("across nodes, bytes/s a GPU", each("network"), "80 % of one adapter a GPU, 400 and 200 Gbit/s"),
        ("training, share of peak", each("mfu"),
         f"recomputed FLOPs count; {model} in model FLOPs. Published: H100 0.33-0.39"),
        ("recomputation", "4/3 of the model's FLOPs",
         "blocks and head run forward twice; less where --recompute keeps some blocks"),
        ("decoding, share of memory bytes/s", first.decode,
         "all bf16 weights and the running sequences' KV cache, each step"),
        ("prefill, share of peak", first.prefill,
         "each prompt once (prefix cache); preempted sequences again"),
        ("a decoding step, s", f"{STEP_OVERHEAD:g} + {SEQUENCE_OVERHEAD:g} a sequence",
         "scheduler, sampler; CUDA graphs"),
        ("the engine",
         f"{cfg.engine_memory:.0%} of {first.memory / GB:g} GB, {plan.WORKSPACE / GB:.1f} GB workspace, "
         f"{plan.GRAPHS / GB:.1f} GB CUDA graphs, {cfg.engine_sequences} sequences",
         "flags; the rest beside bf16 weights is KV cache"),
        ("KV cache full", "the youngest sequence is dropped, prefilled later",
         "as the engine's scheduler does"),
        ("lengths, typical",
         f"{plan.TYPICAL[0]} + log-normal, sigma {SPREAD}, cut at {cfg.max_response_tokens:,}, mean {mean:,}",
         "long tail, as reasoning models have; demonstrations alike"),
        ("lengths, worst", f"{cfg.max_prompt_tokens:,} + {cfg.max_response_tokens:,}, all", "the limits"),
        ("grading", 0, "hidden: each response is graded when it ends, while others are decoded"),
        ("communication", "hidden behind compute, but for the root's",
         "nothing runs beside its gather and reduction"),
        ("AdamW, clip", "40 bytes a parameter of the shard", "memory-bound"),
        ("sync beside bytes, s", SYNC_OVERHEAD, "sleep, wake-up, loader; a published refit takes 4"),
        ("--offload", f"{first.pcie:.3g} bytes/s to the host, AdamW at {HOST_ADAM:.3g} a node",
         "PCIe; eight memory channels, half used"),
        ("not in it", "checkpoints, evaluation, start, stragglers", "")]


def lengths(count, mean, longest, seed=0):
    """Response lengths: log-normal, cut at `longest`, whose mean after the cut is `mean`; all `longest` if
    mean is None."""
    if mean is None or mean >= longest:
        return np.full(count, longest)

    def cut(mu, z):
        return np.minimum(np.exp(mu + SPREAD * z), longest)

    z = np.random.default_rng(seed).standard_normal(100_000)
    low, high = 0.0, math.log(longest) + 5
    for _ in range(50):                                    # the mean grows with mu
        middle = (low + high) / 2
        if cut(middle, z).mean() < mean:
            low = middle
        else:
            high = middle
    drawn = cut(low, np.random.default_rng(seed + 1).standard_normal(count))
    return np.maximum(1, drawn).astype(int)


def generate(m, config, parameters, prompt, responses, prompts, capacity, limit, stride=16):
    """(seconds, seconds with less than a quarter of the sequences still to finish, preemptions) of one rank.

    Continuous batching: a waiting sequence enters as soon as a place (of `limit`) and KV cache (of `capacity`
    tokens) are free; if the cache overflows, the youngest gives up its place. `stride` decoding steps at a
    time.
      bytes of a step   2P + KV bytes x (tokens of all running sequences)
      FLOPs of a step   2P a sequence + attention: 4 x layers x heads x head width a cached token
    """
    width = config.num_hidden_layers * config.num_attention_heads * M.head_width(config)
    seconds, tail, preempted = 2 * parameters * prompt * prompts / (m.prefill * m.flops), 0.0, 0
    left, done = np.array(responses), np.zeros(len(responses), int)
    running, waiting = [], list(range(len(responses)))
    while running or waiting:
        held = int(done[running].sum()) + prompt * len(running)
        while waiting and len(running) < limit:
            i = waiting[0]
            if running and held + prompt + done[i] + stride * (len(running) + 1) > capacity:
                break
            running.append(waiting.pop(0))
            held += prompt + done[i]
            seconds += 2 * parameters * done[i] / (m.prefill * m.flops)      # 0, but after a preemption
        while len(running) > 1 and held + stride * len(running) > capacity:
            i = running.pop()
            waiting.insert(0, i)
            held -= prompt + done[i]
            preempted += 1
        n, steps = len(running), min(stride, int(left[running].min()))
        memory = (2 * parameters + kv_bytes(config) * held) / (m.decode * m.hbm)
        compute = (2 * parameters * n + 4 * width * held) / (m.prefill * m.flops)
        spent = steps * (max(memory, compute) + STEP_OVERHEAD + SEQUENCE_OVERHEAD * n)
        seconds += spent
        if n + len(waiting) < len(responses) / 4:
            tail += spent
        left[running] -= steps
        done[running] += steps
        running = [i for i in running if left[i]]
    return seconds, tail, preempted


def sample(m, config, cfg, parameters, prompt, responses):
    """(seconds, tail, preemptions) of `generate` on the slowest rank, for which all wait. responses: tokens,
    a prompt's rollouts beside each other."""
    kv = plan.kv_room(cfg, parameters, m.memory) / kv_bytes(config)
    rollouts = len(responses) // cfg.prompts_per_step
    ranks = []
    for rank in range(m.cards):
        share = responses.reshape(-1, rollouts)[rank::m.cards].ravel()
        ranks.append(generate(m, config, parameters, prompt, share, len(share) // rollouts, kv,
                              cfg.engine_sequences))
    return max(ranks)


def train(m, config, cfg, counts, sequences):
    """(seconds of compute, seconds of communication that nothing hides, model FLOPs of all ranks) of forward
    and backward. counts: (B, R).

    sequences: M.Sequence of the whole step; they are packed as in the run, and ranks wait for the slowest at
    each micro-batch. The root's fp32 gradients, reduced at the end of every backward, lie bare, and so does
    what happens once an update."""
    (B, R), parameters, shard = counts, sum(counts), min(m.cards, plan.NODE)
    each, once, _ = formula(B, R, 0, shard, m.cards // shard)

    def cost(sequence):
        return M.forward_backward_flops(config, parameters, [sequence])

    packs = M.pack(sequences, cfg.micro_batch_tokens, m.cards, cost)
    work = [M.forward_backward_flops(config, parameters, pack) for pack in packs]
    again = 1 + recomputed_share(config, cfg, sequences, sum(work))
    compute = []                                                                  # seconds of each round
    for i in range(0, len(work), m.cards):
        compute.append(again * max(work[i:i + m.cards]) / (m.mfu * m.flops))
    across = {key: size for key, size in once.items() if key[0] == "all-reduce"}
    inside = {key: size for key, size in once.items() if key[0] != "all-reduce"}
    communication, update = sent(each) / m.nvlink, sent(inside) / m.nvlink + sent(across) / m.network
    bare = 4 * R * (shard - 1) / shard / m.nvlink
    if m.offload:       # fp32 shards to the card for both gathers of a block, fp32 gradients back to the host
        communication += (2 * 4 * B + 4 * (B + R)) / shard / m.pcie
    exposed = update + sum(bare + max(0.0, communication - bare - c) for c in compute)
    return sum(compute), exposed, sum(work)


def recomputed_share(config, cfg, sequences, flops):
    """What runs forward a second time, as a share of the model FLOPs of `sequences`: always the head, and of
    the blocks as many as --recompute says. A forward is a third of forward and backward."""
    predicted = sum(len(s.response) for s in sequences)
    head = 6 * config.vocab_size * config.hidden_size * predicted
    blocks = recomputed_blocks(cfg, config.num_hidden_layers) / config.num_hidden_layers
    return (head + blocks * (flops - head)) / (3 * flops)


def step_lengths(cfg, mean=None, prompt=None, demos=None):
    """(tokens of a prompt, of each response, of each demonstration) of one step. mean: of the responses,
    None: all at the limit. demos: number of demonstrations, one a prompt unless given."""
    typical = min(plan.TYPICAL[0], cfg.max_prompt_tokens)
    prompt = prompt or (cfg.max_prompt_tokens if mean is None else typical)
    rollouts, demonstrations = sequences_per_prompt(cfg)
    responses = lengths(cfg.prompts_per_step * rollouts, mean, cfg.max_response_tokens)
    if demos is None:
        demos = cfg.prompts_per_step * demonstrations
    return prompt, responses, lengths(demos, mean, cfg.max_response_tokens, seed=10)


def step_time(m, config, cfg, counts, mean=None, prompt=None, demos=None, updates=1, forwards=0,
              sampled=None):
    """Seconds of one step on machine m by phase, and what follows. counts: (B, R) parameters of blocks and
    root; mean, prompt, demos as in step_lengths.

    forwards: further passes without backward over all sequences (the published runs compute log-probs so;
    this one does not need to). sampled: of another step with the same generation."""
    (B, R), parameters, shard = counts, sum(counts), min(m.cards, plan.NODE)
    prompt, responses, demos = step_lengths(cfg, mean, prompt, demos)
    if sampled is None and len(responses):
        sampled = sample(m, config, cfg, parameters, prompt, responses)
    generating, tail, preemptions = sampled or (0.0, 0.0, 0)                      # SFT samples none
    sequences = [M.Sequence(range(prompt), range(n)) for n in [*responses, *demos]]
    compute, exposed, flops = train(m, config, cfg, counts, sequences)
    # AdamW reads weight, gradient, two moments and writes three (28 bytes a parameter); clip reads and
    # rewrites gradients (12).
    optimizer = updates * 40 * parameters / shard / (HOST_ADAM / shard if m.offload else m.decode * m.hbm)
    to_card = 4 * parameters / shard / m.pcie if m.offload else 0
    _, _, sync = formula(B, R, 0, shard)
    refit = sent(sync) / m.nvlink + to_card + SYNC_OVERHEAD
    logprobs = forwards * flops / 3 / (m.mfu * m.flops * m.cards)
    found = {"generate": generating, "log-probs": logprobs, "train": compute,
             "exposed communication": exposed, "AdamW": optimizer, "sync": refit}
    total, tokens = sum(found.values()), sum(map(len, sequences))
    peak = m.cards * m.flops
    found.update({
        "sampled": sampled, "tail": tail, "preemptions": preemptions,
        "step": total, "hours of 500 steps": total * 500 / 3600,
        "tokens/s": tokens / total, "tokens": tokens, "whole-step MFU": flops / (total * peak),
        "train MFU": flops / ((compute + exposed) * peak)})
    return found
