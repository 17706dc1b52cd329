"""The paper's tables and figures on the tiny task: every paradigm, the same number of steps, several seeds.

    python experiments/tiny_paper.py                 # everything; may be stopped
    python experiments/tiny_paper.py --quick         # Tables 1-3, figures in 5 minutes: 2 steps, no meaning
    python experiments/tiny_paper.py --only table1   # a part and what it needs (see --help); may repeat
    python experiments/tiny_paper.py --report        # no runs: tables, figures, claims from what is there

One run (runs.py) is one process on one core. Its metrics become a line of a file of experiments/results/runs/
(records.py), its models go to out/tiny_paper/ (which a next stage and Fig. 2 and 3 need). Learning rates come
from one grid for all, tuned for each paradigm, each ablation, each second stage and each other model on
`tiny:valid`, which nothing else looks at, by a seed that is not among those reported. claims.py makes
experiments/results/ and the claims of experiments/README.md of it. A run is made again when its definition in
runs.py, its rate, or its first stage has changed since; after a change of srft.py or of the task, delete
results/ and out/tiny_paper/ (for --quick, out/tiny_paper_quick/).
"""
import argparse
import fcntl
import json
import math
import os
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
               "CUDA_VISIBLE_DEVICES": ""}                                  # of all processes started
import claims  # noqa: E402
import preloaded  # noqa: E402
from config import sequences_per_prompt  # noqa: E402
from data import Example, load_examples  # noqa: E402
from records import Records  # noqa: E402
from runs import (  # noqa: E402
    BEYOND,
    EXPERTS,
    GRID,
    PARTS,
    RATES,
    RUNS,
    SHOWN,
    SLIPS,
    TRAJECTORY,
    TUNING_SEED,
    table_of,
)
from support.intervals import positive  # noqa: E402
from support.runlog import read_rows  # noqa: E402
from tiny.task import SPLITS, draw_terms, write_problem, write_response  # noqa: E402

# What is committed of a run: these metrics, and of tables not in CURVES only the steps that were evaluated.
KEPT = ("step", "eval", "reward/mean", "response_len/", "entropy/", "grad_norm", "time/step", "tflop",
        "loss/rl_neg", "steps_skipped")
CURVES = ("table1", "table2", "stability")
# The errors of a run that training has broken (support/health.py).
DEATHS = ("the policy is dead", "the gradient was not finite", "engine and trainer disagree")


