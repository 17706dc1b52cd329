"""paper/baselines.py against an oracle in plain Python floats, one token at a time, gradients by hand; and
token_kl.

    pytest tests/test_baselines.py
"""
import math

import numpy as np
import pytest
import torch

from config import METHODS, Config, check_config, parse_args, sequences_per_prompt
from paper.baselines import LOSSES, Objective, grpo_loss, luffy_loss
from paper.readings import Inputs
from srft import learning_rate
from support.logprobs import token_kl
from test_loss import assert_equal, counts, mixed_batch, shipped, tensors

TERMS = {"sft": ["loss/sft"],
         "sft_kl": ["loss/sft", "loss/kl"],
         "grpo": ["loss/rl"],
         "sft+rl": ["loss/sft", "loss/rl"],
         "luffy": ["loss/rl", "loss/rl_demo"]}


def surrogate(lp, lp_old, advantage, eps):
    """min{r A, clip(r) A} and its derivative in log pi, by the four cases of Eq. 3."""
    r = math.exp(lp - lp_old)
    if advantage > 0 and r > 1 + eps:
        return (1 + eps) * advantage, 0.0
    if advantage < 0 and r < 1 - eps:
        return (1 - eps) * advantage, 0.0
    return r * advantage, r * advantage


def oracle(method, batch, cfg, n_demo, n_rollout, old=False, tis=False, floor=0.0):
    """(loss, stats, d/dlogp, d/dH, d/dKL) of one method; the gradients as one list a sequence."""
    stats, gradients, n_all = dict.fromkeys(TERMS[method], 0.0), ([], [], []), n_demo + n_rollout
    for s in batch:
        rows = [[], [], []]
        for t, lp in enumerate(s.logp):
            norms = {"sequence": len(s.logp), "token": 1, "constant": cfg.max_response_tokens}
            share = 1 / norms[cfg.loss_norm]
            dlp = dkl = 0.0
            if s.is_demo and method in ("sft", "sft_kl", "sft+rl"):                    # Eq. 1
                stats["loss/sft"] += share / n_demo * -lp
                dlp = -share / n_demo
            if s.is_demo and method == "sft_kl":                                                 # Eq. A1
                stats["loss/kl"] += share / n_demo * cfg.kl_coef * s.kl[t]
                dkl = share / n_demo * cfg.kl_coef
            if s.is_demo and method == "luffy":
                p, gamma = math.exp(lp), cfg.demo_shaping
                stats["loss/rl_demo"] += -share / n_all * s.advantage * p / (p + gamma)
                dlp = -share / n_all * s.advantage * p * gamma / (p + gamma)**2
            if not s.is_demo and method not in ("sft", "sft_kl"):                                # Eq. 3
                value, slope = surrogate(lp, s.logp_old[t] if old else lp, s.advantage, cfg.clip_eps)
                c = share / (n_all if method == "luffy" else n_rollout) * (s.tis[t] if tis else 1.0)
                stats["loss/rl"] += -c * value
                dlp = -c * slope if s.entropy[t] >= floor else 0.0                               # App. A.2
            for row, d in zip(rows, (dlp, 0.0, dkl)):
                row.append(d)
        for gradient, row in zip(gradients, rows):
            gradient.append(row)
    return sum(stats.values()), stats, *gradients


@pytest.mark.parametrize("old", [False, True], ids=["pi_old=pi", "logp_old"])
@pytest.mark.parametrize("tis", [False, True], ids=["no-tis", "tis"])
@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("method", TERMS)
def test_every_loss_and_its_gradient_equal_the_equations(method, norm, tis, old):
    cfg = Config(**{"max_response_tokens": 11, "loss_norm": norm, "method": method} | METHODS[method].flags)
    for seed in range(3):
        batch = mixed_batch(seed)
        n = counts(batch, cfg, more=5)                                         # a part of a larger step
        found = shipped(tensors(batch, padding=math.nan), cfg, *n, old=old, tis=tis, loss=LOSSES[method])
        assert_equal(found, oracle(method, batch, cfg, *n, old=old, tis=tis))


