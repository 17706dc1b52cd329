"""Questions that the paper leaves open: equal compute, size, stability, wrong demonstrations.

Claims and rules were fixed before the runs. claims.py has the paper's own claims, and makes the report.
"""
import math

import numpy as np

from paper.pictures import new_figure, save_figure
from runs import BUDGETS, RL_STEPS, RUNS, SFT_STEPS, SLIPS, STABLE_RATES, STAGES, STEPS, VARIANTS
from seeds import difference, interval, of, percent, shown, table_row, verdict

SPLITS = [f"sft {steps}>grpo" for steps in STAGES]
SPLIT_TITLES = {"heldout": "held-out problems", "long": "longer problems"}
SIZES = (0.8, 3.1)      # million parameters
BOTH_SIZES = {          # label -> its runs of both sizes
    "SRFT": ("srft long", "srft 256"), "SRFT, w_RL = 1": ("srft-w_rl-1 longer", "srft-w_rl-1 256"),
    "SFT+RL": ("sft+rl long", "sft+rl 256"), "SFT->RL": ("sft 160>grpo", "sft 160 256>grpo"),
    "RL": ("grpo long", "grpo 256")}
NOT_IMITATED = "SRFT, wrong ones not imitated"
ON_WRONG = {            # label -> its run, where so many percent of the demonstrations are wrong
    "SRFT": "srft {} % wrong", NOT_IMITATED: "srft {} % wrong, not imitated", "LUFFY": "luffy {} % wrong",
    "SFT->RL": "sft 160 {} % wrong>grpo"}
STABLE = 0.8            # of its best accuracy on held-out problems over all rates: less is broken


# ----------------------------------------------------------------------------------------------------------
# Accuracy at a budget of compute.

def budget(results, whose="srft long"):
    """TFLOP of SRFT's 40 steps, the mean over the seeds of run `whose`; None while no such run is known."""
    spent = []
    for rows in results.each(whose, lambda rows: rows).values():
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


def at_one_budget(results, name, accuracy=percent, whose="srft long"):
    """{seed: accuracy with one budget}, see budget and at_budget; {} while the budget is not known."""
    unit = budget(results, whose)
    return {} if unit is None else at_budget(results, name, unit, accuracy)


def on(split):
    """The accuracy of a row that was evaluated, on one of the two sets, in percent."""
    return lambda row: 100 * row[f"eval/{split}"]


def of_size(results, place, accuracy=percent):
    """{label: {seed: accuracy with one budget of this size's SRFT}}, of SIZES[place]."""
    found = {}
    for label, names in BOTH_SIZES.items():
        found[label] = at_one_budget(results, names[place], accuracy, whose=BOTH_SIZES["SRFT"][place])
    return found


def with_wrong(results, share, accuracy=percent):
    """{label: {seed: accuracy with one budget}}, where `share` percent of the demonstrations are wrong."""
    return {label: at_one_budget(results, name.format(share), accuracy) for label, name in ON_WRONG.items()}


def rivals(times):
    """Label -> the runs that it stands for at so many budgets, of which the best counts."""
    steps = times * RL_STEPS // 2
    return {"SFT+RL": ["sft+rl long"], "SFT->RL": SPLITS, "RL->SFT": [f"grpo {steps}>sft"],
            "RL": ["grpo long"], "SFT": [f"sft {times * SFT_STEPS}"], "LUFFY": ["luffy long"]}


