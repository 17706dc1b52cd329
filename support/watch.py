"""Where each process of a run is, and what ends all of them when one hangs, fails or is lost.

    with hang_watch():                              # inside, errors name rank and phase
        meet()                                      # before there is a group: in init_distributed
        phase("train", step)                        # what this process does from here on
        set_timeouts(mesh, minutes=30)              # short, once the first step is done

A collective that times out on rank 2 because rank 5 is stuck says nothing about rank 5. So each rank notes
its phase in the group's TCPStore, and has a watch: a thread that looks every 5 s whether this rank is in one
phase for too long, whether all others have written a new sign of life, and whether any rank has written
"stop". The first to find its rank stuck, or another one silent, writes "stop"; so does a rank that fails.
Whoever finds it says where it is and where all others are, and exits: torchrun tears the job down, a
scheduler may start it again. The same phases are the named ranges of a profile (support/profiler.py).

To copy: this file. It needs torch alone.
"""
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

START_MINUTES = 120      # of a phase before the first step is done: a download, a first compilation
JOIN_MINUTES = 10        # until all ranks have given a sign of life: Python's imports, maybe from a cold disk
SILENT_MINUTES = 5       # without a sign of life of a rank, or of the group's store, until it counts as lost
MARGIN_MINUTES = 5       # collectives get more than phases: the watch, which can name a rank, comes first


# ----------------------------------------------------------------------------------------------------------
# What this process knows: its own phase, and the signs of life of all.

class Place(NamedTuple):
    """What a rank is doing. Ranks enter the same phases in the same order: a lower count is behind."""
    count: int                       # phases entered so far
    name: str
    step: int | None                 # None before the first step
    since: float                     # time.time(), which other machines can compare to theirs


class Silence:
    """Signs of life: each rank's is a number that its watch counts up."""

    def __init__(self):
        self.count = 0
        self.heard = time.monotonic()        # when the store last answered
        self.seen = {}                       # rank -> its last sign
        # rank -> looks in a row that brought no new one. Looks, not seconds: this process may itself have
        # been stopped, and then all others would seem silent.
        self.missed = Counter()

    def look(self):
        """Give a sign, and read those of all ranks."""
        if not _here.joined:
            return
        if _here.store is None:              # one answer that took over 5 s is no loss: connect again
            _in_time(lambda: _connect(timedelta(seconds=3)))
        self.count += 1
        sign = f"{self.count} {socket.gethostname()}"
        _ask(lambda store: store.set(f"alive {os.environ['RANK']}", sign))
        for rank, sign in enumerate(_of_all_ranks("alive {}")):
            self.missed[rank] += 1
            if sign != self.seen.get(rank) or sign == b"done":
                self.missed[rank] = 0
            self.seen[rank] = sign
        if _here.store:
            self.heard = time.monotonic()

    def lost(self, seconds):
        """Who has been silent for so long, and on which node; None: nobody."""
        if not _here.joined:                 # alone: there is nobody to hear, and no store
            return None
        looks = seconds / _tick()
        why = "killed, stopped, or the node is lost. Start the run again with --resume"
        text = f"silent for {timedelta(seconds=round(seconds))}: {why}"
        if _here.store is None and time.monotonic() - self.heard >= seconds:
            return f"LOST: node {os.environ['MASTER_ADDR']}, which holds the group's store, is {text}"
        if not self.seen and self.count * _tick() >= 60 * JOIN_MINUTES:
            return f"LOST: {_ranks(_absent())} did not join within {timedelta(minutes=JOIN_MINUTES)}: {why}"
        if max(self.missed.values(), default=0) < looks:
            return None
        silent = {}                          # node -> its ranks
        for rank, sign in self.seen.items():
            if self.missed[rank] >= looks - 2:                 # the ranks of a node do not end at once
                _, node = sign.decode().split(" ", 1)
                silent.setdefault(node, []).append(rank)
        parts = [f"{_ranks(ranks)} on node {node}" for node, ranks in silent.items()]
        return f"LOST: {', '.join(parts)}, {text}"


