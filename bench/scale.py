"""How the run scales: memory a rank, bytes communicated a step, and a model of the step's time.

    python bench/scale.py                          # all of it: about 4 minutes on 2 cores, no GPU, no network
    python bench/scale.py --measure no --mfu 0.35  # the 7B tables alone, with another assumption

1. Measured: one step of a small model on 1 and 2 real ranks (gloo) beside the simulation and the closed
   formulas.
2. Simulated: the 7B run on 8 ranks and on 64 (8 nodes of 8, HSDP), memory by FSDPMemTracker, bytes by the
   counter of 1.
3. Does it fit 80 GB? Training with the engine asleep, generating with it awake.
4. A model of the step's time on three machines, and the same model applied to two published runs. It is
   arithmetic over assumptions, every one of which is printed; no part of it has been timed on these machines.

Letters and the model of time: bench/steptime.py.
"""
import math
import sys
from collections import Counter
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

import common

import model as M
from bench import plan, steptime
from bench.steptime import A100, GB, H100, Machine, formula, sent, step_time
from config import Config, check_config, keeps_own_rope
from rollout import kv_bytes
from support.gradients import clip_gradients
from support.intervals import number_in, positive
from support.processes import init_distributed

CARD = 80e9                    # bytes, as the name "80 GB" promises
# Flags that fit each of the machines below. On 8 cards of 80 GB the defaults are 6 % faster.
EVERYWHERE = dict(micro_batch_tokens=16_384, recompute="all")


# ----------------------------------------------------------------------------------------------------------
# Bytes: a counter for what torch really issues.

class Traffic(TorchDispatchMode):
    """Adds up the collectives of this rank: bytes[kind, n] of the full tensors, for n ranks in the group.

    Sees FSDP2's own (c10d) and DTensor's (functional) collectives, on real ranks and under the fake process
    group."""

    KINDS = (("allgather", "all-gather"), ("all_gather", "all-gather"), ("reduce_scatter", "reduce-scatter"),
             ("allreduce", "all-reduce"), ("all_reduce", "all-reduce"))

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented            # DTensor first: its collectives come back here on plain tensors
        out = func(*args, **(kwargs or {}))
        if func in collective_ops and func not in sync_ops:
            kind = next((kind for name, kind in self.KINDS if name in str(func)), str(func))
            n = CollectiveOp.get_process_group(func, args).size()
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            if n > 1:                                                          # else nothing is moved
                # The larger side is the full tensor: output of an all-gather, input of a reduce-scatter.
                self.bytes[kind, n] += max(x.numel() * x.element_size() for x in tensors)
        return out

    def __sub__(self, other):
        """What was counted since `other`."""
        since = {key: size - other.get(key, 0) for key, size in self.bytes.items()}
        return {key: size for key, size in since.items() if size}


def step(policy, optimizer, batch, cfg, traffic, micro_batches=3):
    """One optimizer step and one weight sync, as srft.train does them.

    Returns their bytes, three times {(kind, n): bytes}: those of a micro-batch in the middle; what the first
    and the last move besides, with clip and AdamW, once an update; the sync's."""
    phases = []

    def phase(work):
        before = dict(traffic.bytes)
        work()
        phases.append(traffic - before)

    def micro_batch():
        M.accumulate(policy, last=len(phases) == micro_batches - 1)
        policy(batch, cfg.temperature)[0].sum().backward()

    def update():
        clip_gradients(policy.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def sync():
        for _ in M.full_parameters(policy, torch.bfloat16):
            pass

    with traffic:
        for work in [micro_batch] * micro_batches + [update, sync]:
            phase(work)
    total, middle = sum(map(Counter, phases[:-1]), Counter()), phases[1]
    once = {key: total[key] - micro_batches * middle.get(key, 0) for key in total}
    return middle, {key: size for key, size in once.items() if size}, phases[-1]


def padded(shape, n):
    """Numbers in a parameter of this shape whose rows FSDP2 fills up to a multiple of n."""
    return math.ceil(shape[0] / n) * n * math.prod(shape[1:])


def sizes(policy, w):
    """(B, R, T) from the sharded policy: parameters of blocks and root, rows filled up to multiples of w;
    tensors."""
    blocks = list(policy.lm.base_model.layers.parameters())
    inside = {id(p) for p in blocks}
    root = [p for p in policy.parameters() if id(p) not in inside]
    B = sum(padded(p.shape, w) for p in blocks)
    R = sum(padded(p.shape, w) for p in root)
    return B, R, len(blocks) + len(root)


def simulated_traffic(config, cfg, world, per_node=plan.NODE):
    """(phases of `step`, (B, R, T)) of rank 0 of `world` ranks that do not exist."""
    with plan.simulated_gpus(world, per_node) as mesh:
        device = torch.device("cpu")
        policy = M.build_policy(config, mesh, device, bf16=True)       # recomputed or not: the same bytes
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        # Bytes do not depend on the size of a micro-batch.
        short = replace(cfg, micro_batch_tokens=1024, max_prompt_tokens=128, max_response_tokens=896)
        batch = M.collate(plan.full_micro_batch(short), device)
        return step(policy, optimizer, batch, cfg, Traffic()), sizes(policy, min(world, per_node))


# ----------------------------------------------------------------------------------------------------------
# 1. Measured on 1 and 2 ranks.

# Few tokens: without AVX-512, bf16 products are forty times slower than fp32 ones on a CPU.
SMALL = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
                    num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=False,
                    max_position_embeddings=2048, use_cache=False)
