"""The objective, srft.srft_loss and the switchable one of paper/readings.py, against an oracle in plain
Python floats, one token at a time, from Eq. 7-13 of the paper.

    pytest tests/test_loss.py

The oracle also differentiates by hand: d loss / d log pi and d loss / d H of each token, without autograd.
"""
import inspect
import math
import random
from types import SimpleNamespace

import pytest
import torch

import srft
from config import Config
from paper import readings
from srft import group_advantage, srft_loss

TERMS = ("loss/sft_demo", "loss/rl_demo", "loss/rl_pos", "loss/rl_neg")
INPUTS = ("logp", "entropy", "mask", "reward", "advantage", "is_demo")


# ----------------------------------------------------------------------------------------------------------
# The oracle. A sequence is a namespace of Python numbers and lists; a batch is a list of them.

def eq7(rewards, use_std=True):
    """The advantages of one group."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (std + 1e-6) if use_std else r - mean for r in rewards]


def mean_or_0(values):
    return sum(values) / len(values) if values else 0.0


def counts_in(cfg, term):
    return cfg.terms == "all" or term in cfg.terms.split(",")


def oracle(batch, cfg, n_demo, n_rollout, old=False, tis=False):
    """(loss, stats, d/dlogp, d/dH, d/dKL) of Eq. 13; the gradients as one list a sequence."""
    stats = dict.fromkeys(TERMS[:2], 0.0) if n_demo else {}       # no term of what the update has none of
    if n_rollout:
        stats |= dict.fromkeys(TERMS[2:], 0.0)
        if cfg.entropy_coef:
            stats["loss/entropy"] = 0.0
        if cfg.kl_coef:
            stats["loss/kl"] = 0.0
    d_logp, d_entropy, d_kl, weights = [], [], [], {"w_sft": [], "w_rl": []}
    batch_h = {}                                       # of the demonstrations (True), of the rollouts (False)
    for kind in (True, False):
        batch_h[kind] = mean_or_0([mean_or_0(s.entropy) for s in batch if s.is_demo == kind])
    for s in batch:
        d_logp.append([]), d_entropy.append([]), d_kl.append([])
        step_n = max(n_demo if s.is_demo else n_rollout, 1)
        name, scale, sign = ("w_sft", 0.5, cfg.w_sft_sign) if s.is_demo else ("w_rl", 0.1, 1)
        token_weights = []
        for t, lp in enumerate(s.logp):
            norms = {"sequence": len(s.logp), "token": 1, "constant": cfg.max_response_tokens}
            share = 1 / step_n / norms[cfg.loss_norm]
            levels = {"sequence": mean_or_0(s.entropy), "token": s.entropy[t], "batch": batch_h[s.is_demo]}
            h = levels[cfg.entropy_level]
            w = {"entropy": scale * math.exp(sign * h), "one": 1.0, "constant": scale}[getattr(cfg, name)]
            token_weights.append(w)
            dlp = dh = dkl = 0.0
            if s.is_demo:
                imitated = counts_in(cfg, "sft_demo") and (cfg.imitate_wrong or s.reward > 0)
                compared = counts_in(cfg, "rl_demo")
                stats["loss/sft_demo"] += imitated * share * w * -lp                               # Eq. 8
                p, gamma = math.exp(lp), cfg.demo_shaping
                a = compared * s.advantage
                stats["loss/rl_demo"] += -share * a * p / (p + gamma if gamma else 1)              # Eq. 9, 10
                dlp = -imitated * share * w - share * a * (p * gamma / (p + gamma) ** 2 if gamma else p)
            else:
                if cfg.eq12_form == "log":
                    score, slope = lp, 1.0
                else:
                    score = slope = math.exp(lp - s.logp_old[t]) if old else 1.0
                w = w if s.reward > 0 else 1.0
                r = s.advantage if cfg.eq12_advantage else 1.0 if s.reward > 0 else -1.0
                term = "rl_pos" if s.reward > 0 else "rl_neg"
                c = counts_in(cfg, term) * share * w * r * (s.tis[t] if tis else 1.0)
                stats[f"loss/{term}"] += -c * score                                                # Eq. 12
                if cfg.kl_coef:
                    stats["loss/kl"] += share * cfg.kl_coef * s.kl[t]
                if cfg.entropy_coef:
                    stats["loss/entropy"] += -share * cfg.entropy_coef * s.entropy[t]
                dlp, dh, dkl = -c * slope, -share * cfg.entropy_coef, share * cfg.kl_coef
            d_logp[-1].append(dlp), d_entropy[-1].append(dh), d_kl[-1].append(dkl)
        if s.is_demo or s.reward > 0:
            weights[name].append(mean_or_0(token_weights))
    loss = sum(stats.values())                                                                     # Eq. 13
    return loss, stats | {name: mean_or_0(ws) for name, ws in weights.items()}, d_logp, d_entropy, d_kl


# ----------------------------------------------------------------------------------------------------------
# Random batches, and the shipped function on them.

def sequence(rng, length, is_demo=False, reward=1.0, advantage=None):
    def draw(low, high):
        return [rng.uniform(low, high) for _ in range(length)]

    return SimpleNamespace(logp=draw(-4, -0.01), entropy=draw(0, 2.5),
                           logp_old=draw(-4, -0.01), tis=draw(0.1, 2), kl=draw(0, 3),
                           reward=reward, is_demo=is_demo,
                           advantage=rng.gauss(0, 1) if advantage is None else advantage)


def mixed_batch(seed, size=9):
    rng = random.Random(seed)
    kinds = [(True, 1.0), (True, 0.0), (False, 1.0), (False, 0.0)]
    kinds += [(rng.random() < 0.4, float(rng.random() < 0.5)) for _ in range(size - 4)]
    rng.shuffle(kinds)
    return [sequence(rng, rng.choice((1, 2, 3, 5, 8)), *kind) for kind in kinds]


def tensors(batch, padding=0.0):
    """The tensors of readings.Inputs, by name; `padding` stands where a response has ended."""
    width = max(len(s.logp) for s in batch)

    def table(name):
        rows = [getattr(s, name) + [padding] * (width - len(s.logp)) for s in batch]
        return torch.tensor(rows, dtype=torch.float64)

    def each(name):
        return torch.tensor([getattr(s, name) for s in batch], dtype=torch.float64)

    named = {name: table(name) for name in ("logp", "entropy", "logp_old", "tis", "kl")}
    mask = [[1.0] * len(s.logp) + [0.0] * (width - len(s.logp)) for s in batch]
    named["mask"] = torch.tensor(mask, dtype=torch.float64)
    named["reward"], named["advantage"] = each("reward"), each("advantage")
    named["is_demo"] = each("is_demo").bool()
    update_entropy = []
    for s in batch:
        update_entropy.append(mean_or_0([mean_or_0(o.entropy) for o in batch if o.is_demo == s.is_demo]))
    named["update_entropy"] = torch.tensor(update_entropy, dtype=torch.float64)
    return named


def papers_loss(inputs, cfg):
    """srft.srft_loss, called like the losses of paper/."""
    x = inputs
    return srft_loss(x.logp, x.entropy, x.mask, x.reward, x.advantage, x.is_demo,
                     x.n_demo, x.n_rollout, x.tis)


def shipped(arguments, cfg, n_demo, n_rollout, old=False, tis=False, loss=readings.srft_loss, **more):
    """(loss, stats, d/dlogp, d/dH, d/dKL) by readings.srft_loss, or another, and autograd."""
    a = dict(arguments)
    for name in ("logp", "entropy", "kl"):
        a[name] = a[name].clone().requires_grad_()
    inputs = readings.Inputs(
        *(a[name] for name in INPUTS), n_demo, n_rollout,
        tis=a["tis"] if tis else None,
        kl=a["kl"] if cfg.kl_coef else None,
        logp_old=a["logp_old"] if old else None,
        update_entropy=a["update_entropy"], demo_tokens=n_demo, rollout_tokens=n_rollout, **more)
    terms, weights = loss(inputs, cfg)
    value = sum(terms.values())
    value.backward()
    stats = {f"loss/{name}": term.item() for name, term in terms.items()}
    kinds = {"w_sft": a["is_demo"].bool(), "w_rl": ~a["is_demo"].bool() & (a["reward"] > 0)}
    stats |= {name: mean_or_0(weight[kinds[name]].tolist()) for name, weight in weights.items()}
    gradients = []
    for name in ("logp", "entropy", "kl"):
        gradients.append(torch.zeros_like(a[name]) if a[name].grad is None else a[name].grad)
    return value.item(), stats, *gradients


def counts(batch, cfg, more=0):
    """[n_demo, n_rollout], in tokens where the loss is normalised by tokens, and `more` of each."""
    n = {True: more, False: more}
    for s in batch:
        n[s.is_demo] += len(s.logp) if cfg.loss_norm == "token" else 1
    return [n[True], n[False]]


def assert_equal(found, expected):
    """found: of `shipped`; expected: of an oracle, its gradients as lists."""
    assert found[0] == pytest.approx(expected[0], abs=1e-10)
    assert found[1] == pytest.approx(expected[1], abs=1e-10)
    for got, rows in zip(found[2:], expected[2:]):
        for i, row in enumerate(rows):
            assert got[i].tolist() == pytest.approx(row + [0.0] * (got.shape[1] - len(row)), abs=1e-10)


def assert_equal_to_oracle(batch, cfg, n, **extras):
    assert_equal(shipped(tensors(batch), cfg, *n, **extras), oracle(batch, cfg, *n, **extras))


# ----------------------------------------------------------------------------------------------------------
# Eq. 7.

@pytest.mark.parametrize("use_std", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_advantage_is_that_of_eq_7_within_each_group_whatever_the_order_and_numbers_of_groups(
        seed, use_std):
    rng = random.Random(seed)
    groups = [g for g in (7, -3, 1_000_000, 0, 42) for _ in range(rng.randint(1, 9))]
    rng.shuffle(groups)
    rewards = [rng.choice((0.0, 1.0)) if seed else rng.gauss(0, 3) for _ in groups]
    expected = [0.0] * len(groups)
    for g in set(groups):
        members = [i for i, other in enumerate(groups) if other == g]
        for i, a in zip(members, eq7([rewards[i] for i in members], use_std)):
            expected[i] = a
    got = group_advantage(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), use_std)
    assert got.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("rewards", [[1.0], [0.0], [1.0] * 9, [0.0] * 9, [0.3] * 7, [100.1] * 7])
@pytest.mark.parametrize("use_std", [True, False])
def test_a_group_whose_rewards_are_equal_has_no_advantage(rewards, use_std):
    group = torch.tensor([5] * len(rewards) + [2, 2])
    got = group_advantage(torch.tensor(rewards + [0.0, 1.0]), group, use_std)
    assert got[:-2].eq(0).all() and got[-2:].ne(0).all() and got.dtype == torch.float32


def test_eps_is_added_to_the_standard_deviation():
    reward, group = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([0, 0])
    # The population's standard deviation is 1, the sample's would be sqrt(2).
    assert group_advantage(reward, group, eps=1.0).tolist() == [-0.5, 0.5]


def test_a_correct_demonstration_lowers_the_advantage_of_the_correct_rollouts_of_its_group():
    alone = group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64))
    joined = group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]), torch.zeros(5, dtype=torch.int64))
    assert 0 < joined[0] < alone[0] and joined[4] == joined[0]


# ----------------------------------------------------------------------------------------------------------
# Eq. 8-13 and every switch.

SWITCHES = [
    dict(),
    dict(loss_norm="token"), dict(loss_norm="constant"),
    dict(w_sft="one"), dict(w_sft="constant"),
    dict(w_rl="one"), dict(w_rl="constant"),
    dict(w_sft_sign=1),
    dict(entropy_level="token"), dict(entropy_level="batch"),
    dict(demo_shaping=0.1),
    dict(eq12_form="ratio"), dict(eq12_advantage=True),
    dict(imitate_wrong=False), dict(terms="rl_pos,rl_neg"), dict(terms="sft_demo"),
    dict(entropy_coef=0.01), dict(kl_coef=0.2),
    dict(entropy_level="token", loss_norm="token", w_sft_sign=1, demo_shaping=0.1),
    dict(entropy_level="batch", loss_norm="constant", eq12_form="ratio", eq12_advantage=True),
    dict(loss_norm="token", entropy_coef=0.3, kl_coef=0.2, eq12_form="ratio"),
    dict(loss_norm="token", imitate_wrong=False, terms="sft_demo,rl_neg", w_sft="one", kl_coef=0.2),
    dict(loss_norm="constant", entropy_coef=0.3, kl_coef=0.2, w_sft="one", w_rl="one", eq12_advantage=True)]


def name_of(switch):
    return ",".join(f"{name}={value}" for name, value in switch.items()) or "defaults"


@pytest.mark.parametrize("old", [False, True], ids=["pi_old=pi", "logp_old"])
@pytest.mark.parametrize("tis", [False, True], ids=["no-tis", "tis"])
@pytest.mark.parametrize("switch", SWITCHES, ids=name_of)
def test_every_term_and_its_gradient_equal_the_equations(switch, tis, old):
    cfg = Config(**{"max_response_tokens": 11} | switch)
    for seed in range(3):
        batch = mixed_batch(seed)
        n = counts(batch, cfg, more=5)                                         # a part of a larger step
        assert_equal_to_oracle(batch, cfg, n, old=old, tis=tis)
        if not switch:
            found = shipped(tensors(batch), cfg, *n, tis=tis, loss=papers_loss)
            assert_equal(found, oracle(batch, cfg, *n, tis=tis))


@pytest.mark.parametrize("tis", [False, True], ids=["no-tis", "tis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_at_the_defaults_the_switchable_objective_is_the_papers_own_bit_for_bit(seed, dtype, tis):
    batch = mixed_batch(seed, size=20)
    a = tensors(batch, padding=math.nan)
    for name, tensor in a.items():
        if tensor.is_floating_point():
            a[name] = tensor.to(dtype)
    ours = shipped(a, Config(), 4, 9, tis=tis, loss=papers_loss)
    theirs = shipped(a, Config(), 4, 9, tis=tis, loss=readings.srft_loss)
    assert ours[:2] == theirs[:2] and not math.isnan(ours[0])
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(ours[2:], theirs[2:]))


def test_the_papers_loss_needs_torch_alone():
    copy = {"torch": torch}
    exec(inspect.getsource(srft_loss), copy)
    a = tensors(mixed_batch(0))
    terms, weights = copy["srft_loss"](*(a[name] for name in INPUTS), n_demo=2, n_rollout=7, tis=a["tis"])
    expected, expected_weights = srft_loss(*(a[name] for name in INPUTS), n_demo=2, n_rollout=7, tis=a["tis"])
    assert list(terms) == ["sft_demo", "rl_demo", "rl_pos", "rl_neg"] and terms == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in ("w_sft", "w_rl"))
    assert list(inspect.signature(srft_loss).parameters) == [*INPUTS, "n_demo", "n_rollout", "tis"]


@pytest.mark.parametrize("loss", [papers_loss, readings.srft_loss])
def test_a_term_without_sequences_is_left_out_of_an_update_and_0_in_a_micro_batch(loss):
    rollouts = tensors([s for s in mixed_batch(1) if not s.is_demo])
    alone, beside = (shipped(rollouts, Config(), n_demo, 7, loss=loss)[1] for n_demo in (0, 3))
    assert list(alone) == ["loss/rl_pos", "loss/rl_neg", "w_sft", "w_rl"]
    assert beside["loss/sft_demo"] == beside["loss/rl_demo"] == 0 and alone.items() <= beside.items()


def test_only_flags_that_ask_for_another_loss_leave_the_papers_own():
    assert srft.load_objective(Config()) is srft_loss
    for switch in SWITCHES[1:] + [dict(updates_per_rollout=2), dict(method="grpo"), dict(term_gradients=1)]:
        assert srft.load_objective(Config(**switch)) is not srft_loss, switch


SWITCHES_OF_COUNTS = [switch for switch in SWITCHES
                      if set(switch) & {"entropy_level", "loss_norm", "kl_coef"} or not switch]


@pytest.mark.parametrize("kinds", [
    [(False, 0.0), (False, 0.0), (True, 1.0)],
    [(False, 1.0), (False, 1.0), (True, 0.0)],
    [(False, 1.0), (False, 0.0)],
    [(True, 1.0), (True, 0.0)],
    [(True, 1.0)],
    [(False, 1.0)],
    [(False, 0.0)]],
    ids=["no-correct", "no-wrong", "no-demo", "only-demos", "one-demo", "one-correct", "one-wrong"])
@pytest.mark.parametrize("switch", SWITCHES_OF_COUNTS, ids=name_of)
@pytest.mark.parametrize("length", [1, 4])
def test_a_batch_that_lacks_a_kind_of_sequence_still_equals_the_equations(kinds, switch, length):
    cfg, rng = Config(**switch), random.Random(0)
    batch = [sequence(rng, length, *kind) for kind in kinds]
    assert_equal_to_oracle(batch, cfg, counts(batch, cfg))
    present = {"loss/sft_demo": (True, 1.0), "loss/rl_pos": (False, 1.0), "loss/rl_neg": (False, 0.0)}
    stats = shipped(tensors(batch), cfg, *counts(batch, cfg))[1]
    for name, kind in present.items():
        there = any(k == kind or (name == "loss/sft_demo" and k[0] and cfg.imitate_wrong) for k in kinds)
        assert (stats.get(name, 0.0) != 0) == (there and counts_in(cfg, name.removeprefix("loss/")))


def test_the_default_loss_of_two_tokens_worked_out_by_hand():
    """pi = 1/2 at both tokens, H = log 2: w_SFT = 0.5 / 2 = 0.25 and w_RL = 0.1 x 2 = 0.2."""
    log2, half = math.log(2), torch.full((3, 2), -math.log(2), dtype=torch.float64)
    terms, weights = srft_loss(half, -half, mask=torch.ones(3, 2),
                               reward=torch.tensor([1.0, 1.0, 0.0]),
                               advantage=torch.tensor([0.7, 0.7, -1.4]),
                               is_demo=torch.tensor([True, False, False]), n_demo=1, n_rollout=2)
    expected = {"sft_demo": 0.25 * log2, "rl_demo": -0.7 / 2, "rl_pos": 0.2 * log2 / 2, "rl_neg": -log2 / 2}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-7)
    assert weights["w_sft"].tolist() == pytest.approx([0.25] * 3)
    assert weights["w_rl"].tolist() == pytest.approx([0.2] * 3)


def test_the_ratio_and_the_log_form_of_eq_12_have_the_same_gradient_before_the_first_update():
    batch = mixed_batch(3)
    grads = [shipped(tensors(batch), Config(eq12_form=form), 3, 6)[2] for form in ("log", "ratio")]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", ["sequence", "token", "batch"])
def test_without_bonus_and_penalty_the_four_terms_sum_to_the_loss_and_the_weights_lie_within_their_bounds(
        level):
    batch, cfg = mixed_batch(4), Config(entropy_level=level)
    loss, stats, *_ = shipped(tensors(batch), cfg, *counts(batch, cfg))
    assert set(stats) == {*TERMS, "w_sft", "w_rl"}
    assert sum(stats[name] for name in TERMS) == pytest.approx(loss, abs=1e-12)
    assert 0.5 * math.exp(-2.5) < stats["w_sft"] < 0.5 and 0.1 < stats["w_rl"] < 0.1 * math.exp(2.5)


# ----------------------------------------------------------------------------------------------------------
# What the training loop relies on.

@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_of_any_split_add_up_to_the_whole_batch(level, norm, seed):
    cfg = Config(entropy_level=level, loss_norm=norm, kl_coef=0.1, entropy_coef=0.1)
    batch, rng = mixed_batch(seed, size=12), random.Random(seed)
    n = counts(batch, cfg)
    loss, stats, *grads = shipped(tensors(batch), cfg, *n, tis=True)
    part_of = [rng.randrange(4) for _ in batch]
    split_loss, terms = 0.0, dict.fromkeys(TERMS, 0.0)
    for part in set(part_of):
        rows = [i for i, p in enumerate(part_of) if p == part]
        part_loss, part_stats, *part_grads = shipped(tensors([batch[i] for i in rows]), cfg, *n, tis=True)
        split_loss += part_loss
        terms = {name: terms[name] + part_stats[name] for name in TERMS}
        for whole, own in zip(grads, part_grads):
            torch.testing.assert_close(own, whole[rows][:, :own.shape[1]], atol=1e-12, rtol=0)
    assert split_loss == pytest.approx(loss, abs=1e-10)
    assert terms == pytest.approx({name: stats[name] for name in TERMS}, abs=1e-10)


def test_with_entropy_level_batch_micro_batches_add_up_by_the_mean_entropy_of_the_whole_step():
    cfg, batch = Config(entropy_level="batch"), mixed_batch(5, size=12)
    n, whole = counts(batch, cfg), tensors(batch)
    loss = shipped(whole, cfg, *n)[0]
    parts = []
    for i in range(5):
        part = tensors(batch[i::5])
        part["update_entropy"] = whole["update_entropy"][i::5]
        parts.append(shipped(part, cfg, *n)[0])
    assert sum(parts) == pytest.approx(loss, abs=1e-10)


GARBAGE = [(name, form, garbage)
           for name in ("logp", "entropy", "kl", "logp_old", "tis")
           for form in ("log", "ratio")
           for garbage in (math.nan, math.inf, -math.inf, 1e30)]


@pytest.mark.parametrize("name, form, garbage", GARBAGE)
def test_garbage_on_padding_changes_nothing(name, form, garbage):
    cfg, batch = Config(kl_coef=0.1, entropy_coef=0.1, demo_shaping=0.1, eq12_form=form), mixed_batch(6)
    clean = tensors(batch)
    expected = shipped(clean, cfg, 4, 5, old=True, tis=True)
    dirty = clean | {name: tensors(batch, garbage)[name]}
    loss, stats, *grads = shipped(dirty, cfg, 4, 5, old=True, tis=True)
    assert (loss, stats) == expected[:2]
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2:]))


@pytest.mark.parametrize("level", ["sequence", "token", "batch"])
def test_no_gradient_flows_through_the_entropy_weights(level):
    batch = mixed_batch(7)
    assert shipped(tensors(batch), Config(entropy_level=level), 4, 5)[3].eq(0).all()


@pytest.mark.parametrize("form", ["log", "ratio"])
def test_importance_weights_apply_to_rollouts_and_never_to_demonstrations(form):
    cfg, a = Config(eq12_form=form), tensors(mixed_batch(8))
    demo, plain = a["is_demo"][:, None], shipped(a, cfg, 4, 5)
    only_demos = a | {"tis": torch.where(demo, 3.0, 1.0).double().expand_as(a["tis"])}
    only_rollouts = a | {"tis": torch.where(demo, 1.0, 3.0).double().expand_as(a["tis"])}
    assert torch.equal(shipped(only_demos, cfg, 4, 5, tis=True)[2], plain[2])
    weighted = shipped(only_rollouts, cfg, 4, 5, tis=True)
    torch.testing.assert_close(weighted[2], torch.where(demo, plain[2], 3 * plain[2]))


@pytest.mark.parametrize("switch", SWITCHES, ids=name_of)
def test_the_arguments_are_not_written_into(switch):
    a, cfg = tensors(mixed_batch(9)), Config(**switch)
    before = {name: (t.clone(), t._version) for name, t in a.items()}
    for loss in (papers_loss, readings.srft_loss):
        shipped(a, cfg, 4, 5, old=True, tis=True, loss=loss)
    group_advantage(a["reward"], torch.arange(9) // 3)
    assert all(torch.equal(t, before[n][0]) and t._version == before[n][1] for n, t in a.items())


@pytest.mark.parametrize("loss", [papers_loss, readings.srft_loss])
@pytest.mark.parametrize("flag_type", [torch.bool, torch.int64, torch.float32])
def test_masks_flags_and_rewards_of_any_type_mean_the_same(flag_type, loss):
    a = tensors(mixed_batch(10))
    other = a | {"mask": a["mask"].to(flag_type),
                 "is_demo": a["is_demo"].to(flag_type),
                 "reward": a["reward"].float()}
    assert shipped(other, Config(), 4, 5, loss=loss)[:2] == shipped(a, Config(), 4, 5, loss=loss)[:2]
