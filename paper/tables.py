"""From graded responses to figures: avg@n, pass@k, intervals, and the table beside the paper's Table 2.

    estimate([[1, 0], [1, 1]])      # 2 samples to each of 2 problems: accuracy 0.75, pass@2 1.0, ...
    interval([0] * 20)              # none of 20: [0.0, 0.16], not 0 +- 0

    summary = summarize({"math500": rows of results.jsonl, ...}, ["oat", "math-verify"])
    print(markdown(summary, "out/srft", ["oat", "math-verify"], departures(args, summary)))
"""
import json
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np

from paper.benchmarks import BENCHMARKS
from support.disk import write_whole

# ----------------------------------------------------------------------------------------------------------
# Estimates.


def pass_at_k(correct, n, k):
    """The unbiased estimate of P(one of k samples is correct) from `correct` of n: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, Eq. 1, https://arxiv.org/abs/2107.03374), as a product that cannot overflow.

    C(n-c, k) / C(n, k) is the chance that k samples drawn from the n are all wrong: the i-th is, after i
    wrong ones, with chance (n - c - i) / (n - i).

    >>> pass_at_k(1, 4, 2)
    0.5
    """
    all_wrong = np.prod([(n - correct - i) / (n - i) for i in range(k)])
    return 1.0 - float(all_wrong)


Z = NormalDist().inv_cdf(0.975)              # 1.96: 95 % of a normal distribution lie within Z deviations


