"""What the distributed tests run on every rank, started by conftest.run:

    python tests/ranks.py TASK ARGUMENTS
"""
import dataclasses
import errno
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import eval
import model as M
import rollout
import srft
from config import TINY, parse_args
from data import load_examples, tokenize
from reward import Grader, Verdict
from support import watch
from support.processes import init_distributed
from tiny.task import make_tokenizer
from updates import whole_update


def made_up_sequences():
    """6 groups of 4 rollouts and a demonstration, of uneven lengths, with everything the loss asks for."""
    rng, sequences = np.random.default_rng(0), []
    for group in range(6):
        for k in range(5):
            n = int(rng.integers(1, 40))
            sequences.append(M.Sequence(rng.integers(0, 21, rng.integers(4, 12)), rng.integers(0, 21, n),
                                        is_demo=k == 4, group=group,
                                        reward=float(rng.random() < 0.4), advantage=float(rng.normal()),
                                        engine_logp=None if k == 4 else -3 * rng.random(n)))
    return sequences


def gradients(out, jobs):
    """Gradients and metrics of one update for each job, {"budget": tokens, "count": sequences, "flags": []}.
    jobs: by name, as JSON. Rank 0 writes what was found to `out`, by name."""
    ranks, found = init_distributed("cpu"), {}
    for name, job in json.loads(jobs).items():
        found[name] = one_update(ranks, job["budget"], job["count"], job["flags"])
    if ranks.rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


def one_update(ranks, budget, count, overrides):
    """Gradients and metrics of one update on the first `count` sequences."""
    rank, world, device, mesh = ranks
    cfg = parse_args(["--preset", "tiny", *overrides])
    policy = M.load_policy(TINY, M.load_config(TINY), mesh, device, recompute=0, offload=cfg.offload)
    got = {}

    class Keep:                                        # stands where the optimizer does: keeps the gradients
        state = {}

        def step(self):
            for name, p in policy.named_parameters():
                got[name] = p.grad.full_tensor().clone()

        def zero_grad(self, set_to_none):
            policy.zero_grad(set_to_none)

    reference = None
    if cfg.kl_coef:
        reference = M.load_policy(TINY, M.load_config(TINY), mesh, device).requires_grad_(False)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.1)
    sequences = made_up_sequences()[:count]
    cfg.grad_clip = 1e9
    packs = M.pack(sequences, budget, world)[rank::world]
    last, accumulate = [], M.accumulate

    def noted(policy, **kwargs):
        last.append(kwargs["last"])
        accumulate(policy, **kwargs)

    M.accumulate = noted
    measured = dataclasses.replace(cfg, term_gradients=1)
    stats = whole_update(policy, Keep(), packs, sequences, measured, device, reference, measure_terms=True)
    stats |= whole_update(policy, Keep(), packs, sequences, cfg, device, reference)
    M.accumulate = accumulate
    return {"gradients": got, "stats": stats, "micro_batches": len(packs), "last": last[-len(packs):]}


