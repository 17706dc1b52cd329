"""SRFT: supervised and reinforcement fine-tuning in a single stage (Eq. 5-13 of the paper), end to end.

    torchrun --local_addr=127.0.0.1 --nproc_per_node=8 srft.py                # the paper's 7B run
    torchrun --local_addr=127.0.0.1 --nproc_per_node=2 srft.py --preset tiny  # a laptop's CPU, in minutes
    python srft.py --dry_run                                                  # the memory plan, nothing else

Top to bottom: the objective, the training loop; update.py has one optimizer update. Every choice that the
paper leaves open is a field of config.Config; the README's table of decisions says why its default is what
it is.
"""
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer

import model as M
from paper import baselines
from paper.baselines import add_up, average, sequence_mean, shaped, without_padding
from config import METHODS, Config, check_config, parse_args, sequences_per_prompt
from data import Order, load_examples, tokenize
from eval import Sampling, evaluate, unmatchable
from reward import Grader
from rollout import RolloutEngine, check_environment
from support.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from support.device import memory_gb, peak_flops
from support.versions import check_versions, environment, versions
from support.processes import (fetch, hang_watch, init_distributed, mistakes_in_one_line, phase,
                               seed_everything, set_timeouts, start_profiler, write_profile)
from support.runlog import RunLog, read_rows
from update import counts, forward_before_update, term_gradient_norms, update_policy


# ----------------------------------------------------------------------------------------------------------
# The objective.

def group_advantage(reward, group, use_std=True, eps=1e-6):
    """Eq. 7: A_k = (r_k - mean(r)) / (std(r) + eps) over the sequences of k's group
    (Eq. 2 if it has no demo).

    reward (B,) float, group (B,) int64 (same number, same group) -> (B,). Population standard deviation.
    A group whose rewards are all equal gets 0: in float64, since eps would magnify the rounding of a mean.

    >>> group_advantage(torch.tensor([1., 0., 0., 1.]), torch.tensor([0, 0, 1, 1]))
    tensor([ 1.0000, -1.0000, -1.0000,  1.0000])
    """
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    mean_of = lambda x: x.new_zeros(len(count)).index_add_(0, index, x) / count
    centred = reward.double() - mean_of(reward.double())[index]
    advantage = centred / (mean_of(centred**2).sqrt()[index] + eps) if use_std else centred
    return advantage.to(reward.dtype)


def entropy_weight(kind, scale, exponent):
    """w = scale * exp(exponent) ("entropy"), 1 ("one", the ablation of Table 3) or scale ("constant")."""
    return {"entropy": scale * exponent.exp(), "one": torch.ones_like(exponent),
            "constant": torch.full_like(exponent, scale)}[kind]


def mean_over(x, which):
    """Mean of x over the sequences `which`, 0 if there are none. (B,), (B,) bool -> scalar."""
    return torch.where(which, x, 0.0).sum() / which.sum().clamp(min=1)


