"""Accuracy on held-out problems: sample, grade, average.

`evaluate` serves the in-loop evaluation of training; it uses the engine and the grader that
the caller already has.
"""
import numpy as np
import torch.distributed as dist


def evaluate(engine, grader, prompts, n, temperature, top_p, max_tokens, seed, version):
    """avg@n: the mean over problems of the share of n sampled responses that are
    correct (Sec. 5.1, App. B).

    prompts: list of data.Prompt, the same on every rank; each rank answers its share. Returns a dict with
    "accuracy" and "truncated" (share of responses cut at max_tokens), both in 0..1. A collective.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = prompts[rank::world]
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)[rank::world].tolist()
    rollouts = engine.generate([p.ids for p in mine], n, temperature, max_tokens, seeds, version,
                               top_p=top_p)
    verdicts = grader.grade([r.text for group in rollouts for r in group],
                            [p.example.answer for p in mine for _ in range(n)])
    mine = (sum(v.reward for v in verdicts), sum(not r.finished for group in rollouts for r in group))
    everyone = [None] * world
    dist.all_gather_object(everyone, mine)
    correct, truncated = np.sum(everyone, axis=0) / (len(prompts) * n)
    return {"accuracy": float(correct), "truncated": float(truncated)}
