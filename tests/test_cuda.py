"""The CUDA path, as far as a machine without a GPU can hold it: fake tensors that claim to lie on one, and
the schemas of its operators.

    pytest tests/test_cuda.py

A fake tensor has a shape and no data: whatever asks for a value, an index by a mask or an `if` on a tensor,
is an error here and a wait for the device there. What the values are, bench/gpu.py checks on a card.
"""
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import model as M
import srft
from bench import plan
from config import METHODS, TINY, parse_args
from ranks import made_up_sequences
from support.device import to_device
from support.logprobs import _addmm_fp32


@contextmanager
def fake_gpu(method, *flags):
    """(policy, its srft.backward_micro_batch of sequences, the list of its device reads), on fake tensors."""
    reads, cfg = [], parse_args(["--preset", "tiny", "--method", method, *flags])

    def tolist(tensor):
        reads.append(tensor.numel())
        return [0.0] * tensor.numel()

    def read(tensor, *_):
        reads.append(f"{tensor.numel()} by cpu() or item()")
        return tensor

    config = M.load_config(TINY)
    with (plan.simulated_gpus(1, 1) as mesh, mock.patch.object(FakeTensor, "tolist", tolist, create=True),
          mock.patch.object(FakeTensor, "cpu", read, create=True),
          mock.patch.object(FakeTensor, "item", read, create=True)):
        device = torch.device("cpu")
        policy, reference = M.build_policy(config, mesh, device, bf16=True), None
        if cfg.kl_coef:
            reference = M.build_policy(config, mesh, device, bf16=True).requires_grad_(False)

        def micro_batch(sequences, **asked):
            return srft.backward_micro_batch(srft.load_objective(cfg), policy, sequences, asked, 2, 4,
                                             reference, cfg, device)

        yield policy, micro_batch, reads


@pytest.mark.parametrize("flags", [
    *[[method] for method in METHODS], ["srft", "--kl_coef", "0.1"],
    ["srft", "--entropy_coef", "0.1", "--entropy_level", "token"], ["srft", "--tis_cap", "0"],
    ["srft", "--demo_shaping", "0.1", "--eq12_form", "ratio"], ["grpo", "--entropy_floor", "0.1"]],
    ids=" ".join)
def test_a_micro_batch_reads_the_device_once_whatever_the_method(flags):
    with fake_gpu(*flags) as (policy, micro_batch, reads):
        found = micro_batch(made_up_sequences()[:6])
        assert len(reads) == 1 and all(p.grad is not None for p in policy.parameters())
    assert found.counts["entropy/demo"] == 1 and found.counts["entropy/rollout"] == 5
    assert found.losses and found.tokens.total() > 0


def test_a_micro_batch_of_a_later_update_and_one_without_work_wait_for_nothing_either():
    flags = ["--updates_per_rollout", "2", "--entropy_level", "batch"]
    with fake_gpu("srft", *flags) as (_, micro_batch, reads):
        sequences = made_up_sequences()[:6]
        shape = len(sequences), max(len(s.response) for s in sequences)
        micro_batch(sequences, logp_old=torch.zeros(shape), update_entropy=torch.zeros(shape[0]))
        assert len(reads) == 1
        micro_batch([])
        assert len(reads) == 1


def test_what_goes_to_a_gpu_goes_from_pinned_memory_and_nobody_waits_for_it(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: steps.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to",
                        lambda self, *args, **kwargs: steps.append((args, kwargs)) or self)
    to_device([1, 2], torch.device("cuda", 3))
    assert steps == ["pin", ((torch.device("cuda", 3),), {"non_blocking": True})]
    steps.clear()
    to_device([1, 2], torch.device("cpu"))
    assert [step[0] for step in steps] == [(torch.device("cpu"),)]     # pageable memory: there is no other


class Operators(TorchDispatchMode):
    """Writes down the operators that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.setdefault(func.name(), []).append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_on_a_gpu_attention_is_one_call_of_the_flash_kernel_causal_and_within_each_sequence(kv_heads):
    with plan.simulated_gpus(1, 1), Operators() as seen:
        q, k, v = (torch.zeros(1, heads, 12, 16, dtype=torch.bfloat16, requires_grad=True)
                   for heads in (4, kv_heads, kv_heads))
        where = torch.tensor([0, 5, 12], dtype=torch.int32)
        out, _ = M.packed_attention(None, q, k, v, None, 0.3, cu_seq_lens_q=where, max_length_q=7)
        out.float().sum().backward()
        assert out.shape == (1, 12, 4, 16) and out.dtype == torch.bfloat16
        assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    (forward,), (_,) = seen.calls["torch_attn::_varlen_attn"], seen.calls["torch_attn::_varlen_attn_backward"]
    query, key, value, cu_q, cu_k, max_q, max_k, causal, scale, window = forward[:10]
    assert cu_q is where and cu_k is where and (max_q, max_k) == (7, 7)
    assert causal and scale == 0.3 and window == [-1, 0]


def test_the_heads_products_are_operators_that_torch_has_with_an_fp32_result_written_in_place():
    for name, before in (("mm", ["self", "mat2"]), ("addmm", ["self", "mat1", "mat2"])):
        schema = getattr(torch.ops.aten, name).dtype_out._schema
        names = [argument.name for argument in schema.arguments]
        assert names[:len(before) + 1] == [*before, "out_dtype"] and names[-1] == "out", schema
        assert {"mm": set(), "addmm": {"beta", "alpha"}}[name] <= set(names)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot fake addmm with out_dtype")
@pytest.mark.parametrize("beta, alpha, operator", [
    (0, 1, "aten::mm.dtype_out"), (0, 0.5, "aten::mm.dtype_out"), (1, 1, "aten::addmm.dtype_out")])
def test_a_product_of_bf16_is_written_into_the_fp32_block_itself(beta, alpha, operator):
    with FakeTensorMode(), mock.patch.object(FakeTensor, "is_cuda", True), Operators() as seen:
        left, right = torch.zeros(5, 3, dtype=torch.bfloat16), torch.zeros(3, 7, dtype=torch.bfloat16)
        _addmm_fp32(torch.zeros(5, 7), left, right, beta=beta, alpha=alpha)
    assert operator in seen.calls and "aten::_to_copy" not in seen.calls
