"""SRFT: supervised and reinforcement fine-tuning in a single stage (Eq. 5-13 of the paper), end to end.

    torchrun --local_addr=127.0.0.1 --nproc_per_node=8 srft.py                # the paper's 7B run
    torchrun --local_addr=127.0.0.1 --nproc_per_node=2 srft.py --preset tiny  # a laptop's CPU, in minutes
    python srft.py --dry_run                                                  # the memory plan, nothing else

Read it from the top: the objective (group_advantage, srft_loss), one optimizer update (update_policy), the
rollouts of a step (augmented_groups), and the training loop that joins them (train). Start, end and checks
come after.

Where the paper leaves something open, this is what the defaults do (docs/decisions.md has all, and why):

1. The demonstration joins the 8 rollouts in one group of 9 (Eq. 6 is a union).
2. Each response's sum over tokens is divided by its length, in all four terms (the normalizer of Eq. 3), so
   that 0.5 of Eq. 8 and 0.1 of Eq. 12 are on one scale.
3. H in the weights is the mean entropy of the sequence's own response tokens, without gradient.
4. Both sums of Eq. 12 are divided by all rollouts: it is one expectation over rollouts, right and wrong ones.
5. One update a step, so rollouts are on-policy (Eq. 11), and no ratio to an older policy is needed.
6. Rollout tokens carry a truncated importance weight pi/pi_engine: the engine's numbers are not the trainer's.
"""
import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer

import model as M
from config import METHODS, asks_for_the_papers_loss, check_config, parse_args, sequences_per_prompt
from data import Order, load_examples, tokenize
from eval import Sampling, evaluate, unmatchable
from reward import Grader, Verdict
from rollout import RolloutEngine, check_environment
from support.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from support.device import memory_gb, peak_flops, to_device
from support.processes import (Ranks, fetch, hang_watch, init_distributed, mistakes_in_one_line, phase,
                               seed_everything, set_timeouts, start_profiler, write_profile)
from support.runlog import RunLog, read_rows
from support.versions import check_versions, environment, versions


# ----------------------------------------------------------------------------------------------------------
# The objective.

def group_advantage(reward, group, use_std=True, eps=1e-6):
    """Eq. 7: A_k = (r_k - mean(r)) / (std(r) + eps) over the sequences of k's group (Eq. 2 if it has no
    demonstration).

    reward (B,) float; group (B,) int64, one number for each prompt -> (B,). Population standard deviation.

    >>> group_advantage(torch.tensor([1., 0., 0., 1.]), torch.tensor([0, 0, 1, 1]))
    tensor([ 1.0000, -1.0000, -1.0000,  1.0000])
    """
    # In float64: where all rewards of a group are equal, A must be 0, and a mean rounded to float32 may be
    # off by 1e-8, which the division by eps would magnify.
    r = reward.double()
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count), dtype=r.dtype, device=r.device).index_add_(0, index, r) / count
    centred = r - mean[index]
    if not use_std:
        return centred.to(reward.dtype)
    variance = torch.zeros_like(mean).index_add_(0, index, centred**2) / count
    return (centred / (variance.sqrt()[index] + eps)).to(reward.dtype)


def srft_loss(logp, entropy, mask, reward, advantage, is_demo, n_demo, n_rollout, tis=None):
    """Eq. 13: L_SRFT = L_SFT^demo (Eq. 8) + L_RL^demo (Eq. 9) + L_RL^self-rollout (Eq. 12), on one micro-batch.

    With <x>_i = (1/|y_i|) sum_t x_{i,t} and H_i = <H_{i,t}>, gradient stopped:

        sft_demo   (1/n_demo)    sum over demonstrations    0.5 exp(-H_i) <-log pi>_i         Eq. 8
        rl_demo   -(1/n_demo)    sum over demonstrations    A_i <pi>_i                        Eq. 9, 10
        rl_pos     (1/n_rollout) sum over correct rollouts  0.1 exp(H_i) <-log pi>_i          Eq. 12, left
        rl_neg     (1/n_rollout) sum over wrong rollouts    <log pi>_i                        Eq. 12, right

    logp       (B,T) log pi_theta(y_t | x, y_<t) in nats, with gradient
    entropy    (B,T) H_t of the same distribution, in nats
    mask       (B,T) 1 on response tokens (EOS included), 0 on padding, where the others may hold anything
    reward     (B,)  R(x, y) of Eq. A2: 1.0 correct, 0.0 not
    advantage  (B,)  A of Eq. 7, over the group of rollouts and demonstration
    is_demo    (B,)  bool
    n_demo, n_rollout   sequences of each kind in the WHOLE optimizer update, over all ranks and micro-batches:
                        so the terms and gradients of micro-batches simply add up
    tis        (B,T) truncated importance weights pi/pi_engine of rollout tokens; None: none

    Returns (terms, weights): the four scalars above with graph, whose sum is the loss, and "w_sft", "w_rl",
    (B,) without graph. Needs torch alone.
    """
    is_demo = is_demo.bool()
    mask = mask.to(logp.dtype)
    length = mask.sum(1).clamp(min=1)                          # (B,) |y_i|
    # A nan on padding would survive a product with 0, so padding is overwritten.
    log_pi = logp.masked_fill(mask == 0, 0.0)
    entropy = entropy.detach().masked_fill(mask == 0, 0.0)

    def mean(x):                                               # <x>_i: (B,T) -> (B,)
        return (x * mask).sum(1) / length

    def average(x, which, n):                                  # (1/n) sum over the sequences `which` of x_i
        return torch.where(which, x, 0.0).sum() / max(n, 1)

    # The weights are numbers, not functions of theta: with a gradient, SRFT would also train H itself.
    H = mean(entropy)                                          # (B,)
    w_sft = 0.5 * torch.exp(-H)                                # Eq. 8: where pi is unsure, imitate less
    w_rl = 0.1 * torch.exp(H)                                  # Eq. 12: where pi is sure, reinforce less
    # Eq. 10: the behaviour policy of a demonstration is unknown, so pi_beta = 1 and the ratio is pi itself.
    # No clip: where pi is small, its gradient pi * grad log pi vanishes by itself.
    ratio = log_pi.exp()
    # Eq. 11-12 take the log-likelihood of what the engine sampled, on this policy (see TIS in the module).
    score = log_pi
    if tis is not None:
        score = log_pi * tis.masked_fill(mask == 0, 0.0)
    correct = ~is_demo & (reward > 0)
    wrong = ~is_demo & ~correct

    terms = {
        "sft_demo": average(mean(w_sft[:, None] * -log_pi), is_demo, n_demo),                   # Eq. 8
        "rl_demo": average(-advantage * mean(ratio), is_demo, n_demo),                          # Eq. 9
        "rl_pos": average(-mean(w_rl[:, None] * score), correct, n_rollout),     # Eq. 12: reward +1, pull up
        "rl_neg": average(+mean(score), wrong, n_rollout),                       # Eq. 12: reward -1, push down
    }
    return terms, {"w_sft": w_sft, "w_rl": w_rl}


def load_objective(cfg):
    """srft_loss at the paper's defaults; where a flag asks for another reading or method, that of paper/."""
    if asks_for_the_papers_loss(cfg):
        return srft_loss
    from paper.baselines import Objective
    return Objective(cfg)


# ----------------------------------------------------------------------------------------------------------
# One optimizer update: forward, loss, backward; clip; AdamW.

@dataclass
class Tally:
    """What micro-batches and ranks measure, to be added up."""
    losses: Counter = field(default_factory=Counter)   # loss term -> its value
    sums: Counter = field(default_factory=Counter)     # numbers of sequences, sums over sequences
    drift: Counter = field(default_factory=Counter)    # rank of an engine -> sum of |log pi - log pi_engine|
    tokens: Counter = field(default_factory=Counter)   # rank of an engine -> rollout tokens that it sampled
    worst: float = 0.0                                 # the largest |log pi - log pi_engine|

    def plus(self, other):
        """Both together, as a new one."""
        total = Tally(worst=float(np.maximum(self.worst, other.worst)))         # nan, if one of them is
        for name in ("losses", "sums", "drift", "tokens"):
            counter = getattr(total, name)
            counter.update(getattr(self, name))                    # Counter.update adds, key by key
            counter.update(getattr(other, name))
        return total


def pad(rows, device):
    """Lists of different lengths -> (B,T) float tensor, zeros on the right."""
    rows = [torch.as_tensor(np.asarray(row, np.float32)) for row in rows]
    return to_device(pad_sequence(rows, batch_first=True), device)


def column(sequences, name, device):
    """One number of each sequence -> (B,) float tensor."""
    return to_device([float(getattr(s, name)) for s in sequences], device, torch.float32)


def loss_inputs(sequences, device):
    """What the loss asks of the data, not of the policy: mask (B,T), reward, advantage, is_demo (B,), and
    log pi_engine (B,T), which is 0 on demonstrations: no engine has sampled them."""
    masks, engine_logps = [], []
    for s in sequences:
        masks.append(np.ones(len(s.response)))
        engine_logps.append(np.zeros(len(s.response)) if s.is_demo else s.engine_logp)
    return (pad(masks, device), column(sequences, "reward", device), column(sequences, "advantage", device),
            column(sequences, "is_demo", device).bool(), pad(engine_logps, device))


def backward_micro_batch(policy, objective, sequences, asked, n_demo, n_rollout, reference, cfg, device):
    """Forward, loss and backward of one packed micro-batch; gradients add up in `policy`. Returns its Tally.

    sequences: list of model.Sequence, at most cfg.micro_batch_tokens together; [] where this rank has fewer
    micro-batches than others. objective: srft_loss, or one of paper/, which asks for further inputs: asked.
    n_demo, n_rollout: as in srft_loss. reference: frozen model.Policy for a KL, or None. A collective: FSDP2
    gathers the weights of each block from all ranks just before forward and backward need them.
    """
    # The host runs ahead of a GPU and queues work for it. Whatever asks for a number's value waits until the
    # queue is empty, and the GPU then waits for the host. So all copies to the device come before the forward,
    # what the host knows it counts itself, and everything else is read in one transfer at the end.
    batch = M.collate(sequences, device)
    inputs = loss_inputs(sequences, device) if sequences else None
    features = None
    if reference is not None:
        with torch.no_grad():
            features = reference(batch, features=True)
    logp, entropy, kl = policy(batch, cfg.temperature, bool(cfg.entropy_coef), features)        # (B,T) each
    if not sequences:
        (logp.sum() * 0).backward()       # nothing to learn, but other ranks wait in this backward's collectives
        return Tally()
    mask, reward, advantage, is_demo, engine_logp = inputs

    with torch.no_grad():
        # log pi - log pi_engine is 0 but for numerics: other kernels, bf16. pi/pi_engine, capped, weighs each
        # rollout token so that its expectation is that of a sample from pi. A log pi that is not finite is
        # the trainer's own trouble: it is left out here, and ends in a gradient that is skipped.
        logp_old = asked.get("logp_old", logp.detach())
        compared = (mask > 0) & ~is_demo[:, None] & logp_old.isfinite()
        difference = torch.where(compared, logp_old - engine_logp, 0.0)                         # (B,T)
        importance = difference.exp()                                # 1 on demonstrations and on padding
        tis = importance.clamp(max=cfg.tis_cap) if cfg.tis_cap else None
    if kl is not None:
        asked = asked | {"kl": kl}
    terms, weights = objective(
        logp=logp, entropy=entropy, mask=mask, reward=reward, advantage=advantage, is_demo=is_demo,
        n_demo=n_demo, n_rollout=n_rollout, tis=tis, **asked)
    sum(terms.values()).backward()                                                              # Eq. 13

    with torch.no_grad():
        h = (entropy * mask).sum(1) / mask.sum(1).clamp(min=1)                                  # (B,) H_i
        measured = {"h_demo": torch.where(is_demo, h, 0.0).sum(),
                    "h_rollout": torch.where(is_demo, 0.0, h).sum(), "worst": difference.abs().max()}
        if cfg.tis_cap:
            measured["capped"] = (importance > cfg.tis_cap).sum()
        counted = {"w_sft": is_demo, "w_rl": ~is_demo & (reward > 0)}       # the sequences that a weight is for
        for name, weight in weights.items():
            measured[name] = torch.where(counted[name], weight, 0.0).sum()
        losses, measured, differences = read_once(terms, measured, difference.abs().sum(1))
    worst = measured.pop("worst")
    return Tally(Counter(losses), Counter(measured), worst=worst).plus(count(sequences, differences))


