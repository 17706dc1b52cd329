"""Questions that the paper leaves open: equal compute, size, stability, wrong demonstrations.

Claims and rules were fixed before the runs. claims.py has the paper's own claims, and makes the report.
"""
import numpy as np

from paper.pictures import new_figure, save_figure
from runs import BUDGETS, RL_STEPS, RUNS, SFT_STEPS, SLIPS, STABLE_RATES, STAGES, STEPS, VARIANTS
from seeds import difference, interval, of, percent, shown, verdict

SPLITS = [f"sft {steps}>grpo" for steps in STAGES]
SPLIT_TITLES = {"heldout": "held-out problems", "long": "longer problems"}
SIZES = (0.8, 3.1)      # million parameters
STABLE = 0.8            # of its best accuracy on held-out problems over all rates: less is broken


# ----------------------------------------------------------------------------------------------------------
# Accuracy at a budget of compute.

def budget(results):
    """TFLOP of SRFT's 40 steps, the mean over seeds; None while no such run is known."""
    spent = []
    for rows in results.each("srft long", lambda rows: rows).values():
        spent += [row["tflop"] for row in rows if row["step"] == STEPS]
    return float(np.mean(spent)) if spent else None


def course(results, name, seed, accuracy):
    """[(TFLOP, accuracy)] of a run's evaluations, after those of the run that it starts from."""
    rows, found, before = results.rows[name, seed], [], 0.0
    start = RUNS[name].start
    if start:
        found = course(results, start, seed, accuracy)
        before = results.rows[start, seed][-1]["tflop"]
    for row in rows:
        if "eval/heldout" in row:
            found.append((before + row["tflop"], accuracy(row)))
    return found


def at_budget(results, name, tflop, accuracy=percent):
    """{seed: accuracy at so much compute}, on a line between the evaluations before and after it."""
    found = {}
    for run, seed in results.rows:
        start = RUNS[name].start
        if run == name and (not start or (start, seed) in results.rows):
            spent, values = zip(*course(results, name, seed, accuracy))
            if spent[-1] >= 0.97 * tflop:                            # else it has ended before
                found[seed] = float(np.interp(tflop, spent, values))
    return found


def rivals(times):
    """Label -> the runs that it stands for at so many budgets, of which the best counts."""
    steps = times * RL_STEPS // 2
    return {"SFT+RL": ["sft+rl long"], "SFT->RL": SPLITS, "RL->SFT": [f"grpo {steps}>sft"],
            "RL": ["grpo long"], "SFT": [f"sft {times * SFT_STEPS}"], "LUFFY": ["luffy long"]}


def equal_compute(results, accuracy=percent):
    """{(times, label): (run, {seed: accuracy})} of SRFT and its rivals; of several runs, the best."""
    unit, found = budget(results), {}
    if unit is None:
        return found
    for times in BUDGETS:
        for label, names in {"SRFT": ["srft long"], **rivals(times)}.items():
            known = {}
            for name in names:
                values = at_budget(results, name, times * unit, accuracy)
                if values:
                    known[name] = values
            if known:
                best = max(known, key=lambda name: np.mean(list(known[name].values())))
                found[times, label] = best, known[best]
    return found


# ----------------------------------------------------------------------------------------------------------
# Rates up to where a run breaks.

def stability(results, updates):
    """{variant: {rate: [rows of each seed, whose last are those of the end]}}"""
    found = {}
    for label in VARIANTS:
        for rate in STABLE_RATES:
            rows = list(results.each(f"{label}, {updates} x {rate:g}", lambda rows: rows).values())
            if rows:
                found.setdefault(label, {})[rate] = rows
    return found


def heldout(rows):
    """Percent at the end, 0 for a run that died before."""
    return 100 * rows[-1].get("eval/heldout", 0.0) if rows[-1]["step"] == STEPS else 0.0


