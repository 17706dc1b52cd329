"""Two evaluations of the same problems: by how much B is better than A, how sure that is, and where.

    python eval.py --compare out/eval/BASE out/srft/eval         # two folders of results
    python -m paper.compare out/eval/BASE out/srft/eval          # the same, at once: nothing loads torch
    python eval.py --compare Qwen/Qwen2.5-Math-7B out/srft --rope_theta 40000 --window 16384
                                                                 # two models: evaluates both first

The two are paired: both answered the same problems, and a problem that is hard for one is mostly hard for the
other. So the difference is taken problem by problem, of the shares of its samples that are correct; its mean
is much surer than the two accuracies are (Miller 2024, https://arxiv.org/abs/2411.00640). Won are problems
where B's share is the higher one, lost where A's is.

compare.md and compare.json, in --out, hold the table and every problem that changed.
"""
import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paper.tables import Z, interval, percent, seen, table_row, title, views
from support.disk import read_json, write_whole
from support.flags import Parser
from support.results import read_results

SHOWN = 10             # changed problems of a benchmark on the screen; the files have all
# Of a settings.json: what the two may differ in without a word. All else may explain a difference.
OWN = {"model", "compare", "out", "weights", "benchmarks", "limit", "samples", "engine_memory",
       "engine_sequences", "grader_workers", "hang_minutes"}
# Of a model's config: what its engine does not depend on.
NO_SHAPE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
            "bos_token_id", "pad_token_id"}
OF_A_ROW = ("benchmark", "id", "sample", "prompt", "answer", "verdicts")            # of results.jsonl

# ----------------------------------------------------------------------------------------------------------
# The difference.


def tango(won, lost, n):
    """The 95 % interval of (won - lost) / n, the difference of two paired proportions: Tango's score interval
    (1998, Statistics in Medicine 17, 891), Wilson's for pairs. Without any pair that differs it is
    +- Z^2 / (n + Z^2), not 0.

    It holds every d from which the found difference is less than Z standard errors away, with the variance
    that is likeliest if d is true: 2 q + d - d^2, where q is the chance of a lost pair.

    >>> low, high = tango(1, 7, 21)
    >>> round(low, 3), round(high, 3)
    (-0.517, -0.026)
    """
    found = (won - lost) / n

    def inside(d):
        b = -won - lost + (2 * n - won + lost) * d
        q = (math.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n)
        return n * (found - d) ** 2 <= Z ** 2 * (2 * q + d - d * d)

    limits = []
    for end in (-1.0, 1.0):
        near, far = found, end                           # the limit lies between; halve until it is known
        for _ in range(50):
            middle = (near + far) / 2
            if inside(middle):
                near = middle
            else:
                far = middle
        limits.append(near)
    return limits


def paired_interval(differences):
    """The 95 % interval of the mean of one difference in [-1, 1] a problem, for problems of this kind.

    Tango's, where each is -1, 0 or 1. Differences of shares vary less, and count as more problems, as in
    `tables.interval`; here the variance is taken with one further problem, which is won or lost, with equal
    chances, in half of all cases. (Agresti and Min 2005, Statistics in Medicine 24, 729, add such problems,
    twice as many, to single answers.)
    """
    d = np.asarray(differences, np.float64)
    won, lost = d.clip(min=0).sum(), -d.clip(max=0).sum()
    n = len(d) + 1
    squared_mean = (d.sum() / n) ** 2
    as_pairs = (won + lost + 0.5) / n - squared_mean
    variance = ((d ** 2).sum() + 0.5) / n - squared_mean
    more = as_pairs / variance                           # 1, for -1, 0 and 1
    return tango(float(won * more), float(lost * more), float(len(d) * more))


# ----------------------------------------------------------------------------------------------------------
# Two folders of results.

@dataclass
class Results:
    """What eval.py has left in a folder."""
    folder: str
    settings: dict             # of settings.json; {} if there is none
    rows: dict                 # benchmark -> id -> sample -> row of results.jsonl, without its response


