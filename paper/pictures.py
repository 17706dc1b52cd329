"""How the figures look: pictures by matplotlib, and the page of Fig. 2(a). What they show is measured in
paper/figures.py and read in paper/curves.py.
"""
import html
import textwrap

import numpy as np

COLOURS = {"up": (33, 102, 172), "down": (178, 24, 43)}          # more, and less probable than before


def new_figure(width, height):
    """An empty figure, in inches. No pyplot: no display, no global state."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def rectangle(*args, **kwargs):
    from matplotlib.patches import Rectangle
    return Rectangle(*args, **kwargs)


def save_figure(figure, file):
    figure.savefig(file, dpi=110)


# ----------------------------------------------------------------------------------------------------------
# Fig. 2(a), A1: one response as a heat map.

def share(base, tuned, more_than):
    """The share of tokens whose probability changed by more than `more_than`. base, tuned: log p of each."""
    if not len(base):
        return 0.0
    return float(np.mean(np.abs(np.exp(tuned) - np.exp(base)) > more_than))


def changes(base, tuned, scale):
    """(change of each token, the widest of the colour scale) of log probs, by --scale."""
    if scale == "probability":
        return np.exp(tuned) - np.exp(base), 1.0
    return tuned - base, max(1.0, float(np.abs(tuned - base).max()))


def colour(change, widest):
    """rgba of a change in [-widest, widest]: blue for up, red for down, the darker the larger."""
    r, g, b = COLOURS["up" if change > 0 else "down"]
    return r, g, b, min(1.0, abs(change) / widest)


def css(change, widest):
    """The same as a style: the background, and letters that can be read on it."""
    r, g, b, alpha = colour(change, widest)
    return f"background:rgba({r},{g},{b},{alpha:.3f});color:{'#fff' if alpha > 0.6 else '#111'}"


def heatmap(tokens, base, tuned, scale, title):
    """A self-contained HTML page: the response's tokens, coloured by how their probability changed.

    tokens: list of str; base, tuned: log p of each under the two models; scale: "probability" or "log".
    """
    change, widest = changes(base, tuned, scale)
    spans = []
    for i, token in enumerate(tokens):
        # A model wrote this text: it must reach the page as text. A newline and nothing at all get a sign.
        shown = html.escape(token).replace("\n", "\u21b5\n") or "\u2205"
        hint = f"{html.escape(repr(token))}: base {np.exp(base[i]):.4f}, tuned {np.exp(tuned[i]):.4f}"
        spans.append(f'<span style="{css(change[i], widest)}" title="{hint}">{shown}</span>')
    unit = "p_tuned - p_base" if scale == "probability" else "log p_tuned - log p_base, nats"
    legend = []                                            # the scale, by a few of its colours
    for part in (-1, -0.5, -0.1, 0.1, 0.5, 1):
        style = f"{css(part * widest, widest)};padding:0 .8em"
        legend.append(f'<span style="{style}">{part * widest:+.2g}</span>')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body{{font:16px/1.7 ui-monospace,monospace;max-width:60em;margin:2em auto;padding:0 1em}}
body{{color:#111;background:#fff}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;font:inherit}}
pre span{{border-radius:2px}} p{{font-family:sans-serif}}
</style>
</head><body><h1 style="font:600 1.2em sans-serif">{html.escape(title)}</h1>
<p>Colour: {unit}, from {"".join(legend)}. Point at a token for its two probabilities.
Changed by more than 0.1: {share(base, tuned, 0.1):.1%} of {len(tokens)} tokens;
by more than 0.5: {share(base, tuned, 0.5):.1%}.</p>
<pre>{"".join(spans)}</pre></body></html>
"""


def draw_heatmap(file, tokens, base, tuned, scale, title):
    """The same as a picture, of its first 60 lines."""
    change, widest = changes(base, tuned, scale)
    lines = wrapped(tokens, change)[:60]
    columns = max([48, *map(width, lines)])
    figure = new_figure(0.12 * columns, 0.6 + 0.26 * len(lines))
    axes = figure.subplots()
    axes.set(xlim=(0, columns + 1), ylim=(len(lines), 0), title=title)         # a unit a letter; y goes down
    axes.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for token, token_change in line:
            *rgb, alpha = colour(token_change, widest)
            ground = [part / 255 for part in rgb] + [alpha]
            axes.add_patch(rectangle((x, y), len(token), 0.92, color=ground, linewidth=0))
            ink = "white" if alpha > 0.6 else "black"
            for k, letter in enumerate(token):
                # To matplotlib, text between two $ is a formula.
                axes.text(x + k + 0.5, y + 0.5, letter.replace("$", r"\$"), family="monospace", fontsize=9,
                          ha="center", va="center", color=ink)
            x += len(token)
    save_figure(figure, file)


def wrapped(tokens, change):
    """Tokens with their changes -> lines, each a list of (token, change), broken at newlines and before the
    91st letter."""
    lines, line = [], []
    for token, token_change in zip(tokens, change):
        if width(line) + len(token) > 90:
            lines.append(line)
            line = []
        line.append((token.replace("\n", "\u21b5"), token_change))
        if "\n" in token:
            lines.append(line)
            line = []
    lines.append(line)
    return lines


def width(line):
    """Letters of a line of (token, change)."""
    return sum(len(token) for token, _ in line)


# ----------------------------------------------------------------------------------------------------------
# Fig. 2(b), Fig. 3, and curves.

def draw_distributions(file, found, sources):
    """Fig. 2(b): the changes as histograms, one for each tuned model. sources: whose responses they are."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for label, row in found.items():
        over = (f"{row['changed by more than 0.1']:.1%} over 0.1, "
                f"{row['changed by more than 0.5']:.1%} over 0.5")
        axes.stairs(row["share of each bin"], row["edges"], label=f"{label}: {over}")
    # Most tokens hardly change: without a logarithm, the middle bin is all that one sees.
    axes.set(yscale="log", xlabel="p_tuned - p_base of a response's token", ylabel="share of tokens")
    axes.set_title(textwrap.fill(", ".join(sources), 80), fontsize=9)
    axes.legend()
    save_figure(figure, file)


def draw_trajectories(file, found):
    """The space of the three distances, and its three sides. A star is where a run ends."""
    figure = new_figure(12, 9)
    plots = [(figure.add_subplot(2, 2, 1, projection="3d"), (0, 1, 2))]
    for number, pair in enumerate([(0, 1), (0, 2), (1, 2)], 2):
        plots.append((figure.add_subplot(2, 2, number), pair))
    for axes, dimensions in plots:
        for label, path in found["runs"].items():
            points = np.array([point["distances"] for point in path])[:, dimensions]
            axes.plot(*points.T, marker="o", markersize=3, label=label)
            axes.plot(*points[-1:].T, marker="*", markersize=11, color=axes.lines[-1].get_color())
        for axis, dimension in zip("xyz", dimensions):
            axes.set(**{f"{axis}label": f"distance to {found['references'][dimension]}"})
    space, _ = plots[0]
    space.legend()
    save_figure(figure, file)


def draw_curves(file, panels):
    """panels: {title: {label: curve}}, a subplot for each."""
    figure = new_figure(4.6 * len(panels), 4)
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (label, curve) in enumerate(panels[title].items()):      # one colour a label in all panels
            if curve["step"]:
                axes.plot(curve["step"], curve["mean"], color=f"C{i}", marker="o", markersize=3, label=label)
                axes.fill_between(curve["step"], curve["least"], curve["most"], alpha=0.15, color=f"C{i}")
        axes.set_xlabel("step")
        axes.set_title(textwrap.fill(title, 50), fontsize=10)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    save_figure(figure, file)
