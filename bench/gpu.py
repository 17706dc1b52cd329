"""The CUDA path on one GPU: does each piece of it work, is it right, what does it cost?

    python bench/gpu.py --out DIR                     # all parts; at most 20 minutes, 13 expected on an H100
    python bench/gpu.py kernels trainer --out DIR     # these alone; the first four need no vLLM
    python bench/gpu.py table --out DIR               # gpu.md anew, from JSON files gathered in DIR

  kernels     packed attention against fp32, products with fp32 output, head and KL against float64
  trainer     packed against separate forwards, memory against the plan, synchronisations
  mfu         forward and backward at two sizes of micro-batch, with recomputation and without
  offload     one update with --offload beside the same one without
  end-to-end  srft.py --preset tiny, then --resume, then eval.py
  engine      start, log-probs beside the trainer's, twice sleep, update, sync and the same tokens again
  warm        start once more, in another process: what the compile cache saves
  decode      tokens a second
  one-gpu     two steps of srft.py --preset one_gpu, on random weights of its 1.5B model's shape

No hub and no weights on disk: random weights in the widths of Qwen2.5-7B, 4 layers deep, and in the shape
of Qwen2.5-0.5B, whose head is tied; end-to-end trains tiny/. With --device cpu the same parts run on small
shapes and CPU kernels: that proves this script, and nothing of CUDA.

Each part has a time limit and processes of its own (bench/gpu_parts.py). Every row goes to DIR/PART.json and
DIR/gpu.md as soon as it is known, so whatever is killed keeps what it had. A check that fails is a row FAIL,
the rest goes on, and the exit code is 1.
"""
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import common

from support.device import choose_device
from support.disk import write_whole


@dataclass(frozen=True)
class Part:
    seconds: float                # limit of all its tasks together
    tasks: tuple                  # functions of gpu_parts.py; a process each, as one can hold one engine
    vllm: bool = False            # imports it before its time begins


PARTS = {
    "kernels": Part(60, ("kernels",)),
    "trainer": Part(90, ("trained",)),
    "mfu": Part(60, ("mfu",)),
    "offload": Part(90, ("offload",)),
    "end-to-end": Part(240, ("end_to_end",)),
    "engine": Part(210, ("wide_engine", "tied_engine"), vllm=True),
    "warm": Part(60, ("warm",), vllm=True),
    "decode": Part(60, ("decode",), vllm=True),
    "one-gpu": Part(300, ("one_gpu",))}


# ----------------------------------------------------------------------------------------------------------
# Rows.

