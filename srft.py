"""SRFT: supervised and reinforcement fine-tuning in a single stage (Eq. 5-13 of the paper), end to end.

    torchrun --local_addr=127.0.0.1 --nproc_per_node=8 srft.py                # the paper's 7B run
    torchrun --local_addr=127.0.0.1 --nproc_per_node=2 srft.py --preset tiny  # a laptop's CPU, in minutes
    python srft.py --dry_run                                                  # will it fit? Nothing else

Read it from the top: the objective (group_advantage, srft_loss), one optimizer update (backward_micro_batch,
update_policy), the sequences of a step (augmented_groups), and the loop that joins them (train). Then come
start and end.

Where the paper leaves something open, the defaults do this (docs/decisions.md has all of it, and why):

1. The demonstration joins the 8 rollouts in one group of 9: Eq. 6 is a union.
2. The paper's log pi(y|x) is a sum over tokens (A5). Here all four terms divide their sums over tokens by
   the response's length, as Eq. 3 does, so that the 0.5 of Eq. 8 and the 0.1 of Eq. 12 are on one scale.
3. The paper writes the weights outside of the expectations. Here each sequence has its own, by the mean
   entropy of its own response tokens, without gradient.
4. Rewards are 1 and 0 (A2). The +1 and -1 of Eq. 11 are the signs of the two sums of Eq. 12. Both sums are
   divided by all rollouts: it is one expectation, over right and wrong ones.
5. One update a step: rollouts are of the policy that they train (Eq. 11), so there is no ratio to an older
   one.
6. Rollout tokens carry a truncated importance weight pi/pi_engine: the engine computes with other kernels.
"""
import support.startup  # noqa: F401  (before torch)

from config import parse_args

# Before the imports, which take seconds: --help and a misspelt flag are answered at once. main() parses anew.
if __name__ == "__main__":
    parse_args(description=__doc__)

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import model as M
from config import (
    GRADING,
    METHODS,
    SAME_CONTENT,
    SAME_FLAGS,
    asks_for_the_papers_loss,
    check_config,
    check_flags,
    keeps_own_rope,
    papers_settings,
    recomputed_blocks,
    sequences_per_prompt,
    settings,
)
from data import Order, check_vocabulary, demo_key, digest, load_examples, tokenize
from eval import Sampling, evaluate, unmatchable
from grading.answers import FAILED
from grading.custom import about
from reward import Grader
from rollout import RolloutEngine, check_environment
from support.checkpoint import load_checkpoint, save_checkpoint
from support.collectives import agreed, all_or_none, anyone, of_all_ranks
from support.device import memory_gb, name_the_card, read_once, utilization
from support.disk import words_if_full
from support.flags import whose_flags
from support.gradients import clip_gradients
from support.health import Health, check_engine
from support.hub import COMMITS, fetch
from support.inventory import Inventory
from support.metrics import Tally, shown_on_the_bar, summarize, tally_of
from support.processes import (
    Ranks,
    advice_when_memory_is_full,
    init_distributed,
    mistakes_in_one_line,
    seed_everything,
)
from support.profiler import start_profiler, write_profile
from support.resume import check_room, check_same_run, open_run
from support.runlog import RunLog, print_accuracy
from support.trackers import check_tracker
from support.versions import check_versions, environment, versions
from support.watch import finish_step_on_signals, hang_watch, phase, set_timeouts
from support.weights import fingerprints

# ----------------------------------------------------------------------------------------------------------
# The objective.


def group_advantage(reward, group, use_std=True, eps=1e-6):
    """Eq. 7: A_k = (r_k - mean(r)) / (std(r) + eps) over the sequences of k's group (Eq. 2 if it has no
    demonstration).

    reward (B,) float; group (B,) int64, one number for each prompt -> (B,). Population standard deviation.

    >>> group_advantage(torch.tensor([1., 0., 0., 1.]), torch.tensor([0, 0, 1, 1]))
    tensor([ 1.0000, -1.0000, -1.0000,  1.0000])
    """
    # In float64, for rewards other than 1 and 0: where all of a group are 0.1, their mean in float32 is 7e-9
    # off, and the division by eps would make an advantage of 7e-3 of that.
    rewards = reward.double()
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    mean = rewards.new_zeros(len(count)).index_add_(0, index, rewards) / count                  # (groups,)
    centred = rewards - mean[index]                                                             # (B,)
    if not use_std:
        return centred.to(reward.dtype)
    variance = rewards.new_zeros(len(count)).index_add_(0, index, centred**2) / count           # (groups,)
    return (centred / (variance.sqrt()[index] + eps)).to(reward.dtype)