def read_once(terms, scalars, rows):
    """(name -> float, name -> float, list of floats) of two dictionaries of scalar tensors and a (B,) tensor,
    by one read of the device."""
    numbers = torch.stack([x.detach().float() for x in (*terms.values(), *scalars.values())])
    numbers = torch.cat([numbers, rows]).tolist()
    after = len(terms) + len(scalars)
    return dict(zip(terms, numbers)), dict(zip(scalars, numbers[len(terms):])), numbers[after:]


def count(sequences, differences):
    """The Tally of what the host knows. differences: sum of |log pi - log pi_engine| of each sequence."""
    tally = Tally()
    for s, difference in zip(sequences, differences):
        if s.is_demo:
            tally.sums["demos"] += 1
            continue
        tally.sums["rollouts"] += 1
        tally.sums["correct"] += s.reward > 0
        tally.drift[s.engine] += difference
        tally.tokens[s.engine] += len(s.response)
    return tally


def backward(objective, policy, micro_batches, asked, n_demo, n_rollout, reference, cfg, device):
    """Forward, loss and backward of an update's micro-batches on this rank -> their Tally. Gradients are sums,
    over micro-batches and ranks, of terms already divided by global counts, so they are the same for every
    split. A collective: every rank must have as many micro-batches."""
    tally = Tally()
    for i, (sequences, inputs) in enumerate(zip(micro_batches, asked), start=1):
        M.accumulate(policy, last=i == len(micro_batches))
        tally = tally.plus(backward_micro_batch(
            policy, objective, sequences, inputs, n_demo, n_rollout, reference, cfg, device))
    return tally


def update_policy(policy, optimizer, tally, grad_clip):
    """Clip, AdamW. The gradients are there, `tally` is what this rank measured on the way. Returns the update's
    metrics, of all ranks; None for the mean over sequences that it has none of. A collective.

    An update whose gradient is not finite is skipped: AdamW's moments would never forget it.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip).full_tensor().item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tally)
    total = Tally()
    for part in everyone:
        total = total.plus(part)

    def mean(name, n):
        return total.sums[name] / n if n else None

    sums, tokens = total.sums, total.tokens.total()
    metrics = {f"loss/{name}": value for name, value in total.losses.items()}
    if "w_sft" in sums:
        metrics |= {"w_sft": mean("w_sft", sums["demos"]), "w_rl": mean("w_rl", sums["correct"])}
    of_engines = [total.drift[engine] / n for engine, n in total.tokens.items() if n]
    return metrics | {
        "entropy/demo": mean("h_demo", sums["demos"]), "entropy/rollout": mean("h_rollout", sums["rollouts"]),
        "engine/logp_diff_mean": total.drift.total() / tokens if tokens else None,
        "engine/logp_diff_rank": float(np.max(of_engines)) if tokens else None,
        "engine/logp_diff_max": total.worst if tokens else None,
        "tis/capped": mean("capped", tokens), "grad_norm": norm}


def learning_rate(cfg, step):
    """Of one step, counted from 1: constant, or up over the first cfg.warmup of the steps and down to 0."""
    if cfg.lr_schedule == "constant":
        return cfg.lr
    rising = step / max(1, cfg.warmup * cfg.steps)
    falling = (cfg.steps - step + 1) / ((1 - cfg.warmup) * cfg.steps)
    return cfg.lr * min(1.0, rising, falling)


# ----------------------------------------------------------------------------------------------------------
# The sequences of one step: rollouts, rewards, demonstrations, advantages.

FAILED = ("timeout", "killed")          # reasons of a verdict that say nothing about the response


@dataclass
class Answered:
    """A step's prompts with their responses, of one rank or of all."""
    sequences: list                # of model.Sequence; Sequence.group is the prompt's place in the step
    samples: list                  # rows for samples.jsonl
    grading: Counter               # how often each reason of a verdict fell; "ms", all their milliseconds
    demo_rewards: dict             # id -> reward of the demonstrations graded in this step


def sample_and_grade(prompts, places, step, cfg, engine, grader, demo_rewards):
    """This rank's rollouts, each graded as soon as it ends: grading hides behind the decoding of longer ones.

    prompts: the step's, list of data.Prompt; this rank answers those at `places` (a range). demo_rewards: the
    demonstrations whose reward is known; others are graded beside the rollouts.
    Returns (place -> its Rollouts; verdicts: (place, k) of the k-th rollout of a prompt, or the id of an
    example for its demonstration -> Verdict; the time when generation ended).
    """
    n_rollouts, n_demos = sequences_per_prompt(cfg)
    submitted = []                  # what each verdict will be of: the grader answers in the order of submission
    for place in places:
        example = prompts[place].example
        if n_demos and prompts[place].demo and example.id not in demo_rewards and example.id not in submitted:
            grader.submit([example.demo], [example.answer])
            submitted.append(example.id)

    def grade_finished(ended):      # the engine calls it after every decoding step; often nothing has ended
        for i, k, rollout in ended:
            place = places[i]
            grader.submit([rollout.text], [prompts[place].example.answer], [rollout.finished])
            submitted.append((place, k))
        grader.submit()             # lets the workers go on, where nothing is new

    rollouts = [[] for _ in places]
    if n_rollouts:
        # What a prompt yields depends on (seed, step, its place in the step), not on the number of ranks or on
        # what went before: a resumed run draws the same rollouts. The weights must be those of the last step.
        seeds = np.random.SeedSequence([cfg.seed, step]).generate_state(len(prompts), np.uint64).tolist()
        rollouts = engine.generate(
            [prompts[place].ids for place in places], n_rollouts, cfg.temperature, cfg.max_response_tokens,
            [seeds[place] for place in places], version=step - 1, on_step=grade_finished)
    generated = time.monotonic()
    phase("grade", step)
    return dict(zip(places, rollouts)), dict(zip(submitted, grader.collect())), generated


