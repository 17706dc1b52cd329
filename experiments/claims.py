"""Tables, figures and the paper's claims from the runs of tiny_paper.py, by the rule of seeds.py.

`report` writes experiments/results/ and fills in the tables of experiments/README.md.
"""
from pathlib import Path

import numpy as np

import questions
from runs import REST, REVIEWS, RUNS, SECOND_FAMILY, STAGE, STEPS, SWITCHES, TABLE1, TABLE2, TABLE3
from seeds import (
    METRICS,
    Results,
    difference,
    entropy,
    interval,
    negative,
    of,
    percent,
    shown,
    table_row,
    verdict,
)

FORWARD, BACKWARD = f"sft-{STAGE}>grpo", f"grpo-{REST}>sft"
SEQUENCES = [f"sft-{switch}>grpo" for switch in (12, 20, STAGE)]
TERMS = ("sft_demo", "rl_demo", "rl_pos", "rl_neg")


# ----------------------------------------------------------------------------------------------------------
# Tables.

def table(results, title, runs):
    """Markdown: accuracy at the end of each run, mean and 95 % interval over seeds."""
    lines = [f"**{title}**", "", "| run | held-out | long | mean | lr | seeds |", "|---|---|---|---|---|---|"]
    base = base_row(results, runs)
    if base:
        lines.append(base)
    for name in runs:
        finals = results.final(name)
        if not finals:
            continue
        cells = [name]
        for metric in METRICS:
            cells.append(shown(interval(results.final(name, metric).values())))
        rates = set()
        for seed in finals:
            rates.add(results.bench.records.facts[name, seed]["lr"])
        cells.append(" / ".join(f"{rate:g}" for rate in sorted(rates)))
        cells.append(str(len(finals)))
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def base_row(results, runs):
    """The base model's line of a table: step 0 of the run that most seeds are known of; "" without any."""
    start = {}                                                      # seed -> row, by each seed's draws
    for name in runs:
        found = results.each(name, lambda rows: rows[0])
        if not RUNS[name].start and len(found) > len(start):
            start = found
    if not start:
        return ""
    heldout = [100 * row["eval/heldout"] for row in start.values()]
    longer = [100 * row["eval/long"] for row in start.values()]
    means = [percent(row) for row in start.values()]
    cells = ["base", shown(interval(heldout)), shown(interval(longer)), shown(interval(means))]
    return f"| {' | '.join(cells)} | | {len(start)} |"


# ----------------------------------------------------------------------------------------------------------
# Claims of the paper's text, in its order. Those with `later` came after results had been seen: a dagger.

def claims(results):
    """[(claim, figure, verdict)] of the paper's text."""
    rows = []

    def claim(text, found, unit="points", least=0.0, digits=1, later=False):
        """found: the interval of a number. Is it greater than `least`?"""
        mean, half, n = found
        if n:
            figure = f"{shown(found, digits)} {unit}".rstrip()
            rows.append((text + " \u2020" * later, f"{figure}, {of(n)}", verdict(mean, half, least)))

    for part in (figure_2, figure_3, table_1, figure_4, figure_5, table_2, table_3, figure_6, figure_a2):
        part(results, claim)
    return rows


def figure_2(results, claim):
    for source, words in (("demo", "tokens of held-out demonstrations"),
                          ("own", "tokens of its own responses")):
        def changed(label, what):
            return results.figure(f"fig2b-{source}", lambda found: 100 * found[label][what])

        for what, later in (("changed by more than 0.1", False), ("changed by more than 0.5", True)):
            claim(f"SFT changes more tokens than RL (share of the {words} {what}; Fig. 2b)",
                  difference(changed("SFT", what), changed("RL", what)), later=later)
        claim(f"SFT changes probabilities more than RL (mean change over {words}; Fig. 2b)",
              difference(changed("SFT", "mean |change|"), changed("RL", "mean |change|")),
              digits=2, later=True)
        sft = changed("SFT", "changed by more than 0.1")
        rl = changed("RL", "changed by more than 0.1")
        srft = changed("SRFT", "changed by more than 0.1")
        claim(f"SRFT lies between: changes fewer than SFT ({words}, by more than 0.1; Fig. A1)",
              difference(sft, srft))
        claim(f"SRFT lies between: changes more than RL ({words}, by more than 0.1; Fig. A1)",
              difference(srft, rl))


