"""Random faults on the tiny run: whatever happens to it, resuming it ends in the same bytes.

    python -m bench.faults --minutes 60 --seed 0      # counts the faults; exits with 1 if anything is wrong

Two ranks on a CPU under torchrun, started with --resume again and again into one folder, until the run is
done. At random moments something happens to them: KINDS. Then metrics, samples and weights are compared, byte
for byte but for the clock's metrics, with those of a run that nothing disturbed, and a new folder begins. All
processes must end by themselves within minutes of a fault, or go on, and leave none behind. No whole
checkpoint may be lost but the one that the fault itself spoilt.

The seed draws kinds, moments and victims. What a run is doing at a moment is the machine's: the same seed
repeats the faults, not the lines that they hit.

Disk full: as root, the run's folder is a file system of its own (tmpfs, 64 MB), filled to the last byte.
Without root, the ranks may write files of 1 kB at most (RLIMIT_FSIZE), an error of the same kind.
"""
import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil  # which vLLM brings

from support.checkpoint import newest_checkpoint
from support.intervals import number_in

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 3
RUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--local_addr=127.0.0.1",
       "--nproc_per_node=2", "srft.py", "--preset", "tiny", "--device", "cpu", "--resume", "--steps", "24",
       "--prompts_per_step", "4", "--n_rollouts", "4", "--save_every", str(SAVE_EVERY), "--eval_every", "8",
       "--data", "tiny:few", "--eval_data", "tiny:few", "--engine_sequences", "64", "--grader_workers", "1",
       "--hang_minutes", "0.5"]
PATIENCE_S, GRACE_S = 750, 15     # a rank that is stopped before it has joined is missed after 10 minutes


class Job:
    """One start of the run: torchrun, two ranks and their graders."""

    def __init__(self, out, log):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.out = out
        self.torchrun = psutil.Popen([*RUN, "--out", str(out)], cwd=ROOT, env=environment, stdout=log,
                                     stderr=subprocess.STDOUT)
        self.seen = set()

    def processes(self, script=""):
        """Those that run now, with `script` in their command line; the launcher's names it too."""
        found = []
        try:
            self.seen |= {self.torchrun, *self.torchrun.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass
        for process in sorted(self.seen, key=lambda process: process.pid):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and script in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
        return found

    def send(self, processes, number=signal.SIGKILL):
        """Send a signal to those that are still there."""
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass

    def a_rank(self, dice):
        """One of them, in a list; none before they are there."""
        ranks = [process for process in self.processes("srft.py") if process.pid != self.torchrun.pid]
        return [dice.choice(ranks)] if ranks else []

    def ends(self, seconds):
        """Does torchrun end within so many seconds?"""
        deadline = time.monotonic() + seconds
        while self.torchrun.poll() is None and time.monotonic() < deadline:
            self.processes()
            time.sleep(0.2)
        return self.torchrun.poll() is not None

    def leaves_behind(self):
        """The processes that are still there when torchrun has ended, and then killed."""
        deadline = time.monotonic() + GRACE_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = self.processes()
        self.send(left)
        return left


# The faults. Each does something to a job, and may return what went wrong at once.

def start_twice(job, dice):
    """The same command once more: it must be refused while the first is at work."""
    with tempfile.TemporaryFile() as log:
        second = Job(job.out, log)
        ended = second.ends(PATIENCE_S)
        # If the first is done by then, the second has found a finished run, and ends well.
        if not ended or second.torchrun.returncode == 0 and job.torchrun.poll() is None:
            second.send(second.processes())
            return "was not refused"
        return second.leaves_behind() and "the second left processes behind"


def fill_disk(job, dice):
    """Leave no room: fill the disk of its own or, without root, limit the size of files."""
    disk = job.out.parent
    if os.path.ismount(disk):
        with (disk / "ballast").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:                              # no room is left
                pass
    else:
        for process in job.processes("srft.py"):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, 1024))
    ended = job.ends(PATIENCE_S)
    (disk / "ballast").unlink(missing_ok=True)
    return None if ended else "still there after minutes"


def truncate_checkpoint(job, dice):
    """Kill all, and cut a file of the newest checkpoint short."""
    job.send(job.processes())
    job.ends(PATIENCE_S)
    checkpoints = sorted((job.out / "checkpoints").glob("step-*"), key=os.path.getmtime)
    if len(checkpoints) > 1:                             # the only one is nothing that a run could do without
        file = dice.choice(sorted(checkpoints[-1].iterdir()))
        os.truncate(file, dice.randrange(max(1, file.stat().st_size)))


