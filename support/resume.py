"""Before a run begins or goes on: is the folder free, what is in it, is it the same run, is there room?

    checkpoint = open_run("out/run", resume=True, rank=rank)     # (path, manifest), or None: begin
    check_same_run(checkpoint, settings, identity, ...)          # its flags, and by content what they name
    check_room(folder, weights, saves, keep, exported)           # for the checkpoints to come

To copy: this file with all of support/.
"""
from pathlib import Path

from support.checkpoint import BYTES_A_WEIGHT, begin_run, checkpoints_in, has_none_yet, newest_checkpoint
from support.claim import claim
from support.collectives import all_or_none
from support.disk import amount, discard_leftovers, free_bytes
from support.runlog import read_rows


def open_run(run, resume, rank, log=print):
    """Take a run's folder for this run alone -> its newest whole checkpoint, (path, manifest); None: the run
    begins. A collective.

    Raises ValueError where another process writes there, where a run is there and `resume` is not asked for,
    and where there are records of a run that has lost its checkpoints: to begin anew would delete them.
    """
    run = Path(run)
    records, checkpoints, rows = run / "metrics.jsonl", run / "checkpoints", []
    with all_or_none():
        if rank == 0:
            claim(run)                       # before anything is read that another run may be writing
            discard_leftovers(run)           # of a kill, before anyone asks what room there is
            discard_leftovers(checkpoints)
            if not resume and (records.exists() or checkpoints_in(checkpoints)):
                raise ValueError(f"{run} already holds a run: pass --resume to continue it, or another --out")
            rows = read_rows(records)
    if resume:
        found = newest_checkpoint(checkpoints, log)
        if found is not None:
            done = found[1]["state"]["step"]
            lost = sorted(set(range(1, done + 1)) - {row["step"] for row in rows})
            if lost:
                log(f"{records}: has no row of {len(lost)} of the {done} steps done, such as step {lost[0]}: "
                    "was it changed, or moved?")
            return found
    with all_or_none():
        if rank == 0:
            steps = max((row["step"] for row in rows), default=0)
            if (run / "hf").exists() or (steps > 0 and not has_none_yet(checkpoints)):
                raise ValueError(f"{run}: holds the records of a run of {steps} steps and none of its "
                                 "checkpoints, so there is nothing to resume, and to begin anew would delete "
                                 "the records. Put checkpoints/ back, or take another --out")
            begin_run(checkpoints)
    return None


def check_same_run(checkpoint, settings, identity, same_flags, same_content, log=print):
    """Is this the run that wrote `checkpoint`, (path, manifest)? (None: a new run, and no question.)

    settings: flag -> value. identity: flag -> digests of what it names, None where it names nothing. Raises
    ValueError if one of `same_flags` has another value, or one of `same_content` (flag -> what to call it)
    names something else; says what else has changed.
    """
    if checkpoint is None:
        return
    path, manifest = checkpoint
    state = manifest["state"]
    for name, now in settings.items():
        then = state["settings"].get(name, now)           # a flag that is new since then has not changed
        if then == now:
            continue
        if name in same_flags:
            raise ValueError(f"{path}: was trained with --{name} {then}; resume with the run's own flags, or "
                             "start another run from a model of its own, --model DIR")
        log(f"  with --{name} {now}, until now {then}")
    for name, now in identity.items():
        then = state["identity"].get(name)                # None: noted since then
        if then == now or then is None or now is None:
            continue
        if name in same_content:
            raise ValueError(f"{path}: {same_content[name]} is not what this run was trained on until now "
                             "(compared by content: a file may move). Resume with the run's own, or start "
                             "another run from a model of its own, --model DIR")
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
    if free >= needed:
        return
    text = (f"{folder}: the disk has {amount(free)} free, and this run needs {amount(needed)}: checkpoints "
            f"of {amount(size)}, {most} at a time (--keep {keep} and the one that is being written; {there} "
            f"are there), and a model of {amount(exported)} at the end")
    least = max(1, min(2, most) - there) if saves else 0
    if free < least * size:
        raise OSError(f"{text}. Make room, lower --keep, or take another --out")
    log(f"WARNING: {text}")
