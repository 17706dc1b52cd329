"""Accuracy as Sec. 5.1 and App. B measure it: sample, grade by both verifiers, average, put beside Table 2.

    torchrun --local_addr=127.0.0.1 --nproc_per_node=8 eval.py --model out/srft --benchmarks math500,amc23
    python eval.py --model DIR --benchmarks mine.jsonl --max_tokens 512       # one process; on CPU, too
    python eval.py --compare out/eval/BASE out/srft/eval       # two folders of results, or two models

A model is a Hugging Face folder or hub name, or the folder of a run. Benchmarks are names (fetched from the
hub), NAME=FILE (a local copy), or files of one's own. The problems are spread over ranks, one vLLM engine
each. Every response goes to results.jsonl as soon as its chunk is graded: the same command continues a killed
evaluation, to the same table. At the end, --out also holds summary.md and summary.json.

The figures: avg@n is the mean over problems of the share of n responses that are correct (pass@1 where
n = 1); pass@k is the chance that one of k responses is correct, by the unbiased estimator. Each comes with
its 95 % interval. `evaluate` is the same measurement inside a training run, but by Math-Verify alone, and a
response cut off scores 0 there unless --score_unfinished says otherwise.
"""
# ruff: noqa: E402      (imports below `parse`)
import support.startup  # noqa: F401  (before torch)


def parse(argv=None):
    """The command line -> argparse.Namespace."""
    # Not at the top: srft.py loads this file for `evaluate`, and trains without that room.
    from paper import protocol
    return protocol.parse(argv, __doc__)


# Before the imports, which take seconds: --help and a misspelt flag are answered at once. main() parses anew.
if __name__ == "__main__":
    parse()

import json
import math
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import model as M
from data import Prompt, check_vocabulary, grader_digest, tokenize
from grading import custom, notation
from grading.answers import KINDS
from reward import Grader
from rollout import RolloutEngine, check_environment
from support.checkpoint import checkpoints_in
from support.claim import claim
from support.collectives import agreed, all_or_none, of_all_ranks
from support.disk import read_json, write_whole
from support.hub import COMMITS, fetch
from support.inventory import Inventory
from support.processes import init_distributed, mistakes_in_one_line
from support.results import append_results, read_results
from support.versions import check_versions, environment, versions
from support.watch import alive, hang_watch, phase, set_timeouts, wait_for_all
from support.weights import fingerprints, stored_tensors

# Nothing of paper/ here: srft.py loads this file for `evaluate`, and trains without that room. The functions
# of the command line load benchmarks and tables themselves.

# ----------------------------------------------------------------------------------------------------------
# The measurement: sampling and grading, the same in a training run and on the command line.

@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; App. B: temperature 0.6, at most 8,192 tokens. seed: of everything drawn."""
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One response to draw: the `sample`-th to a problem of a benchmark."""
    # Each of AIME24's 32 samples is a task of its own, so that they spread over ranks and chunks like others.
    benchmark: str
    prompt: Prompt
    sample: int

    @property
    def key(self):
        return self.benchmark, self.prompt.example.id, self.sample

    def seed(self, seed):
        """A function of what is asked alone: not of ranks, of --limit, or of the other benchmarks."""
        # Not hash(), which differs from process to process: a killed evaluation must go on with these seeds.
        # surrogatepass: an id read from JSON may hold half a character, which UTF-8 refuses.
        benchmark = zlib.crc32(self.benchmark.encode(errors="surrogatepass"))
        problem = zlib.crc32(self.prompt.example.id.encode(errors="surrogatepass"))
        words = [seed, benchmark, problem, self.sample]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


class Stopped(Exception):
    """Responses were being drawn when a signal came."""