def srft_loss(logp, entropy, mask, reward, advantage, is_demo, cfg: "Config", n_demo, n_rollout,
              logp_old=None, tis=None, kl=None, entropy_floor=0.0, only=None):
    """Eq. 13: L_SRFT = L_SFT^demo (Eq. 8) + L_RL^demo (Eq. 9) + L_RL^self-rollout (Eq. 12),
    on one micro-batch.

    With <x>_i = (1/|y_i|) sum_t x_{i,t} and H_i = <H_{i,t}>, gradient stopped:
      Eq. 8    (1/n_demo)    sum over demonstrations   0.5 exp(-H_i) <-log pi>_i
      Eq. 9   -(1/n_demo)    sum over demonstrations   A_i <pi>_i      pi_beta = 1 in Eq. 10, no clipping
      Eq. 12   (1/n_rollout) [ sum over correct rollouts 0.1 exp(H_i) <-log pi>_i
                               + sum over wrong ones <log pi>_i ]

    logp, entropy, mask (B,T): log pi_theta(y_t | x, y_<t) in nats with gradient, H_t in nats, and 1 on
    response tokens (EOS included), 0 on padding. reward, advantage, is_demo (B,): R(x,y) of Eq. A2, A of
    Eq. 7, bool. n_demo, n_rollout: sequences of each kind in the WHOLE optimizer step, over all ranks and
    micro-batches (with cfg.loss_norm "token": their response tokens), so that losses and gradients of
    micro-batches simply add up. logp_old (B,T): log pi before the step's first update; None means pi
    itself. tis (B,T): truncated importance weights pi/pi_engine, used on rollouts only. kl (B,T):
    KL(pi_theta || base model) at each token, with gradient, for cfg.kl_coef. only: the name of the one term
    to return as the loss. entropy_floor: of other objectives.

    Returns (scalar loss, stats): "loss/sft_demo", "loss/rl_demo", "loss/rl_pos", "loss/rl_neg" sum to the
    loss (but for bonus and penalty switches); "w_sft", "w_rl": means over the sequences they apply to, 0
    if none.
    """
    mask, logp, entropy, logp_old, tis, kl = without_padding(mask, logp, entropy, logp_old, tis, kl)
    demo, correct = is_demo.bool(), ~is_demo.bool() & (reward > 0)
    wrong = ~demo & ~correct
    length = mask.sum(1).clamp(min=1)
    mean = lambda x: sequence_mean(x, mask, cfg)                                          # <x>_i  (B,)

    # H(pi_theta), gradient stopped: (B,1), or (B,T) token by token.
    h = (entropy.detach() * mask).sum(1, keepdim=True) / length[:, None]
    if cfg.entropy_level == "token":
        h = entropy.detach()
    elif cfg.entropy_level == "batch":  # over the sequences given; the training loop passes the step's mean
        h = torch.where(demo[:, None], mean_over(h[:, 0], demo), mean_over(h[:, 0], ~demo))
    w_sft = entropy_weight(cfg.w_sft, 0.5, cfg.w_sft_sign * h)                            # Eq. 8
    w_rl = entropy_weight(cfg.w_rl, 0.1, h)                                               # Eq. 12

    # Learning from demonstrations (Sec. 4.1).
    sft_demo = average(mean(w_sft * -logp), demo, n_demo)                                 # Eq. 8
    ratio = shaped(logp.exp(), cfg.demo_shaping)                                          # Eq. 10
    rl_demo = average(-advantage * mean(ratio), demo, n_demo)                             # Eq. 9

    # Learning from self-exploration (Sec. 4.2). The rewards {1,-1} of Eq. 11 enter as the sign of each sum.
    score = logp
    if cfg.eq12_form == "ratio":
        score = (logp - (logp.detach() if logp_old is None else logp_old)).exp()
    score = score if tis is None else score * tis
    sign = advantage if cfg.eq12_advantage else torch.where(correct, 1.0, -1.0).to(logp.dtype)
    rl_pos = average(-sign * mean(w_rl * score), correct, n_rollout)                      # Eq. 12, left
    rl_neg = average(-sign * mean(score), wrong, n_rollout)                               # Eq. 12, right

    of_weight = lambda w, which: mean_over((w * mask).sum(1) / length, which)
    loss, stats = add_up({"loss/sft_demo": sft_demo, "loss/rl_demo": rl_demo,             # Eq. 13
                          "loss/rl_pos": rl_pos, "loss/rl_neg": rl_neg}, only,
                         w_sft=of_weight(w_sft, demo), w_rl=of_weight(w_rl, correct))
    if cfg.entropy_coef and not only:
        loss = loss - cfg.entropy_coef * average(mean(entropy), ~demo, n_rollout)
    if cfg.kl_coef and not only:
        loss = loss + cfg.kl_coef * average(mean(kl), ~demo, n_rollout)
    return loss, stats


OBJECTIVES = baselines.OBJECTIVES | {"srft": (srft_loss, {
    "loss/sft_demo": "demos", "loss/rl_demo": "demos", "loss/rl_pos": "rollouts", "loss/rl_neg": "rollouts",
    "w_sft": "demos", "w_rl": "correct"})}


# ----------------------------------------------------------------------------------------------------------
# The training loop.

FAILED = ("timeout", "killed")          # reasons that say nothing about the response


