"""The paper's tables and figures on the tiny task: every paradigm, the same number of steps for all, several seeds.

    python experiments/tiny_paper.py                 # everything: about 5 hours on 2 cores; goes on where it was stopped
    python experiments/tiny_paper.py --quick         # Tables 1-3 and the figures in 5 minutes: 2 steps, 1 seed; they mean nothing
    python experiments/tiny_paper.py --only table1   # a part (table1, table2, table3, switches, reviews) and what it needs
    python experiments/tiny_paper.py --report        # no runs: tables, figures and claims from the results that are there

One run is one process on one core. Its metrics go to experiments/results/runs/NAME-SEED/, its models to out/tiny_paper/ (which a
next stage and Fig. 2 and 3 need). Learning rates come from one grid for all, tuned for each paradigm, each ablation of Table 3 and
each second stage on `tiny:valid`, which nothing else looks at, by a seed that is not among those reported. --report writes
experiments/results/ and fills in the table of claims in experiments/README.md by a rule fixed beforehand: see `verdict`.
"""
import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),              # of all processes started
               "CUDA_VISIBLE_DEVICES": ""}
import preloaded                                                                                   # noqa: E402
from data import TINY_SPLITS, Example, tiny_examples, tiny_problem, tiny_response, tiny_terms      # noqa: E402
from runlog import read_rows                                                                       # noqa: E402

STEPS, STAGE = 40, 28              # of every paradigm; of SFT in the sequences: 70 %, as 350 of the paper's 500
GRID = (1e-4, 3e-4, 1e-3, 3e-3)
TUNING_SEED = 100
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}   # Student's t by seeds


# ----------------------------------------------------------------------------------------------------------
# The runs.

@dataclass(frozen=True)
class Run:
    """One run of srft.py. start: the run whose hf/ it starts from; lr: the run whose tuned learning rate it takes."""
    method: str
    steps: int = STEPS
    start: str = ""
    flags: tuple = ()
    lr: str = ""


def sequence(first, second, switch):
    return {f"{first}-{switch}": Run(first, switch, lr=first),
            f"{first}-{switch}>{second}": Run(second, STEPS - switch, f"{first}-{switch}")}


REST = STEPS - STAGE
WEAK = ("--data", "out/tiny_paper/weak.jsonl")
QWEN = ("--model", "experiments/qwen3")
TABLE1 = {"sft": Run("sft"), "grpo": Run("grpo"), **sequence("sft", "grpo", STAGE), **sequence("grpo", "sft", REST),
          f"grpo-{REST}>sft_kl": Run("sft_kl", STAGE, f"grpo-{REST}", ("--reference", "tiny"))}
TABLE2 = {"sft_kl": Run("sft_kl"), "sft+rl": Run("sft+rl"), "luffy": Run("luffy"), "relift": Run("relift"), "srft": Run("srft"),
          "sft-12": Run("sft", 12, lr="sft"), "sft-12>grpo": Run("grpo", 28, "sft-12", lr=f"sft-{STAGE}>grpo"),
          "sft-20": Run("sft", 20, lr="sft"), "sft-20>grpo": Run("grpo", 20, "sft-20", lr=f"sft-{STAGE}>grpo"),
          "grpo-truncated": Run("grpo", flags=("--entropy_quantile", "0.8"), lr="grpo")}
TABLE3 = {"srft-w_sft-1": Run("srft", flags=("--w_sft", "one")), "srft-w_rl-1": Run("srft", flags=("--w_rl", "one"))}
SWITCHES = {f"srft {flags}": Run("srft", flags=tuple(flags.split()), lr="srft") for flags in (
    "--w_sft_sign 1", "--eq12_advantage", "--demo_shaping 0.1", "--loss_norm token", "--entropy_level token",
    "--entropy_level batch", "--demo_in_group replaces", "--no-std_in_advantage")}
