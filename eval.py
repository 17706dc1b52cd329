r"""Accuracy as Sec. 5.1 and App. B measure it: sample, grade by both verifiers, average, put beside Table 2.

    torchrun --nproc_per_node=8 eval.py --model out/srft --benchmarks math500,aime24=aime.jsonl
    python eval.py --model DIR --benchmarks mine.jsonl --max_tokens 512       # one process; on CPU, too

A model is a Hugging Face folder or hub name, or the folder of a run. Benchmarks are names (fetched from the
hub), NAME=FILE (a local copy), or files of one's own. The problems are spread over ranks, one vLLM engine
each. Every response goes to results.jsonl as soon as its chunk is graded: the same command continues a killed
evaluation, to the same table. At the end, --out also holds summary.md and summary.json.

The figures: avg@n is the mean over problems of the share of n responses that are correct (pass@1 where
n = 1); pass@k is the chance that one of k responses is correct, by the unbiased estimator. Each comes with
its standard error. `evaluate` is the same measurement inside a training run.
"""
import argparse
import fcntl
import json
import os
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer

import model as M
from benchmarks import BENCHMARKS, load_benchmark
from config import environment
from data import TEMPLATES, Prompt, tokenize
from reward import TEXTS, Grader
from rollout import RolloutEngine, stored_tensors


# ----------------------------------------------------------------------------------------------------------
# Estimates from graded samples.

def pass_at_k(correct, n, k):
    """The unbiased estimate of P(one of k samples is correct) from `correct` of n: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, Eq. 1, https://arxiv.org/abs/2107.03374), as a product that cannot overflow."""
    return 1.0 - float(np.prod([(n - correct - i) / (n - i) for i in range(k)]))


def estimate(rewards):
    """(P, n) rewards of n samples to each of P problems -> accuracy, pass@k and their standard errors.

    accuracy        avg@n: the mean of all rewards
    stderr          of accuracy as an estimate for problems of this kind: standard deviation of the
                    problems' means / sqrt(P). It holds the samples' noise, too. None if P = 1
    stderr_samples  of accuracy on exactly these problems: sqrt(sum_i p_i (1 - p_i) / (n - 1)) / P, the
                    noise of sampling alone. None if n = 1
    pass@k, pass@k/stderr   for k = 2, 4, 8, ... up to n
    """
    rewards = np.asarray(rewards, np.float64)
    problems, n = rewards.shape
    spread = lambda values: float(np.std(values, ddof=1) / np.sqrt(problems)) if problems > 1 else None
    share = rewards.mean(1)
    found = {"accuracy": float(share.mean()), "stderr": spread(share), "stderr_samples":
             float(np.sqrt((share * (1 - share)).sum() / (n - 1)) / problems) if n > 1 else None}
    for k in [2 ** i for i in range(1, n.bit_length())]:
        passed = [pass_at_k(correct, n, k) for correct in rewards.sum(1)]
        found |= {f"pass@{k}": float(np.mean(passed)), f"pass@{k}/stderr": spread(passed)}
    return found