class Bench:
    """Where runs and results lie, and the starting of processes."""

    def __init__(self, args):
        self.quick, self.jobs = args.quick, args.jobs
        os.chdir(ROOT)                      # paths are relative: they end up in results that are committed
        self.out = Path("out/tiny_paper_quick" if args.quick else "out/tiny_paper")
        self.results = self.out / "results" if args.quick else Path("experiments/results")
        self.tuning = self.results / "tuning.json"
        self.records = Records(self.results / "runs")
        self.seeds = [0] if args.quick else list(range(args.seeds))

    def steps(self, run):
        """Of a run; in quick mode 2, as in a sequence its two stages together."""
        if not self.quick:
            return run.steps
        is_a_stage = run.start or f"{run.method}-{run.steps}" in RUNS
        return 1 if is_a_stage else 2

    def scores(self):
        """{"run rate": accuracy on tiny:valid} of what was tuned so far."""
        return json.loads(self.tuning.read_text()) if self.tuning.exists() else {}

    def lr(self, name):
        """The best rate of those tried, 0 before; a tie goes to the smaller one."""
        given = RUNS[name].lr
        if isinstance(given, float):
            return given
        if self.quick:
            return 3e-4
        scores, tuned = self.scores(), given or name
        tried = {}                          # rate -> accuracy; max() takes the first of those with the most
        for lr in RATES:
            trial = self.trial(tuned, lr)
            if trial in scores:
                tried[lr] = scores[trial]
        return max(tried, key=tried.get, default=0.0)

    def trial(self, name, lr):
        """What tuning.json calls the run at this rate: "sft 0.001", "sft-28>grpo 0.0001 after 0.001"."""
        start = RUNS[name].start
        if not start:
            return f"{name} {lr:g}"
        return f"{name} {lr:g} after {self.lr(start):g}"

    def recipe(self, name, lr=None):
        """All that defines a run, and the run that it starts from."""
        lines = [f"{RUNS[name]} {lr or self.lr(name):g}"]
        if RUNS[name].start:
            lines += self.recipe(RUNS[name].start)
        return lines

    def done(self, name, seed):
        """Whether the results of this run are there, as it is defined now."""
        return self.records.facts.get((name, seed), {}).get("recipe") == self.recipe(name)

    def folder(self, name, seed, lr=None):
        """Of a run's models; at this rate, if it is a trial."""
        for odd, plain in ((">", "_to_"), ("+", "_plus_"), (",", "_"), (" ", "")):   # "+" and "," join runs
            name = name.replace(odd, plain)
        rate = f"-lr{lr:g}" if lr else ""
        return self.out / f"{name}-{seed}{rate}"

    def unfolded(self, name, seed):
        """A run's results as a folder, for paper/figures.py."""
        folder = self.out / "known" / self.folder(name, seed).name
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.records.rows[name, seed]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def measured(self, seed):
        """Whether Fig. 2 and 3 of this seed are there: fig3 comes last."""
        return (self.results / f"fig3-{seed}.json").exists()

    def start(self, command, log):
        """Run a command on one thread; its output to `log`. Raises RuntimeError with the log's end."""
        log.parent.mkdir(parents=True, exist_ok=True)
        child = preloaded.start(command, output=log)
        if child.wait():
            command = " ".join(map(str, command))
            raise RuntimeError(f"{command} failed; the end of {log}:\n{child.text()[-1500:]}")

    def figures(self, figure, *args):
        """python -m paper.figures FIGURE ..."""
        log = self.out / f"{figure}-{time.time_ns()}.log"
        self.start(["-m", "paper.figures", figure, *args, "--overwrite"], log)

    def train(self, name, seed, lr, evaluation, folder):
        """One run of srft.py, whole or not at all. Raises RuntimeError if it failed, or was stopped."""
        began, whole, recipe = time.time(), Path(f"{folder}.json"), self.recipe(name, lr)
        if whole.exists() and (folder / "hf").is_dir() and json.loads(whole.read_text())["recipe"] == recipe:
            return
        shutil.rmtree(folder, ignore_errors=True)
        whole.unlink(missing_ok=True)
        self.start(self.command(name, seed, lr, evaluation, folder), Path(f"{folder}.log"))
        if not (folder / "hf").is_dir():            # a signal: srft.py ends after its step, with exit code 0
            raise RuntimeError(f"{folder}: stopped before its end; the same command starts it again")
        whole.write_text(json.dumps({"recipe": recipe, "seconds": round(time.time() - began)}))

    def command(self, name, seed, lr, evaluation, folder):
        """The command line of a run."""
        run = RUNS[name]
        eval_every = self.steps(run)                            # where it is tuned, only its end counts
        if run.every and seed != TUNING_SEED and not self.quick:
            eval_every = run.every
        save_every = 1000                                       # never, but for the trajectories of Fig. 3
        if seed == 0 and name in (*SHOWN.values(), *TRAJECTORY):
            save_every = 4
        command = ["srft.py", "--preset", "tiny", "--device", "cpu", "--method", run.method,
                   "--steps", self.steps(run), "--seed", seed, "--lr", lr,
                   "--eval_data", evaluation, "--eval_every", eval_every,
                   "--grader_workers", 1, "--log_samples", 1, "--save_every", save_every, "--keep", 99]
        if name == "srft" and seed != TUNING_SEED:
            command += ["--term_gradients", 1 if self.quick else 4]
        if self.quick:
            command += ["--prompts_per_step", 4, "--n_rollouts", 4, "--data", self.out / "train.jsonl"]
        model = "tiny"
        if run.start:
            model = self.folder(run.start, seed) / "hf"
        command += ["--model", model]
        for flag in run.flags:                                  # of a second --model or --data, the last wins
            command.append(flag.replace("tiny_paper/", f"{self.out.name}/"))
        return [*command, "--out", folder]


# ----------------------------------------------------------------------------------------------------------
# Data: the tiny task's own, and variants of it.

def evaluation_sets(bench):
    """The names of the sets; in quick mode, of files with a few of their problems."""
    if not bench.quick:
        return "tiny:heldout,tiny:long"
    for split in ("heldout", "long"):
        write_examples(bench.out / f"{split}.jsonl", load_examples(f"tiny:{split}")[:4])
    return f"{bench.out}/heldout.jsonl,{bench.out}/long.jsonl"