def has_results(folder):
    return (Path(folder) / "results.jsonl").exists()


def read(folder):
    """Results of a folder. Raises FileNotFoundError if it has none, ValueError if they are not eval.py's."""
    if not has_results(folder):
        raise FileNotFoundError(f"{folder}: expected a folder of results, with results.jsonl, as eval.py "
                                "--model writes it; eval.py --compare takes models, too")
    settings, file, found = Path(folder) / "settings.json", Path(folder) / "results.jsonl", {}
    for row in read_results(file):
        missing = [name for name in OF_A_ROW if name not in row]
        if missing:
            raise ValueError(f"{file}: expected rows of eval.py, found one without {', '.join(missing)}")
        row["response"] = None                           # the longest part of it
        problems = found.setdefault(row["benchmark"], {})
        problems.setdefault(row["id"], {})[row["sample"]] = row
    return Results(str(folder), read_json(settings) if settings.exists() else {}, found)


def compare(a, b):
    """Two Results -> what compare.json holds. Raises ValueError if they have nothing in common, or different
    problems under one id."""
    notes = other_settings(a.settings, b.settings)
    benchmarks = {}
    for name in [name for name in a.rows if name in b.rows]:
        ids, said = common_problems(name, a, b)
        notes += said
        if ids:
            benchmarks[name] = compare_benchmark(name, ids, a.rows[name], b.rows[name])
    for one, other, letter in ((a, b, "A"), (b, a, "B")):
        for name in [name for name in one.rows if name not in other.rows]:
            notes.append(f"{title(name)}: only {letter} has it")
    if not benchmarks:
        raise ValueError(f"{a.folder} and {b.folder} have no problem in common: "
                         f"{', '.join(a.rows) or 'none'} and {', '.join(b.rows) or 'none'}")
    return {"a": a.folder, "b": b.folder, "notes": notes, "benchmarks": benchmarks}


def other_settings(a, b):
    """What differs between two settings.json, one sentence each."""
    if not a or not b:
        return ["settings.json is missing: whether both were asked and graded alike is not known"]
    notes = []
    for name in sorted(a.keys() | b.keys()):
        one, other = a.get(name), b.get(name)
        if name in OWN or one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):        # versions
            keys = one.keys() | other.keys()
            if name == "hub":                            # each has its own model's name there
                keys = one.keys() & other.keys()
            for key in sorted(keys):
                if one.get(key) != other.get(key):
                    notes.append(f"{name}: {key} {one.get(key)} for A, {other.get(key)} for B")
        elif name == "grading":
            notes.append("the code that graded differs: eval.py --model, into a new --out, grades anew")
        else:
            notes.append(f"{name}: {one} for A, {other} for B")
    if a.get("weights") and a.get("weights") == b.get("weights"):
        notes.append("A and B are the same weights")
    return notes


def common_problems(name, a, b):
    """-> (ids of the problems of a benchmark that both have, with the same reference; what is to be said)."""
    one, other = a.rows[name], b.rows[name]
    ids, changed, notes = [], [], []
    for id in one:
        if id not in other:
            continue
        mine, theirs = (next(iter(rows[id].values())) for rows in (one, other))
        if mine["prompt"] != theirs["prompt"]:
            raise ValueError(f"{a.folder} and {b.folder} hold different problems under {name} {id}: evaluate "
                             "both on one file and, for multiple choice, with one --seed, which orders the "
                             "options")
        (ids if mine["answer"] == theirs["answer"] else changed).append(id)
    if changed:
        notes.append(f"{title(name)}: other reference answers, so left out: {', '.join(changed)}")
    for rows, others, letter in ((one, other, "A"), (other, one, "B")):
        left = len(rows.keys() - others.keys())
        if left:
            notes.append(f"{title(name)}: {left} problems that only {letter} has are left out")
        most = max(len(samples) for samples in rows.values())
        short = sum(len(samples) < most for samples in rows.values())
        if short:
            notes.append(f"{title(name)}: {letter} has fewer than {most} samples of {short} problems: its "
                         "evaluation has not ended")
    return ids, notes