@pytest.mark.parametrize("method", ["grpo", "sft+rl"])
def test_tokens_below_the_entropy_floor_keep_their_value_and_lose_their_gradient(method):
    cfg, batch = Config(), mixed_batch(1)
    n = counts(batch, cfg)
    found = shipped(tensors(batch), cfg, *n, old=True, loss=LOSSES[method], entropy_floor=1.2)
    assert_equal(found, oracle(method, batch, cfg, *n, old=True, floor=1.2))
    whole = shipped(tensors(batch), cfg, *n, old=True, loss=LOSSES[method])
    assert found[0] == whole[0] and not torch.equal(found[2], whole[2])


def test_both_sides_of_the_clip_are_met_by_the_random_batches():
    clipped = {side: 0 for side in ("above", "below")}
    for s in (s for seed in range(3) for s in mixed_batch(seed) if not s.is_demo):
        for lp, old in zip(s.logp, s.logp_old):
            clipped["above"] += s.advantage > 0 and lp - old > math.log(1.2)
            clipped["below"] += s.advantage < 0 and lp - old < math.log(0.8)
    assert min(clipped.values()) > 3


@pytest.mark.parametrize("is_demo", [True, False])
def test_an_update_of_relift_is_sft_on_demonstrations_or_grpo_on_rollouts(is_demo):
    cfg, batch = Config(method="relift"), [s for s in mixed_batch(2) if s.is_demo == is_demo]
    n = counts(batch, cfg)
    alone = LOSSES["sft" if is_demo else "grpo"]
    found = shipped(tensors(batch), cfg, *n, loss=LOSSES["relift"])
    assert str(found) == str(shipped(tensors(batch), cfg, *n, loss=alone))


@pytest.mark.parametrize("method", TERMS)
@pytest.mark.parametrize("is_demo", [True, False])
def test_a_micro_batch_of_one_kind_only_is_no_nan(method, is_demo):
    batch = [s for s in mixed_batch(3) if s.is_demo == is_demo]
    cfg = Config(**METHODS[method].flags)
    n = counts(batch, cfg, more=2)                               # the others are in other micro-batches
    found = shipped(tensors(batch), cfg, *n, loss=LOSSES[method])
    assert math.isfinite(found[0]) and all(d.isfinite().all() for d in found[2:])


@pytest.mark.parametrize("method", METHODS)
def test_a_misspelled_argument_of_a_loss_is_an_error(method):
    with pytest.raises(TypeError, match="tiss"):
        Objective(Config(method=method))(logp=torch.ones(1, 2), tiss=torch.ones(1, 2))


def one_sequence(logp, is_demo, **more):
    """Inputs of one response with reward and advantage 1."""
    one = torch.ones(1)
    return Inputs(logp, logp.detach(), torch.ones_like(logp), one, one, torch.tensor([is_demo]),
                  n_demo=int(is_demo), n_rollout=int(not is_demo), **more)


def test_luffy_without_shaping_still_learns_from_demonstrations():
    """gamma 0 means the plain ratio p of Eq. 10, not p/p."""
    logp = torch.tensor([[0.2, 0.9]]).log().requires_grad_()
    terms, _ = luffy_loss(one_sequence(logp, is_demo=True), Config(method="luffy"))
    sum(terms.values()).backward()
    torch.testing.assert_close(logp.grad, -torch.tensor([[0.2, 0.9]]) / 2)


def test_the_clipped_surrogate_worked_out_by_hand():
    """One rollout of two tokens, A = 1: ratios 1.5, cut to 1.2, and 0.5, which the minimum leaves alone."""
    logp = torch.tensor([[1.5, 0.5]]).log()
    terms, _ = grpo_loss(one_sequence(logp, is_demo=False, logp_old=torch.zeros(1, 2)), Config())
    assert {name: term.item() for name, term in terms.items()} == {"rl": pytest.approx(-(1.2 + 0.5) / 2)}


# ----------------------------------------------------------------------------------------------------------
# The full-vocabulary KL of A1.

