"""One optimizer update, srft.backward and srft.update_policy, on a policy of one matrix and no process group.

    pytest tests/test_update.py
"""
import math
import random
from collections import Counter

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import model as M
import srft
from config import Config
from paper import readings
from support.logprobs import token_logprobs
from support.metrics import summarize
from updates import whole_update


class Bigram(torch.nn.Module):
    """A policy whose logits depend on the last token only, and which has nothing to gather or to reduce."""
    set_reshard_after_backward = set_requires_all_reduce = lambda *args, **kwargs: None

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(7, 7, generator=generator))

    def forward(self, batch, temperature=1.0, entropy_grad=False, reference=None):
        hidden = torch.nn.functional.one_hot(batch.ids[0, batch.where], 7).float()
        logp, entropy = token_logprobs(hidden, self.table, batch.targets, temperature,
                                       entropy_grad=entropy_grad)
        return *(pad_sequence(x.split(batch.lengths), batch_first=True) for x in (logp, entropy)), None


def one_update(monkeypatch, sequences, split=1, policy=None, **switches):
    """What update_policy reports of one step on these sequences, by one process without a group."""
    monkeypatch.setattr(srft.dist, "all_reduce", lambda *_: None)
    # Here nothing is sharded.
    monkeypatch.setattr(srft, "clip_gradients", torch.nn.utils.clip_grad_norm_)
    cfg, policy = Config(tis_cap=0.0, grad_clip=1e9, **switches), policy or Bigram()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    micro_batches = [sequences[i::split] for i in range(split)]
    return whole_update(policy, optimizer, micro_batches, sequences, cfg, torch.device("cpu"))


def test_memory_of_freed_activations_is_given_back_before_the_moments_are_made_and_never_again(monkeypatch):
    calls, policy = [], Bigram()
    optimizer = torch.optim.AdamW(policy.parameters())
    monkeypatch.setattr(srft.dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(srft, "clip_gradients", torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(len(optimizer.state)))
    for _ in range(2):
        sequences = step_of_sequences()
        whole_update(policy, optimizer, [sequences], sequences, Config(tis_cap=0.0), torch.device("cpu"))
    assert calls == [0] and optimizer.state


def test_with_several_updates_a_loss_term_is_the_mean_over_those_that_have_its_sequences(monkeypatch):
    sequences = step_of_sequences()                                     # one demonstration, five rollouts
    for term_of in (["loss/sft_demo", "loss/rl_pos"], ["loss/rl_pos"]):
        found = one_update(monkeypatch, [s for s in sequences if not s.is_demo or "loss/sft_demo" in term_of])
        assert [name for name in ("loss/sft_demo", "loss/rl_pos") if name in found] == term_of
    both = one_update(monkeypatch, sequences)
    row = summarize(sequences, 6, Counter(), [both, found], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert row["loss/sft_demo"] == both["loss/sft_demo"]
    assert row["loss/rl_pos"] == (both["loss/rl_pos"] + found["loss/rl_pos"]) / 2


def grad_norm(*args, **kwargs):
    return one_update(*args, **kwargs)["grad_norm"]


def step_of_sequences():
    """Responses of 2 to 7 tokens; that of 5 is the demonstration."""
    rng, sequences = random.Random(0), []

    def tokens(n):
        return [rng.randrange(7) for _ in range(n)]

    for n in (2, 3, 4, 5, 6, 7):
        sequences.append(M.Sequence(tokens(3), tokens(n), is_demo=n == 5,
                                    reward=float(n % 2), advantage=rng.gauss(0, 1),
                                    engine_logp=None if n == 5 else [0.0] * n))
    return sequences


@pytest.mark.parametrize("norm, expected", [("sequence", (1, 5)), ("constant", (1, 5)), ("token", (5, 22))])
def test_the_steps_counts_are_in_sequences_or_for_the_token_norm_in_response_tokens(norm, expected):
    cfg, sequences = Config(loss_norm=norm), step_of_sequences()
    asked, = readings.before_update(None, [sequences], sequences, cfg, "cpu")
    inputs = readings.Inputs(*[None] * 6, n_demo=1, n_rollout=5, **asked)
    assert readings.counts(inputs, cfg) == expected


@pytest.mark.parametrize("level", ["sequence", "token", "batch"])
@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_one_update_does_not_depend_on_how_the_step_is_split_into_micro_batches(monkeypatch, level, norm):
    whole, parts = (grad_norm(monkeypatch, step_of_sequences(), split, entropy_level=level, loss_norm=norm)
                    for split in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-5)


class Sick(Bigram):
    """A policy whose log-prob is nan at one token: the first of the sequence that has `length` of them."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, batch, *args, **kwargs):
        logp, *others = super().forward(batch, *args, **kwargs)
        bad = torch.tensor([[n == self.length] for n in batch.lengths]) & (torch.arange(logp.shape[1]) == 0)
        return logp * torch.where(bad, math.nan, 1.0), *others


@pytest.mark.parametrize("length", [3, 5])                           # a rollout; the demonstration
def test_log_probs_of_the_trainer_that_are_not_finite_end_in_a_skipped_update_and_are_not_the_engines_fault(
        monkeypatch, length):
    found = one_update(monkeypatch, step_of_sequences(), policy=Sick(length))
    sound = one_update(monkeypatch, step_of_sequences())
    assert math.isnan(found["grad_norm"])
    assert found["engine/logp_diff_rank"] == pytest.approx(sound["engine/logp_diff_mean"], rel=0.3)


def test_an_engine_whose_log_probs_are_nan_is_seen_and_the_worst_rank_is_not_lost_in_the_mean(monkeypatch):
    sequences = step_of_sequences()
    for s in sequences[3:]:
        s.engine = 1            # the second rank's: one demonstration, two rollouts of 6 and 7 tokens
    even = one_update(monkeypatch, sequences)
    for s in sequences[4:]:
        s.engine_logp = [-30.0] * len(s.response)
    found = one_update(monkeypatch, sequences)
    assert 20 < found["engine/logp_diff_rank"] < 30
    assert found["engine/logp_diff_mean"] < 0.7 * found["engine/logp_diff_rank"]
    assert even["engine/logp_diff_mean"] <= even["engine/logp_diff_rank"] < 5
    sequences[5].engine_logp = [math.nan] * 7
    assert math.isnan(one_update(monkeypatch, sequences)["engine/logp_diff_rank"])


@pytest.mark.parametrize("level", ["sequence", "token", "batch"])
def test_an_entropy_bonus_changes_the_update(monkeypatch, level):
    with_bonus, without = (grad_norm(monkeypatch, step_of_sequences(), entropy_level=level, entropy_coef=c)
                           for c in (9.0, 0.0))
    assert with_bonus != pytest.approx(without, rel=1e-3)
