"""The paradigms that the paper compares SRFT with: each one loss, on the same loop, engine and grader.

    python srft.py --method grpo     # or sft, sft_kl, sft+rl, luffy, relift

    sft      Eq. 1: demonstrations alone, no rollouts
    sft_kl   Eq. A1: the same plus 0.2 KL(pi_theta || pi_base)
    grpo     Eq. 2, 3: rollouts alone; --entropy_floor or --entropy_quantile truncate gradients as in App. A.2
    sft+rl   Sec. 3.2.2: Eq. 1 on demonstrations plus Eq. 3 on rollouts
    luffy    a mixed group: Eq. 3 on rollouts, the shaped ratio p/(p + 0.1) on the demonstration
    relift   Eq. 3; prompts whose rollouts all failed are kept, and Eq. 1 follows on a step's worth of them

Which sequences a method sees, and the flags that the paper sets for it, stand in config.METHODS. A loss takes
readings.Inputs and the config. It returns (terms, weights): terms are a micro-batch's shares of the whole
update's loss, scalars with gradient that simply add up, none for a kind that the update has no sequences of;
weights are empty, since only SRFT has them.
srft.py loads this file only when a flag asks for it.
"""
from functools import partial

import torch

from paper.readings import (
    Inputs,
    average,
    before_update,
    counts,
    importance_ratio,
    sequence_mean,
    shaped,
    srft_loss,
)
from support.gradients import gradient_norm


def clipped_surrogate(inputs, clip_eps):
    """min{r A, clip(r, 1 - eps, 1 + eps) A} of Eq. 3 for each token, with r = pi/pi_old; times the importance
    weight pi_old/pi_engine, where there is one. -> (B,T)"""
    ratio = importance_ratio(inputs)
    advantage = inputs.advantage[:, None]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    return gain if inputs.tis is None else gain * inputs.tis


def sft_loss(inputs, cfg):
    """Eq. 1: (1/n_demo) sum over demonstrations <-log pi>_i."""
    x = inputs.without_padding()
    n_demo, _ = counts(x, cfg)
    return {"sft": average(sequence_mean(-x.logp, x, cfg), x.is_demo, n_demo)}, {}


def sft_kl_loss(inputs, cfg):
    """Eq. A1: Eq. 1 plus lambda KL(pi_theta || pi_base), lambda = cfg.kl_coef (0.2), on the demonstrations'
    tokens. The divergence is that of the full distributions at each position (support.logprobs.token_kl)."""
    x = inputs.without_padding()
    n_demo, _ = counts(x, cfg)
    sft = average(sequence_mean(-x.logp, x, cfg), x.is_demo, n_demo)
    kl = average(sequence_mean(x.kl, x, cfg), x.is_demo, n_demo)
    return {"sft": sft, "kl": cfg.kl_coef * kl}, {}


def grpo_loss(inputs, cfg):
    """Eq. 3: -(1/n_rollout) sum over rollouts <min{r A, clip(r) A}>_i, A of Eq. 2 over the rollouts.

    App. A.2: tokens whose entropy H_t is below `entropy_floor` keep their value and lose their gradient.
    """
    x = inputs.without_padding()
    _, n_rollout = counts(x, cfg)
    gain = clipped_surrogate(x, cfg.clip_eps)
    if x.entropy_floor:
        gain = torch.where(x.entropy.detach() >= x.entropy_floor, gain, gain.detach())
    return {"rl": -average(sequence_mean(gain, x, cfg), ~x.is_demo, n_rollout)}, {}


def sft_plus_rl_loss(inputs, cfg):
    """L_SFT + L_RL of Sec. 3.2.2: Eq. 1 on demonstrations, Eq. 3 on rollouts with the advantages of Eq. 2.

    Also ReLIFT's (https://arxiv.org/abs/2506.07527): there, an update holds either rollouts, or the
    demonstrations of prompts that all rollouts failed.
    """
    terms = {}
    if inputs.n_demo:
        terms.update(sft_loss(inputs, cfg)[0])
    if inputs.n_rollout:
        terms.update(grpo_loss(inputs, cfg)[0])
    return terms, {}


def luffy_loss(inputs, cfg):
    """LUFFY's mixed-policy GRPO: one mean over rollouts and demonstrations, A of Eq. 7 over both.

    Rollouts enter by Eq. 3, demonstrations by -A <f(pi)>_i with f of `shaped`, gamma = cfg.demo_shaping
    (0.1), unclipped (https://arxiv.org/abs/2504.14945).
    """
    x = inputs.without_padding()
    n = sum(counts(x, cfg))
    of_rollout = clipped_surrogate(x, cfg.clip_eps)
    of_demo = x.advantage[:, None] * shaped(x.logp.exp(), cfg.demo_shaping)
    terms = {}
    if x.n_rollout:
        terms["rl"] = -average(sequence_mean(of_rollout, x, cfg), ~x.is_demo, n)
    if x.n_demo:
        terms["rl_demo"] = -average(sequence_mean(of_demo, x, cfg), x.is_demo, n)
    return terms, {}


LOSSES = {"srft": srft_loss, "sft": sft_loss, "sft_kl": sft_kl_loss, "grpo": grpo_loss,
          "sft+rl": sft_plus_rl_loss, "luffy": luffy_loss, "relift": sft_plus_rl_loss}


class Objective:
    """The loss that cfg asks for, called as srft.srft_loss is: with tensors, by name."""

    def __init__(self, cfg):
        self.cfg, self.loss = cfg, LOSSES[cfg.method]

    def __call__(self, **inputs):
        return self.loss(Inputs(**inputs), self.cfg)

    def before_update(self, policy, micro_batches, sequences, device):
        """The extra inputs of each micro-batch: see readings.before_update. A collective."""
        return before_update(policy, micro_batches, sequences, self.cfg, device)

    def term_gradient_norms(self, backward, policy, n_demo, n_rollout):
        """{"grad_norm/TERM": norm of the gradient of that term alone}: which term drives the update? A
        collective.

        backward(loss) adds up the gradients of an update over its micro-batches, and runs once for each term
        that the update has sequences of. Weights stay as they are, and gradients are gone afterwards.
        """
        # A rank without sequences sees no term. All learn the names by the loss of one token of padding.
        nothing = torch.zeros(1, 1)
        terms, _ = self(
            logp=nothing, entropy=nothing, mask=nothing, reward=nothing[0], advantage=nothing[0],
            is_demo=nothing[0].bool(), n_demo=n_demo, n_rollout=n_rollout, kl=nothing,
            update_entropy=nothing[0], demo_tokens=n_demo, rollout_tokens=n_rollout)
        norms = {}
        for name in terms:
            backward(partial(self.one_term, name))
            norms[f"grad_norm/{name}"] = gradient_norm(policy.parameters()).item()
            policy.zero_grad(set_to_none=True)
        return norms

    def one_term(self, name, **inputs):
        """This loss with one of its terms alone."""
        terms, weights = self(**inputs)
        return {name: terms[name]}, weights


def failed_prompts(prompts, indices, sequences):
    """ReLIFT: the step's prompts that no rollout solved and that have a demonstration, by index in the data.

    prompts: all of the data. indices: of the step's prompts, in the order of Sequence.group.
    """
    solved = {s.group for s in sequences if s.reward > 0}
    return [index for place, index in enumerate(indices) if place not in solved and prompts[index].demo]