def figure_3(results, claim):
    distance = results.distance
    claim("SFT moves further from the base model than RL (Fig. 3)",
          difference(distance("SFT"), distance("RL")), digits=2, later=True)
    at_switch = distance("SFT->RL", results.bench.steps(RUNS[f"sft-{STAGE}"]))
    claim("SFT->RL comes back towards the base model in its RL stage (Fig. 3)",
          difference(at_switch, distance("SFT->RL")), digits=2, later=True)
    claim("SRFT stays closer to the base model than SFT->RL (Fig. 3)",
          difference(distance("SFT->RL"), distance("SRFT")), digits=2, later=True)


def table_1(results, claim):
    minus = results.minus
    for forward, backward, words in ((FORWARD, BACKWARD, ""),
                                     ("sft>grpo", "grpo>sft", ", both stages in full")):
        def rank(text, better, worse):
            claim(f"{text} (Table 1{words})", minus(better, worse), later=bool(words))

        rank("SFT->RL beats RL->SFT", forward, backward)
        for metric, problems in (("heldout", "held-out problems"), ("long", "long problems")):
            claim(f"SFT->RL beats RL->SFT on {problems} alone (Table 1{words})",
                  minus(forward, backward, metric), later=True)
        rank("SFT->RL beats SFT", forward, "sft")
        rank("SFT->RL beats RL", forward, "grpo")
        rank("RL->SFT loses to RL", "grpo", backward)
        rank("RL->SFT loses to SFT", "sft", backward)
        rank("KL in SFT does not rescue RL->SFT: RL stays ahead of RL->SFT_KL", "grpo", f"{backward}_kl")


def change(results, name, value, last=None):
    """The interval of value(row) at the `last`-th evaluation of a run (counted from 1; None: the last of all)
    minus that at its first, which a second stage makes at its start."""
    def of_rows(rows):
        evaluated = [row for row in rows if "eval_entropy/heldout" in row]              # every 4 steps
        return value(evaluated[:last][-1]) - value(evaluated[0])

    return interval(results.each(name, of_rows).values())


def figure_4(results, claim):
    claim("accuracy falls when SFT follows RL (Fig. 4a; four steps after the switch)",
          negative(change(results, BACKWARD, percent, 2)))
    claim("accuracy falls when SFT follows RL (Fig. 4a; both stages in full, eight steps after the switch)",
          negative(change(results, "grpo>sft", percent, 3)), later=True)
    claim("entropy jumps when SFT follows RL (Fig. 4b; four steps after the switch)",
          change(results, BACKWARD, entropy, 2), "nats", digits=3)
    claim("entropy jumps when SFT follows RL (Fig. 4b; both stages in full, eight steps after the switch)",
          change(results, "grpo>sft", entropy, 3), "nats", digits=3, later=True)
    claim("RL lowers entropy (Fig. 4b)", negative(change(results, "grpo", entropy)), "nats", digits=3)


def figure_5(results, claim):
    rivals = (*SEQUENCES, "sft+rl")
    if all(results.final(name) for name in rivals):
        means = [interval(results.final(name).values())[0] for name in rivals]
        level = 0.9 * min(means)
        until = {name: results.steps_to(name, level) for name in rivals}
        fastest = min(SEQUENCES, key=lambda name: np.mean(list(until[name].values())))
        claim("SFT+RL in one stage needs fewer steps than the fastest SFT->RL "
              f"({fastest}), to {level:.0f} % (Fig. 5)", difference(until[fastest], until["sft+rl"]), "steps")
    claim("accuracy falls for a while when RL follows long SFT (Fig. 5; four steps after the switch)",
          negative(change(results, FORWARD, percent, 2)), later=True)
    claim("SFT+RL beats RL (Fig. 5)", results.minus("sft+rl", "grpo"))


def table_2(results, claim):
    minus = results.minus
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


def table_3(results, claim):
    claim("w_SFT matters: SRFT beats SRFT with w_SFT = 1 (Table 3)", results.minus("srft", "srft-w_sft-1"))
    claim("w_RL matters: SRFT beats SRFT with w_RL = 1 (Table 3)", results.minus("srft", "srft-w_rl-1"))


