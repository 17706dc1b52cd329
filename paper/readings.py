"""The other readings of SRFT's objective: what the paper leaves open, or says in two ways, as a flag each.

    python srft.py --w_sft one                    # Table 3, "w/o w_SFT"
    python srft.py --entropy_level token          # H of each token, not of its sequence

`srft.srft_loss` is the objective at the paper's defaults. `srft_loss` here is the same function of the same
tensors with every choice open that docs/decisions.md leaves to the loss; when every flag has its default, it
is equal to that one, bit for bit. srft.py loads this file only when a flag asks for it.

Shapes: B sequences, T response tokens, right-padded. Everything is in nats.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

import model as M
from support.collectives import of_all_ranks
from support.device import to_device


@dataclass
class Inputs:
    """One micro-batch, as a loss sees it. The first nine are the arguments of srft.srft_loss, which explains
    them; only other readings and methods ask for the rest."""
    logp: torch.Tensor                       # (B,T) log pi_theta(y_t | x, y_<t), with gradient
    entropy: torch.Tensor                    # (B,T) H_t; with gradient if there is an entropy bonus
    mask: torch.Tensor                       # (B,T) 1 on response tokens, 0 on padding
    reward: torch.Tensor                     # (B,)
    advantage: torch.Tensor                  # (B,)
    is_demo: torch.Tensor                    # (B,) bool
    n_demo: int                              # sequences of each kind in the whole optimizer update
    n_rollout: int
    tis: torch.Tensor | None = None          # (B,T) truncated importance weights of rollout tokens
    kl: torch.Tensor | None = None           # (B,T) KL(pi_theta || base model) at each token, with gradient
    logp_old: torch.Tensor | None = None     # (B,T) log pi before the step's first update; None: pi itself
    update_entropy: torch.Tensor | None = None  # (B,) mean H_i of the update's sequences of this kind
    entropy_floor: float = 0.0               # App. A.2: tokens below it give no gradient
    demo_tokens: int = 0                     # response tokens of each kind in the whole optimizer update
    rollout_tokens: int = 0

    def without_padding(self):
        """The same with numbers for a mask, and zeros on padding: 0 times a nan that stands there is nan."""
        mask = self.mask.to(self.logp.dtype)
        changed = {"mask": mask, "is_demo": self.is_demo.bool()}
        for name in ("logp", "entropy", "tis", "kl", "logp_old"):
            value = getattr(self, name)
            if value is not None:
                changed[name] = value.masked_fill(mask == 0, 0.0)
        return replace(self, **changed)


# ----------------------------------------------------------------------------------------------------------
# What the losses of this folder share.

def sequence_mean(x, inputs, cfg):
    """<x>_i of each sequence, (B,T) -> (B,), by cfg.loss_norm.

    "sequence": sum_t x_t / |y_i| (Eq. 3).   "constant": sum_t x_t / max_response_tokens.
    "token": the sum alone; `average` then divides by all tokens of the kind.
    """
    total = (x * inputs.mask).sum(1)
    if cfg.loss_norm == "sequence":
        return total / inputs.mask.sum(1).clamp(min=1)
    if cfg.loss_norm == "constant":
        return total / cfg.max_response_tokens
    return total


def counts(inputs, cfg):
    """(n_demo, n_rollout) in the unit that cfg.loss_norm divides by: sequences, or response tokens."""
    if cfg.loss_norm == "token":
        return inputs.demo_tokens, inputs.rollout_tokens
    return inputs.n_demo, inputs.n_rollout


def average(x, which, n):
    """(1/n) sum of x over the sequences `which`; n counts those of the whole update, and is not 0. (B,), (B,)
    bool -> scalar."""
    return torch.where(which, x, 0.0).sum() / n


def shaped(probability, gamma):
    """LUFFY's f(p) = p / (p + gamma), which favours tokens of small probability; gamma 0: p itself (Eq. 10).

    Appendix of https://arxiv.org/abs/2504.14945; there gamma is 0.1.
    """
    return probability / (probability + gamma) if gamma else probability


def importance_ratio(inputs):
    """pi / pi_old of each token, (B,T). In a step's first update it is 1, with the gradient of log pi."""
    logp_old = inputs.logp.detach() if inputs.logp_old is None else inputs.logp_old
    return (inputs.logp - logp_old).exp()