def answer(engine, grader, tasks, sampling, kinds, version=None, progress=False, stopping=()):
    """Draw and grade one response for each task -> list of rows (dict), as results.jsonl holds them.

    kinds: the verifiers, of "oat", "math-verify" and the function of --reward. Multiple choice (an example
    with `order`) gets the verdict of its letter instead of the first two; an example with a `repaired`
    reference a second one of "oat". Raises Stopped as soon as `stopping` is not empty.
    """
    rows = [None] * len(tasks)
    jobs = []                                         # (row, name of the verdict), as they are submitted

    def grade_finished(ended):
        """After each decoding step: grade what ended in it, while the others are being decoded."""
        alive()
        if stopping:
            raise Stopped
        grader.submit()                               # nothing new: it hands out work, and kills who is late
        for i, _, rollout in ended:
            example = tasks[i].prompt.example
            rows[i] = new_row(tasks[i], rollout)
            for name, kind, reference in wanted_verdicts(example, kinds):
                jobs.append((rows[i], name))
                grader.submit([rollout.text], [reference], [rollout.finished], kind, [custom.about(example)])

    prompts = [task.prompt.ids for task in tasks]
    seeds = [task.seed(sampling.seed) for task in tasks]
    # 1: a task is one response.
    engine.generate(prompts, 1, sampling.temperature, sampling.max_tokens, seeds, version,
                    top_p=sampling.top_p, progress=progress, on_step=grade_finished)
    # Responses end in any order; verdicts come in the order of submission, as `jobs` has it.
    for (row, name), verdict in zip(jobs, grader.collect()):
        row["verdicts"][name] = {"reward": verdict.reward, "reason": verdict.reason,
                                 "ms": round(verdict.ms, 1), "extracted": verdict.extracted,
                                 "fault": verdict.fault}
    for row in rows:                                  # the repaired reference is a second right spelling
        if "oat/repaired" in row["verdicts"] and row["verdicts"]["oat"]["reward"]:
            row["verdicts"]["oat/repaired"] = row["verdicts"]["oat"]
    return rows


def new_row(task, rollout):
    """A response as results.jsonl holds it, its verdicts still to come."""
    example = task.prompt.example
    row = {"benchmark": task.benchmark, "id": example.id, "sample": task.sample,
           "prompt": example.problem, "answer": example.answer, "response": rollout.text,
           "tokens": len(rollout.tokens), "finished": rollout.finished, "verdicts": {},
           "nll": -sum(rollout.logprobs) / max(1, len(rollout.logprobs))}     # <-log p>_i, nats a token
    order = getattr(example, "order", None)           # only benchmarks have it, a training file's Example not
    if order is not None:
        row["order"] = order
    return row


def wanted_verdicts(example, kinds):
    """[(name in the row, kind of grader, reference answer)] for a response to this example."""
    # Both verifiers deny that "C)" is C, so a letter has a grader of its own; a reward of one's own sees all.
    own = [kind for kind in kinds if kind not in KINDS]
    letter = getattr(example, "order", None) is not None
    if letter and len(own) < len(kinds):
        kinds = [*own, "choice"]
    wanted = [(kind, kind, example.answer) for kind in kinds]
    repaired = getattr(example, "repaired", None)
    if repaired is not None and "oat" in kinds:
        wanted.append(("oat/repaired", "oat", repaired))
    return wanted


def evaluate(engine, grader, name, prompts, n, sampling, version, stopping=()):
    """avg@n during training, by the training grader (Sec. 5.1: "Math-verify ... for training validation").

    prompts: list of data.Prompt, the same on every rank; each rank answers its share. Returns "accuracy", the
    mean over problems of the share of their n responses that are correct; "tokens", the responses' mean
    length; "entropy", the mean of <-log p>_i under the distribution that they were sampled from: its entropy
    a token, but for a bias, since a response's length depends on its tokens. None if a signal came meanwhile:
    on some rank, the list `stopping` is no longer empty. The same on every rank. A collective.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    tasks = [Task(name, prompt, sample) for prompt in prompts for sample in range(n)]
    # Dealt like cards: no rank gets one part of the file, such as its hard end, alone.
    try:
        rows = answer(engine, grader, tasks[rank::world], sampling, [grader.kind], version, stopping=stopping)
        found = [(row["verdicts"][grader.kind]["reward"], row["tokens"], row["nll"]) for row in rows]
    except Stopped:
        found = None
    everyone = of_all_ranks(found)                    # three numbers a response, not its text
    if None in everyone:
        return None
    dealt = [None] * len(tasks)
    for r, part in enumerate(everyone):
        dealt[r::world] = part                        # back into the order of `tasks`
    rewards = np.array([reward for reward, _, _ in dealt]).reshape(len(prompts), n)
    return {"accuracy": float(rewards.mean(1).mean()),          # over samples, then over problems
            "tokens": float(np.mean([tokens for _, tokens, _ in dealt])),
            "entropy": float(np.mean([nll for _, _, nll in dealt]))}


def unmatchable(grader, name, prompts, say, kind="math-verify"):
    """Name the prompts whose reference answer cannot be matched even by itself: every response to them earns
    0. Returns index in `prompts` -> reason, the same on every rank. A collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    places = {}                                       # each answer once -> indices of its prompts
    for i, prompt in enumerate(prompts):
        if getattr(prompt.example, "order", None) is None:        # multiple choice has nothing to parse
            places.setdefault(prompt.example.answer, []).append(i)
    mine, reasons = list(places)[rank::world], {}
    size = 100 * grader.workers                       # at each part's end, workers wait for its slowest
    bar = tqdm(total=len(mine), desc=f"{name}: reference answers", disable=rank != 0, delay=3, leave=False)
    for start in range(0, len(mine), size):
        part = mine[start:start + size]
        for place, reason in grader.check(part, kind).items():
            reasons[part[place]] = reason
        bar.update(len(part))
    bar.close()
    bad = {}
    for part in of_all_ranks(reasons):
        for answer, reason in part.items():
            bad.update(dict.fromkeys(places[answer], reason))
    if kind == "math-verify":
        mended = sum(notation.is_mended(prompt.example.answer) for prompt in prompts)
        if mended:
            say(f"{name}: {mended} reference answers are read in another notation, as `5 (mod 7)` and "
                "`\\[5\\]` are")
    for i in sorted(bad)[:20]:                        # where the column is a wrong one, it is all of them
        say(f"{name} {prompts[i].example.id}: no response can match the reference answer "
            f"{prompts[i].example.answer!r}, not even itself, by {kind} ({bad[i]})")
    if bad:
        words = list(bad.values()).count("no_answer")
        say(f"{name}: {len(bad)} of {len(prompts)} reference answers cannot be matched by {kind}, {words} of "
            "them because they are words of no answer, such as \"proof\"")
    return bad


