"""How many CPUs a process may keep busy."""
import os


def usable_cpus(mounted="/sys/fs/cgroup", mine="/proc/self/cgroup"):
    """CPUs that this process can keep busy, at least 1: those it may run on, or fewer where the quota of a
    control group (docker --cpus, a limit of Kubernetes or SLURM) gives it less time."""
    cpus = len(os.sched_getaffinity(0))
    for line in _lines(mine):                    # "0::/a/b" (version 2) or "4:cpu,cpuacct:/a/b" (version 1)
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            tree = mounted
        elif "cpu" in controllers.split(","):
            tree = f"{mounted}/cpu"
        else:
            continue
        folder = os.path.normpath(tree + group)
        if not folder.startswith(tree):                      # "/../..": outside of what a container sees
            folder = tree
        while len(folder) >= len(tree):                      # a group's time is part of its parent's
            found = _lines(f"{folder}/cpu.max")                                           # version 2
            found = found or _lines(f"{folder}/cpu.cfs_quota_us") + _lines(f"{folder}/cpu.cfs_period_us")
            words = " ".join(found).split()                  # quota and period, microseconds of CPU time
            if len(words) == 2 and words[0] not in ("max", "-1"):          # else no quota, as at the root
                cpus = min(cpus, max(1, int(words[0]) // int(words[1])))
            folder = os.path.dirname(folder)
    return cpus


def _lines(path):
    """Of a text file; none if there is no such file."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []
