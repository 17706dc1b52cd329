"""Packed against padded training: the same model, sequences, head and threads; only how sequences lie in a
micro-batch differs.

    OMP_NUM_THREADS=1 python bench/packing.py

Forward and backward of the mean log-prob of the response tokens of each micro-batch, for one set of sequences
of each distribution of lengths, through the policy as training builds it (FSDP2, one process, blocks
recomputed) and token_logprobs on response tokens only.

  packed  micro-batches from packing.pack of at most --padded_batch times the longest length, the memory that
          padding must reserve
  padded  --padded_batch sequences a micro-batch, in the order drawn, right-padded to the longest of them;
          transformers' own sdpa attention with a mask (where nothing is padded, transformers drops the mask
          and takes the causal kernel)
  sorted  the same, but sequences sorted by length first (the Trainer's group_by_length at its best)

Lengths of responses: all half of --max_tokens; uniform from 1 to it; or a heavy tail as rollouts have it
(log-normal, median 0.18 of it, sigma 1: mean about 0.27, 4 % cut at the limit). Prompts are a sixteenth of
it. The three run in turn in each round; ratios are medians over rounds of sequences per second, packed to the
other, on a CPU by processor time. Before anything is timed, the three must give the same log-probs (within
1e-4) and gradients (1e-3 of their norm), or the bench stops.
"""
import math
import random
import statistics
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config

from common import parser, save, show, start, work_clock

import model as M
from support.intervals import positive
from support.logprobs import token_logprobs
from support.processes import init_distributed

SHAPES = {
    "3M": dict(vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
               num_attention_heads=6),
    "26M": dict(vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
                num_attention_heads=8),
    "tiny": dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4)}
LENGTHS = ("constant", "uniform", "heavy tail")


def response_length(lengths, rng, longest):
    """Tokens of one response of this distribution."""
    if lengths == "constant":
        return longest // 2
    if lengths == "uniform":
        return rng.randint(1, longest)
    return max(1, min(longest, round(longest * 0.18 * math.exp(rng.gauss(0, 1)))))


def draw(lengths, count, longest, vocab):
    """`count` sequences whose responses have these lengths."""
    rng = random.Random(0)

    def tokens(n):
        return [rng.randrange(vocab) for _ in range(n)]

    sequences = []
    for _ in range(count):
        prompt = tokens(max(1, longest // 16))
        sequences.append(M.Sequence(prompt, tokens(response_length(lengths, rng, longest))))
    return sequences


def build(shape, mesh, device):
    """The policy of training with random weights, always the same, large enough that attention matters."""
    config = Qwen2Config(**SHAPES[shape], num_key_value_heads=2, max_position_embeddings=32768,
                         tie_word_embeddings=True, use_cache=False)
    policy, generator = M.build_policy(config, mesh, device), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            local = p.to_local()                     # one process: the whole parameter
            if "norm" in name:
                local.fill_(1.0)
            else:
                local.copy_(0.04 * torch.randn(local.shape, generator=generator))
    return policy


def padded_forward(policy, batch):
    """What Policy.forward does, for (ids, mask, rows, columns, targets) of right-padded sequences."""
    ids, mask, rows, columns, targets = batch
    hidden = policy.lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return token_logprobs(hidden[rows, columns], policy.lm.get_output_embeddings().weight, targets)


def pad(sequences, device):
    """Sequences -> the batch of padded_forward, on the device."""
    ids = pad_sequence([torch.tensor([*s.prompt, *s.response]) for s in sequences], batch_first=True)
    mask = pad_sequence([torch.ones(len(s), dtype=torch.int64) for s in sequences], batch_first=True)
    where = []                      # row, column, target of each response token; the column predicts the next
    for row, s in enumerate(sequences):
        for column, token in enumerate(s.response, len(s.prompt) - 1):
            where.append((row, column, token))
    rows, columns, targets = torch.tensor(where).T
    return [x.to(device) for x in (ids, mask, rows, columns, targets)]


def split(sequences, size):
    return [sequences[i:i + size] for i in range(0, len(sequences), size)]


def log_probs(policy, batch):
    """(R,) log-probs of the response tokens of a micro-batch, sequence after sequence."""
    if isinstance(batch, M.Batch):
        return torch.cat([x[:n] for x, n in zip(policy(batch)[0], batch.lengths)])
    return policy(batch)[0]


def run(policy, batches, device):
    """Seconds of forward and backward of all micro-batches; gradients add up."""
    began = work_clock(device)
    for batch in batches:
        log_probs(policy, batch).mean().backward()
    return work_clock(device) - began


def outputs(policy, micro_batches, batches):
    """({id of a sequence: its log-probs}, all gradients of their sum in one vector)."""
    policy.zero_grad()
    found = {}
    for sequences, batch in zip(micro_batches, batches):
        logp = log_probs(policy, batch)
        logp.sum().backward()
        of_each = logp.split([len(s.response) for s in sequences])
        for s, x in zip(sequences, of_each):
            found[id(s)] = x.detach()
    return found, torch.cat([p.grad.to_local().flatten() for p in policy.parameters()])


def check(ways):
    """Abort unless every way gives the log-probs of the first, and its gradient. ways: {name: (policy,
    micro-batches of sequences, batches)} -> the largest differences found."""
    reference, worst = None, {"logp": 0.0, "gradient": 0.0}
    for name, (policy, micro_batches, batches) in ways.items():
        logp, gradient = outputs(policy, micro_batches, batches)
        if reference is None:
            reference = logp, gradient
        apart = [(logp[s] - x).abs().max().item() for s, x in reference[0].items()]
        here = {"logp": max(apart),
                "gradient": ((gradient - reference[1]).norm() / reference[1].norm()).item()}
        worst = {key: max(worst[key], here[key]) for key in worst}
        if not (here["logp"] < 1e-4 and here["gradient"] < 1e-3):
            raise RuntimeError(f"{name} computes something else: {here}")
    return worst


def measure(shape, lengths, packed, padded, args, device):
    """Results of one distribution of lengths, for the JSON file. packed, padded: the model, built twice."""
    sequences = draw(lengths, args.sequences, args.max_tokens, SHAPES[shape]["vocab_size"])
    budget = args.padded_batch * max(map(len, sequences))
    packs = [pack for pack in M.pack(sequences, budget) if pack]
    ways = {"packed": (packed, packs, [M.collate(pack, device) for pack in packs])}
    for name, order in (("padded", sequences), ("sorted", sorted(sequences, key=len))):
        parts = split(order, args.padded_batch)
        ways[name] = padded, parts, [pad(part, device) for part in parts]
    differences = check(ways)
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: run(policy, batches, device) for name, (policy, _, batches) in ways.items()})
    tokens, filled, seconds = sum(map(len, sequences)), {}, {}
    for name, (_, _, batches) in ways.items():
        room = sum(b.ids.numel() if name == "packed" else b[0].numel() for b in batches)
        filled[name] = tokens / room
        seconds[name] = statistics.median(r[name] for r in rounds)
    speedup = {}
    for name in ("padded", "sorted"):
        speedup[name] = statistics.median(r[name] / r["packed"] for r in rounds)
    return {"shape": shape, "lengths": lengths, "tokens": tokens, "seconds": seconds, "speedup": speedup,
            "filled": filled, "differences": differences, "rounds": rounds}