def equal_compute(results, accuracy=percent):
    """{(times, label): (run, {seed: accuracy})} of SRFT and its rivals; of several runs, the one whose mean
    over both sets is best."""
    unit, found = budget(results), {}
    if unit is None:
        return found
    for times in BUDGETS:
        for label, names in {"SRFT": ["srft long"], **rivals(times)}.items():
            means = {}
            for name in names:
                values = at_budget(results, name, times * unit)
                if values:
                    means[name] = np.mean(list(values.values()))
            if means:
                best = max(means, key=means.get)
                found[times, label] = best, at_budget(results, best, times * unit, accuracy)
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
    """The highest rate, from the best one on, up to which no seed is broken (see STABLE).

    None, if the best itself has a broken seed, or its mean does not exceed that before training.
    """
    means = {rate: np.mean([heldout(rows) for rows in seeds]) for rate, seeds in of_rate.items()}
    best = max(means, key=means.get)
    base = np.mean([100 * rows[0]["eval/heldout"] for rows in of_rate[best]])
    if means[best] <= base:
        return None
    found = None
    for rate in sorted(rate for rate in of_rate if rate >= best):
        if min(heldout(rows) for rows in of_rate[rate]) < STABLE * means[best]:
            break
        found = rate
    return found


def stable_rates(results):
    """[(question, rate, "")]: how far each variant can be pushed."""
    rows = []
    for updates in (1, 2):
        for label, of_rate in stability(results, updates).items():
            highest = highest_stable(of_rate)
            says = "none" if highest is None else f"{highest:g}"
            if highest == STABLE_RATES[-1]:
                says = f"at least {says}"
            n = min(map(len, of_rate.values()))
            text = f"{label}, {updates} update{'s' * (updates > 1)} a step: the highest stable rate"
            rows.append((text, f"{says}, of {len(of_rate)} rates, {of(n)}", ""))
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
    larger = of_size(results, 1)
    for label in ("SFT+RL", "SFT->RL", "RL"):
        ask(f"with 3.1M parameters, SRFT beats {label}", larger["SRFT"], larger[label])
    ask("with 3.1M parameters, w_RL = 1 is ahead of 0.1 exp(H)", larger["SRFT, w_RL = 1"], larger["SRFT"])
    for share in SLIPS:
        wrong = f"{share} % of the demonstrations wrong"
        of = with_wrong(results, share)
        for label in ("LUFFY", "SFT->RL"):
            ask(f"{wrong}: SRFT beats {label}", of["SRFT"], of[label])
        if share:
            ask(f"{wrong}: not to imitate them (Eq. 8) helps SRFT", of[NOT_IMITATED], of["SRFT"])


# ----------------------------------------------------------------------------------------------------------
# Pictures: {file: panels}, a panel being (title, name of x, {label: [(x, values of the seeds)]}).

def pictures(results):
    found = {"equal_compute": compute_panels(results), "stability-1": stability_panels(results, 1),
             "stability-2": stability_panels(results, 2), "quality": quality_panels(results),
             "size": size_panels(results)}
    known = {name: [panel for panel in panels if panel[-1]] for name, panels in found.items()}
    return {name: panels for name, panels in known.items() if panels}


def compute_panels(results):
    """Accuracy over compute, a line a paradigm; and SFT->RL by its first stages."""
    panels, x, unit = [], f"compute, in {STEPS} steps of SRFT", budget(results)
    if unit is None:
        return panels
    for split, title in SPLIT_TITLES.items():
        lines = {}
        for (times, label), (_, values) in equal_compute(results, on(split)).items():
            lines.setdefault(label, []).append((times, list(values.values())))
        panels.append((f"accuracy on {title}, percent", x, lines))
    lines = {}
    for name, steps in zip(SPLITS, STAGES):
        for times in BUDGETS:
            values = list(at_budget(results, name, times * unit).values())
            if values:
                lines.setdefault(f"SFT->RL, {steps} steps of SFT", []).append((times, values))
    return [*panels, ("SFT->RL by its first stage, mean of both, percent", x, lines)]