SMALL_CFG = dict(max_prompt_tokens=32, max_response_tokens=48, micro_batch_tokens=64, recompute="all")


def worker(out):
    """One rank: a step of SMALL, its memory and its bytes; rank 0 writes them to `out`."""
    rank, world, device, mesh = init_distributed("cpu")
    cfg, bf16 = Config(**SMALL_CFG), True

    def one_step(config):
        policy = M.build_policy(config, mesh, device, bf16=bf16)
        with torch.no_grad():
            for p in policy.parameters():
                p.to_local().normal_(0, 0.02)
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        batch = M.collate(plan.full_micro_batch(cfg), device)
        step(policy, optimizer, batch, cfg, Traffic())           # the first step makes the optimizer's state
        return step(policy, optimizer, batch, cfg, Traffic()), sizes(policy, world)

    smaller = dict(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=64)
    one_step(LlamaConfig.from_dict(SMALL.to_dict() | smaller))  # libraries, threads and gloo allocate first
    with common.PeakMemory(device) as memory:
        phases, counts = one_step(SMALL)
    every = [None] * world
    dist.all_gather_object(every, memory.gb)
    if rank == 0:
        torch.save({"phases": phases, "sizes": counts, "gb": max(every)}, out)
    dist.barrier()
    dist.destroy_process_group()


def measured(world):
    """What `worker` wrote, of `world` ranks."""
    return common.on_ranks(world, __file__)


PHASES = ("every micro-batch", "once an update", "weight sync")


def compare_measured():
    """Tables of 1 and 2 ranks: measured, simulated, and by formula."""
    cfg, results, memory_rows, byte_rows = Config(**SMALL_CFG), {}, [], []
    for world in (1, 2):
        real, memory = measured(world), plan.simulate(SMALL, cfg, world)
        phases, counts = simulated_traffic(SMALL, cfg, world)
        by_hand = 16 * sum(counts[:2]) / world
        memory_rows.append([world, by_hand / 1e6, memory["peak"] / 1e6, real["gb"] * 1e3,
                            f"{real['gb'] * GB / memory['peak'] - 1:+.1%}"])
        for name, *three in zip(PHASES, real["phases"], phases, formula(*counts, world)):
            for key in sorted(three[-1]) or [("none", 1)]:
                byte_rows.append([world, name, key[0], *(f"{found.get(key, 0):,}" for found in three)])
        results[world] = {"measured_gb": real["gb"], "simulated_gb": memory["peak"] / GB,
                          "formula_gb": by_hand / GB}
    parameters = memory["parameters"]
    common.show(f"Measured on CPU: a random Llama of {parameters / 1e6:.1f} M parameters, micro-batches of "
                f"{cfg.micro_batch_tokens:,} tokens, AdamW (MB a rank)",
                ["ranks", "16P/w: weights, moments, gradients", "simulated peak", "measured peak",
                 "measured / simulated - 1"], memory_rows)
    common.show("Bytes of the full tensors, on real ranks, on simulated ones, by formula",
                ["ranks", "phase", "collective", "measured", "simulated", "formula"], byte_rows)
    return results


# ----------------------------------------------------------------------------------------------------------
# 2. The 7B run, simulated on 8 and 64 ranks.  3. Does it fit?