SECOND_FAMILY = {f"{name} qwen3": Run(name, flags=QWEN) for name in ("sft", "grpo", "sft+rl", "srft")}
REVIEWS = {"sft-12": TABLE2["sft-12"], "sft-12>grpo": TABLE2["sft-12>grpo"], "sft-12>srft": Run("srft", 28, "sft-12"),
           **{f"{name} weak": Run(name, flags=WEAK, lr=name) for name in ("sft", "sft+rl", "luffy", "srft")}}
# What Fig. 3 measures distances to, as the paper does to DeepSeek-R1 and QwQ-32B: experts, each in a style of its own.
EXPERTS = {f"expert-{style}": Run("sft", 2 * STEPS, flags=("--data", f"out/tiny_paper/{style}.jsonl"), lr="sft")
           for style in ("careful", "plain")}
PARTS = {"table1": TABLE1, "table2": TABLE1 | TABLE2, "table3": {"srft": TABLE2["srft"], **TABLE3},
         "switches": {"srft": TABLE2["srft"], **SWITCHES}, "reviews": TABLE1 | TABLE2 | REVIEWS | SECOND_FAMILY}
RUNS = TABLE1 | TABLE2 | TABLE3 | SWITCHES | REVIEWS | SECOND_FAMILY | EXPERTS

KEPT = ("step", "eval", "reward/mean", "response_len/mean", "entropy/", "loss/", "w_", "grad_norm", "lr", "time/step")


class Bench:
    """Where runs and results lie, and the starting of processes."""

    def __init__(self, args):
        self.quick, self.jobs = args.quick, args.jobs
        os.chdir(ROOT)                      # paths are relative: they end up in results that are committed
        self.out = Path("out/tiny_paper_quick" if args.quick else "out/tiny_paper")
        self.results = self.out / "results" if args.quick else Path("experiments/results")
        self.tuning, self.seeds = self.results / "tuning.json", [0] if args.quick else list(range(args.seeds))

    def steps(self, run):
        return run.steps if not self.quick else 1 if run.start or f"{run.method}-{run.steps}" in RUNS else 2

    def scores(self):
        """{"run rate": accuracy on tiny:valid} of what was tuned so far."""
        return json.loads(self.tuning.read_text()) if self.tuning.exists() else {}

    def lr(self, name):
        """The best rate of the grid; a tie goes to the smaller one."""
        scores, name = self.scores(), RUNS[name].lr or name
        return 3e-4 if self.quick else max(GRID, key=lambda lr: scores[f"{name} {lr:g}"])

    def folder(self, name, seed, lr=None):
        name = name.replace(" ", "").replace(">", "_to_").replace("+", "_plus_")          # "+" joins runs in analysis.py
        return self.out / (f"{name}-{seed}" + (f"-lr{lr:g}" if lr else ""))

    def known(self, name, seed):
        return self.results / "runs" / self.folder(name, seed).name

    def start(self, command, log):
        """Run a command on one thread; its output to `log`. Raises RuntimeError with the log's end."""
        log.parent.mkdir(parents=True, exist_ok=True)
        child = preloaded.start(command, output=log)
        if child.wait():
            raise RuntimeError(f"{' '.join(map(str, command))} failed; the end of {log}:\n{child.text()[-1500:]}")

    def train(self, name, seed, lr, evaluation, folder):
        """One run of srft.py, whole or not at all. Raises RuntimeError if it failed, or was stopped."""
        run, began, seconds = RUNS[name], time.time(), Path(f"{folder}.seconds")
        if seconds.exists() and (folder / "hf").is_dir():
            return
        shutil.rmtree(folder, ignore_errors=True)
        start = ["--model", self.folder(run.start, seed) / "hf" if run.start else "tiny"]
        small = ["--prompts_per_step", 4, "--n_rollouts", 4] if self.quick else []
        every = 1 if self.quick else run.steps if seed == TUNING_SEED else 4 if run.start else 8
        flags = [flag.replace("tiny_paper/", f"{self.out.name}/") for flag in run.flags]
        self.start(["srft.py", "--preset", "tiny", "--method", run.method, "--steps", self.steps(run), "--seed", seed, "--lr", lr,
                    "--eval_data", evaluation, "--eval_every", every, "--grader_workers", 1, "--log_samples", 1,
                    # checkpoints along the way only where Fig. 3 draws a trajectory
                    "--save_every", 4 if seed == 0 else 1000, "--keep", 99,
                    *(["--term_gradients", 1 if self.quick else 4] if run.method == "srft" else []), *small, *start, *flags,
                    "--out", folder],
                   Path(f"{folder}.log"))
        if not (folder / "hf").is_dir():                            # a signal: srft.py ends after its step, with exit code 0
            raise RuntimeError(f"{folder}: stopped before its end; the same command starts it again")
        seconds.write_text(f"{time.time() - began:.0f}")