def srft_loss(logp, entropy, mask, reward, advantage, is_demo, n_demo, n_rollout, tis=None):
    """Eq. 13: L_SRFT = L_SFT^demo (Eq. 8) + L_RL^demo (Eq. 9) + L_RL^self-rollout (Eq. 12), on a micro-batch.

    With <x>_i = (1/|y_i|) sum_t x_{i,t} and H_i = <H_{i,t}>, gradient stopped, its terms are

        sft_demo   (1/n_demo)    sum over demonstrations    0.5 exp(-H_i) <-log pi>_i         Eq. 8
        rl_demo   -(1/n_demo)    sum over demonstrations    A_i <pi>_i                        Eq. 9, 10
        rl_pos     (1/n_rollout) sum over correct rollouts  0.1 exp(H_i) <-log pi>_i          Eq. 12, left
        rl_neg     (1/n_rollout) sum over wrong rollouts    <log pi>_i                        Eq. 12, right

    logp       (B,T) log pi_theta(y_t | x, y_<t) in nats, with gradient
    entropy    (B,T) H_t of the same distribution, in nats
    mask       (B,T) 1 on response tokens (EOS included), 0 on padding, where logp, entropy and tis may hold
                     anything, nan too
    reward     (B,)  R(x, y) of Eq. A2: 1.0 correct, 0.0 not
    advantage  (B,)  A of Eq. 7, over the group of rollouts and demonstration
    is_demo    (B,)  bool
    n_demo, n_rollout   sequences of each kind in the WHOLE optimizer update, of all ranks and micro-batches,
                        so that terms and gradients of micro-batches simply add up
    tis        (B,T) truncated importance weights pi/pi_engine: factors of log pi in Eq. 12, 1 on
                     demonstrations; None: none

    Returns (terms, weights): the four scalars with gradient, whose sum is the loss (an update without any
    demonstration, or without any rollout, has two of them); and "w_sft" and "w_rl", (B,), without gradient.
    Needs torch alone.
    """
    is_demo = is_demo.bool()
    correct = ~is_demo & (reward > 0)
    wrong = ~is_demo & ~correct
    # Padding is overwritten: multiplied by a mask of 0, a nan that stands there would stay one.
    mask = mask.to(logp.dtype)
    log_pi = logp.masked_fill(mask == 0, 0.0)
    entropy = entropy.masked_fill(mask == 0, 0.0)
    length = mask.sum(1).clamp(min=1)                                                           # (B,) |y_i|

    def over_tokens(x):
        """<x>_i of each sequence, (B,T) -> (B,)."""
        return (x * mask).sum(1) / length

    def over_sequences(x, which, n):
        """(1/n) sum of x over the sequences `which`, (B,), (B,) bool -> scalar."""
        return torch.where(which, x, 0.0).sum() / n

    # The weights scale the gradient and have none themselves: else the policy could lower its loss by its
    # entropy alone.
    H = over_tokens(entropy.detach())                                                           # (B,)
    w_sft = 0.5 * torch.exp(-H)            # Eq. 8: an unsure policy imitates less
    w_rl = 0.1 * torch.exp(H)              # Eq. 12: a policy grown sure reinforces itself less
    # Eq. 10 with pi_beta = 1, so that the probabilities of the demonstration's author, a model with another
    # tokenizer, are not needed. The ratio is then pi itself, at most 1, where the clip of Eq. 9 acts on
    # negative advantages alone. The paper calls that imbalanced, and omits the clip.
    ratio = log_pi.exp()                                                                        # (B,T)
    # Rollouts are samples of the engine's policy, which rounds differently: see backward_micro_batch.
    score = log_pi
    if tis is not None:
        score = log_pi * tis.masked_fill(mask == 0, 0.0)

    terms = {}
    if n_demo:
        terms["sft_demo"] = over_sequences(over_tokens(w_sft[:, None] * -log_pi), is_demo, n_demo)   # Eq. 8
        terms["rl_demo"] = over_sequences(-advantage * over_tokens(ratio), is_demo, n_demo)          # Eq. 9
    if n_rollout:
        # Eq. 12: the reward of Eq. 11 is +1 for correct rollouts, -1 for wrong ones.
        terms["rl_pos"] = over_sequences(-over_tokens(w_rl[:, None] * score), correct, n_rollout)
        terms["rl_neg"] = over_sequences(+over_tokens(score), wrong, n_rollout)
    return terms, {"w_sft": w_sft, "w_rl": w_rl}


def load_objective(cfg):
    """srft_loss at the paper's defaults; where a flag asks for more than that, an objective of paper/."""
    if asks_for_the_papers_loss(cfg):
        return srft_loss
    from paper.baselines import Objective
    return Objective(cfg)


# ----------------------------------------------------------------------------------------------------------
# One optimizer update: forward, loss, backward; clip; AdamW.

