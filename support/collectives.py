"""What all ranks answer together, so that they all decide alike.

    everyone = of_all_ranks(value)               # a list, in the order of ranks
    stop = anyone(bool(stopping))
    with all_or_none(): ...                      # an error of one rank becomes an error of all
    agreed("--data", digest)                     # ValueError, on all ranks, if theirs differ
    rows = from_rank_0(download)                 # of one rank that asks for all

Each is a collective: every rank must call it. A rank that raises or stops alone would leave the others
waiting in their next collective.

To copy: this file. It needs torch alone.
"""
from contextlib import contextmanager

import torch
import torch.distributed as dist


def of_all_ranks(value):
    """The `value` of each rank, in the order of ranks; [value] where there is no group. value: anything that
    can be pickled."""
    everyone = [value]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, value)
    return everyone


def anyone(flag):
    """True on every rank if `flag` is on any."""
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextmanager
def all_or_none():
    """Inside, an OSError or a ValueError of one rank becomes a ValueError of all, which so end alike. The
    collective is at its end; there must be none inside, since other ranks would wait in it."""
    error = None
    try:
        yield
    except (OSError, ValueError) as found:
        error = found
    said = error and (str(error) or repr(error))          # an error without words is one, too
    first = next(filter(None, of_all_ranks(said)), None)
    if first:
        raise ValueError(first) from error


def agreed(what, value):
    """Raise ValueError, on all ranks, unless `value` is the same on every rank. what: what to call it."""
    everyone = of_all_ranks(value)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if others:
        raise ValueError(f"{what}: ranks {others} read another one than rank 0; put the same on every node")


def from_rank_0(make):
    """What `make()` returns on rank 0, on every rank; the others do not call it. Its OSError or ValueError is
    one of all."""
    box = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box[0] = make()
        except (OSError, ValueError) as error:
            box[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
