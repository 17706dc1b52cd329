"""What our engine wrapper costs: generate against a bare LLM.generate, weight sync against a copy of the same bytes.

    python bench/rollout.py                                   # a random Llama of 20M parameters
    python bench/rollout.py --model DIR --prompts 4 --pairs 5 # a Hugging Face folder

Generation: the same prompts, group size and sampling parameters, in turns; "bare" is vLLM's own LLM.generate, which gives
nothing back before the last response has ended. Ours also turns log-probs and tokens into Rollouts and hands each one out when
it ends. Sync: one rank's sync_weights, its parts, and `copy_` of the same bytes between two sets of warm tensors.
"""
import statistics

import common
import torch
from transformers import AutoTokenizer, LlamaConfig
from vllm import SamplingParams

import model as M
from config import TINY
from rollout import RolloutEngine, check_environment
from support.processes import init_distributed


def main(argv=None):
    p = common.parser(__doc__, "rollout")
    p.add_argument("--model", help="Hugging Face folder; default: a random Llama, 20M parameters, V = 32k")
    p.add_argument("--prompts", type=int, default=8, help="prompts, of 64 tokens [%(default)s]")
    p.add_argument("--group", type=int, default=8, help="samples a prompt [%(default)s]")
    p.add_argument("--tokens", type=int, default=128, help="tokens a response [%(default)s]")
    p.add_argument("--pairs", type=int, default=7, help="alternating measurements [%(default)s]")
    args = p.parse_args(argv)
    common.start(args)
    _, _, device, mesh = init_distributed(args.device)
    check_environment(device)
    if args.model:
        config, tokenizer = M.load_config(args.model), AutoTokenizer.from_pretrained(args.model)
        policy = M.load_policy(args.model, config, mesh, device)
    else:
        config = LlamaConfig(hidden_size=320, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5,
                             intermediate_size=864, vocab_size=32_768, tie_word_embeddings=True,
                             max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, use_cache=False)
        tokenizer, policy = AutoTokenizer.from_pretrained(TINY), M.build_policy(config, mesh, device)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() > 1 else 1.0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = RolloutEngine(config, tokenizer, dtype, 64 + args.tokens, args.prompts * args.group,
                           eager=device.type == "cpu")
    results = {"parameters": sum(p.numel() for p in policy.parameters()), "dtype": str(dtype),
               "generate": generation(args, engine, policy, dtype, device, config), "sync": sync(args, engine, policy, dtype, device)}
    common.save(args, results)
    engine.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def generation(args, engine, policy, dtype, device, config):
    """Seconds of both (on a CPU, of processor time: the engine runs in this thread), the same tokens from both."""
    engine.sync_weights(M.full_parameters(policy, dtype), 0)
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, config.vocab_size, (64,), generator=random).tolist() for _ in range(args.prompts)]
    bare = SamplingParams(n=args.group, temperature=1.0, max_tokens=args.tokens, top_k=0, seed=0, logprobs=0, detokenize=False)
    ended, tokens = [], {}

    def ours():
        engine.llm.reset_prefix_cache()
        start = common.work_clock(device)
        groups = engine.generate(prompts, args.group, 1.0, args.tokens, [0] * len(prompts), on_step=ended.append)
        took = common.work_clock(device) - start
        tokens["ours"] = [r.tokens for group in groups for r in group]
        return took

    def theirs():
        engine.llm.reset_prefix_cache()
        start = common.work_clock(device)
        outputs = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], bare, use_tqdm=False)
        took = common.work_clock(device) - start
        tokens["bare"] = [list(c.token_ids) for o in outputs for c in sorted(o.outputs, key=lambda c: c.index)]
        return took

    ours(), theirs()                                                                             # warm-up
    bare_s, ours_s, ratio = common.alternate(theirs, ours, args.pairs)
    count = sum(map(len, tokens["ours"]))
    common.show(f"Generation: {args.prompts} prompts x {args.group}, {count} tokens, medians of {args.pairs} pairs",
                ["", "s", "tokens/s"],
                [["bare LLM.generate", bare_s, count / bare_s], ["RolloutEngine.generate", ours_s, count / ours_s],
                 ["overhead", f"{100 * (ratio - 1):.1f} %", f"same tokens: {tokens['ours'] == tokens['bare']}"]])
    return {"bare_s": bare_s, "ours_s": ours_s, "overhead": ratio - 1, "tokens": count,
            "same_tokens": tokens["ours"] == tokens["bare"]}


def sync(args, engine, policy, dtype, device):
    """Seconds of the whole sync, of the trainer's half (cast, gather), of a plain copy."""
    source = [p.detach().to_local().to(dtype) for p in policy.parameters()]
    target = [torch.zeros_like(t) for t in source]
    versions = iter(range(1, 10**6))

    def timed(work):
        start = common.clock(device)
        work()
        return common.clock(device) - start

    copy = lambda: [t.copy_(s) for s, t in zip(source, target)]
    gather = lambda: [tensor for _, tensor in M.full_parameters(policy, dtype)]
    send = lambda: engine.sync_weights(M.full_parameters(policy, dtype), next(versions))
    for work in (copy, gather, send):
        work()
    found = [[timed(work) for work in (copy, gather, send)] for _ in range(args.pairs)]
    copy_s, gather_s, send_s = map(statistics.median, zip(*found))
    gb = sum(t.nbytes for t in source) / 1e9
    ratio = statistics.median(s / c for c, _, s in found)
    rows = [["copy_ of the same bytes", copy_s, gb / copy_s, 1.0], ["trainer's half: cast and gather", gather_s, gb / gather_s,
            gather_s / copy_s], ["sync_weights", send_s, gb / send_s, ratio]]
    common.show(f"Weight sync: {gb:.2f} GB in {len(source)} tensors", ["", "s", "GB/s", "x copy"], rows)
    return {"gb": gb, "copy_s": copy_s, "gather_s": gather_s, "sync_s": send_s, "ratio": ratio}


if __name__ == "__main__":
    main()