def compare_benchmark(name, ids, one, other):
    """What compare.json holds of a benchmark. one, other: id -> sample -> row."""
    rows = []                                            # of each problem: A's, B's
    for id in ids:
        rows.append((list(one[id].values()), list(other[id].values())))
    found = {"problems": len(ids), "samples": [len(rows[0][0]), len(rows[0][1])]}
    mine, theirs = (graded_by(part) for part in zip(*rows))
    common = [view for view in mine if view in theirs]
    if not common:
        raise ValueError(f"{name}: A was graded by {', '.join(mine)}, B by {', '.join(theirs)}: evaluate "
                         "both with one --grader")
    for view in common:
        shares = []
        for samples_a, samples_b in rows:
            shares.append([share(samples_a, view), share(samples_b, view)])
        found[view] = figures(ids, np.array(shares), [samples[0]["prompt"] for samples, _ in rows])
    return found


def graded_by(problems):
    """`tables.views` of one evaluation's problems, each a list of rows."""
    rows, kinds = [], {}                                 # a dictionary keeps the order
    for samples in problems:
        for row in samples:
            rows.append(row)
            kinds |= dict.fromkeys(row["verdicts"])
    return views(rows, [kind for kind in kinds if kind not in ("choice", "oat/repaired")])


def share(samples, view):
    """The share of a problem's responses that are correct."""
    return float(np.mean([seen(row, view)["reward"] for row in samples]))


def figures(ids, shares, prompts):
    """shares: (P, 2), A's and B's of each problem."""
    differences = shares[:, 1] - shares[:, 0]
    changed = []
    for place in np.argsort(-abs(differences), kind="stable"):
        if differences[place]:
            changed.append({"id": ids[place], "a": shares[place, 0], "b": shares[place, 1],
                            "problem": prompts[place]})
    return {"a": float(shares[:, 0].mean()), "a/interval": interval(shares[:, 0]),
            "b": float(shares[:, 1].mean()), "b/interval": interval(shares[:, 1]),
            "difference": float(differences.mean()), "difference/interval": paired_interval(differences),
            "won": [one for one in changed if one["b"] > one["a"]],
            "lost": [one for one in changed if one["b"] < one["a"]]}


# ----------------------------------------------------------------------------------------------------------
# In words.

LEGEND = (
    "In brackets: 95 % intervals, for problems of this kind; they hold the samples' noise. That of B - A is "
    "of the differences problem by problem. Of twenty such intervals one misses, so one benchmark of many "
    "that just leaves 0 out proves little.")


def markdown(found, most=None):
    """compare.md; with `most`, the screen's shorter form: so many changed problems, and of one view each."""
    lines = [f"A: {found['a']}", "", f"B: {found['b']}", ""]
    heads = ["benchmark", "problems", "samples", "graded by", "A %", "B %", "B - A", "won", "lost", ""]
    lines += [table_row(heads), "|---" * len(heads) + "|"]
    for name, one in found["benchmarks"].items():
        for view in ways_of(one):
            lines.append(table_row(cells(name, one, view)))
    lines += ["", LEGEND]
    if found["notes"]:
        lines += ["", "Not alike, or not compared:", ""]
    for note in found["notes"]:
        lines.append(f"* {note}")
    for name, one in found["benchmarks"].items():
        for view in ways_of(one)[:1 if most else None]:
            lines += changes(f"{title(name)} ({view})", one[view], most)
    return "\n".join(lines) + "\n"


def ways_of(one):
    return [view for view in one if view not in ("problems", "samples")]


def cells(name, one, view):
    """A row of the table."""
    part = one[view]
    low, high = part["difference/interval"]
    says = "cannot tell"
    if low > 0 or high < 0:
        says = "B is better" if low > 0 else "A is better"
    difference = f"{100 * part['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    samples = "{} / {}".format(*one["samples"])
    return [title(name), str(one["problems"]), samples, view, percent(part, "a"), percent(part, "b"),
            difference, str(len(part["won"])), str(len(part["lost"])), says]