@dataclass
class _Here:
    """Where this process is."""
    place: Place = Place(0, "start", None, time.time())
    since: float = time.monotonic()                  # the same moment by a clock that nobody sets
    limit: float = 60.0 * START_MINUTES              # seconds in one phase
    watched: bool = False
    signals: list = field(default_factory=list)      # that asked this rank, or any, to stop
    joined: bool = False                             # a group of several, through its store
    store: dist.Store | None = None                  # where ranks note their places; None: alone, or gone
    meetings: int = 0                                # of wait_for_all
    silence: Silence = field(default_factory=Silence)
    span: torch.profiler.record_function | None = None


_here = _Here()


# ----------------------------------------------------------------------------------------------------------
# What a run calls.

def phase(name, step=None):
    """From here to the next call this process does `name` (of `step`; None before the first step)."""
    if _here.span is not None:
        _here.span.__exit__(None, None, None)
    _here.place = Place(_here.place.count + 1, name, step, time.time())
    _start_the_clock()
    _here.span = torch.profiler.record_function(name)                # the phase's range in a profile
    _here.span.__enter__()
    _tell()


def alive():
    """The phase goes on: its time begins anew. For work of many small parts, such as decoding steps."""
    if time.monotonic() - _here.since < min(1.0, _tick()):       # what follows starts a thread
        return
    _here.place = _here.place._replace(since=time.time())
    _start_the_clock()


def _start_the_clock():
    _here.since = time.monotonic()
    if _here.watched:          # should the watch not get to run (C code that keeps the GIL), this ends us
        faulthandler.dump_traceback_later(_here.limit + 12 * _tick(), exit=True)


def meet():
    """Before the group forms: find the other ranks in its store. A node may be lost while it forms."""
    _connect(timedelta(minutes=JOIN_MINUTES))
    _here.joined = True
    _here.silence.look()
    _tell()


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
    them. A rank that was killed or stopped, or whose node is lost, tells nobody: it is missed after
    SILENT_MINUTES. What is raised inside is raised again with a note: "srft.py (rank 2): phase 'train' of
    step 12 for 0:00:03 ...".
    """
    done, _here.watched = threading.Event(), True
    phase("start")
    watch = threading.Thread(target=_watch, args=(done,), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:                   # CheckpointException derives from that
        if not isinstance(error, SystemExit):
            lost = _lost_behind(error)
            _stop(lost or f"{rank_name()} failed ({type(error).__name__})")
            error.add_note(f"{rank_name()}: {whereabouts()}" + (f". {lost}" if lost else ""))
        elif error.code:                             # a mistake of the caller, which has its own message
            _stop(f"{rank_name()} ended with an error")
        raise                                        # and the watch goes on: the way out may hang, too
    done.set()
    _ask(lambda store: store.set(f"alive {os.environ['RANK']}", "done"))
    watch.join(timeout=10)          # in C code while Python ends, it would abort a process that is done
    _here.watched = False
    faulthandler.cancel_dump_traceback_later()


def finish_step_on_signals():
    """From now on SIGTERM, Ctrl-C and the end of the terminal (SIGHUP, but for nohup) only fill the list that
    this returns; the training loop looks at it once a step. So does, inside hang_watch, a signal that another
    rank got: seconds later, at no certain point. A third Ctrl-C interrupts at once."""
    received = _here.signals = []
    first = dist.get_rank() == 0             # now: a signal may come after the group is gone

    def stop_soon(number, _):
        received.append(number)
        if received.count(signal.SIGINT) > 2:             # torchrun passes a Ctrl-C on: it may come twice
            raise KeyboardInterrupt
        if first and len(received) == 1:
            print(f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint", flush=True)

    signal.signal(signal.SIGTERM, stop_soon)
    signal.signal(signal.SIGINT, stop_soon)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:         # nohup has it ignored
        signal.signal(signal.SIGHUP, stop_soon)
    return received


def wait_for_all():
    """Return when all ranks are here, however long that takes: the hang watch of each looks at what it does,
    and finds it where it is stuck or gone. A collective."""
    phase("wait for the others")
    # In the store, not in a barrier, whose timeout cannot tell a rank that works from one that hangs.
    _here.meetings += 1
    key = f"arrived {_here.meetings} {{}}"
    here = key.format(dist.get_rank())
    while _here.joined and not _of_all_ranks(key):
        _ask(lambda store: store.set(here, "yes"))
        alive()
        time.sleep(min(1.0, _tick()))
    dist.barrier()                                    # by now none is far


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


# ----------------------------------------------------------------------------------------------------------
# The watch: its words, the store through which ranks talk, and its thread.

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


def rank_name(program=None):
    """"srft.py (rank 2)"."""
    rank = os.environ.get("RANK")
    return (program or Path(sys.argv[0]).name) + (f" (rank {rank})" if rank else "")


def _tick():
    """Seconds between two looks of the watch."""
    return min(5.0, _here.limit / 10, 6 * SILENT_MINUTES)


def _ask(question):
    """question(store), or None if there is no store or its server, in torchrun or rank 0, is gone."""
    store = _here.store                              # the watch's thread may set it to None meanwhile
    if store is None:
        return None
    answer = _in_time(lambda: question(store))
    if not answer:
        _here.store = None
        return None
    return answer[0]


def _in_time(function, seconds=5.0):
    """[function()], or [] if the store is gone or takes longer than that."""
    answer = []

    def call():
        try:
            answer.append(function())
        except RuntimeError:                         # torch's DistError
            pass

    # A thread, which may be left behind: torch's client waits for ever for a machine that is silent.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer


def _connect(timeout):
    """Make the store's client of the hang watch. The group's own is locked while this rank waits for another
    in it."""
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timedelta(seconds=5))
    _here.store = dist.PrefixStore("phase", store)


def _of_all_ranks(key):
    """The values of `key`, a format of the rank, in the order of ranks; [] while one has none."""
    keys = [key.format(rank) for rank in range(int(os.environ.get("WORLD_SIZE", 1)))]
    # Asked for a key that is not there, the store would wait for it.
    return _ask(lambda store: store.check(keys) and store.multi_get(keys)) or []


def _absent():
    """The ranks that have given no sign of life yet."""
    ranks = range(int(os.environ["WORLD_SIZE"]))
    return [rank for rank in ranks if not _ask(lambda store: store.check([f"alive {rank}"]))]


def _tell():
    """Note this rank's place."""
    _ask(lambda store: store.set(os.environ["RANK"], json.dumps(_here.place)))


