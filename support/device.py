"""The device of a run: which one, how much of its memory is in use, what it could do at most.

    device = choose_device("auto", local_rank)        # refuses to train on a CPU where a GPU was meant
    ids = to_device(list_of_ints, device)             # without waiting for the device
    mfu = utilization(flops_of_a_step / seconds, ranks, device)

To copy: this file, or any one of its functions (choose_device with _why_no_card). It needs torch alone.
"""
import os
import re
import resource
from pathlib import Path

import torch

# The oldest NVIDIA driver that runs a torch built for this major version of CUDA (NVIDIA's table of minor-
# version compatibility).
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def choose_device(wanted="auto", local_rank=0):
    """The device of the rank that is `local_rank` on its node. wanted: "cpu"; "cuda"; or "auto", which is the
    kind that this torch is built for.

    A build for GPUs that finds no usable card is an error and never a run on the CPU: there, 7B would train
    for years without a word. Raises ValueError with what was needed, what was found, and what to do.
    """
    build = torch.version.cuda or torch.version.hip                          # None: torch is built for CPUs
    if wanted == "cpu" or (wanted == "auto" and build is None):
        return torch.device("cpu")
    if build is None:
        raise ValueError(f"--device cuda: torch {torch.__version__} is built for CPUs alone; install "
                         "requirements.txt")
    if not torch.cuda.is_available():
        kind = "CUDA" if torch.version.cuda else "ROCm"
        raise ValueError(f"torch {torch.__version__} is built for {kind} {build} and finds no usable GPU. "
                         f"{_why_no_card(build)}. To run on the CPU on purpose, pass --device cpu (with the "
                         "vLLM of requirements-cpu.txt)")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"local rank {local_rank} has no GPU of its own: this node shows "
                         f"{torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES is "
                         f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start "
                         f"--nproc_per_node={torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)


def _why_no_card(build):
    """What keeps a CUDA build from its card: the driver, its age, or an environment that hides the card."""
    oldest = OLDEST_DRIVER.get(build.split(".")[0])
    needs = f"It needs an NVIDIA driver of r{oldest} or newer" if oldest else "It needs a driver of its own"
    try:
        driver = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())[0]
        found = f"found is {driver}"
    except (OSError, TypeError):                     # no such file, or no number in it
        found = "none is loaded here (in a container: was it started with its GPUs?)"
    hidden = ""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = (f"; CUDA_VISIBLE_DEVICES is '{os.environ['CUDA_VISIBLE_DEVICES']}', which may hide the "
                  "cards: unset it")
    return f"{needs}; {found}{hidden}"


def to_device(numbers, device, dtype=None):
    """A list, array or CPU tensor as a tensor on the device, of `dtype` if given.

    The host does not wait, so it can go on to queue the forward pass: it would wait if the memory were not
    pinned, since CUDA first finishes all queued work before it copies from pageable memory.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read_once(*parts):
    """Numbers on the device as floats, by one read. Each part is a dictionary of scalar tensors, or (n,).

    A read makes the host wait for all that it has queued, so one is better than many.

    >>> read_once({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, torch.tensor([3.0, 4.0]))
    [{'a': 1.0, 'b': 2.0}, [3.0, 4.0]]
    """
    flat = []
    for part in parts:
        values = torch.stack(list(part.values())) if isinstance(part, dict) else part
        flat.append(values.detach().float())
    numbers = iter(torch.cat(flat).tolist())
    found = []
    for part in parts:
        taken = [next(numbers) for _ in range(len(part))]
        found.append(dict(zip(part, taken)) if isinstance(part, dict) else taken)
    return found


def memory_gb(device):
    """GB of the GPU in use, by whomever (torch's own count would include vLLM's sleeping pages); on CPU the
    most that this process has had resident."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9               # Linux counts in KiB


# Dense bf16 FLOP/s by NVIDIA's data sheets, without sparsity. A variant stands before its card's SXM form.
PEAK_FLOPS = (("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("GH200", 989e12),
              ("H200 NVL", 835e12), ("H200", 989e12), ("GB200", 2500e12), ("B200", 2250e12),
              ("A100", 312e12), ("L40S", 362e12), ("RTX 4090", 165e12))


def peak_flops(name):
    """(the listed card, its dense bf16 FLOP/s) of a GPU by the name that CUDA gives it; (None, None) for
    cards not listed.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    ('H100', 989000000000000.0)
    """
    words = set(name.replace("-", " ").split())                # "NVIDIA A100-SXM4-80GB"
    for card, flops in PEAK_FLOPS:
        if words.issuperset(card.split()):
            return card, flops
    return None, None


def utilization(flops, cards, device):
    """Model FLOPs utilization: `flops` a second of all cards, over what they could do at most. None on a CPU,
    and on a card that is not listed."""
    if device.type != "cuda":
        return None
    _, peak = peak_flops(torch.cuda.get_device_name(device))
    return flops / (cards * peak) if peak else None


def name_the_card(device, log=print):
    """Say which GPU this is, and what perf/mfu is a share of; nothing on a CPU."""
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    card, peak = peak_flops(name)
    if peak:
        log(f"{name}: perf/mfu is of {peak / 1e12:.0f} TFLOP/s, {card}'s dense bf16 peak")
    else:
        log(f"{name}: peak FLOP/s not listed in support.device.PEAK_FLOPS, so no perf/mfu")
