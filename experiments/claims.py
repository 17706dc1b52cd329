"""Tables, figures and claims from the runs of tiny_paper.py: 95 % intervals, and a rule (`verdict`).

`report` writes experiments/results/ and fills in the tables of experiments/README.md.
"""
import json
from pathlib import Path

import numpy as np

from runs import REST, REVIEWS, RUNS, SECOND_FAMILY, STAGE, STEPS, SWITCHES, TABLE1, TABLE2, TABLE3
from support.runlog import read_rows

# Student's t by the number of seeds.
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
FORWARD, BACKWARD = f"sft-{STAGE}>grpo", f"grpo-{REST}>sft"
SEQUENCES = [f"sft-{switch}>grpo" for switch in (12, 20, STAGE)]
METRICS = {"heldout": ("eval/heldout",), "long": ("eval/long",), "accuracy": ("eval/heldout", "eval/long")}
TERMS = ("sft_demo", "rl_demo", "rl_pos", "rl_neg")


# ----------------------------------------------------------------------------------------------------------
# Numbers, one a seed.

class Results:
    """What is known: rows of each run and seed, and numbers made from them."""

    def __init__(self, bench):
        self.bench, self.seeds = bench, range(10)             # all that are there, whatever was asked for now
        self.rows = {(name, seed): read_rows(bench.known(name, seed) / "metrics.jsonl")
                     for name in RUNS for seed in self.seeds if bench.done(name, seed)}

    def each(self, name, value):
        """{seed: value(rows)}"""
        return {seed: value(rows) for (run, seed), rows in self.rows.items() if run == name}

    def final(self, name, metric="accuracy"):
        """{seed: accuracy at the end}, in percent: held out, long, or the mean of the two."""
        return self.each(name, lambda rows: 100 * float(np.mean([rows[-1][key] for key in METRICS[metric]])))

    def minus(self, a, b, metric="accuracy"):
        """The interval of `final` of a minus that of b."""
        return difference(self.final(a, metric), self.final(b, metric))

    def steps_to(self, name, level):
        """{seed: the first multiple of 8 steps, counted through a sequence, at which `percent` is at least
        `level`; else 8 more than all steps}. At multiples of 8 every run was evaluated."""
        run, found = RUNS[name], {}
        first = RUNS[run.start].steps if run.start else 0
        for seed, rows in self.each(name, lambda rows: rows).items():
            before = [(row["step"], row) for row in self.rows.get((run.start, seed), [])]
            rows = before + [(first + row["step"], row) for row in rows]
            reached = (step for step, row in rows
                       if step % 8 == 0 and "eval/long" in row and percent(row) >= level)
            found[seed] = next(reached, first + run.steps + 8)
        return found

    def figure(self, name, value):
        """{seed: value(what the JSON of figure NAME-SEED says)}"""
        files = {seed: self.bench.results / f"{name}-{seed}.json" for seed in self.seeds}
        return {seed: value(json.loads(file.read_text())) for seed, file in files.items() if file.exists()}

    def distance(self, label, step=None):
        """{seed: Fig. 3's distance to the base model after a step, by default the last}, in points."""
        def of(found):
            path = found["runs"][label]
            at = path[-1]["step"] if step is None else step
            return 100 * next(point for point in path if point["step"] == at)["distances"][0]
        return self.figure("fig3", of)


def percent(row):
    """The mean of both accuracies of a row that was evaluated, in percent."""
    return 50 * (row["eval/heldout"] + row["eval/long"])


def entropy(row):
    """The mean of both entropies of a row that was evaluated, in nats."""
    return float(np.mean([row["eval_entropy/heldout"], row["eval_entropy/long"]]))


def gradient_share(rows, terms, half):
    """Percent that terms have of the sum of all four terms' gradient norms, in half 0 or 1 of the steps."""
    measured = [row for row in rows
                if "grad_norm/sft_demo" in row and (row["step"] > rows[-1]["step"] / 2) == half]
    total = lambda terms: sum(row[f"grad_norm/{term}"] for row in measured for term in terms)
    return 100 * total(terms) / total(TERMS)