class Report:
    """The rows of one part. Each is in DIR/PART.json and DIR/gpu.md from the moment it is known."""

    def __init__(self, folder, part, machine=None):
        self.folder, self.part = Path(folder), part
        self.folder.mkdir(parents=True, exist_ok=True)         # a log may come before the first row
        self.path = self.folder / f"{part}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {"machine": None, "rows": []}
        self.rows, self.machine = known["rows"], machine or known["machine"]

    def add(self, what, found, expected="", ok=None, **numbers):
        """One row. ok: True, False, or None for a figure of which nothing is expected."""
        self.rows.append({"what": what, "found": found, "expected": expected, "ok": ok} | numbers)
        content = {"part": self.part, "machine": self.machine, "rows": self.rows}
        write_whole(self.path, json.dumps(content, indent=1))
        write_whole(self.folder / "gpu.md", markdown(self.folder))
        beside = f" ({expected})" if expected else ""
        print(f"{self.part:<12}{verdict(ok):<6}{what}: {found}{beside}", flush=True)

    def below(self, what, error, limit, **numbers):
        """A row that is right if error < limit; nan is not."""
        self.add(what, f"{error:.2g}", f"below {limit:g}", bool(error < limit), number=error, **numbers)

    @contextmanager
    def attempt(self, what):
        """An exception inside becomes a row FAIL, and what follows goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            message = " ".join(str(error).split())
            self.add(what, f"{type(error).__name__}: {message[:300]}", ok=False)

    def number(self, part, what):
        """What another part measured in this folder; None if it did not, or failed to."""
        rows = Report(self.folder, part).rows
        return next((row.get("number") for row in rows if row["what"] == what), None)


def verdict(ok):
    return {True: "ok", False: "FAIL", None: "-"}[ok]


def markdown(folder):
    """The machines and the table of all parts whose JSON files lie in `folder`, in the order of PARTS."""
    files = [Path(folder) / f"{part}.json" for part in PARTS]
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = []
    for part in parts:
        for row in part["rows"]:
            found = row["found"].replace("|", "/")             # it would begin another column
            rows.append([part["part"], row["what"], found, row["expected"], verdict(row["ok"])])
    machines = sorted({describe(part["machine"]) for part in parts if part["machine"]})
    return "\n".join([*machines, "", common.table(["part", "what", "found", "expected", ""], rows), ""])


def describe(machine):
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = machine["git_commit"] or "unknown"
    hardware = machine["gpu"] or machine["cpu"]
    return f"{hardware}; Python {machine['python']}, {versions}; commit {commit[:10]}."


def gpu(device):
    """Name, driver, memory of the card; None on a CPU."""
    if device.type == "cpu":
        return None
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, check=True, text=True, capture_output=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return torch.cuda.get_device_name(device)


# ----------------------------------------------------------------------------------------------------------
# Processes.

def start_worker(args, name, task):
    """The process of one task. It imports its libraries and then waits for a line."""
    command = [sys.executable, __file__, name, "--task", task, "--out", args.out, "--device", args.device,
               "--threads", str(args.threads)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, process_group=0)


def work(args):
    """Be the process of args.task."""
    import gpu_parts
    name, = args.parts
    if PARTS[name].vllm:
        from vllm import LLM  # noqa: F401
    if not sys.stdin.readline():                                       # who started this is gone
        return
    device = common.start(args, writes_a_file=False)
    report = Report(args.out, name, common.machine(device) | {"gpu": gpu(device)})
    with report.attempt(args.task):
        getattr(gpu_parts, args.task)(report, device)
    sys.stdout.flush()
    os._exit(0)           # the GPU's memory goes with the process; an engine that failed may keep its threads


def supervise(folder, names, start, patience=1):
    """Run the tasks of these parts in turn; True if nothing failed. start(part, task): a process that waits.

    Each is started when the one before it begins to work: importing torch and vLLM takes as long as some
    parts do. patience: how many times a part's seconds it may take.
    """
    queue = [(name, task) for name in names for task in PARTS[name].tasks]
    left = {name: patience * PARTS[name].seconds for name in names}
    working, ahead = None, start(*queue[0])
    try:
        for i, (name, task) in enumerate(queue):
            working, ahead = ahead, None
            print(f"\n{name} ({task}): at most {left[name]:.0f} s", flush=True)
            began = time.monotonic()
            with suppress(BrokenPipeError):                            # it has ended; wait says how
                working.stdin.write("go\n")
                working.stdin.flush()
            if i + 1 < len(queue):
                ahead = start(*queue[i + 1])
            error = wait(working, left[name])
            took = time.monotonic() - began
            Report(folder, name).add(f"process of `{task}`", error or f"{took:.0f} s",
                                     f"at most {left[name]:.0f} s", False if error else None, seconds=took)
            left[name] -= took
    finally:
        for process in filter(None, (working, ahead)):
            end(process)
    return not any(row["ok"] is False for name in names for row in Report(folder, name).rows)


def wait(process, seconds):
    """What went wrong with it; None if nothing did."""
    try:
        code = process.wait(timeout=max(0, seconds))
    except subprocess.TimeoutExpired:
        end(process)
        time.sleep(5)                          # a GPU takes seconds to free the memory of what was killed
        return f"stopped after {max(0, seconds):.0f} s"
    return f"ended with exit code {code}" if code else None


def end(process):
    """End it and all that it has started, whatever they are doing."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(BrokenPipeError):                                    # "go" may still wait in its buffer
        process.stdin.close()


def main(argv=None):
    p = common.parser(__doc__, "gpu")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or table [all parts]")
    p.add_argument("--task", help="internal: be the process of this task")
    p.set_defaults(out="out/bench/gpu", threads=len(os.sched_getaffinity(0)))
    args = p.parse_args(argv)
    if unknown := set(args.parts) - {*PARTS, "table"}:
        p.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}, table")
    if args.task:
        return work(args)
    folder, names = Path(args.out), [name for name in args.parts or PARTS if name != "table"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))      # by way of supervise: workers, too
    fine = True
    if names:
        patience = 1 if choose_device(args.device).type == "cuda" else 5
        for name in names:
            (folder / f"{name}.json").unlink(missing_ok=True)          # of an earlier call
        fine = supervise(folder, names, partial(start_worker, args), patience)
    text = markdown(folder)
    write_whole(folder / "gpu.md", text)
    print(f"\n{text}\nwrote {folder}/gpu.md")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
