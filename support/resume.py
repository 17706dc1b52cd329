"""Before a run begins or goes on: is its folder this run's, what is there, is it the same run, is there room?

    checkpoint = open_run("out/run", resume=True, rank=rank)     # (path, manifest), or None: begin
    check_identity(path, then, now, must={"data": "--data"})     # of what was trained on, by content
    check_room(folder, weights, saves, keep, exported)           # of the checkpoints that are to come

All are collectives where that is said, and then end alike on all ranks.

To copy: this file with all of support/.
"""
from pathlib import Path

from support.checkpoint import BYTES_A_WEIGHT, begin_run, checkpoints_in, has_none_yet, newest_checkpoint
from support.claim import claim
from support.disk import amount, discard_leftovers, free_bytes
from support.processes import all_or_none
from support.runlog import read_rows


def open_run(run, resume, rank, log=print):
    """Take a run's folder for this run alone -> its newest whole checkpoint, (path, manifest), or None: the
    run begins. A collective.

    Raises ValueError where another run writes there, where one is there that is not to be resumed, and where
    there are records of one that has lost its checkpoints: to begin anew would delete them.
    """
    run, checkpoint = Path(run), None
    with all_or_none():
        if rank == 0:
            claim(run)                   # before anything is read that another run may be writing
            discard_leftovers(run)       # of a kill, before anyone asks what room there is
            discard_leftovers(run / "checkpoints")
    with all_or_none():
        if not resume and ((run / "metrics.jsonl").exists() or checkpoints_in(run / "checkpoints")):
            raise ValueError(f"{run} already holds a run: pass --resume to continue it, or another --out")
        rows = read_rows(run / "metrics.jsonl")
    if resume:
        checkpoint = newest_checkpoint(run / "checkpoints", log)
    if checkpoint is not None:
        done = checkpoint[1]["state"]["step"]
        lost = sorted(set(range(1, done + 1)) - {row["step"] for row in rows})
        if lost:
            log(f"{run / 'metrics.jsonl'}: has no row of {len(lost)} of the {done} steps done, such as step "
                f"{lost[0]}: was it changed, or moved?")
        return checkpoint
    with all_or_none():
        steps = max((row["step"] for row in rows), default=0)
        if (run / "hf").exists() or (steps > 0 and not has_none_yet(run / "checkpoints")):
            raise ValueError(f"{run}: holds the records of a run of {steps} steps and none of its "
                             "checkpoints, so there is nothing to resume, and to begin anew would delete the "
                             "records. Put checkpoints/ back, or take another --out")
        if rank == 0:
            begin_run(run / "checkpoints")
    return None


def check_settings(path, then, now, must, log=print):
    """Compare flags; both: name -> value. Raises ValueError if one that `must` be the same is not what the
    checkpoint `path` was trained with; the others are said. A flag that is new since then has not changed."""
    for name, value in now.items():
        until_now = then.get(name, value)
        if value == until_now:
            continue
        if name in must:
            raise ValueError(f"{path}: was trained with --{name} {until_now}; resume with the run's own "
                             "flags, or start another run from a model of its own, --model DIR")
        log(f"  with --{name} {value}, until now {until_now}")


def check_identity(path, then, now, must, log=print):
    """Compare what the checkpoint `path` was trained with to what the flags name now; both: name of a flag ->
    digests of its content, None where it has none. Raises ValueError if one that must be the same (`must`:
    its name -> what to call it) is not; the others are said."""
    for name, found in now.items():
        if found is None or then[name] is None or found == then[name]:
            continue
        if name in must:
            raise ValueError(f"{path}: {must[name]} is not what this run was trained on until now (compared "
                             "by content: a file may move). Resume with the run's own, or start another run "
                             "from a model of its own, --model DIR")
        log(f"--{name} holds something else than until now; the run goes on from {path}")


def check_room(folder, weights, saves, keep, exported, log=print):
    """Ask at the start whether the disk has room for what a run will write.

    weights: their number. saves: checkpoints that are still to come. exported: bytes of the model that is
    written at the end. Raises OSError if the next checkpoint will not fit (nor, in a new run, the one after
    it, which is whole before the first is removed); says so if only later ones, or the export, will not.
    """
    size, free = BYTES_A_WEIGHT * weights, free_bytes(folder)
    there = len(checkpoints_in(folder))
    # At a time, since a new one is whole before an old one goes; and at the end, beside the model.
    most = max(there + (saves > 0), min(keep + 1, there + saves))
    last = min(keep, there + saves) if saves else there
    needed = max((most - there) * size, (last - there) * size + exported)
    if free is None or free >= needed:
        return
    text = (f"{folder}: the disk has {amount(free)} free, and this run needs {amount(needed)}: checkpoints "
            f"of {amount(size)}, {most} at a time (--keep {keep} and the one that is being written; {there} "
            f"are there), and a model of {amount(exported)} at the end")
    least = max(1, min(2, most) - there) if saves else 0
    if free < least * size:
        raise OSError(f"{text}. Make room, lower --keep, or take another --out")
    log(f"WARNING: {text}")