def backward_micro_batch(objective, policy, sequences, extra, n_demo, n_rollout, reference, cfg, device):
    """Forward, loss and backward of one packed micro-batch; gradients add up in `policy`. Returns its Tally.

    sequences: list of model.Sequence, at most cfg.micro_batch_tokens together; [] where this rank has fewer
    micro-batches than others. objective: srft_loss, or one of paper/, which may want extra inputs. n_demo,
    n_rollout: as in srft_loss. reference: frozen model.Policy for a KL, or None. A collective: FSDP2 gathers
    the weights of each block from all ranks before its forward and its backward.
    """
    # The host runs ahead of a GPU and queues work for it. Whatever asks for a number's value waits until the
    # queue is empty, and the GPU then waits for the host. So all copies to the device come before the
    # forward, what the host knows it counts itself, and all else is read in one transfer at the end.
    batch = M.collate(sequences, device)
    inputs = M.loss_inputs(sequences, device)
    of_reference = None                      # its hidden states and head: the KL is made of them in chunks
    if reference is not None:
        with torch.no_grad():
            of_reference = reference(batch, features=True)
    logp, entropy, kl = policy(batch, cfg.temperature, entropy_grad=bool(cfg.entropy_coef),
                               reference=of_reference)                   # (B,T) each; kl may be None
    if not sequences:
        (logp.sum() * 0).backward()          # nothing to learn, but other ranks wait in its collectives
        return Tally()

    engine_logp = inputs.pop("engine_logp")        # (B,T); no input of the loss: it becomes tis
    mask, is_demo = inputs["mask"], inputs["is_demo"]                                           # (B,T), (B,)
    with torch.no_grad():
        # Trainer and engine run different kernels, on a GPU in bf16: pi/pi_engine corrects for that. It is
        # cut at the cap, since no single token may outweigh a batch. A log pi that is not finite is the
        # trainer's own trouble: it is left out here, and ends in a gradient that is skipped.
        logp_old = extra.get("logp_old", logp.detach())         # not pi itself in a step's later updates
        compared = (mask > 0) & ~is_demo[:, None] & logp_old.isfinite()
        difference = torch.where(compared, logp_old - engine_logp, 0.0)                         # (B,T) nats
        importance = difference.exp()                                # 1 on demonstrations and on padding
    tis = importance.clamp(max=cfg.tis_cap) if cfg.tis_cap else None
    if kl is not None:
        extra = {**extra, "kl": kl}
    terms, weights = objective(logp=logp, entropy=entropy, n_demo=n_demo, n_rollout=n_rollout, tis=tis,
                               **inputs, **extra)
    sum(terms.values()).backward()                                                              # Eq. 13

    with torch.no_grad():
        H = (entropy * mask).sum(1) / mask.sum(1).clamp(min=1)                                  # (B,)
        weighted = {"w_sft": is_demo, "w_rl": ~is_demo & (inputs["reward"] > 0)}
        sums = {}
        for name, weight in weights.items():
            sums[name] = torch.where(weighted[name], weight, 0.0).sum()
        sums["entropy/demo"] = torch.where(is_demo, H, 0.0).sum()
        sums["entropy/rollout"] = torch.where(is_demo, 0.0, H).sum()
        sums["tis/capped"] = (importance > (cfg.tis_cap or math.inf)).sum()
        distance = difference.abs()                                                             # (B,T)
        losses, sums, [worst], distances = read_once(terms, sums, distance.max()[None], distance.sum(1))
    return tally_of(sequences, losses, sums, worst, distances)


def backward(objective, policy, micro_batches, extras, n_demo, n_rollout, reference, cfg, device):
    """Forward, loss and backward of an update's micro-batches on this rank -> their Tally.

    Gradients are sums, over micro-batches and ranks, of terms that are divided by global counts already: they
    are the same for every split. A collective: every rank must have as many micro-batches.
    """
    tally = Tally()
    for i, (sequences, extra) in enumerate(zip(micro_batches, extras), start=1):
        M.accumulate(policy, last=i == len(micro_batches))
        found = backward_micro_batch(
            objective, policy, sequences, extra, n_demo, n_rollout, reference, cfg, device)
        tally = tally.plus(found)
    return tally


def update_policy(policy, optimizer, objective, sequences, micro_batches, extras, reference, cfg, device,
                  measure_terms=False):
    """One optimizer update: forward, loss (Eq. 13) and backward; clip; AdamW. Returns its metrics. A
    collective.

    sequences: all of the update, the same on every rank. micro_batches: those that this rank computes, and
    extras: for each of them the extra inputs of the objective. measure_terms: also the gradient norm of each
    term alone, by an objective of paper/.
    """
    n_demo = sum(s.is_demo for s in sequences)
    n_rollout = len(sequences) - n_demo

    def add_gradients(loss):
        return backward(loss, policy, micro_batches, extras, n_demo, n_rollout, reference, cfg, device)

    norms = {}
    if measure_terms:
        norms = objective.term_gradient_norms(add_gradients, policy, n_demo, n_rollout)
    tally = add_gradients(objective)
    if not optimizer.state:
        # AdamW is about to make its moments, which stay. Where the allocator holds freed activations, they
        # would split its blocks for good, at 7B about 5 GiB of them (estimated). On a CPU this does nothing.
        torch.cuda.empty_cache()
    norm = clip_gradients(policy.parameters(), cfg.grad_clip).item()
    if math.isfinite(norm):                # else the update is skipped: AdamW's moments would never forget it
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**tally.of_all_ranks().metrics(), **norms, "grad_norm": norm}


def learning_rate(cfg, step):
    """Of step 1, 2, ...: constant; or up over the share cfg.warmup of all steps, then down, to 0 after the
    last."""
    if cfg.lr_schedule == "constant":
        return cfg.lr
    rising = step / max(1, cfg.warmup * cfg.steps)
    falling = (cfg.steps - step + 1) / ((1 - cfg.warmup) * cfg.steps)
    return cfg.lr * min(1.0, rising, falling)


# ----------------------------------------------------------------------------------------------------------
# The sequences of one step: rollouts, rewards, demonstrations, advantages.

@dataclass
class Answered:
    """A step's prompts with their responses, of one rank or of all."""
    sequences: list                # of model.Sequence; Sequence.group is the prompt's place in the step
    samples: list                  # rows for samples.jsonl
    grading: Counter               # reason of a verdict -> how many; "ms" -> milliseconds of all of them
    demo_rewards: dict             # data.demo_key -> reward of the demonstrations graded in this step