def figure_6(results, claim):
    # Row 0 is the base model, before the first step.
    def late_entropy(rows):
        return np.mean([row["entropy/rollout"] for row in rows[1:][-10:]])

    def reward(rows):
        return np.mean([row["reward/mean"] for row in rows[1:]])

    def lengthening(rows):
        return rows[-1]["response_len/mean"] - rows[1]["response_len/mean"]

    def against_rl(value):
        return difference(results.each("srft", value), results.each("grpo", value))

    claim("SRFT keeps more entropy than RL (Fig. 6c; last 10 steps)", against_rl(late_entropy), "nats",
          digits=3)
    claim("SRFT lengthens responses (Fig. 6b)", interval(results.each("srft", lengthening).values()),
          "tokens")
    claim("RL shortens responses (Fig. 6b)", negative(interval(results.each("grpo", lengthening).values())),
          "tokens")
    claim("SRFT's reward rises faster than RL's (Fig. 6a; mean over all steps)", against_rl(reward), "",
          digits=3)


def figure_a2(results, claim):
    claim("without gradients on low-entropy tokens RL loses less than 3 points (Fig. A2)",
          results.minus("grpo-truncated", "grpo"), least=-3.0)


# ----------------------------------------------------------------------------------------------------------
# Questions of the paper's reviewers, and ours of the table of decisions.

def reviews(results):
    """[(question, figure, verdict)] of what the paper's reviewers asked, and of our table of decisions."""
    rows = []

    def ask(text, a, b, least=0.0, holds="holds", does_not="does not hold"):
        """Is run a better than run b, by more than `least` points? In these words."""
        found = results.minus(a, b)
        mean, half, n = found
        if n:
            says = verdict(mean, half, least)
            says = {"holds": holds, "does not hold": does_not}.get(says, says)
            rows.append((text, f"{shown(found)} points, {of(n)}", says))

    ask("RL against SFT: the paper has RL ahead in Table 1, SFT in Table 2", "grpo", "sft",
        holds="RL ahead", does_not="SFT ahead")
    ask("from the same fine-tuned start (12 steps of SFT), SRFT beats RL", "sft-12>srft", "sft-12>grpo")
    for name in ("sft", "sft+rl", "luffy"):
        ask(f"weak demonstrations: SRFT beats {name}", "srft weak", f"{name} weak")
    ask("weak demonstrations: SRFT still beats RL, which sees none", "srft weak", "grpo")
    ask("weak demonstrations cost SRFT less than 3 points", "srft weak", "srft", least=-3.0)
    for name in ("sft", "sft+rl", "luffy"):
        ask(f"weak demonstrations cost {name} less than 3 points \u2020", f"{name} weak", name, least=-3.0)
    for name in ("sft", "grpo", "sft+rl"):
        ask(f"second family (Qwen3): SRFT beats {name}", "srft qwen3", f"{name} qwen3")
    if results.final("srft"):
        rows += distillation(results)
    for name in SWITCHES:
        ask(f"`{name.removeprefix('srft ')}` against the default", name, "srft", holds="better",
            does_not="worse")
    return rows


def gradient_share(rows, terms, half):
    """Percent that terms have of the sum of all four terms' gradient norms, in half 0 or 1 of the steps."""
    middle = rows[-1]["step"] / 2
    measured = [row for row in rows if "grad_norm/sft_demo" in row and (row["step"] > middle) == half]

    def total(some):
        found = 0
        for row in measured:
            for term in some:
                found += row[f"grad_norm/{term}"]
        return found

    return 100 * total(terms) / total(TERMS)


def distillation(results):
    """Rows of the question: what part of the update comes from demonstrations? Each term, and those two."""
    rows, groups = [], [(term,) for term in TERMS]
    groups.append(("sft_demo", "rl_demo"))
    for terms in groups:
        halves = []
        for half in (0, 1):
            shares = results.each("srft", lambda rows: gradient_share(rows, terms, half))
            halves.append(interval(shares.values()))
        first, second = halves
        _, _, n = first
        rows.append((
            f"is it distillation? Share of {' and '.join(terms)} in the sum of the terms' gradient norms",
            f"{shown(first)} % in the first half of the steps, {shown(second)} % in the second, {of(n)}", ""))
    return rows


# ----------------------------------------------------------------------------------------------------------
# Everything, written.

