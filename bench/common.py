"""What the benches share: medians of alternating runs, peak memory, a table on the terminal, a JSON file with
the machine.

Memory is the kernel's own count (VmHWM, reset through /proc/self/clear_refs) on CPU, and torch's on a GPU.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                    # `python bench/x.py` finds the project's files

import torch  # noqa: E402

from support.device import choose_device  # noqa: E402
from support.intervals import number_in  # noqa: E402
from support.versions import environment  # noqa: E402


def parser(doc, name):
    """An ArgumentParser with what every bench takes: --out, --device, --threads."""
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default=f"out/bench/{name}.json",
                   help="JSON file: all figures, versions, machine [%(default)s]")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                   help="auto: the GPU if torch is built for one, and an error if it cannot be used; "
                   "else the CPU [%(default)s]")
    p.add_argument("--threads", type=number_in(int, "[1, 4096]"), default=1,
                   help="threads of this process [%(default)s]")
    return p


def start(args, writes_a_file=True):
    """Fix threads and seed; call it first. Returns the device of the bench. writes_a_file: else --out is a
    folder."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)                    # now, not after what is to be measured
    if writes_a_file and out.is_dir():
        sys.exit(f"--out {out}: expected a file, found a folder")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return choose_device(args.device)


def machine(device):
    """Versions, commit and hardware: environment() of the project, the CPU's name, cores, memory."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", info)
    found = environment(device)
    found["cpu"] = name[1] if name else platform.processor()
    found["cores"] = len(os.sched_getaffinity(0))
    found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return found


def clock(device=None):
    """Seconds, after the device has finished what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def work_clock(device=None):
    """Seconds of processor time of this process, which other programs disturb less than they do clock(); on a
    GPU, clock()."""
    return clock(device) if device is not None and device.type == "cuda" else time.process_time()


class PeakMemory:
    """`with PeakMemory(device) as m: ...` -> m.gb, the most this process held at once inside, above what it
    held before (m.before_gb). Resident memory on CPU, allocated on a GPU."""

    def __init__(self, device=None):
        self.cuda = device is not None and device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before_gb = torch.cuda.memory_allocated() / 1e9
        else:
            Path("/proc/self/clear_refs").write_text("5")           # the peak starts again from here
            self.before_gb = resident("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else resident("VmHWM")
        self.gb = peak - self.before_gb


def resident(what, process="self"):
    """GB from /proc/PROCESS/status: "VmRSS", resident now, or "VmHWM", the most so far."""
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) * 1024 / 1e9


def on_ranks(world, file, *arguments):
    """What rank 0 of `python file --worker OUT arguments`, run in `world` processes, saves to OUT.
    Large tensors have maps of their own, so that freed memory leaves."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.pt"
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
        command = [*torchrun, f"--nproc_per_node={world}", file, "--worker", out, *arguments]
        if subprocess.run(command, env=env, timeout=600).returncode:
            raise RuntimeError(f"a rank of {world} failed; its error stands above")
        return torch.load(out)


def alternate(a, b, pairs):
    """Call a() and b() in turn, `pairs` times each -> (median of a, median of b, median of the ratios b/a).

    Both return what they took. Noise that lasts longer than a pair hits both, and every other pair begins
    with b."""
    of_a, of_b, ratios = [], [], []
    for pair in range(pairs):
        if pair % 2 == 0:
            of_a.append(a())
            of_b.append(b())
        else:
            of_b.append(b())
            of_a.append(a())
        ratios.append(of_b[-1] / of_a[-1])
    return statistics.median(of_a), statistics.median(of_b), statistics.median(ratios)


def table(header, rows):
    """A Markdown table, so that it can go to docs/benchmarks.md as it is."""
    def text(x):
        return f"{x:.3g}" if isinstance(x, float) else str(x)

    cells = [[text(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        lines.append("| " + " | ".join(x.ljust(w) for x, w in zip(row, widths)) + " |")
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def show(title, header, rows):
    """Print a title and a table."""
    print(f"\n{title}\n\n{table(header, rows)}", flush=True)


def save(args, results):
    """Write results, the flags and the machine to args.out."""
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"flags": vars(args), "machine": machine(choose_device(args.device)),
                                "results": results}, indent=1) + "\n")
    print(f"\nwrote {path}")
