"""What a step measures, added up over micro-batches and ranks: the row of metrics.jsonl.

    tally = tally.plus(of_a_micro_batch)                        # on every rank
    of_update = tally.of_all_ranks().metrics()                  # {"loss/sft_demo": ..., "w_sft": ..., ...}
    row = summarize(sequences, n_prompts, grading, [of_update], clock)

docs/metrics.md defines each name.
"""
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from grading.answers import FAILED
from grading.statement import FAULTS
from support.collectives import of_all_ranks
from support.health import MISMATCH_WARNS, gradings


@dataclass
class Tally:
    """Counters that add up over micro-batches and ranks. Ranks that have no work need not know the names."""
    losses: Counter = field(default_factory=Counter)   # loss term -> its value, a share of the whole update's
    sums: Counter = field(default_factory=Counter)     # metric -> sum of the values that it is the mean of
    counts: Counter = field(default_factory=Counter)   # metric -> number of those values
    drift: Counter = field(default_factory=Counter)    # rank of an engine -> sum of |log pi - log pi_engine|
    tokens: Counter = field(default_factory=Counter)   # rank of an engine -> rollout tokens that it sampled
    worst: float = 0.0                                 # the largest |log pi - log pi_engine|

    def plus(self, other):
        """Both together, as a new one."""
        total = Tally(worst=float(np.maximum(self.worst, other.worst)))        # nan, if one of them is
        for name in ("losses", "sums", "counts", "drift", "tokens"):
            counter = getattr(total, name)
            counter.update(getattr(self, name))                  # a Counter's update adds, name by name
            counter.update(getattr(other, name))
        return total

    def of_all_ranks(self):
        """The sum over all ranks. A collective."""
        total = Tally()
        for tally in of_all_ranks(self):
            total = total.plus(tally)
        return total

    def metrics(self):
        """name -> float; None for a mean over nothing."""
        found = {f"loss/{name}": value for name, value in self.losses.items()}
        for name, n in self.counts.items():
            found[name] = self.sums[name] / n if n else None
        found["engine/logp_diff_mean"] = found["engine/logp_diff_rank"] = found["engine/logp_diff_max"] = None
        if self.tokens.total():
            of_engines = [self.drift[rank] / max(n, 1) for rank, n in self.tokens.items()]
            found["engine/logp_diff_mean"] = self.drift.total() / self.tokens.total()
            found["engine/logp_diff_rank"] = float(np.max(of_engines))         # not max(): it may miss a nan
            found["engine/logp_diff_max"] = self.worst
        return found


def tally_of(sequences, losses, sums, worst, distances):
    """The Tally of a micro-batch: what the device measured, and how many sequences or tokens it was of.

    sequences: like model.Sequence. losses, sums: name -> float. worst: the largest |log pi - log pi_engine|.
    distances: its sum over tokens, for each sequence.
    """
    tally = Tally(losses=Counter(losses), sums=Counter(sums), worst=worst)
    demos = rollouts = correct = 0
    for s, distance in zip(sequences, distances):
        if s.is_demo:
            demos += 1
            continue
        rollouts += 1
        correct += s.reward > 0
        tally.drift[s.engine] += distance
        tally.tokens[s.engine] += len(s.response)
    counts = {"w_sft": demos, "w_rl": correct, "entropy/demo": demos, "entropy/rollout": rollouts,
              "tis/capped": tally.tokens.total()}
    for name in sums:                        # what was measured: baselines have no weights
        tally.counts[name] = counts[name]
    return tally


def mean_of(values):
    """Of what is there; None if nothing is: a method without such sequences, an update without that kind."""
    values = [float(value) for value in values if value is not None]
    return sum(values) / len(values) if values else None


def summarize(sequences, n_prompts, grading, updates, clock):
    """A step's metrics.

    sequences: all of the step, like model.Sequence. n_prompts: prompts of the step. grading: Counter of the
    verdicts' reasons and of "ms". updates: the metrics of each optimizer update. clock: when the step
    began, and when generation, exchange, training and the weight sync ended, in seconds.
    """
    rollouts = [s for s in sequences if not s.is_demo]
    demos = [s for s in sequences if s.is_demo]
    solved, asked = np.zeros(n_prompts), np.zeros(n_prompts)
    for s in rollouts:
        solved[s.group] += s.reward
        asked[s.group] += 1
    lengths = [len(s.response) for s in rollouts]
    metrics = {
        "reward/mean": mean_of(s.reward for s in rollouts),
        "reward/demo_mean": mean_of(s.reward for s in demos),
        "reward/all_correct": mean_of(solved == asked) if rollouts else None,
        "reward/all_wrong": mean_of(solved == 0) if rollouts else None,
        "response_len/mean": mean_of(lengths),
        "response_len/max": max(lengths, default=None),
        "response_len/truncated": mean_of(not s.finished for s in rollouts),
        "grader/timeouts": sum(grading[reason] for reason in FAILED),
        "perf/grader_ms": grading["ms"] / max(1, gradings(grading))}
    for reason in ("no_box", "unclosed", "truncated", "parse_fail", "reward_error", *FAULTS):
        metrics[f"grader/{reason}"] = grading[reason]

    # With several updates a step, each metric is their mean; of the largest difference, the largest.
    for name in dict.fromkeys(name for update in updates for name in update):
        metrics[name] = mean_of(update.get(name) for update in updates)
    largest = [update["engine/logp_diff_max"] for update in updates]
    largest = [value for value in largest if value is not None]
    metrics["engine/logp_diff_max"] = float(np.max(largest)) if largest else None
    difference = metrics["engine/logp_diff_rank"]
    metrics["engine/mismatch"] = None if difference is None else int(not difference <= MISMATCH_WARNS)

    rollout, grade, train, sync = np.diff(clock).tolist()
    step = clock[-1] - clock[0]
    return metrics | {"time/rollout": rollout, "time/grade": grade, "time/train": train, "time/sync": sync,
                      "time/step": step, "perf/tokens_per_s": sum(map(len, sequences)) / step}


def shown_on_the_bar(metrics):
    """What a person looks at first: for tqdm's set_postfix."""
    names = {"reward": "reward/mean", "length": "response_len/mean", "entropy": "entropy/rollout",
             "loss": "loss/sft"}                     # of SFT, which has no rewards to show
    found = {}
    for short, name in names.items():
        if metrics.get(name) is not None:
            found[short] = f"{metrics[name]:.3g}"
    return found