def interval(values):
    """(mean, half width of its 95 % interval by Student's t, seeds); the half width is None for one seed."""
    values = list(values)
    n = len(values)
    half = T_95[n] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None
    return (float(np.mean(values)) if n else None), half, n


def difference(a, b):
    """interval of a - b over the seeds that both have: a seed is one order of data, one series of draws."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def negative(found):
    return tuple(-x if i == 0 and x is not None else x for i, x in enumerate(found))


def verdict(mean, half, least=0.0):
    """The rule: "x > least" holds if the whole 95 % interval lies above, does not if all of it lies below."""
    if half is None:
        return "cannot tell"
    return "holds" if mean - half > least else "does not hold" if mean + half < least else "cannot tell"


# ----------------------------------------------------------------------------------------------------------
# Tables.

def shown(mean, half, n=None, digits=1):
    if mean is None:
        return "-"
    half = f" \u00b1 {half:.{digits}f}" if half is not None else ""
    return f"{round(mean, digits) + 0.0:.{digits}f}{half}"


def of(n):
    return f"{n} seed" + "s" * (n > 1)


def table(results, title, runs):
    """Markdown: accuracy at the end of each run, mean and 95 % interval over seeds."""
    lines = [f"**{title}**", "", "| run | held-out | long | mean | lr | seeds |", "|---|---|---|---|---|---|"]
    start = [results.each(name, lambda rows: rows[0]) for name in runs if not RUNS[name].start]
    start = max(start, key=len, default={})                         # the base model, by each seed's draws
    if start:
        held, longer = ([100 * row[f"eval/{split}"] for row in start.values()]
                        for split in ("heldout", "long"))
        means = [percent(row) for row in start.values()]
        cells = [shown(*interval(values)) for values in (held, longer, means)]
        lines.append(f"| base | {' | '.join(cells)} | | {len(start)} |")
    for name in runs:
        if results.final(name):
            cells = [shown(*interval(results.final(name, metric).values())) for metric in METRICS]
            configs = [results.bench.known(name, seed) / "config.json" for seed in results.final(name)]
            rates = sorted({json.loads(file.read_text())["lr"] for file in configs})
            cells += [" / ".join(f"{rate:g}" for rate in rates), str(len(configs))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------
# Claims and questions.

def claims(results):
    """[(claim, figure, verdict)] of the paper's text."""
    rows, minus = [], results.minus

    def claim(text, found, unit="points", least=0.0, digits=1, later=False):
        mean, half, n = found
        if n:
            figure = f"{shown(mean, half, digits=digits)} {unit}".rstrip()
            rows.append((text + " \u2020" * later, f"{figure}, {of(n)}", verdict(mean, half, least)))

    for source, words in (("demo", "tokens of held-out demonstrations"),
                          ("own", "tokens of its own responses")):
        changed = lambda label, what: results.figure(
            f"fig2b-{source}", lambda found: 100 * found[label][what])
        for what, later in (("changed by more than 0.1", False), ("changed by more than 0.5", True)):
            claim(f"SFT changes more tokens than RL (share of the {words} {what}; Fig. 2b)",
                  difference(changed("SFT", what), changed("RL", what)), later=later)
        claim(f"SFT changes probabilities more than RL (mean change over {words}; Fig. 2b)",
              difference(changed("SFT", "mean |change|"), changed("RL", "mean |change|")),
              digits=2, later=True)
        sft, rl, srft = (changed(label, "changed by more than 0.1") for label in ("SFT", "RL", "SRFT"))
        claim(f"SRFT lies between: changes fewer than SFT ({words}, by more than 0.1; Fig. A1)",
              difference(sft, srft))
        claim(f"SRFT lies between: changes more than RL ({words}, by more than 0.1; Fig. A1)",
              difference(srft, rl))
    distance = results.distance
    claim("SFT moves further from the base model than RL (Fig. 3)",
          difference(distance("SFT"), distance("RL")), digits=2, later=True)
    at_switch = distance("SFT->RL", results.bench.steps(RUNS[f"sft-{STAGE}"]))
    claim("SFT->RL comes back towards the base model in its RL stage (Fig. 3)",
          difference(at_switch, distance("SFT->RL")), digits=2, later=True)
    claim("SRFT stays closer to the base model than SFT->RL (Fig. 3)",
          difference(distance("SFT->RL"), distance("SRFT")), digits=2, later=True)

    for forward, backward, words in ((FORWARD, BACKWARD, ""),
                                     ("sft>grpo", "grpo>sft", ", both stages in full")):
        rank = lambda text, a, b: claim(f"{text} (Table 1{words})", minus(a, b), later=bool(words))
        rank("SFT->RL beats RL->SFT", forward, backward)
        for metric, problems in (("heldout", "held-out problems"), ("long", "long problems")):
            claim(f"SFT->RL beats RL->SFT on {problems} alone (Table 1{words})",
                  minus(forward, backward, metric), later=True)
        rank("SFT->RL beats SFT", forward, "sft")
        rank("SFT->RL beats RL", forward, "grpo")
        rank("RL->SFT loses to RL", "grpo", backward)
        rank("RL->SFT loses to SFT", "sft", backward)
        rank("KL in SFT does not rescue RL->SFT: RL stays ahead of RL->SFT_KL", "grpo", f"{backward}_kl")

    evaluated = lambda rows: [row for row in rows if "eval_entropy/heldout" in row]    # every 4 steps
    change = lambda name, value, n: interval(results.each(
        name, lambda rows: value(evaluated(rows)[:n][-1]) - value(evaluated(rows)[0])).values())
    claim("accuracy falls when SFT follows RL (Fig. 4a; four steps after the switch)",
          negative(change(BACKWARD, percent, 2)))
    claim("accuracy falls when SFT follows RL (Fig. 4a; both stages in full, eight steps after the switch)",
          negative(change("grpo>sft", percent, 3)), later=True)
    claim("entropy jumps when SFT follows RL (Fig. 4b; four steps after the switch)",
          change(BACKWARD, entropy, 2), "nats", digits=3)
    claim("entropy jumps when SFT follows RL (Fig. 4b; both stages in full, eight steps after the switch)",
          change("grpo>sft", entropy, 3), "nats", digits=3, later=True)
    claim("RL lowers entropy (Fig. 4b)", negative(change("grpo", entropy, None)), "nats", digits=3)

    rivals = (*SEQUENCES, "sft+rl")
    if all(results.final(name) for name in rivals):
        level = 0.9 * min(interval(results.final(name).values())[0] for name in rivals)
        until = {name: results.steps_to(name, level) for name in rivals}
        fastest = min(SEQUENCES, key=lambda name: np.mean(list(until[name].values())))
        claim("SFT+RL in one stage needs fewer steps than the fastest SFT->RL "
              f"({fastest}), to {level:.0f} % (Fig. 5)", difference(until[fastest], until["sft+rl"]), "steps")
    claim("accuracy falls for a while when RL follows long SFT (Fig. 5; four steps after the switch)",
          negative(change(FORWARD, percent, 2)), later=True)
    claim("SFT+RL beats RL (Fig. 5)", minus("sft+rl", "grpo"))
    for name in ("sft", "sft_kl", "grpo", FORWARD, "luffy", "relift"):
        claim(f"SRFT beats {name} (Table 2)", minus("srft", name))
    claim("SRFT beats sft+rl (not compared in the paper: are weights and Eq. 9 worth more than the sum?)",
          minus("srft", "sft+rl"))
    for name in (BACKWARD, f"{BACKWARD}_kl", "grpo>sft"):
        claim(f"SRFT beats {name} (not compared in the paper)", minus("srft", name), later=True)
    claim(f"SRFT beats {BACKWARD} on held-out problems alone (not compared in the paper)",
          minus("srft", BACKWARD, "heldout"), later=True)
    claim("SFT_KL loses to SFT (Table 2)", minus("sft", "sft_kl"), later=True)
    claim("SRFT beats RL in distribution (abstract: zero-RL methods)", minus("srft", "grpo", "heldout"))
    claim("SRFT beats RL out of distribution (abstract: zero-RL methods)", minus("srft", "grpo", "long"))
    for name in (FORWARD, "luffy", "relift"):
        claim(f"SRFT beats {name} out of distribution (Sec. 5.2)", minus("srft", name, "long"), later=True)
    claim("w_SFT matters: SRFT beats SRFT with w_SFT = 1 (Table 3)", minus("srft", "srft-w_sft-1"))
    claim("w_RL matters: SRFT beats SRFT with w_RL = 1 (Table 3)", minus("srft", "srft-w_rl-1"))

    late = lambda rows: np.mean([row["entropy/rollout"] for row in rows[1:][-10:]])
    reward = lambda rows: np.mean([row["reward/mean"] for row in rows[1:]])
    grown = lambda rows: rows[-1]["response_len/mean"] - rows[1]["response_len/mean"]
    against_rl = lambda value: difference(results.each("srft", value), results.each("grpo", value))
    claim("SRFT keeps more entropy than RL (Fig. 6c; last 10 steps)", against_rl(late), "nats", digits=3)
    claim("SRFT lengthens responses (Fig. 6b)", interval(results.each("srft", grown).values()), "tokens")
    claim("RL shortens responses (Fig. 6b)", negative(interval(results.each("grpo", grown).values())),
          "tokens")
    claim("SRFT's reward rises faster than RL's (Fig. 6a; mean over all steps)", against_rl(reward), "",
          digits=3)
    claim("without gradients on low-entropy tokens RL loses less than 3 points (Fig. A2)",
          minus("grpo-truncated", "grpo"), least=-3.0)
    return rows