def evaluation_sets(bench):
    """The names of the sets; in quick mode, of files with a few of their problems."""
    if not bench.quick:
        return "tiny:heldout,tiny:long"
    for split in ("heldout", "long"):
        write_examples(bench.out / f"{split}.jsonl", tiny_examples(split)[:4])
    return f"{bench.out}/heldout.jsonl,{bench.out}/long.jsonl"


def write_examples(file, examples):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": e.id, "problem": e.problem, "answer": e.answer, "solution": e.demo} for e in examples]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))


def terms_of(example):
    """"12+34-5=?" -> [12, 34, -5]"""
    return [int(term) for term in example.problem.removesuffix("=?\n").replace("-", "+-").split("+")]


def weak_demonstrations():
    """The training problems with demonstrations that slip in 15 % of their lines, not 3 %: most end in a wrong answer."""
    rng, examples = random.Random(5), tiny_examples("train")
    for e in examples:
        e.demo = tiny_response(terms_of(e), rng, "careful", slip=0.15)
    return examples


def expert_demonstrations(style):
    """2,048 new problems of 3 to 8 terms, answered in one style without a slip."""
    rng, known = random.Random(6), {e.problem for split in TINY_SPLITS for e in tiny_examples(split)}
    examples = {}
    while len(examples) < 2048:
        terms = tiny_terms(rng, rng.choice((3, 4, 5, 6, 7, 8)))
        if (problem := tiny_problem(terms)) not in known:
            examples[problem] = Example(f"{style}/{len(examples)}", problem, str(sum(terms)), tiny_response(terms, rng, style))
    return list(examples.values())


def held_out_demonstrations():
    """The held-out problems, demonstrated as those of training are: for Fig. 2(b), on texts that no run has seen."""
    rng, examples = random.Random(7), tiny_examples("heldout")
    for e in examples:
        e.demo = tiny_response(terms_of(e), rng, "careful", slip=0.03)
    return examples


def tune(bench, pool, wanted):
    """The accuracy on tiny:valid of what is wanted and has no other run's rate, at each rate; first stages before second ones."""
    if bench.quick:
        return
    scores, lock = bench.scores(), threading.Lock()
    bench.results.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(RUNS[name].lr or name for name in wanted)

    def score(name, lr):
        key = f"{name} {lr:g}"
        if key not in scores:
            folder = bench.folder(name, TUNING_SEED, lr)
            bench.train(name, TUNING_SEED, lr, "tiny:valid", folder)
            with lock:
                scores[key] = read_rows(folder / "metrics.jsonl")[-1]["eval/valid"]
                partial = bench.tuning.with_suffix(".partial")
                partial.write_text(json.dumps(scores, indent=1))
                partial.rename(bench.tuning)
            print(f"tuning {key}: {scores[key]:.3f}", flush=True)

    for second in (False, True):
        jobs = [(name, lr) for name in names if bool(RUNS[name].start) == second for lr in GRID if f"{name} {lr:g}" not in scores]
        starts = sorted({RUNS[name].start for name, _ in jobs if second})       # what they start from, by the rate just found
        list(pool.map(lambda name: bench.train(name, TUNING_SEED, bench.lr(name), "tiny:valid", bench.folder(name, TUNING_SEED)), starts))
        list(pool.map(lambda job: score(*job), jobs))


def run_all(bench, wanted):
    """Train what is wanted and not known yet, seed by seed, what others start from first; then measure Fig. 2 and 3."""
    evaluation = evaluation_sets(bench)
    write_examples(bench.out / "weak.jsonl", weak_demonstrations())
    write_examples(bench.out / "demonstrated.jsonl", held_out_demonstrations())
    for style in ("careful", "plain"):
        write_examples(bench.out / f"{style}.jsonl", expert_demonstrations(style))
    with ThreadPoolExecutor(bench.jobs) as pool:
        if any(run.flags == QWEN for run in wanted.values()) and not Path(QWEN[1], "model.safetensors").exists():
            print(f"pretraining the base model of a second family, {QWEN[1]}: half an hour", flush=True)
            bench.start(["tiny/make.py", QWEN[1], "qwen3"], bench.out / "make.log")
        tune(bench, pool, wanted)
        if set(SHOWN.values()) <= set(wanted) and not (bench.results / "fig3.json").exists():
            list(pool.map(lambda name: bench.train(name, 0, bench.lr(name), evaluation, bench.folder(name, 0)), EXPERTS))
        for seed in bench.seeds:
            for stage in ("", ">"):
                names = [name for name in wanted if (stage == ">") == (">" in name)]
                list(pool.map(lambda name: one(bench, name, seed, evaluation, wanted), names))
            measure(bench, seed, wanted, pool)
            print(f"seed {seed}: done", flush=True)


def one(bench, name, seed, evaluation, wanted):
    """Train one run, unless its results are there and nothing asks for its model; keep its metrics."""
    known, folder = bench.known(name, seed), bench.folder(name, seed)
    asked_for = any(run.start == name and not (bench.known(other, seed) / "metrics.jsonl").exists()
                    for other, run in RUNS.items() if other in wanted)
    asked_for |= not measured(bench, seed, wanted) and name in (*SHOWN.values(), *(TRAJECTORY if seed == 0 else ()))
    if (known / "metrics.jsonl").exists() and not asked_for:
        return
    bench.train(name, seed, bench.lr(name), evaluation, folder)
    rows = [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items() if k.startswith(KEPT) and v is not None}
            for row in read_rows(folder / "metrics.jsonl")]
    known.mkdir(parents=True, exist_ok=True)
    (known / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {
        "seconds": int(Path(f"{folder}.seconds").read_text())}, indent=1))
    (known / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{known.name}: " + "  ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if k.startswith("eval/")), flush=True)


# ----------------------------------------------------------------------------------------------------------
# Fig. 2 and 3, which need the models.

SHOWN = {"SFT": "sft", "RL": "grpo", "SRFT": "srft"}
TRAJECTORY = (f"sft-{STAGE}", f"sft-{STAGE}>grpo")                             # Fig. 3 shows this one, too


def measured(bench, seed, wanted):
    return not set(SHOWN.values()) <= set(wanted) or (bench.results / f"fig2b-own-{seed}.json").exists()


