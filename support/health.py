"""Is a run still worth its machine? Five faults with which others have trained on for days.

    health = Health(vocabulary=151_936, rollouts=1024)
    trouble = health.look(metrics, grad_norms, grading, ids)    # each step: warns, or says what to stop for
    check_engine(ours, theirs, where)              # before an evaluation: raises
    check_alive(parameters, logp, vocabulary)      # before weights are saved: raises

1. The engine samples from another policy than the trainer trains: a transfer of weights went wrong, RoPE or
   temperature differ. Importance weights hide it, and rewards still rise a little.
2. The gradient is not finite, again and again.
3. All rewards are 0 because grading has broken down, not because the policy is bad.
4. No response has an answer, step after step, so that no reward can ever teach anything.
5. The policy is gone: all tokens are equally likely, or its weights or log-probs are not finite.
"""
import math
import sys
from collections import Counter

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
LASTING = 5                      # steps in a row without an answer, or with an entropy of nearly ln V


class Health:
    """Looks at every step. What it says is the same on every rank; rank 0 prints the warnings.

    vocabulary: V, the number of tokens; rollouts: of a step, over all ranks.
    """

    def __init__(self, vocabulary, rollouts):
        self.vocabulary, self.rollouts = vocabulary, rollouts
        self.skipped_in_a_row = 0
        self.lasted = Counter()                # trouble -> steps in a row that have had it
        self.warned_of = set()                 # troubles, each once a run

    def look(self, metrics, grad_norms, grading, ids):
        """What to stop for, in words, or "". metrics: the step's row of metrics.jsonl. grad_norms: of its
        updates. grading: Counter of verdicts' reasons and of "ms". ids: of its examples."""
        bad = sum(not math.isfinite(norm) for norm in grad_norms)
        if bad == len(grad_norms):
            self.skipped_in_a_row += bad
        else:
            self.skipped_in_a_row = 0
        warn_of_grader(metrics, gradings(grading))
        self.warn_if_it_lasts("silence", self.silence(metrics))
        self.warn_if_it_lasts("chance", self.chance(metrics))
        difference = metrics["engine/logp_diff_rank"]
        if difference is not None and not difference <= MISMATCH_WARNS:         # nan is a mismatch, too
            said = mismatch(difference, f"over the rollouts of step {metrics['step']}")
            if not difference <= MISMATCH_STOPS:
                return f"{said}. This step has no checkpoint: --resume goes on from the last one"
            self.warn_once("mismatch", f"{said}. A small model in bf16 may be that noisy")
        if self.skipped_in_a_row >= SKIPPED_STOPS:
            return (f"the gradient was not finite {self.skipped_in_a_row} times in a row; the last batch "
                    f"held {ids}. Lower --lr, or look at samples.jsonl.")
        return ""

    def silence(self, metrics):
        """What to say of a step in which no response gave an answer; "" if one did, or there was none."""
        no_box, unclosed, cut = [metrics[f"grader/{why}"] for why in ("no_box", "unclosed", "truncated")]
        # Demonstrations are graded, too, and nearly always have an answer.
        if not self.rollouts or no_box + unclosed + cut < self.rollouts:
            return ""
        return (f"no response has had an answer, so there was nothing to reward; in the last of them {cut} "
                f"were cut at --max_response_tokens, {no_box + unclosed} had no closed \\boxed{{}}. Look at "
                "samples.jsonl: is that limit too low, or --template not this model's? If answers came "
                "before, training has ruined the policy: --resume from an earlier checkpoint, lower --lr")

    def chance(self, metrics):
        """What to say of a policy to which all tokens are nearly equally likely; "" of any other."""
        most = math.log(self.vocabulary)
        entropies = [metrics.get("entropy/rollout"), metrics.get("entropy/demo")]
        for entropy in entropies:
            if entropy is not None and not entropy < 0.95 * most:               # nan is no policy either
                return (f"the policy's entropy has been that of pure chance, {entropy:.2f} nats, where ln V "
                        f"is {most:.2f}: it knows nothing any more. --resume from a checkpoint before that, "
                        "with a lower --lr or --grad_clip; grad_norm in metrics.jsonl shows when it went")
        return ""

    def warn_if_it_lasts(self, trouble, text):
        """Warn of what a step's `text` says ("": no such trouble) once it has been so for some steps."""
        self.lasted[trouble] += 1
        if not text:
            self.lasted[trouble] = 0
        if self.lasted[trouble] >= LASTING:
            self.warn_once(trouble, f"for {LASTING} steps {text}")

    def warn_once(self, trouble, text):
        """Warn, once a run."""
        if trouble not in self.warned_of:
            warn(text)
        self.warned_of.add(trouble)


