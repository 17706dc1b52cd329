"""The paper's measurements and figures, from models and run folders. Each writes a PNG and a JSON of what it
shows.

    python -m paper.figures respond --model BASE --data FILE --out base.jsonl   # responses, for the others
    python -m paper.figures fig2a --base BASE --tuned out/srft --data FILE      # one response, by tokens (A1)
    python -m paper.figures fig2b --base BASE --tuned SFT=out/sft RL=out/grpo SRFT=out/srft --data FILE,FILE
    python -m paper.figures fig3  --references base=base.jsonl R1=r1.jsonl QwQ=qwq.jsonl --runs SRFT=out/srft
    python -m paper.figures fig4  "SFT->RL=out/sft+out/sft-rl" "RL->SFT=out/grpo+out/rl-sft"
    python -m paper.figures fig5  RL=out/grpo "SFT->RL=out/sft+out/sft-rl" SFT+RL=out/both
    python -m paper.figures fig6  RL=out/grpo SRFT=out/srft
    python -m paper.figures figA2 RL=out/grpo truncated=out/grpo-q80
    python -m paper.figures terms SRFT=out/srft                                 # gradient norm of each term

A model is a Hugging Face folder, a hub name, or a run's folder. A curve, LABEL=RUN+RUN,RUN+RUN, is a run or a
sequence of runs (each started from the one before), with more seeds after commas: their mean is drawn, and
their range. Models of any size are read through FSDP2, which spreads them over eight cards by

    torchrun --local_addr=127.0.0.1 --nproc_per_node=8 -m paper.figures ...

What the paper leaves open about Fig. 2, and its reviewers ask: whose response it is (--responses: the
demonstrations of --data, or what `respond` sampled from the base or the tuned model), which log-probs (both
models score the very same tokens, token by token, at temperature 1, given prompt and prefix), and the colours
(--scale: the change of probability p_tuned - p_base, in [-1, 1], or of log p in nats).
"""
import support.startup  # noqa: F401  (before torch)

import html
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import model as M
from data import TEMPLATES, check_vocabulary, load_examples, tokenize
from rollout import RolloutEngine, check_environment
from support.checkpoint import verify_checkpoint
from support.collectives import of_all_ranks
from support.flags import Parser
from support.hub import fetch
from support.intervals import number_in, positive
from support.inventory import Inventory
from support.processes import init_distributed, mistakes_in_one_line
from support.runlog import read_rows
from support.versions import check_versions, versions
from support.weights import stored_tensors

# ----------------------------------------------------------------------------------------------------------
# Models, and the probabilities that they give to responses.


def model_folder(name):
    """A Hugging Face folder, hub name or run's folder -> the folder to load."""
    if (Path(name) / "metrics.jsonl").exists():
        if not (Path(name) / "hf").is_dir():
            raise ValueError(f"{name}: this run has no hf/ yet; it is written when training ends")
        return str(Path(name) / "hf")
    return fetch(name, "model", "the model")


class Scorer:
    """log p of every token of a response, under one architecture with weights that change: a folder's, a
    checkpoint's."""

    def __init__(self, folder, mesh, device, args):
        config = M.load_config(folder, args.rope_theta, args.window)
        self.policy = M.load_policy(folder, config, mesh, device).eval()
        # Sequences packed into one row must not see each other; an architecture may break that in silence.
        M.check_packing(self.policy, device, config.vocab_size)
        self.device, self.tokens = device, args.micro_batch_tokens

    def load_checkpoint(self, path):
        """The weights of checkpoints/step-N, without its optimizer."""
        verify_checkpoint(path)
        # dcp.load writes into these tensors, which are the policy's own shards.
        state = {"model": {name: p.detach() for name, p in self.policy.named_parameters()}}
        dcp.load(state, checkpoint_id=str(path))

    @torch.no_grad()
    def __call__(self, sequences):
        """Sequences -> a float32 array of log p of the response's tokens (nats, temperature 1) for each, in
        order. A collective: each rank scores its share of the micro-batches."""
        rank, world = dist.get_rank(), dist.get_world_size()
        # pack() deals the sequences out in an order of its own; each is found again by its identity.
        place = {id(sequence): i for i, sequence in enumerate(sequences)}
        mine = {}
        # As many micro-batches on every rank, if need be empty ones: each forward gathers shards, and all
        # ranks must take part.
        for batch in M.pack(sequences, self.tokens, world)[rank::world]:
            logp = self.policy(M.collate(batch, self.device))[0].float().cpu().numpy()            # (B,T)
            for sequence, row in zip(batch, logp):
                mine[place[id(sequence)]] = row[:len(sequence.response)]
        self.policy.reshard()          # a forward without backward leaves FSDP2's root gathered
        found = {}
        for part in of_all_ranks(mine):
            found.update(part)
        return [found[i] for i in range(len(sequences))]