def reviews(results):
    """[(question, figure, verdict)] of what the paper's reviewers asked, and of our table of decisions."""
    rows = []

    def ask(text, a, b, least=0.0, words=("holds", "does not hold")):
        mean, half, n = results.minus(a, b)
        if n:
            says = verdict(mean, half, least)
            says = dict(zip(("holds", "does not hold"), words)).get(says, says)
            rows.append((text, f"{shown(mean, half)} points, {of(n)}", says))

    ask("RL against SFT: the paper has RL ahead in Table 1, SFT in Table 2", "grpo", "sft",
        words=("RL ahead", "SFT ahead"))
    ask("from the same fine-tuned start (12 steps of SFT), SRFT beats RL", "sft-12>srft", "sft-12>grpo")
    for name in ("sft", "sft+rl", "luffy"):
        ask(f"weak demonstrations: SRFT beats {name}", "srft weak", f"{name} weak")
    ask("weak demonstrations: SRFT still beats RL, which sees none", "srft weak", "grpo")
    ask("weak demonstrations cost SRFT less than 3 points", "srft weak", "srft", least=-3.0)
    for name in ("sft", "sft+rl", "luffy"):
        ask(f"weak demonstrations cost {name} less than 3 points \u2020", f"{name} weak", name, least=-3.0)
    for name in ("sft", "grpo", "sft+rl"):
        ask(f"second family (Qwen3): SRFT beats {name}", "srft qwen3", f"{name} qwen3")
    for terms in (*((term,) for term in TERMS), TERMS[:2]) if results.final("srft") else ():
        share = lambda half: interval(
            results.each("srft", lambda rows: gradient_share(rows, terms, half)).values())
        first, second = share(0), share(1)
        rows.append((
            f"is it distillation? Share of {' and '.join(terms)} in the sum of the terms' gradient norms",
            f"{shown(*first)} % in the first half of the steps, {shown(*second)} % in the second, "
            f"{of(first[-1])}", ""))
    for name in SWITCHES:
        ask(f"`{name.removeprefix('srft ')}` against the default", name, "srft", words=("better", "worse"))
    return rows


