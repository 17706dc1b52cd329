"""What grading costs: gradings a second, and CPU time for each, by one worker; of two versions in turn.

    OMP_NUM_THREADS=1 python bench/graders.py
    OMP_NUM_THREADS=1 python bench/graders.py --cases FILE.jsonl --against FOLDER

Each line of --cases has "response" and "gold"; without it, 200 answers of simple sorts, half of them wrong.
The other version is a folder with its reward.py and grading/. Each measurement is a process of its own,
A B A B; the median counts. CPU time is that of the worker and its children, without the start:
it depends less on what else the machine does than the clock does.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from support.intervals import positive

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from reward import Grader
kind, cases = sys.argv[2], json.load(sys.stdin)

def cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def grade(some):
    with Grader(kind, workers=1) as grader:
        grader.grade(["1"], ["1"])
        start = time.monotonic()
        grader.grade([case["response"] for case in some], [case["gold"] for case in some])
        return time.monotonic() - start

grade([])
start = cpu()                           # the CPU time of a worker that has graded nothing
seconds = grade(cases)
each = 1e3 * (cpu() - 2 * start) / len(cases)
print(json.dumps({"rate": len(cases) / seconds, "start_s": start, "ms": each}))
"""


def answers():
    """200 cases: fractions, roots, polynomials and tuples; every other one is wrong."""
    cases = []
    for i in range(50):
        wrong = i % 2
        for box, gold in [(rf"\frac{{{2 * i + 2}}}{{{4 + wrong}}}", rf"\frac{{{i + 1}}}{{2}}"),
                          (rf"{i + 2}\sqrt{{3}}", rf"\sqrt{{{3 * (i + 2) ** 2 + wrong}}}"),
                          (f"x^2+{i}x+{wrong}", f"x^2+{i}x"), (f"({i}, {wrong})", f"({i},0)")]:
            cases.append({"response": rf"so it is $\boxed{{{box}}}$.", "gold": gold})
    return cases


def measured(folder, kind, cases):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder), kind], input=json.dumps(cases),
                          text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", help="JSONL of response and gold")
    parser.add_argument("--against", help="folder of another version")
    parser.add_argument("--repeats", type=positive, default=3)
    args = parser.parse_args()
    cases = answers()
    if args.cases:
        cases = [json.loads(line) for line in Path(args.cases).read_text().split("\n") if line]
    folders = [ROOT] + ([args.against] if args.against else [])
    print(f"{len(cases)} cases, one worker, median of {args.repeats}")
    for kind in ("math-verify", "oat"):
        found = {folder: [] for folder in folders}
        for _ in range(args.repeats):
            for folder in folders:
                found[folder].append(measured(folder, kind, cases))
        for folder, results in found.items():
            median = {}
            for key in ("rate", "ms", "start_s"):
                median[key] = statistics.median(result[key] for result in results)
            print("{:12} {rate:6.0f} a second, {ms:6.2f} ms of CPU each, {start_s:.2f} s of CPU to start  {}"
                  .format(kind, folder, **median))


if __name__ == "__main__":
    main()