# ----------------------------------------------------------------------------------------------------------
# Sampling and grading: the same for a training run and for the command line.

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
    benchmark: str
    prompt: Prompt
    sample: int

    @property
    def key(self):
        return self.benchmark, self.prompt.example.id, self.sample

    def seed(self, seed):
        """A function of what is asked alone: not of ranks, of --limit, or of the other benchmarks."""
        words = [seed, zlib.crc32(self.benchmark.encode()), zlib.crc32(self.key[1].encode()), self.sample]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def answer(engine, grader, tasks, sampling, kinds, version=None, progress=False):
    """Draw and grade one response for each task -> list of rows (dict), as results.jsonl holds them.

    kinds: the verifiers, of "oat" and "math-verify". Multiple choice (an example with `order`) is graded by
    its letter instead; an example with a `repaired` reference gets a second verdict of "oat".
    """
    rollouts = engine.generate([t.prompt.ids for t in tasks], 1, sampling.temperature, sampling.max_tokens,
                               [t.seed(sampling.seed) for t in tasks], version, top_p=sampling.top_p,
                               progress=progress)
    rows, todo = [], {}                               # todo: kind -> (row, name of the verdict, reference)
    for task, (rollout,) in zip(tasks, rollouts):
        example = task.prompt.example
        order, repaired = getattr(example, "order", None), getattr(example, "repaired", None)
        rows.append({"benchmark": task.benchmark, "id": example.id, "sample": task.sample,
                     "prompt": example.problem, "answer": example.answer, "response": rollout.text,
                     "tokens": len(rollout.tokens), "finished": rollout.finished, "verdicts": {}}
                    | ({"order": order} if order is not None else {}))
        for kind in ["choice"] if order is not None else kinds:
            todo.setdefault(kind, []).append((rows[-1], kind, example.answer))
        if repaired is not None and "oat" in kinds:
            todo["oat"].append((rows[-1], "oat/repaired", repaired))
    for kind, jobs in todo.items():                   # one call a verifier: its workers stay busy
        verdicts = grader.grade([row["response"] for row, _, _ in jobs], [gold for _, _, gold in jobs],
                                [row["finished"] for row, _, _ in jobs], kind)
        for (row, name, _), v in zip(jobs, verdicts):
            row["verdicts"][name] = {"reward": v.reward, "reason": v.reason, "ms": round(v.ms, 1),
                                     "extracted": v.extracted}
    for row in rows:                                  # the repaired reference is a second right spelling
        if "oat/repaired" in row["verdicts"] and row["verdicts"]["oat"]["reward"]:
            row["verdicts"]["oat/repaired"] = row["verdicts"]["oat"]
    return rows


def evaluate(engine, grader, name, prompts, n, temperature, top_p, max_tokens, seed, version):
    """avg@n during training, by the training grader.

    prompts: list of data.Prompt, the same on every rank; each rank answers its share. Returns what
    `estimate` does, and "truncated", the share of responses cut at max_tokens. A collective.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    tasks = [Task(name, prompt, k) for prompt in prompts for k in range(n)]
    rows = answer(engine, grader, tasks[rank::world], Sampling(temperature, top_p, max_tokens, seed),
                  ["math-verify"], version)
    everyone, found = [None] * world, np.zeros((2, len(tasks)))
    dist.all_gather_object(everyone, [(next(iter(row["verdicts"].values()))["reward"], not row["finished"])
                                      for row in rows])
    for r, part in enumerate(everyone):
        found[:, r::world] = np.reshape(part, (-1, 2)).T
    rewards, truncated = found.reshape(2, len(prompts), n)
    return estimate(rewards) | {"truncated": float(truncated.mean())}


# ----------------------------------------------------------------------------------------------------------
# results.jsonl: written by all ranks, read when a killed evaluation continues.

def read_results(path):
    """The rows of results.jsonl; a last line cut short by a kill is cut off the file. [] if there is none.

    Raises ValueError for a line that is broken otherwise.
    """
    if not path.exists():
        return []
    rows, good = [], 0
    with path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(good)
                break
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a result ({error}); delete that line") \
                    from error
            good += len(line)
    return rows


def append_results(path, rows):
    """One locked write for a chunk: ranks share the file, and a kill leaves at most one torn line."""
    with path.open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def chunks(tasks, world, size):
    """Split the tasks into equally mixed chunks of at most `size`, a multiple of `world` of them.

    The engine's arithmetic may depend on what it decodes together, so an evaluation is resumed chunk by whole
    chunk: the same responses come out. Chunk c is work of rank c mod world.
    """
    count = -(-len(tasks) // size)
    count = min(len(tasks), -(-count // world) * world)
    return [tasks[c::count] for c in range(count)]


def known_results(path, tasks):
    """key -> row, without its response, of the tasks that `path` holds already. A collective.

    Raises ValueError if a row belongs to another problem than the task of that name.
    """
    known = [None]
    if dist.get_rank() == 0:                          # one reader, before anyone writes
        wanted = {task.key for task in tasks}
        known = [{key: row | {"response": None} for row in read_results(path)
                  if (key := (row["benchmark"], row["id"], row["sample"])) in wanted}]
    dist.broadcast_object_list(known)
    for task in tasks:
        row, example = known[0].get(task.key), task.prompt.example
        if row and (row["prompt"], row["answer"]) != (example.problem, example.answer):
            raise ValueError(f"{path} holds another problem under {task.key}: use another --out")
    return known[0]


def run(engine, grader, tasks, known, sampling, kinds, path, chunk_size):
    """Answer all tasks that are not `known` yet, spread over the ranks. A collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = chunks(tasks, world, chunk_size)[rank::world]
    bar = tqdm(total=sum(map(len, mine)), desc="responses (rank 0 of %d)" % world, disable=rank != 0,
               dynamic_ncols=True)
    right, seen = Counter(), Counter()
    for chunk in mine:
        rows = [known[task.key] for task in chunk if task.key in known]
        if len(rows) < len(chunk):
            rows = answer(engine, grader, chunk, sampling, kinds, progress=rank == 0)
            append_results(path, [row for task, row in zip(chunk, rows) if task.key not in known])
        for row in rows:
            seen[row["benchmark"]] += 1
            right[row["benchmark"]] += verdict(row, kinds[0])["reward"]
        bar.update(len(chunk))
        bar.set_postfix({name: f"{100 * right[name] / seen[name]:.1f}" for name in seen})
    bar.close()
    dist.barrier()


