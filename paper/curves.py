"""Fig. 4, 5, 6, A2 and the gradients of the loss terms: what runs logged, one curve a paradigm.

    python -m paper.figures fig6 RL=out/grpo SRFT=out/srft

A curve, LABEL=RUN+RUN,RUN+RUN, is a run or a sequence of runs (each started from the one before), with more
seeds after commas. What was measured on several held-out sets is averaged, as in the paper: over those sets
that all runs have, whose names stand in the title.
"""
from pathlib import Path

import numpy as np

from paper.pictures import draw_curves
from support.runlog import read_rows

TERMS = {"sft_demo": "Eq. 8", "rl_demo": "Eq. 9", "rl_pos": "Eq. 12, left", "rl_neg": "Eq. 12, right"}
PANELS = {
    "fig4": ["accuracy", "entropy"],
    "fig5": ["accuracy", "length", "entropy"],
    "fig6": ["reward", "rollout_length", "rollout_entropy", "accuracy"],
    "figA2": ["accuracy", "reward", "entropy"],
    "terms": list(TERMS),
}
METRICS = {                             # panel: how its metrics begin in metrics.jsonl, its title
    "accuracy": ("eval/", "held-out accuracy"),
    "entropy": ("eval_entropy/", "entropy, nats a token"),
    "length": ("eval_len/", "response, tokens"),
    "reward": ("reward/mean", "training reward"),
    "rollout_length": ("response_len/mean", "rollouts, tokens"),
    "rollout_entropy": ("entropy/rollout", "entropy of rollouts, nats a token"),
}
for term, equation in TERMS.items():
    METRICS[term] = (f"grad_norm/{term}", f"gradient norm, {term} ({equation})")


def curves(args, *_):
    """Fig. 4, 5, 6, A2 and the terms' gradients: mean over seeds, shaded from the least to the most."""
    found, titles = {}, {}                                  # panel -> label -> curve; panel -> title
    for panel in PANELS[args.figure]:
        prefix, titles[panel] = METRICS[panel]
        metrics = metrics_of_all([runs for _, runs in named(args.curves)], prefix)
        sets = [name.removeprefix(prefix) for name in metrics]
        if prefix.endswith("/") and sets:
            titles[panel] += f" ({'mean of ' if len(sets) > 1 else ''}{', '.join(sets)})"
        found[panel] = {}
        for label, runs in named(args.curves):
            steps, mean, least, most = read_curves(runs, metrics)
            found[panel][label] = {"step": steps, "mean": mean, "least": least, "most": most,
                                   "metrics": metrics}

    # SFT has no rewards, and a run without --eval_data no accuracy: a panel needs one curve, not all.
    measured, empty = [], []                                # panels, titles
    for panel, of_label in found.items():
        if any(curve["step"] for curve in of_label.values()):
            measured.append(panel)
        else:
            empty.append(titles[panel])
    flag = "--term_gradients" if args.figure == "terms" else "--eval_data"
    if not measured:
        raise ValueError(f"no run has any of {', '.join(empty)}: these are measured where srft.py gets "
                         f"{flag}")
    if empty:
        print(f"left out, since no run has it (train with {flag}): {', '.join(empty)}", flush=True)
    for label, _ in named(args.curves):
        ends = []
        for panel in measured:
            mean = found[panel][label]["mean"]
            if mean:
                ends.append(f"{panel} {mean[-1]:.3f}")
        print(f"{label:<16} " + "   ".join(ends), flush=True)

    def draw(file):
        draw_curves(file, {titles[panel]: found[panel] for panel in measured})

    return {"json": found, "png": draw}


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


def metrics_of_all(curves, prefix):
    """The metrics that begin with `prefix` and that every run has which has any; says which only some have. A
    mean over other sets in each run would compare what cannot be compared. Raises ValueError if no metric is
    left."""
    of_runs = []
    for curve in curves:
        for run in curve.replace(",", "+").split("+"):
            names = set()
            for row in rows_of(run):
                names |= {name for name in row if name.startswith(prefix)}
            if names:
                of_runs.append(names)
    if not of_runs:
        return []
    common, some = set.intersection(*of_runs), set.union(*of_runs)
    if not common:
        raise ValueError(f"no held-out set is in all runs ({', '.join(sorted(some))}): draw a figure of each")
    if some > common:
        print(f"left out, since not all runs have it: {', '.join(sorted(some - common))}", flush=True)
    return sorted(common)


def rows_of(run):
    """The rows of a run's metrics.jsonl. ValueError if there are none."""
    rows = read_rows(Path(run) / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run}: no metrics.jsonl with a row; expected a run's folder")
    return rows


def read_curves(seeds, metrics):
    """Runs of several seeds, "RUN+RUN,RUN+RUN" -> (steps, mean, least, most) over the steps that all of them
    have."""
    of_seeds = [dict(read_curve(run, metrics)) for run in seeds.split(",")]                 # step -> value
    # Seeds may have been evaluated at different steps; a mean over some of them would jump.
    steps = sorted(set.intersection(*map(set, of_seeds)))
    rows = []
    for curve in of_seeds:
        rows.append([curve[step] for step in steps])
    values = np.array(rows)                                                                 # (seeds, steps)
    return steps, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist()


def read_curve(run, metrics):
    """[(step, mean of `metrics`)] of a run or a sequence of runs RUN+RUN, steps counted through, where all of
    them were measured (the paper's average over benchmarks)."""
    points, first = [], 0
    for part in run.split("+"):
        rows = rows_of(part)
        for row in rows:
            values = [row[name] for name in metrics if row.get(name) is not None]
            # Step 0 of a later stage is the end of the stage before it, measured twice.
            if values and len(values) == len(metrics) and (row["step"] or not first):
                points.append((first + row["step"], float(np.mean(values))))
        first += rows[-1]["step"]
    return points