def write_examples(file, examples):
    """A JSONL file that load_examples reads back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for example in examples:
        row = {"id": example.id, "problem": example.problem, "answer": example.answer}
        if example.demo is not None:
            row["solution"] = example.demo
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))


def terms_of(example):
    """"12+34-5=?" -> [12, 34, -5]"""
    return [int(term) for term in example.problem.removesuffix("=?\n").replace("-", "+-").split("+")]


def weak_demonstrations(slip=0.15):
    """The training problems with demonstrations that slip in 15 % of their lines, not 3 %: most end wrong."""
    rng, examples = random.Random(5), load_examples("tiny:train")
    for example in examples:
        example.demo = write_response(terms_of(example), rng, "careful", slip)
    return examples


def expert_demonstrations(style):
    """2,048 new problems of 3 to 8 terms, answered in one style without a slip."""
    known = set()
    for split in SPLITS:
        known.update(example.problem for example in load_examples(f"tiny:{split}"))
    rng, examples = random.Random(6), {}                        # problem -> Example, so each comes once
    while len(examples) < 2048:
        terms = draw_terms(rng, rng.choice((3, 4, 5, 6, 7, 8)))
        problem = write_problem(terms)
        if problem not in known:
            demo = write_response(terms, rng, style)
            examples[problem] = Example(f"{style}/{len(examples)}", problem, str(sum(terms)), demo)
    return list(examples.values())


def held_out_demonstrations():
    """The held-out problems, demonstrated as those of training: texts for Fig. 2(b) that no run has seen."""
    rng, examples = random.Random(7), load_examples("tiny:heldout")
    for example in examples:
        example.demo = write_response(terms_of(example), rng, "careful", slip=0.03)
    return examples


# ----------------------------------------------------------------------------------------------------------
# Tuning, training, measuring.

def tune(bench, pool, wanted):
    """The accuracy on tiny:valid at each rate of what is wanted and takes no other's; first stages first."""
    if bench.quick:
        return
    bench.results.mkdir(parents=True, exist_ok=True)
    scores, lock = bench.scores(), threading.Lock()
    names = to_tune(wanted)

    def first_stage(name):
        """What second stages start from, by the rate just found."""
        bench.train(name, TUNING_SEED, bench.lr(name), "tiny:valid", bench.folder(name, TUNING_SEED))

    def score(job):
        name, lr = job
        key, folder = bench.trial(name, lr), bench.folder(name, TUNING_SEED, lr)
        bench.train(name, TUNING_SEED, lr, "tiny:valid", folder)
        with lock:                                          # jobs are threads, and tuning.json is one file
            scores[key] = read_rows(folder / "metrics.jsonl")[-1]["eval/valid"]
            partial = bench.tuning.with_suffix(".partial")
            partial.write_text(json.dumps(scores, indent=1))
            partial.rename(bench.tuning)
        print(f"tuning {key}: {scores[key]:.3f}", flush=True)

    def score_missing(rates):
        """rates: {name: those to try}"""
        jobs = []
        for name, some in rates.items():
            for lr in some:
                if bench.trial(name, lr) not in scores:
                    jobs.append((name, lr))
        starts = {RUNS[name].start for name, _ in jobs}
        list(pool.map(first_stage, sorted(starts - {""})))
        list(pool.map(score, jobs))

    for second in (False, True):
        stage = [name for name in names if bool(RUNS[name].start) == second]
        own = [name for name in stage if not RUNS[name].near]
        score_missing({name: GRID for name in own})
        score_missing({name: beyond(bench.lr(name)) for name in own})
        for links in (1, 2):
            linked = [name for name in stage if links_from_the_grid(name) == links]
            score_missing({name: around(bench.lr(RUNS[name].near)) for name in linked})
            before = None
            while len(scores) != before:                # one further, while the best is at an edge
                before = len(scores)
                score_missing({name: around(bench.lr(name)) for name in linked})


def to_tune(wanted):
    """The runs whose rate is looked for: those wanted, and those that their rates depend on."""
    names, found = list(wanted), {}
    for name in names:                                      # it grows on the way
        run = RUNS[name]
        if not run.lr:
            found[name] = None
        for other in (run.lr, run.near, run.start):
            if other in RUNS and other not in names:
                names.append(other)
    return list(found)


def around(best):
    """Half of a rate, itself, and its double."""
    return best / 2, best, best * 2


