"""The paper's measurements and figures, from models and run folders. Each writes a PNG and a JSON of what it
shows.

    python -m paper.figures report out/srft                                     # out/srft/report.html, anew
    python -m paper.figures respond --model BASE --data FILE --out base.jsonl   # responses, for the others
    python -m paper.figures fig2a --base BASE --tuned out/srft --data FILE      # one response, by tokens (A1)
    python -m paper.figures fig2b --base BASE --tuned SFT=out/sft RL=out/grpo SRFT=out/srft --data FILE,FILE
    python -m paper.figures fig3  --references base=base.jsonl R1=r1.jsonl QwQ=qwq.jsonl --runs SRFT=out/srft
    python -m paper.figures fig4  "SFT->RL=out/sft+out/sft-rl" "RL->SFT=out/grpo+out/rl-sft"
    python -m paper.figures fig5  RL=out/grpo "SFT->RL=out/sft+out/sft-rl" SFT+RL=out/both
    python -m paper.figures fig6  RL=out/grpo SRFT=out/srft
    python -m paper.figures figA2 RL=out/grpo truncated=out/grpo-q80
    python -m paper.figures terms SRFT=out/srft                                 # gradient norm of each term

From another folder than the project's: python .../paper/figures.py ...

A model is a Hugging Face folder, a hub name, or a run's folder. A curve, LABEL=RUN+RUN,RUN+RUN, is a run or a
sequence of runs (each started from the one before), with more seeds after commas: their mean is drawn, and
their range. Models of any size are read through FSDP2, which spreads them over eight cards by

    torchrun --local_addr=127.0.0.1 --nproc_per_node=8 -m paper.figures ...

Template, limits, RoPE theta and window are those that the runs were trained with, by their config.json: with
others, the probabilities would be of something else. A flag that is given wins.

What the paper leaves open about Fig. 2, and its reviewers ask: whose response it is (--responses: the
demonstrations of --data, or what `respond` sampled from the base or the tuned model), which log-probs (both
models score the very same tokens, token by token, at temperature 1, given prompt and prefix), and the colours
(--scale: the change of probability p_tuned - p_base, in [-1, 1], or of log p in nats).
"""
import sys
from pathlib import Path

if not __package__:                                    # started as a file: then this folder is on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import support.startup  # noqa: F401  (before torch)

import json

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import model as M
from config import METHODS, papers_settings
from data import TEMPLATES, check_vocabulary, load_examples, tokenize
from paper.curves import PANELS, curves, named
from paper.pictures import draw_distributions, draw_heatmap, draw_trajectories, heatmap, share
from rollout import RolloutEngine, check_environment
from support.checkpoint import checkpoints_in, step_of, verify_checkpoint
from support.collectives import all_or_none, of_all_ranks
from support.disk import read_json
from support.flags import Parser
from support.hub import fetch
from support.intervals import number_in, positive
from support.inventory import Inventory
from support.processes import init_distributed, mistakes_in_one_line
from support.report import settings_of, write_report
from support.versions import check_versions, versions
from support.weights import stored_tensors

# ----------------------------------------------------------------------------------------------------------
# How the runs were trained.

# Flags that a run's config.json has, too, and what they are where no run is among the models.
OF_RUNS = {"template": "paper", "max_prompt_tokens": 1024, "max_response_tokens": 8192, "rope_theta": 0.0,
           "window": 0}


def is_run(name):
    return (Path(name) / "metrics.jsonl").exists()


def take_from_runs(args):
    """Set the flags of OF_RUNS that were not given to what the runs among the models were trained with.
    Raises ValueError where these differ."""
    names = [path for _, path in named(getattr(args, "tuned", []))]
    for _, stages in named(getattr(args, "runs", [])):
        names += stages.split("+")
    names += [name for name in (getattr(args, "base", None), getattr(args, "model", None)) if name]
    runs = [name for name in names if is_run(name)]
    args.keep_own = getattr(args, "rope_theta", None) is None   # as a run does, at its default
    for flag, default in OF_RUNS.items():
        if getattr(args, flag, default) is not None:           # given, or no flag of this figure
            continue
        found = {run: read_json(Path(run) / "config.json").get(flag, default) for run in runs}
        if len(set(found.values())) > 1:
            differing = ", ".join(f"{value} in {run}" for run, value in found.items())
            raise ValueError(f"--{flag}: the runs were not trained with the same one ({differing}); pass one")
        setattr(args, flag, next(iter(found.values()), default))
        if runs and getattr(args, flag) != default:
            say(f"--{flag} {getattr(args, flag)}, as {runs[0]} was trained")


# ----------------------------------------------------------------------------------------------------------
# Models, and the probabilities that they give to responses.


def model_folder(name):
    """A Hugging Face folder, hub name or run's folder -> the folder to load."""
    if is_run(name):
        if not (Path(name) / "hf").is_dir():
            raise ValueError(f"{name}: this run has no hf/ yet; it is written when training ends")
        return str(Path(name) / "hf")
    return fetch(name, "model", "the model")