def _places():
    """The Place of each rank; [] if they cannot be had."""
    places = []
    for text in _of_all_ranks("{}"):
        count, name, step, since = json.loads(text)
        places.append(Place(count, name, step, since))
    return places


def _told(key):
    """The text that some rank has written for all, or None."""
    text = _ask(lambda store: store.check([key]) and store.get(key))
    return text.decode() if text else None


def _stop(why):
    """Tell all ranks to end, unless one has told already. Returns the reason that was first."""
    first = _ask(lambda store: store.compare_set("stop", "", why))       # set only if nothing was there
    return first.decode() if first else why


def _watch(done):
    """The watch's thread: wait for this rank to hang, or for another to hang, to fail or to be lost."""
    while not done.wait(_tick()):
        _here.silence.look()
        why = _here.silence.lost(60 * SILENT_MINUTES)
        if time.monotonic() - _here.since > _here.limit:
            why = (f"HANG: {rank_name()} was in one phase for over {timedelta(seconds=_here.limit)} "
                   "(--hang_minutes; longer until the first step is done)")
        _share_signals()
        why = _told("stop") or why
        if why:
            why = _stop(why)
            if why.startswith("HANG"):
                faulthandler.dump_traceback(all_threads=True)
            else:                                  # another rank failed, and this one may be about to fail
                time.sleep(3 * _tick())
            print(f"{rank_name()}: {why}. Here: {whereabouts()}", file=sys.stderr, flush=True)
            time.sleep(3 * _tick())                # all others look, and tell, before torchrun ends them
            os._exit(1)                            # sys.exit would end this thread alone


def _lost_behind(error):
    """What Silence.lost says if a rank of another node is behind this rank's `error`, or None. A collective
    fails at once where the system closes a lost rank's connections, and does not say whose they were."""
    several_nodes = _here.joined and os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]
    if not (several_nodes and isinstance(error, RuntimeError)):
        return None
    time.sleep(6 * _tick())
    return _here.silence.lost(seconds=4 * _tick())


def _share_signals():
    """Pass a signal on to all ranks: on a node that is taken away, only its own get one."""
    if _here.signals:
        _ask(lambda store: store.set("signal", str(int(_here.signals[0]))))
        return
    number = _told("signal")
    if number:
        _here.signals.append(int(number))
