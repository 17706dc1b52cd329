"""The processes of a run: the group they form, where each of them is, and what to do when one hangs.

    with hang_watch():                                               # inside, errors name rank and phase
        rank, world, device, mesh = init_distributed()               # under torchrun, or alone
        folder = fetch("Qwen/Qwen2.5-Math-7B", "model", "--model")   # one download a node
        phase("train", step)                                         # what this process does from here on
        set_timeouts(mesh, minutes=30)                               # short, once the first step is done

A collective that times out on rank 2 because rank 5 is stuck says nothing about rank 5. So each rank notes
its phase in the group's TCPStore, and the first to stay in one for too long makes all of them dump their
Python stacks, say who is behind, and exit: torchrun tears the job down, a scheduler may start it again. The
same phases are the named ranges of a profile (start_profiler, write_profile).

To copy: this file with support/device.py, for choose_device; both need torch and numpy alone. `fetch` also
needs huggingface_hub and support/weights.py.
"""
import ctypes
import faulthandler
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from support.device import choose_device

START_MINUTES = 120      # of a phase before the first step is done: a download, a first compilation
MARGIN_MINUTES = 5       # collectives get more than phases: the watch, which can name a rank, comes first


# ----------------------------------------------------------------------------------------------------------
# The group.

class Ranks(NamedTuple):
    """This process in its group."""
    rank: int                    # 0 to world - 1
    world: int                   # processes in all
    device: torch.device         # this rank's own
    mesh: DeviceMesh             # of all ranks; see mesh_shape


def init_distributed(device="auto", timeout_minutes=START_MINUTES):
    """Join the process group that torchrun describes (or a group of one) and build the device mesh: Ranks.

    CPU collectives run on gloo beside nccl, for objects and checkpoint plans. device: see choose_device.
    timeout_minutes: see set_timeouts. Raises ValueError for a device that is not there, and for ranks that
    are not whole nodes.
    """
    die_with_launcher()
    describe_a_group_of_one()
    world = int(os.environ["WORLD_SIZE"])
    device = choose_device(device, int(os.environ["LOCAL_RANK"]))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes + MARGIN_MINUTES))
    if world > 1:
        # The hang watch talks to the group's store by a client of its own: the group's is locked while this
        # rank waits for another in it.
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=1)))
        store.set_timeout(timedelta(seconds=5))
        _here.store = dist.PrefixStore("phase", store)
        _tell()
    mesh = init_device_mesh(device.type, **mesh_shape(world, int(os.environ["LOCAL_WORLD_SIZE"])))
    set_timeouts(mesh, timeout_minutes)           # its groups began with torch's default, 10 minutes on nccl
    return Ranks(dist.get_rank(), world, device, mesh)


def die_with_launcher():
    """From now on, whatever ends torchrun ends this process, which it has started.

    Without it, the ranks of a torchrun that was killed (kill -9, out of memory) train on, unseen, while a
    scheduler starts the job again. Linux alone knows this (prctl's PR_SET_PDEATHSIG, 1). "Parent" there means
    the thread that started this process; torchrun does that from the one that waits for its ranks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def describe_a_group_of_one():
    """Set what torchrun would, where it has not."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if os.environ["MASTER_PORT"] == "0":                                   # any free port will do
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])


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


def fetch(name, repo_type, flag):
    """A local folder for `name`: itself if it exists, else a snapshot from the Hugging Face hub.

    One rank a node downloads while the others wait. Raises FileNotFoundError naming the flag
    when it cannot be had. A collective, once there is a group.
    """
    here = [Path(name).exists()]                                                           # of each rank
    if dist.is_initialized():
        here *= dist.get_world_size()
        dist.all_gather_object(here, here[0])
    if all(here):
        return str(name)
    if any(here):                 # these ranks would go on alone, and hang in the next collective
        have = [rank for rank, exists in enumerate(here) if exists]
        raise FileNotFoundError(f"{flag} {name}: only ranks {have} have this path; put it on every node")
    from huggingface_hub import snapshot_download

    from support.weights import snapshot
    first, error = int(os.environ.get("LOCAL_RANK", 0)) == 0, None
    # Two turns: a node's first rank downloads; after the barrier, the others find it in the cache.
    for my_turn in (first, not first):
        if my_turn:
            try:
                if repo_type == "model":
                    folder = snapshot(name, local_files_only=not first)
                else:
                    folder = snapshot_download(name, repo_type=repo_type, local_files_only=not first,
                                               allow_patterns=["*.parquet", "*.jsonl"])
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


