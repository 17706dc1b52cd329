"""What test_processes.py runs on every rank, by `python tests/phases.py TASK MINUTES`: the skeleton of a
training run, without a model."""
import support.startup  # noqa: F401  (before torch)

import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

from support import watch
from support.hub import fetch
from support.processes import init_distributed
from support.watch import finish_step_on_signals, hang_watch, phase, set_timeouts


def timeouts(mesh):
    """Of the default group and of the mesh's, in minutes."""
    return {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60
            for g in (dist.group.WORLD, *mesh.get_all_groups())}


def steps(task, minutes):
    rank, world, _, mesh = init_distributed("cpu")
    assert timeouts(mesh) == {125}
    print("PID", os.getpid(), flush=True)
    if task.startswith("fetch"):                         # a path that only rank 0's node has
        print("FETCHED", fetch(task.removeprefix("fetch ") if rank == 0 else "/nowhere", "model", "--model"))
    victim = rank == world - 1                           # the one that gets into trouble
    if task == "forever":                                # until a rank is lost
        finish_step_on_signals()
    for step in range(1, 4 if task != "forever" else 10_000):
        phase("rollout", step)
        if victim and task == "long first step" and step == 1:
            time.sleep(60 * minutes + 2)
        if victim and task == "sleep" and step == 2:
            time.sleep(600)
        if task == "forever":
            time.sleep(0.1)
            print("STEP", step, flush=True)
        if victim and task == "keep the GIL" and step == 2:
            re.match(r"(a+)+$", "a" * 40 + "b")          # for years, and no other thread gets to run
        phase("train", step)
        if task == "raise" and step == 2:
            if victim:
                raise KeyError("a bug")
            time.sleep(600)                        # as in a collective of nccl, blind to other ranks' ends
        if step == 2 and task == f"kill {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        if step == 1:
            set_timeouts(mesh, minutes)
            assert timeouts(mesh) == {5 + minutes}
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    task, minutes = sys.argv[1], float(sys.argv[2])
    if task == "forever":
        watch.SILENT_MINUTES, minutes = minutes, 30.0
    if task == "absent":
        watch.JOIN_MINUTES = watch.SILENT_MINUTES = minutes
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
    with hang_watch():
        steps(task, minutes)
    time.sleep(1)                                        # nothing is left that could end a process
    print("DONE")
