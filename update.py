"""One optimizer update on packed micro-batches: any objective, its gradient the same for every split over
ranks and micro-batches.

    before = forward_before_update(run, cfg, batches)                 # by default nothing, and no pass
    metrics = update_policy(run, cfg, batches, before, *counts(sequences, cfg.loss_norm))

`batches`: this rank's micro-batches, lists of model.Sequence. `run` holds policy, reference, optimizer,
device and objective: (loss, {name of each statistic: which sequences it counts}), as in srft.OBJECTIVES.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

import model as M
from support.device import to_device


def padded(rows, device):
    """Lists of different length -> (B,T) float tensor, zeros on the right."""
    rows = [torch.as_tensor(np.asarray(row, np.float32)) for row in rows]
    return to_device(pad_sequence(rows, batch_first=True), device)


def column(sequences, name, device):
    """One number of each sequence -> (B,) float tensor."""
    return to_device([float(getattr(s, name)) for s in sequences], device, torch.float32)


def loss_inputs(sequences, device):
    """What the loss asks of the data, not of the policy: mask (B,T), reward, advantage, is_demo (B,), and
    log pi_engine (B,T), zeros on demonstrations."""
    engine_logp = [np.zeros(len(s.response)) if s.is_demo else s.engine_logp for s in sequences]
    return (padded([np.ones(len(s.response)) for s in sequences], device),
            column(sequences, "reward", device), column(sequences, "advantage", device),
            column(sequences, "is_demo", device).bool(), padded(engine_logp, device))


def counts(sequences, loss_norm):
    """(n_demo, n_rollout) of Eq. 8-12 in the unit that the normalizer counts: sequences, or
    response tokens."""
    unit = (lambda s: len(s.response)) if loss_norm == "token" else (lambda s: 1)
    return sum(unit(s) for s in sequences if s.is_demo), sum(unit(s) for s in sequences if not s.is_demo)


@dataclass
class Before:
    """What the loss must know of one micro-batch from before the step's first update; None, 0: not needed."""
    logp_old: torch.Tensor | None = None      # (B,T) log pi_old
    entropy: torch.Tensor | None = None       # (B,T) the step's mean H of each sequence's kind
    entropy_floor: float = 0.0                # nats; App. A.2


@torch.no_grad()
def forward_before_update(run, cfg, batches):
    """Before of each micro-batch; by a forward pass, which most configurations do not need. A collective.

    With several updates a step, pi_old is no longer pi. With entropy_level "batch", H is the mean of H_i over
    all demonstrations, or all rollouts, of the update. With entropy_quantile, entropy_floor is that quantile
    of H_t over all its rollout tokens.
    """
    if cfg.updates_per_rollout == 1 and cfg.entropy_level != "batch" and not cfg.entropy_quantile:
        return [Before(entropy_floor=cfg.entropy_floor)] * len(batches)
    found, sums, tokens = [], torch.zeros(2, 2, dtype=torch.float64), []    # (rollouts, demos) x (sum, count)
    for sequences in batches:
        logp, entropy, _ = run.policy(M.collate(sequences, run.device), cfg.temperature)
        found.append(Before(logp, None, cfg.entropy_floor))
        for s, h in zip(sequences, entropy.cpu()):                # one read from the device for all sequences
            sums[int(s.is_demo)] += torch.tensor([h.sum().item() / max(len(s.response), 1), 1.0])
            tokens += [] if s.is_demo else [h[:len(s.response)].numpy()]
    if cfg.entropy_quantile:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, np.concatenate([np.empty(0, np.float32), *tokens]))
        tokens = np.concatenate(everyone)
        for before in found:
            before.entropy_floor = float(np.quantile(tokens, cfg.entropy_quantile)) if len(tokens) else 0.0
    if cfg.entropy_level == "batch":
        dist.all_reduce(sums)
        mean = (sums[:, 0] / sums[:, 1].clamp(min=1)).float().to(run.device)
        for sequences, before in zip(batches, found):
            kind = column(sequences, "is_demo", run.device).long()
            before.entropy = mean[kind][:, None].expand_as(before.logp_old) if sequences else before.logp_old
    if cfg.updates_per_rollout == 1:
        for before in found:
            before.logp_old = None                                           # pi itself
    return found


