"""A run's folder: metrics.jsonl, samples.jsonl and curves.png, written while it trains.

    log = RunLog("out/run", active=rank == 0, step=50)        # resumed at step 50: later rows are cut off
    log.write({"step": 51, "reward/mean": 0.4}, samples=[{"step": 51, "response": "..."}])
    rows = read_rows("out/run/metrics.jsonl")

One JSON object a line, so that a run of days is a file which any tool reads while it grows, and which a kill
spoils by one line at most. curves.png has the panels of Fig. 6.

To copy: this file, with PANELS named anew. It needs matplotlib; tensorboard is used where it is installed.
"""
import json
import time
import warnings
from pathlib import Path

PANELS = [                     # title; metrics drawn in it, or how all of them begin
    ("reward (Fig. 6a)", ["reward/mean", "reward/demo_mean"]),
    ("response length, tokens (Fig. 6b)", ["response_len/mean"]),
    ("entropy, nats (Fig. 6c)", ["entropy/rollout", "entropy/demo"]),
    ("weights of Eq. 8 and 12", ["w_sft", "w_rl"]),
    ("loss terms of Eq. 13", "loss/"),
    ("held-out accuracy", "eval/"),
]


def read_rows(file):
    """The rows of a .jsonl file, none if there is no file; a last line that a kill
    cut short is left out. Raises ValueError for any other that is not JSON."""
    if not Path(file).exists():
        return []
    rows, lines = [], Path(file).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{file}: line {number} of {len(lines)} is not JSON") from None
    return rows


def write_whole(path, text):
    """Write a file at once: no reader, and no kill, sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")        # beside it: a rename is whole only within a file system
    new.write_text(text)
    new.replace(path)


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
    figure.savefig(partial, dpi=90)
    partial.rename(Path(run) / "curves.png")       # a viewer never sees half a picture


class RunLog:
    """Writes metrics.jsonl (one object a step), samples.jsonl and curves.png of a run, and TensorBoard
    events where tensorboard is installed. Every rank may hold one; only an `active` one writes."""

    def __init__(self, run, active, step):
        """Rows after `step`, which a resumed run is about to write again, are cut off first. -1: all rows."""
        self.run, self.active, self.drawn, self.board = Path(run), active, 0.0, None
        self.step = step
        if not active:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = [row for row in read_rows(self.run / name) if row["step"] <= step]
            write_whole(self.run / name, "".join(json.dumps(row) + "\n" for row in rows))
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.run, purge_step=step + 1)
        except ImportError:
            pass

    def write_settings(self, settings):
        """config.json: `settings`. What held until now, if a resume has changed any, becomes
        config-until-STEP.json."""
        if not self.active:
            return
        file, text = self.run / "config.json", json.dumps(settings, indent=2)
        if self.step >= 0 and file.read_text() != text:
            file.replace(self.run / f"config-until-{self.step}.json")
        write_whole(file, text)             # a kill must not leave half of it: a resume reads it

    def amend(self, metrics):
        """Add to the last row what was not yet known when it was written."""
        rows = read_rows(self.run / "metrics.jsonl")
        if self.active and rows:
            rows[-1].update(metrics)
            write_whole(self.run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, metrics, samples=(), last=False):
        """Append one step; redraw the curves at most twice a minute, and at the `last` step."""
        if not self.active:
            return
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with (self.run / name).open("a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        if self.board:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, metrics["step"])
        if last and self.board:
            self.board.close()
        if last or time.monotonic() - self.drawn > 30:
            try:
                draw_curves(self.run)
            except Exception as error:         # a picture (fonts, a full disk) is not worth a run of days
                warnings.warn(f"could not draw {self.run}/curves.png: {error}")
            self.drawn = time.monotonic()