def verdict(row, kind):
    """A row's verdict in the view of one verifier; multiple choice has one for both."""
    return row["verdicts"].get("choice") or row["verdicts"][kind]


# ----------------------------------------------------------------------------------------------------------
# The tables.

# Table 2, of which only rows that its authors measured themselves; App. B says which.
COLUMNS = ("aime24", "amc23", "math500", "minerva", "olympiad", "arc_c", "gpqa", "mmlu_pro")
TABLE_2 = {
    "Qwen2.5-Math": (11.4, 32.6, 48.8, 8.7, 15.8, 18.2, 11.1, 16.9),
    "SFT": (31.1, 62.8, 85.2, 39.1, 53.3, 76.2, 25.8, 45.7),
    "SFT_KL": (13.0, 45.2, 70.2, 26.5, 36.3, 33.3, 22.2, 30.4),
    "RL_GRPO": (24.7, 61.6, 79.2, 33.7, 47.1, 75.6, 31.3, 42.1),
    "SFT -> RL": (32.5, 67.1, 84.2, 34.1, 54.6, 76.4, 37.9, 49.6),
    "LUFFY": (29.4, 65.6, 87.6, 37.5, 57.2, 80.5, 39.9, 53.0),
    "ReLIFT": (28.2, 64.8, 85.0, 37.1, 54.9, 74.9, 40.9, 51.9),
    "SRFT": (35.3, 74.3, 89.8, 39.7, 58.3, 85.3, 46.4, 55.9),
}
GROUPS = {"Avg. of the five": COLUMNS[:5], "Avg. of the three": COLUMNS[5:]}   # in-, out-of-distribution


def summarize(rows, kinds):
    """Rows of results.jsonl (benchmark -> list, each with samples 0..n-1 of every problem) -> for each
    benchmark its estimates by each verifier, truncated share, mean length, and counts of verdicts."""
    summary = {}
    for name, part in rows.items():
        part = sorted(part, key=lambda row: (row["id"], row["sample"]))
        n = 1 + part[-1]["sample"]
        views = list(kinds) + ["oat/repaired"] * any("oat/repaired" in row["verdicts"] for row in part)
        by = {view: [row["verdicts"].get(view) or verdict(row, kinds[0]) for row in part] for view in views}
        summary[name] = {
            "problems": len(part) // n, "samples": n,
            "truncated": float(np.mean([not row["finished"] for row in part])),
            "response_len": float(np.mean([row["tokens"] for row in part])),
            "graders_agree": float(np.mean([len({v["reward"] for v in vs}) == 1 for vs in
                                            zip(*(by[kind] for kind in kinds))])),
        } | {view: estimate(np.reshape([v["reward"] for v in vs], (-1, n)))
             | {"reasons": dict(Counter(v["reason"] for v in vs))} for view, vs in by.items()}
    return summary