def simulated(config, cfg, worlds=(8, 64), per_node=plan.NODE):
    """Tables of memory and bytes a rank of the run `cfg`; returns ({world: memory}, {world: what `step`
    counts})."""
    memories, traffic, memory_rows, byte_rows = {}, {}, [], []
    parts = ("weights", "optimizer", "gradients", "activations", "peak")
    for world in worlds:
        memories[world] = memory = plan.simulate(config, cfg, world, per_node)
        traffic[world], counts = simulated_traffic(config, cfg, world, per_node)
        w = min(world, per_node)
        memory_rows.append([world, f"{w} x {max(1, world // per_node)}",
                            *(memory[part] / GB for part in parts)])
        _, _, micro_batches = plan.tokens_per_step(cfg, world, sum(plan.TYPICAL))
        by_formula = formula(*counts, w, world // w)
        for name, found, by_hand, times in zip(PHASES, traffic[world], by_formula, (micro_batches, 1, 1)):
            for key in sorted(found):
                by_rank = sent({key: found[key]}) / GB
                byte_rows.append([world, name, f"{key[0]} over {key[1]}", found[key] / GB,
                                  by_hand.get(key, 0) / GB, by_rank, times, times * by_rank])
    common.show("Memory of a rank in training, GB (FSDPMemTracker; full micro-batches of 16,384 tokens)",
                ["ranks", "shard x nodes", *parts], memory_rows)
    common.show("Bytes, GB: of the full tensors as counted and by formula; sent by a rank; in a step of "
                "typical lengths",
                ["ranks", "phase", "collective", "counted", "formula", "sent", "times a step", "sent a step"],
                byte_rows)
    return memories, traffic


def fits(config, cfg, cases):
    """Table and results of the two phases on cards of 80 GB. cases: (cards, offload, what `plan.simulate`
    returns)."""
    rows, results = [], []
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    for world, offload, memory in cases:
        _, (training, generating), kv = plan.budget(replace(cfg, offload=offload), memory, CARD)
        ok = plan.fits(training, generating, CARD) and kv >= 10 * GB
        rows.append([f"{world} x 80 GB" + (", --offload" if offload else ""), training / GB, generating / GB,
                     kv / GB, int(kv / kv_bytes(config) / longest), memory["host"] / GB,
                     "yes" if ok else "NO"])
        results.append({"cards": world, "offload": offload, "training_gb": training / GB,
                        "generating_gb": generating / GB, "kv_gb": kv / GB, "host_gb": memory["host"] / GB,
                        "fits": ok})
    weights = 2 * memory["parameters"] / GB
    common.show(f"GB a rank in the two phases (in each {plan.RESIDUAL / GB:.1f} GB assumed for CUDA and "
                f"NCCL, {plan.GRAPHS / GB:.1f} for the engine's CUDA graphs). It fits if training takes at "
                f"most 72, generating at most 80 with the engine's weights ({weights:.1f}) and at least 10 "
                "of KV cache",
                ["cards", "training, engine asleep", "generating, engine awake", "of it KV cache",
                 f"sequences of {longest:,} in it", "host memory a rank", "fits"], rows)
    return results


# ----------------------------------------------------------------------------------------------------------
# 4. The time of a step.

MACHINES = [Machine("8 x H100", 8, **H100), Machine("8 x A100", 8, **A100), Machine("64 x A100", 64, **A100),
            Machine("4 x H100", 4, **H100), Machine("4 x H100, offload", 4, **H100, offload=True)]
COLUMNS = ("generate", "tail", "train", "exposed communication", "AdamW", "sync", "step",
           "hours of 500 steps", "tokens/s", "train MFU", "whole-step MFU")


def cell(column, x):
    """A number as the table of times shows it."""
    if "MFU" in column:
        return f"{x:.1%}"
    return f"{x:,.1f}" if x < 100 else f"{x:,.0f}"


def times(config, cfg, counts, machines, mean):
    """Table of the step's time on each machine, for typical and for the longest responses."""
    rows, results = [], []
    for m in machines:
        for name, length in ((f"mean {mean:,}", mean), ("all at the limit", None)):
            found = step_time(m, config, cfg, counts, length)
            rows.append([m.name, name, *(cell(column, found[column]) for column in COLUMNS)])
            results.append({"machine": m.name, "lengths": name} | found)
    common.show(f"Modelled seconds of one step: {cfg.prompts_per_step} prompts x ({cfg.n_rollouts} rollouts "
                "+ 1 demonstration). Tail: the part of `generate` in which less than a quarter of the "
                "slowest rank's sequences is left",
                ["machine", "responses", *COLUMNS], rows)
    return results


LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                       tie_word_embeddings=False)
PUBLISHED = [                # name, cards, mean response, prompt, longest, updates, published seconds
    # NeMo RL v0.4, performance summary: GRPO, on-policy, OpenMathInstruct-2, bf16, 2,048 samples of 1,060
    # tokens on average, at most 4,096, in 4 updates. Prompts of 160 tokens and two log-prob passes (old
    # policy, reference) are our guess.
    ("16 x H100, 2,048 samples of 1,060 tokens", 16, 900, 160, 4096, 4, {"step": 97.7}),
    # As quoted in discussions; 2,048 samples are our guess: their 38 s of training then is an MFU of 0.25.
    ("8 x H100, 2,048 (?) samples of 777 tokens", 8, 617, 160, 4096, 4,
     {"generate": 57, "log-probs": 19, "train": 38, "sync": 4, "step": 122}),
]