def links_from_the_grid(name):
    """0 for a run that is tuned on the grid, 1 for one that is tuned near that, and so on."""
    near = RUNS[name].near
    return 1 + links_from_the_grid(near) if near else 0


def beyond(best):
    """The one rate to try after the grid: where its best is at an edge."""
    if best == GRID[0]:
        return BEYOND[:1]
    if best == GRID[-1]:
        return BEYOND[1:]
    return ()


def run_all(bench, wanted):
    """Train what is wanted and not known yet, seed by seed, first stages first; then measure Fig. 2 and 3."""
    evaluation, some = evaluation_sets(bench), None
    if bench.quick:                     # each reference answer is checked at a run's start
        some = 8                        # of 2 steps
        write_examples(bench.out / "train.jsonl", load_examples("tiny:train")[:some])
    write_examples(bench.out / "weak.jsonl", weak_demonstrations())
    for share, slip in SLIPS.items():
        write_examples(bench.out / f"wrong-{share}.jsonl", weak_demonstrations(slip))
    make_models(bench, wanted)
    write_examples(bench.out / "demonstrated.jsonl", held_out_demonstrations())
    for style in ("careful", "plain"):
        write_examples(bench.out / f"{style}.jsonl", expert_demonstrations(style)[:some])

    def expert(name):
        bench.train(name, 0, bench.lr(name), evaluation, bench.folder(name, 0))

    with ThreadPoolExecutor(bench.jobs) as pool:            # list(pool.map()): wait, and raise what failed
        tune(bench, pool, wanted)
        shown = {*SHOWN.values(), *TRAJECTORY} <= set(wanted)
        if shown and not all(map(bench.measured, bench.seeds)):
            list(pool.map(expert, EXPERTS))
        for seed in bench.seeds:
            for second in (False, True):
                names = [name for name, run in wanted.items()
                         if bool(run.start) == second and seed < run.seeds]
                list(pool.map(lambda name: one(bench, name, seed, evaluation, wanted), names))
            if shown and not bench.measured(seed):
                measure(bench, seed, pool)
            print(f"seed {seed}: done", flush=True)


def one(bench, name, seed, evaluation, wanted):
    """Train one run, unless its results are there and nothing asks for its model; keep its metrics."""
    folder, done = bench.folder(name, seed), bench.done(name, seed)
    measures = name in (*SHOWN.values(), *TRAJECTORY)
    asked_for = any(run.start == name and not bench.done(other, seed) for other, run in wanted.items())
    if done and not asked_for and (bench.measured(seed) or not measures):
        return
    if measures and not done:                           # what was measured on another model of this name
        (bench.results / f"fig3-{seed}.json").unlink(missing_ok=True)
    began = time.time()
    try:
        bench.train(name, seed, bench.lr(name), evaluation, folder)
        facts = json.loads(Path(f"{folder}.json").read_text())             # its recipe, and how long it took
    except RuntimeError as error:
        died = cause_of_death(str(error))
        if table_of(name) != "stability" or not died:
            raise
        # Of its rate, which is what was asked.
        facts = {"recipe": bench.recipe(name), "seconds": round(time.time() - began), "died": died}
    config = json.loads((folder / "config.json").read_text())
    facts |= {"lr": config["lr"], "git_commit": config["git_commit"], "machine": config["machine"]}
    rows = with_flops(read_rows(folder / "metrics.jsonl"), parameters(Path(config["model"])), config)
    if table_of(name) not in CURVES:
        rows = [row for row in rows if "eval/heldout" in row]
    rows = [kept(row) for row in rows]
    bench.records.add(table_of(name), name, seed, facts, rows)
    accuracy = [f"{key} {value:.3f}" for key, value in rows[-1].items() if key.startswith("eval/")]
    print(f"{folder.name}: {'  '.join(accuracy)}", flush=True)


def cause_of_death(log):
    """The error that training has broken, in a line; "" if the run ended otherwise, or was stopped."""
    for line in log.splitlines():
        if any(f"RuntimeError: {death}" in line for death in DEATHS):
            return line.partition("RuntimeError: ")[2].strip()
    return ""


def kept(row):
    """What of a row of metrics.jsonl is committed, to five digits."""
    found = {}
    for key, value in row.items():
        if key.startswith(KEPT) and value is not None:
            found[key] = float(f"{value:.5g}") if isinstance(value, float) else value
    return found