@dataclass
class Run:
    """What a training process holds."""
    rank: int
    world: int
    device: torch.device
    mesh: object                     # torch's DeviceMesh
    dtype: torch.dtype               # of the engine and of the exported model
    tokenizer: object
    policy: M.Policy
    flops: Callable                  # of forward and backward over a list of sequences, without recomputation
    reference: M.Policy | None       # the frozen base model, only for kl_coef
    objective: tuple                 # (loss, {statistic: the sequences it counts}) of OBJECTIVES
    optimizer: torch.optim.Optimizer
    engine: RolloutEngine
    grader: Grader
    prompts: list
    heldout: dict                    # name -> prompts
    order: Order
    log: RunLog
    step: int                        # steps done before this process started
    skipped: int                     # updates skipped so far
    failed: list                     # ReLIFT: prompts whose rollouts were all wrong, to be demonstrated
    demo_rewards: dict               # id -> reward of the demonstrations graded so far


def setup(cfg):
    """Everything before the first step: processes, data, sharded policy, engine, grader; and, with
    --resume, the state of the newest whole checkpoint."""
    rank, world, device, mesh = init_distributed(cfg.device)
    say = print if rank == 0 else lambda *_: None
    check_versions(versions(), say)
    check_environment(device)
    out = Path(cfg.out)
    checkpoint = newest_checkpoint(out / "checkpoints", say) if cfg.resume else None
    if not cfg.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run: pass --resume to continue it, or another --out")
    found = [None] * world
    dist.all_gather_object(found, checkpoint and str(checkpoint[0]))
    if len(set(found)) > 1:
        raise ValueError(f"ranks see different checkpoints ({found}): --out must lie on a shared file system")
    folder = fetch(cfg.model, "model", "--model")
    config = M.load_config(folder, cfg.rope_theta, cfg.window)
    check_config(cfg, world, config.max_position_embeddings)
    say(f"{cfg.model}: RoPE theta {config.rope_parameters['rope_theta']:,.0f}, window "
        f"{config.max_position_embeddings:,} tokens")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        card, peak = peak_flops(name)
        say(f"{name}: perf/mfu is of {peak / 1e12:.0f} TFLOP/s, {card}'s dense bf16 peak" if card else
            f"{name}: peak FLOP/s not listed in model.PEAK_FLOPS, so no perf/mfu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    grader = Grader("math-verify", cfg.grader_workers or None, cfg.grader_deadline, text=cfg.grade_text,
                    strict_box=cfg.strict_box, score_unfinished=cfg.score_unfinished)
    prompts, heldout = load_data(cfg, tokenizer, grader, say)
    phase("load model")
    policy = M.load_policy(folder, config, mesh, device, cfg.activation_checkpointing, cfg.offload)
    M.check_packing(policy, device, config.vocab_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    reference = None
    if cfg.kl_coef:
        base = fetch(cfg.reference, "model", "--reference") if cfg.reference else folder
        of_base = M.load_config(base, cfg.rope_theta, cfg.window)
        if of_base.vocab_size != config.vocab_size:
            raise ValueError(f"--reference {cfg.reference}: has {of_base.vocab_size} tokens, the model has "
                             f"{config.vocab_size}: the KL of A1 needs one vocabulary")
        reference = M.load_policy(base, of_base, mesh, device, offload=cfg.offload).requires_grad_(False)
        M.check_packing(reference, device, of_base.vocab_size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    phase("start engine")
    engine = RolloutEngine(
        config, tokenizer, dtype, cfg.max_prompt_tokens + cfg.max_response_tokens, cfg.engine_sequences,
        cfg.engine_memory, cfg.engine_eager or device.type == "cpu", cfg.seed)
    seed_everything(cfg.seed + rank)
    order, state = Order(len(prompts), cfg.seed), {"step": 0, "skipped": 0}
    phase("load checkpoint")
    if checkpoint:
        state = restore(cfg, checkpoint, policy, optimizer, order, say)
    phase("sync")
    engine.sync_weights(M.full_parameters(policy, dtype), state["step"])
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(asdict(replace(cfg, resume=False)) | {"ranks": world} | environment(device),
                              indent=2)
        if checkpoint and (out / "config.json").read_text() != settings:     # of the steps until now
            (out / "config.json").replace(out / f"config-until-{state['step']}.json")
        (out / "config.json").write_text(settings)
    log = RunLog(out, rank == 0, state["step"] if checkpoint else -1)
    flops = partial(M.forward_backward_flops, config, sum(p.numel() for p in policy.parameters()))
    return Run(rank, world, device, mesh, dtype, tokenizer, policy, flops, reference, OBJECTIVES[cfg.method],
               optimizer, engine, grader, prompts, heldout, order, log, state["step"], state["skipped"],
               state.get("failed", []), state.get("demo_rewards", {}))


def restore(cfg, checkpoint, policy, optimizer, order, say):
    """Put the run back to where `checkpoint` (path, manifest) was written; returns its `state`."""
    state = load_checkpoint(*checkpoint, policy, optimizer)
    if state["data"] != [cfg.data, order.n, cfg.seed]:
        raise ValueError(f"{checkpoint[0]}: was trained on {state['data']} (data, prompts, seed), now "
                         f"{[cfg.data, order.n, cfg.seed]}; resume with the run's own flags")
    before = json.loads((Path(cfg.out) / "config.json").read_text())
    changed = {name: (before[name], now) for name, now in asdict(cfg).items()
               if name != "resume" and before.get(name, now) != now}
    for name in changed.keys() & {"method", "template"}:
        raise ValueError(f"{cfg.out}: was trained with --{name} {before[name]}; resume with that, or start "
                         "another run from a model of its own, --model DIR")
    order.position = state["position"]
    for group in optimizer.param_groups:                      # flags win over what the checkpoint recorded
        group.update(weight_decay=cfg.weight_decay)
    say(f"resumed {checkpoint[0]}" + "".join(
        f"\n  with --{name} {now}, until now {then}" for name, (then, now) in changed.items()))
    return state


def load_data(cfg, tokenizer, grader, say):
    """-> (the training prompts, dict name -> held-out prompts). A collective."""
    phase("load data")

    def load(name, flag):
        source = name if name.startswith("tiny:") else fetch(name, "dataset", flag)
        examples = load_examples(source, cfg.skip_bad_rows, say)
        if flag == "--eval_data":              # a long solution must not drop its problem from the evaluation
            examples = [replace(example, demo=None) for example in examples]
        return tokenize(examples, tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.max_response_tokens,
                        say)

    prompts, heldout = load(cfg.data, "--data"), {}
    for source in filter(None, cfg.eval_data.split(",")):
        name = Path(source).stem.removeprefix("tiny:")
        if name in heldout:
            raise ValueError(f"--eval_data: two sets are called {name}; rename one file")
        heldout[name] = load(source, "--eval_data")
        # Named only: a problem whose answer cannot be matched stays in the denominator.
        unmatchable(grader, f"--eval_data {name}", heldout[name], say)
    # Every right response would count as wrong, and Eq. 12 would push it down. A check that ran out of time
    # proves nothing (and would differ after a resume): its prompt stays.
    bad = unmatchable(grader, "--data", prompts, say)
    prompts = [prompt for i, prompt in enumerate(prompts) if bad.get(i) in (None, *FAILED)]
    if not prompts:
        raise ValueError("--data: no reference answer can be matched; is `answer` the final answer alone?")
    if not METHODS[cfg.method].rollouts:
        prompts = [prompt for prompt in prompts if prompt.demo]
        if not prompts:
            raise ValueError("--data: no example has a demonstration (`solution`), and --method "
                             f"{cfg.method} learns from nothing else")
    return prompts, heldout


def sample_and_grade(run, cfg, step, batch, mine):
    """This rank's rollouts: of the prompts batch[g] for g in mine, each graded as soon as it ends, which
    hides grading behind the decoding of longer ones.

    Demonstrations whose reward is not known yet are graded beside them. Returns, in the order of `mine`,
    groups of (Rollout, Verdict); id -> Verdict of the demonstrations graded now; and the time when generation
    ended.
    """
    # What a prompt yields depends on (seed, step, its place in the step),
    # not on ranks or on what went before.
    seeds = np.random.SeedSequence([cfg.seed, step]).generate_state(len(batch), np.uint64).tolist()
    new = {batch[g].example.id: batch[g].example for g in mine
           if sequences_per_prompt(cfg)[1] and batch[g].demo and batch[g].example.id not in run.demo_rewards}
    run.grader.submit([e.demo for e in new.values()], [e.answer for e in new.values()])
    places = []                                # of the rollouts, in the order in which they are submitted

    def grade_finished(ended):
        places.extend((i, k) for i, k, _ in ended)
        run.grader.submit([r.text for _, _, r in ended], [batch[mine[i]].example.answer for i, _, _ in ended],
                          [r.finished for _, _, r in ended])

    n_rollouts, rollouts = sequences_per_prompt(cfg)[0], [[] for _ in mine]
    if n_rollouts:
        rollouts = run.engine.generate(
            [batch[g].ids for g in mine], n_rollouts, cfg.temperature, cfg.max_response_tokens,
            [seeds[g] for g in mine], version=step - 1, on_step=grade_finished)
    generated = time.monotonic()
    phase("grade", step)
    verdicts = run.grader.collect()
    of_rollout = dict(zip(places, verdicts[len(new):]))
    return [[(r, of_rollout[i, k]) for k, r in enumerate(group)] for i, group in enumerate(rollouts)
            ], dict(zip(new, verdicts)), generated


def demonstration(prompt, group=0, reward=0.0):
    """A Prompt's demonstration as a training sequence."""
    return M.Sequence(np.asarray(prompt.ids, np.int32), np.asarray(prompt.demo, np.int32), is_demo=True,
                      group=group, reward=reward)


def augmented_groups(run, cfg, step, batch):
    """The step's augmented groups (Eq. 6): rollouts of the current policy and each prompt's demonstration, as
    the method has them, with rewards (Eq. A2). This rank answers its share of `batch` (the step's Prompts),
    then all exchange. Demonstrations are graded once, unless grading failed: run.demo_rewards.

    Returns (sequences, the same list on every rank; rows for samples.jsonl; Counter of the verdicts' reasons
    and of "ms"; time when generation ended). A collective.
    """
    mine = range(len(batch) * run.rank // run.world, len(batch) * (run.rank + 1) // run.world)
    groups, of_demo, generated = sample_and_grade(run, cfg, step, batch, mine)
    verdicts = [verdict for group in groups for _, verdict in group] + list(of_demo.values())
    grading = Counter(verdict.reason for verdict in verdicts) + Counter(ms=sum(v.ms for v in verdicts))

    row = lambda example, response, verdict, demo: {
        "step": step, "id": example.id, "demo": demo, "prompt": example.problem, "answer": example.answer,
        "response": response, "reward": verdict.reward, "reason": verdict.reason}
    sequences, samples = [], []
    for g, group in zip(mine, groups):
        prompt, example = batch[g], batch[g].example
        for k, (r, verdict) in enumerate(group):
            sequences.append(M.Sequence(
                np.asarray(prompt.ids, np.int32), np.asarray(r.tokens, np.int32), group=g,
                reward=verdict.reward, engine_logp=np.asarray(r.logprobs, np.float32), engine=run.rank,
                finished=r.finished))
            samples.append((k, row(example, r.text, verdict, demo=False)))
        if prompt.demo and sequences_per_prompt(cfg)[1]:                                        # Eq. 6
            reward = of_demo[example.id].reward if example.id in of_demo else run.demo_rewards[example.id]
            sequences.append(demonstration(prompt, g, reward))
    # Of rank 0's rollouts a few: the first of each prompt before the second of any.
    samples = [r for _, r in sorted(samples, key=lambda sample: sample[0])[:cfg.log_samples]
               ] if run.rank == 0 else []
    examples = {batch[g].example.id: batch[g].example for g in mine}
    samples += [row(examples[id], examples[id].demo, verdict, demo=True)        # kept, but a person
                for id, verdict in of_demo.items() if not verdict.reward]       # should know
    known = {id: verdict.reward for id, verdict in of_demo.items() if verdict.reason not in FAILED}
    phase("exchange", step)
    everyone = [None] * run.world
    dist.all_gather_object(everyone, (sequences, samples, grading, known))   # tokens, no tensors: a few MB
    sequences, samples = ([x for part in everyone for x in part[i]] for i in (0, 1))
    for part in everyone:
        run.demo_rewards.update(part[3])
    return sequences, samples, sum((part[2] for part in everyone), Counter()), generated


def learning_rate(cfg, step):
    """Of one step, counted from 1: constant, or up over the first cfg.warmup of the steps and down to 0."""
    if cfg.lr_schedule == "constant":
        return cfg.lr
    rising = step / max(1, cfg.warmup * cfg.steps)
    falling = (cfg.steps - step + 1) / ((1 - cfg.warmup) * cfg.steps)
    return cfg.lr * min(1.0, rising, falling)


def divide(run, cfg, indices, sequences):
    """The step's sequences with their advantages (Eq. 7; Eq. 2 where demonstrations are in no group), in
    shares, one for each optimizer update.

    ReLIFT: prompts that all rollouts failed wait in run.failed; when a step's worth of them has come
    together, one more update on their demonstrations follows.
    """
    method = METHODS[cfg.method]
    grouped = [s for s in sequences if method.demos == "group" or not s.is_demo]
    reward, group = (torch.tensor([getattr(s, name) for s in grouped]) for name in ("reward", "group"))
    for s, advantage in zip(grouped, group_advantage(reward, group, cfg.std_in_advantage).tolist()):
        s.advantage = advantage
    shares = [[s for s in sequences if s.group % cfg.updates_per_rollout == u]
              for u in range(cfg.updates_per_rollout)]
    if method.demos == "failed":
        solved = {s.group for s in sequences if s.reward > 0}
        run.failed += [i for g, i in enumerate(indices) if g not in solved and run.prompts[i].demo]
        if len(run.failed) >= cfg.prompts_per_step:
            now, run.failed[:] = run.failed[:cfg.prompts_per_step], run.failed[cfg.prompts_per_step:]
            shares.append([demonstration(run.prompts[i]) for i in now])
    return shares


def train(cfg, run):
    """SRFT, step by step, as in Sec. 4.3. `run`: what setup(cfg) returned. Returns the last metrics."""
    stopping = []                                       # signals received: finish the step, save, leave

    def stop_soon(number, _):
        stopping.append(number)
        if stopping.count(signal.SIGINT) > 2:           # torchrun passes a Ctrl-C on: it may come twice
            raise KeyboardInterrupt
        if run.rank == 0 and len(stopping) == 1:
            print(f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint",
                  flush=True)

    signal.signal(signal.SIGTERM, stop_soon)
    signal.signal(signal.SIGINT, stop_soon)
    skipped, skipped_in_a_row, metrics, stop, warned = run.skipped, 0, {}, False, False
    bar = tqdm(total=cfg.steps, initial=run.step, desc=cfg.method, disable=run.rank != 0,
               dynamic_ncols=True)

    def evaluation(step):
        if run.heldout:
            compare_engine(run, cfg, step)
        sampling = Sampling(cfg.eval_temperature, cfg.eval_top_p, cfg.max_response_tokens, cfg.seed)
        found = {}
        for name, prompts in run.heldout.items():
            phase(f"evaluate {name}", step)
            result = evaluate(run.engine, run.grader, name, prompts, cfg.eval_samples, sampling, step)
            found |= {f"eval/{name}": result["accuracy"], f"eval_len/{name}": result["tokens"],
                      f"eval_entropy/{name}": result["entropy"]}
        return found

    if 0 < cfg.profile <= run.step and run.rank == 0:
        print(f"--profile {cfg.profile}: that step is done, so there will be no trace", file=sys.stderr)
    if run.step == 0:
        run.log.write({"step": 0} | evaluation(0))
    for step in range(run.step + 1, cfg.steps + 1):
        profiler = start_profiler() if step == cfg.profile else None
        phase("rollout", step)
        clock = [time.monotonic()]
        # Sample prompts, generate G rollouts each, grade them, join the demonstrations (Eq. 6).
        indices = run.order.take(cfg.prompts_per_step)
        batch = [run.prompts[i] for i in indices]
        sequences, samples, grading, generated = augmented_groups(run, cfg, step, batch)
        clock, memory = clock + [generated, time.monotonic()], [memory_gb(run.device)]

        shares = divide(run, cfg, indices, sequences)                    # a share for each update

        # Pack into micro-batches, as many on every rank; loss (Eq. 13), backward, clip, AdamW.
        phase("train", step)
        run.engine.sleep()
        for parameters in run.optimizer.param_groups:
            parameters["lr"] = learning_rate(cfg, step)
        cost = lambda sequence: run.flops([sequence])
        packs = [M.pack(share, cfg.micro_batch_tokens, run.world, cost)[run.rank::run.world]
                 for share in shares]
        before = [forward_before_update(run, cfg, batches) for batches in packs]
        parts = [(run, cfg, *pair, *counts(share, cfg.loss_norm))
                 for *pair, share in zip(packs, before, shares)]
        norms = {}
        if cfg.term_gradients and step % cfg.term_gradients == 0:
            norms = term_gradient_norms(*parts[0])
        updates = [update_policy(*part) for part in parts]
        clock.append(time.monotonic())
        memory.append(memory_gb(run.device))

        # Send the new weights to the engine.
        phase("sync", step)
        stop = torch.tensor(float(bool(stopping)))
        dist.all_reduce(stop, dist.ReduceOp.MAX)               # ranks may get the signal in different steps
        # Who is told to stop has minutes: they are for the checkpoint.
        evaluate_now = step == cfg.steps or step % cfg.eval_every == 0 and not stop
        if METHODS[cfg.method].rollouts or evaluate_now:
            run.engine.sync_weights(M.full_parameters(run.policy, run.dtype), version=step)
        clock.append(time.monotonic())

        # Log; evaluate; stop where going on would only waste the machine.
        if profiler:
            phase("write profile", step)
            write_profile(profiler, Path(cfg.out) / "profile")
        phase("log", step)
        bad = sum(not np.isfinite(update["grad_norm"]) for update in updates)
        skipped, skipped_in_a_row = skipped + bad, (skipped_in_a_row + bad if bad == len(updates) else 0)
        metrics = {"step": step} | summarize(run, cfg, sequences, grading, updates, clock) | norms | {
            "steps_skipped": skipped,
            "lr": run.optimizer.param_groups[0]["lr"], "perf/peak_memory_gb": max(memory)}
        if run.rank == 0:
            warn_of_grader(metrics, grading)
        trouble, said = engine_trouble(metrics["engine/logp_diff_rank"], step)
        if trouble == "warn" and not warned and run.rank == 0:
            warned = True                                                           # once a run
            tqdm.write(f"WARNING: {said}. A small model in bf16 may be that noisy", file=sys.stderr)
        if evaluate_now and trouble != "stop":
            metrics |= evaluation(step)
        run.log.write(metrics, samples, last=step == cfg.steps)
        shown = {"reward": "reward/mean", "length": "response_len/mean", "entropy": "entropy/rollout",
                 "loss": "loss/sft"}
        bar.set_postfix({name: f"{metrics[key]:.3g}" for name, key in shown.items()
                         if metrics.get(key) is not None}, refresh=False)
        bar.update()
        if trouble == "stop":
            raise RuntimeError(f"{said}. This step has no checkpoint: --resume goes on from the last one")
        if skipped_in_a_row >= 5:
            raise RuntimeError(
                f"the gradient was not finite {skipped_in_a_row} times in a row; the last batch held "
                f"{[p.example.id for p in batch]}. Lower --lr, or look at samples.jsonl.")

        # Checkpoint.
        phase("checkpoint", step)
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            state = {"step": step, "skipped": skipped, "position": run.order.position, "failed": run.failed,
                     "demo_rewards": run.demo_rewards, "data": [cfg.data, len(run.prompts), cfg.seed]}
            save_checkpoint(Path(cfg.out) / "checkpoints", run.policy, run.optimizer, state, cfg.keep)
        if stop:
            break
        if step == run.step + 1:
            set_timeouts(run.mesh, cfg.hang_minutes)
    else:
        phase("export", cfg.steps)
        M.export_hf(Path(cfg.out) / "hf", run.policy, run.tokenizer, run.dtype)
    bar.close()
    finish(run, cfg, exported=not stop)
    return metrics


def summarize(run, cfg, sequences, grading, updates, clock):
    """The step's metrics from its sequences and updates; the README's glossary defines each."""
    rollouts, demos = [s for s in sequences if not s.is_demo], [s for s in sequences if s.is_demo]
    solved = np.zeros((cfg.prompts_per_step, 2))                # rewards and rollouts of each group
    for s in rollouts:
        solved[s.group] += s.reward, 1
    times, total = np.diff(clock).tolist(), clock[-1] - clock[0]
    peak = None
    if run.device.type == "cuda":
        _, peak = peak_flops(torch.cuda.get_device_name(run.device))

    def mean(values):
        """None: this method has no such sequences, this update none of that kind."""
        values = [float(value) for value in values if value is not None]
        return sum(values) / len(values) if values else None

    gradings = grading.total() - grading["ms"]
    worst = [x for x in (update["engine/logp_diff_max"] for update in updates) if x is not None]
    difference = mean(update["engine/logp_diff_rank"] for update in updates)
    return {
        "reward/mean": mean(s.reward for s in rollouts), "reward/demo_mean": mean(s.reward for s in demos),
        "reward/all_correct": mean(solved[:, 0] == solved[:, 1]) if rollouts else None,
        "reward/all_wrong": mean(solved[:, 0] == 0) if rollouts else None,
        "response_len/mean": mean(len(s.response) for s in rollouts),
        "response_len/max": max((len(s.response) for s in rollouts), default=None),
        "response_len/truncated": mean(not s.finished for s in rollouts),
        "grader/timeouts": sum(grading[reason] for reason in FAILED),
        "perf/grader_ms": grading["ms"] / max(1, gradings),
    } | {f"grader/{reason}": grading[reason] for reason in ("no_box", "unclosed", "truncated", "parse_fail")
    } | {name: mean(update[name] for update in updates) for name in updates[0]} | {
        "engine/logp_diff_max": max(worst, default=None),
        "engine/mismatch": None if difference is None else int(not difference <= MISMATCH_WARNS),
        "time/rollout": times[0], "time/grade": times[1], "time/train": times[2], "time/sync": times[3],
        "time/step": total, "perf/tokens_per_s": sum(map(len, sequences)) / total,
        "perf/mfu": run.flops(sequences) / (times[2] * run.world * peak) if peak else None}


def warn_of_grader(metrics, grading):
    """Others trained for days on rewards that were 0 because grading had broken down."""
    failed, gradings = metrics["grader/timeouts"], grading.total() - grading["ms"]
    if metrics["reward/mean"] != 0 or failed <= 0.005 * gradings:
        return
    tqdm.write(f"WARNING: every reward is 0, and {failed} of {gradings:.0f} gradings were given up: the "
               "grader may be at fault, not the policy. Look at the reasons in samples.jsonl and at the load "
               "of this machine; raise --grader_deadline or --grader_workers", file=sys.stderr)


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


def engine_trouble(difference, step):
    """("stop", "warn" or None; what to say of it) for a step's engine/logp_diff_rank; None: no rollouts."""
    if difference is None or difference <= MISMATCH_WARNS:
        return None, ""
    said = mismatch(difference, f"over the rollouts of step {step}")
    return ("warn" if difference <= MISMATCH_STOPS else "stop"), said               # nan stops, too


@torch.no_grad()
def compare_engine(run, cfg, version):
    """Before an evaluation: raise RuntimeError unless each rank's engine, which has just got the weights of
    `version`, gives the trainer's log-probs to 8 rollouts of its own. A collective.

    A step's own rollouts tell it of the transfer before, and SFT has none. The prompts are random tokens,
    since those of the data would stay in the engine's prefix cache.
    """
    vocabulary, length = run.policy.lm.config.vocab_size, min(16, cfg.max_prompt_tokens)
    prompts = np.random.default_rng(run.rank).integers(0, vocabulary, (8, length)).tolist()
    groups = run.engine.generate(prompts, 1, cfg.temperature, min(64, cfg.max_response_tokens), cfg.seed,
                                 version)
    sequences = [M.Sequence(prompt, group[0].tokens) for prompt, group in zip(prompts, groups)]
    logp, *_ = run.policy(M.collate(sequences, run.device), cfg.temperature)                           # (8,T)
    run.policy.reshard()               # a forward without backward leaves the root gathered
    ours = np.concatenate([row[:len(s.response)] for row, s in zip(logp.cpu().numpy(), sequences)])
    theirs = np.concatenate([group[0].logprobs for group in groups])
    difference = torch.tensor(float(np.abs(ours - theirs).mean())).nan_to_num(nan=np.inf)
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    if difference > MISMATCH_STOPS:
        raise RuntimeError(mismatch(difference.item(), f"before the evaluation of step {version}"))


def finish(run, cfg, exported):
    """Close everything; tell a person where things are, and how far held-out accuracy has come."""
    run.grader.close()
    dist.barrier()                                  # no rank leaves while another still talks to it
    run.engine.close()                                # before the process group: it owns parts of it
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.rank != 0:
        return
    if not exported:
        print(f"stopped; the checkpoint is in {cfg.out}/checkpoints, continue with --resume")
        return
    rows = read_rows(Path(cfg.out) / "metrics.jsonl")
    for name in sorted({key for row in rows for key in row if key.startswith("eval/")}):
        values = {row["step"]: row[name] for row in rows if name in row}
        first, last = min(values), max(values)
        print(f"{name:<16} {f'step {first}' if first else 'base'} {100 * values[first]:5.1f} %   "
              f"trained {100 * values[last]:5.1f} %")
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