def finish_step_on_signals():
    """From now on SIGTERM and Ctrl-C only fill the list that this returns; the training loop looks at it once
    a step. A third Ctrl-C interrupts at once."""
    received = []
    first = dist.get_rank() == 0             # now: a signal may come after the group is gone

    def stop_soon(number, _):
        received.append(number)
        if received.count(signal.SIGINT) > 2:             # torchrun passes a Ctrl-C on: it may come twice
            raise KeyboardInterrupt
        if first and len(received) == 1:
            print(f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint", flush=True)

    signal.signal(signal.SIGTERM, stop_soon)
    signal.signal(signal.SIGINT, stop_soon)
    return received


def anyone(flag):
    """True on every rank if `flag` is on any. A collective."""
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextmanager
def all_or_none():
    """Inside, an OSError or a ValueError of one rank becomes a ValueError of all, which so end alike. A
    collective at its end; there must be none inside, since other ranks would wait in it."""
    error, everyone = None, [None] * dist.get_world_size()
    try:
        yield
    except (OSError, ValueError) as found:
        error = found
    dist.all_gather_object(everyone, error and str(error))
    first = next(filter(None, everyone), None)
    if first:
        raise ValueError(first) from error


def agreed(what, value):
    """`value`, which must be the same on every rank: ValueError if it is not. A collective."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if others:
        raise ValueError(f"{what}: {_ranks(others)} read another one than rank 0; put the same on every node")
    return value


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def mistakes_in_one_line(program):
    """Inside, a mistake of the caller ends the program with one line: any OSError, and a ValueError that code
    of this project raises. A library's ValueError keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        innermost, _ = frames[-1]                                        # (frame, line): where it was raised
        raised = Path(innermost.f_code.co_filename).resolve()
        root = Path(__file__).resolve().parents[1]
        ours = root in (raised.parent, raised.parent.parent)             # at the root or in one of its rooms
        if isinstance(error, OSError) or ours:
            sys.exit(f"{_name(program)}: {error}")
        raise


# ----------------------------------------------------------------------------------------------------------
# Hang detection. Every rank has a watch, a thread that looks every 5 s whether its rank is in one phase for
# too long, and whether any rank has written "stop" into the store. The first to find its rank too long writes
# it; so does a rank that fails. Whoever finds it says where it is and where all others are, and exits.

class Place(NamedTuple):
    """What a rank is doing. Ranks enter the same phases in the same order: a lower count is behind."""
    count: int                       # phases entered so far
    name: str
    step: int | None                 # None before the first step
    since: float                     # time.time(), which other machines can compare to theirs


@dataclass
class _Here:
    """Where this process is."""
    place: Place = Place(0, "start", None, time.time())
    since: float = time.monotonic()                  # the same moment by a clock that nobody sets
    limit: float = 60.0 * START_MINUTES              # seconds in one phase
    watched: bool = False
    store: dist.Store | None = None                  # where ranks note their places; None: alone, or gone
    span: torch.profiler.record_function | None = None


_here = _Here()


def phase(name, step=None):
    """From here to the next call this process does `name` (of `step`; None before the first step)."""
    if _here.span is not None:
        _here.span.__exit__(None, None, None)
    _here.place = Place(_here.place.count + 1, name, step, time.time())
    _here.since = time.monotonic()
    _here.span = torch.profiler.record_function(name)                # the phase's range in a profile
    _here.span.__enter__()
    _tell()
    if _here.watched:          # should the watch not get to run (C code that keeps the GIL), this ends us
        faulthandler.dump_traceback_later(_here.limit + 12 * _tick(), exit=True)


def set_timeouts(mesh, minutes):
    """Allow `minutes` to each phase from now on, and a little more to each collective. A collective itself.

    Long at the start, short after the first step. First all ranks meet: none may still wait, by the old
    timeout, for one that already counts by the new one.
    """
    dist.barrier()
    if mesh.device_type == "cuda":
        torch.cuda.synchronize()                     # nor what is queued on the GPU
    for group in (None, *mesh.get_all_groups()):     # None is the default group; torch has no public setter
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes + MARGIN_MINUTES), group)
    _here.limit = 60.0 * minutes
    phase(_here.place.name, _here.place.step)        # the clock starts again, by the new limit


@contextmanager
def hang_watch():
    """Inside, a rank that stays in one phase over the limit, or fails, ends the run on all ranks.

    Each writes one message to stderr, after a hang its stacks too, and exits with 1 within half a minute:
    also those that wait in an nccl collective, where neither the end of another rank nor SIGTERM reaches
    them. (A rank that the kernel kills tells nobody: the others then wait for the limit.) What is raised
    inside is raised again with a note: "srft.py (rank 2): phase 'train' of step 12 for 0:00:03 ...".
    """
    done, _here.watched = threading.Event(), True
    phase("start")
    watch = threading.Thread(target=_watch, args=(done,), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:                   # CheckpointException derives from that
        if not isinstance(error, SystemExit):
            _stop(f"{_name()} failed ({type(error).__name__})")
            error.add_note(f"{_name()}: {whereabouts()}")
        elif error.code:                             # a mistake of the caller, which has its own message
            _stop(f"{_name()} ended with an error")
        raise                                        # and the watch goes on: the way out may hang, too
    done.set()
    watch.join(timeout=10)          # in C code while Python ends, it would abort a process that is done
    _here.watched = False
    faulthandler.cancel_dump_traceback_later()


def whereabouts():
    """One line: this rank's phase, step and time in it; then where all ranks are, those behind first.

        phase 'exchange' of step 12 for 0:30:00. Behind the others: rank 3 in phase 'rollout' of step 12 for
        0:31:00; then ranks 0-2, 4-7 in phase 'exchange' of step 12 for 0:30:07
    """
    here = _describe(_here.place.name, _here.place.step, _here.place.since)
    places = _places()
    if not places:                                   # alone, or the store is gone
        return here
    ranks_at = {}                                    # (count, name, step): the ranks there
    for rank, place in enumerate(places):
        ranks_at.setdefault((place.count, place.name, place.step), []).append(rank)
    if len(ranks_at) == 1:
        return f"{here}, like all ranks"
    parts = []
    for where in sorted(ranks_at, key=itemgetter(0)):                    # by count: those behind first
        _, name, step = where
        since = min(places[rank].since for rank in ranks_at[where])      # of the rank that is longest there
        parts.append(f"{_ranks(ranks_at[where])} in {_describe(name, step, since)}")
    return f"{here}. Behind the others: {'; then '.join(parts)}"


def _describe(name, step, since):
    """-> "phase 'rollout' of step 12 for 0:31:00"."""
    of_step = "" if step is None else f" of step {step}"
    seconds = max(0.0, time.time() - since)          # another machine's clock may be ahead
    return f"phase '{name}'{of_step} for {timedelta(seconds=round(seconds))}"


def _ranks(ranks):
    """[0, 1, 2, 4] -> "ranks 0-2, 4"."""
    runs = []                                        # [first, last] of ranks that follow each other
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}"


def _name(program=None):
    """"srft.py (rank 2)"."""
    rank = os.environ.get("RANK")
    return (program or Path(sys.argv[0]).name) + (f" (rank {rank})" if rank else "")


def _tick():
    """Seconds between two looks of the watch."""
    return min(5.0, _here.limit / 10)


def _ask(question):
    """question(store), or None if there is no store or its server, in torchrun or rank 0, is gone."""
    store = _here.store                              # the watch's thread may set it to None meanwhile
    try:
        return store and question(store)
    except RuntimeError:                             # torch's DistError
        _here.store = None


def _tell():
    """Note this rank's place."""
    _ask(lambda store: store.set(os.environ["RANK"], json.dumps(_here.place)))


def _places():
    """The Place of each rank; [] if they cannot be had."""
    def of_all_ranks(store):
        return store.multi_get([str(rank) for rank in range(int(os.environ["WORLD_SIZE"]))])

    places = []
    for text in _ask(of_all_ranks) or ():
        count, name, step, since = json.loads(text)
        places.append(Place(count, name, step, since))
    return places


def _stop(why):
    """Tell all ranks to end, unless one has told already. Returns the reason that was first."""
    first = _ask(lambda store: store.compare_set("stop", "", why))       # set only if nothing was there
    return first.decode() if first else why


def _watch(done):
    """The watch's thread: wait for this rank to hang, or for another to hang or fail."""
    while not done.wait(_tick()):
        if time.monotonic() - _here.since > _here.limit or _ask(lambda store: store.check(["stop"])):
            why = _stop(f"HANG: {_name()} was in one phase for over {timedelta(seconds=_here.limit)} "
                        "(--hang_minutes; longer until the first step is done)")
            if why.startswith("HANG"):
                faulthandler.dump_traceback(all_threads=True)
            else:                                  # another rank failed, and this one may be about to fail
                time.sleep(3 * _tick())
            print(f"{_name()}: {why}. Here: {whereabouts()}", file=sys.stderr, flush=True)
            time.sleep(3 * _tick())                # all others look, and tell, before torchrun ends them
            os._exit(1)                            # sys.exit would end this thread alone


# ----------------------------------------------------------------------------------------------------------
# A profile of one step.

def start_profiler():
    """A torch profiler that runs: CPU and, where there is one, GPU. phase() names its ranges."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=kinds)
    profiler.start()
    return profiler


def write_profile(profiler, folder):
    """Stop it; write folder/trace-rankN.json.gz and, on rank 0, folder/operators-rank0.txt: the operators
    that took most time themselves."""
    profiler.stop()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"trace-rank{dist.get_rank()}.json.gz"))
    if dist.get_rank() == 0:
        kind = "cuda" if torch.cuda.is_initialized() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=50)
        (folder / "operators-rank0.txt").write_text(table)