def respond(args, mesh, device):
    """One response of --model to each problem, sampled at temperature 1 by vLLM, with the log-probs of its
    tokens."""
    check_environment(device)
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = model_folder(args.model)
    config = M.load_config(folder, args.rope_theta, args.window)
    longest, window = args.max_prompt_tokens + args.max_response_tokens, config.max_position_embeddings
    if longest > window:
        raise ValueError(f"--max_prompt_tokens + --max_response_tokens is {longest}, over the window of "
                         f"{window} tokens: lower them, or raise --window")
    tokenizer = M.load_tokenizer(folder)
    prompts = read_prompts(args, tokenizer)
    check_vocabulary(prompts, tokenizer, config.vocab_size)
    engine = RolloutEngine(
        config, tokenizer, M.compute_dtype(device), longest, 128, gpu_memory_utilization=0.9)
    engine.sync_weights(stored_tensors(folder), 0)         # the engine reads no folder itself
    # Seeds of all prompts, before they are dealt: what is sampled does not depend on the number of ranks.
    seeds = np.random.SeedSequence(args.seed).generate_state(len(prompts), np.uint64).tolist()
    mine = [prompt.ids for prompt in prompts[rank::world]]
    groups = engine.generate(mine, 1, 1.0, args.max_response_tokens, seeds[rank::world], progress=rank == 0)
    everyone = of_all_ranks([group[0] for group in groups])
    dist.barrier()                     # no rank closes its connections while another still talks to it
    engine.close()                                                      # takes the process group with it
    if rank != 0:
        return {}
    lines = []
    for i, prompt in enumerate(prompts):
        rollout = everyone[i % world][i // world]                       # prompt i went to rank i mod world
        lines.append(json.dumps({"id": prompt.example.id, "prompt": prompt.ids, "response": rollout.tokens,
                                 "logp": rollout.logprobs, "text": rollout.text}) + "\n")
    return {"jsonl": "".join(lines)}


def read_responses(file):
    """What `respond` wrote -> (Sequences, log p of their tokens under the model that sampled them)."""
    sequences, logp = [], []
    try:
        for line in Path(file).read_text().splitlines():
            row = json.loads(line)
            sequences.append(M.Sequence(row["prompt"], row["response"]))
            logp.append(np.array(row["logp"], np.float32))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a file of `python -m paper.figures respond` ({error!r})") from None
    return sequences, logp


def read_prompts(args, tokenizer, need_demo=False):
    """The prompts of --data (files, folders or tiny:NAME, separated by commas), at most --limit of each."""
    if not args.data:
        raise ValueError("--data: which problems? A file, a folder or tiny:NAME")
    prompts = []
    for source in args.data.split(","):
        name = source if source.startswith("tiny:") else fetch(source, "dataset", "--data")
        inventory = Inventory(f"--data {source}")
        examples = load_examples(name, inventory=inventory)
        found = [example for example in examples if example.demo or not need_demo]
        if not found:
            raise ValueError(f"--data {source}: no example has a demonstration; "
                             "pass --responses FILE, of `respond`")
        prompts += tokenize(found[:args.limit], tokenizer, args.template, args.max_prompt_tokens,
                            args.max_response_tokens, inventory)
        for remark in inventory.remarks():
            print(f"--data {source}: {remark}")
    return prompts


def responses(args, source, tokenizer):
    """The sequences that fig2a and fig2b look at: demonstrations of --data, or those of a file."""
    if source != "demo":
        sequences, _ = read_responses(source)
        return sequences[:args.limit]
    return [M.Sequence(prompt.ids, prompt.demo) for prompt in read_prompts(args, tokenizer, need_demo=True)]


def share(base, tuned, more_than):
    """The share of tokens whose probability changed by more than `more_than`. base, tuned: log p of each."""
    if not len(base):
        return 0.0
    return float(np.mean(np.abs(np.exp(tuned) - np.exp(base)) > more_than))


# ----------------------------------------------------------------------------------------------------------
# Fig. 2(a), A1: one response as a heat map.

COLOURS = {"up": (33, 102, 172), "down": (178, 24, 43)}          # more, and less probable than before


def fig2a(args, mesh, device):
    """A heat map of the first response that --data and --responses give."""
    label, name = named(args.tuned)[0]
    base, tuned = model_folder(args.base), model_folder(name)
    tokenizer = M.load_tokenizer(base)
    args.limit = 1
    sequence = responses(args, args.responses[0], tokenizer)[0]
    # log p of each token of the response, the same tokens under both models.
    [before] = Scorer(base, mesh, device, args)([sequence])
    [after] = Scorer(tuned, mesh, device, args)([sequence])
    tokens = [tokenizer.decode([token]) for token in sequence.response]
    title = f"{label} against base, response: {args.responses[0]}"

    def draw(file):
        draw_heatmap(file, tokens, before, after, args.scale, title)

    return {"json": {"tokens": tokens, "logp_base": before.tolist(), "logp_tuned": after.tolist(),
                     "changed by more than 0.1": share(before, after, 0.1),
                     "changed by more than 0.5": share(before, after, 0.5)},
            "html": heatmap(tokens, before, after, args.scale, title),
            "png": draw}


def changes(base, tuned, scale):
    """(change of each token, the widest of the colour scale) of log probs, by --scale."""
    if scale == "probability":
        return np.exp(tuned) - np.exp(base), 1.0
    return tuned - base, max(1.0, float(np.abs(tuned - base).max()))


def colour(change, widest):
    """rgba of a change in [-widest, widest]: blue for up, red for down, the darker the larger."""
    r, g, b = COLOURS["up" if change > 0 else "down"]
    return r, g, b, min(1.0, abs(change) / widest)


def css(change, widest):
    """The same as a style: the background, and letters that can be read on it."""
    r, g, b, alpha = colour(change, widest)
    return f"background:rgba({r},{g},{b},{alpha:.3f});color:{'#fff' if alpha > 0.6 else '#111'}"


def heatmap(tokens, base, tuned, scale, title):
    """A self-contained HTML page: the response's tokens, coloured by how their probability changed.

    tokens: list of str; base, tuned: log p of each under the two models; scale: "probability" or "log".
    """
    change, widest = changes(base, tuned, scale)
    spans = []
    for i, token in enumerate(tokens):
        # A model wrote this text: it must reach the page as text. A newline and nothing at all get a sign.
        shown = html.escape(token).replace("\n", "\u21b5\n") or "\u2205"
        hint = f"{html.escape(repr(token))}: base {np.exp(base[i]):.4f}, tuned {np.exp(tuned[i]):.4f}"
        spans.append(f'<span style="{css(change[i], widest)}" title="{hint}">{shown}</span>')
    unit = "p_tuned - p_base" if scale == "probability" else "log p_tuned - log p_base, nats"
    legend = []                                            # the scale, by a few of its colours
    for part in (-1, -0.5, -0.1, 0.1, 0.5, 1):
        style = f"{css(part * widest, widest)};padding:0 .8em"
        legend.append(f'<span style="{style}">{part * widest:+.2g}</span>')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body{{font:16px/1.7 ui-monospace,monospace;max-width:60em;margin:2em auto;padding:0 1em}}
body{{color:#111;background:#fff}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font:inherit}}
pre span{{border-radius:2px}} p{{font-family:sans-serif}}
</style>
</head><body><h1 style="font:600 1.2em sans-serif">{html.escape(title)}</h1>
<p>Colour: {unit}, from {"".join(legend)}. Point at a token for its two probabilities.
Changed by more than 0.1: {share(base, tuned, 0.1):.1%} of {len(tokens)} tokens;
by more than 0.5: {share(base, tuned, 0.5):.1%}.</p>
<pre>{"".join(spans)}</pre></body></html>
"""


def draw_heatmap(file, tokens, base, tuned, scale, title):
    """The same as a picture, of its first 60 lines."""
    change, widest = changes(base, tuned, scale)
    lines = wrapped(tokens, change)[:60]
    columns = max([48, *map(width, lines)])
    figure = new_figure(0.12 * columns, 0.6 + 0.26 * len(lines))
    axes = figure.subplots()
    axes.set(xlim=(0, columns + 1), ylim=(len(lines), 0), title=title)         # a unit a letter; y goes down
    axes.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for token, token_change in line:
            *rgb, alpha = colour(token_change, widest)
            ground = [part / 255 for part in rgb] + [alpha]
            axes.add_patch(rectangle((x, y), len(token), 0.92, color=ground, linewidth=0))
            ink = "white" if alpha > 0.6 else "black"
            for k, letter in enumerate(token):
                # To matplotlib, text between two $ is a formula.
                axes.text(x + k + 0.5, y + 0.5, letter.replace("$", r"\$"), family="monospace", fontsize=9,
                          ha="center", va="center", color=ink)
            x += len(token)
    save_figure(figure, file)


def wrapped(tokens, change):
    """Tokens with their changes -> lines, each a list of (token, change), broken at newlines and before the
    91st letter."""
    lines, line = [], []
    for token, token_change in zip(tokens, change):
        if width(line) + len(token) > 90:
            lines.append(line)
            line = []
        line.append((token.replace("\n", "\u21b5"), token_change))
        if "\n" in token:
            lines.append(line)
            line = []
    lines.append(line)
    return lines


def width(line):
    """Letters of a line of (token, change)."""
    return sum(len(token) for token, _ in line)


# ----------------------------------------------------------------------------------------------------------
# Fig. 2(b): the distribution of changes.

def fig2b(args, mesh, device):
    """p_tuned - p_base of every response token, as a histogram for each tuned model."""
    base = model_folder(args.base)
    tuned = [(label, model_folder(name)) for label, name in named(args.tuned)]
    tokenizer = M.load_tokenizer(base)
    sources = args.responses
    if len(sources) == 1:
        sources = sources * len(tuned)
    if len(sources) != len(tuned):
        raise ValueError(f"--responses: one for all models, or one for each of the {len(tuned)}")
    found = {}
    for (label, folder), source in zip(tuned, sources):
        sequences = responses(args, source, tokenizer)
        # log p of all tokens. The base model is asked again for each source: the sequences differ.
        before = np.concatenate(Scorer(base, mesh, device, args)(sequences))
        after = np.concatenate(Scorer(folder, mesh, device, args)(sequences))
        found[label] = distribution(before, after)
    for label, row in found.items():
        say(f"{label:<16} {row['tokens']:>8,} tokens   mean |change| {row['mean |change|']:.3f}   "
            f"over 0.1: {row['changed by more than 0.1']:6.1%}   "
            f"over 0.5: {row['changed by more than 0.5']:6.1%}")

    def draw(file):
        draw_distributions(file, found, args.responses)

    return {"json": found, "png": draw}


def distribution(before, after):
    """Of log p of the same tokens under two models: how many, how far probabilities moved, a histogram."""
    change = np.exp(after) - np.exp(before)
    counts, edges = np.histogram(change, bins=81, range=(-1, 1))        # odd: a bin around no change
    return {"tokens": len(change), "mean |change|": float(np.abs(change).mean()),
            "changed by more than 0.1": share(before, after, 0.1),
            "changed by more than 0.5": share(before, after, 0.5),
            "share of each bin": (counts / max(1, len(change))).tolist(), "edges": edges.tolist()}


def draw_distributions(file, found, sources):
    """Fig. 2(b): the changes as histograms, one for each tuned model."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for label, row in found.items():
        over = (f"{row['changed by more than 0.1']:.1%} over 0.1, "
                f"{row['changed by more than 0.5']:.1%} over 0.5")
        axes.stairs(row["share of each bin"], row["edges"], label=f"{label}: {over}")
    # Most tokens hardly change: without a logarithm, the middle bin is all that one sees.
    axes.set(yscale="log", xlabel="p_tuned - p_base of a response's token", ylabel="share of tokens")
    axes.set_title("responses: " + ", ".join(Path(source).stem for source in sources), fontsize=9)
    axes.legend()
    save_figure(figure, file)


# ----------------------------------------------------------------------------------------------------------
# Fig. 3, App. E: trajectories in the space of distances to reference models.

def fig3(args, mesh, device):
    """For each checkpoint M of each run, d_R(M) to each reference R: the mean over R's responses, and in each
    over its tokens, of |p_M(token) - p_R(token)|. App. E says "the distance between the probabilities"; this
    is the plainest one, 0 for M = R and at most 1. p_R is what `respond` recorded. All models must share one
    tokenizer."""
    names, references = [], []                          # (R's responses, log p_R of their tokens) of each R
    for name, file in named(args.references):
        names.append(name)
        references.append(read_responses(file))
    found = {"references": names, "runs": {}}
    for label, stages in named(args.runs):
        found["runs"][label] = trajectory(stages.split("+"), references, mesh, device, args)

    def draw(file):
        draw_trajectories(file, found)

    return {"json": found, "png": draw}


def trajectory(runs, references, mesh, device, args):
    """[{"step", "distances"}] from the model that the first run started from, over each run's checkpoints.
    Steps are counted through the runs of a sequence."""
    path, first = [], 0                                                 # first: steps of the stages before
    for run in runs:
        # One model, whose weights become those of each checkpoint in turn.
        scorer = Scorer(model_folder(run), mesh, device, args)
        if not path:                                                    # where the first stage set out
            start = json.loads((Path(run) / "config.json").read_text())["model"]
            before = Scorer(model_folder(start), mesh, device, args)
            path.append({"step": 0, "distances": distances(before, references)})
        checkpoints = Path(run) / "checkpoints"
        steps = sorted(int(folder.name.removeprefix("step-")) for folder in checkpoints.glob("step-*"))
        if not steps:
            raise ValueError(f"{run}: no checkpoints; train with --save_every N --keep 99")
        for step in steps:
            scorer.load_checkpoint(checkpoints / f"step-{step}")
            path.append({"step": first + step, "distances": distances(scorer, references)})
        first += steps[-1]
    return path


def distances(scorer, references):
    """Eq. A11: [d_R(M) for each reference R], M the model of `scorer`. A collective."""
    found = []
    for sequences, own in references:
        of_each = []                                                    # response of R
        for ours, theirs in zip(scorer(sequences), own):
            of_each.append(np.abs(np.exp(ours) - np.exp(theirs)).mean())
        found.append(float(np.mean(of_each)))
    return found


def draw_trajectories(file, found):
    """The space of the three distances, and its three sides. A star is where a run ends."""
    figure = new_figure(12, 9)
    plots = [(figure.add_subplot(2, 2, 1, projection="3d"), (0, 1, 2))]
    for number, pair in enumerate([(0, 1), (0, 2), (1, 2)], 2):
        plots.append((figure.add_subplot(2, 2, number), pair))
    for axes, dimensions in plots:
        for label, path in found["runs"].items():
            points = np.array([point["distances"] for point in path])[:, dimensions]
            axes.plot(*points.T, marker="o", markersize=3, label=label)
            axes.plot(*points[-1:].T, marker="*", markersize=11, color=axes.lines[-1].get_color())
        for axis, dimension in zip("xyz", dimensions):
            axes.set(**{f"{axis}label": f"distance to {found['references'][dimension]}"})
    space, _ = plots[0]
    space.legend()
    save_figure(figure, file)


# ----------------------------------------------------------------------------------------------------------
# Fig. 4, 5, 6, A2, and the gradients of the loss terms: what runs logged, one curve a paradigm.

TERMS = {"sft_demo": "Eq. 8", "rl_demo": "Eq. 9", "rl_pos": "Eq. 12, left", "rl_neg": "Eq. 12, right"}
PANELS = {
    "fig4": ["accuracy", "entropy"],
    "fig5": ["accuracy", "length", "entropy"],
    "fig6": ["reward", "length", "entropy", "accuracy"],
    "figA2": ["accuracy", "reward", "entropy"],
    "terms": list(TERMS),
}
METRICS = {                             # panel: how its metrics begin in metrics.jsonl, its title
    "accuracy": ("eval/", "held-out accuracy"),
    "entropy": ("eval_entropy/", "entropy, nats a token"),
    "length": ("eval_len/", "response, tokens"),
    "reward": ("reward/mean", "training reward"),
}
for term, equation in TERMS.items():
    METRICS[term] = (f"grad_norm/{term}", f"gradient norm, {term} ({equation})")


def curves(args, *_):
    """Fig. 4, 5, 6, A2 and the terms' gradients: mean over seeds, shaded from the least to the most."""
    found = {}                                              # panel -> label -> curve
    for panel in PANELS[args.figure]:
        prefix, _ = METRICS[panel]
        found[panel] = {}
        for label, runs in named(args.curves):
            steps, mean, least, most = read_curves(runs, prefix)
            found[panel][label] = {"step": steps, "mean": mean, "least": least, "most": most}

    # SFT has no rewards, and a run without --eval_data no accuracy: a panel needs one curve, not all.
    measured, empty = [], []                                # panels, titles
    for panel, of_label in found.items():
        if any(curve["step"] for curve in of_label.values()):
            measured.append(panel)
        else:
            empty.append(METRICS[panel][1])
    flag = "--term_gradients" if args.figure == "terms" else "--eval_data"
    if not measured:
        raise ValueError(f"no run has any of {', '.join(empty)}: these are measured where srft.py gets "
                         f"{flag}")
    if empty:
        say(f"left out, since no run has it (train with {flag}): {', '.join(empty)}")
    for label, _ in named(args.curves):
        ends = []
        for panel in measured:
            mean = found[panel][label]["mean"]
            if mean:
                ends.append(f"{panel} {mean[-1]:.3f}")
        say(f"{label:<16} " + "   ".join(ends))

    def draw(file):
        draw_curves(file, {panel: found[panel] for panel in measured})

    return {"json": found, "png": draw}


def read_curves(seeds, prefix):
    """Runs of several seeds, "RUN+RUN,RUN+RUN" -> (steps, mean, least, most) over the steps that all of them
    have."""
    of_seeds = [dict(read_curve(run, prefix)) for run in seeds.split(",")]                  # step -> value
    # Seeds may have been evaluated at different steps; a mean over some of them would jump.
    steps = sorted(set.intersection(*map(set, of_seeds)))
    rows = []
    for curve in of_seeds:
        rows.append([curve[step] for step in steps])
    values = np.array(rows)                                                                 # (seeds, steps)
    return steps, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist()


def read_curve(run, prefix):
    """[(step, value)] of a run or a sequence of runs RUN+RUN, steps counted through; metrics that begin with
    `prefix` are averaged (the paper's average over benchmarks)."""
    points, first = [], 0
    for part in run.split("+"):
        rows = read_rows(Path(part) / "metrics.jsonl")
        if not rows:
            raise ValueError(f"{part}: no metrics.jsonl with a row; expected a run's folder")
        for row in rows:
            values = [row[key] for key in row if key.startswith(prefix) and row[key] is not None]
            # Step 0 of a later stage is the end of the stage before it, measured twice.
            if values and (row["step"] or not first):
                points.append((first + row["step"], float(np.mean(values))))
        first += rows[-1]["step"]
    return points


def draw_curves(file, panels):
    """panels: {panel: {label: curve}}, a subplot for each."""
    figure = new_figure(4.6 * len(panels), 4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (label, curve) in enumerate(panels[panel].items()):      # one colour a label in all panels
            if curve["step"]:
                axes.plot(curve["step"], curve["mean"], color=f"C{i}", marker="o", markersize=3, label=label)
                axes.fill_between(curve["step"], curve["least"], curve["most"], alpha=0.15, color=f"C{i}")
        axes.set(xlabel="step", title=METRICS[panel][1])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    save_figure(figure, file)


# ----------------------------------------------------------------------------------------------------------
# Pictures and the command line.

def new_figure(width, height):
    # No pyplot: no display, no global state.
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def rectangle(*args, **kwargs):
    from matplotlib.patches import Rectangle
    return Rectangle(*args, **kwargs)


def save_figure(figure, file):
    figure.savefig(file, dpi=110)


def say(text):
    """Print it once, whether there are several ranks or, as for curves, no process group at all."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def named(items):
    """["A=x", "B=y"] -> [("A", "x"), ("B", "y")]; a bare path is its own label."""
    pairs = []
    for item in items:
        label, equals, path = item.rpartition("=")
        if not equals:
            label = Path(item).name
        pairs.append((label, path))
    if len({label for label, _ in pairs}) < len(pairs):
        raise ValueError(f"two of {', '.join(items)} have one label: name them LABEL=PATH")
    return pairs


FIGURES = {"respond": respond, "fig2a": fig2a, "fig2b": fig2b, "fig3": fig3} | dict.fromkeys(PANELS, curves)


def parse(argv=None):
    """The command line; --help and FIGURE --help explain it. Exits with 2 on a mistake."""
    parser = Parser(prog="python -m paper.figures", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, function in FIGURES.items():
        one = figures.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        one.add_argument("--out", default=f"out/figures/{name}",
                         help="path of the files, without suffix [%(default)s]")
        if function is curves:
            one.add_argument("curves", nargs="+", metavar="LABEL=RUN",
                             help="RUN, RUN+RUN (a sequence), with more seeds after commas")
        else:
            add_figure_flags(one.add_argument, name)
            add_common_flags(one.add_argument)
    return parser.parse_args(argv)


def add_figure_flags(flag, name):
    """What one of the figures that read models asks. flag: add_argument of its parser."""
    if name == "respond":
        flag("--model", required=True, help="whose responses")
        flag("--seed", type=number_in(int, "[0, 4294967295]"), default=0, help="of sampling [%(default)s]")
    if name == "fig3":
        flag("--references", nargs=3, required=True, metavar="LABEL=FILE",
             help="responses of the three models that span the space, written by `respond` (paper: base, "
             "DeepSeek-R1, QwQ-32B)")
        flag("--runs", nargs="+", required=True, metavar="LABEL=RUN",
             help="runs with checkpoints; RUN+RUN a sequence")
    if name in ("fig2a", "fig2b"):
        several = 1 if name == "fig2a" else "+"
        flag("--base", required=True, help="the model before fine-tuning")
        flag("--tuned", nargs=several, required=True, metavar="LABEL=MODEL", help="after it")
        flag("--responses", nargs=several, default=["demo"], help="whose responses are scored: the "
             "demonstrations of --data, or a file of `respond`; for fig2b also one for each model [demo]")
    if name == "fig2a":
        flag("--scale", choices=("probability", "log"), default="probability",
             help="colour: the change of p, or of log p [%(default)s]")
    if name != "fig3":
        flag("--data", default="",
             help="problems (and demonstrations): files, folders, tiny:NAME, by commas")
        flag("--limit", type=positive, default=1024,
             help="problems of each file (App. E: 1,024) [%(default)s]")
        flag("--template", choices=tuple(TEMPLATES), default="paper", help="prompt template [%(default)s]")


def add_common_flags(flag):
    """What all figures that read models ask."""
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto",
         help="auto: the GPU if torch is built for one, else the CPU [%(default)s]")
    for option, default, within, meaning in (
            ("max_prompt_tokens", 1024, "[1, inf)", "longer prompts are dropped"),
            ("max_response_tokens", 8192, "[1, inf)", "longer demonstrations are dropped, responses cut"),
            ("micro_batch_tokens", 16_384, "[1, inf)", "packed tokens per forward"),
            ("rope_theta", 0.0, "[0, inf)", "RoPE theta; 0 keeps the model's own"),
            ("window", 0, "[0, inf)", "context window; 0 keeps the model's own")):
        flag(f"--{option}", type=number_in(type(default), within), default=default,
             help=f"{meaning} [%(default)s]")


def main(argv=None):
    """Make one figure: its function returns {suffix: content}, and rank 0 writes each to --out."""
    args, mesh, device = parse(argv), None, None
    figure = FIGURES[args.figure]
    try:
        with mistakes_in_one_line("paper/figures.py"):
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)       # now, not after hours of responses
            if figure is not curves:                           # which reads no model
                *_, device, mesh = init_distributed(args.device)
                check_versions(versions(), print)
            contents = figure(args, mesh, device)
            if not dist.is_initialized() or dist.get_rank() == 0:
                for suffix, content in contents.items():
                    write(args.out, suffix, content)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def write(out, suffix, content):
    """content: a function that draws into a file, a text, or what becomes JSON."""
    file = Path(out if out.endswith(suffix) else f"{out}.{suffix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(file)
    elif isinstance(content, str):                         # HTML, or lines of JSON
        file.write_text(content)
    else:
        file.write_text(json.dumps(content))
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
