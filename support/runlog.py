"""A run's folder: metrics.jsonl, samples.jsonl, curves.png and report.html, written while it trains.

    log = RunLog("out/run", active=rank == 0, step=50)        # resumed at step 50: later rows are cut off
    log.write({"step": 51, "reward/mean": 0.4}, samples=[{"step": 51, "response": "..."}])
    log.close()
    rows = read_rows("out/run/metrics.jsonl")

One JSON object a line, so that a run of days is a file which any tool reads while it grows, and which a kill
spoils by one line at most. What is not a finite number is null. curves.png has the panels of Fig. 6.

To copy: this file with support/claim.py, support/disk.py, support/trackers.py, support/report.py and its
report.html, and PANELS named anew. It needs matplotlib.
"""
import json
import math
import operator
import time
import warnings
from pathlib import Path

from support.claim import claim, is_claimed
from support.disk import append_whole, write_whole
from support.trackers import Tracker

PANELS = [                     # title; metrics drawn in it, or how all of them begin
    ("reward (Fig. 6a)", ["reward/mean", "reward/demo_mean"]),
    ("response length, tokens (Fig. 6b)", ["response_len/mean"]),
    ("entropy, nats (Fig. 6c)", ["entropy/rollout", "entropy/demo"]),
    ("weights of Eq. 8 and 12", ["w_sft", "w_rl"]),
    ("loss terms of Eq. 13", "loss/"),
    ("held-out accuracy", "eval/"),
]


def read_rows(file):
    """The rows of a run's .jsonl file, [] if there is none. A last line that a kill cut short is left out.
    Raises ValueError if any other line is no row, an object of JSON with a step."""
    if not Path(file).exists():
        return []
    # Bytes: half a character spoils its own line only.
    rows, lines = [], Path(file).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            operator.index(row["step"])
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ValueError) and number == len(lines):
                break
            raise ValueError(f"{file}: line {number} of {len(lines)} is no row of a run (an object of JSON "
                             "with a step); mend or remove it") from None
    return rows


def json_line(row):
    """A row as one line of strict JSON. null stands for nan and infinity, which JSON does not have."""
    row = dict(row)
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row[name] = None
    return json.dumps(row, allow_nan=False) + "\n"


def print_accuracy(run):
    """How far a run's accuracy on each held-out set has come."""
    rows = read_rows(Path(run) / "metrics.jsonl")
    for name in sorted({name for row in rows for name in row if name.startswith("eval/")}):
        values = {row["step"]: row[name] for row in rows if name in row}
        first, last = min(values), max(values)
        before = f"step {first}" if first else "base"
        print(f"{name:<16} {before} {100 * values[first]:5.1f} %   trained {100 * values[last]:5.1f} %")


def draw_curves(run):
    """Draw run/curves.png from run/metrics.jsonl: PANELS."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state, safe inside training
    rows = read_rows(Path(run) / "metrics.jsonl")
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS):
        if isinstance(names, str):
            beginning, found = names, set()
            for row in rows:
                found |= {name for name in row if name.startswith(beginning)}
            names = sorted(found)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                steps, values = zip(*points)
                marker = "o" if len(points) < 15 else None               # a line of one point shows nothing
                axes.plot(steps, values, label=name, marker=marker, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    partial = Path(run) / ".curves.partial.png"
    try:
        figure.savefig(partial, dpi=90)
        partial.rename(Path(run) / "curves.png")       # a viewer never sees half a picture
    finally:
        partial.unlink(missing_ok=True)


class RunLog:
    """Writes metrics.jsonl (one object a step), samples.jsonl, curves.png and report.html of a run, and hands
    all to its tracker. Every rank may hold one; only an `active` one writes."""

    def __init__(self, run, active, step, track="none", papers=None):
        """Rows after `step`, which a resumed run is about to write again, are cut off first. -1: all rows.
        track: a name of support.trackers. papers: the settings that the report compares the run's with."""
        self.run, self.active, self.step = Path(run), active, step
        self.track, self.papers, self.settings = track, papers or {}, None
        self.tracker = Tracker("none", self.run, {}, step)          # until it is known what is run
        self.drawn = time.monotonic()               # when curves were, by the clock; a first point shows none
        self.unshown = None                                         # (step, samples) since the last report
        if not active:
            return
        claim(self.run)
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = [row for row in read_rows(self.run / name) if row["step"] <= step]
            write_whole(self.run / name, "".join(map(json_line, rows)))

    def write_settings(self, settings):
        """Write `settings` to config.json, and begin tracking. If a resume has changed any, the file of
        before becomes config-until-STEP.json. An infinity, such as --grad_clip inf, becomes "inf"."""
        if not self.active:
            return
        for name, value in settings.items():
            if value == math.inf:
                settings = {**settings, name: "inf"}
        self.settings = json.dumps(settings, indent=2, allow_nan=False)
        file = self.run / "config.json"
        if self.step >= 0 and file.exists() and file.read_bytes() != self.settings.encode():
            file.replace(self.run / f"config-until-{self.step}.json")
        write_whole(file, self.settings)
        self.tracker = Tracker(self.track, self.run, settings, self.step)

    def amend(self, step, metrics):
        """Add to the row of `step`, the last one, what was not yet known when it was written."""
        if not self.active:
            return
        rows = read_rows(self.run / "metrics.jsonl")
        if not rows or rows[-1]["step"] != step:       # somebody has taken it out
            rows.append({"step": step})
        rows[-1].update(metrics)
        write_whole(self.run / "metrics.jsonl", "".join(map(json_line, rows)))
        self.tracker.log(step, metrics)
        self.unshown = (step, [])
        self._show()

    def write(self, metrics, samples=()):
        """Append one step; write the report after an evaluation, redraw the curves at most twice a minute."""
        if not self.active:
            return
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with self._open(name, metrics["step"]) as f:
                append_whole(f, "".join(map(json_line, rows)))
        self.tracker.log(metrics["step"], metrics)
        self.unshown = (metrics["step"], samples)
        if any(name.startswith("eval/") for name in metrics):
            self._show()
        elif time.monotonic() - self.drawn > 30:
            self._draw()

    def close(self):
        """Curves and report of all that was written; the tracker's end."""
        if not self.active:
            return
        if self.unshown:
            self._show()
        self.tracker.close()

    def _draw(self):
        try:
            draw_curves(self.run)
        except Exception as error:             # a picture (fonts, a full disk) is not worth a run of days
            warnings.warn(f"could not draw {self.run}/curves.png: {error}")
        self.drawn = time.monotonic()

    def _show(self):
        """Curves and report, and with the last step's samples to the tracker."""
        from support.report import write_report  # here: it imports this module
        self._draw()
        try:
            write_report(self.run, self.papers)
        except Exception as error:
            warnings.warn(f"could not write {self.run}/report.html: {error}")
        self.tracker.show(*self.unshown)
        self.unshown = None

    def _open(self, name, step):
        """A file of the run, to append to."""
        if not is_claimed(self.run):
            self._start_over(step)
        try:
            return (self.run / name).open("ab", buffering=0)
        except FileNotFoundError:                # the folder was moved since the look at it
            self._start_over(step)
            return (self.run / name).open("ab", buffering=0)

    def _start_over(self, step):
        """The folder was renamed or removed: say so, and go on in a new one of its name, where the next
        checkpoint will be. Raises ValueError if another run has taken that name."""
        warnings.warn(f"{self.run}: was moved or removed while its run goes on, which writes it anew, from "
                      f"step {step} on. What was written until now is where it was moved to")
        claim(self.run)
        if self.settings is not None:
            write_whole(self.run / "config.json", self.settings)
