"""Checkpoints of a training run, which a kill at any moment leaves whole: out/NAME/checkpoints/step-N/.

    save_checkpoint(folder, policy, optimizer, {"step": 50, "position": 6400}, keep=2)
    path, manifest = newest_checkpoint(folder)                     # None if there is none at all
    state = load_checkpoint(path, manifest, policy, optimizer)     # {"step": 50, "position": 6400}

A checkpoint holds the fp32 weights and AdamW's moments, each rank's shards written by that rank
(torch.distributed.checkpoint, "dcp"), each rank's random generators, and, written last, manifest.json: the
state, the shapes of the weights, size and SHA-256 of every other file, and a SHA-256 of all this. It is
complete if, and only if, every file is there as the manifest has it.

dcp's own list of tensors, .metadata, is a pickle: whoever reads it runs what its author wrote. So no file is
read before all digests are right. That keeps out what is damaged, or of another program. It does not keep out
a forger, who can write digests, too: resume only from folders of people that you trust.

To copy: this file with support/disk.py and support/collectives.py, for any model of FSDP2. They need torch
and numpy alone.
"""
import hashlib
import json
import random
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from support.collectives import all_or_none, of_all_ranks
from support.disk import amount, discard, discard_leftovers, free_bytes, write_whole

BYTES_A_WEIGHT = 12      # fp32: the weight and AdamW's two moments; 91 GB at 7.6 B
NONE_YET = ".none-yet"   # in a run's folder of checkpoints until the first is there


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


# ----------------------------------------------------------------------------------------------------------
# Writing.

def save_checkpoint(folder, policy, optimizer, state, keep):
    """Write weights, optimizer, RNGs and the JSON-able dict `state` (with its "step") to
    folder/step-N. A collective.

    Everything goes to a temporary name first and is renamed when it is complete, so a kill at any moment
    leaves the previous checkpoint whole. The newest `keep` are kept. Where it cannot be written, as on a full
    disk, every rank raises OSError, nothing of it is left, and no older one is touched.
    """
    folder, rank = Path(folder), dist.get_rank()
    final = folder / f"step-{state['step']}"
    partial = folder / f".partial-{final.name}"
    needed = BYTES_A_WEIGHT * sum(p.numel() for p in policy.parameters())
    if rank == 0:
        discard_leftovers(folder)
    with _all_or_nothing(partial, needed):
        if rank == 0:
            if free_bytes(folder) < needed:               # all ranks would write for minutes, in vain
                raise OSError("the disk has no room for it")
            partial.mkdir(parents=True)
    with _all_or_nothing(partial, needed):
        weights, moments = get_state_dict(policy, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(partial))
        torch.save(_rng_state(), partial / f"rng-{rank}.pt")
    with _all_or_nothing(partial, needed):                # all files are written before any rank lists them
        written = sorted(file.name for file in partial.iterdir() if file.is_file())
        mine = _digests_by(rank, partial, written)
    files = {}
    for part in of_all_ranks(mine):
        files.update(part)
    with _all_or_nothing(partial, needed):
        if rank == 0:
            manifest = {"state": state, "world": dist.get_world_size(), "shapes": _shapes(policy),
                        "files": files}
            write_whole(partial / "manifest.json", json.dumps({**manifest, "sha256": _digest_of(manifest)}))
            discard(final)
            # A rename is one step of the file system: under the final name there is never half a checkpoint.
            partial.rename(final)
            (folder / NONE_YET).unlink(missing_ok=True)
    if rank == 0:
        # By number, not by name: step-10 is after step-6. One with a higher number than this is broken, since
        # the run went back behind it, and does not count.
        older = [path for path in checkpoints_in(folder) if step_of(path) < state["step"]]
        for path in older[:max(0, len(older) - (keep - 1))]:
            discard(path)
    dist.barrier()                                        # no rank goes on while there is none to go back to


@contextmanager
def _all_or_nothing(partial, needed):
    """Inside, what fails on one rank is an OSError on all, and the partial checkpoint goes. A collective."""
    error = None
    try:
        yield
    except (Exception, dcp.api.CheckpointException) as e:        # the latter derives from BaseException
        error = e
    # The last line alone: dcp puts a traceback of every rank into its message.
    reasons = of_all_ranks(error and f"{type(error).__name__}: {error}".strip().splitlines()[-1])
    reason = next(filter(None, reasons), None)
    if reason is None:
        return
    if dist.get_rank() == 0:
        discard(partial)
    dist.barrier()
    free = free_bytes(partial)
    # torch hides a full disk behind "unexpected pos 704 vs 598", so what is said first is what is free.
    what = "the disk is full" if free < needed else "could not be written"
    raise OSError(f"{partial.parent / partial.name.removeprefix('.partial-')}: {what}. A checkpoint takes "
                  f"{amount(needed)}, {amount(free)} are free now that what was written of it is removed "
                  f"(a quota may be lower). Older checkpoints are untouched: make room, then --resume. "
                  f"({reason})") from error