def stability_panels(results, updates):
    """Accuracy, and how a run breaks, over the rate; a line a variant, of one or two updates a step."""
    def at_the_end(name):
        return lambda rows: rows[-1].get(name, math.nan)

    def of_all_steps(name, worst):
        return lambda rows: worst([row[name] for row in rows if name in row], default=math.nan)

    measures = {"accuracy on held-out problems, percent": heldout,
                "entropy of rollouts, nats, at the end": at_the_end("entropy/rollout"),
                "length of responses, tokens, at the end": at_the_end("response_len/mean"),
                "gradient norm, the largest finite one": of_all_steps("grad_norm", max),
                "the term of wrong rollouts (Eq. 12), the lowest": of_all_steps("loss/rl_neg", min)}
    panels, found = [], stability(results, updates)
    for title, measure in measures.items():
        lines = {}
        for label, of_rate in found.items():
            for rate, seeds in of_rate.items():
                values = [value for value in map(measure, seeds) if not math.isnan(value)]
                if values:
                    lines.setdefault(label, []).append((rate, values))
        panels.append((title, f"learning rate, {updates} update{'s' * (updates > 1)} a step", lines))
    return panels


def quality_panels(results):
    """Accuracy over the share of wrong demonstrations, a line a paradigm."""
    panels = []
    for split, title in SPLIT_TITLES.items():
        lines = {}
        for share in SLIPS:
            for label, values in with_wrong(results, share, on(split)).items():
                if values:
                    lines.setdefault(label, []).append((share, list(values.values())))
        panels.append((f"accuracy on {title}, percent", "wrong demonstrations, percent", lines))
    return panels


def size_panels(results):
    """One budget for each; only what is known of both sizes."""
    panels = []
    for split, title in SPLIT_TITLES.items():
        lines = {}
        smaller, larger = of_size(results, 0, on(split)), of_size(results, 1, on(split))
        for label in BOTH_SIZES:
            if smaller[label] and larger[label]:
                lines[label] = [(size, list(values.values()))
                                for size, values in zip(SIZES, (smaller[label], larger[label]))]
        panels.append((f"accuracy on {title}, percent", "parameters, million", lines))
    return panels


def table(picture, panel):
    """A panel of a picture as Markdown: mean and 95 % interval over seeds, their number where it is not the
    most."""
    title, x, lines = panel
    places = sorted({place for points in lines.values() for place, _ in points})
    most = max(len(values) for points in lines.values() for _, values in points)
    rows = [f"**{picture}: {title}** ({of(most)})", "", table_row([x, *(f"{place:g}" for place in places)]),
            "|---" * (1 + len(places)) + "|"]
    for label, points in lines.items():
        known = dict(points)
        cells = [label]
        for place in places:
            found = interval(known.get(place, []))
            fewer = f" ({of(found[2])})" if 0 < found[2] < most else ""
            cells.append(shown(found) + fewer)
        rows.append(table_row(cells))
    return "\n".join(rows) + "\n"


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
    """A PNG: means over seeds, with 95 % intervals; where there are fewer than three seeds, with each."""
    columns = min(3, len(panels))
    figure = new_figure(5 * columns, 4 * -(-len(panels) // columns))
    axes = list(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    colours = {}
    for axis, (title, x, lines) in zip(axes, panels):
        axis.set(title=title, xlabel=x)
        ticks = sorted({place for points in lines.values() for place, _ in points})
        if "rate" in x:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_xticks(ticks, [f"{place:g}" for place in ticks])
        if "gradient" in title:
            axis.set_yscale("log")
        for number, (label, points) in enumerate(lines.items()):
            colour = colours.setdefault(label, f"C{len(colours)}")          # the same in all panels
            found = [interval(values) for _, values in points]
            # Side by side, so that bars can be read.
            places = [place * 1.01**number if ticks[0] else place + 0.5 * number for place, _ in points]
            halves = [half if n > 2 else 0.0 for _, half, n in found]
            axis.errorbar(places, [mean for mean, *_ in found], halves, label=label, marker="o", capsize=3,
                          color=colour)
            for place, (_, values) in zip(places, points):
                if len(values) < 3:
                    axis.plot([place] * len(values), values, "_", color=colour)
    known = {}                                                              # label -> its line
    for axis in axes:
        for line, label in zip(*axis.get_legend_handles_labels()):
            known.setdefault(label, line)
    figure.legend(known.values(), known.keys(), loc="outside right upper", fontsize="small")
    save_figure(figure, file)