class Scorer:
    """log p of every token of a response, under one architecture with weights that change: a folder's, a
    checkpoint's."""

    def __init__(self, folder, mesh, device, args):
        config = M.load_config(folder, args.rope_theta, args.window, args.keep_own)
        self.policy = M.load_policy(folder, config, mesh, device).eval()
        # Sequences packed into one row must not see each other; an architecture may break that in silence.
        M.check_packing(self.policy, device, config.vocab_size)
        self.device, self.tokens = device, args.micro_batch_tokens
        self.folder, self.window = folder, config.max_position_embeddings

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
        longest = max(map(len, sequences), default=0)
        if longest > self.window:            # positions that the model has never seen: p would mean nothing
            raise ValueError(f"a prompt with its response has {longest} tokens, over the window of "
                             f"{self.window} tokens of {self.folder}: lower --max_prompt_tokens or "
                             "--max_response_tokens, or raise --window")
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
    config = M.load_config(folder, args.rope_theta, args.window, args.keep_own)
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


def read_responses(file, example=None):
    """What `respond` wrote -> (Sequences, log p of their tokens under the model that sampled them). example:
    an id, of whose problem alone."""
    sequences, logp = [], []
    try:
        for line in Path(file).read_text().splitlines():
            row = json.loads(line)
            if example in (None, row["id"]):
                sequences.append(M.Sequence(row["prompt"], row["response"]))
                logp.append(np.array(row["logp"], np.float32))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a file of `python -m paper.figures respond` ({error!r})") from None
    return sequences, logp


def read_prompts(args, tokenizer, need_demo=False, example=None):
    """The prompts of --data (files, folders or tiny:NAME, separated by commas), at most --limit of each; or
    the one whose id is `example`."""
    if not args.data:
        raise ValueError("--data: which problems? A file, a folder or tiny:NAME")
    prompts = []
    for source in args.data.split(","):
        name = source if source.startswith("tiny:") else fetch(source, "dataset", "--data")
        inventory = Inventory(f"--data {source}")
        found = [one for one in load_examples(name, inventory=inventory) if one.demo or not need_demo]
        if not found:
            raise ValueError(f"--data {source}: no example has a demonstration; "
                             "pass --responses FILE, of `respond`")
        if example is not None:
            found = [one for one in found if one.id == example]
        if found:
            prompts += tokenize(found[:args.limit], tokenizer, args.template, args.max_prompt_tokens,
                                args.max_response_tokens, inventory)
        for remark in inventory.remarks():
            say(f"--data {source}: {remark}")
    return prompts


def responses(args, source, tokenizer, example=None):
    """The sequences that fig2a and fig2b look at: demonstrations of --data, or those of a file."""
    if source != "demo":
        sequences, _ = read_responses(source, example)
        return sequences[:args.limit]
    prompts = read_prompts(args, tokenizer, need_demo=True, example=example)
    return [M.Sequence(prompt.ids, prompt.demo) for prompt in prompts]


def whose(args, source):
    """What a figure says about its responses."""
    if source != "demo":
        return f"responses in {Path(source).stem}"
    return "demonstrations of " + ", ".join(Path(name).stem for name in args.data.split(","))


# ----------------------------------------------------------------------------------------------------------
# Fig. 2(a), A1: one response as a heat map.

def fig2a(args, mesh, device):
    """A heat map of one response that --data or --responses give: the first, or --example."""
    label, name = named(args.tuned)[0]
    base, tuned = model_folder(args.base), model_folder(name)
    tokenizer = M.load_tokenizer(base)
    args.limit = 1
    found = responses(args, args.responses[0], tokenizer, args.example)
    if not found:
        raise ValueError(f"--example {args.example}: no response is to a problem of this id; samples.jsonl "
                         "and the files of `respond` name ids")
    sequence = found[0]
    # log p of each token of the response, the same tokens under both models.
    [before] = Scorer(base, mesh, device, args)([sequence])
    [after] = Scorer(tuned, mesh, device, args)([sequence])
    tokens = [tokenizer.decode([token]) for token in sequence.response]
    which = "first" if args.example is None else args.example
    title = f"{label} against base, the {which} of the {whose(args, args.responses[0])}"

    def draw(file):
        draw_heatmap(file, tokens, before, after, args.scale, title)

    return {"json": {"title": title, "tokens": tokens,
                     "logp_base": before.tolist(), "logp_tuned": after.tolist(),
                     "changed by more than 0.1": share(before, after, 0.1),
                     "changed by more than 0.5": share(before, after, 0.5)},
            "html": heatmap(tokens, before, after, args.scale, title),
            "png": draw}


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
        draw_distributions(file, found, [whose(args, source) for source in args.responses])

    return {"json": found, "png": draw}


def distribution(before, after):
    """Of log p of the same tokens under two models: how many, how far probabilities moved, a histogram."""
    change = np.exp(after) - np.exp(before)
    counts, edges = np.histogram(change, bins=81, range=(-1, 1))        # odd: a bin around no change
    return {"tokens": len(change), "mean |change|": float(np.abs(change).mean()),
            "changed by more than 0.1": share(before, after, 0.1),
            "changed by more than 0.5": share(before, after, 0.5),
            "share of each bin": (counts / max(1, len(change))).tolist(), "edges": edges.tolist()}