def sample_and_grade(prompts, places, step, cfg, engine, grader, demo_rewards):
    """This rank's rollouts, each graded as soon as it ends: grading hides behind the decoding of longer ones.

    prompts: the step's, list of data.Prompt; this rank answers those at `places` (a range). demo_rewards: of
    the demonstrations whose reward is known; others are graded beside the rollouts.
    Returns (place -> list of Rollout; verdicts; the time when generation ended). verdicts: (place, k) of the
    k-th rollout of a prompt, or the data.demo_key of a demonstration, -> Verdict.
    """
    n_rollouts, n_demos = sequences_per_prompt(cfg)
    submitted = []             # what each verdict will be of: the grader answers in the order of submission
    for place in places:
        example = prompts[place].example
        if not n_demos or not prompts[place].demo:
            continue
        key = demo_key(example)
        if key not in demo_rewards and key not in submitted:
            grader.submit([example.demo], [example.answer], examples=[about(example)])
            submitted.append(key)

    def grade_finished(ended):
        """The engine calls it after every decoding step. Often nothing has ended; the grader then only hands
        out what waits."""
        for i, k, rollout in ended:
            place, example = places[i], prompts[places[i]].example
            grader.submit([rollout.text], [example.answer], [rollout.finished], examples=[about(example)])
            submitted.append((place, k))
        grader.submit()

    rollouts = [[] for _ in places]
    if n_rollouts:
        # What a prompt yields depends on (seed, step, its place in the step) alone: not on the number of
        # ranks, nor on what went before, so a resumed run draws the same rollouts.
        seeds = np.random.SeedSequence([cfg.seed, step]).generate_state(len(prompts), np.uint64).tolist()
        rollouts = engine.generate(
            [prompts[place].ids for place in places], n_rollouts, cfg.temperature, cfg.max_response_tokens,
            [seeds[place] for place in places],
            version=step - 1,              # an error if the engine holds other weights than the last step's
            on_step=grade_finished)
    generated = time.monotonic()
    phase("grade", step)
    return dict(zip(places, rollouts)), dict(zip(submitted, grader.collect())), generated


def demonstration(prompt, place=0, reward=0.0):
    """A Prompt's demonstration as a training sequence."""
    return M.Sequence(np.asarray(prompt.ids, np.int32), np.asarray(prompt.demo, np.int32), is_demo=True,
                      group=place, reward=reward)


