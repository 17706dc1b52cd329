"""What --recompute saves and costs: predicted, and measured on the ranks of a CPU.

    python bench/recompute.py

Memory: the peak of one update on 1 and 2 ranks (gloo, fp32), for all, half and none of the blocks, beside
plan.simulate. Time: forward and backward of the same micro-batch by the three in turn, in one process, as
ratios to recomputing all, beside the ratio of their FLOPs by steptime.recomputed_share.
"""
import sys
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from transformers import Qwen2Config

import common

import model as M
from bench import plan, steptime
from config import Config, recomputed_blocks
from support.intervals import positive
from support.processes import init_distributed

# More activations than weights: 8 blocks of a Qwen2.5's proportions, and thousands of tokens.
SHAPE = Qwen2Config(hidden_size=256, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=4096, tie_word_embeddings=False, use_cache=False)
CFG = Config(max_prompt_tokens=128, max_response_tokens=448, micro_batch_tokens=2048)
WAYS = ("all", "4", "none")


def policy_of(recompute, mesh, device, config=SHAPE):
    """A policy with random weights that recomputes so many blocks."""
    blocks = recomputed_blocks(replace(CFG, recompute=recompute), config.num_hidden_layers)
    policy = M.build_policy(config, mesh, device, blocks, bf16=False)
    with torch.no_grad():
        for p in policy.parameters():
            p.to_local().normal_(0, 0.02)
    return policy


def backward(policy, batch):
    policy(batch)[0].sum().backward()


def worker(out, recompute):
    """One rank: the peak of an update of two micro-batches, as plan.simulate counts it; rank 0 writes it."""
    rank, world, device, mesh = init_distributed("cpu")

    def update(config):
        policy = policy_of(recompute, mesh, device, config)
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        batch = M.collate(plan.full_micro_batch(CFG), device)
        for last in (True, False, True):                   # the first makes the optimizer's state
            M.accumulate(policy, last)
            backward(policy, batch)
            if last:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    update(Qwen2Config.from_dict(SHAPE.to_dict() | dict(hidden_size=64, intermediate_size=64)))   # libraries
    with common.PeakMemory(device) as memory:
        update(SHAPE)
    every = [None] * world
    dist.all_gather_object(every, memory.gb)
    if rank == 0:
        torch.save(max(every), out)
    dist.barrier()
    dist.destroy_process_group()


def measured(world, recompute):
    """GB of a rank, from `worker`."""
    return common.on_ranks(world, __file__, recompute)


def memory(worlds=(1, 2)):
    """Rows of ranks, blocks recomputed, predicted and measured GB, and how far they are apart."""
    rows = []
    for world in worlds:
        for recompute in WAYS:
            cfg = replace(CFG, recompute=recompute)
            predicted = plan.simulate(SHAPE, cfg, world, bf16=False)["peak"] / 1e9
            found = measured(world, recompute)
            rows.append([world, recompute, predicted, found, found / predicted - 1])
    return rows


def times(device, repetitions):
    """Rows of blocks recomputed, seconds, and the ratio to all: measured, and of the FLOPs."""
    _, _, _, mesh = init_distributed(device.type)
    sequences = plan.full_micro_batch(CFG)
    batch = M.collate(sequences, device)
    policies = {recompute: policy_of(recompute, mesh, device) for recompute in WAYS}
    flops = policies["all"].flops(sequences)

    def seconds(recompute):
        began = common.work_clock(device)
        backward(policies[recompute], batch)
        took = common.work_clock(device) - began
        policies[recompute].zero_grad(set_to_none=True)
        return took

    def work(recompute):
        return 1 + steptime.recomputed_share(SHAPE, replace(CFG, recompute=recompute), sequences, flops)

    rows = []
    for recompute in WAYS[1:]:
        found = common.alternate(partial(seconds, "all"), partial(seconds, recompute), repetitions)
        rows.append([recompute, *found, work(recompute) / work("all")])
    dist.destroy_process_group()
    return rows


def main():
    p = common.parser(__doc__, "recompute")
    p.add_argument("--repetitions", type=positive, default=5, help="of each way, in turn [%(default)s]")
    p.set_defaults(device="cpu")
    args = p.parse_args()
    device = common.start(args)
    found = {"memory": memory(), "times": times(device, args.repetitions)}
    shown = [[*row[:-1], f"{row[-1]:+.1%}"] for row in found["memory"]]
    common.show(f"Peak of a rank, GB: {SHAPE.num_hidden_layers} blocks, {CFG.micro_batch_tokens:,} tokens",
                ["ranks", "--recompute", "predicted", "measured", "measured / predicted - 1"], shown)
    common.show("Forward and backward, processor seconds, and ratio to recomputing all",
                ["--recompute", "all, s", "this, s", "ratio", "ratio of FLOPs"], found["times"])
    common.save(args, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