def percent(estimates, name="accuracy"):
    error = estimates["stderr" if name == "accuracy" else f"{name}/stderr"]
    return f"{100 * estimates[name]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def markdown(summary, label, kinds, notes):
    """The summary as Markdown: beside Table 2, then in detail, then every departure from the protocol."""
    shown = [name for name in COLUMNS if name in summary] + [n for n in summary if n not in COLUMNS]
    groups = {title: names for title, names in GROUPS.items() if all(name in summary for name in names)}
    title = lambda name: BENCHMARKS[name].title if name in BENCHMARKS else name
    lines = ["| model | " + " | ".join([*map(title, shown), *groups]) + " |",
             "|---" * (1 + len(shown) + len(groups)) + "|"]
    for kind in kinds:
        cells = [percent(summary[name][kind]) for name in shown]
        cells += [f"{100 * np.mean([summary[name][kind]['accuracy'] for name in names]):.1f}"
                  for names in groups.values()]
        lines.append(f"| **{label}** ({kind}) | " + " | ".join(cells) + " |")
    for model, figures in TABLE_2.items() if set(shown) & set(COLUMNS) else ():
        paper = dict(zip(COLUMNS, figures))
        cells = [f"{paper[name]:.1f}" if name in paper else "" for name in shown]
        cells += [f"{np.mean([paper[name] for name in names]):.1f}" for names in groups.values()]
        lines.append(f"| {model} (paper) | " + " | ".join(cells) + " |")
    lines += ["", "| benchmark | problems | metric | verifier | % | pass@n % | truncated % | tokens | "
              "verdicts |", "|---" * 9 + "|"]
    for name in shown:
        one = summary[name]
        n, best = one["samples"], f"pass@{2 ** (one['samples'].bit_length() - 1)}"
        for view in [view for view in (*kinds, "oat/repaired") if view in one]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(one[view]["reasons"].items()))
            lines.append(
                f"| {title(name)} | {one['problems']} | {f'avg@{n}' if n > 1 else 'pass@1'} | {view} | "
                f"{percent(one[view])} | {best + ': ' + percent(one[view], best) if n > 1 else ''} | "
                f"{100 * one['truncated']:.1f} | {one['response_len']:.0f} | {reasons} |")
    lines += ["", "± is the standard error over problems, the samples' noise included."]
    if "amc23" in summary:
        lines[-1] += " The paper gives SRFT's AMC as 74.3 in Table 2, as 72.2 in Table 3."
    if any(name in summary for name in COLUMNS[5:]):
        lines[-1] += " Multiple choice is graded by its letter, whatever the verifier."
    if any("oat/repaired" in one for one in summary.values()):
        lines[-1] += (" oat/repaired also accepts references such as 4.5e33 written as LaTeX; the paper's "
                      "figure is probably plain oat's.")
    lines += ["", "Not as in the paper:", ""] * bool(notes) + [f"* {note}" for note in notes]
    return "\n".join(lines) + "\n"


def departures(args, summary):
    """What keeps these figures from the paper's protocol (Sec. 5.1, App. B), one sentence each."""
    notes = [f"--{name} {getattr(args, name)}, the paper: {paper}" for name, paper in
             (("temperature", 0.6), ("top_p", 1.0), ("max_tokens", 8192), ("template", "paper"))
             if getattr(args, name) != paper]
    for name, one in summary.items():
        expected = BENCHMARKS.get(name)
        if expected and one["problems"] != expected.count:
            notes.append(f"{expected.title}: {one['problems']} problems, the paper: {expected.count}")
        if expected and one["samples"] != expected.samples:
            notes.append(f"{expected.title}: {one['samples']} samples a problem, the paper: "
                         f"{expected.samples}")
    if "gsm8k" in summary:
        notes.append("GSM8K is not a benchmark of the paper")
    return notes + (["no verdict of the OAT-Grader"] if args.grader == "math-verify" else [])


# ----------------------------------------------------------------------------------------------------------
# The command line.

