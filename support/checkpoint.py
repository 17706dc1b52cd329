"""Checkpoints of a training run, which a kill at any moment leaves whole: out/NAME/checkpoints/step-N/.

    save_checkpoint(folder, policy, optimizer, {"step": 50, "position": 6400}, keep=2)
    path, manifest = newest_checkpoint(folder)                     # None if there is none at all
    state = load_checkpoint(path, manifest, policy, optimizer)     # {"step": 50, "position": 6400}

A checkpoint holds the fp32 weights and AdamW's moments, each rank's shards written by that rank
(torch.distributed.checkpoint, "dcp"), each rank's random generators, and, written last, manifest.json: the
state, the weights' shapes, and the size of every other file. It is complete if, and only if, all of them are
there with those sizes.

To copy: this file, for any model of FSDP2. It needs torch and numpy alone.
"""
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def _rng_state():
    # Plain numbers and tensors, no numpy arrays: torch.load(weights_only=True) opens nothing else.
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(),
             "numpy": (name, keys.tolist(), *rest)}
    if torch.cuda.is_initialized():                       # this process trains on a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state):
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _shapes(policy):
    return {name: list(p.shape) for name, p in policy.named_parameters()}


def save_checkpoint(folder, policy, optimizer, state, keep):
    """Write weights, optimizer, RNGs and the JSON-able dict `state` (with its "step") to
    folder/step-N. A collective.

    Everything goes to a temporary name first and is renamed when it is complete, so a kill at any moment
    leaves the previous checkpoint whole. The newest `keep` are kept.
    """
    folder, rank = Path(folder), dist.get_rank()
    final = folder / f"step-{state['step']}"
    partial = folder / f".partial-{final.name}"
    if rank == 0:
        for left_by_a_kill in folder.glob(".partial-*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()                                        # the folder is there before any rank writes to it
    weights, moments = get_state_dict(policy, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(partial))
    torch.save(_rng_state(), partial / f"rng-{rank}.pt")
    dist.barrier()                                        # all files are written before rank 0 lists them
    if rank == 0:
        # Sizes, since a full disk or a copy that was cut leaves files of the right names.
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        manifest = {"state": state, "world": dist.get_world_size(), "shapes": _shapes(policy), "files": sizes}
        with (partial / "manifest.json").open("w") as f:
            json.dump(manifest, f)
            f.flush()
            os.fsync(f.fileno())
        # A rename is one step of the file system: under the final name there is never half a checkpoint.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        # By number, not by name: step-10 is after step-6. One with a higher number than this is broken, since
        # the run went back behind it, and does not count.
        older = [path for path in _checkpoints(folder) if step_of(path) < state["step"]]
        for path in older[:max(0, len(older) - (keep - 1))]:
            shutil.rmtree(path)
    dist.barrier()                                        # no rank goes on while there is none to go back to


def step_of(path):
    """N of a folder step-N, -1 of any other: a copy that somebody named step-N-mine is theirs."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _checkpoints(folder):
    """Paths of all step-N in the folder, the oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def inspect_checkpoint(path):
    """The manifest of one checkpoint. Raises ValueError naming the file that is missing,
    cut short or foreign."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"].items()
        manifest["state"]["step"], manifest["world"], manifest["shapes"]         # all that resuming will read
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a complete checkpoint of this program "
                         f"(manifest.json: {e})") from None
    for name, size in files:
        found = (path / name).stat().st_size if (path / name).exists() else "no such file"
        if found != size:
            raise ValueError(f"{path / name}: truncated checkpoint, expected {size} bytes, found {found}")
    return manifest


def newest_checkpoint(folder, log=print):
    """(path, manifest) of the newest whole checkpoint, or None. A broken one is named and passed over; if
    checkpoints exist but none is whole, ValueError: to start over in silence would throw a run away."""
    paths = _checkpoints(Path(folder))
    for path in reversed(paths):
        try:
            return path, inspect_checkpoint(path)
        except ValueError as e:
            log(f"refusing a checkpoint: {e}")
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints is whole; "
                         "move them away to start over")
    return None


def find_checkpoint(folder, log=print):
    """newest_checkpoint, the same on every rank. A collective. ValueError if ranks see different ones."""
    checkpoint = newest_checkpoint(folder, log)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, checkpoint and str(checkpoint[0]))
    if len(set(everyone)) > 1:
        raise ValueError(f"ranks see different checkpoints ({everyone}): --out must lie on a shared file "
                         "system")
    return checkpoint


def load_checkpoint(path, manifest, policy, optimizer):
    """Restore weights, optimizer and RNGs in place; returns the saved `state`. Works on another number of
    ranks, where RNGs (which nothing in a step depends on) restart from the seed. A collective. Raises
    ValueError if the checkpoint is of another model."""
    here, there = _shapes(policy), manifest["shapes"]
    if here != there:
        differing = [name for name in here if here[name] != there.get(name)]
        name = differing[0] if differing else "the number of parameters"
        raise ValueError(f"{path}: a checkpoint of another model: {name} is {there.get(name)} "
                         f"there, {here.get(name)} here; use the run's own --model, or another --out")
    # dcp.load fills tensors that are there: this rank's shards, of whatever sizes they are on this number of
    # ranks. A new AdamW has no moments yet; get_state_dict makes it some.
    weights, moments = get_state_dict(policy, optimizer)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=str(path))
        if manifest["world"] == dist.get_world_size():
            _set_rng_state(torch.load(Path(path) / f"rng-{dist.get_rank()}.pt", weights_only=True))
    except (Exception, dcp.api.CheckpointException) as e:       # the latter derives from BaseException
        raise ValueError(f"{path}: cannot be read ({type(e).__name__}: {str(e)[-300:]})") from e
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return manifest["state"]
