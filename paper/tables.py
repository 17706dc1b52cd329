"""From graded responses to figures: avg@n, pass@k, standard errors, and the table beside the paper's Table 2.

    estimate([[1, 0], [1, 1]])      # 2 samples to each of 2 problems
    # {"accuracy": 0.75, "stderr": 0.25, "stderr_samples": 0.25, "pass@2": 1.0, "pass@2/stderr": 0.0}
"""
from collections import Counter

import numpy as np

from paper.benchmarks import BENCHMARKS


def pass_at_k(correct, n, k):
    """The unbiased estimate of P(one of k samples is correct) from `correct` of n: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, Eq. 1, https://arxiv.org/abs/2107.03374), as a product that cannot overflow."""
    return 1.0 - float(np.prod([(n - correct - i) / (n - i) for i in range(k)]))


def estimate(rewards):
    """(P, n) rewards of n samples to each of P problems -> accuracy, pass@k and their standard errors.

    accuracy        avg@n: the mean of all rewards
    stderr          of accuracy as an estimate for problems of this kind: standard deviation of the
                    problems' means / sqrt(P). It holds the samples' noise, too. None if P = 1
    stderr_samples  of accuracy on exactly these problems: sqrt(sum_i p_i (1 - p_i) / (n - 1)) / P, the
                    noise of sampling alone. None if n = 1
    pass@k, pass@k/stderr   for k = 2, 4, 8, ... up to n
    """
    rewards = np.asarray(rewards, np.float64)
    problems, n = rewards.shape
    spread = lambda values: float(np.std(values, ddof=1) / np.sqrt(problems)) if problems > 1 else None
    share = rewards.mean(1)
    found = {"accuracy": float(share.mean()), "stderr": spread(share), "stderr_samples":
             float(np.sqrt((share * (1 - share)).sum() / (n - 1)) / problems) if n > 1 else None}
    for k in [2 ** i for i in range(1, n.bit_length())]:
        passed = [pass_at_k(correct, n, k) for correct in rewards.sum(1)]
        found |= {f"pass@{k}": float(np.mean(passed)), f"pass@{k}/stderr": spread(passed)}
    return found


def verdict(row, kind):
    """A row's verdict in the view of one verifier; multiple choice has one for both."""
    return row["verdicts"].get("choice") or row["verdicts"][kind]


# ----------------------------------------------------------------------------------------------------------
# The tables.

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
TABLE_A1 = {            # the base model with other templates, in the order of columns that is printed there
    "none": (30.2, 13.2, 59.6, 42.4, 13.4),
    "qwen-math": (14.4, 8.8, 44.6, 30.3, 11.1),
    "paper": (29.6, 16.5, 64.8, 44.8, 14.1),
}
GROUPS = {"Avg. of the five": COLUMNS[:5], "Avg. of the three": COLUMNS[5:]}   # in-, out-of-distribution


def summarize(rows, kinds):
    """Rows of results.jsonl (benchmark -> list, each with samples 0..n-1 of every problem) -> for each
    benchmark its estimates by each verifier, truncated share, mean length, and counts of verdicts."""
    summary = {}
    for name, part in rows.items():
        part = sorted(part, key=lambda row: (row["id"], row["sample"]))
        n = 1 + part[-1]["sample"]
        views = list(kinds) + ["oat/repaired"] * any("oat/repaired" in row["verdicts"] for row in part)
        by = {view: [row["verdicts"].get(view) or verdict(row, kinds[0]) for row in part] for view in views}
        summary[name] = {
            "problems": len(part) // n, "samples": n,
            "truncated": float(np.mean([not row["finished"] for row in part])),
            "response_len": float(np.mean([row["tokens"] for row in part])),
        } | {view: estimate(np.reshape([v["reward"] for v in vs], (-1, n)))
             | {"reasons": dict(Counter(v["reason"] for v in vs))} for view, vs in by.items()}
    return summary