def kl_inputs(n=13, v=37, d=5, ref_d=7, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    return draw(n, d), draw(v, d), draw(n, ref_d), draw(v, ref_d), draw(n)


@pytest.mark.parametrize("chunk", [1, 5, 13, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_and_its_gradients_equal_the_definition_whatever_the_chunk(chunk, temperature):
    hidden, weight, ref_hidden, ref_weight, grad = kl_inputs()
    mine = [x.clone().requires_grad_() for x in (hidden, weight)]
    kl = token_kl(*mine, ref_hidden, ref_weight, temperature, chunk)
    (kl * grad).sum().backward()

    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    log_p = (exact[0] @ exact[1].T / temperature).log_softmax(-1)
    log_q = (ref_hidden.double() @ ref_weight.double().T / temperature).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    (expected * grad.double()).sum().backward()
    torch.testing.assert_close(kl.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(mine, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


def test_the_kl_to_itself_is_0_with_gradient_0():
    hidden, weight, *_ = kl_inputs()
    hidden.requires_grad_()
    kl = token_kl(hidden, weight, hidden.detach(), weight)
    kl.sum().backward()
    assert kl.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-5


def test_the_kl_of_no_token_is_empty():
    hidden, weight, ref_hidden, ref_weight, _ = kl_inputs(n=0)
    weight.requires_grad_()
    kl = token_kl(hidden, weight, ref_hidden, ref_weight)
    kl.sum().backward()
    assert kl.shape == (0,) and weight.grad.eq(0).all()


# ----------------------------------------------------------------------------------------------------------
# The command line.

def test_methods_of_the_command_line_and_objectives_are_the_same():
    assert set(METHODS) == set(LOSSES) and Config().method == "srft"


def test_a_method_brings_the_papers_flags_which_presets_and_flags_override():
    sft = parse_args(["--method", "sft"])
    assert (sft.lr, sft.lr_schedule, sft.warmup, sft.steps) == (5e-6, "linear", 0.1, 1078)
    assert parse_args(["--method", "sft_kl"]).kl_coef == 0.2
    assert parse_args(["--method", "sft", "--preset", "tiny"]).lr == 3e-4
    assert parse_args(["--method", "sft", "--preset", "tiny", "--lr", "1"]).lr == 1
    luffy = parse_args(["--method", "luffy"])
    assert (luffy.demo_shaping, sequences_per_prompt(luffy)) == (0.1, (7, 1))
    assert {name: sequences_per_prompt(parse_args(["--method", name])) for name in METHODS} == {
        "srft": (8, 1), "sft": (0, 1), "sft_kl": (0, 1), "grpo": (8, 0), "sft+rl": (8, 1),
        "luffy": (7, 1), "relift": (8, 0)}


@pytest.mark.parametrize("flags, says", [
    (["--method", "grpo", "--w_sft", "one"], "--w_sft has no part in --method grpo"),
    (["--method", "sft", "--kl_coef", "0.1"], "--kl_coef has no part in --method sft"),
    (["--method", "srft", "--entropy_floor", "0.1"], "--entropy_floor has no part in --method srft"),
    (["--method", "luffy", "--entropy_quantile", "0.8"], "--entropy_quantile has no part in --method luffy"),
    (["--method", "grpo", "--entropy_floor", "0.1", "--entropy_quantile", "0.8"], "not both"),
    (["--method", "grpo", "--entropy_quantile", "1"], "--entropy_quantile"),
    (["--method", "sft_kl", "--kl_coef", "0"], "needs --kl_coef"),
    (["--method", "sft", "--warmup", "1"], "--warmup"),
    (["--warmup", "0.2"], "--warmup needs --lr_schedule linear"),
    (["--reference", "tiny"], "--reference needs --kl_coef"),
    (["--terms", "sft_demo,rl"], "--terms sft_demo,rl: separate by commas some of sft_demo, rl_demo, rl_pos"),
    (["--method", "grpo", "--terms", "rl_pos"], "--terms has no part in --method grpo"),
])
def test_a_flag_that_a_method_does_not_heed_is_refused(flags, says):
    with pytest.raises(ValueError, match=says):
        check_config(parse_args(["--preset", "tiny", *flags]), world=1, window=512)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_s_own_defaults_are_accepted(method):
    check_config(parse_args(["--preset", "tiny", "--method", method]), world=2, window=512)


def test_a_linear_schedule_rises_for_a_tenth_of_the_steps_and_falls_to_0():
    cfg = Config(lr=2.0, lr_schedule="linear", steps=100)
    rates = [learning_rate(cfg, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)]) and rates[-1] == pytest.approx(2 / 90)
    assert np.diff(rates[10:]) == pytest.approx([-2 / 90] * 89)
    assert learning_rate(Config(lr=3.0), 7) == 3.0