# ----------------------------------------------------------------------------------------------------------
# The work of all ranks: dealt in chunks, each written to results.jsonl at once, so that a kill costs a few.

def chunks(tasks, world, size):
    """Split the tasks into equally mixed chunks of at most `size`, a multiple of `world` of them.

    What is decoded together may change the last bits of the engine's arithmetic. A chunk is written at once,
    so a killed evaluation goes on with the very same chunks. Chunk c is work of rank c mod world.
    """
    count = -(-len(tasks) // size)                    # rounded up, as in the next line
    count = min(len(tasks), -(-count // world) * world)
    # With a stride, each chunk has its part of every benchmark, of those with long responses too.
    return [tasks[c::count] for c in range(count)]


def known_results(path, tasks):
    """key -> row, without its response, of the tasks that `path` holds already. A collective.

    Raises ValueError if a row belongs to another problem than the task of that name.
    """
    known = {}
    if dist.get_rank() == 0:                          # one reader
        wanted = {task.key for task in tasks}
        for row in read_results(path):
            key = (row.get("benchmark"), row.get("id"), row.get("sample"))
            if key in wanted:
                row["response"] = None                # the longest part of it, and no rank needs it
                known[key] = row
    box = [known]
    dist.broadcast_object_list(box)
    known = box[0]
    for task in tasks:
        row, example = known.get(task.key), task.prompt.example
        if row and (row["prompt"], row["answer"]) != (example.problem, example.answer):
            raise ValueError(f"{path} holds another problem under {task.key}: use another --out")
    return known


def run(engine, grader, tasks, known, sampling, kinds, path, chunk_size):
    """Answer all tasks that are not `known` yet, spread over the ranks. A collective."""
    from paper.tables import verdict
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = chunks(tasks, world, chunk_size)[rank::world]
    bar = tqdm(total=sum(map(len, mine)), desc="responses (rank 0 of %d)" % world, disable=rank != 0,
               dynamic_ncols=True)
    right, seen = Counter(), Counter()                # by benchmark, for the bar alone
    for number, chunk in enumerate(mine, 1):
        phase(f"chunk {number} of {len(mine)}")
        old = [known[task.key] for task in chunk if task.key in known]
        left = [task for task in chunk if task.key not in known]
        new = []
        if left:
            new = answer(engine, grader, left, sampling, kinds, progress=rank == 0)
            check_finite(new)
            append_results(path, new)
        for row in new + old:
            seen[row["benchmark"]] += 1
            right[row["benchmark"]] += verdict(row, kinds[0])["reward"]
        bar.update(len(chunk))
        bar.set_postfix({name: f"{100 * right[name] / seen[name]:.1f}" for name in seen})
    bar.close()
    wait_for_all()                                    # all is written, before rank 0 reads


def check_finite(rows):
    """Raise ValueError for a response to which the model itself gives no probability: a broken model would
    look like one that knows nothing."""
    for row in rows:
        if not math.isfinite(row["nll"]):
            raise ValueError(f"--model: of a response to {row['benchmark']} {row['id']}, its log-probs are "
                             "nan or inf: its weights are broken, or too large for what it computes in")


# ----------------------------------------------------------------------------------------------------------
# The command line.

def main(argv=None):
    args = parse(argv)
    with hang_watch(), mistakes_in_one_line("eval.py"):
        if args.compare:
            from paper.compare import of_both
            of_both(args, measure)
        else:
            measure([args])


@dataclass
class Job:
    """A model to evaluate."""
    args: object                  # the flags; those of --compare with --model and --out of this one
    folder: str                   # of the model
    config: object                # of transformers, like the tokenizer
    tokenizer: object
    tasks: list


def measure(models):
    """The whole evaluation on this rank, of one model or, for --compare, of two, which one engine serves one
    after the other. models: the flags of each. Rank 0 writes and prints the summaries."""
    rank, _, device, mesh = init_distributed(models[0].device)
    say = print if rank == 0 else lambda *_: None
    # All mistakes that can be found without the model are found before it is loaded, or anything written.
    check_versions(versions(), say)
    check_environment(device)
    jobs = []
    for args in models:
        folder = locate(args)
        config = M.load_config(folder, args.rope_theta, args.window)
        tokenizer = M.load_tokenizer(folder)
        tasks = prepare(args, tokenizer, config.max_position_embeddings, say)
        check_vocabulary([task.prompt for task in tasks], tokenizer, config.vocab_size)
        jobs.append(Job(args, folder, config, tokenizer, tasks))
    if len(jobs) > 1:
        from paper.compare import check_pair
        check_pair(jobs)
    engine = None
    for job in jobs:
        engine = measure_one(job, jobs, engine, device, mesh, say)
    if engine is not None:
        engine.close()                                # takes the process group with it
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_one(job, jobs, engine, device, mesh, say):
    """Evaluate the model of one of the jobs. engine: that of an earlier one, or None. Returns the engine,
    None as long as none was needed."""
    args, tasks, rank = job.args, job.tasks, dist.get_rank()
    with all_or_none():
        if rank == 0:
            claim(args.out)
    settle(args, job.folder, device, rank)
    dist.barrier()                                    # settings.json is there, before anyone writes results
    tensors = stored_tensors(job.folder)              # says now if files are missing, and reads them later
    kinds = verifiers(args)
    path = Path(args.out) / "results.jsonl"
    with Grader(kinds[0], args.grader_workers or None, args.grader_deadline, text=args.grade_text,
                strict_box=args.strict_box, strict_answer=False,      # told beside the comparable figures
                score_unfinished=args.score_unfinished, reward=args.reward) as grader:
        with all_or_none():
            grader.start()                            # a reward of one's own may fail to load
        name_unmatchable(grader, tasks, kinds, say)
        known = known_results(path, tasks)
        if len(known) < len(tasks):                   # else only the table is made again
            if engine is None:
                engine = start_engine(jobs, device)
            engine.tokenizer = job.tokenizer
            engine.sync_weights(tensors, version=0)   # asked for by no version: one model is served at a time
            set_timeouts(mesh, args.hang_minutes)     # all is loaded: no decoding step takes hours
            sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
            # The last responses of a chunk are decoded in a half-empty batch: larger chunks waste less, and
            # a kill costs more.
            run(engine, grader, tasks, known, sampling, kinds, path, chunk_size=4 * args.engine_sequences)
            known = known_results(path, tasks)        # from the file, which has the rows of all ranks
    if rank == 0:
        from paper.tables import write_summary
        write_summary(args, [known[task.key] for task in tasks], kinds)
    return engine


def verifiers(args):
    """Whose verdicts are asked for; those of the first one count."""
    kinds = {"both": ["oat", "math-verify"], "none": []}.get(args.grader, [args.grader])
    own = [custom.function_name(args.reward)] if args.reward else []
    return own + kinds


def locate(args):
    """The folder to load; fills in --out and --template from a run's own folder."""
    path = Path(args.model)
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():            # a run of srft.py
        if not (path / "hf").is_dir():
            raise ValueError(f"--model {path}: this run has no hf/ yet; it is written when training ends")
        exported = (path / "hf").stat().st_mtime
        for checkpoint in checkpoints_in(path / "checkpoints")[-1:]:
            if checkpoint.stat().st_mtime > exported:
                warnings.warn(f"{path / 'hf'}: is older than {checkpoint.name}: the run has trained on "
                              "since, and exports its model anew when it ends")
        args.out = args.out or str(path / "eval")
        # The template that it was trained with: another would measure something else.
        args.template = args.template or read_json(path / "config.json")["template"]
        return str(path / "hf")
    if path.is_file():
        raise ValueError(f"--model {path}: expected a folder, found a file")
    name = path.resolve().name if path.exists() else path.name      # the last part of "." or of a hub name
    args.out = args.out or f"out/eval/{name}"
    args.template = args.template or "paper"
    return fetch(args.model, "model", "--model")


def prepare(args, tokenizer, window, say):
    """All tasks of all benchmarks. Raises ValueError for a prompt that leaves too little of the window."""
    from paper.benchmarks import BENCHMARKS, load_benchmark
    tasks, seen = [], set()
    for source in args.benchmarks.split(","):
        name, problems = load_benchmark(source.strip(), args.seed, args.limit, say)
        if name in seen:
            raise ValueError(f"--benchmarks: two are called {name}; rename one file")
        seen.add(name)
        # No limits of length: a benchmark without some of its problems would be another one.
        inventory = Inventory(name, held_out=True)
        prompts = tokenize(problems, tokenizer, args.template, sys.maxsize, sys.maxsize, inventory)
        for remark in inventory.remarks():
            say(f"{name}: {remark}")
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + args.max_tokens > window:
            fits = f"pass --max_tokens {window - longest}, or " if longest < window else ""
            raise ValueError(f"{name}: a prompt of {longest} tokens and --max_tokens {args.max_tokens} "
                             f"exceed the window of {window}: {fits}raise --window")
        n = args.samples
        if not n:
            # Sec. 5.1; at temperature 0, all samples of a problem would be the same.
            n = BENCHMARKS[name].samples if name in BENCHMARKS and args.temperature else 1
        say(f"{name}: {len(problems)} problems x {n}")
        tasks += [Task(name, prompt, sample) for prompt in prompts for sample in range(n)]
    return tasks


# What results of one folder must have in common. Benchmarks, samples and limit may grow; the rest is of the
# machine.
SETTINGS = ("weights", "versions", "grading", "template", "grader", "temperature", "top_p", "max_tokens",
            "seed", "rope_theta", "window", "grade_text", "strict_box", "score_unfinished", "reward_code")


def settle(args, folder, device, rank=0):
    """Raise ValueError if --out holds results of another model or other settings; else rank 0 writes
    settings.json: all flags, of which SETTINGS must not change, the weights' files, versions, machine. A
    collective."""
    settings = {**vars(args), **environment(device), "weights": fingerprints(folder),
                "grading": grader_digest(), "hub": COMMITS,
                "reward_code": custom.read(args.reward).digest if args.reward else None}
    agreed("--reward", settings["reward_code"])          # nodes may have files of their own
    path = Path(args.out) / "settings.json"
    # Every rank looks, and all of them stop.
    if (Path(args.out) / "results.jsonl").exists():
        known = read_json(path) if path.exists() else {}
        changed = []
        for name in SETTINGS:
            if known.get(name) == settings[name]:
                continue
            if name == "weights":                     # digests, which tell a person nothing
                changed.append(f"the weights in {folder} are not those of the results")
            else:
                changed.append(f"{name} was {known.get(name)}, is {settings[name]}")
        if changed:
            raise ValueError(f"{args.out} holds results of other settings; use another --out. "
                             + "; ".join(changed))
    if rank == 0:
        write_whole(path, json.dumps(settings, indent=2))


def name_unmatchable(grader, tasks, kinds, say):
    """Say which reference answers no response can match; they stay in the denominator. A collective."""
    prompts = {}                                      # benchmark -> each of its prompts once
    for task in tasks:
        if task.sample == 0:
            prompts.setdefault(task.benchmark, []).append(task.prompt)
    checked = [kind for kind in kinds if kind in KINDS]
    if checked != kinds:
        say(f"--reward: whether {kinds[0]} accepts the reference answers is not checked")
    for benchmark, asked in prompts.items():
        for kind in checked:
            unmatchable(grader, benchmark, asked, say, kind)


def start_engine(jobs, device):
    """vLLM with room for the longest prompt of any job and its response, without weights yet."""
    longest, (first, *_) = 0, jobs
    for job in jobs:                                  # two runs may have templates of their own
        longest = max(longest, *(len(task.prompt.ids) for task in job.tasks))
    args = first.args
    return RolloutEngine(first.config, first.tokenizer, M.compute_dtype(device), longest + args.max_tokens,
                         args.engine_sequences, args.engine_memory, seed=args.seed)


if __name__ == "__main__":
    main()
