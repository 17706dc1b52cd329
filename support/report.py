"""report.html of a run's folder: what was run, held-out accuracy, its curves, and samples by step.

    write_report("out/run", papers)              # from config.json, metrics.jsonl and samples.jsonl there

One page that needs nothing else: it opens from a disk without network, and can be sent to somebody. Its
layout and its script are report.html, beside this file. Models and data wrote the text in it, so that all of
it is escaped; the samples are JSON, which a browser does not run, and which the script shows as text; and the
page's policy lets a browser run that one script, known by its hash, and fetch nothing.

To copy: this file with report.html, support/runlog.py and support/disk.py, and SECTIONS named anew. It needs
matplotlib.
"""
import base64
import hashlib
import html
import json
import math
import operator
import re
from collections import Counter
from pathlib import Path

from support.disk import amount, read_json, write_whole
from support.runlog import read_rows

PAGE = Path(__file__).with_name("report.html")
MOST_BYTES = 5_000_000         # of samples: evenly over the steps
FEWEST_STEPS = 20              # with samples, of however many bytes
MOST_POINTS = 600              # of a curve
# Heading; its charts: a title and its metrics, or the beginning of the names of metrics, each with its own
# chart. What no section has comes in a last one.
SECTIONS = [
    ("Rollouts", [
        ("reward: mean of rollouts, of demonstrations", ["reward/mean", "reward/demo_mean"]),
        ("prompts all right, all wrong", ["reward/all_correct", "reward/all_wrong"]),
        ("response length, tokens", ["response_len/mean", "response_len/max"]),
        ("share cut off", ["response_len/truncated"]),
        ("entropy, nats a token", ["entropy/rollout", "entropy/demo"])]),
    ("Loss terms of Eq. 13, and the weights of Eq. 8 and 12", ["loss/", "w_"]),
    ("Gradient and learning rate", ["grad_norm", "lr", "steps_skipped"]),
    ("Held-out sets: length and entropy", ["eval_len/", "eval_entropy/"]),
    ("Engine against trainer", [
        ("difference of log p, nats", ["engine/logp_diff_mean", "engine/logp_diff_rank"]),
        "engine/", "tis/"]),
    ("Grading", ["grader/", "perf/grader_ms"]),
    ("Time and memory", [
        ("seconds", ["time/step", "time/rollout", "time/grade", "time/train", "time/sync"]), "perf/"]),
]
NOT_COMPARED = {"out", "resume"}        # settings that are each run's own


def write_report(run, papers):
    """Write run/report.html. papers: the settings to compare the run's with. Raises ValueError where the
    folder has no row of metrics."""
    run = Path(run)
    rows = read_rows(run / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run}: no metrics.jsonl with a row; expected a run's folder")
    settings = settings_of(run)
    samples, left_out = read_samples(run / "samples.jsonl")
    page = PAGE.read_text()
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": html.escape(run.resolve().name), "subtitle": html.escape(subtitle(settings, rows)),
        "facts": facts(settings, papers), "accuracy": accuracy(rows), "curves": curves(rows),
        "left_out": html.escape(left_out),
        # In a script element only "<" can end it, or begin what a browser reads as something else.
        "samples": json.dumps(samples).replace("<", "\\u003c")}

    def part(found):
        return parts[found[1]]

    page = re.sub(r"{{(\w+)}}", part, page)          # one pass: what is put in is not looked at again
    # A path may hold bytes that are no text.
    write_whole(run / "report.html", page.encode("utf-8", "backslashreplace").decode())


# ----------------------------------------------------------------------------------------------------------
# What was run.

def settings_of(run):
    """What config.json of a run's folder holds; {} without one."""
    file = Path(run) / "config.json"
    settings = read_json(file) if file.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected an object, found {str(settings)[:80]}")
    return settings


def subtitle(settings, rows):
    """One line: method, model, how far."""
    done, steps = rows[-1]["step"], settings.get("steps")
    far = f"{done} of {steps} steps" if steps else f"{done} steps"
    return f"{settings.get('method', 'run')} on {settings.get('model', 'a model')}, {far}"