def parse(argv=None):
    """The command line -> argparse.Namespace. Unknown flags are errors."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message} (--help lists all flags)\n")

    def flag(name, default, help, **how):
        how = ({"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else
               {"type": type(default)} if default is not None and "choices" not in how else {}) | how
        help = help if default is None else f"{help} [{default}]"
        parser.add_argument(f"--{name}", default=default, help=help.replace("%", "%%"), **how)

    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name, or a run's folder")
    flag("benchmarks", ",".join(COLUMNS), f"of {', '.join(BENCHMARKS)}: NAME from the hub, NAME=PATH a local "
         "copy; or PATH, a file of one's own with problem and answer; separated by commas")
    flag("out", None, "folder of the results; default: RUN/eval, or out/eval/MODEL", metavar="DIR")
    flag("template", None, "prompt template (Fig. A3, Fig. A4; Table A1); default: the run's, else paper",
         choices=tuple(TEMPLATES))
    flag("grader", "both", "verifier: the paper's final one, its training one, or both (Sec. 5.1)",
         choices=("oat", "math-verify", "both"))
    flag("samples", 0, "responses a problem; 0: 32 for AIME24 and AMC, else 1 (Sec. 5.1)")
    flag("limit", None, "only the first problems of each benchmark", type=int)
    flag("temperature", 0.6, "sampling temperature (App. B: 0.6); 0 is greedy")
    flag("top_p", 1.0, "nucleus sampling; the paper is silent")
    flag("max_tokens", 8192, "longest response (App. B: 8,192)")
    flag("seed", 0, "of sampling and of the order of options")
    flag("rope_theta", 0.0, "RoPE theta; 0 keeps the model's own. App. B, for the base model: 40000")
    flag("window", 0, "context window in tokens; 0 keeps the model's own. App. B, for the base model: 16384")
    flag("grade_text", "after_think", "what is graded: after the last </think>, all, or nothing without one",
         choices=TEXTS)
    flag("strict_box", True, "Math-Verify grades the last box only, not any number it finds in the text")
    flag("score_unfinished", True, "a response cut at --max_tokens is graded like any other (public code)")
    flag("engine_memory", 0.9, "share of each GPU for vLLM")
    flag("engine_sequences", 256, "responses a rank decodes at once")
    flag("grader_workers", 0, "grading processes a rank; 0: the cores divided by the node's ranks")
    flag("grader_deadline", 10.0, "seconds until a grading process is killed, and its reward is 0")
    args = parser.parse_args(argv)
    for name, least in (("samples", 0), ("max_tokens", 1), ("engine_sequences", 1), ("temperature", 0.0),
                        ("seed", 0), ("grader_workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if not 0 < args.top_p <= 1 or args.grader_deadline <= 0:
        parser.error("--top_p must lie in (0, 1], --grader_deadline above 0")
    return args


def locate(args):
    """The folder to load; fills in --out and --template from a run's own folder."""
    path = Path(args.model)
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").exists():            # a run of srft.py
        if not (path / "hf").is_dir():
            raise ValueError(f"--model {path}: this run has no hf/ yet; it is written when training ends")
        args.out = args.out or str(path / "eval")
        args.template = args.template or json.loads((path / "config.json").read_text())["template"]
        return str(path / "hf")
    if path.is_file():
        raise ValueError(f"--model {path}: expected a folder, found a file")
    args.out = args.out or f"out/eval/{path.resolve().name if path.exists() else path.name}"
    args.template = args.template or "paper"
    return M.fetch(args.model, "model", "--model")


SETTINGS = ("model", "weights", "template", "grader", "temperature", "top_p", "max_tokens", "seed",
            "rope_theta", "window", "grade_text", "strict_box", "score_unfinished")


def settle(args, folder, rank=0):
    """Raise ValueError if --out holds results of another model or other settings; else rank 0 writes
    settings.json: all flags, of which SETTINGS must not change, the weights' files, versions, machine."""
    weights = {file.name: [file.stat().st_size, int(file.stat().st_mtime)]
               for file in sorted(Path(folder).glob("*.safetensors"))}
    settings = vars(args) | {"weights": weights}
    path = Path(args.out) / "settings.json"
    if path.exists() and (Path(args.out) / "results.jsonl").exists():
        known = json.loads(path.read_text())
        changed = [name for name in SETTINGS if known.get(name) != settings[name]]
        if changed:
            raise ValueError(f"{args.out} holds results of other settings; use another --out. " + "; ".join(
                f"{name} was {known.get(name)}, is {settings[name]}" for name in changed))
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(settings | environment(), indent=2))
        new.replace(path)                             # at once, for other ranks may be reading it


