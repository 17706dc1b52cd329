"""The paradigms that the paper compares SRFT with, each one loss with srft.srft_loss's signature.

    python srft.py --method grpo     # or sft, sft_kl, sft+rl, luffy, relift; loop, engine and grader stay

    sft      Eq. 1: demonstrations alone, no rollouts
    sft_kl   Eq. A1: the same plus 0.2 KL(pi_theta || pi_base)
    grpo     Eq. 2, 3: rollouts alone; --entropy_floor or --entropy_quantile truncate gradients as in App. A.2
    sft+rl   Sec. 3.2.2: Eq. 1 on demonstrations plus Eq. 3 on rollouts
    luffy    a mixed group: Eq. 3 on rollouts, the shaped ratio p/(p + 0.1) on the demonstration
    relift   Eq. 3; prompts whose rollouts all failed are kept, and Eq. 1 follows on a step's worth of them

Which sequences a method sees, and the flags that the paper sets for it, stand in config.METHODS. All losses
take (B,T) log-probs, entropies and masks, right-padded, and (B,) rewards, advantages and demonstration flags
(srft_loss says more), and return (scalar loss, dict of scalar tensors): contributions of a micro-batch to the
whole step, which simply add up.
"""
import torch

# ----------------------------------------------------------------------------------------------------------
# What all objectives share.


def sequence_mean(x, mask, cfg):
    """<x>_i = (1/|y_i|) sum_t x_{i,t} (Eq. 3), or the sum alone ("token"), or over a constant. (B,T) ->
    (B,)."""
    total = (x * mask).sum(1)
    if cfg.loss_norm == "sequence":
        return total / mask.sum(1).clamp(min=1)
    return total / cfg.max_response_tokens if cfg.loss_norm == "constant" else total


def average(x, which, n):
    """(1/n) sum of x over the sequences `which`; n counts those of the whole step. (B,), (B,) bool ->
    scalar."""
    return torch.where(which, x, 0.0).sum() / max(n, 1)


def without_padding(mask, *tensors):
    """The mask as numbers and each tensor with zeros where it is 0: a nan on padding takes no part."""
    return mask.to(tensors[0].dtype), *(None if x is None else x.masked_fill(mask == 0, 0.0) for x in tensors)


def add_up(terms, only=None, **more):
    """Terms (name -> scalar tensor) -> (their sum, or the one called `only`; all of them and `more` without
    graph). They stay on the device: reading them here would make the host wait before backward."""
    loss = sum(term for name, term in terms.items() if only in (None, name))
    return loss, {name: value.detach() for name, value in (terms | more).items()}


def clipped_surrogate(logp, logp_old, advantage, eps):
    """min{r A, clip(r, 1 - eps, 1 + eps) A} of Eq. 3 for each token, r = pi/pi_old; logp_old None: pi_old =
    pi."""
    ratio = (logp - (logp.detach() if logp_old is None else logp_old)).exp()
    return torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - eps, 1 + eps) * advantage[:, None])


def shaped(p, gamma):
    """LUFFY's f(p) = p/(p + gamma), which favours tokens of small probability; gamma 0: p (Eq. 10)."""
    return p / (p + gamma) if gamma else p


# ----------------------------------------------------------------------------------------------------------
# The losses. All take the same arguments, needed or not, so that the training loop can call any of them.

def sft_loss(logp, entropy, mask, reward, advantage, is_demo, cfg, n_demo, n_rollout, logp_old=None,
             tis=None, kl=None, entropy_floor=0.0, only=None):
    """Eq. 1: (1/n_demo) sum over demonstrations <-log pi>_i."""
    mask, logp = without_padding(mask, logp)
    return add_up({"loss/sft": average(sequence_mean(-logp, mask, cfg), is_demo.bool(), n_demo)}, only)