# ----------------------------------------------------------------------------------------------------------
# Fig. 3, App. E: trajectories in the space of distances to reference models.

def fig3(args, mesh, device):
    """For each checkpoint M of each run, d_R(M) to each reference R: the mean over R's responses, and in each
    over its tokens, of |p_M(token) - p_R(token)|. App. E says "the distance between the probabilities"; this
    is the plainest one: at most 1, and 0 for M = R but for what the engine, whose p_R `respond` recorded, and
    the trainer differ by. All models must share one
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
        steps = [step_of(folder) for folder in checkpoints_in(checkpoints)]
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


# ----------------------------------------------------------------------------------------------------------
# The command line.

def report(args, *_):
    """The page that a run writes into its folder, from what is there by now."""
    method = settings_of(args.run).get("method", "srft")
    if method not in METHODS:
        raise ValueError(f"{args.run}/config.json: knows no --method {method}")
    write_report(args.run, papers_settings(method))
    print(f"wrote {args.run}/report.html")
    return {}


def say(text):
    """Print it once, whether there are several ranks or, as for curves, no process group at all."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


MODELS = {"respond": respond, "fig2a": fig2a, "fig2b": fig2b, "fig3": fig3}       # figures that read models
FIGURES = {"report": report, **MODELS, **dict.fromkeys(PANELS, curves)}
SUFFIXES = {"report": [], "respond": ["jsonl"], "fig2a": ["json", "html", "png"]}      # of others json, png


def parse(argv=None):
    """The command line; --help and FIGURE --help explain it. Exits with 2 on a mistake."""
    parser = Parser(prog="python -m paper.figures", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, function in FIGURES.items():
        one = figures.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        if function is report:
            one.add_argument("run", metavar="DIR", help="the run's folder, where report.html is written")
            continue
        one.add_argument("--out", default=f"out/figures/{name}",
                         help="path of the files, without suffix [%(default)s]")
        one.add_argument("--overwrite", action="store_true", help="replace the figure that is there")
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
        flag("--example", metavar="ID", help="the id of the problem whose response is shown [the first]")
        flag("--scale", choices=("probability", "log"), default="probability",
             help="colour: the change of p, or of log p [%(default)s]")
    if name != "fig3":
        flag("--data", default="",
             help="problems (and demonstrations): files, folders, tiny:NAME, by commas")
        flag("--limit", type=positive, default=1024,
             help="problems of each file (App. E: 1,024) [%(default)s]")
        flag("--template", choices=tuple(TEMPLATES),
             help=f"prompt template [the run's, else {OF_RUNS['template']}]")


def add_common_flags(flag):
    """What all figures that read models ask."""
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto",
         help="auto: the GPU if torch is built for one, else the CPU [%(default)s]")
    flag("--micro_batch_tokens", type=number_in(int, "[1, inf)"), default=16_384,
         help="packed tokens per forward [%(default)s]")
    for option, within, meaning in (
            ("max_prompt_tokens", "[1, inf)", "longer prompts are dropped"),
            ("max_response_tokens", "[1, inf)", "longer demonstrations are dropped, responses cut"),
            ("rope_theta", "[0, inf)", "RoPE theta; 0 keeps the model's own"),
            ("window", "[0, inf)", "context window; 0 keeps the model's own")):
        default = OF_RUNS[option]
        flag(f"--{option}", type=number_in(type(default), within),
             help=f"{meaning} [the run's, else {default}]")


def main(argv=None):
    """Make one figure: its function returns {suffix: content}, and rank 0 writes each to --out."""
    args, mesh, device = parse(argv), None, None
    figure = FIGURES[args.figure]
    try:
        with mistakes_in_one_line("paper/figures.py"):
            if args.figure in MODELS:
                *_, device, mesh = init_distributed(args.device)
                check_versions(versions(), say)
                take_from_runs(args)
            with all_or_none():                            # now, not after hours of responses
                if not dist.is_initialized() or dist.get_rank() == 0:
                    make_room(args)
            contents = figure(args, mesh, device)
            if not dist.is_initialized() or dist.get_rank() == 0:
                for suffix, content in contents.items():
                    write(args.out, suffix, content)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def make_room(args):
    """The folder of --out. Raises ValueError where another figure is there that nobody said may go."""
    for suffix in SUFFIXES.get(args.figure, ["json", "png"]):
        file = path_of(args.out, suffix)
        if file.exists() and not args.overwrite:
            raise ValueError(f"{file}: is there already; pass another --out, or --overwrite to replace it")
        file.parent.mkdir(parents=True, exist_ok=True)


def path_of(out, suffix):
    return Path(out if out.endswith(suffix) else f"{out}.{suffix}")


def write(out, suffix, content):
    """content: a function that draws into a file, a text, or what becomes JSON."""
    file = path_of(out, suffix)
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
