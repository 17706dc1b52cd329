"""Numbers of runs, one a seed, their 95 % intervals, and the rule by which a claim is judged (`verdict`)."""
import json

import numpy as np

from runs import RUNS

# Student's t by the number of seeds.
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
METRICS = {"heldout": ("eval/heldout",), "long": ("eval/long",), "accuracy": ("eval/heldout", "eval/long")}


# ----------------------------------------------------------------------------------------------------------
# Numbers, one a seed.

class Results:
    """What is known: rows of each run and seed, and numbers made from them."""

    def __init__(self, bench):
        self.bench, self.seeds = bench, range(10)             # all that are there, whatever was asked for now
        self.rows = {}
        for name in RUNS:
            for seed in self.seeds:
                if bench.done(name, seed):
                    self.rows[name, seed] = bench.records.rows[name, seed]

    def each(self, name, value):
        """{seed: value(rows)}"""
        return {seed: value(rows) for (run, seed), rows in self.rows.items() if run == name}

    def final(self, name, metric="accuracy"):
        """{seed: accuracy at the end}, in percent: held out, long, or the mean of the two."""
        def at_the_end(rows):
            return 100 * float(np.mean([rows[-1][key] for key in METRICS[metric]]))
        return self.each(name, at_the_end)

    def minus(self, a, b, metric="accuracy"):
        """The interval of `final` of a minus that of b."""
        return difference(self.final(a, metric), self.final(b, metric))

    def steps_to(self, name, level):
        """{seed: the first multiple of 8 steps, counted through a sequence, at which `percent` is at least
        `level`; else 8 more than all steps}. At multiples of 8 every run was evaluated."""
        run, found = RUNS[name], {}
        first = RUNS[run.start].steps if run.start else 0
        for seed, rows in self.each(name, lambda rows: rows).items():
            course = []                                       # (step of the sequence, row)
            for row in self.rows.get((run.start, seed), []):
                course.append((row["step"], row))
            for row in rows:
                course.append((first + row["step"], row))
            found[seed] = first + run.steps + 8
            for step, row in course:
                if step % 8 == 0 and "eval/long" in row and percent(row) >= level:
                    found[seed] = step
                    break
        return found

    def figure(self, name, value):
        """{seed: value(what the JSON of figure NAME-SEED says)}"""
        found = {}
        for seed in self.seeds:
            file = self.bench.results / f"{name}-{seed}.json"
            if file.exists():
                found[seed] = value(json.loads(file.read_text()))
        return found

    def distance(self, label, step=None):
        """{seed: Fig. 3's distance to the base model after a step, by default the last}, in points."""
        def at_step(found):
            path = found["runs"][label]
            wanted = path[-1]["step"] if step is None else step
            for point in path:
                if point["step"] == wanted:
                    return 100 * point["distances"][0]
        return self.figure("fig3", at_step)


def percent(row):
    """The mean of both accuracies of a row that was evaluated, in percent."""
    return 50 * (row["eval/heldout"] + row["eval/long"])


def entropy(row):
    """The mean of both entropies of a row that was evaluated, in nats."""
    return float(np.mean([row["eval_entropy/heldout"], row["eval_entropy/long"]]))


# ----------------------------------------------------------------------------------------------------------
# Over seeds.

def interval(values):
    """(mean, half width of its 95 % interval by Student's t, seeds); the half width is None for one seed."""
    values = list(values)
    n = len(values)
    if not n:
        return None, None, 0
    half = None
    if n > 1:
        half = T_95[n] * float(np.std(values, ddof=1)) / n**0.5
    return float(np.mean(values)), half, n


def difference(a, b):
    """interval of a - b over the seeds that both have: a seed is one order of data, one series of draws."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def negative(found):
    """The interval of the number with the opposite sign."""
    mean, half, n = found
    return (None if mean is None else -mean), half, n


def verdict(mean, half, least=0.0):
    """The rule: "x > least" holds if the whole 95 % interval lies above, does not if all of it lies below."""
    if half is None:
        return "cannot tell"
    if mean - half > least:
        return "holds"
    if mean + half < least:
        return "does not hold"
    return "cannot tell"


def shown(found, digits=1):
    """An interval as text: "9.2 \u00b1 1.0"."""
    mean, half, _ = found
    if mean is None:
        return "-"
    text = f"{round(mean, digits) + 0.0:.{digits}f}"            # + 0.0: not "-0.0"
    if half is not None:
        text += f" \u00b1 {half:.{digits}f}"
    return text


def of(n):
    return f"{n} seed" + "s" * (n > 1)


def table_row(cells):
    return f"| {' | '.join(cells)} |"