def prepare(args, tokenizer, window, say):
    """All tasks of all benchmarks. Raises ValueError for a prompt that leaves too little of the window."""
    tasks, seen = [], set()
    for source in args.benchmarks.split(","):
        name, problems = load_benchmark(source.strip(), args.seed, args.limit, say)
        if name in seen:
            raise ValueError(f"--benchmarks: two are called {name}; rename one file")
        seen.add(name)
        prompts = tokenize(problems, tokenizer, args.template, sys.maxsize, sys.maxsize, say)
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + args.max_tokens > window:
            raise ValueError(f"{name}: a prompt of {longest} tokens and --max_tokens {args.max_tokens} "
                             f"exceed the window of {window}: lower it, or raise --window")
        n = args.samples or (BENCHMARKS[name].samples if name in BENCHMARKS else 1)
        say(f"{name}: {len(problems)} problems x {n}")
        tasks += [Task(name, prompt, k) for prompt in prompts for k in range(n)]
    return tasks


def measure(args):
    """The whole evaluation on this rank; rank 0 writes and returns the summary."""
    rank, world, device, _ = M.init_distributed(timeout_minutes=7 * 24 * 60)        # ranks end hours apart
    say = print if rank == 0 else lambda *_: None
    folder = locate(args)
    config = M.load_config(folder, args.rope_theta, args.window)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = prepare(args, tokenizer, config.max_position_embeddings, say)
    settle(args, folder, rank)
    dist.barrier()
    kinds = ["oat", "math-verify"] if args.grader == "both" else [args.grader]
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    path = Path(args.out) / "results.jsonl"
    with Grader(kinds[0], args.grader_workers or None, args.grader_deadline, text=args.grade_text,
                strict_box=args.strict_box, score_unfinished=args.score_unfinished) as grader:
        check_references(grader, tasks, kinds, say)
        known = known_results(path, tasks)
        if len(known) < len(tasks):
            engine = RolloutEngine(
                config, tokenizer, torch.bfloat16 if device.type == "cuda" else torch.float32,
                max(len(task.prompt.ids) for task in tasks) + args.max_tokens, args.engine_sequences,
                args.engine_memory, seed=args.seed)
            engine.sync_weights(stored_tensors(folder), version=0)
            run(engine, grader, tasks, known, sampling, kinds, path, chunk_size=4 * args.engine_sequences)
            known = known_results(path, tasks)
            engine.close()                            # takes the process group with it
    if rank == 0:
        rows = {}
        for task in tasks:
            rows.setdefault(task.benchmark, []).append(known[task.key])
        summary = summarize(rows, kinds)
        table = markdown(summary, args.model, kinds, departures(args, summary))
        (Path(args.out) / "summary.md").write_text(table)
        (Path(args.out) / "summary.json").write_text(json.dumps(summary, indent=2))
        print(f"\n{table}\n{args.out}: summary.md, summary.json, results.jsonl")
    if dist.is_initialized():
        dist.destroy_process_group()


def check_references(grader, tasks, kinds, say):
    """Name the reference answers that cannot be matched even by themselves: their problems score 0."""
    if dist.get_rank():
        return
    for kind in kinds:
        answers = {(task.benchmark, e.id): e.answer for task in tasks
                   if getattr(e := task.prompt.example, "order", None) is None}
        bad = grader.check(list(answers.values()), kind)
        for i, reason in bad.items():
            name, id = list(answers)[i]
            say(f"{name}, {id}: {kind} cannot match the reference answer {answers[name, id]!r} "
                f"even by itself ({reason})")


def main(argv=None):
    args = parse(argv)
    try:
        measure(args)
    except (ValueError, FileNotFoundError) as error:    # a mistake of the caller: one line, no traceback
        rank = os.environ.get("RANK")
        sys.exit(f"eval.py{f' (rank {rank})' if rank else ''}: {error}")


if __name__ == "__main__":
    main()