def figures(bench, results):
    """{figure: {label: run folders}}, seeds joined by ",", stages of a sequence by "+", as paper/figures.py
    reads them."""
    def curve(*names):
        """The run, or the sequence of runs, of all seeds that have each of them."""
        of_seeds = []
        for seed in results.seeds:
            if all((name, seed) in results.rows for name in names):
                of_seeds.append("+".join(str(bench.unfolded(name, seed)) for name in names))
        return ",".join(of_seeds)

    rl = curve("grpo")
    forward = {}
    for name in SEQUENCES:
        start = RUNS[name].start
        forward[f"SFT->RL, {RUNS[start].steps} + {RUNS[name].steps}"] = curve(start, name)
    last = f"SFT->RL, {STAGE} + {REST}"
    return {"fig4": {last: forward[last],
                     f"RL->SFT, {REST} + {STAGE}": curve(f"grpo-{REST}", BACKWARD),
                     f"RL->SFT_KL, {REST} + {STAGE}": curve(f"grpo-{REST}", f"{BACKWARD}_kl"),
                     f"SFT->RL, {STEPS} + {STEPS}": curve("sft", "sft>grpo"),
                     f"RL->SFT, {STEPS} + {STEPS}": curve("grpo", "grpo>sft"),
                     f"RL->SFT_KL, {STEPS} + {STEPS}": curve("grpo", "grpo>sft_kl")},
            "fig5": {"RL": rl, **forward, "SFT+RL": curve("sft+rl")},
            "fig6": {"RL": rl, "SRFT": curve("srft")},
            "terms": {"SRFT": curve("srft")},
            "figA2": {"RL": rl, "RL, truncated": curve("grpo-truncated")}}


def report(bench):
    """tables.md, the figures of curves, the claims of experiments/README.md (quick: claims.md)."""
    results = Results(bench)
    if not results.rows:
        raise SystemExit("no results yet: run without --report")
    pictures = questions.pictures(results)
    tables = all_tables(bench, results, pictures)
    (bench.results / "tables.md").write_text(tables)
    lines = ["| claim | found | |", "|---|---|---|"]
    for cells in claims(results):
        lines.append(table_row(cells))
    lines += ["", "| asked | found | |", "|---|---|---|"]
    for cells in (*reviews(results), *questions.answers(results)):
        lines.append(table_row(cells))
    text = "\n".join(lines)
    page = Path("experiments/README.md")
    if bench.quick or not page.exists():
        (bench.results / "claims.md").write_text(text + "\n")
    else:
        fill_in(page, text)
    for name, curves in figures(bench, results).items():
        if all(curves.values()):
            runs = [f"{label}={folders}" for label, folders in curves.items()]
            bench.figures(name, *runs, "--out", bench.results / name)
    for name, panels in pictures.items():
        questions.draw(bench.results / f"{name}.png", panels)
    weights = {}
    for name in (*TABLE3, *SWITCHES):
        found = results.minus(name, "srft")
        if found[2]:
            label = name.replace("srft-w_sft-1", "w_SFT = 1").replace("srft-w_rl-1", "w_RL = 1")
            weights[label.removeprefix("srft ")] = found
    if weights:
        questions.draw_differences(bench.results / "weights.png", weights,
                                   "accuracy minus that of SRFT, points, with 95 % intervals")
    print(tables, text, sep="\n")


def all_tables(bench, results, pictures):
    """Markdown: a table for each part of the runs that is known and each panel of questions.pictures, and
    the hours that they took."""
    parts = {"Table 1: SFT, RL and sequences": TABLE1,
             "Table 2: SRFT, its baselines, and the runs of Fig. 5 and A2": ["sft", "grpo", FORWARD, *TABLE2],
             "Table 3: without the entropy weights": ["srft", *TABLE3],
             "Switches of the table of decisions": ["srft", *SWITCHES],
             "What the reviewers asked": REVIEWS,
             "A second family, Qwen3": SECOND_FAMILY}
    tables = []
    for title, runs in parts.items():
        if any(map(results.final, runs)):
            tables.append(table(results, title, runs))
    for name, panels in pictures.items():
        tables += [questions.table(name, panel) for panel in panels]
    seconds = [bench.records.facts[key]["seconds"] for key in results.rows]
    hours = f"{len(seconds)} runs, one core each: {sum(seconds) / 3600:.1f} hours, without tuning.\n"
    return "\n".join(tables) + "\n" + hours


def fill_in(page, text):
    """Put the text between the two lines of experiments/README.md that wait for it."""
    before, _, after = page.read_text().partition("<!-- claims -->\n")
    _, end, after = after.partition("<!-- end of claims -->")
    if not end:
        raise SystemExit(f"{page}: the lines <!-- claims --> and <!-- end of claims --> are not there")
    page.write_text(f"{before}<!-- claims -->\n{text}\n{end}{after}")
