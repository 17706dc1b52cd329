"""Is a run still worth its machine? Three faults that others have trained on for days.

    health = Health()
    trouble = health.look(metrics, grad_norms, grading, ids)    # each step: warns, or says what to stop for
    check_engine(ours, theirs, where)              # before an evaluation: raises

1. The engine samples from another policy than the trainer trains: a transfer of weights went wrong, RoPE or
   temperature differ. Importance weights hide it, and rewards still rise a little.
2. The gradient is not finite, again and again.
3. All rewards are 0 because grading has broken down, not because the policy is bad.
"""
import math
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# Nats: mean of |log p(engine) - log p(trainer)| over the rollout tokens of one rank's engine, the highest of
# all ranks, so that one bad engine is not lost among 64. For scale: bf16 gives about 0.01 at 7B; the tiny
# model, served with its weights times 1.2, gives 0.17. Looked at after every step, since every step transfers
# weights anew, on a GPU into memory that training has used meanwhile.
MISMATCH_WARNS, MISMATCH_STOPS = 0.05, 0.15
SKIPPED_STOPS = 5                # updates in a row, in steps without a finite one


class Health:
    """Looks at every step. What it says is the same on every rank; rank 0 prints the warnings."""

    def __init__(self):
        self.skipped_in_a_row, self.warned_of_mismatch = 0, False

    def look(self, metrics, grad_norms, grading, ids):
        """What to stop for, in words, or "". metrics: the step's row of metrics.jsonl. grad_norms: of its
        updates. grading: Counter of verdicts' reasons and of "ms". ids: of its examples."""
        bad = sum(not math.isfinite(norm) for norm in grad_norms)
        if bad == len(grad_norms):
            self.skipped_in_a_row += bad
        else:
            self.skipped_in_a_row = 0
        warn_of_grader(metrics, gradings(grading))
        difference = metrics["engine/logp_diff_rank"]
        if difference is not None and not difference <= MISMATCH_WARNS:         # nan is a mismatch, too
            said = mismatch(difference, f"over the rollouts of step {metrics['step']}")
            if not difference <= MISMATCH_STOPS:
                return f"{said}. This step has no checkpoint: --resume goes on from the last one"
            if not self.warned_of_mismatch:                                     # once a run
                warn(f"{said}. A small model in bf16 may be that noisy")
            self.warned_of_mismatch = True
        if self.skipped_in_a_row >= SKIPPED_STOPS:
            return (f"the gradient was not finite {self.skipped_in_a_row} times in a row; the last batch "
                    f"held {ids}. Lower --lr, or look at samples.jsonl.")
        return ""


def mismatch(difference, where):
    """What is wrong where an engine samples from another policy than the trainer trains."""
    return (f"engine and trainer disagree: |log p(engine) - log p(trainer)| is {difference:.3f} nats on "
            f"average {where}, at the rank where it is highest (warning above {MISMATCH_WARNS}, end above "
            f"{MISMATCH_STOPS}). The engine serves other weights, another RoPE or another temperature than "
            "the trainer; check --rope_theta, --window and the vllm version")


def check_engine(ours, theirs, where):
    """Raise RuntimeError unless the two agree on every rank. ours, theirs: log-probs of the same tokens by
    trainer and engine, two lists of arrays, in nats. A collective."""
    difference = np.abs(np.concatenate(ours) - np.concatenate(theirs)).mean()
    worst = torch.tensor(float(difference)).nan_to_num(nan=math.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if worst > MISMATCH_STOPS:
        raise RuntimeError(mismatch(worst.item(), where))


def gradings(grading):
    """How many: the Counter's counts, without its milliseconds."""
    return grading.total() - grading["ms"]


def warn_of_grader(metrics, total):
    """Of a step whose rewards are all 0 while more than 0.5 % of its `total` gradings were given up."""
    failed = metrics["grader/timeouts"]
    if metrics["reward/mean"] != 0 or failed <= 0.005 * total:
        return
    warn(f"every reward is 0, and {failed} of {total:.0f} gradings were given up: the grader may be at "
         "fault, not the policy. Look at the reasons in samples.jsonl and at the load of this machine; raise "
         "--grader_deadline or --grader_workers")


def warn(text):
    """On rank 0, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(f"WARNING: {text}", file=sys.stderr)
