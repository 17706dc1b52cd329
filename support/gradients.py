"""The norm of sharded gradients, and clipping by it.

    norm = clip_gradients(policy.parameters(), 1.0)                # () fp32, of all ranks, before clipping

torch.nn.utils.clip_grad_norm_, but for one thing. On a CPU, where --offload leaves the gradients, torch adds
up the squares of a tensor in fp32. The longer the sum, the more of what is added to it is rounded away: of
545 million numbers, as many as Qwen2.5-7B's embedding has, the norm comes out 10 % too small. So here it is
made of the norms of short pieces.

To copy: this file. It needs torch alone, and parameters that FSDP2 has sharded.
"""
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

PIECE = 2**20                  # numbers; the norm of so many is 1e-5 off on a CPU


def gradient_norm(parameters):
    """The 2-norm of all gradients, () fp32, on the device that holds them. A collective: one sum over the
    ranks, of a number for each tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = []                                                            # of this rank's part of each tensor
    for gradient in gradients:
        norms.append(get_total_norm(gradient.to_local().flatten().split(PIECE)))
    squares = torch.stack(norms) ** 2                                                                 # (T,)
    # With several nodes (HSDP) a gradient is sharded within a node, and the same on all of them.
    for dim, placement in enumerate(gradients[0].placements):
        if placement.is_shard():
            dist.all_reduce(squares, group=gradients[0].device_mesh.get_group(dim))
    return torch.linalg.vector_norm(squares ** 0.5)


def clip_gradients(parameters, limit):
    """Scale all gradients, in place, so that their norm is at most `limit`. Returns the norm before. A
    collective."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    clip_grads_with_norm_(parameters, limit, norm)
    return norm