def measure(bench, seed, wanted, pool):
    """analysis.py on this seed's models: Fig. 2(b) for every seed, Fig. 2(a) and 3 for seed 0."""
    if measured(bench, seed, wanted):
        return
    results, scale = bench.results, ["--template", "none", "--max_prompt_tokens", 64, "--max_response_tokens", 160]
    data = ["--data", bench.out / "demonstrated.jsonl", "--limit", 5 if bench.quick else 200, *scale]
    analysis = lambda *args: bench.start(["analysis.py", *args], bench.out / f"{args[0]}-{time.time_ns()}.log")
    tuned = [f"{label}={bench.folder(name, seed)}" for label, name in SHOWN.items()]
    models = {"base": "tiny", **{label: bench.folder(name, seed) for label, name in SHOWN.items()},
              **({name: bench.folder(name, 0) for name in EXPERTS} if seed == 0 else {})}
    own = {label: bench.out / f"responses-{label}-{seed}.jsonl" for label in models}
    list(pool.map(lambda label: analysis("respond", "--model", models[label], "--out", own[label], "--seed", seed, *data), own))
    jobs = [("fig2b", "--base", "tiny", "--tuned", *tuned, "--out", results / f"fig2b-demo-{seed}", *data)]
    if seed == 0:
        jobs += [("fig2a", "--base", "tiny", "--tuned", pair, "--out", results / f"fig2a-{label}", *data)
                 for pair, label in zip(tuned, SHOWN)]
        trajectories = [*tuned, "SFT->RL=" + "+".join(str(bench.folder(name, 0)) for name in TRAJECTORY)]
        jobs += [("fig3", "--references", *[f"{label}={own[label]}" for label in ("base", *EXPERTS)], "--runs", *trajectories,
                  "--out", results / "fig3", *scale[2:])]
    list(pool.map(lambda job: analysis(*job), jobs))
    analysis("fig2b", "--base", "tiny", "--tuned", *tuned, "--responses", *[own[label] for label in SHOWN],
             "--out", results / f"fig2b-own-{seed}", *scale)                # last: it says that all are there


# ----------------------------------------------------------------------------------------------------------
# Tables, figures, claims.

class Results:
    """What is known: rows of each run and seed, and numbers made from them, one a seed."""

    def __init__(self, bench):
        self.bench = bench
        self.rows = {(name, seed): rows for name in RUNS for seed in bench.seeds
                     if (rows := read_rows(bench.known(name, seed) / "metrics.jsonl"))}

    def each(self, name, value):
        """{seed: value(rows)}"""
        return {seed: value(rows) for (run, seed), rows in self.rows.items() if run == name}

    def final(self, name, metric="accuracy"):
        """{seed: accuracy at the end}, in percent: held out, long, or the mean of the two."""
        of = {"heldout": ("eval/heldout",), "long": ("eval/long",), "accuracy": ("eval/heldout", "eval/long")}[metric]
        return self.each(name, lambda rows: 100 * float(np.mean([rows[-1][key] for key in of])))


    def steps_to(self, name, level):
        """{seed: the first multiple of 8 steps, counted through a sequence, at which `percent` is at least `level`; else 8 more
        than all steps}. At multiples of 8 every run was evaluated."""
        run, found = RUNS[name], {}
        for seed, rows in self.each(name, lambda rows: rows).items():
            first = RUNS[run.start].steps if run.start else 0
            rows = [(row["step"], row) for row in self.rows.get((run.start, seed), [])] + [(first + row["step"], row) for row in rows]
            found[seed] = next((step for step, row in rows if step % 8 == 0 and "eval/long" in row and percent(row) >= level),
                               first + run.steps + 8)
        return found


def percent(row):
    """The mean of both accuracies of a row that was evaluated, in percent."""
    return 50 * (row["eval/heldout"] + row["eval/long"])


def interval(values):
    """(mean, half width of its 95 % interval by Student's t, seeds); the half width is None for one seed."""
    values = list(values)
    n = len(values)
    half = T_95[n] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None
    return (float(np.mean(values)) if n else None), half, n