# ----------------------------------------------------------------------------------------------------------

def figures(bench, results):
    """{figure: {label: run folders}}, seeds joined by ",", stages of a sequence by "+", as in paper/figures.py."""
    def curve(*names):
        seeds = [seed for seed in results.seeds if all((name, seed) in results.rows for name in names)]
        return ",".join("+".join(str(bench.known(name, seed)) for name in names) for seed in seeds)

    label = lambda name: f"SFT->RL, {RUNS[RUNS[name].start].steps} + {RUNS[name].steps}"
    sequences = {label(name): curve(RUNS[name].start, name) for name in SEQUENCES}
    last = f"SFT->RL, {STAGE} + {REST}"
    whole = f"{STEPS} + {STEPS}"
    back = {f"RL->SFT, {REST} + {STAGE}": curve(f"grpo-{REST}", BACKWARD),
            f"RL->SFT_KL, {REST} + {STAGE}": curve(f"grpo-{REST}", f"{BACKWARD}_kl"),
            **{f"{label}, {whole}": curve(*stages) for label, stages in {
                "SFT->RL": ("sft", "sft>grpo"), "RL->SFT": ("grpo", "grpo>sft"),
                "RL->SFT_KL": ("grpo", "grpo>sft_kl")}.items()}}
    rl = curve("grpo")
    return {"fig4": {last: sequences[last], **back},
            "fig5": {"RL": rl, **sequences, "SFT+RL": curve("sft+rl")},
            "fig6": {"RL": rl, "SRFT": curve("srft")}, "terms": {"SRFT": curve("srft")},
            "figA2": {"RL": rl, "RL, truncated": curve("grpo-truncated")}}