def augmented_groups(prompts, step, cfg, engine, grader, demo_rewards, ranks):
    """Eq. 6: for each prompt its 8 rollouts of the current policy and its demonstration, or whichever of them
    the method uses, with rewards (Eq. A2). Each rank answers its share of the prompts, then all exchange.

    prompts, demo_rewards: as in sample_and_grade, the same on every rank. ranks: support.processes.Ranks.
    Returns (Answered, the same on every rank; the time when generation ended on this one). A collective.
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
            key = demo_key(prompt.example)
            reward = verdicts[key].reward if key in verdicts else demo_rewards[key]
            sequences.append(demonstration(prompt, place, reward))

    grading, known = Counter(), {}
    for key, verdict in verdicts.items():
        grading.update({verdict.reason: 1, "ms": verdict.ms})
        if isinstance(key, str) and verdict.reason not in FAILED:    # a demonstration, graded once for all
            known[key] = verdict.reward
    samples = sample_rows(prompts, rollouts, verdicts, step, cfg.log_samples if ranks.rank == 0 else 0)
    phase("exchange", step)
    # Any rank may train on any sequence (deal), and packing needs all lengths. Arrays of tokens and of the
    # engine's log-probs: 20 MB a step, over all ranks.
    total = Answered([], [], Counter(), {})
    for part in of_all_ranks(Answered(sequences, samples, grading, known)):
        total.sequences.extend(part.sequences)
        total.samples.extend(part.samples)
        total.grading.update(part.grading)
        total.demo_rewards.update(part.demo_rewards)
    return total, generated


def sample_rows(prompts, rollouts, verdicts, step, count):
    """Rows for samples.jsonl: `count` rollouts, the first of each prompt before the second of any; and every
    demonstration that was just graded wrong: it is kept, but a person should know."""
    def row(example, response, verdict, finished, demo):
        return {"step": step, "id": example.id, "demo": demo, "prompt": example.problem,
                "answer": example.answer, "response": response, "reward": verdict.reward,
                "reason": verdict.reason, "finished": finished,
                "demonstration": None if demo else example.demo}

    rows, examples = [], {prompts[place].example.id: prompts[place].example for place in rollouts}
    n_rollouts = max((len(group) for group in rollouts.values()), default=0)
    for k in range(n_rollouts):
        for place, group in rollouts.items():
            if len(rows) < count:
                rollout = group[k]
                rows.append(row(prompts[place].example, rollout.text, verdicts[place, k], rollout.finished,
                                demo=False))
    for example in examples.values():
        verdict = verdicts.get(demo_key(example))
        if verdict and not verdict.reward:
            rows.append(row(example, example.demo, verdict, finished=True, demo=True))
    return rows


def with_advantages(sequences, cfg):
    """The sequences with their advantages: Eq. 7 over rollouts and demonstration, or Eq. 2 over the rollouts
    alone where the method leaves the demonstration out of the group."""
    demo_in_group = METHODS[cfg.method].demos == "group"
    grouped = [i for i, s in enumerate(sequences) if demo_in_group or not s.is_demo]
    reward = torch.tensor([sequences[i].reward for i in grouped])
    group = torch.tensor([sequences[i].group for i in grouped])
    advantages = group_advantage(reward, group, cfg.std_in_advantage).tolist()
    found = list(sequences)
    for i, advantage in zip(grouped, advantages):
        found[i] = replace(sequences[i], advantage=advantage)
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
    demo_rewards: dict = field(default_factory=dict)      # data.demo_key -> reward, of those graded so far
    unevaluated: bool = False                             # a signal came before the step was evaluated


@dataclass(kw_only=True)
class Run:
    """What setup prepares for the training loop."""
    ranks: Ranks                         # this rank, how many there are, its device, the mesh of all
    objective: object                    # srft_loss, or one of paper/
    tokenizer: object
    prompts: list                        # of data.Prompt: all training data
    heldout: dict                        # name -> list of data.Prompt
    policy: M.Policy                     # pi_theta, sharded over the ranks
    reference: M.Policy | None           # the frozen base model; only with --kl_coef
    optimizer: torch.optim.Optimizer
    engine: RolloutEngine                # pi_theta once more, as vLLM serves it
    grader: Grader
    progress: Progress
    identity: dict                       # of data and models, by content: see identify
    log: RunLog


def train(cfg, run):
    """The training loop, one step from top to bottom: SRFT (Sec. 4.3), or the method that --method names."""
    rank, world, device, mesh = run.ranks
    objective, progress = run.objective, run.progress
    health = Health(run.policy.lm.config.vocab_size, cfg.prompts_per_step * sequences_per_prompt(cfg)[0])
    order = Order(len(run.prompts), cfg.seed, progress.position)
    stopping = finish_step_on_signals()
    first = progress.step + 1
    bar = tqdm(total=cfg.steps, initial=progress.step, desc=cfg.method, disable=rank != 0, dynamic_ncols=True)
    stop = not evaluate_before_the_first_step(cfg, run, stopping)
    for step in range(first, cfg.steps + 1):
        if stop:
            break
        profiler = start_profiler() if step == cfg.profile else None
        phase("rollout", step)               # for the hang watch and the profile: what this rank is doing
        clock = [time.monotonic()]

        # 1. The step's prompts, the same on every rank: 128. From here on, a prompt is its place among them.
        indices = order.take(cfg.prompts_per_step)
        prompts = [run.prompts[index] for index in indices]

        # 2. Rollouts, each graded when it ends; the demonstration joins its group (Eq. 6).
        #    128 prompts x (8 rollouts + 1 demonstration) = 1,152 sequences.
        answered, generated = augmented_groups(
            prompts, step, cfg, run.engine, run.grader, progress.demo_rewards, run.ranks)
        demo_rewards = {**progress.demo_rewards, **answered.demo_rewards}
        clock += [generated, time.monotonic()]
        memory = [memory_gb(device)]

        # 3. Advantages (Eq. 7), and the sequences of each update: by default there is one, on all of them.
        phase("train", step)
        run.engine.sleep()                                # the GPU's memory is for training now
        sequences = with_advantages(answered.sequences, cfg)
        shares, failed = divide(cfg, run.prompts, indices, sequences, progress.failed)

        # 4. Pack into micro-batches of at most 9,216 tokens, without padding, and deal them to the ranks.
        #    1,152 sequences of 256 + 2,000 tokens are 2.6 million: 36 micro-batches for each of 8 ranks.
        micro_batches, extras = deal(cfg, run, objective, shares)

        # 5. Forward, loss (Eq. 13) and backward of each micro-batch; then clip, and AdamW.
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        updates = []
        for share, batches, extra in zip(shares, micro_batches, extras):
            first_update = not updates
            updates.append(update_policy(
                run.policy, run.optimizer, objective, share, batches, extra, run.reference, cfg, device,
                measure_terms=first_update and cfg.term_gradients and step % cfg.term_gradients == 0))
        clock.append(time.monotonic())
        memory.append(memory_gb(device))

        # 6. Send the new weights to the engine, under the version that the next step will ask for.
        phase("sync", step)
        stop = anyone(bool(stopping))                     # ranks may get the signal in different steps
        # A job that is told to stop has minutes left, and the checkpoint needs them: the evaluation waits for
        # --resume, also one that has begun.
        due = step == cfg.steps or step % cfg.eval_every == 0
        evaluate_now = due and not stop
        if METHODS[cfg.method].rollouts or evaluate_now:
            run.engine.sync_weights(M.full_parameters(run.policy, M.compute_dtype(device)), version=step)
        clock.append(time.monotonic())

        # 7. Log; evaluate; stop where going on would only waste the machine; checkpoint.
        if profiler:
            phase("write profile", step)
            write_profile(profiler, Path(cfg.out) / "profile")
        phase("log", step)
        grad_norms = [update["grad_norm"] for update in updates]
        skipped = progress.skipped + sum(not math.isfinite(norm) for norm in grad_norms)
        progress = Progress(step, skipped, order.position, failed, demo_rewards, unevaluated=due)
        metrics = {"step": step, **summarize(sequences, len(prompts), answered.grading, updates, clock)}
        flops = run.policy.flops(sequences)
        metrics |= {"steps_skipped": skipped, "lr": learning_rate(cfg, step),
                    "perf/mfu": utilization(flops / metrics["time/train"], world, device),
                    "perf/peak_memory_gb": max(memory)}
        trouble = health.look(metrics, grad_norms, answered.grading, [p.example.id for p in prompts])
        if evaluate_now and not trouble:
            measured = evaluation(cfg, run, step, stopping)
            progress.unevaluated = measured is None
            metrics |= measured or {}
        run.log.write(metrics, answered.samples)
        bar.set_postfix(shown_on_the_bar(metrics), refresh=False)
        bar.update()
        if trouble:
            run.log.close()
            raise RuntimeError(trouble)
        phase("checkpoint", step)
        stop = anyone(bool(stopping))                     # the signal may have come since
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            M.look_for_life(run.policy, device)
            state = {**asdict(progress), "settings": settings(cfg), "identity": run.identity}
            save_checkpoint(Path(cfg.out) / "checkpoints", run.policy, run.optimizer, state, cfg.keep)
        if step == first:
            set_timeouts(mesh, cfg.hang_minutes)          # all is compiled: from now on no phase takes hours
    bar.close()
    finish(cfg, run, stopped=stop)


def evaluate_before_the_first_step(cfg, run, stopping):
    """Evaluate the base model; after a resume, the last step, if a signal has kept it from that. False if a
    signal cuts this one short, too. A collective."""
    step = run.progress.step
    if step > 0 and not run.progress.unevaluated:
        return True
    measured = evaluation(cfg, run, step, stopping)
    if measured is None:
        return False
    if step == 0:
        run.log.write({"step": 0} | measured)
    else:
        run.log.amend(step, measured)
    run.progress.unevaluated = False
    return True


def divide(cfg, data, indices, sequences, failed):
    """(the sequences of each of a step's updates; the prompts that wait, for ReLIFT).

    data: all training prompts. indices: of the step's prompts in it. failed: indices of prompts that all
    rollouts failed, and whose demonstrations wait until there is a step's worth of them.
    """
    shares = [[] for _ in range(cfg.updates_per_rollout)]
    for s in sequences:
        shares[s.group % cfg.updates_per_rollout].append(s)            # a group stays together
    if METHODS[cfg.method].demos == "failed":
        from paper.baselines import failed_prompts
        failed = failed + failed_prompts(data, indices, sequences)
        now = failed[:cfg.prompts_per_step]
        if len(now) == cfg.prompts_per_step:
            shares.append([demonstration(data[index]) for index in now])
            failed = failed[len(now):]
    return shares, failed


def deal(cfg, run, objective, shares):
    """Two lists with an entry for each update: this rank's micro-batches, lists of model.Sequence; and for
    each of those the extra inputs of the objective, {} for srft_loss. A collective.

    Micro-batches are dealt like cards: rank r gets r, r + ranks, ... All get as many, since they meet in the
    collectives of every forward and backward; and alike ones, by cost in FLOPs, run side by side.
    """
    def cost(sequence):
        return run.policy.flops([sequence])

    micro_batches, extras = [], []
    for share in shares:
        packed = M.pack(share, cfg.micro_batch_tokens, multiple_of=run.ranks.world, cost=cost)
        micro_batches.append(packed[run.ranks.rank::run.ranks.world])
    for share, mine in zip(shares, micro_batches):
        extra = [{} for _ in mine]
        if objective is not srft_loss:            # such as log pi_old, before the first update changes pi
            extra = objective.before_update(run.policy, mine, share, run.ranks.device)
        extras.append(extra)
    return micro_batches, extras


def evaluation(cfg, run, step, stopping):
    """Accuracy, length and entropy on each held-out set, as metrics. None if a signal came meanwhile: on some
    rank, the list `stopping` is no longer empty. A collective."""
    if not run.heldout:
        return {}
    compare_engine(cfg, run, step)
    sampling = Sampling(cfg.eval_temperature, cfg.eval_top_p, cfg.max_response_tokens, cfg.seed)
    found = {}
    for name, prompts in run.heldout.items():
        phase(f"evaluate {name}", step)
        result = evaluate(run.engine, run.grader, name, prompts, cfg.eval_samples, sampling, step, stopping)
        if result is None:
            return None
        found[f"eval/{name}"] = result["accuracy"]
        found[f"eval_len/{name}"] = result["tokens"]
        found[f"eval_entropy/{name}"] = result["entropy"]
    return found


@torch.no_grad()
def compare_engine(cfg, run, version):
    """Before an evaluation: raise RuntimeError unless each rank's engine, which has just got the weights of
    `version`, gives the trainer's log-probs to 8 rollouts of its own. A collective.

    A step's rollouts check only the transfer of weights before them, and SFT has none. The prompts are random
    tokens: prompts of the data would leave their keys and values in the engine's prefix cache, and the
    evaluation would begin from these instead of computing its own.
    """
    vocabulary, length = run.policy.lm.config.vocab_size, min(16, cfg.max_prompt_tokens)
    prompts = np.random.default_rng(run.ranks.rank).integers(0, vocabulary, (8, length)).tolist()
    groups = run.engine.generate(prompts, 1, cfg.temperature, min(64, cfg.max_response_tokens), cfg.seed,
                                 version)
    sequences = [M.Sequence(prompt, group[0].tokens) for prompt, group in zip(prompts, groups)]
    logp, *_ = run.policy(M.collate(sequences, run.ranks.device), cfg.temperature)              # (8,T)
    run.policy.reshard()               # a forward without backward leaves the root gathered
    ours = [row[:len(s.response)] for row, s in zip(logp.cpu().numpy(), sequences)]
    theirs = [group[0].logprobs for group in groups]
    check_engine(ours, theirs, f"before the evaluation of step {version}")


# ----------------------------------------------------------------------------------------------------------
# Start and end.

def setup(cfg):
    """Everything before the first step -> Run: processes, data, sharded policy, engine, grader; with
    --resume, the state of the newest whole checkpoint. A collective."""
    ranks = init_distributed(cfg.device)
    device = ranks.device
    say = print if ranks.rank == 0 else lambda *_: None
    # What can fail fast comes first: loading 7B takes minutes.
    check_start(cfg, ranks, say)
    objective = load_objective(cfg)
    folder, config = load_shape(cfg, ranks, say)
    name_the_card(device, say)
    base = fetch(cfg.reference, "model", "--reference") if cfg.reference else folder
    tokenizer = M.load_tokenizer(folder)
    grader = start_grader(cfg)             # before the model: its processes start while that is loaded
    prompts, heldout = load_data(cfg, tokenizer, config.vocab_size, grader, say)
    phase("open run")
    identity = identify(folder, base if cfg.kl_coef else None, prompts, heldout, grader.reward,
                        config.rope_parameters["rope_theta"])
    checkpoint = open_run(cfg.out, cfg.resume, ranks.rank, say)
    check_same_run(checkpoint, settings(cfg), identity, SAME_FLAGS, SAME_CONTENT, say)
    ask_for_room(cfg, checkpoint, config, ranks, say)
    phase("load model")
    recomputed = recomputed_blocks(cfg, config.num_hidden_layers)
    policy = M.load_policy(folder, config, ranks.mesh, device, recomputed, cfg.offload)
    M.check_packing(policy, device, config.vocab_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    reference = load_reference(cfg, base, config, ranks) if cfg.kl_coef else None
    # --engine_memory is a share of the whole card, and vLLM refuses to start if less than that is free: what
    # the policy has taken by now must leave it room.
    phase("start engine")
    dtype = M.compute_dtype(device)
    engine = RolloutEngine(
        config, tokenizer, dtype, cfg.max_prompt_tokens + cfg.max_response_tokens, cfg.engine_sequences,
        cfg.engine_memory, cfg.engine_eager or device.type == "cpu", cfg.seed)
    # After the engine, whose start draws from the same generators, and before a checkpoint restores them.
    seed_everything(cfg.seed + ranks.rank)
    progress = restore(cfg, checkpoint, identity, policy, optimizer, say)
    phase("sync")
    engine.sync_weights(M.full_parameters(policy, dtype), progress.step)
    log = RunLog(cfg.out, ranks.rank == 0, progress.step if checkpoint else -1, cfg.track,
                 papers_settings(cfg.method))
    log.write_settings({**settings(cfg), "ranks": ranks.world, "hub": COMMITS, **environment(device)})
    return Run(ranks=ranks, objective=objective, tokenizer=tokenizer, prompts=prompts, heldout=heldout,
               policy=policy, reference=reference, optimizer=optimizer, engine=engine, grader=grader,
               progress=progress, identity=identity, log=log)


def check_start(cfg, ranks, say):
    """All that can be found wrong before anything is fetched. A collective."""
    if cfg.resume:
        agreed("the flags of this run, which --resume takes from its folder", settings(cfg))
        say(whose_flags(cfg.out))
    check_flags(cfg)
    with all_or_none():
        if ranks.rank == 0:                             # which alone has a tracker
            check_tracker(cfg.track)
    check_versions(versions(), say)
    check_environment(ranks.device)


def load_shape(cfg, ranks, say):
    """-> (the model's folder, its config, which the flags fit). A collective."""
    folder = fetch(cfg.model, "model", "--model")
    config = M.load_config(folder, cfg.rope_theta, cfg.window, keeps_own_rope(cfg))
    check_config(cfg, ranks.world, config.max_position_embeddings)
    theta = config.rope_parameters["rope_theta"]
    whose = "" if theta == cfg.rope_theta else ", the model's own"
    say(f"{cfg.model}: RoPE theta {theta:,.0f}{whose}; window {config.max_position_embeddings:,} tokens")
    return folder, config


def start_grader(cfg):
    """The Grader of the run. A collective: a reward of one's own may load on some ranks only."""
    grader = Grader(None, cfg.grader_workers or None, cfg.grader_deadline, text=cfg.grade_text,
                    strict_box=cfg.strict_box, strict_answer=cfg.strict_answer,
                    score_unfinished=cfg.score_unfinished, reward=cfg.reward)
    if cfg.reward:
        with all_or_none():
            grader.start()
    return grader


def load_data(cfg, tokenizer, vocab_size, grader, say):
    """-> (the training prompts, name -> held-out prompts). A collective.

    A training prompt whose reference answer nothing can match is left out: every right response would count
    as wrong, and Eq. 12 would push it down. In a held-out set it is named and stays in the denominator.
    Raises ValueError where no answer can be matched, or the method has nothing to imitate.
    """
    phase("load data")
    prompts = load_prompts(cfg.data, "--data", tokenizer, vocab_size, cfg, say)
    heldout = {}
    for source in filter(None, cfg.eval_data.split(",")):
        name = Path(source).stem.removeprefix("tiny:").partition("@")[0]         # a revision of the hub
        if name in heldout:
            raise ValueError(f"--eval_data: two sets are called {name}; rename one file")
        heldout[name] = load_prompts(source, "--eval_data", tokenizer, vocab_size, cfg, say)
    check_demonstrations(cfg, prompts)                # already here: the next lines may take minutes
    if cfg.reward:
        say("--reward: reference answers are not checked; what they match is known to the function alone")
    else:
        for name, asked in heldout.items():
            matchable(grader, f"--eval_data {name}", asked, say)
        prompts = matchable(grader, "--data", prompts, say)
    check_demonstrations(cfg, prompts)
    if not METHODS[cfg.method].rollouts:
        prompts = [prompt for prompt in prompts if prompt.demo]
    return prompts, heldout


def matchable(grader, name, prompts, say):
    """The prompts whose reference answer can be matched. Raises ValueError if there is none. A collective."""
    reasons = unmatchable(grader, name, prompts, say)
    # A check that ran out of time proves nothing, and would differ after a resume: its prompt stays.
    found = [prompt for i, prompt in enumerate(prompts) if reasons.get(i) in (None, *FAILED)]
    if not found:
        raise ValueError(f"{name}: no reference answer can be matched; is `answer` the final answer alone?")
    return found


def check_demonstrations(cfg, prompts):
    """Raise ValueError if the method imitates demonstrations and there is none: it would quietly be another
    method."""
    if METHODS[cfg.method].demos != "none" and not any(prompt.demo for prompt in prompts):
        raise ValueError(f"--method {cfg.method} learns from demonstrations, and no example of --data "
                         f"{cfg.data} has one (column `solution`, see docs/data.md); add them, or pass "
                         "--method grpo, which needs none")


def load_prompts(source, flag, tokenizer, vocab_size, cfg, say):
    """A file, folder, hub name or tiny:NAME, the value of `flag` (--data or --eval_data) -> list of Prompt. A
    collective: one rank of each node downloads."""
    split = "train" if flag == "--data" else "validation"
    path = source if source.startswith("tiny:") else fetch(source, "dataset", flag, split)
    inventory = Inventory(f"{flag} {source}", held_out=split != "train")
    examples = load_examples(path, cfg.skip_bad_rows, inventory, split)
    if flag == "--eval_data":              # a long solution must not drop its problem from the evaluation
        examples = [replace(example, demo=None) for example in examples]
    prompts = tokenize(examples, tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.max_response_tokens,
                       inventory)
    say(str(inventory))
    check_vocabulary(prompts, tokenizer, vocab_size)
    return prompts


def load_reference(cfg, folder, config, ranks):
    """The frozen base model of A1's KL: --reference, or --model as it was before training. A collective."""
    of_base = M.load_config(folder, cfg.rope_theta, cfg.window, keeps_own_rope(cfg))
    if of_base.vocab_size != config.vocab_size:
        raise ValueError(f"--reference {cfg.reference}: has {of_base.vocab_size} tokens, the model has "
                         f"{config.vocab_size}: the KL of A1 needs one vocabulary")
    reference = M.load_policy(folder, of_base, ranks.mesh, ranks.device, offload=cfg.offload)
    reference.requires_grad_(False)
    M.check_packing(reference, ranks.device, of_base.vocab_size)
    return reference


def identify(model, base, prompts, heldout, reward, theta):
    """What this run is about: flag -> digests of what it names. By content, since another file may have that
    name when the run is resumed. model, base: folders, base None where no KL is taken to it. reward: of
    grading.custom, or None. theta: of the model's RoPE, which may be its own. A collective. Raises ValueError
    if ranks (of several nodes) have read different things."""
    identity = {"data": digest(prompts), "model": fingerprints(model),
                "reference": fingerprints(base) if base else None,
                "eval_data": {name: digest(held) for name, held in heldout.items()},
                "reward": reward.digest if reward else None, "rope": theta}
    for name, value in identity.items():
        agreed(f"--{name}", value)
    return identity


def ask_for_room(cfg, checkpoint, config, ranks, say):
    """Raise ValueError if the disk has no room for the checkpoints to come. A collective."""
    done = checkpoint[1]["state"]["step"] if checkpoint else 0
    saves = 0
    if done < cfg.steps:                                  # at multiples of --save_every, and at the last step
        saves = (cfg.steps - 1) // cfg.save_every - done // cfg.save_every + 1
    weights = sum(p.numel() for p in M.empty_model(config).parameters())
    with all_or_none():
        check_room(Path(cfg.out) / "checkpoints", weights, saves, cfg.keep,
                   exported=weights * M.compute_dtype(ranks.device).itemsize, log=say)


def restore(cfg, checkpoint, identity, policy, optimizer, say):
    """Put weights and optimizer back to where `checkpoint`, (path, manifest), was written -> its Progress.
    None: a new run's. A collective."""
    if checkpoint is None:
        return Progress()
    phase("load checkpoint")
    path, manifest = checkpoint
    state = load_checkpoint(path, manifest, policy, optimizer)
    then, reward = state.pop("settings"), state.pop("identity").get("reward")
    for group in optimizer.param_groups:                      # flags win over what the checkpoint recorded
        group["weight_decay"] = cfg.weight_decay
    if reward != identity["reward"] or any(then.get(name) != getattr(cfg, name) for name in GRADING):
        state["demo_rewards"] = {}                            # they were graded by other rules
    say(f"resumed {path}")
    if 0 < cfg.profile <= state["step"]:
        say(f"--profile {cfg.profile}: that step is done, so there will be no trace")
    return Progress(**state)


def finish(cfg, run, stopped):
    """Export the model, unless the run was stopped; close everything; tell a person where things are, and how
    far held-out accuracy has come. A collective."""
    run.log.close()
    if not stopped:
        phase("export", cfg.steps)
        device, folder = run.ranks.device, Path(cfg.out) / "hf"
        M.look_for_life(run.policy, device)
        with words_if_full(folder):
            M.export_hf(folder, run.policy, run.tokenizer, M.compute_dtype(device))
    run.grader.close()
    dist.barrier()                                    # no rank leaves while another still talks to it
    run.engine.close()                                # before the process group: it owns parts of it
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.ranks.rank != 0:
        return
    if stopped:
        print(f"stopped; what is done is in {cfg.out}, continue with --resume")
        return
    print_accuracy(cfg.out)
    print(f"report: {cfg.out}/report.html   model for transformers and vllm: {cfg.out}/hf")


def main():
    """The command line: a plan, or a run."""
    cfg = parse_args(description=__doc__)
    with hang_watch(), advice_when_memory_is_full():
        with mistakes_in_one_line("srft.py"):
            if cfg.dry_run:
                from bench import dry_run
                dry_run.show(cfg)
                return
            run = setup(cfg)
        train(cfg, run)                      # from here on an error is nobody's slip: it keeps its traceback


if __name__ == "__main__":
    main()