def highest_stable(of_rate):
    """The highest rate, from the best one on, up to which no seed is broken (see STABLE)."""
    means = {rate: np.mean([heldout(rows) for rows in seeds]) for rate, seeds in of_rate.items()}
    found = max(means, key=means.get)
    for rate in sorted(of_rate):
        if rate > found and min(heldout(rows) for rows in of_rate[rate]) < STABLE * max(means.values()):
            break
        found = max(found, rate)
    return found


def stable_rates(results):
    """[(question, rate, "")]: how far each variant can be pushed."""
    rows = []
    for updates in (1, 2):
        for label, of_rate in stability(results, updates).items():
            text = f"{label}, {updates} update{'s' * (updates > 1)} a step: the highest stable rate"
            rows.append((text, f"{highest_stable(of_rate):g}", ""))
    return rows


# ----------------------------------------------------------------------------------------------------------
# The claims, fixed before the runs.

def answers(results):
    """[(question, figure, verdict)]"""
    rows = []

    def ask(text, a, b):
        found = difference(a, b)
        mean, half, n = found
        if n:
            rows.append((text, f"{shown(found)} points, {of(n)}", verdict(mean, half)))

    ask_all(results, ask)
    return rows + stable_rates(results)


def ask_all(results, ask):
    """ask(text, {seed: value} of a, {seed: value} of b): is a greater than b?"""
    found = equal_compute(results)
    for (times, label), (name, values) in found.items():
        if label != "SRFT" and (times, "SRFT") in found:
            best = f", the best of {len(SPLITS)}: {name}" if label == "SFT->RL" else ""
            ask(f"with {times} x the compute of {STEPS} steps of SRFT, SRFT beats {label}{best}",
                found[times, "SRFT"][1], values)
    for label, name in (("SFT+RL", "sft+rl 256"), ("SFT->RL", "sft 160 256>grpo"), ("RL", "grpo 256")):
        ask(f"with 3.1M parameters, SRFT beats {label}", results.final("srft 256"), results.final(name))
    ask("with 3.1M parameters, w_RL = 1 is ahead of 0.1 exp(H)", results.final("srft-w_rl-1 256"),
        results.final("srft 256"))
    for share in SLIPS:
        wrong = f"{share} % wrong"
        for label, name in (("LUFFY", f"luffy {wrong}"), ("SFT->RL", f"sft 160 {wrong}>grpo")):
            ask(f"{share} % of the demonstrations wrong: SRFT beats {label}",
                results.final(f"srft {wrong}"), results.final(name))
        if share:
            ask(f"{share} % of the demonstrations wrong: not to imitate them (Eq. 8) helps SRFT",
                results.final(f"srft {wrong}, not imitated"), results.final(f"srft {wrong}"))


# ----------------------------------------------------------------------------------------------------------
# Pictures: {file: panels}, a panel being (title, name of x, {label: [(x, values of the seeds)]}).

def pictures(results):
    found = {"equal_compute": compute_panels(results), "stability": stability_panels(results),
             "quality": quality_panels(results), "size": size_panels(results)}
    known = {name: [panel for panel in panels if panel[-1]] for name, panels in found.items()}
    return {name: panels for name, panels in known.items() if panels}


def compute_panels(results):
    """Accuracy over compute, a line a paradigm."""
    panels = []
    for split, title in SPLIT_TITLES.items():
        lines = {}
        of_split = equal_compute(results, lambda row: 100 * row[f"eval/{split}"])
        for (times, label), (_, values) in of_split.items():
            lines.setdefault(label, []).append((times, list(values.values())))
        panels.append((f"accuracy on {title}, percent", f"compute, in {STEPS} steps of SRFT", lines))
    return panels


def stability_panels(results):
    """Accuracy, entropy and gradient norm over the rate, a line a variant; one and two updates a step."""
    measures = {"accuracy on held-out problems, percent": heldout,
                "entropy of rollouts, nats, at the end": lambda rows: rows[-1].get("entropy/rollout", np.nan),
                "gradient norm, the largest": lambda rows: max(row.get("grad_norm", 0.0) for row in rows)}
    panels = []
    for updates in (1, 2):
        found = stability(results, updates)
        for title, measure in measures.items():
            lines = {}
            for label, of_rate in found.items():
                lines[label] = [(rate, [measure(rows) for rows in seeds]) for rate, seeds in of_rate.items()]
            panels.append((f"{title}; {updates} update{'s' * (updates > 1)} a step", "learning rate", lines))
    return panels


