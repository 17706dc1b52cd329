"""The processes of a run: the group they form, and the small things each needs in it.

    rank, world, device, mesh = init_distributed()      # under torchrun, or alone
    folder = fetch("Qwen/Qwen2.5-Math-7B", "model", "--model")       # one download a node
"""
import os
import random
import resource
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def init_distributed(timeout_minutes=120):
    """Join the process group that torchrun describes (or a group of one) and build the device mesh.

    Returns (rank, world, device, mesh). One node: a 1-D mesh, parameters sharded over all ranks. Several
    nodes: a 2-D mesh for HSDP, sharded within a node (fast links) and replicated across nodes. CPU
    collectives run on gloo beside nccl, for objects and checkpoint plans.
    """
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
        os.environ.setdefault(name, str(value))
    if os.environ["MASTER_PORT"] == "0":                       # not under torchrun: any free port will do
        import socket
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # The start may take long (a download, a first compilation), hence the generous timeout.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            timeout=timedelta(minutes=timeout_minutes))
    shape, names = (((world // local, local), ("replicate", "shard")) if world > local else
                    ((world,), ("shard",)))
    return dist.get_rank(), world, device, init_device_mesh(device.type, shape, mesh_dim_names=names)


def fetch(name, repo_type, flag):
    """A local folder for `name`: itself if it exists, else a snapshot from the Hugging Face hub.

    One rank a node downloads while the others wait. Raises FileNotFoundError naming the flag
    when it cannot be had.
    """
    if Path(name).exists():
        return str(name)
    from huggingface_hub import snapshot_download
    first, error = int(os.environ.get("LOCAL_RANK", 0)) == 0, None
    wanted = ["*.parquet", "*.jsonl"]
    if repo_type == "model":
        wanted = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
    for my_turn in (first, not first):
        if my_turn:
            try:
                folder = snapshot_download(name, repo_type=repo_type, local_files_only=not first,
                                           allow_patterns=wanted)
            except Exception as e:                             # the hub's errors share no useful base class
                error = e
        if dist.is_initialized():
            dist.barrier()
    if error is not None:
        raise FileNotFoundError(
            f"{flag} {name}: no such local path, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0][:150]}). Without network, pass "
            "local paths: --model DIR (config, tokenizer, safetensors) and --data FILE-or-DIR.")
    return folder


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def memory_gb(device):
    """GB of the GPU in use, by whomever (torch's own count would include vLLM's sleeping pages); on CPU the
    most that this process has had resident."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