def sft_kl_loss(logp, entropy, mask, reward, advantage, is_demo, cfg, n_demo, n_rollout, logp_old=None,
                tis=None, kl=None, entropy_floor=0.0, only=None):
    """Eq. A1: Eq. 1 plus lambda KL(pi_theta || pi_base), lambda = cfg.kl_coef (0.2), on the demonstrations'
    tokens.

    kl (B,T): the divergence of each position's full-vocabulary distributions, with gradient (logprobs.token_kl).
    """
    mask, logp, kl = without_padding(mask, logp, kl)
    over_demos = lambda x: average(sequence_mean(x, mask, cfg), is_demo.bool(), n_demo)
    return add_up({"loss/sft": over_demos(-logp), "loss/kl": cfg.kl_coef * over_demos(kl)}, only)


def grpo_loss(logp, entropy, mask, reward, advantage, is_demo, cfg, n_demo, n_rollout, logp_old=None,
              tis=None, kl=None, entropy_floor=0.0, only=None):
    """Eq. 3: -(1/n_rollout) sum over rollouts <min{r A, clip(r) A}>_i, A of Eq. 2 over the rollouts.

    App. A.2: tokens whose entropy H_t is below `entropy_floor` (nats) keep their value and lose their
    gradient.
    """
    mask, logp, entropy, logp_old, tis = without_padding(mask, logp, entropy, logp_old, tis)
    gain = clipped_surrogate(logp, logp_old, advantage, cfg.clip_eps)
    gain = gain if tis is None else gain * tis
    gain = torch.where(entropy.detach() >= entropy_floor, gain, gain.detach()) if entropy_floor else gain
    return add_up({"loss/rl": -average(sequence_mean(gain, mask, cfg), ~is_demo.bool(), n_rollout)}, only)


def sft_plus_rl_loss(*args, only=None, **kwargs):
    """L_SFT + L_RL of Sec. 3.2.2: Eq. 1 on demonstrations and Eq. 3 on rollouts, with the advantages of Eq.
    2.

    Also ReLIFT's: there, an update holds either rollouts or the demonstrations of prompts that all rollouts
    failed.
    """
    (sft, one), (rl, two) = sft_loss(*args, only=only, **kwargs), grpo_loss(*args, only=only, **kwargs)
    return sft + rl, one | two


def luffy_loss(logp, entropy, mask, reward, advantage, is_demo, cfg, n_demo, n_rollout, logp_old=None,
               tis=None, kl=None, entropy_floor=0.0, only=None):
    """LUFFY's mixed-policy GRPO: one mean over rollouts and demonstrations, A of Eq. 7 over both.

    Rollouts enter by Eq. 3, demonstrations by -A <f(pi)>_i with f of `shaped`, gamma = cfg.demo_shaping
    (0.1), unclipped.
    """
    mask, logp, logp_old, tis = without_padding(mask, logp, logp_old, tis)
    demo, n = is_demo.bool(), n_demo + n_rollout
    gain = clipped_surrogate(logp, logp_old, advantage, cfg.clip_eps)
    gain = gain if tis is None else gain * tis
    of_demo = advantage[:, None] * shaped(logp.exp(), cfg.demo_shaping)
    return add_up({"loss/rl": -average(sequence_mean(gain, mask, cfg), ~demo, n),
                   "loss/rl_demo": -average(sequence_mean(of_demo, mask, cfg), demo, n)}, only)


# name -> (loss; each of its terms with the kind of sequence that it counts)
OBJECTIVES = {
    "sft": (sft_loss, {"loss/sft": "demos"}),
    "sft_kl": (sft_kl_loss, {"loss/sft": "demos", "loss/kl": "demos"}),
    "grpo": (grpo_loss, {"loss/rl": "rollouts"}),
    "sft+rl": (sft_plus_rl_loss, {"loss/sft": "demos", "loss/rl": "rollouts"}),
    "luffy": (luffy_loss, {"loss/rl": "rollouts", "loss/rl_demo": "demos"}),
    "relift": (sft_plus_rl_loss, {"loss/sft": "demos", "loss/rl": "rollouts"}),
}