def mismatch(difference, where):
    """What is wrong where an engine samples from another policy than the trainer trains."""
    return (f"engine and trainer disagree: |log p(engine) - log p(trainer)| is {difference:.3f} nats on "
            f"average {where}, at the rank where it is highest (warning above {MISMATCH_WARNS}, end above "
            f"{MISMATCH_STOPS}). The engine serves other weights, another RoPE or another temperature than "
            "the trainer; check --rope_theta, --window and the vllm version")


def check_engine(ours, theirs, where):
    """Raise RuntimeError, on all ranks, unless trainer and engine agree on every rank. ours, theirs: their
    log-probs of the same tokens, two lists of arrays, in nats. A collective."""
    difference = np.abs(np.concatenate(ours) - np.concatenate(theirs)).mean()
    worst = torch.tensor(float(difference)).nan_to_num(nan=math.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if worst > MISMATCH_STOPS:
        raise RuntimeError(mismatch(worst.item(), where))


def check_alive(parameters, logp, vocabulary):
    """Raise RuntimeError, on every rank, if a policy is dead: a dead checkpoint would push a good one out of
    --keep, and a dead export would look like a success. A collective.

    parameters: (name, its tensor or this rank's shard of it). logp: log-probs of some tokens, in nats. Where
    all are -ln V, weights are so large that a norm has overflowed: hidden states are 0, and so are logits.
    """
    names, largest = [], []
    for name, tensor in parameters:
        names.append(name)
        largest.append(tensor.new_zeros(()))
        if tensor.numel():                               # a rank's shard of a small tensor may be empty
            low, high = tensor.aminmax()                 # nan, if any number is
            largest[-1] = torch.maximum(-low, high)
    distance = (logp + math.log(vocabulary)).abs().max()
    found = torch.stack([*largest, distance.to(largest[0].device)]).cpu()            # one wait for the device
    found = torch.where(found.isfinite(), found, math.inf)                          # a maximum may miss a nan
    dist.all_reduce(found, dist.ReduceOp.MAX)
    distance, worst = found[-1].item(), int(found[:-1].argmax())
    reached = f"{names[worst]} reaches {found[worst]:.2g}"
    if found[worst] == math.inf:
        why = f"{names[worst]} holds nan or inf"
    elif distance == math.inf:
        why = f"its log-probs are nan or inf, and {reached}"
    elif distance < 1e-4:
        why = f"all tokens are equally likely, and {reached}"
    else:
        return
    raise RuntimeError(f"the policy is dead: {why}. It is neither saved nor exported. --resume goes on from "
                       "the last checkpoint, if there is one, with a lower --lr or --grad_clip; grad_norm in "
                       "metrics.jsonl shows when it died")


def gradings(grading):
    """How many gradings: the Counter's counts, without its milliseconds."""
    return grading.total() - grading["ms"]


def warn_of_grader(metrics, total):
    """Warn of a step whose rewards are all 0 while more than 0.5 % of its `total` gradings were given up."""
    failed = metrics["grader/timeouts"] + metrics["grader/reward_error"]
    if metrics["reward/mean"] != 0 or failed <= 0.005 * total:
        return
    warn(f"every reward is 0, and {failed} of {total:.0f} gradings were given up: the grader may be at "
         "fault, not the policy. Look at the reasons in samples.jsonl and at the load of this machine; raise "
         "--grader_deadline or --grader_workers, or mend the function of --reward")


def warn(text):
    """On rank 0, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(f"WARNING: {text}", file=sys.stderr)