def demonstration(prompt, place=0, reward=0.0):
    """A Prompt's demonstration as a training sequence."""
    return M.Sequence(np.asarray(prompt.ids, np.int32), np.asarray(prompt.demo, np.int32), is_demo=True,
                      group=place, reward=reward)


def augmented_groups(prompts, step, cfg, engine, grader, demo_rewards, ranks):
    """Eq. 6: for each prompt of the step its 8 rollouts of the current policy and its demonstration, as the
    method has them, with their rewards (Eq. A2). Each rank answers its share of the prompts, then all exchange.

    prompts, demo_rewards: as in sample_and_grade, the same on every rank. ranks: support.processes.Ranks.
    Returns (Answered, the same on every rank but for samples' order; time when generation ended on this one).
    A collective.
    """
    places = range(len(prompts) * ranks.rank // ranks.world, len(prompts) * (ranks.rank + 1) // ranks.world)
    rollouts, verdicts, generated = sample_and_grade(
        prompts, places, step, cfg, engine, grader, demo_rewards)
    sequences = []
    for place in places:
        prompt = prompts[place]
        for k, rollout in enumerate(rollouts[place]):
            sequences.append(M.Sequence(
                np.asarray(prompt.ids, np.int32), np.asarray(rollout.tokens, np.int32), group=place,
                reward=verdicts[place, k].reward, engine_logp=np.asarray(rollout.logprobs, np.float32),
                engine=ranks.rank, finished=rollout.finished))
        if prompt.demo and sequences_per_prompt(cfg)[1]:
            id = prompt.example.id
            reward = verdicts[id].reward if id in verdicts else demo_rewards[id]
            sequences.append(demonstration(prompt, place, reward))

    grading, known = Counter(), {}
    for key, verdict in verdicts.items():
        grading.update({verdict.reason: 1, "ms": verdict.ms})
        if isinstance(key, str) and verdict.reason not in FAILED:      # a demonstration: graded once and for all
            known[key] = verdict.reward
    samples = sample_rows(prompts, rollouts, verdicts, step, cfg.log_samples if ranks.rank == 0 else 0)
    phase("exchange", step)
    everyone = [None] * ranks.world
    dist.all_gather_object(everyone, Answered(sequences, samples, grading, known))   # tokens, no tensors: a few MB
    total = Answered([], [], Counter(), {})
    for part in everyone:
        total = Answered(total.sequences + part.sequences, total.samples + part.samples,
                         total.grading + part.grading, total.demo_rewards | part.demo_rewards)
    return total, generated


def sample_rows(prompts, rollouts, verdicts, step, count):
    """Rows for samples.jsonl: `count` rollouts, the first of each prompt before the second of any; and every
    demonstration that was just graded wrong: it is kept, but a person should know."""
    def row(example, response, verdict, demo):
        return {"step": step, "id": example.id, "demo": demo, "prompt": example.problem,
                "answer": example.answer, "response": response, "reward": verdict.reward,
                "reason": verdict.reason}

    keys = sorted((key for key in verdicts if isinstance(key, tuple)), key=lambda key: (key[1], key[0]))
    rows = []
    for place, k in keys[:count]:
        rows.append(row(prompts[place].example, rollouts[place][k].text, verdicts[place, k], demo=False))
    examples = {prompts[place].example.id: prompts[place].example for place in rollouts}
    for key, verdict in verdicts.items():
        if isinstance(key, str) and not verdict.reward:
            rows.append(row(examples[key], examples[key].demo, verdict, demo=True))
    return rows


def with_advantages(sequences, cfg):
    """The sequences with their advantages: Eq. 7 over rollouts and demonstration, or Eq. 2 over the rollouts
    alone where the method leaves the demonstration out of the group."""
    demo_in_group = METHODS[cfg.method].demos == "group"
    grouped = [s for s in sequences if demo_in_group or not s.is_demo]
    reward = torch.tensor([s.reward for s in grouped])
    group = torch.tensor([s.group for s in grouped])
    advantages = iter(group_advantage(reward, group, cfg.std_in_advantage).tolist())
    found = []
    for s in sequences:
        if demo_in_group or not s.is_demo:
            s = replace(s, advantage=next(advantages))
        found.append(s)
    return found


# ----------------------------------------------------------------------------------------------------------
# The training loop.

@dataclass
class Progress:
    """How far a run has come: with weights, optimizer and random states, all that a checkpoint must hold."""
    step: int = 0                                         # steps done
    skipped: int = 0                                      # updates skipped for a gradient that was not finite
    position: int = 0                                     # examples that data.Order has handed out
    failed: list = field(default_factory=list)            # ReLIFT: prompts that wait for their demonstration
    demo_rewards: dict = field(default_factory=dict)      # id -> reward of the demonstrations graded so far


@dataclass(kw_only=True)
class Run:
    """What setup prepares for the training loop."""
    ranks: Ranks                         # this rank, how many there are, its device, the mesh of all
    tokenizer: object
    prompts: list                        # of data.Prompt: all training data
    heldout: dict                        # name -> list of data.Prompt
    policy: M.Policy                     # pi_theta, sharded over the ranks
    reference: M.Policy | None           # the frozen base model; only with --kl_coef
    optimizer: torch.optim.Optimizer
    engine: RolloutEngine                # pi_theta once more, as vLLM serves it
    grader: Grader
    progress: Progress
    log: RunLog


def train(cfg, run):
    """SRFT, step by step, as in Sec. 4.3. Returns the last step's metrics."""
    stopping = finish_step_on_signals(run.ranks.rank)
    rank, world, device, mesh = run.ranks
    objective, progress = load_objective(cfg), run.progress
    order = Order(len(run.prompts), cfg.seed, progress.position)
    health = Health()
    bar = tqdm(total=cfg.steps, initial=progress.step, desc=cfg.method, disable=rank != 0, dynamic_ncols=True)
    metrics, stop, first = {}, False, progress.step + 1
    if progress.step == 0:
        run.log.write({"step": 0} | evaluation(cfg, run, 0))
    for step in range(first, cfg.steps + 1):
        profiler = start_profiler() if step == cfg.profile else None
        phase("rollout", step)
        clock = [time.monotonic()]

        # 1. The step's prompts, the same on every rank. A prompt is known by its place among them.
        indices = order.take(cfg.prompts_per_step)
        prompts = [run.prompts[i] for i in indices]

        # 2. Rollouts from the engine, each graded when it ends; the demonstration joins its group (Eq. 6).
        #    The paper's run: 128 prompts x (8 rollouts + 1 demonstration) = 1,152 sequences.
        answered, generated = augmented_groups(
            prompts, step, cfg, run.engine, run.grader, progress.demo_rewards, run.ranks)
        demo_rewards = progress.demo_rewards | answered.demo_rewards
        clock += [generated, time.monotonic()]
        memory = [memory_gb(device)]

        # 3. Advantages (Eq. 7), and a share of the prompts for each update: by default one update, on all.
        phase("train", step)
        run.engine.sleep()                                # the GPU's memory is for training now
        sequences = with_advantages(answered.sequences, cfg)
        shares = [[] for _ in range(cfg.updates_per_rollout)]
        for s in sequences:
            shares[s.group % cfg.updates_per_rollout].append(s)
        failed = progress.failed
        if METHODS[cfg.method].demos == "failed":
            from paper.baselines import failed_prompts
            failed = failed + failed_prompts(run.prompts, indices, sequences)
            if len(failed) >= cfg.prompts_per_step:       # a step's worth: one more update, on demonstrations
                now, failed = failed[:cfg.prompts_per_step], failed[cfg.prompts_per_step:]
                shares.append([demonstration(run.prompts[i]) for i in now])

        # 4. Pack into micro-batches of at most 16,384 tokens, without padding, and deal them to the ranks like
        #    cards: of 1,152 sequences of 2,000 tokens each of 8 ranks gets 18 micro-batches. Their number is a
        #    multiple of the ranks, since all must run as many forwards and backwards.
        packs = []
        for share in shares:
            micro_batches = M.pack(share, cfg.micro_batch_tokens, multiple_of=world,
                                   cost=lambda sequence: run.policy.flops([sequence]))
            packs.append(micro_batches[rank::world])
        # Before the first update: what only other readings and methods ask for, such as log pi_old.
        asked = [[{} for _ in micro_batches] for micro_batches in packs]
        if objective is not srft_loss:
            asked = [objective.before_update(run.policy, micro_batches, share, device)
                     for micro_batches, share in zip(packs, shares)]

        # 5. Forward, loss (Eq. 13) and backward of each micro-batch; clip; AdamW.
        for parameters in run.optimizer.param_groups:
            parameters["lr"] = learning_rate(cfg, step)
        updates, norms = [], {}
        for share, micro_batches, inputs in zip(shares, packs, asked):
            n_demo = sum(s.is_demo for s in share)        # of all ranks: every rank has the whole share
            add_gradients = partial(
                backward, policy=run.policy, micro_batches=micro_batches, asked=inputs, n_demo=n_demo,
                n_rollout=len(share) - n_demo, reference=run.reference, cfg=cfg, device=device)
            if cfg.term_gradients and step % cfg.term_gradients == 0 and not updates:
                from paper.readings import term_gradient_norms
                norms = term_gradient_norms(add_gradients, objective, run.policy)
            tally = add_gradients(objective)
            updates.append(update_policy(run.policy, run.optimizer, tally, cfg.grad_clip))
        clock.append(time.monotonic())
        memory.append(memory_gb(device))

        # 6. Send the new weights to the engine, as the version that the next step asks for.
        phase("sync", step)
        stop = anyone(bool(stopping))                     # ranks may get the signal in different steps
        # Who is told to stop has minutes: they are for the checkpoint.
        evaluate_now = step == cfg.steps or (step % cfg.eval_every == 0 and not stop)
        if METHODS[cfg.method].rollouts or evaluate_now:
            run.engine.sync_weights(M.full_parameters(run.policy, M.compute_dtype(device)), version=step)
        clock.append(time.monotonic())

        # 7. Log; evaluate; stop where going on would only waste the machine; checkpoint.
        if profiler:
            phase("write profile", step)
            write_profile(profiler, Path(cfg.out) / "profile")
        phase("log", step)
        skipped = progress.skipped + sum(not math.isfinite(update["grad_norm"]) for update in updates)
        progress = Progress(step, skipped, order.position, failed, demo_rewards)
        metrics = {"step": step} | summarize(cfg, run, sequences, answered.grading, updates, clock) | norms
        metrics |= {"steps_skipped": skipped, "lr": learning_rate(cfg, step),
                    "perf/peak_memory_gb": max(memory)}
        trouble = health.look(metrics, updates, answered.grading, prompts)
        if evaluate_now and not trouble:
            metrics |= evaluation(cfg, run, step)
        run.log.write(metrics, answered.samples, last=step == cfg.steps)
        show_progress(bar, metrics)
        if trouble:
            raise RuntimeError(trouble)
        phase("checkpoint", step)
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            state = asdict(progress) | {"data": [cfg.data, len(run.prompts), cfg.seed]}
            save_checkpoint(Path(cfg.out) / "checkpoints", run.policy, run.optimizer, state, cfg.keep)
        if stop:
            break
        if step == first:
            set_timeouts(mesh, cfg.hang_minutes)          # compiled and warm: from now on no phase takes hours
    bar.close()
    if not stop:
        phase("export", cfg.steps)
        M.export_hf(Path(cfg.out) / "hf", run.policy, run.tokenizer, M.compute_dtype(device))
    finish(cfg, run, exported=not stop)
    return metrics


def finish_step_on_signals(rank):
    """From now on SIGTERM and Ctrl-C only fill the list that this returns; the loop looks at it once a step."""
    received = []

    def stop_soon(number, _):
        received.append(number)
        if received.count(signal.SIGINT) > 2:             # torchrun passes a Ctrl-C on: it may come twice
            raise KeyboardInterrupt
        if rank == 0 and len(received) == 1:
            print(f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint", flush=True)

    signal.signal(signal.SIGTERM, stop_soon)
    signal.signal(signal.SIGINT, stop_soon)
    return received


def anyone(flag):
    """True on every rank if `flag` is on any. A collective."""
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


# ----------------------------------------------------------------------------------------------------------
# Evaluation and metrics.

def evaluation(cfg, run, step):
    """The metrics of all held-out sets (Sec. 5.1, at training's own length). A collective."""
    if not run.heldout:
        return {}
    compare_engine(cfg, run, step)
    sampling = Sampling(cfg.eval_temperature, cfg.eval_top_p, cfg.max_response_tokens, cfg.seed)
    found = {}
    for name, prompts in run.heldout.items():
        phase(f"evaluate {name}", step)
        result = evaluate(run.engine, run.grader, name, prompts, cfg.eval_samples, sampling, step)
        found[f"eval/{name}"] = result["accuracy"]
        found[f"eval_len/{name}"] = result["tokens"]
        found[f"eval_entropy/{name}"] = result["entropy"]
    return found


def mean_of(values):
    """Of what is there; None if nothing is: a method without such sequences, an update without that kind."""
    values = [float(value) for value in values if value is not None]
    return sum(values) / len(values) if values else None


def summarize(cfg, run, sequences, grading, updates, clock):
    """The step's metrics from its sequences and updates; docs/metrics.md defines each.

    clock: when the step began, and when generation, exchange, training and the weight sync ended.
    """
    rollouts = [s for s in sequences if not s.is_demo]
    demos = [s for s in sequences if s.is_demo]
    solved, asked = np.zeros(cfg.prompts_per_step), np.zeros(cfg.prompts_per_step)
    for s in rollouts:
        solved[s.group] += s.reward
        asked[s.group] += 1
    metrics = {
        "reward/mean": mean_of(s.reward for s in rollouts),
        "reward/demo_mean": mean_of(s.reward for s in demos),
        "reward/all_correct": mean_of(solved == asked) if rollouts else None,
        "reward/all_wrong": mean_of(solved == 0) if rollouts else None,
        "response_len/mean": mean_of(len(s.response) for s in rollouts),
        "response_len/max": max((len(s.response) for s in rollouts), default=None),
        "response_len/truncated": mean_of(not s.finished for s in rollouts),
        "grader/timeouts": sum(grading[reason] for reason in FAILED),
        "perf/grader_ms": grading["ms"] / max(1, gradings(grading))}
    for reason in ("no_box", "unclosed", "truncated", "parse_fail"):
        metrics[f"grader/{reason}"] = grading[reason]
    # With several updates a step, each metric is their mean; of the worst difference, the worst.
    names = dict.fromkeys(name for update in updates for name in update)
    for name in names:
        metrics[name] = mean_of(update.get(name) for update in updates)
    worst = [update["engine/logp_diff_max"] for update in updates]
    metrics["engine/logp_diff_max"] = max((x for x in worst if x is not None), default=None)
    difference = metrics["engine/logp_diff_rank"]
    metrics["engine/mismatch"] = None if difference is None else int(not difference <= MISMATCH_WARNS)

    rollout, grade, training, sync = np.diff(clock).tolist()
    total = clock[-1] - clock[0]
    metrics |= {"time/rollout": rollout, "time/grade": grade, "time/train": training, "time/sync": sync,
                "time/step": total, "perf/tokens_per_s": sum(map(len, sequences)) / total, "perf/mfu": None}
    if run.ranks.device.type == "cuda":
        _, peak = peak_flops(torch.cuda.get_device_name(run.ranks.device))
        if peak:
            metrics["perf/mfu"] = run.policy.flops(sequences) / (training * run.ranks.world * peak)
    return metrics


def gradings(grading):
    """How many: all counts but the milliseconds."""
    return grading.total() - grading["ms"]


def show_progress(bar, metrics):
    """One more step on the progress bar, with what a person looks at first."""
    shown = {"reward": "reward/mean", "length": "response_len/mean", "entropy": "entropy/rollout",
             "loss": "loss/sft"}
    found = {}
    for name, key in shown.items():
        if metrics.get(key) is not None:
            found[name] = f"{metrics[key]:.3g}"
    bar.set_postfix(found, refresh=False)
    bar.update()


# ----------------------------------------------------------------------------------------------------------
# Is the run still worth its machine?

# Nats: mean of |log p(engine) - log p(trainer)| over the rollout tokens of one rank's engine, the highest of
# all ranks, so that one bad engine is not lost among 64. bf16 gives about 0.01 at 7B, the tiny model with its
# weights times 1.2 gives 0.17. Checked at every step: each follows a transfer of weights of its own, on a GPU
# into memory that was given away in between, and importance weights would hide a bad one.
MISMATCH_WARNS, MISMATCH_STOPS = 0.05, 0.15


def mismatch(difference, where):
    """What is wrong where an engine samples from another policy than the trainer trains."""
    return (f"engine and trainer disagree: |log p(engine) - log p(trainer)| is {difference:.3f} nats on "
            f"average {where}, at the rank where it is highest (warning above {MISMATCH_WARNS}, end above "
            f"{MISMATCH_STOPS}). The engine serves other weights, another RoPE or another temperature than "
            "the trainer; check --rope_theta, --window and the vllm version")


class Health:
    """Looks at every step, warns on rank 0, and says when to stop."""

    def __init__(self):
        self.skipped_in_a_row, self.warned = 0, False

    def look(self, metrics, updates, grading, prompts):
        """What to stop for, or "". The same on every rank."""
        bad = sum(not math.isfinite(update["grad_norm"]) for update in updates)
        self.skipped_in_a_row = self.skipped_in_a_row + bad if bad == len(updates) else 0
        warn_of_grader(metrics, grading)
        difference = metrics["engine/logp_diff_rank"]
        if difference is not None and not difference <= MISMATCH_WARNS:         # nan is a mismatch, too
            said = mismatch(difference, f"over the rollouts of step {metrics['step']}")
            if not difference <= MISMATCH_STOPS:
                return f"{said}. This step has no checkpoint: --resume goes on from the last one"
            if not self.warned:
                warn(f"{said}. A small model in bf16 may be that noisy")
            self.warned = True                                                  # once a run
        if self.skipped_in_a_row >= 5:
            return (f"the gradient was not finite {self.skipped_in_a_row} times in a row; the last batch held "
                    f"{[prompt.example.id for prompt in prompts]}. Lower --lr, or look at samples.jsonl.")
        return ""


def warn(text):
    """On rank 0, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(f"WARNING: {text}", file=sys.stderr)


def warn_of_grader(metrics, grading):
    """Others trained for days on rewards that were 0 because grading had broken down."""
    failed, total = metrics["grader/timeouts"], gradings(grading)
    if metrics["reward/mean"] != 0 or failed <= 0.005 * total:
        return
    warn(f"every reward is 0, and {failed} of {total:.0f} gradings were given up: the grader may be at fault, "
         "not the policy. Look at the reasons in samples.jsonl and at the load of this machine; raise "
         "--grader_deadline or --grader_workers")


@torch.no_grad()
def compare_engine(cfg, run, version):
    """Before an evaluation: raise RuntimeError unless each rank's engine, which has just got the weights of
    `version`, gives the trainer's log-probs to 8 rollouts of its own. A collective.

    A step's own rollouts tell it of the transfer before, and SFT has none. The prompts are random tokens,
    since those of the data would stay in the engine's prefix cache.
    """
    vocabulary, length = run.policy.lm.config.vocab_size, min(16, cfg.max_prompt_tokens)
    prompts = np.random.default_rng(run.ranks.rank).integers(0, vocabulary, (8, length)).tolist()
    groups = run.engine.generate(prompts, 1, cfg.temperature, min(64, cfg.max_response_tokens), cfg.seed,
                                 version)
    sequences = [M.Sequence(prompt, group[0].tokens) for prompt, group in zip(prompts, groups)]
    logp, *_ = run.policy(M.collate(sequences, run.ranks.device), cfg.temperature)              # (8,T)
    run.policy.reshard()               # a forward without backward leaves the root gathered
    ours = np.concatenate([row[:len(s.response)] for row, s in zip(logp.cpu().numpy(), sequences)])
    theirs = np.concatenate([group[0].logprobs for group in groups])
    difference = torch.tensor(float(np.abs(ours - theirs).mean())).nan_to_num(nan=np.inf)
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    if difference > MISMATCH_STOPS:
        raise RuntimeError(mismatch(difference.item(), f"before the evaluation of step {version}"))


# ----------------------------------------------------------------------------------------------------------
# Start and end.

def setup(cfg):
    """Everything before the first step -> Run: processes, data, sharded policy, engine, grader; with --resume,
    the state of the newest whole checkpoint. A collective."""
    ranks = init_distributed(cfg.device)
    say = print if ranks.rank == 0 else lambda *_: None
    check_versions(versions(), say)
    check_environment(ranks.device)
    checkpoint = find_checkpoint(cfg, ranks.world, say)
    folder = fetch(cfg.model, "model", "--model")
    config = M.load_config(folder, cfg.rope_theta, cfg.window)
    check_config(cfg, ranks.world, config.max_position_embeddings)
    say(f"{cfg.model}: RoPE theta {config.rope_parameters['rope_theta']:,.0f}, window "
        f"{config.max_position_embeddings:,} tokens")
    name_the_card(ranks.device, say)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # First of all the slow starters: its workers import sympy while the model is loaded.
    grader = Grader("math-verify", cfg.grader_workers or None, cfg.grader_deadline, text=cfg.grade_text,
                    strict_box=cfg.strict_box, score_unfinished=cfg.score_unfinished)
    prompts, heldout = load_data(cfg, tokenizer, grader, say)
    phase("load model")
    policy = load_model(cfg, folder, config, ranks)
    reference = load_reference(cfg, folder, config, ranks) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    phase("start engine")
    dtype = M.compute_dtype(ranks.device)
    engine = RolloutEngine(
        config, tokenizer, dtype, cfg.max_prompt_tokens + cfg.max_response_tokens, cfg.engine_sequences,
        cfg.engine_memory, cfg.engine_eager or ranks.device.type == "cpu", cfg.seed)
    seed_everything(cfg.seed + ranks.rank)
    phase("load checkpoint")
    progress = Progress()
    if checkpoint:
        progress = restore(cfg, checkpoint, policy, optimizer, len(prompts), say)
    if 0 < cfg.profile <= progress.step and ranks.rank == 0:
        print(f"--profile {cfg.profile}: that step is done, so there will be no trace", file=sys.stderr)
    phase("sync")
    engine.sync_weights(M.full_parameters(policy, dtype), progress.step)
    if ranks.rank == 0:
        write_config(cfg, ranks, progress.step if checkpoint else None)
    log = RunLog(Path(cfg.out), ranks.rank == 0, progress.step if checkpoint else -1)
    return Run(ranks=ranks, tokenizer=tokenizer, prompts=prompts, heldout=heldout, policy=policy,
               reference=reference, optimizer=optimizer, engine=engine, grader=grader, progress=progress, log=log)


def find_checkpoint(cfg, world, say):
    """(path, manifest) of the checkpoint to resume, or None. A collective. ValueError: --out holds a run that
    is not to be resumed, or ranks see different files there."""
    out, checkpoint = Path(cfg.out), None
    if cfg.resume:
        checkpoint = newest_checkpoint(out / "checkpoints", say)
    elif (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run: pass --resume to continue it, or another --out")
    found = [None] * world
    dist.all_gather_object(found, checkpoint and str(checkpoint[0]))
    if len(set(found)) > 1:
        raise ValueError(f"ranks see different checkpoints ({found}): --out must lie on a shared file system")
    return checkpoint


def name_the_card(device, say):
    """Say which GPU runs this and what perf/mfu is a share of."""
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    card, peak = peak_flops(name)
    if card:
        say(f"{name}: perf/mfu is of {peak / 1e12:.0f} TFLOP/s, {card}'s dense bf16 peak")
    else:
        say(f"{name}: peak FLOP/s not listed in support.device.PEAK_FLOPS, so no perf/mfu")


def load_model(cfg, folder, config, ranks):
    """The policy, sharded over all ranks, after a check that it sees packed sequences apart. A collective."""
    policy = M.load_policy(folder, config, ranks.mesh, ranks.device, cfg.activation_checkpointing, cfg.offload)
    M.check_packing(policy, ranks.device, config.vocab_size)
    return policy


def load_reference(cfg, folder, config, ranks):
    """The frozen base model of A1's KL: --reference, or --model as it was before training. A collective."""
    if cfg.reference:
        folder = fetch(cfg.reference, "model", "--reference")
    of_base = M.load_config(folder, cfg.rope_theta, cfg.window)
    if of_base.vocab_size != config.vocab_size:
        raise ValueError(f"--reference {cfg.reference}: has {of_base.vocab_size} tokens, the model has "
                         f"{config.vocab_size}: the KL of A1 needs one vocabulary")
    reference = M.load_policy(folder, of_base, ranks.mesh, ranks.device, offload=cfg.offload)
    reference.requires_grad_(False)
    M.check_packing(reference, ranks.device, of_base.vocab_size)
    return reference


def load_data(cfg, tokenizer, grader, say):
    """-> (the training prompts, name -> held-out prompts). A collective.

    A training prompt whose reference answer nothing can match is left out: every right response would count as
    wrong, and Eq. 12 would push it down. In a held-out set it is named and stays in the denominator.
    """
    phase("load data")
    prompts, heldout = load_prompts(cfg, cfg.data, "--data", tokenizer, say), {}
    for source in filter(None, cfg.eval_data.split(",")):
        name = Path(source).stem.removeprefix("tiny:")
        if name in heldout:
            raise ValueError(f"--eval_data: two sets are called {name}; rename one file")
        heldout[name] = load_prompts(cfg, source, "--eval_data", tokenizer, say)
        unmatchable(grader, f"--eval_data {name}", heldout[name], say)
    reasons = unmatchable(grader, "--data", prompts, say)
    # A check that ran out of time proves nothing, and would differ after a resume: its prompt stays.
    prompts = [prompt for i, prompt in enumerate(prompts) if reasons.get(i) in (None, *FAILED)]
    if not prompts:
        raise ValueError("--data: no reference answer can be matched; is `answer` the final answer alone?")
    if not METHODS[cfg.method].rollouts:
        prompts = [prompt for prompt in prompts if prompt.demo]
        if not prompts:
            raise ValueError("--data: no example has a demonstration (`solution`), and --method "
                             f"{cfg.method} learns from nothing else")
    return prompts, heldout


def load_prompts(cfg, source, flag, tokenizer, say):
    """One data set -> list of data.Prompt. A collective: of each node one rank downloads."""
    path = source if source.startswith("tiny:") else fetch(source, "dataset", flag)
    examples = load_examples(path, cfg.skip_bad_rows, say)
    if flag == "--eval_data":              # a long solution must not drop its problem from the evaluation
        examples = [replace(example, demo=None) for example in examples]
    return tokenize(examples, tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.max_response_tokens, say)


def restore(cfg, checkpoint, policy, optimizer, n_prompts, say):
    """Put weights and optimizer back to where `checkpoint` (path, manifest) was written -> its Progress. A
    collective. ValueError: it was trained on other data, or by another method or template."""
    path = checkpoint[0]
    state = load_checkpoint(*checkpoint, policy, optimizer)
    data = [cfg.data, n_prompts, cfg.seed]
    if state["data"] != data:
        raise ValueError(f"{path}: was trained on {state['data']} (data, prompts, seed), now {data}; resume "
                         "with the run's own flags")
    before, said = json.loads((Path(cfg.out) / "config.json").read_text()), f"resumed {path}"
    for name, now in asdict(cfg).items():
        then = before.get(name, now)
        if name == "resume" or then == now:
            continue
        if name in ("method", "template"):
            raise ValueError(f"{cfg.out}: was trained with --{name} {then}; resume with that, or start another "
                             "run from a model of its own, --model DIR")
        said += f"\n  with --{name} {now}, until now {then}"
    for parameters in optimizer.param_groups:                 # flags win over what the checkpoint recorded
        parameters["weight_decay"] = cfg.weight_decay
    say(said)
    del state["data"]
    return Progress(**state)


def write_config(cfg, ranks, resumed):
    """config.json: all fields, versions, machine, commit. resumed: the step that this start goes on from, or
    None; what held until then, if anything has changed, is kept as config-until-STEP.json."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    fields = asdict(replace(cfg, resume=False)) | {"ranks": ranks.world} | environment(ranks.device)
    settings = json.dumps(fields, indent=2)
    if resumed is not None and (out / "config.json").read_text() != settings:
        (out / "config.json").replace(out / f"config-until-{resumed}.json")
    (out / "config.json").write_text(settings)


def finish(cfg, run, exported):
    """Close everything; tell a person where things are, and how far held-out accuracy has come."""
    run.grader.close()
    dist.barrier()                                    # no rank leaves while another still talks to it
    run.engine.close()                                # before the process group: it owns parts of it
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.ranks.rank != 0:
        return
    if not exported:
        print(f"stopped; the checkpoint is in {cfg.out}/checkpoints, continue with --resume")
        return
    rows = read_rows(Path(cfg.out) / "metrics.jsonl")
    for name in sorted({key for row in rows for key in row if key.startswith("eval/")}):
        values = {row["step"]: row[name] for row in rows if name in row}
        first, last = min(values), max(values)
        before = f"step {first}" if first else "base"
        print(f"{name:<16} {before} {100 * values[first]:5.1f} %   trained {100 * values[last]:5.1f} %")
    print(f"curves: {cfg.out}/curves.png   model for transformers and vllm: {cfg.out}/hf")


def main():
    cfg = parse_args(description=__doc__)
    with hang_watch():
        with mistakes_in_one_line("srft.py"):
            if cfg.dry_run:
                from bench import plan
                plan.show(cfg)
                return
            run = setup(cfg)
        train(cfg, run)


if __name__ == "__main__":
    main()
