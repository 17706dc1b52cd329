"""The processes of a run, and the group that they form.

    rank, world, device, mesh = init_distributed()               # under torchrun, or alone

To copy: this file with support/device.py, support/watch.py and support/collectives.py; they need torch and
numpy alone.
"""
import os
import random
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from support.device import choose_device
from support.watch import MARGIN_MINUTES, START_MINUTES, meet, rank_name, set_timeouts


class Ranks(NamedTuple):
    """This process in its group."""
    rank: int                    # 0 to world - 1
    world: int                   # processes in all
    device: torch.device         # this rank's own
    mesh: DeviceMesh             # of all ranks; see mesh_shape


def init_distributed(device="auto"):
    """Join the process group that torchrun describes (or a group of one) and build the device mesh: Ranks.

    CPU collectives run on gloo beside nccl, for objects and checkpoint plans. device: see choose_device.
    Raises ValueError for a device that is not there, and for ranks that are not whole nodes.
    """
    describe_a_group_of_one()
    world = int(os.environ["WORLD_SIZE"])
    device = choose_device(device, int(os.environ["LOCAL_RANK"]))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if world > 1:
        meet()
    # Alone, the group needs no port: one that was free a moment ago may be another's by now.
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
    dist.init_process_group(backend, timeout=timedelta(minutes=START_MINUTES + MARGIN_MINUTES), **alone)
    mesh = init_device_mesh(device.type, **mesh_shape(world, int(os.environ["LOCAL_WORLD_SIZE"])))
    set_timeouts(mesh, START_MINUTES)             # its groups began with torch's default, 10 minutes on nccl
    return Ranks(dist.get_rank(), world, device, mesh)


def describe_a_group_of_one():
    """Set what torchrun would, where it has not."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def mesh_shape(world, per_node):
    """The mesh as init_device_mesh's arguments. One node: 1-D, FSDP2 shards parameters over all ranks.
    Several: 2-D, for HSDP, which shards within a node (fast links) and replicates across nodes.

    >>> mesh_shape(16, 8)
    {'mesh_shape': (2, 8), 'mesh_dim_names': ('replicate', 'shard')}
    """
    if world % min(world, per_node):
        raise ValueError(f"{world} ranks are not whole nodes of {per_node}: start as many on every node")
    if world <= per_node:
        return {"mesh_shape": (world,), "mesh_dim_names": ("shard",)}
    return {"mesh_shape": (world // per_node, per_node), "mesh_dim_names": ("replicate", "shard")}


def seed_everything(seed):
    """Python, NumPy (32 bits of the seed) and torch draw the same from here on."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


OUT_OF_MEMORY = ("The GPU's memory is full. In training: raise --recompute (up to all), lower "
                 "--micro_batch_tokens (not below the longest prompt + response), or pass --offload. In "
                 "generation: lower --engine_memory. `python srft.py --dry_run`, with the flags of the run "
                 "and --dry_run_cards 1x24, say, finds flags that fit.")


@contextmanager
def advice_when_memory_is_full():
    """Inside, the error of a full GPU is raised with a note of what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(OUT_OF_MEMORY)
        raise


@contextmanager
def mistakes_in_one_line(program):
    """Inside, a mistake of the caller ends the program with one line: any OSError, and a ValueError that code
    of this project raises. A library's ValueError keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        root = Path(__file__).resolve().parents[1]
        ours = root in (raised.parent, raised.parent.parent)             # at the root or in one of its rooms
        if isinstance(error, OSError) or ours:
            sys.exit(f"{rank_name(program)}: {error}")
        raise