def backward_micro_batch(run, cfg, sequences, before, n_demo, n_rollout, only=None):
    """Forward, loss (of the one term `only`, if given) and backward of one packed micro-batch. Returns what
    it adds to the update's sums.

    The host runs ahead of a GPU and queues work for it. Whatever asks for a number's value waits until the
    queue is empty, and the GPU then waits for the host. So all copies to the device come before the forward,
    what the host knows it counts itself, and everything else is read in one transfer at the end.
    """
    batch, reference, inputs = M.collate(sequences, run.device), None, None
    if sequences:
        inputs = loss_inputs(sequences, run.device)
    if run.reference:
        with torch.no_grad():
            reference = run.reference(batch, features=True)
    logp, entropy, kl = run.policy(batch, cfg.temperature, bool(cfg.entropy_coef), reference)    # (B,T) each
    if not sequences:
        (logp.sum() * 0).backward()               # no work here, but other ranks wait in the collectives
        return {}
    mask, reward, advantage, is_demo, engine_logp = inputs
    with torch.no_grad():
        # log pi - log pi_engine on rollout tokens, 0 but for numerics, and the truncated importance weight. A
        # log pi that is not finite is the trainer's own trouble, and ends in a gradient that is skipped.
        logp_old = logp.detach() if before.logp_old is None else before.logp_old
        compared = (mask > 0) & ~is_demo[:, None] & logp_old.isfinite()
        diff = torch.where(compared, logp_old - engine_logp, 0.0)
        ratio = diff.exp()
        tis = ratio.clamp(max=cfg.tis_cap) if cfg.tis_cap else None
    loss, counted = run.objective
    loss, stats = loss(
        logp, entropy if before.entropy is None else before.entropy, mask, reward, advantage, is_demo, cfg,
        n_demo, n_rollout, logp_old=before.logp_old, tis=tis, kl=kl, entropy_floor=before.entropy_floor,
        only=only)
    loss.backward()

    h = (entropy.detach() * mask).sum(1) / mask.sum(1).clamp(min=1)                               # (B,)
    capped = (ratio > cfg.tis_cap).sum() if cfg.tis_cap else torch.zeros_like(loss)
    measured = {"h_demo": torch.where(is_demo, h, 0.0).sum(), "h_rollout": torch.where(is_demo, 0.0, h).sum(),
                "capped": capped, "worst": diff.abs().max(), **stats}
    measured, differences = read_once(measured, diff.abs().sum(1))
    rollouts = [s for s in sequences if not s.is_demo]
    sums = {"demos": len(sequences) - len(rollouts), "rollouts": len(rollouts),
            "correct": sum(s.reward > 0 for s in rollouts), "tokens": sum(len(s.response) for s in rollouts)}
    # Loss terms are shares of the whole step's; other statistics are means over the sequences they count.
    for name, kind in counted.items():
        if not name.startswith("loss/"):
            measured[name] *= sums[kind]
    engines = [(s.engine, difference, len(s.response))
               for s, difference in zip(sequences, differences) if not s.is_demo]
    return sums | measured | {"engines": engines}


def read_once(scalars, rows):
    """(name -> float, list of floats) of name -> scalar tensor and a (B,) tensor, by one read of the
    device."""
    numbers = torch.stack([x.detach().float() for x in scalars.values()])
    numbers = torch.cat([numbers, rows]).tolist()
    return dict(zip(scalars, numbers)), numbers[len(scalars):]


SUMS = ("demos", "correct", "rollouts", "h_demo", "h_rollout", "tokens", "capped")


def update_policy(run, cfg, batches, before, n_demo, n_rollout):
    """One optimizer step on this rank's micro-batches: loss, clip, AdamW. Returns the metrics of all ranks,
    None for those of sequences that this update has none of.

    Gradients are sums, over micro-batches and ranks, of terms already divided by global counts. An update
    whose gradient is not finite is skipped. A collective.
    """
    parts = backward(run, cfg, batches, before, n_demo, n_rollout)
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), cfg.grad_clip).full_tensor().item()
    if np.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    counted = run.objective[1]
    names = (*SUMS, *counted)
    sums = torch.tensor([sum(part.get(name, 0.0) for part in parts) for name in names], dtype=torch.float64)
    worst = torch.tensor(max(part.get("worst", 0.0) for part in parts))
    engines = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64)      # sum of |diff|, tokens: of each
    for part in parts:
        for engine, difference, tokens in part.get("engines", ()):
            engines[engine] += torch.tensor([difference, tokens])
    dist.all_reduce(sums)
    dist.all_reduce(engines)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    by_engine = engines[:, 0] / engines[:, 1].clamp(min=1)
    total = dict(zip(names, sums.tolist()))
    per = lambda name, count: total[name] / total[count] if total[count] else None
    return {name: (total[name] if total[kind] else None) if name.startswith("loss/") else per(name, kind)
            for name, kind in counted.items()} | {
        "entropy/demo": per("h_demo", "demos"), "entropy/rollout": per("h_rollout", "rollouts"),
        "engine/logp_diff_mean": engines[:, 0].sum().item() / total["tokens"] if total["tokens"] else None,
        "engine/logp_diff_rank": by_engine.max().item() if total["tokens"] else None,
        "engine/logp_diff_max": worst.item() if total["tokens"] else None,
        "tis/capped": per("capped", "tokens"), "grad_norm": norm}


def backward(run, cfg, batches, before, n_demo, n_rollout, only=None):
    """backward_micro_batch of each, gradients summed; returns the list of what they return."""
    parts = []
    for i, (sequences, old) in enumerate(zip(batches, before), 1):
        M.accumulate(run.policy, last=i == len(batches))
        parts.append(backward_micro_batch(run, cfg, sequences, old, n_demo, n_rollout, only))
    return parts


def term_gradient_norms(run, cfg, batches, before, n_demo, n_rollout):
    """{"grad_norm/TERM": norm of the gradient of that loss term alone}: which term drives the update. One
    forward and backward for each term that the update has sequences of; changes nothing. A collective."""
    norms, there = {}, {"demos": n_demo, "rollouts": n_rollout}
    for name, kind in run.objective[1].items():
        if name.startswith("loss/") and there[kind]:
            backward(run, cfg, batches, before, n_demo, n_rollout, only=name)
            norm = torch.nn.utils.get_total_norm([p.grad for p in run.policy.parameters()])
            norms[name.replace("loss/", "grad_norm/")] = norm.full_tensor().item()
            run.optimizer.zero_grad(set_to_none=True)
    return norms
