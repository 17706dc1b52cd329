"""Will it fit, with which flags, and how long does a step take? For anybody's cards, on a CPU.

    python srft.py --dry_run                                   # the paper's 7B run on 8 x 80 GB
    python srft.py --dry_run --dry_run_cards 1x24 --model DIR  # DIR needs nothing but a config.json
    python srft.py --dry_run --dry_run_cards 64x80             # 8 nodes of 8: HSDP

Memory is simulated (bench/plan.py), times are modelled (bench/steptime.py), flags searched (bench/search.py).
"""
import os

from bench import plan, search, steptime
from bench.plan import GIB, NODE
from config import check_config, keeps_own_rope, recomputed_blocks, sequences_per_prompt
from rollout import kv_bytes

HOST = 6 * GIB           # assumed, of host memory, a rank: Python, torch, CUDA, vLLM, the grader, the data


def show(cfg):
    """Print the plan of `cfg` for --dry_run_cards; on rank 0 only. Raises FileNotFoundError without a model
    config, ValueError for what could not run."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    cards = search.read_cards(cfg.dry_run_cards)
    config, source = plan.read_config(cfg.model, cfg.rope_theta, cfg.window, keeps_own_rope(cfg))
    check_config(cfg, cards.number, config.max_position_embeddings)
    print(f"simulating two training steps on {cards} (half a minute at 7B) ...", flush=True)
    memory = plan.simulate(config, cfg, cards.number)
    print("\n".join(report(config, cfg, memory, source, cards)), flush=True)
    print("\nsearching for better flags (a minute at 7B) ...\n", flush=True)
    print("\n".join(advice(config, cfg, memory, cards)), flush=True)


def report(config, cfg, memory, source, cards):
    """The lines of the plan as it was asked for."""
    rows, used, kv = plan.budget(cfg, memory, cards.memory)
    room = kv / kv_bytes(config)                                                  # tokens
    fill = []
    for prompt, response in lengths(cfg).values():
        fill.append(f"{int(room / (prompt + response)):,} sequences of {prompt + response:,}")
    return ["", *lines_of_run(config, cfg, memory, source, cards), "", *lines_of_tokens(cfg, cards), "",
            *lines_of_memory(rows, used, cards),
            f"vLLM's share: {2 * memory['parameters'] / GIB:.2f} weights, {plan.graphs(cfg) / GIB:.2f} CUDA "
            f"graphs and {plan.WORKSPACE / GIB:.2f} workspace",
            f"  (both assumed), KV cache of {room:,.0f} tokens: {' or '.join(fill)}",
            *lines_of_host(cfg, memory, cards), "",
            *verdicts(config, cfg, memory, cards), "",
            *lines_of_time(config, cfg, memory, cards)]


def lengths(cfg):
    """(prompt, response) tokens of the two kinds of step that are planned."""
    prompt, response = plan.TYPICAL
    longest = cfg.max_prompt_tokens, cfg.max_response_tokens
    return {"worst case": longest, "typical": (min(prompt, longest[0]), min(response, longest[1]))}


def lines_of_run(config, cfg, memory, source, cards):
    """The model, the mesh, the sequences of a step."""
    def number(name):
        return f"{memory[name] / 1e9:.2f} B" if memory[name] >= 1e8 else f"{memory[name]:,}"

    nodes, shard = max(1, cards.number // NODE), min(cards.number, NODE)
    mesh = f"x {nodes} copies, HSDP" if nodes > 1 else "FSDP2"
    blocks = config.num_hidden_layers
    rollouts, demos = sequences_per_prompt(cfg)
    sequences = cfg.prompts_per_step * (rollouts + demos)
    return [f"model       {source}",
            f"parameters  {number('parameters')}, {number('vocabulary')} of them embedding and head",
            f"mesh        {cards.number} ranks, shard {shard} ({mesh}); fp32 master weights, bf16 compute, "
            f"{recomputed_blocks(cfg, blocks)} of {blocks} blocks recomputed",
            f"one step    {cfg.prompts_per_step} prompts x ({rollouts} rollouts + {demos} demonstration) = "
            f"{sequences:,} sequences"]


def lines_of_tokens(cfg, cards):
    """The table of tokens and micro-batches, for typical and for the longest responses."""
    lines = [f"{'Tokens a step (prompt + response)':<36}{'tokens':>12}  micro-batches of "
             f"{cfg.micro_batch_tokens:,}"]
    for name, (prompt, response) in lengths(cfg).items():
        _, tokens, packs = plan.tokens_per_step(cfg, cards.number, prompt + response)
        lines.append(f"  {f'{name}: {prompt:,} + {response:,}':<34}{tokens:>12,}  {packs:,} a rank")
    return lines


def lines_of_memory(rows, used, cards):
    """The table of `budget`, its sums, and what they leave of the card."""
    def gib(size):
        return f"{size / GIB:12.2f}" if size else f"{'-':>12}"

    training, generating = used
    left = f"left of {cards.memory / 1e9:g} GB = {cards.memory / GIB:.1f} GiB"
    rows = [*rows, ("total", training, generating),
            (left, cards.memory - training, cards.memory - generating)]
    lines = [f"{'Memory a rank, GiB':<36}{'training':>12}{'generating':>12}"]
    for name, training, generating in rows:
        if training or generating:
            lines.append(f"  {name:<34}{gib(training)}{gib(generating)}")
    return lines


def host_memory(memory, cards):
    """Bytes of host memory of a node."""
    return min(cards.number, NODE) * (HOST + memory["host"]) + 2 * memory["parameters"]


def lines_of_host(cfg, memory, cards):
    """Host memory of a node, and disk."""
    weights = 2 * memory["parameters"]                                                           # in bf16
    parts = [f"{HOST / GIB:.0f} a rank (assumed)"]
    if memory["host"]:
        parts.append(f"{memory['host'] / GIB:.2f} a rank for weights, optimizer, gradients (--offload)")
    parts.append(f"{weights / GIB:.1f} for the export at the end")
    return [f"host memory {host_memory(memory, cards) / GIB:.0f} GiB a node: {', '.join(parts)}",
            f"on disk     {12 * memory['parameters'] / 1e9:,.0f} GB a checkpoint; {cfg.keep + 1} at a time "
            f"with --keep {cfg.keep}; {weights / 1e9:,.0f} GB the model at the end"]


# ----------------------------------------------------------------------------------------------------------
# Does it fit, how long does it take, and what would be better?

def verdicts(config, cfg, memory, cards):
    """A line of each phase."""
    _, (training, generating), room = plan.budget(cfg, memory, cards.memory)
    lines = [verdict("training", training, plan.RESERVE * cards.memory, cards),
             verdict("generating", generating, 0, cards)]
    if room < (cfg.max_prompt_tokens + cfg.max_response_tokens) * kv_bytes(config):
        lines.append("engine      DOES NOT FIT: no KV cache for one whole sequence")
    return lines


def verdict(phase, used, reserve, cards):
    """One phase's line. reserve: what it should leave free, all in bytes."""
    size = f"{cards.memory / 1e9:g} GB"
    if used > cards.memory:
        return f"{phase:<12}DOES NOT FIT {size}, {(used - cards.memory) / GIB:.1f} GiB over"
    fits = f"fits {size}"
    if used + reserve > cards.memory:
        fits = f"fits {size}, but too tightly for an allocator that fragments"
    return f"{phase:<12}{fits}, {(cards.memory - used) / GIB:.1f} GiB to spare"


