"""What our engine wrapper costs: generate against a bare LLM.generate, weight sync against a copy of the same
bytes.

    python bench/engine.py                                    # a random Llama of 20M parameters
    python bench/engine.py --model DIR --prompts 4 --pairs 5  # a Hugging Face folder

Generation: the same prompts, group size and sampling parameters, in turns; "bare" is vLLM's own LLM.generate,
which gives nothing back before the last response has ended. Ours also turns log-probs and tokens into
Rollouts and hands each one out when it ends. Sync: one rank's sync_weights, its parts, and `copy_` of the
same bytes between two sets of warm tensors.
"""
import statistics

import torch
from transformers import LlamaConfig
from vllm import SamplingParams

import common

import model as M
from config import TINY
from rollout import RolloutEngine, check_environment
from support.intervals import positive
from support.processes import init_distributed

PROMPT = 64               # tokens


def main(argv=None):
    p = common.parser(__doc__, "engine")
    p.add_argument("--model", help="Hugging Face folder; default: a random Llama, 20M parameters, V = 32k")
    p.add_argument("--prompts", type=positive, default=8, help=f"prompts, of {PROMPT} tokens [%(default)s]")
    p.add_argument("--group", type=positive, default=8, help="samples a prompt [%(default)s]")
    p.add_argument("--tokens", type=positive, default=128, help="tokens a response [%(default)s]")
    p.add_argument("--pairs", type=positive, default=7, help="alternating measurements [%(default)s]")
    args = p.parse_args(argv)
    common.start(args)
    _, _, device, mesh = init_distributed(args.device)
    check_environment(device)
    if args.model:
        config, tokenizer = M.load_config(args.model), M.load_tokenizer(args.model)
        policy = M.load_policy(args.model, config, mesh, device)
    else:
        tokenizer = M.load_tokenizer(TINY)
        config, policy = random_llama(mesh, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = RolloutEngine(config, tokenizer, dtype, PROMPT + args.tokens, args.prompts * args.group,
                           eager=device.type == "cpu")
    common.save(args, {"parameters": sum(p.numel() for p in policy.parameters()), "dtype": str(dtype),
                       "generate": generation(args, engine, policy, dtype, device, config),
                       "sync": sync(args, engine, policy, dtype, device)})
    engine.close()                                            # before the process group: it owns parts of it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def random_llama(mesh, device):
    """(config, policy) of 20M parameters."""
    config = LlamaConfig(hidden_size=320, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5,
                         intermediate_size=864, vocab_size=32_768, tie_word_embeddings=True,
                         max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, use_cache=False)
    policy = M.build_policy(config, mesh, device)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() > 1 else 1.0)
    return config, policy


def generation(args, engine, policy, dtype, device, config):
    """Seconds of both (on a CPU, of processor time: the engine runs in this thread), and the same tokens."""
    engine.sync_weights(M.full_parameters(policy, dtype), 0)
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, config.vocab_size, (PROMPT,), generator=random).tolist()
               for _ in range(args.prompts)]
    bare = SamplingParams(n=args.group, temperature=1.0, max_tokens=args.tokens, top_k=0, seed=0, logprobs=0,
                          detokenize=False)
    inputs, seeds = [{"prompt_token_ids": prompt} for prompt in prompts], [0] * len(prompts)
    ended, tokens = [], {}

    def ours():
        engine.llm.reset_prefix_cache()
        began = common.work_clock(device)
        groups = engine.generate(prompts, args.group, 1.0, args.tokens, seeds, on_step=ended.append)
        took = common.work_clock(device) - began
        tokens["ours"] = [rollout.tokens for group in groups for rollout in group]
        return took

    def theirs():
        engine.llm.reset_prefix_cache()
        began = common.work_clock(device)
        outputs = engine.llm.generate(inputs, bare, use_tqdm=False)
        took = common.work_clock(device) - began
        tokens["bare"] = []
        for output in outputs:
            samples = sorted(output.outputs, key=lambda sample: sample.index)
            tokens["bare"] += [list(sample.token_ids) for sample in samples]
        return took

    ours()                                                                                       # warm-up
    theirs()
    bare_s, ours_s, ratio = common.alternate(theirs, ours, args.pairs)
    count, same = sum(map(len, tokens["ours"])), tokens["ours"] == tokens["bare"]
    common.show(f"Generation: {args.prompts} prompts x {args.group}, {count} tokens, "
                f"medians of {args.pairs} pairs",
                ["", "s", "tokens/s"],
                [["bare LLM.generate", bare_s, count / bare_s],
                 ["RolloutEngine.generate", ours_s, count / ours_s],
                 ["overhead", f"{100 * (ratio - 1):.1f} %", f"same tokens: {same}"]])
    return {"bare_s": bare_s, "ours_s": ours_s, "overhead": ratio - 1, "tokens": count, "same_tokens": same}


def sync(args, engine, policy, dtype, device):
    """Seconds of the whole sync, of the trainer's half (cast, gather), of a plain copy."""
    source = [p.detach().to_local().to(dtype) for p in policy.parameters()]
    target = [torch.zeros_like(tensor) for tensor in source]
    versions = iter(range(1, 10**6))

    def timed(work):
        began = common.clock(device)
        work()
        return common.clock(device) - began

    def copy():
        for here, there in zip(source, target):
            there.copy_(here)

    def gather():
        return [tensor for _, tensor in M.full_parameters(policy, dtype)]

    def send():
        engine.sync_weights(M.full_parameters(policy, dtype), next(versions))

    for work in (copy, gather, send):
        work()
    found = [[timed(work) for work in (copy, gather, send)] for _ in range(args.pairs)]
    copy_s, gather_s, send_s = map(statistics.median, zip(*found))
    ratio = statistics.median(sent / copied for copied, _, sent in found)
    gb = sum(tensor.nbytes for tensor in target) / 1e9
    common.show(f"Weight sync: {gb:.2f} GB in {len(source)} tensors", ["", "s", "GB/s", "x copy"],
                [["copy_ of the same bytes", copy_s, gb / copy_s, 1.0],
                 ["trainer's half: cast and gather", gather_s, gb / gather_s, gather_s / copy_s],
                 ["sync_weights", send_s, gb / send_s, ratio]])
    return {"gb": gb, "copy_s": copy_s, "gather_s": gather_s, "sync_s": send_s, "ratio": ratio}


if __name__ == "__main__":
    main()