def difference(a, b):
    """interval of a - b over the seeds that both have: the same seed means the same order of data and the same draws."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def verdict(mean, half, least=0.0):
    """The rule: a claim "x > least" holds if the whole 95 % interval lies above, does not if all of it lies below."""
    if half is None:
        return "cannot tell"
    return "holds" if mean - half > least else "does not hold" if mean + half < least else "cannot tell"


def shown(mean, half, n=None, digits=1):
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + (f" \u00b1 {half:.{digits}f}" if half is not None else "")


def of(n):
    return f"{n} seed" + "s" * (n > 1)


def table(results, title, runs):
    """Markdown: accuracy at the end of each run, mean and 95 % interval over seeds."""
    lines = [f"**{title}**", "", "| run | held-out | long | mean | lr | seeds |", "|---|---|---|---|---|---|"]
    start = [results.each(name, lambda rows: rows[0]) for name in runs if not RUNS[name].start]
    start = max(start, key=len, default={})                                  # the base model, by each seed's draws
    if start:
        held, longer = ([100 * row[f"eval/{split}"] for row in start.values()] for split in ("heldout", "long"))
        cells = [shown(*interval(values)) for values in (held, longer, [(h + l) / 2 for h, l in zip(held, longer)])]
        lines.append(f"| base | {' | '.join(cells)} | | {len(start)} |")
    for name in runs:
        if results.final(name):
            cells = [shown(*interval(results.final(name, m).values())) for m in ("heldout", "long", "accuracy")]
            lines.append(f"| {name} | {' | '.join(cells)} | {results.bench.lr(name):g} | {len(results.final(name))} |")
    return "\n".join(lines) + "\n"


def claims(results):
    """[(claim, figure, verdict)] of the paper's text and of its reviewers' questions."""
    rows, accuracy = [], lambda name: results.final(name)
    minus = lambda a, b: difference(accuracy(a), accuracy(b))

    def claim(text, found, unit="points", least=0.0, digits=1):
        mean, half, n = found
        if n:
            rows.append((text, f"{shown(mean, half, digits=digits)}{unit and f' {unit}'}, {of(n)}", verdict(mean, half, least)))

    for source, words in (("demo", "of held-out demonstrations"), ("own", "of its own responses")):
        fig = {seed: json.loads(file.read_text()) for seed in results.bench.seeds
               if (file := results.bench.results / f"fig2b-{source}-{seed}.json").exists()}
        changed = lambda label: {seed: 100 * found[label]["changed by more than 0.1"] for seed, found in fig.items()}
        if fig:
            claim(f"SFT changes more tokens than RL (by > 0.1; share of the tokens {words}; Fig. 2b)",
                  difference(changed("SFT"), changed("RL")))
            claim(f"SRFT lies between: changes fewer than SFT ({words}; Fig. A1)", difference(changed("SFT"), changed("SRFT")))
            claim(f"SRFT lies between: changes more than RL ({words}; Fig. A1)", difference(changed("SRFT"), changed("RL")))
    forward, backward = f"sft-{STAGE}>grpo", f"grpo-{REST}>sft"
    claim("SFT->RL beats RL->SFT (Table 1)", minus(forward, backward))
    claim("SFT->RL beats SFT (Table 1)", minus(forward, "sft"))
    claim("SFT->RL beats RL (Table 1)", minus(forward, "grpo"))
    claim("RL beats SFT (Table 1; in Table 2 it is SFT that beats RL)", minus("grpo", "sft"))
    claim("RL->SFT loses to RL (Table 1)", minus("grpo", backward))
    claim("RL->SFT loses to SFT (Table 1)", minus("sft", backward))
    claim("KL in SFT does not rescue RL->SFT: RL stays ahead of RL->SFT_KL (Table 1)", minus("grpo", f"{backward}_kl"))
    entropy = lambda rows: np.mean([rows["eval_entropy/heldout"], rows["eval_entropy/long"]])
    evaluated = lambda rows: [row for row in rows if "eval_entropy/heldout" in row]
    switch = lambda value: [value(evaluated(rows)[1]) - value(evaluated(rows)[0])
                            for (name, seed), rows in results.rows.items() if name == backward]
    claim("accuracy falls when SFT follows RL (Fig. 4a: four steps after the switch)", interval([-x for x in switch(percent)]))
    claim("entropy jumps when SFT follows RL (Fig. 4b: four steps after the switch)", interval(switch(entropy)), "nats", digits=3)
    fall = {seed: entropy(evaluated(rows)[0]) - entropy(evaluated(rows)[-1])
            for (name, seed), rows in results.rows.items() if name == "grpo"}
    claim("RL lowers entropy (Fig. 4b)", interval(fall.values()), "nats", digits=3)
    sequences = [f"sft-{switch}>grpo" for switch in (12, 20, STAGE)]
    if all(results.final(name) for name in (*sequences, "sft+rl")):
        level = 0.9 * min(float(np.mean(list(accuracy(name).values()))) for name in (*sequences, "sft+rl"))
        until = {name: results.steps_to(name, level) for name in (*sequences, "sft+rl")}
        fastest = min(sequences, key=lambda name: np.mean(list(until[name].values())))
        claim(f"SFT+RL in one stage needs fewer steps than the fastest SFT->RL ({fastest}), to {level:.0f} % (Fig. 5)",
              difference(until[fastest], until["sft+rl"]), "steps")
    claim("SFT+RL beats RL (Fig. 5)", minus("sft+rl", "grpo"))
    for name in ("sft", "sft_kl", "grpo", forward, "sft+rl", "luffy", "relift"):
        claim(f"SRFT beats {name} (Table 2)", minus("srft", name))
    for metric, words in (("heldout", "in distribution"), ("long", "out of distribution")):
        claim(f"SRFT beats RL {words} (Sec. 5.2)", difference(results.final("srft", metric), results.final("grpo", metric)))
    claim("w_SFT matters: SRFT beats SRFT with w_SFT = 1 (Table 3)", minus("srft", "srft-w_sft-1"))
    claim("w_RL matters: SRFT beats SRFT with w_RL = 1 (Table 3)", minus("srft", "srft-w_rl-1"))
    late = lambda rows: np.mean([row["entropy/rollout"] for row in rows[1:][-10:]])
    claim("SRFT keeps more entropy than RL (Fig. 6c: last 10 steps)", difference(results.each("srft", late), results.each("grpo", late)),
          "nats", digits=3)
    grown = lambda rows: rows[-1]["response_len/mean"] - rows[1]["response_len/mean"]
    claim("SRFT lengthens responses (Fig. 6b)", interval(results.each("srft", grown).values()), "tokens")
    claim("RL shortens responses (Fig. 6b)", interval([-x for x in results.each("grpo", grown).values()]), "tokens")
    reward = lambda rows: np.mean([row["reward/mean"] for row in rows[1:]])
    claim("SRFT's reward rises faster than RL's (Fig. 6a: mean over all steps)",
          difference(results.each("srft", reward), results.each("grpo", reward)), "", digits=3)
    claim("without gradients on low-entropy tokens RL loses less than 3 points (Fig. A2)", minus("grpo-truncated", "grpo"), least=-3.0)
    return rows


def reviews(results):
    """[(question, figure, verdict)] of what the paper's reviewers asked, and of each switch of the table of decisions."""
    rows, accuracy = [], lambda name: results.final(name)

    def ask(text, a, b, least=0.0):
        mean, half, n = difference(accuracy(a), accuracy(b))
        if n:
            rows.append((text, f"{shown(mean, half)} points, {of(n)}", verdict(mean, half, least)))

    ask("from the same fine-tuned start (12 steps of SFT), SRFT beats RL", "sft-12>srft", "sft-12>grpo")
    for name in ("sft", "sft+rl", "luffy"):
        ask(f"weak demonstrations: SRFT beats {name}", "srft weak", f"{name} weak")
    ask("weak demonstrations: SRFT still beats RL, which sees none", "srft weak", "grpo")
    ask("weak demonstrations cost SRFT less than 3 points", "srft weak", "srft", least=-3.0)
    for name in ("sft", "grpo", "sft+rl"):
        ask(f"second family (Qwen3): SRFT beats {name}", "srft qwen3", f"{name} qwen3")
    terms = ("sft_demo", "rl_demo", "rl_pos", "rl_neg")
    norms = {seed: [np.mean([row[f"grad_norm/{term}"] for row in rows if f"grad_norm/{term}" in row]) for term in terms]
             for (name, seed), rows in results.rows.items() if name == "srft"}
    for term, *values in zip(terms, *norms.values()) if norms else ():
        shares = [100 * v / sum(norms[seed]) for v, seed in zip(values, norms)]
        rows.append((f"is it distillation? Share of {term} in the sum of the terms' gradient norms, all steps",
                     f"{shown(*interval(shares))} %, {of(len(shares))}", ""))
    for name in SWITCHES:
        mean, half, n = difference(accuracy(name), accuracy("srft"))
        if n:
            rows.append((f"`{name.removeprefix('srft ')}` against the default", f"{shown(mean, half)} points, {of(n)}",
                         {"holds": "better", "does not hold": "worse"}.get(verdict(mean, half), "cannot tell")))
    return rows