def table_row(found, count):
    """Of what `measure` found on `count` sequences."""
    filled, speedup, differences = found["filled"], found["speedup"], found["differences"]
    per_second = [f"{count / seconds:.1f}" for seconds in found["seconds"].values()]
    return [found["shape"], found["lengths"], f"{found['tokens']:,}",
            f"{filled['padded']:.0%}", f"{filled['sorted']:.0%}", *per_second,
            f"{speedup['padded']:.2f}", f"{speedup['sorted']:.2f}",
            f"{differences['logp']:.0e}", f"{differences['gradient']:.0e}"]


def main(argv=None):
    p = parser(__doc__, "packing")
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["3M", "26M"], help="models [%(default)s]")
    p.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS),
                   help="distributions [%(default)s]")
    p.add_argument("--sequences", type=positive, default=32, help="sequences of a distribution [%(default)s]")
    p.add_argument("--max_tokens", type=positive, default=256, help="longest response [%(default)s]")
    p.add_argument("--padded_batch", type=positive, default=8,
                   help="sequences of a padded micro-batch (8: TRL) [%(default)s]")
    p.add_argument("--rounds", type=positive, default=3, help="runs of each way, in turn [%(default)s]")
    args = p.parse_args(argv)
    start(args)
    results = []
    *_, device, mesh = init_distributed(args.device)
    try:
        for shape in args.shapes:
            packed, padded = build(shape, mesh, device), build(shape, mesh, device)
            padded.lm.set_attn_implementation("sdpa")
            padded.forward = partial(padded_forward, padded)         # FSDP2 hooks the call, not the method
            for lengths in args.lengths:
                results.append(measure(shape, lengths, packed, padded, args, device))
    finally:
        dist.destroy_process_group()
    show("Forward and backward, sequences per second; how much faster packed is",
         ["model", "lengths", "tokens", "padded full", "sorted full", "packed/s", "padded/s", "sorted/s",
          "x padded", "x sorted", "diff log p", "diff grad"],
         [table_row(found, args.sequences) for found in results])
    save(args, results)
    return results


if __name__ == "__main__":
    main()
