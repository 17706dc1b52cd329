"""support/gradients.py: the norm of gradients on a CPU, where torch's own loses what is small beside its sum.

    pytest tests/test_gradients.py            # shards of two ranks, of nodes, offloaded: test_distributed.py
"""
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from support.gradients import PIECE, clip_gradients, gradient_norm


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def parameters(mesh, *gradients):
    found = []
    for gradient in gradients:
        p = torch.nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, [Shard(0)]))
        p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        found.append(p)
    return found


def test_of_seventy_million_numbers_none_is_lost(mesh):
    """As many as a rank of eight has of Qwen2.5-7B's embedding; their sum of squares in fp32 is 1 % short."""
    gradient = torch.randn(68_000, 1000, generator=torch.Generator().manual_seed(0))
    exact = math.sqrt(sum(rows.double().square().sum().item() for rows in gradient.split(1000)))
    assert gradient_norm(parameters(mesh, gradient)).item() == pytest.approx(exact, rel=3e-5)


def test_it_is_that_of_all_tensors_and_a_frozen_one_has_none(mesh):
    frozen = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    several = parameters(mesh, torch.full((PIECE + 5,), 2.0), torch.tensor([[3.0, 4.0]]), torch.zeros(0, 2))
    expected = math.sqrt(4 * (PIECE + 5) + 25)
    assert gradient_norm([*several, frozen]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("limit, left", [(1.0, 1.0), (6.0, 5.0), (math.inf, 5.0)])
def test_gradients_over_the_limit_are_scaled_to_it_and_others_stay(limit, left, mesh):
    several = parameters(mesh, torch.tensor([3.0]), torch.tensor([[0.0], [4.0]]))
    assert clip_gradients(iter(several), limit).item() == 5.0
    assert gradient_norm(several).item() == pytest.approx(left, rel=1e-5)
    assert several[0].grad.to_local().item() == pytest.approx(3 * left / 5, rel=1e-5)


def test_small_tensors_get_the_very_bits_of_torchs_own(mesh):
    torch.manual_seed(0)
    gradients = [torch.randn(n, 7) for n in (1, 30, 500)]
    ours, torchs = parameters(mesh, *gradients), parameters(mesh, *gradients)
    expected = torch.nn.utils.clip_grad_norm_(torchs, 1.0).full_tensor()
    assert torch.equal(clip_gradients(ours, 1.0), expected)
    for a, b in zip(ours, torchs):
        assert torch.equal(a.grad.to_local(), b.grad.to_local())


def test_a_gradient_that_is_not_finite_makes_a_norm_that_is_not(mesh):
    assert gradient_norm(parameters(mesh, torch.tensor([1.0, math.nan]))).isnan()
    assert gradient_norm(parameters(mesh, torch.tensor([1.0, math.inf]))).isinf()