def report(bench):
    """tables.md, the figures of curves, and the table of claims in experiments/README.md (quick: in the results' folder)."""
    results = Results(bench)
    if not results.rows:
        raise SystemExit("no results yet: run without --report")
    parts = {"Table 1: SFT, RL and sequences": TABLE1, "Table 2: SRFT and its baselines": {"sft": 0, "grpo": 0, f"sft-{STAGE}>grpo": 0} | TABLE2,
             "Table 3: without the entropy weights": {"srft": 0} | TABLE3, "Switches of the table of decisions": {"srft": 0} | SWITCHES,
             "What the reviewers asked": REVIEWS, "A second family, Qwen3": SECOND_FAMILY}
    (bench.results / "tables.md").write_text("\n".join(
        table(results, title, runs) for title, runs in parts.items() if any(map(results.final, runs))))
    row = lambda cells: "| " + " | ".join(cells) + " |"
    text = "\n".join(["| claim | found | |", "|---|---|---|", *map(row, claims(results)), "", "| asked | found | |", "|---|---|---|",
                      *map(row, reviews(results))])
    page = Path("experiments/README.md")
    if bench.quick or not page.exists():
        (bench.results / "claims.md").write_text(text + "\n")
    else:
        before, _, after = page.read_text().partition("<!-- claims -->\n")
        page.write_text(f"{before}<!-- claims -->\n{text}\n<!-- end of claims -->{after.partition('<!-- end of claims -->')[2]}")
    curve = lambda *names: ",".join("+".join(str(bench.known(name, seed)) for name in names) for seed in bench.seeds
                                    if all((name, seed) in results.rows for name in names))
    sequences = {f"SFT->RL, {n} + {STEPS - n}": curve(f"sft-{n}", f"sft-{n}>grpo") for n in (12, 20, STAGE)}
    back = {"RL->SFT": curve(f"grpo-{REST}", f"grpo-{REST}>sft"), "RL->SFT_KL": curve(f"grpo-{REST}", f"grpo-{REST}>sft_kl")}
    single = {"RL": curve("grpo"), "SFT": curve("sft"), "SFT+RL": curve("sft+rl"), "SRFT": curve("srft")}
    figures = {"fig4": {**dict([list(sequences.items())[-1]]), **back}, "fig5": {"RL": single["RL"], **sequences, "SFT+RL": single["SFT+RL"]},
               "fig6": {"RL": single["RL"], "SRFT": single["SRFT"]}, "figA2": {"RL": single["RL"], "RL, truncated": curve("grpo-truncated")}}
    for name, curves in figures.items():
        if all(curves.values()):
            bench.start(["analysis.py", name, *(f"{label}={runs}" for label, runs in curves.items()), "--out", bench.results / name],
                        bench.out / f"{name}.log")
    print((bench.results / "tables.md").read_text(), text, sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Tables 1-3 and the figures in miniature, to out/tiny_paper_quick/")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="a part and what it needs; may be repeated")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11), metavar="1..10", help="seeds 0, 1, ... of each run "
                        "[%(default)s]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, one core each [%(default)s]")
    parser.add_argument("--report", action="store_true", help="no runs, only tables, figures and claims")
    args = parser.parse_args()
    bench = Bench(args)
    if not args.report:
        parts = args.only or (["table1", "table2", "table3"] if args.quick else PARTS)
        wanted = {name: run for part in parts for name, run in PARTS[part].items()}
        run_all(bench, wanted)
    report(bench)


if __name__ == "__main__":
    main()