# ----------------------------------------------------------------------------------------------------------
# Eq. 5-13, every choice open.

def entropy_weight(kind, scale, exponent):
    """w = scale exp(exponent) ("entropy"), 1 ("one", the ablation of Table 3), or scale ("constant")."""
    if kind == "one":
        return torch.ones_like(exponent)
    if kind == "constant":
        return torch.full_like(exponent, scale)
    return scale * exponent.exp()


def entropies(x, length, cfg):
    """H(pi_theta) of the weights, without gradient: (B,1) for each sequence, or (B,T) token by token."""
    if cfg.entropy_level == "token":
        return x.entropy.detach()
    if cfg.entropy_level == "batch":
        return x.update_entropy[:, None]
    return (x.entropy.detach() * x.mask).sum(1, keepdim=True) / length[:, None]


def only(chosen, terms):
    """Terms by name; those not `chosen` ("all", or names by commas) are 0: no update is without any."""
    if chosen == "all":
        return terms
    return {name: term * (name in chosen.split(",")) for name, term in terms.items()}


def srft_loss(inputs, cfg):
    """Eq. 13 -> (terms, weights), as srft.srft_loss; the flags of cfg choose among its readings.

    w_sft, w_rl      weights by entropy, or 1, or without the entropy factor
    w_sft_sign       of H in w_SFT
    entropy_level    H of each sequence, of each token, or the mean over the update's sequences of a kind
    demo_shaping     f(pi) = pi / (pi + gamma) in Eq. 9-10
    eq12_form        Eq. 12 on log pi, or on pi / pi_old
    eq12_advantage   Eq. 12 scaled by the group's advantage instead of the rewards +1 and -1 of Eq. 11
    loss_norm        what a response's sum over tokens is divided by
    imitate_wrong    Eq. 8 on all demonstrations, or on those whose answer is right, still divided by all
    terms            which of the four count; the others are 0
    entropy_coef, kl_coef    two further terms on rollouts: "entropy", a bonus, and "kl", a penalty
    """
    x = inputs.without_padding()
    n_demo, n_rollout = counts(x, cfg)
    correct = ~x.is_demo & (x.reward > 0)
    wrong = ~x.is_demo & ~correct

    def mean(values):
        return sequence_mean(values, x, cfg)

    length = x.mask.sum(1).clamp(min=1)
    h = entropies(x, length, cfg)
    w_sft = entropy_weight(cfg.w_sft, 0.5, cfg.w_sft_sign * h)                                  # Eq. 8
    w_rl = entropy_weight(cfg.w_rl, 0.1, h)                                                     # Eq. 12

    score = x.logp if cfg.eq12_form == "log" else importance_ratio(x)
    if x.tis is not None:
        score = score * x.tis
    factor = x.advantage
    if not cfg.eq12_advantage:
        factor = torch.where(correct, 1.0, -1.0).to(x.logp.dtype)                               # Eq. 11
    ratio = shaped(x.logp.exp(), cfg.demo_shaping)                                              # Eq. 10
    terms = {}
    imitated = x.is_demo if cfg.imitate_wrong else x.is_demo & (x.reward > 0)
    if n_demo:
        terms["sft_demo"] = average(mean(w_sft * -x.logp), imitated, n_demo)                    # Eq. 8
        terms["rl_demo"] = average(-x.advantage * mean(ratio), x.is_demo, n_demo)               # Eq. 9
    if n_rollout:
        terms["rl_pos"] = average(-factor * mean(w_rl * score), correct, n_rollout)             # Eq. 12, left
        terms["rl_neg"] = average(-factor * mean(score), wrong, n_rollout)                     # Eq. 12, right
    terms = only(cfg.terms, terms)
    if n_rollout and cfg.entropy_coef:
        terms["entropy"] = -cfg.entropy_coef * average(mean(x.entropy), ~x.is_demo, n_rollout)
    if n_rollout and cfg.kl_coef:
        terms["kl"] = cfg.kl_coef * average(mean(x.kl), ~x.is_demo, n_rollout)

    def of_sequences(weight):
        if cfg.entropy_level == "token":
            return (weight * x.mask).sum(1) / length
        return weight[:, 0]                                       # one weight for all tokens of a sequence

    return terms, {"w_sft": of_sequences(w_sft), "w_rl": of_sequences(w_rl)}