def percent(estimates, name="accuracy"):
    error = estimates["stderr" if name == "accuracy" else f"{name}/stderr"]
    return f"{100 * estimates[name]:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def markdown(summary, label, kinds, notes, text="after_think", template="paper"):
    """The summary as Markdown: beside Table 2, then in detail, then every departure from the protocol."""
    shown = [name for name in COLUMNS if name in summary] + [n for n in summary if n not in COLUMNS]
    groups = {title: names for title, names in GROUPS.items() if all(name in summary for name in names)}
    title = lambda name: BENCHMARKS[name].title if name in BENCHMARKS else name
    lines = ["| model | " + " | ".join([*map(title, shown), *groups]) + " |",
             "|---" * (1 + len(shown) + len(groups)) + "|"]
    for kind in kinds:
        cells = [percent(summary[name][kind]) for name in shown]
        cells += [f"{100 * np.mean([summary[name][kind]['accuracy'] for name in names]):.1f}"
                  for names in groups.values()]
        lines.append(f"| **{label}** ({kind}) | " + " | ".join(cells) + " |")
    rows = {f"{model} (paper)": figures for model, figures in TABLE_2.items()}
    if template in ("none", "qwen-math"):
        rows = {f"Qwen2.5-Math, --template {name} (paper, Table A1)": TABLE_A1[name]
                for name in (template, "paper")} | rows
    for model, figures in rows.items() if set(shown) & set(COLUMNS) else ():
        paper = dict(zip(COLUMNS, figures))
        cells = [f"{paper[name]:.1f}" if name in paper else "" for name in shown]
        cells += [f"{np.mean([paper[name] for name in names]):.1f}" if names[0] in paper else ""
                  for names in groups.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += ["", "| benchmark | problems | metric | verifier | % | pass@n % | truncated % | tokens | "
              "verdicts |", "|---" * 9 + "|"]
    for name in shown:
        one = summary[name]
        n, best = one["samples"], f"pass@{2 ** (one['samples'].bit_length() - 1)}"
        for view in [view for view in (*kinds, "oat/repaired") if view in one]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(one[view]["reasons"].items()))
            lines.append(
                f"| {title(name)} | {one['problems']} | {f'avg@{n}' if n > 1 else 'pass@1'} | {view} | "
                f"{percent(one[view])} | {best + ': ' + percent(one[view], best) if n > 1 else ''} | "
                f"{100 * one['truncated']:.1f} | {one['response_len']:.0f} | {reasons} |")
    lines += ["", "± is the standard error over problems, the samples' noise included. Graded was " + {
        "whole": "all of a response.", "after_think": "what follows the last </think>, or all without one.",
        "require_think": "what follows the last </think>."}[text] + " math-verify is the reward of training: "
        "Math-Verify with its known slips repaired (grading/answers.py)."]
    if "amc23" in summary:
        lines[-1] += " The paper gives SRFT's AMC as 74.3 in Table 2, as 72.2 in Table 3."
    if any(name in summary for name in COLUMNS[5:]):
        lines[-1] += " Multiple choice is graded by its letter, whatever the verifier."
    if any("oat/repaired" in one for one in summary.values()):
        lines[-1] += (" oat/repaired also accepts references such as 4.5e33 written as LaTeX; the paper's "
                      "figure is probably plain oat's.")
    lines += ["", "Not as in the paper:", ""] * bool(notes) + [f"* {note}" for note in notes]
    return "\n".join(lines) + "\n"


def departures(args, summary):
    """What keeps these figures from the paper's protocol (Sec. 5.1, App. B), one sentence each."""
    notes = [f"--{name} {getattr(args, name)}, the paper: {paper}" for name, paper in
             (("temperature", 0.6), ("max_tokens", 8192), ("template", "paper"))
             if getattr(args, name) != paper]
    notes += [f"--{name} {getattr(args, name)}; the paper is silent, public code: {public}" for name, public
              in (("top_p", 1.0), ("score_unfinished", True)) if getattr(args, name) != public]
    if not args.strict_box:
        notes.append("--no-strict_box: Math-Verify took its answer from all of the text")
    for name, one in summary.items():
        expected = BENCHMARKS.get(name)
        if expected and one["problems"] != expected.count:
            notes.append(f"{expected.title}: {one['problems']} problems, the paper: {expected.count}")
        if expected and one["samples"] != expected.samples:
            notes.append(f"{expected.title}: {one['samples']} samples a problem, the paper: "
                         f"{expected.samples}")
    if "gsm8k" in summary:
        notes.append("GSM8K is not a benchmark of the paper")
    return notes + (["no verdict of the OAT-Grader"] if args.grader == "math-verify" else [])