def parameters(folder):
    """How many a model has, by the head of its file."""
    with safe_open(folder / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def with_flops(rows, number, config):
    """The rows with "tflop", what all steps until then have spent: 2 FLOPs a parameter for each token that
    was generated, and 6 for each that was trained on. Alike for all and left out: attention, prompts that the
    engine reads, evaluations."""
    rollouts, _ = sequences_per_prompt(SimpleNamespace(**config))
    total, found = 0.0, []
    for row in rows:
        generated = (row.get("response_len/mean") or 0) * rollouts * config["prompts_per_step"]
        trained = row.get("perf/tokens_per_s", 0) * row.get("time/step", 0)
        total += 2 * number * (generated + 3 * trained) / 1e12
        found.append({**row, "tflop": total})
    return found


def make_models(bench, wanted):
    """Pretrain the models that runs start from and that are not there: out/tiny_paper/llama-256, and such."""
    for run in wanted.values():
        for folder in run.flags:
            family, _, width = Path(folder).name.partition("-")
            if folder.startswith("out/") and width.isdigit() and not Path(folder, "config.json").exists():
                bench.start(["tiny/make.py", folder, family, width], Path(f"{folder}.log"))


def measure(bench, seed, pool):
    """paper/figures.py on this seed's models: Fig. 2 and 3; only seed 0 has pages, and checkpoints on the
    way."""
    lengths = ["--max_prompt_tokens", 64, "--max_response_tokens", 160, "--device", "cpu"]
    scale = ["--template", "none", *lengths]
    data = ["--data", bench.out / "demonstrated.jsonl", "--limit", 5 if bench.quick else 200, *scale]
    models = {"base": "tiny"}
    for label, name in SHOWN.items():
        models[label] = bench.folder(name, seed)
    for name in EXPERTS:
        models[name] = bench.folder(name, 0)
    own = {label: bench.out / f"responses-{label}-{seed}.jsonl" for label in models}
    tuned = [f"{label}={models[label]}" for label in SHOWN]

    def respond(label):
        bench.figures("respond", "--model", models[label], "--out", own[label], "--seed", seed, *data)

    list(pool.map(respond, own))
    fig2b = ["fig2b", "--base", "tiny", "--tuned", *tuned]
    jobs = [[*fig2b, "--out", bench.results / f"fig2b-demo-{seed}", *data],
            [*fig2b, "--responses", *[own[label] for label in SHOWN],
             "--out", bench.results / f"fig2b-own-{seed}", *scale]]
    if seed == 0:
        for label, pair in zip(SHOWN, tuned):
            jobs.append(["fig2a", "--base", "tiny", "--tuned", pair,
                         "--out", bench.results / f"fig2a-{label}", *data])
    list(pool.map(lambda job: bench.figures(*job), jobs))
    references = [f"{label}={own[label]}" for label in ("base", *EXPERTS)]
    stages = "+".join(str(bench.folder(name, seed)) for name in TRAJECTORY)
    bench.figures("fig3", "--references", *references, "--runs", *tuned, f"SFT->RL={stages}",
                  "--out", bench.results / f"fig3-{seed}", *lengths)        # last: it says that all are there
    if seed:                                                # pictures of one seed will do
        for name in ("fig2b-demo", "fig2b-own", "fig3"):
            (bench.results / f"{name}-{seed}.png").unlink()


def parse():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="Tables 1-3 and the figures in miniature, to out/tiny_paper_quick/")
    parser.add_argument("--only", choices=tuple(PARTS), action="append",
                        help="a part and what it needs; may be repeated")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11), metavar="1..10",
                        help="seeds 0, 1, ... of each run [%(default)s]")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(),
                        help="processes at a time, one core each [%(default)s]")
    parser.add_argument("--report", action="store_true", help="no runs, only tables, figures and claims")
    return parser.parse_args()


def main():
    args = parse()
    bench = Bench(args)
    if not args.report:
        bench.out.mkdir(parents=True, exist_ok=True)
        alone = open(bench.out / "lock", "w")                   # until this process ends
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"tiny_paper.py: another one is at work in {bench.out}; --jobs N makes N runs at a time")
        parts = args.only
        if not parts:
            parts = ["table1", "table2", "table3"] if args.quick else PARTS
        wanted = {}
        for part in parts:
            wanted.update(PARTS[part])
        run_all(bench, wanted)
    claims.report(bench)


if __name__ == "__main__":
    main()