# ----------------------------------------------------------------------------------------------------------
# What some readings must know from before the update's first gradient.

@torch.no_grad()
def before_update(policy, micro_batches, sequences, cfg, device):
    """For each micro-batch the Inputs, by name, that must be known before the update. A collective.

    policy: model.Policy. micro_batches: this rank's, lists of model.Sequence. sequences: all of the update.

    With several updates a step, pi_old is no longer pi: logp_old. With cfg.entropy_level "batch", H is a mean
    over the whole update: update_entropy. With cfg.entropy_quantile, entropy_floor is that quantile of H_t
    over all rollout tokens of the update. If any of them is asked for, one more forward pass gives all three.
    """
    known = {"entropy_floor": cfg.entropy_floor, "demo_tokens": 0, "rollout_tokens": 0}
    for s in sequences:
        known["demo_tokens" if s.is_demo else "rollout_tokens"] += len(s.response)
    if cfg.updates_per_rollout == 1 and cfg.entropy_level != "batch" and not cfg.entropy_quantile:
        return [known for _ in micro_batches]

    logps, entropies = [], []
    for batch in micro_batches:
        logp, entropy, _ = policy(M.collate(batch, device), cfg.temperature)                    # (B,T)
        logps.append(logp)
        entropies.append(entropy.cpu())              # one read from the device for all sequences of the batch
    if cfg.entropy_quantile:
        known["entropy_floor"] = entropy_quantile(micro_batches, entropies, cfg.entropy_quantile)
    found = [dict(known) for _ in micro_batches]
    if cfg.updates_per_rollout > 1:
        for inputs, logp in zip(found, logps):
            inputs["logp_old"] = logp
    if cfg.entropy_level == "batch":
        of_rollouts, of_demos = mean_entropies(micro_batches, entropies)
        for inputs, batch in zip(found, micro_batches):
            h = [of_demos if s.is_demo else of_rollouts for s in batch]                         # (B,)
            inputs["update_entropy"] = to_device(h, device, torch.float32)
    return found


def entropy_quantile(micro_batches, entropies, quantile):
    """That quantile of H_t over the rollout tokens of all ranks, in nats; 0 without any. A collective."""
    mine = [np.empty(0, np.float32)]
    for batch, entropy in zip(micro_batches, entropies):
        for s, h in zip(batch, entropy):
            if not s.is_demo:
                mine.append(h[:len(s.response)].numpy())
    tokens = np.concatenate(of_all_ranks(np.concatenate(mine)))
    return float(np.quantile(tokens, quantile)) if len(tokens) else 0.0


def mean_entropies(micro_batches, entropies):
    """Mean of H_i over all rollouts, and over all demonstrations, of all ranks. A collective."""
    sums = torch.zeros(2, 2, dtype=torch.float64)                 # (rollouts, demonstrations) x (sum, count)
    for batch, entropy in zip(micro_batches, entropies):
        for s, h in zip(batch, entropy):
            h_i = h.sum().item() / max(len(s.response), 1)
            sums[int(s.is_demo)] += torch.tensor([h_i, 1.0])
    dist.all_reduce(sums)
    return (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