def changes(heading, part, most):
    """The problems of a benchmark that changed, the largest changes first."""
    lines = []
    for what in ("won", "lost"):
        every = part[what]
        if not every:
            continue
        lines += ["", f"{heading}: {len(every)} {what}", ""]
        lines += [table_row(["id", "A", "B", "problem"]), "|---" * 4 + "|"]
        for one in every[:most]:
            text = " ".join(one["problem"].split()).replace("|", "\\|")
            lines.append(table_row([str(one["id"]).replace("|", "\\|"), f"{one['a']:.2f}", f"{one['b']:.2f}",
                                    text[:80] + ("..." if len(text) > 80 else "")]))
        if most and len(every) > most:
            lines += ["", f"... and {len(every) - most} more in compare.md"]
    return lines


def report(a, b, out):
    """Compare two folders of results; compare.md and compare.json in `out`, a shorter form on the screen."""
    found = compare(read(a), read(b))
    out = Path(out or f"out/compare/{short(a)}-{short(b)}")
    write_whole(out / "compare.md", markdown(found))
    write_whole(out / "compare.json", json.dumps(found, indent=2))
    print(f"\n{markdown(found, SHOWN)}\n{out}: compare.md, compare.json")


def short(path):
    """The name of a run, model or folder of results: its last part but for the hf/ or eval/ of a run."""
    parts = [part for part in Path(path).resolve().parts if part not in ("hf", "eval")]
    return parts[-1]


# ----------------------------------------------------------------------------------------------------------
# eval.py --compare.

def of_both(args, measure):
    """args: eval.py's flags, measure: its function. Evaluates what is a model, and compares. A collective."""
    parts = []
    template = args.template or common_template(args.compare)
    for letter, model in zip("ab", args.compare):
        out = f"{args.out}/{letter}" if args.out else None
        parts.append(argparse.Namespace(**vars(args) | {"model": model, "out": out, "template": template}))
    for part in parts:
        if has_results(part.model):
            part.out = part.model
    models = [part for part in parts if part.out != part.model]
    if models:
        measure(models)                                  # fills in --out, where it was not given
    if os.environ.get("RANK", "0") == "0":
        report(parts[0].out, parts[1].out, args.out)


def common_template(models):
    """The template of the run, or of the results, that is compared with a model which has none of its own: a
    base model is asked as what was trained from it. None where there is no such pair."""
    found = []
    for model in models:
        for file in (Path(model) / "settings.json", Path(model) / "config.json"):
            settings = read_json(file) if file.exists() else {}
            if "template" in settings:
                found.append(settings["template"])
                break
    return found[0] if len(found) == 1 else None


def check_pair(jobs):
    """Raise ValueError unless one engine can serve both of eval.py's jobs, into two folders."""
    one, other = jobs
    a, b = one.args.model, other.args.model
    if one.args.out == other.args.out:
        raise ValueError(f"--compare {a} {b}: both write to {one.args.out}; pass --out DIR")
    configs = [job.config.to_dict() | {"eos of the tokenizer": job.tokenizer.eos_token_id} for job in jobs]
    differ = []
    for name in sorted(configs[0].keys() | configs[1].keys()):
        if name not in NO_SHAPE and configs[0].get(name) != configs[1].get(name):
            differ.append(name)
    if differ:
        raise ValueError(f"--compare {a} {b}: one engine cannot serve both, for they differ in "
                         f"{', '.join(differ)}. Evaluate each by itself, with your other flags: eval.py "
                         f"--model {a} --out DIR/a; eval.py --model {b} --out DIR/b. Then: eval.py --compare "
                         "DIR/a DIR/b")


def main(argv=None):
    parser = Parser(prog="python -m paper.compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="folder of results, of eval.py")
    parser.add_argument("b", metavar="B", help="another one, whose gain over A is wanted")
    parser.add_argument("--out", metavar="DIR", help="folder of compare.md and compare.json; default: "
                        "out/compare/A-B")
    args = parser.parse_args(argv)
    try:
        report(args.a, args.b, args.out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
