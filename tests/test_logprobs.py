"""support/logprobs.py: log-probs, entropies and their gradients against plain float64 formulas; memory.

    pytest tests/test_logprobs.py

The KL of the same file is tested in test_baselines.py, with the one objective that needs it.
"""
import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from support.logprobs import _ChunkedLogProbs, token_logprobs

CPU = torch.device("cpu")


def head_inputs(n=37, width=16, vocab=1003, dtype=torch.float32):
    """hidden (n, width), weight (vocab, width), targets (n,), and two weights of a loss for each token."""
    g = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=g).to(dtype)
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    targets = torch.randint(vocab, (n,), generator=g)
    return hidden, weight, targets, torch.randn(n, generator=g), torch.randn(n, generator=g)


def plain_head(hidden, weight, targets, temperature):
    """(log-probs, entropies) in float64 by log_softmax of the whole (N, V)."""
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def head_gradients(function, hidden, weight, targets, a, b, **kwargs):
    """(log-probs, entropies, d/d hidden, d/d weight) of sum(a logp) + sum(b H); the entropy only where it has
    a gradient."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = function(hidden, weight, targets, **kwargs)
    loss = (a.to(logp.dtype) * logp).sum()
    if entropy.requires_grad and b is not None:
        loss = loss + (b.to(logp.dtype) * entropy).sum()
    loss.backward()
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_log_probs_entropies_and_gradients_equal_a_plain_log_softmax_for_any_chunk(
        temperature, chunk, entropy_grad):
    hidden, weight, targets, a, b = head_inputs()
    got = head_gradients(token_logprobs, hidden, weight, targets, a, b, temperature=temperature, chunk=chunk,
                         entropy_grad=entropy_grad)
    expected = head_gradients(plain_head, hidden.double(), weight.double(), targets, a,
                              b if entropy_grad else 0 * b, temperature=temperature)
    for x, y in zip(got, expected):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, atol=5e-5, rtol=2e-5)


def test_the_entropy_has_a_gradient_only_on_request():
    hidden, weight, targets, *_ = head_inputs()
    hidden.requires_grad_()
    assert not token_logprobs(hidden, weight, targets)[1].requires_grad
    assert token_logprobs(hidden, weight, targets, entropy_grad=True)[1].requires_grad


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient(grads):
    hidden, weight, targets, a, _ = head_inputs()
    hidden.requires_grad_(grads[0]), weight.requires_grad_(grads[1])
    (token_logprobs(hidden, weight, targets, chunk=5)[0] * a).sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == grads


def test_no_tokens_give_no_log_probs_and_zero_gradients():
    got = head_gradients(token_logprobs, *head_inputs(n=0), chunk=8)
    assert got[0].shape == got[1].shape == (0,) and got[2].shape == (0, 16) and got[3].eq(0).all()


def test_extreme_logits_stay_finite():
    hidden, head = torch.tensor([[300.0], [-300.0], [0.0]]), torch.tensor([[1.0], [-1.0]])
    logp, entropy, *grads = head_gradients(token_logprobs, hidden, head, torch.tensor([0, 0, 0]),
                                           torch.ones(3), torch.ones(3), entropy_grad=True)
    assert logp.tolist() == pytest.approx([0, -600, -np.log(2)], abs=1e-5)
    assert entropy.tolist() == pytest.approx([0, 0, np.log(2)], abs=1e-5)
    assert all(g.isfinite().all() for g in grads)


def test_in_bf16_the_head_s_gradient_is_as_exact_in_many_chunks_as_in_one():
    inputs = head_inputs(n=1024, dtype=torch.bfloat16)
    hidden, weight, targets, a, _ = inputs
    exact = head_gradients(plain_head, hidden.double(), weight.double(), targets, a.double(),
                           torch.zeros(1024), temperature=1.0)[3]

    def error(chunk):
        return (head_gradients(token_logprobs, *inputs, chunk=chunk)[3].double() - exact).norm()

    assert error(8) <= 1.05 * error(1024)


def peak_bytes(n, vocab, dtype=torch.float32, width=16, **kwargs):
    """Most bytes of tensors alive at once in forward and backward, less the gradients (that of the head in
    fp32) and inputs."""
    inputs = head_inputs(n, width, vocab, dtype)
    with MemTracker() as tracker:
        head_gradients(token_logprobs, *inputs, **kwargs)
    copies = sum(x.nbytes for x in inputs[:2])                           # head_gradients clones the inputs
    gradients = inputs[0].nbytes + 4 * vocab * width
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"] - copies - gradients


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_two_blocks_of_a_chunk_by_the_vocabulary_whatever_the_number_of_tokens(entropy_grad, dtype):
    block, vocab = 4 * 16 * 10_007, 10_007
    few, many = (peak_bytes(n, vocab, dtype, width=4, chunk=16, entropy_grad=entropy_grad) for n in (48, 160))
    blocks = 2.1 if dtype == torch.float32 else 4.1           # bf16 on a CPU: operands are copied to fp32
    assert few < blocks * block
    assert many < few + 0.1 * block                                      # (160, vocab) would be 10 blocks


@pytest.mark.parametrize("vocab", [2_000, 32_000, 151_936, 600_000])
def test_the_default_chunk_keeps_the_two_blocks_under_1_gib_and_is_at_most_1024_tokens(monkeypatch, vocab):
    seen = []
    monkeypatch.setattr(_ChunkedLogProbs, "apply", lambda *args: seen.append(args[4]))
    token_logprobs(None, torch.empty(vocab, 1), None)
    assert seen[0] == 1024 or 2**29 < 2 * 4 * (seen[0] + 128) * vocab and 2 * 4 * seen[0] * vocab <= 2**30
    assert 128 <= seen[0] <= 1024 and seen[0] % 128 == 0                 # whole tiles of the GPU's products
