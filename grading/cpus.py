"""How many CPUs a process may keep busy: for the Grader of reward.py, which starts a worker on each but one.

os.cpu_count() tells of the machine. A container or a job of SLURM may have less of it, in two ways: it may
run on certain CPUs only (the affinity), or use so much CPU time a period (the quota of a control group).
"""
import os


def usable_cpus(mounted="/sys/fs/cgroup", mine="/proc/self/cgroup"):
    """CPUs that this process can keep busy, at least 1: those it may run on, or fewer where the quota of a
    control group (docker --cpus, a limit of Kubernetes or SLURM) gives it less time.

    mounted: where the system shows its control groups. mine: the file that names those of this process.
    """
    cpus = len(os.sched_getaffinity(0))
    for line in _lines(mine):
        # A line is "0::/a/b" in version 2 of control groups, "4:cpu,cpuacct:/a/b" in version 1.
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            tree = mounted
        elif "cpu" in controllers.split(","):
            tree = f"{mounted}/cpu"
        else:
            continue                                    # of memory, say
        folder = os.path.normpath(tree + group)
        if not folder.startswith(tree):                 # "/../..": outside of what a container sees
            folder = tree
        while len(folder) >= len(tree):                 # to the top: a group's time is part of its parent's
            quota = _quota(folder)
            if quota is not None:
                cpus = min(cpus, quota)
            folder = os.path.dirname(folder)
    return cpus


def _quota(folder):
    """CPUs that the control group in `folder` may keep busy, at least 1; None where it has no quota."""
    found = _lines(f"{folder}/cpu.max")                 # version 2: both on one line
    if not found:                                       # version 1: a file each
        found = _lines(f"{folder}/cpu.cfs_quota_us") + _lines(f"{folder}/cpu.cfs_period_us")
    words = " ".join(found).split()
    if len(words) != 2 or words[0] in ("max", "-1"):    # no such file, as at the top, or no limit
        return None
    quota, period = int(words[0]), int(words[1])        # microseconds of CPU time in microseconds of time
    return max(1, quota // period)


def _lines(path):
    """Of a text file; none if there is no such file."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []
