"""What a step does with its prompts, without model and engine: groups, advantages, shares, samples, tallies.

    pytest tests/test_step.py
"""
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import model as M
import srft
from config import Config
from data import Example, Prompt, demo_key
from reward import Verdict
from rollout import Rollout
from support.metrics import Tally, tally_of
from support.processes import Ranks


class Engine:
    """Responses that end in any order; the k-th to a prompt says "PROMPT/k" and is drawn with its seed."""

    def generate(self, prompts, n, temperature, max_tokens, seeds, version, on_step):
        self.asked = {"seeds": seeds, "version": version}
        order = [(i, k) for i in range(len(prompts)) for k in range(n)]
        random.Random(0).shuffle(order)
        rollouts = [[None] * n for _ in prompts]
        for i, k in order:
            text = f"{prompts[i][0]}/{k}"
            rollouts[i][k] = Rollout([prompts[i][0], k, 0], [-0.5, -1.0, -2.0], text, finished=k > 0)
            on_step([(i, k, rollouts[i][k])])
            on_step([])                                                  # as after most decoding steps
        return rollouts


class Grader:
    """Right are responses that end in the number that is the prompt's answer."""

    def __init__(self):
        self.submitted = []

    def submit(self, responses=(), answers=(), finished=None, examples=None):
        self.submitted += zip(responses, answers)

    def collect(self):
        verdicts = []
        for response, answer in self.submitted:
            right = response.endswith(answer)
            verdicts.append(Verdict(float(right), "ok" if right else "wrong", 1.0))
        self.submitted = []
        return verdicts


def step_prompts(n=3):
    """Prompt i has the one token 10 + i; of its rollouts, the (i mod 4)-th is right. The second demonstration
    is wrong, the last prompt has none."""
    prompts = []
    for i in range(n):
        answer = f"/{i % 4}"
        demo = None if i == n - 1 else [7, 7, 7, 0]
        text = None if demo is None else "demonstration" + (answer if i != 1 else "/x")
        prompts.append(Prompt(Example(f"id{i}", f"problem {i}", answer, text), [10 + i], demo))
    return prompts


def key(i):
    """What the reward of the i-th demonstration of step_prompts is remembered by."""
    return demo_key(step_prompts()[i].example)


@pytest.fixture
def alone():
    """A process group of one, without a process group."""
    return Ranks(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize("method", ["srft", "grpo", "luffy", "sft"])
def test_each_rollout_has_its_own_reward_whatever_ends_first_and_the_demonstration_joins(method, alone):
    cfg, engine = Config(method=method, n_rollouts=4, demo_in_group="joins"), Engine()
    answered, _ = srft.augmented_groups(step_prompts(), 5, cfg, engine, Grader(), {}, alone)
    rollouts = [s for s in answered.sequences if not s.is_demo]
    demos = [s for s in answered.sequences if s.is_demo]
    if method == "sft":
        assert not rollouts
    else:
        assert [(s.group, s.response[1]) for s in rollouts] == [(i, k) for i in range(3) for k in range(4)]
        assert [s.reward for s in rollouts] == [float(s.response[1] == s.group % 4) for s in rollouts]
        assert all(s.prompt.tolist() == [10 + s.group] for s in rollouts)
        assert [s.finished for s in rollouts] == [s.response[1] > 0 for s in rollouts]
        assert engine.asked["version"] == 4 and len(set(engine.asked["seeds"])) == 3
    if method == "grpo":
        assert not demos and not answered.demo_rewards
    else:
        assert [(s.group, s.reward) for s in demos] == [(0, 1.0), (1, 0.0)]
        assert answered.demo_rewards == {key(0): 1.0, key(1): 0.0}
    assert answered.grading["ok"] + answered.grading["wrong"] == len(answered.sequences)


def test_a_demonstration_whose_reward_is_known_is_not_graded_again(alone):
    cfg, grader = Config(n_rollouts=4), Grader()
    answered, _ = srft.augmented_groups(step_prompts(), 1, cfg, Engine(), grader, {key(0): 0.5}, alone)
    assert answered.demo_rewards == {key(1): 0.0}
    assert [s.reward for s in answered.sequences if s.is_demo] == [0.5, 0.0]


def test_samples_are_the_first_of_each_prompt_before_the_second_of_any_and_wrong_demonstrations(alone):
    cfg = Config(n_rollouts=4, log_samples=5)
    answered, _ = srft.augmented_groups(step_prompts(), 1, cfg, Engine(), Grader(), {}, alone)
    rollouts = [row["response"] for row in answered.samples if not row["demo"]]
    demos = [row["id"] for row in answered.samples if row["demo"]]
    assert rollouts == ["10/0", "11/0", "12/0", "10/1", "11/1"] and demos == ["id1"]


def made_up(rewards, demo_rewards):
    """Group g has rollouts with rewards[g], and a demonstration where demo_rewards[g] is a number."""
    sequences = []
    for group, (ours, theirs) in enumerate(zip(rewards, demo_rewards)):
        for reward in ours:
            sequences.append(M.Sequence([1], [2], group=group, reward=reward))
        if theirs is not None:
            sequences.append(M.Sequence([1], [2, 3], is_demo=True, group=group, reward=theirs))
    return sequences


def test_advantages_are_over_the_group_that_the_method_has_and_nothing_is_written_into():
    sequences = made_up([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [1.0, None])
    joined = [s.advantage for s in srft.with_advantages(sequences, Config())]
    assert joined == pytest.approx([1, -1, -1, 1, 0, 0, 0], abs=1e-5)        # mean 1/2, deviation 1/2
    beside = [s.advantage for s in srft.with_advantages(sequences, Config(method="sft+rl"))]
    assert beside == pytest.approx([math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5), 0, 0, 0, 0], abs=1e-5)
    assert all(s.advantage == 0 for s in sequences)


def test_each_update_gets_whole_groups_and_every_sequence_once():
    sequences = made_up([[1.0, 0.0]] * 5, [1.0] * 5)
    shares, failed = srft.divide(Config(updates_per_rollout=2), [], range(5), sequences, [])
    assert [sorted({s.group for s in share}) for share in shares] == [[0, 2, 4], [1, 3]] and failed == []
    assert sorted(map(id, sequences)) == sorted(id(s) for share in shares for s in share)


def test_relift_demonstrates_failed_prompts_once_there_is_a_steps_worth_of_them():
    data = step_prompts(6)                                             # the last has no demonstration
    cfg = Config(method="relift", prompts_per_step=3)
    sequences = made_up([[0.0], [1.0], [0.0]], [None] * 3)
    shares, failed = srft.divide(cfg, data, [4, 1, 5], sequences, [])
    assert len(shares) == 1 and failed == [4]
    shares, failed = srft.divide(cfg, data, [0, 2, 3], sequences, [4, 1])
    assert [s.prompt.tolist() for s in shares[1]] == [[14], [11], [10]] and failed == [3]
    assert all(s.is_demo for s in shares[1])


def test_a_tally_is_the_same_however_it_is_added_up_and_says_nothing_of_what_is_not_there():
    sequences = made_up([[1.0, 0.0, 1.0]], [1.0])
    sequences[2].engine = 1
    sums = {"w_sft": 0.25, "w_rl": 0.5, "entropy/demo": 1.0, "entropy/rollout": 3.0, "tis/capped": 1.0}
    one = tally_of(sequences, {"sft": 2.0}, sums, 0.7, [0.3, 0.1, 0.7, 0.0])
    two = tally_of(sequences[:1], {"sft": 1.0, "rl": -1.0}, {"entropy/rollout": 5.0}, 0.2, [0.2])
    found = Tally().plus(two).plus(one).metrics()
    assert found == one.plus(two).metrics() == {
        "loss/sft": 3.0, "loss/rl": -1.0, "w_sft": 0.25, "w_rl": 0.25, "entropy/demo": 1.0,
        "entropy/rollout": 2.0, "tis/capped": pytest.approx(1 / 3), "engine/logp_diff_max": 0.7,
        "engine/logp_diff_mean": pytest.approx(1.3 / 4), "engine/logp_diff_rank": pytest.approx(0.7)}
    of_demos = tally_of(sequences[3:], {"sft": 1.0}, {"w_rl": 0.0}, 0.0, [0.0]).metrics()
    assert of_demos["w_rl"] is None and of_demos["engine/logp_diff_mean"] is None
    assert math.isnan(one.plus(Tally(worst=math.nan)).metrics()["engine/logp_diff_max"])


def test_micro_batches_are_dealt_so_that_every_rank_has_as_many(monkeypatch):
    cfg = Config(micro_batch_tokens=4, max_prompt_tokens=1, max_response_tokens=3)
    sequences = made_up([[1.0, 0.0, 1.0, 1.0, 0.0]], [1.0])
    dealt = []
    for rank in range(4):
        policy = SimpleNamespace(flops=lambda sequences: sum(map(len, sequences)))
        run = SimpleNamespace(ranks=Ranks(rank, 4, torch.device("cpu"), None), policy=policy)
        [batches], [extras] = srft.deal(cfg, run, srft.srft_loss, [sequences])
        assert extras == [{}] * len(batches)
        dealt.append(batches)
    assert len({len(batches) for batches in dealt}) == 1
    ids = Counter(id(s) for batches in dealt for batch in batches for s in batch)
    assert ids == Counter(map(id, sequences))
