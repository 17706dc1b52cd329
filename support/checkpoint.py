"""Checkpoints: out/NAME/checkpoints/step-N/, complete if and only if its manifest lists every file with its size."""
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
    dist.barrier()
    weights, moments = get_state_dict(policy, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(partial))
    torch.save(_rng_state(), partial / f"rng-{rank}.pt")
    dist.barrier()
    if rank == 0:
        shapes = {name: list(p.shape) for name, p in policy.named_parameters()}
        files = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
        manifest = {"state": state, "world": dist.get_world_size(), "shapes": shapes, "files": files}
        with (partial / "manifest.json").open("w") as f:
            json.dump(manifest, f)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        older = sorted((p for p in folder.glob("step-*") if 0 <= step_of(p) < state["step"]), key=step_of)
        for old in older[:max(0, len(older) - (keep - 1))]:
            shutil.rmtree(old)
    dist.barrier()


def step_of(path):
    return int(path.name.removeprefix("step-")) if path.name.removeprefix("step-").isdigit() else -1


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
    checkpoints exist but none is whole, ValueError."""
    paths = sorted((p for p in Path(folder).glob("step-*") if step_of(p) >= 0), key=step_of, reverse=True)
    for path in paths:
        try:
            return path, inspect_checkpoint(path)
        except ValueError as e:
            log(f"refusing a checkpoint: {e}")
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints is whole; "
                         "move them away to start over")
    return None


def load_checkpoint(path, manifest, policy, optimizer):
    """Restore weights, optimizer and RNGs in place; returns the saved `state`. Works on another number of
    ranks, where RNGs (which nothing in a step depends on) restart from the seed. A collective. Raises
    ValueError if the checkpoint is of another model."""
    shapes = {name: list(p.shape) for name, p in policy.named_parameters()}
    if shapes != manifest["shapes"]:
        name = next((n for n in shapes if shapes[n] != manifest["shapes"].get(n)),
                    "the number of parameters")
        raise ValueError(f"{path}: a checkpoint of another model: {name} is {manifest['shapes'].get(name)} "
                         f"there, {shapes.get(name)} here; use the run's own --model, or another --out")
    weights, moments = get_state_dict(policy, optimizer)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=str(path))
        if manifest["world"] == dist.get_world_size():
            _set_rng_state(torch.load(Path(path) / f"rng-{dist.get_rank()}.pt", weights_only=True))
    except (Exception, dcp.api.CheckpointException) as e:
        raise ValueError(f"{path}: cannot be read ({type(e).__name__}: {str(e)[-300:]})") from e
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return manifest["state"]