def stop_rank(job, dice):
    """SIGSTOP one rank, as a hang: the others must find out, and all must end."""
    job.send(job.a_rank(dice), signal.SIGSTOP)
    if job.ends(PATIENCE_S):
        return None
    job.send(job.processes())
    # A rank that is stopped while Python ends, its work done and its watch with it: torchrun alone waits.
    return None if (job.out / "hf").exists() else "still there after minutes"


KINDS = {
    "kill -9 of a rank": lambda job, dice: job.send(job.a_rank(dice)),
    "kill -9 of all": lambda job, dice: job.send(job.processes()),
    "kill -9 of the launcher": lambda job, dice: job.send([job.torchrun]),
    "killed graders": lambda job, dice: job.send(job.processes("grading/worker.py")),
    "SIGTERM": lambda job, dice: job.send([job.torchrun], signal.SIGTERM),
    "SIGSTOP of a rank": stop_rank,
    "two starts at once": start_twice,
    "disk full": fill_disk,
    "truncated newest checkpoint": truncate_checkpoint}


def newest(out):
    """The step of the newest whole checkpoint, 0 without one."""
    try:
        found = newest_checkpoint(out / "checkpoints", log=str)
    except ValueError:                                   # none is whole
        return 0
    return found[1]["state"]["step"] if found else 0


def content(out):
    """Of a finished run, what must not differ: name -> content."""
    rows = []
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if not name.startswith(("time/", "perf/"))})
    return {"metrics": rows, "samples": (out / "samples.jsonl").read_bytes(),
            "weights": (out / "hf" / "model.safetensors").read_bytes()}


def one_start(out, log, dice, kinds, duration, deadline, counts):
    """Start the run and let faults happen to it until it ends, none after the deadline. Returns what went
    wrong, a list of texts."""
    job, kind, before, wrong = Job(out, log), None, newest(out), []
    while not job.ends(dice.uniform(0, 0.7 * duration)):
        if time.monotonic() > deadline:
            if job.ends(PATIENCE_S + duration):
                break
            job.send(job.processes())
            return [*wrong, "did not end, undisturbed"]
        kind, before = dice.choice(kinds), newest(out)
        print(f"{time.strftime('%H:%M:%S')} step {before}: {kind}", flush=True)
        counts[kind] += 1
        trouble = KINDS[kind](job, dice)
        if trouble:
            wrong.append(f"{kind}: {trouble}")
            job.send(job.processes())
    if job.leaves_behind():
        wrong.append(f"{kind}: left processes behind")
    if newest(out) < before - SAVE_EVERY * (kind == "truncated newest checkpoint"):
        wrong.append(f"{kind}: the checkpoint of step {before} is lost")
    if kind is None and job.torchrun.returncode:
        wrong.append("failed, undisturbed")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=number_in(float, "(0, inf)"), default=60,
                        help="no fault after that [%(default)s]")
    parser.add_argument("--seed", type=number_in(int, "[0, inf)"), default=0,
                        help="of kinds, moments and victims [%(default)s]")
    parser.add_argument("--kinds", default=",".join(KINDS), help="by commas [%(default)s]")
    parser.add_argument("--out", default="out/faults", help="folder of the runs and their log [%(default)s]")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    disk = Path(args.out).resolve() / "disk"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], capture_output=True)
    try:
        with (disk.parent / "log").open("w", encoding="utf-8") as log:
            wrong = torment(args, disk / "run", log)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", disk])
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


def torment(args, out, log):
    """Runs through faults until the time is up. Prints how many of each kind; returns what went wrong."""
    undisturbed, began = out.parents[1] / "undisturbed", time.monotonic()
    if not (first := Job(undisturbed, log)).ends(2 * PATIENCE_S) or first.torchrun.returncode:
        return [f"the undisturbed run failed: {log.name}"]
    expected, duration = content(undisturbed), time.monotonic() - began
    dice, counts, wrong, runs = random.Random(args.seed), Counter(), [], 0
    deadline = began + duration + 60 * args.minutes
    while time.monotonic() < deadline:
        shutil.rmtree(out, ignore_errors=True)
        runs += 1
        found = []
        while not found and not (out / "hf").exists():
            found = one_start(out, log, dice, args.kinds.split(","), duration, deadline, counts)
        if not found:
            got = content(out)
            found = [f"other {name}" for name in expected if got[name] != expected[name]]
        wrong += [f"run {runs}: {text}" for text in found]
    for kind in counts:
        print(f"{kind:<30}{counts[kind]:>5}")
    print(f"{counts.total()} faults in {runs} runs, seed {args.seed}; wrong: {len(wrong)}")
    return wrong


if __name__ == "__main__":
    main()