def engine(out):
    """log p of engine and trainer: in step, after a change of the trainer alone, and after the next sync."""
    rank, world, device, mesh = init_distributed("cpu")
    config, tokenizer = M.load_config(TINY), make_tokenizer()
    policy = M.load_policy(TINY, config, mesh, device)
    prompts = tokenize(load_examples("tiny:heldout")[:8], tokenizer, "none", 64, 64)[rank::world]
    vllm = rollout.RolloutEngine(config, tokenizer, torch.float32, 128, 32)
    found = {}

    def compare(version):
        rollouts = vllm.generate([p.ids for p in prompts], 4, 1.0, 64, seed=1, version=version)
        sequences = []
        for prompt, group in zip(prompts, rollouts):
            sequences += [M.Sequence(prompt.ids, r.tokens, engine_logp=r.logprobs) for r in group]
        with torch.no_grad():
            logp, *_ = policy(M.collate(sequences, device))
        policy.reshard()
        differences = []
        for row, s in zip(logp, sequences):
            trainer_logp = row[:len(s.response)].numpy()
            differences.append(np.abs(trainer_logp - s.engine_logp).max())
        worst = torch.tensor(float(max(differences)))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst.item()

    try:
        vllm.generate([prompts[0].ids], 1, 1.0, 4, seed=0)
    except rollout.StaleWeightsError:
        found["refuses before the first sync"] = True
    vllm.sync_weights(M.full_parameters(policy, torch.float32), 0)
    found["after the first sync"] = compare(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    found["after a change of the trainer alone"] = compare(0)
    try:
        compare(1)
    except rollout.StaleWeightsError:
        found["refuses a version it does not hold"] = True
    vllm.sync_weights(M.full_parameters(policy, torch.float32), 1)
    found["after the next sync"] = compare(1)

    ids, steps = [p.ids for p in prompts], []

    def give_up(ended):
        raise KeyboardInterrupt

    try:
        vllm.generate(ids, 4, 1.0, 64, seed=5, on_step=give_up)
    except KeyboardInterrupt:
        pass
    rollouts = vllm.generate(ids, 4, 1.0, 64, seed=1, on_step=steps.append)
    handed_out = [(i, k) for ended in steps for i, k, r in ended if r is rollouts[i][k]]
    found["each response is handed out once, when it ends"] = (
        sorted(handed_out) == [(i, k) for i in range(len(ids)) for k in range(4)] != handed_out
        and len(steps) == max(len(r.tokens) for group in rollouts for r in group)
        and all(len(r.tokens) <= t for t, ended in enumerate(steps, 1) for _, _, r in ended))
    again = vllm.generate(ids[1:2], 4, 1.0, 64, seed=[1 + 4])
    found["what a prompt yields depends on its seed alone"] = (
        [r.tokens for r in again[0]] == [r.tokens for r in rollouts[1]])
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    vllm.close()


def incomplete(out, case):
    """Whether a real engine refuses what is not a whole model, and what it does then; one case an engine."""
    rank, world, device, mesh = init_distributed("cpu")
    config, tokenizer = M.load_config(TINY), make_tokenizer()
    policy = M.load_policy(TINY, config, mesh, device)
    vllm = rollout.RolloutEngine(config, tokenizer, torch.float32, 128, 32)
    k_proj, norm = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"
    left_out, renamed = {
        "k_proj is missing": ({k_proj}, {}),
        "k_proj is missing at the second sync": ({k_proj}, {}),
        "the norm is renamed at the second sync": ((), {norm: "model.nrom.weight"}),
        "vllm leaves the norm": ({norm}, {})}[case]
    if "second" in case:
        vllm.sync_weights(M.full_parameters(policy, torch.float32), 0)
    if case == "vllm leaves the norm":
        vllm.names.remove(norm)                                        # so that vLLM alone can notice

    def not_the_whole_model():
        for name, tensor in M.full_parameters(policy, torch.float32):
            if name not in left_out:
                yield renamed.get(name, name), tensor

    found = {}
    try:
        vllm.sync_weights(not_the_whole_model(), 1)
    except ValueError as error:
        found["error"] = str(error)
    try:
        vllm.generate([[1, 2, 3]], 1, 1.0, 4, seed=0)
    except rollout.StaleWeightsError:
        found["serves nothing"] = True
    torch.save(found, out)
    vllm.close()


def start(out, cache):
    """Start an engine with its folder in `cache`: where that lies, and the key of vLLM's compiled kernels."""
    os.environ["XDG_CACHE_HOME"] = cache
    init_distributed("cpu")
    vllm = rollout.RolloutEngine(M.load_config(TINY), make_tokenizer(), torch.float32, 128, 32)
    of_vllm = vllm.llm.llm_engine.vllm_config
    torch.save({"folder": of_vllm.model_config.model, "hash": of_vllm.compute_hash()}, out)
    vllm.close()


def recorded(tape, *flags):
    """A whole run. The first, with the real engine, writes its rollouts to `tape`; later runs read them."""
    tape, cfg = Path(tape), parse_args(list(flags))
    known = pickle.loads(tape.read_bytes()) if tape.exists() else None
    recording = {}

    class Tape(rollout.RolloutEngine):
        def generate(self, prompts, *args, version=None, on_step=None, **kwargs):
            if known is not None:
                rollouts = [known[version, tuple(p)] for p in prompts]
                on_step([(i, k, r) for i, group in enumerate(rollouts) for k, r in enumerate(group)])
                return rollouts
            rollouts = super().generate(prompts, *args, version=version, on_step=on_step, **kwargs)
            recording.update({(version, tuple(p)): r for p, r in zip(prompts, rollouts)})
            return rollouts

    srft.RolloutEngine = Tape
    srft.train(cfg, srft.setup(cfg))
    if known is None:
        tape.write_bytes(pickle.dumps(recording))


def stale(since, factor, rank, *flags):
    """A whole run whose engine, on `rank` or on "all", gets other weights than the trainer has, under the
    right version, from version `since` on: all of them times `factor`, or ("missing") without one."""
    def spoilt(named_tensors):
        for name, tensor in named_tensors:
            if factor != "missing":
                yield name, tensor * float(factor)
            elif "0.self_attn.k_proj" not in name:
                yield name, tensor

    class Stale(rollout.RolloutEngine):
        def sync_weights(self, named_tensors, version):
            if version >= int(since) and rank in ("all", str(dist.get_rank())):
                named_tensors = spoilt(named_tensors)
            super().sync_weights(named_tensors, version)

    srft.RolloutEngine = Stale
    cfg = parse_args(list(flags))
    srft.train(cfg, srft.setup(cfg))


def graders_fail(*flags):
    """A whole run whose every grading runs out of time."""
    class Failing(Grader):
        def collect(self):
            return [Verdict(0.0, "timeout", 1.0) for _ in super().collect()]

    srft.Grader = Failing
    cfg = parse_args(list(flags))
    srft.train(cfg, srft.setup(cfg))


def full_disk(*flags):
    """A whole run in which the disk of rank 1 is full when it writes its second checkpoint."""
    save = torch.save

    def full(content, file):
        if dist.get_rank() == 1 and "step-4" in str(file):
            Path(file).write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    torch.save = full
    sys.argv[1:] = flags
    srft.main()


def sleeper(*flags):
    """A whole run from the command line on: rank 1 is slow in its first rollout and never ends its second."""
    class Sleeper(rollout.RolloutEngine):
        def generate(self, *args, version=None, **kwargs):
            if dist.get_rank() == 1:
                print("SLEEPS AT", time.monotonic(), flush=True)
                time.sleep(600 if version == 1 else 8)
            return super().generate(*args, version=version, **kwargs)

    srft.RolloutEngine = Sleeper
    sys.argv[1:] = flags
    srft.main()


def signalled(version, *flags):
    """A whole run in which the last rank, and no other, gets SIGTERM while all draw the responses of the
    evaluation of `version`. Each decoding step of the others then takes seconds."""
    class Signalled(rollout.RolloutEngine):
        def generate(self, prompts, n, temperature, max_tokens, seed, version=None, on_step=None, **kwargs):
            def slow(ended):
                time.sleep(2)
                on_step(ended)

            if "top_p" in kwargs and version == wanted:                # of an evaluation
                if dist.get_rank() == dist.get_world_size() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    kwargs["on_step"] = slow
            return super().generate(prompts, n, temperature, max_tokens, seed, version,
                                    **{"on_step": on_step, **kwargs})

    wanted = int(version)
    srft.RolloutEngine = Signalled
    sys.argv[1:] = flags
    srft.main()


def unwell(how, *flags):
    """An evaluation from the command line on, whose rank 1 writes one chunk and is then "stopped", or "stuck"
    in the engine."""
    class Unwell(rollout.RolloutEngine):
        calls = 0

        def generate(self, *args, **kwargs):
            self.calls += 1
            if dist.get_rank() == 1 and self.calls == 2:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
            return super().generate(*args, **kwargs)

    watch.SILENT_MINUTES = 0.2
    eval.RolloutEngine = Unwell
    eval.main(list(flags))


if __name__ == "__main__":
    tasks = [gradients, engine, incomplete, start, recorded, stale, graders_fail, full_disk, sleeper,
             signalled, unwell]
    task = {task.__name__: task for task in tasks}[sys.argv[1]]
    task(*sys.argv[2:])