def begin_run(folder):
    """Note that a run begins, and has no checkpoint yet. Where neither this note nor a checkpoint is, the
    checkpoints were lost."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NONE_YET).touch()


def has_none_yet(folder):
    return (folder / NONE_YET).exists()


# ----------------------------------------------------------------------------------------------------------
# Which one is whole.

def step_of(path):
    """N of a folder step-N, -1 of any other: a copy that somebody named step-N-mine is theirs."""
    number = path.name.removeprefix("step-")
    return int(number) if re.fullmatch("[0-9]+", number) else -1


def checkpoints_in(folder):
    """Paths of all step-N in the folder, the oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def _digest_of(content):
    """SHA-256 of what json.dumps gives."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _digests_by(rank, folder, names):
    """Name -> [bytes, SHA-256] of those files in `folder` that are this rank's to read: those that it wrote,
    which are still in its machine's memory."""
    found = {}
    for name in names:
        if _reader_of(name) == rank:
            with (folder / name).open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found[name] = [(folder / name).stat().st_size, digest]
    return found


def _reader_of(name):
    """The rank that reads this file to check it: rank 3 __3_0.distcp and rng-3.pt, rank 0 all else."""
    writer = re.match(r"(?:__|rng-)(\d+)", name)
    return int(writer[1]) % dist.get_world_size() if writer and dist.is_initialized() else 0


def inspect_checkpoint(path):
    """The manifest of one checkpoint. Raises ValueError naming the file that is missing, cut short or
    foreign. What is in the files is not looked at: see verify_checkpoint."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        digest = manifest.pop("sha256", None)
        if digest is None:
            raise ValueError("it has no digest: an earlier version wrote it, or another program")
        if digest != _digest_of(manifest):
            raise ValueError("its content is not what was written, by its own digest")
        manifest["state"]["step"], manifest["world"], manifest["shapes"]         # all that resuming will read
        sizes = {name: size for name, (size, _) in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a complete checkpoint of this program "
                         f"(manifest.json: {e})") from None
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).exists() else "no such file"
        if found != size:
            raise ValueError(f"{path / name}: truncated checkpoint, expected {size} bytes, found {found}")
    step = manifest["state"]["step"]
    if step_of(path) not in (-1, step):       # what is saved from there on would have a lower number than it
        raise ValueError(f"{path}: holds step {step}; give it back its name, step-{step}")
    return manifest


def verify_checkpoint(path):
    """inspect_checkpoint, and the digest of every file. Raises ValueError, the same on every rank. A
    collective.

    Each rank reads its share, so that 91 GB at 7.6 B are 11 GB for each of 8: at 1.4 GB/s, SHA-256 on one
    core that has instructions for it, 8 s once the disk has delivered them.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    with all_or_none():
        manifest = inspect_checkpoint(path)
        found = _digests_by(rank, Path(path), manifest["files"])        # others may have put theirs beside
        for name, written in manifest["files"].items():
            if _reader_of(name) == rank and found[name] != written:
                raise ValueError(f"{Path(path) / name}: damaged checkpoint: the file has the size that was "
                                 "written, and another content (SHA-256)")
    return manifest


def newest_checkpoint(folder, log=print):
    """(path, manifest) of the newest whole checkpoint, or None: the same on every rank. A collective.

    A broken one is named and passed over; if checkpoints exist but none is whole, ValueError: to start over
    in silence would throw a run away. ValueError too if ranks see different ones.
    """
    paths = checkpoints_in(Path(folder))
    everyone = of_all_ranks([path.name for path in paths])
    if any(names != everyone[0] for names in everyone):
        raise ValueError(f"{folder}: ranks see different checkpoints ({everyone}): --out must lie on a "
                         "shared file system")
    for path in reversed(paths):
        try:
            return path, verify_checkpoint(path)
        except ValueError as e:
            log(f"refusing a checkpoint: {e}")
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints is whole; "
                         "move them away to start over")
    return None


# ----------------------------------------------------------------------------------------------------------
# Reading.

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