def quality_panels(results):
    """Accuracy over the share of wrong demonstrations, a line a paradigm."""
    named = {"SRFT": "srft {} % wrong", "SRFT, wrong ones not imitated": "srft {} % wrong, not imitated",
             "LUFFY": "luffy {} % wrong", "SFT->RL": "sft 160 {} % wrong>grpo"}
    panels = []
    for split, title in SPLIT_TITLES.items():
        lines = {}
        for label, name in named.items():
            points = [(share, list(results.final(name.format(share), split).values())) for share in SLIPS]
            points = [point for point in points if point[1]]
            if points:
                lines[label] = points
        panels.append((f"accuracy on {title}, percent", "wrong demonstrations, percent", lines))
    return panels


def size_panels(results):
    """One budget for each; SFT->RL has 10 epochs of SFT at both sizes."""
    larger = {"SRFT": "srft 256", "SRFT, w_RL = 1": "srft-w_rl-1 256", "SFT+RL": "sft+rl 256",
              "SFT->RL": "sft 160 256>grpo", "RL": "grpo 256"}
    smaller = {"SRFT": "srft long", "SFT+RL": "sft+rl long", "SFT->RL": "sft 160>grpo", "RL": "grpo long"}
    panels, unit = [], budget(results)
    for split, title in SPLIT_TITLES.items():
        lines = {}
        for label, name in larger.items():
            points = [(SIZES[1], list(results.final(name, split).values()))]
            if label in smaller and unit:
                values = at_budget(results, smaller[label], unit, lambda row: 100 * row[f"eval/{split}"])
                points.insert(0, (SIZES[0], list(values.values())))
            elif label not in smaller:
                points.insert(0, (SIZES[0], list(results.final("srft-w_rl-1", split).values())))
            lines[label] = [point for point in points if point[1]]
        known = {label: points for label, points in lines.items() if len(points) == len(SIZES)}
        panels.append((f"accuracy on {title}, percent", "parameters, million", known))
    return panels


def draw_differences(file, differences, title):
    """A PNG: {label: (mean, half width, seeds)}, a row each, beside the line of no difference."""
    figure = new_figure(8, 1 + 0.3 * len(differences))
    axis = figure.subplots()
    for row, (mean, half, _) in enumerate(differences.values()):
        axis.errorbar([mean], [row], xerr=[half or 0.0], marker="o", capsize=3, color="C0")
    axis.set_yticks(range(len(differences)), list(differences))
    axis.invert_yaxis()
    axis.axvline(0.0, color="grey", linewidth=1)
    axis.set(xlabel=title)
    save_figure(figure, file)


def draw(file, panels):
    """A PNG: means over seeds, with 95 % intervals where there are three seeds or more."""
    columns = 2 if len(panels) == 2 else 3
    figure = new_figure(5 * columns, 4 * -(-len(panels) // columns))
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (title, x, lines) in zip(axes, panels):
        axis.set(title=title, xlabel=x)
        ticks = sorted({at for points in lines.values() for at, _ in points})
        if x == "learning rate":
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_xticks(ticks, [f"{at:g}" for at in ticks])
        if "gradient" in title:
            axis.set_yscale("log")
        for number, (label, points) in enumerate(lines.items()):
            found = [interval(values) for _, values in points]
            # Side by side, so that bars can be read.
            places = [at * 1.01**number if ticks[0] else at + 0.5 * number for at, _ in points]
            halves = [half if n > 2 else 0.0 for _, half, n in found]
            axis.errorbar(places, [mean for mean, *_ in found], halves, label=label, marker="o", capsize=3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    save_figure(figure, file)