def report(bench):
    """tables.md, the figures of curves, the claims of experiments/README.md (quick: claims.md)."""
    results = Results(bench)
    if not results.rows:
        raise SystemExit("no results yet: run without --report")
    parts = {"Table 1: SFT, RL and sequences": TABLE1,
             "Table 2: SRFT, its baselines, and the runs of Fig. 5 and A2": ["sft", "grpo", FORWARD, *TABLE2],
             "Table 3: without the entropy weights": ["srft", *TABLE3],
             "Switches of the table of decisions": ["srft", *SWITCHES],
             "What the reviewers asked": REVIEWS,
             "A second family, Qwen3": SECOND_FAMILY}
    tables = "\n".join(table(results, title, runs) for title, runs in parts.items()
                       if any(map(results.final, runs)))
    seconds = [json.loads((bench.known(*run) / "config.json").read_text())["seconds"] for run in results.rows]
    tables += f"\n{len(seconds)} runs, one core each: {sum(seconds) / 3600:.1f} hours, without tuning.\n"
    (bench.results / "tables.md").write_text(tables)
    row = lambda cells: f"| {' | '.join(cells)} |"
    text = "\n".join(["| claim | found | |", "|---|---|---|", *map(row, claims(results)), "",
                      "| asked | found | |", "|---|---|---|", *map(row, reviews(results))])
    page = Path("experiments/README.md")
    if bench.quick or not page.exists():
        (bench.results / "claims.md").write_text(text + "\n")
    else:
        before, _, after = page.read_text().partition("<!-- claims -->\n")
        _, end, after = after.partition("<!-- end of claims -->")
        if not end:
            raise SystemExit(f"{page}: the lines <!-- claims --> and <!-- end of claims --> are not there")
        page.write_text(f"{before}<!-- claims -->\n{text}\n{end}{after}")
    for name, curves in figures(bench, results).items():
        if all(curves.values()):
            runs = [f"{label}={folders}" for label, folders in curves.items()]
            bench.figures(name, *runs, "--out", bench.results / name)
    print(tables, text, sep="\n")