def wilson(share, n):
    """The 95 % interval of a share of n: Wilson's (1927, https://doi.org/10.1080/01621459.1927.10502953).

    It holds every p from which the share is less than Z standard errors away, each by its own p: so it is
    never of width 0, as share +- Z sqrt(share (1 - share) / n) is for 0 and 1, and never leaves [0, 1].

    >>> low, high = wilson(81 / 263, 263)
    >>> round(low, 4), round(high, 4)
    (0.2553, 0.3662)
    """
    center = (share + Z ** 2 / (2 * n)) / (1 + Z ** 2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2) / (1 + Z ** 2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def interval(values):
    """The 95 % interval of the mean of one value in [0, 1] a problem, for problems of this kind.

    Wilson's, where each value is 0 or 1. The shares of several samples vary less, so they count as more
    problems: as many as would have the variance of their mean, were each 0 or 1. (Surveys call that the
    effective sample size: Korn and Graubard 1998, Survey Methodology 24.) The variance is taken with
    Z^2 / 2 = 1.9 further problems of value 0 and as many of 1, which are the ones that Wilson's centre has
    (Agresti and Coull 1998): that equal values have none says little of the problems that were not asked.
    """
    values = np.asarray(values, np.float64)
    more = Z ** 2 / 2
    n = len(values) + 2 * more
    mean = (values.sum() + more) / n
    variance = ((values ** 2).sum() + more) / n - mean ** 2
    effective = len(values) * mean * (1 - mean) / variance           # len(values), for zeros and ones
    return list(wilson(float(values.mean()), float(effective)))


def estimate(rewards):
    """(P, n) rewards of n samples to each of P problems -> accuracy, pass@k and how sure they are.

    accuracy        avg@n: the mean of all rewards
    stderr          of accuracy as an estimate for problems of this kind: standard deviation of the
                    problems' means / sqrt(P). It holds the samples' noise, too. None if P = 1
    stderr_samples  of accuracy on exactly these problems: sqrt(sum_i p_i (1 - p_i) / (n - 1)) / P, the
                    noise of sampling alone. None if n = 1
    pass@k          for k = 2, 4, 8, ... up to n
    accuracy/interval, pass@k/interval   of each as an estimate for problems of this kind: `interval`
    """
    rewards = np.asarray(rewards, np.float64)
    problems, n = rewards.shape
    share = rewards.mean(1)                                # (P,): p_i, of each problem's samples
    found = {"accuracy": float(share.mean()), "accuracy/interval": interval(share),
             "stderr": None, "stderr_samples": None}
    if problems > 1:
        found["stderr"] = float(np.std(share, ddof=1) / np.sqrt(problems))
    if n > 1:
        # n zeros and ones with mean p have the unbiased variance p (1 - p) n / (n - 1), their mean an n-th.
        variance = (share * (1 - share)).sum() / (n - 1)
        found["stderr_samples"] = float(np.sqrt(variance) / problems)
    k = 2
    while k <= n:
        passed = [pass_at_k(correct, n, k) for correct in rewards.sum(1)]
        found[f"pass@{k}"] = float(np.mean(passed))
        found[f"pass@{k}/interval"] = interval(passed)
        k *= 2
    return found


# ----------------------------------------------------------------------------------------------------------
# Verdicts, and their sums.

def verdict(row, kind):
    """A row's verdict in the view of one verifier; multiple choice has one for both."""
    return row["verdicts"].get(kind) or row["verdicts"]["choice"]


def views(rows, kinds):
    """The names under which a benchmark's figures are shown: the verifiers (kinds), "choice" where each row
    was graded by its letter instead, and, where a row has it, "oat/repaired"."""
    names = set()
    for row in rows:
        names |= row["verdicts"].keys()
    shown = [kind for kind in kinds if kind in names]
    if "choice" in names and not names & {"oat", "math-verify"}:
        shown.append("choice")
    if "oat/repaired" in names:
        shown.append("oat/repaired")
    return shown


def seen(row, view):
    """A row's verdict in one of `views`: where the reference needed no repair, or a problem among others is
    multiple choice, that of the verifier or the letter."""
    return row["verdicts"].get(view) or verdict(row, view.removesuffix("/repaired"))


def summarize(rows, kinds):
    """Rows of results.jsonl (benchmark -> list, each with samples 0..n-1 of every problem) -> for each
    benchmark its estimates by each verifier, truncated share, mean length, and counts of verdicts. "strict"
    is the accuracy if an answer must also be worked out, and be the one that its box states.

    kinds: the verifiers, the first of which counts for the paper's table. "oat/repaired", where a row of the
    benchmark has it, is a view of its own: OAT's verdict by either spelling of the reference. Multiple choice
    has the view "choice" alone.
    """
    summary = {}
    for name, part in rows.items():
        # Problem by problem, so that rewards in this order are a (P, n) matrix.
        part = sorted(part, key=lambda row: (row["id"], row["sample"]))
        n = part[-1]["sample"] + 1                         # every problem has samples 0 to n - 1
        one = {"problems": len(part) // n, "samples": n,
               "truncated": float(np.mean([not row["finished"] for row in part])),
               "response_len": float(np.mean([row["tokens"] for row in part]))}
        for view in views(part, kinds):
            rewards, strict, reasons = [], [], Counter()
            for row in part:
                found = seen(row, view)
                rewards.append(found["reward"])
                strict.append(found["reward"] and not found.get("fault"))     # a letter has no faults
                reasons[found["reason"]] += 1
            one[view] = estimate(np.reshape(rewards, (-1, n)))
            one[view]["strict"] = float(np.mean(strict))
            one[view]["reasons"] = dict(reasons)
        summary[name] = one
    return summary


# ----------------------------------------------------------------------------------------------------------
# What the paper printed.

# Table 2, of which only rows that its authors measured themselves; App. B says which.
COLUMNS = ("aime24", "amc23", "math500", "minerva", "olympiad", "arc_c", "gpqa", "mmlu_pro")
TABLE_2 = {
    "Qwen2.5-Math": (11.4, 32.6, 48.8, 8.7, 15.8, 18.2, 11.1, 16.9),
    "SFT": (31.1, 62.8, 85.2, 39.1, 53.3, 76.2, 25.8, 45.7),
    "SFT_KL": (13.0, 45.2, 70.2, 26.5, 36.3, 33.3, 22.2, 30.4),
    "RL_GRPO": (24.7, 61.6, 79.2, 33.7, 47.1, 75.6, 31.3, 42.1),
    "SFT -> RL": (32.5, 67.1, 84.2, 34.1, 54.6, 76.4, 37.9, 49.6),
    "LUFFY": (29.4, 65.6, 87.6, 37.5, 57.2, 80.5, 39.9, 53.0),
    "ReLIFT": (28.2, 64.8, 85.0, 37.1, 54.9, 74.9, 40.9, 51.9),
    "SRFT": (35.3, 74.3, 89.8, 39.7, 58.3, 85.3, 46.4, 55.9),
}
TABLE_A1 = {            # the base model with other templates, as printed: in the reverse of its heading
    "none": (30.2, 13.2, 59.6, 42.4, 13.4),
    "qwen-math": (14.4, 8.8, 44.6, 30.3, 11.1),
    "paper": (29.6, 16.5, 64.8, 44.8, 14.1),
}
GROUPS = {"Avg. of the five": COLUMNS[:5], "Avg. of the three": COLUMNS[5:]}   # in-, out-of-distribution


# ----------------------------------------------------------------------------------------------------------
# Markdown.

def markdown(summary, label, kinds, notes, text="after_think", template="paper"):
    """The summary as Markdown: beside Table 2, then in detail, then every departure from the protocol.

    label: the model's name in the table. notes: what `departures` returns. text, template: as eval.py's
    --grade_text and --template were.
    """
    shown = [name for name in COLUMNS if name in summary]           # the paper's in its order, then one's own
    shown += [name for name in summary if name not in COLUMNS]
    lines = beside_table_2(summary, shown, label, kinds, template)
    lines.append("")
    lines += detail(summary, shown, kinds)
    lines.append("")
    lines.append(footnote(summary, text))
    if notes:
        lines += ["", "Not as in the paper:", ""]
    for note in notes:
        lines.append(f"* {note}")
    return "\n".join(lines) + "\n"


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def title(name):
    """Of a benchmark: its heading in Table 2, or the name of one's own file."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def percent(estimates, name="accuracy"):
    """A share with its 95 % interval, in percent: "59.5 [55.2, 63.7]"."""
    low, high = estimates[f"{name}/interval"]
    return f"{100 * estimates[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def beside_table_2(summary, shown, label, kinds, template):
    """Lines of a table: this model by each verifier and, for multiple choice, by the letter, then the paper's
    rows. A column for each benchmark in `shown`, and an average of each of GROUPS all of whose benchmarks
    were measured."""
    groups = [group for group in GROUPS if all(name in summary for name in GROUPS[group])]
    heads = ["model"]
    for name in shown:
        heads.append(title(name))
    heads += groups
    lines = [table_row(heads), "|---" * len(heads) + "|"]

    # This model: a row for each way of grading, with empty cells under what was graded in another one.
    for view in (*kinds, "choice"):
        graded = [name for name in shown if view in summary[name]]
        if not graded:
            continue
        cells = [f"**{label}** ({view})"]
        for name in shown:
            cells.append(percent(summary[name][view]) if name in graded else "")
        for group in groups:
            whole = set(GROUPS[group]) <= set(graded)
            cells.append(f"{100 * average(summary, group, view):.1f}" if whole else "")
        lines.append(table_row(cells))

    # The paper's rows, with empty cells under one's own problems; none if there are no others.
    if not set(shown) & set(COLUMNS):
        return lines
    for model, figures in paper_rows(template).items():
        paper = dict(zip(COLUMNS, figures))                  # Table A1 has the first five only
        cells = [model]
        for name in shown:
            cells.append(f"{paper[name]:.1f}" if name in paper else "")
        for group in groups:
            names = GROUPS[group]
            known = names[0] in paper
            cells.append(f"{np.mean([paper[name] for name in names]):.1f}" if known else "")
        lines.append(table_row(cells))
    return lines


def average(summary, group, view):
    return np.mean([summary[name][view]["accuracy"] for name in GROUPS[group]])


def paper_rows(template):
    """{name of a row: its figures in the order of COLUMNS}: Table 2 and, for another template than the
    paper's, what Table A1 has of that one and of the paper's."""
    rows = {}
    if template in ("none", "qwen-math"):
        for name in (template, "paper"):
            rows[f"Qwen2.5-Math, --template {name} (paper, Table A1)"] = TABLE_A1[name]
    for model, figures in TABLE_2.items():
        rows[f"{model} (paper)"] = figures
    return rows


def detail(summary, shown, kinds):
    """Lines of a table with a row for each benchmark and way of grading."""
    heads = ["benchmark", "problems", "metric", "graded by", "%", "strict %", "pass@n %", "truncated %",
             "tokens", "verdicts"]
    lines = [table_row(heads), "|---" * len(heads) + "|"]
    for name in shown:
        one = summary[name]
        n = one["samples"]
        for view in (*kinds, "oat/repaired", "choice"):
            if view not in one:
                continue
            metric, passed = "pass@1", ""
            if n > 1:
                most = 2 ** (n.bit_length() - 1)             # the largest k that `estimate` has
                metric = f"avg@{n}"
                passed = f"pass@{most}: " + percent(one[view], f"pass@{most}")
            reasons = [f"{count} {reason}" for reason, count in sorted(one[view]["reasons"].items())]
            lines.append(table_row([
                title(name), str(one["problems"]), metric, view, percent(one[view]),
                f"{100 * one[view]['strict']:.1f}", passed, f"{100 * one['truncated']:.1f}",
                f"{one['response_len']:.0f}", ", ".join(reasons)]))
    return lines


GRADED = {"whole": "all of a response.",
          "after_think": "what follows the last </think>, or all without one.",
          "require_think": "what follows the last </think>."}


def footnote(summary, text):
    """How to read the two tables."""
    said = ("In brackets: the 95 % interval, for problems of this kind; it holds the samples' noise. "
            f"Graded was {GRADED[text]} "
            "math-verify is the reward of training: Math-Verify with its known slips repaired "
            "(grading/answers.py). % counts what a verifier finds equal; strict %, as the reward of training "
            "does, only what is also worked out as far as the reference, and the one answer that its box "
            "states (grading/statement.py).")
    if "amc23" in summary:
        said += " The paper gives SRFT's AMC as 74.3 in Table 2, as 72.2 in Table 3."
    if any("choice" in one for one in summary.values()):
        said += " choice: multiple choice, graded by its letter and by no verifier."
    if any("oat/repaired" in one for one in summary.values()):
        said += (" oat/repaired also accepts references such as 4.5e33 written as LaTeX; the paper's "
                 "figure is probably plain oat's.")
    return said


def departures(args, summary):
    """What keeps these figures from the paper's protocol (Sec. 5.1, App. B), one sentence each.

    args: eval.py's flags. summary: of `summarize`.
    """
    own = f"--reward {args.reward}: that function gave the verdicts of its name"
    notes = [own] if args.reward else []
    for name, paper in {"temperature": 0.6, "max_tokens": 8192, "template": "paper"}.items():
        if getattr(args, name) != paper:
            notes.append(f"--{name} {getattr(args, name)}, the paper: {paper}")
    for name, public in {"top_p": 1.0, "score_unfinished": True}.items():
        if getattr(args, name) != public:
            notes.append(f"--{name} {getattr(args, name)}; the paper is silent, public code: {public}")
    if not args.strict_box:
        notes.append("--no-strict_box: Math-Verify took its answer from all of the text")
    for name, one in summary.items():
        if name not in BENCHMARKS:
            continue
        expected = BENCHMARKS[name]
        if one["problems"] != expected.count:
            notes.append(f"{expected.title}: {one['problems']} problems, the paper: {expected.count}")
        if one["samples"] != expected.samples:
            notes.append(f"{expected.title}: {one['samples']} samples a problem, the paper: "
                         f"{expected.samples}")
    if "gsm8k" in summary:
        notes.append("GSM8K is not a benchmark of the paper")
    if args.grader == "math-verify":
        notes.append("no verdict of the OAT-Grader")
    return notes


# ----------------------------------------------------------------------------------------------------------
# The files.

def write_summary(args, results, kinds):
    """summary.md and summary.json in --out, from all rows of results.jsonl that count, benchmark by benchmark
    in the order of --benchmarks; prints the table. args: eval.py's flags."""
    rows = {}
    for row in results:
        rows.setdefault(row["benchmark"], []).append(row)
    summary = summarize(rows, kinds)
    notes = departures(args, summary)
    table = markdown(summary, args.model, kinds, notes, args.grade_text, args.template)
    write_whole(Path(args.out) / "summary.md", table)
    write_whole(Path(args.out) / "summary.json", json.dumps(summary, indent=2))
    print(f"\n{table}\n{args.out}: summary.md, summary.json, results.jsonl")