def anchors(mfu=None):
    """Table of the model's prediction beside published steps of Llama-3.1-8B, GRPO, on H100s."""
    body = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    counts, rows, results = (body, 2 * 128256 * 4096 + 4096), [], []
    for name, cards, mean, prompt, longest, updates, published in PUBLISHED:
        cfg = Config(prompts_per_step=64, n_rollouts=32, max_response_tokens=longest - prompt, **EVERYWHERE)
        m = Machine(name, cards, **H100 | ({"mfu": mfu} if mfu else {}))
        found = step_time(m, LLAMA_8B, cfg, counts, mean, prompt, 0, updates, forwards=2)
        found["train"] += found["exposed communication"]
        for phase in ("generate", "log-probs", "train", "sync", "step"):
            known = published.get(phase)
            rows.append([name, phase, f"{known:g}" if known else "", f"{found[phase]:.1f}",
                         f"{found[phase] / known - 1:+.0%}" if known else ""])
        results.append({"run": name, "published": published, "modelled": found})
    common.show("The same model beside published steps of Llama-3.1-8B (other trainers, the same kind of "
                "engine), seconds",
                ["run", "phase", "published", "modelled", "off by"], rows)
    return results


def main():
    """The four parts, each with its tables."""
    p = common.parser(__doc__, "scale")
    p.add_argument("--model", default=Config.model,
                   help="folder or hub name, for its config.json only [%(default)s]")
    p.add_argument("--measure", choices=("yes", "no"), default="yes",
                   help="part 1, which starts real ranks [%(default)s]")
    p.add_argument("--mfu", type=number_in(float, "(0, 1]"),
                   help="share of peak FLOP/s in training, recomputation counted, for all machines")
    p.add_argument("--decode", type=number_in(float, "(0, 1]"), default=0.7,
                   help="share of memory bandwidth in decoding [%(default)s]")
    p.add_argument("--mean_response", type=positive, default=plan.TYPICAL[1],
                   help="tokens, typical lengths [%(default)s]")
    p.add_argument("--engine_sequences", type=positive, default=Config.engine_sequences,
                   help="decoded at once, a rank [%(default)s]")
    p.set_defaults(device="cpu")                       # a simulation, and ranks of this machine's CPU
    args = p.parse_args()
    common.start(args)
    cfg = Config(model=args.model, engine_sequences=args.engine_sequences, **EVERYWHERE)
    config, source = plan.read_config(cfg.model, cfg.rope_theta, cfg.window, keeps_own_rope(cfg))
    check_config(cfg, 64, config.max_position_embeddings)
    results = {"model": source, "measured": compare_measured() if args.measure == "yes" else None}

    memories, traffic = simulated(config, cfg)
    results |= {"memory": memories, "bytes": {world: named(phases) for world, phases in traffic.items()}}
    four = plan.simulate(config, cfg, 4)
    offloaded = plan.simulate(config, replace(cfg, offload=True), 4)
    results["fits"] = fits(config, cfg, [(8, False, memories[8]), (64, False, memories[64]),
                                         (4, False, four), (4, True, offloaded)])

    counts = plan.counts(config, memories[8])
    machines = [replace(m, decode=args.decode, mfu=args.mfu or m.mfu) for m in MACHINES]
    assumed = steptime.assumptions(machines, cfg, args.mean_response)
    common.show("Assumptions of the times", ["what", "value", "why"], assumed)
    results |= {"machines": [asdict(m) for m in machines], "assumed": assumed,
                "times": times(config, cfg, counts, machines, args.mean_response),
                "published": anchors(args.mfu)}
    common.save(args, results)


def named(phases):
    """What `step` counts, with keys that JSON has."""
    found = []
    for phase in phases:
        found.append({f"{kind} over {n}": size for (kind, n), size in phase.items()})
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main()