def lines_of_time(config, cfg, memory, cards):
    """A step's time, and what the model of it assumes of these cards."""
    m = steptime.machine(cards.number, cards.memory, cfg.offload)
    counts, (prompt, response) = plan.counts(config, memory), lengths(cfg)["typical"]
    typical = steptime.step_time(m, config, cfg, counts, response)
    worst = steptime.step_time(m, config, cfg, counts)["step"]
    phases = ("generate", "train", "exposed communication", "AdamW", "sync")
    split = ", ".join(f"{name} {typical[name]:.0f}" for name in phases)
    hours = cfg.steps / 3600
    return [f"A step takes {typical['step']:,.0f} s at typical lengths ({prompt:,} + {response:,} tokens on "
            f"average), {worst:,.0f} s with all at the limit",
            f"  (modelled, not measured, about a fifth too short beside published steps); {cfg.steps} steps "
            f"{hours * typical['step']:,.0f} to {hours * worst:,.0f} hours",
            f"  seconds, typical: {split}",
            f"  assumed: {m.name}; {m.flops / 1e12:g} TFLOP/s in bf16, {m.mfu:.0%} of it in training, with "
            "what is recomputed; GB/s:",
            f"  {speeds(m)}",
            "  all else as bench/scale.py prints it"]


def speeds(m):
    """Where bytes move, and how fast, by the links that this machine uses."""
    found = [f"{m.hbm / 1e9:,.0f} from its memory, {m.decode:.0%} of it in decoding"]
    if m.cards > 1:
        found.append(f"{m.nvlink / 1e9:,.0f} to the other cards of its node")
    if m.cards > NODE:
        found.append(f"{m.network / 1e9:,.0f} to other nodes")
    if m.offload:
        found.append(f"{m.pcie / 1e9:,.0f} to the host")
    return ", ".join(found)


def advice(config, cfg, memory, cards):
    """The lines that name better flags: those that fit, or are faster. memory: of `cfg`."""
    fits = search.fits(config, cfg, cards, memory)
    activations = search.Activations(config, cfg, cards.number)
    found = search.propose(config, cfg, cards, memory, activations)
    if fits and (found is None or found[0] == cfg):
        return ["It fits as it is, and none of the flags that were searched makes a step faster "
                f"({', '.join('--' + name for name in search.SEARCHED)})."]
    if found:
        why = "It fits as it is. A step is modelled to be faster with" if fits else "It fits with"
        return proposal(why, config, cfg, found, cards)
    found = search.propose_shorter(config, cfg, cards, memory, activations)
    if found:
        return proposal(
            "No flags make it fit as it is. With shorter responses it fits; that changes what is learned,\n"
            "so it is yours to decide: longer rollouts are cut, longer demonstrations dropped. With",
            config, cfg, found, cards)
    return ["No flags make it fit these cards: take more of them, larger ones, or a smaller model."]


def proposal(why, config, cfg, found, cards):
    """What to paste, and what it gives."""
    proposed, memory = found
    return [why, "", f"    {search.flags(cfg, proposed)}", "",
            *verdicts(config, proposed, memory, cards), *lines_of_host(proposed, memory, cards)[:1],
            *lines_of_time(config, proposed, memory, cards)[:3]]