def facts(settings, papers):
    """Tables: where it ran, what differs from `papers`, and all settings, to be unfolded."""
    if not settings:
        return "<p>config.json is not there.</p>"
    shown = [[name, settings[name]] for name in ("model", "data", "eval_data") if name in settings]
    for name in ("ranks", "machine", "git_commit", "python"):
        if name in settings:
            shown.append([name.replace("_", " "), settings[name]])
    for name, version in settings.get("versions", {}).items():
        shown.append([name, version])
    differing = []
    for name, value in papers.items():
        if name not in NOT_COMPARED and settings.get(name, value) != value:
            differing.append([f"--{name}", settings[name], value])
    everything = table(["setting", "value"], sorted([name, value] for name, value in settings.items()))
    differences = "<p>Nothing.</p>"
    if differing:
        differences = table(["flag", "here", "paper"], differing)
    return (f'<div class="two"><div>{table(["", ""], shown)}</div>'
            f"<div><h3>What differs from the paper's run of this method</h3>{differences}</div></div>"
            f"<details><summary>All settings</summary>{everything}</details>")


def table(head, rows):
    """An HTML table of texts."""
    lines = []
    if any(head):
        cells = "".join(f"<th scope=\"col\">{html.escape(name)}</th>" for name in head)
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    for first, *others in rows:
        cells = "".join(f"<td>{html.escape(text_of(value))}</td>" for value in others)
        lines.append(f"<tr><th scope=\"row\">{html.escape(str(first))}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def text_of(value):
    """A setting as a person reads it."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# ----------------------------------------------------------------------------------------------------------
# What was measured.

def points_of(rows, name):
    """[(step, value)] of a metric, where it is a number."""
    found = []
    for row in rows:
        value = row.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((row["step"], value))
    return found


def names_of(rows):
    """All metrics, sorted by name."""
    found = set()
    for row in rows:
        found |= row.keys()
    return sorted(found - {"step"})


def accuracy(rows):
    """A table of the first, the best and the last evaluation of each held-out set, and their curves."""
    of_sets, lines = {}, []
    for name in names_of(rows):
        points = points_of(rows, name)
        if name.startswith("eval/") and points:
            label = name.removeprefix("eval/")
            of_sets[label] = points
            best = max(points, key=lambda point: point[1])
            lines.append([label, *[f"{100 * value:.1f} % (step {step})"
                                   for step, value in (points[0], best, points[-1])]])
    if not of_sets:
        return "<p>No evaluation yet; --eval_data names the sets.</p>"
    found = table(["set", "first", "best", "last"], lines)
    return f'<div class="two"><div>{found}</div>{chart("accuracy", of_sets)}</div>'


def curves(rows):
    """The charts of SECTIONS. Metrics that are 0 throughout are named, and not drawn."""
    left, parts, zero = [], [], []
    for name in names_of(rows):
        points = points_of(rows, name)
        if name.startswith("eval/") or not points:
            continue
        if any(value for _, value in points):
            left.append(name)
        else:
            zero.append(name)
    for heading, wanted in [*SECTIONS, ("Others", [""])]:
        drawn = []
        for item in wanted:
            if isinstance(item, str):
                groups = [(name, [name]) for name in left if name.startswith(item)]
            else:
                title, names = item
                groups = [(title, [name for name in names if name in left])]
            for title, names in groups:
                if names:
                    drawn.append(chart(title, {name: points_of(rows, name) for name in names}))
                    left = [name for name in left if name not in names]
        if drawn:
            parts.append(f"<h3>{html.escape(heading)}</h3>{charts(drawn)}")
    if zero:
        parts.append(f'<p class="soft">0 at every step: {html.escape(", ".join(zero))}.</p>')
    return "".join(parts)


def charts(drawn):
    return f'<div class="charts">{"".join(drawn)}</div>'


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 52, 10, 8, 24        # a chart and its margins


def chart(title, of_names):
    """A line chart as SVG. of_names: name -> [(step, value)], at least one."""
    from matplotlib.ticker import MaxNLocator
    points = [point for curve in of_names.values() for point in curve]
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    ticks = MaxNLocator(4).tick_values(low, high)                       # round numbers, around all values
    low, high = ticks[0], ticks[-1]

    def x_of(step):
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y_of(value):
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts, keys = [], []
    for value in ticks:
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for step in MaxNLocator(4, integer=True).tick_values(first, last):
        if first <= step <= last:
            parts.append(f'<text x="{x_of(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
                         f"{step:.0f}</text>")
    for number, (name, curve) in enumerate(of_names.items()):
        colour = f"c{number % 6}"
        places = [f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in thinned(curve)]
        parts.append(f'<polyline class="{colour}" points="{" ".join(places)}"/>')
        if len(curve) < 15:                                             # a line of one point shows nothing
            for place in places:
                x, y = place.split(",")
                parts.append(f'<circle class="{colour}" cx="{x}" cy="{y}" r="2.5"/>')
        ends = f"{short(curve[0][1])} \u2192 {short(curve[-1][1])}"
        shown = ends if name == title else f"{name} {ends}"
        keys.append(f'<span class="key"><i class="{colour}"></i>{html.escape(shown)}</span> ')
    label = html.escape(title)
    return (f"<figure><figcaption><b>{label}</b>{''.join(keys)}</figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
            "</figure>")


def short(value):
    """
    >>> short(0.08344), short(3203.4), short(12345.6), short(3e-7)
    ('0.0834', '3,203', '12,346', '3e-07')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thinned(points):
    """At most MOST_POINTS of a curve: the lowest and the highest of each stretch, so no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    found, stretch = [], math.ceil(2 * len(points) / MOST_POINTS)
    for start in range(0, len(points), stretch):
        part = sorted(points[start:start + stretch], key=lambda point: point[1])
        found += sorted([part[0], part[-1]])
    return found


# ----------------------------------------------------------------------------------------------------------
# Samples.

def read_samples(file):
    """samples.jsonl -> ([{"step", "rows"}], a sentence on what is left out). Its lines are read one by one,
    and only those that are shown are kept: they may be more than fits in memory."""
    if not file.exists():
        return [], "There are none."
    sizes, counts = Counter(), Counter()                                # step -> bytes, rows
    for row, size in rows_of(file):
        sizes[row["step"]] += size
        counts[row["step"]] += 1
    steps = sorted(sizes)
    number = len(steps)
    while number > FEWEST_STEPS and sum(sizes[step] for step in spread(steps, number)) > MOST_BYTES:
        number = max(FEWEST_STEPS, number * 9 // 10)
    kept = set(spread(steps, number))
    total = sum(sizes[step] for step in kept)
    room = dict.fromkeys(kept, math.inf)
    if total > MOST_BYTES:
        room = dict.fromkeys(kept, MOST_BYTES // len(kept))             # its bytes, of each step
    rows = {step: [] for step in sorted(kept)}
    for row, size in rows_of(file):
        step = row["step"]
        if step in kept and (not rows[step] or room[step] >= size):
            rows[step].append(row)
            room[step] -= size
    shown, all_rows = sum(map(len, rows.values())), sum(counts.values())
    sentence = f"{shown} samples of {len(rows)} steps."
    if shown < all_rows:
        sentence = (f"{shown} of {all_rows} samples, of {len(rows)} of {len(steps)} steps: this page holds "
                    f"about {amount(MOST_BYTES)} of them, evenly over the run. The others are in "
                    "samples.jsonl.")
    return [{"step": step, "rows": found} for step, found in rows.items()], sentence


def rows_of(file):
    """(row, its bytes) of each line that is a row of a step."""
    def none(_):
        """nan and infinity, which older versions wrote: JSON does not have them."""

    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line, parse_constant=none)
                operator.index(row["step"])
            except (ValueError, TypeError, KeyError, RecursionError):   # cut short by a kill, or by a hand
                continue
            yield row, len(line)


def spread(steps, number):
    """`number` of the steps, evenly, with the first and the last."""
    if number >= len(steps):
        return steps
    return [steps[round(i * (len(steps) - 1) / (number - 1))] for i in range(number)]
