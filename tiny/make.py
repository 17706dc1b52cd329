"""Make the base model of the tiny task: pretrain a 0.8M-parameter Llama on a mixture of ways to respond.

    python tiny/make.py                          # about 25 minutes on one core; shipped beside this file
    python tiny/make.py experiments/qwen3 qwen3  # the same of another family, for experiments/tiny_paper.py
    python tiny/make.py out/tiny_paper/llama-256 llama 256    # twice as wide, 3.1M parameters, for the same

The mixture makes a base model in the paper's sense: it knows the arithmetic and has seen careful
reasoning, but its habit is to blurt out a guess, and its reasoning slips. Phase 1 teaches arithmetic, phase 2
the habits.
"""
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny.task import draw_terms, make_tokenizer, write_problem, write_response  # noqa: E402

STEPS, BATCH, LR = 2800, 64, 3e-3
SLIP = {"guess": 0.0, "plain": 0.12, "careful": 0.06}      # chance that a line of reasoning goes wrong
MIXTURE = (                        # until this share of the steps: weights of guess, plain, careful
    (0.75, (0.10, 0.50, 0.40)),    # phase 1
    (1.00, (0.75, 0.17, 0.08)))    # phase 2


def main(folder=Path(__file__).resolve().parent, family="llama", width="128"):
    torch.manual_seed(0)
    rng, tokenizer, width = random.Random(0), make_tokenizer(), int(width)
    model = make_model(family, tokenizer, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(range(STEPS))
    for step in bar:
        ids, labels = make_batch(rng, tokenizer, mixture_at(step))
        # The logits at place t predict token t + 1; -100 marks what is not to be learned.
        logits = model(ids).logits[:, :-1]                                          # (B, T-1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * 128 / width
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "generation_config.json").unlink(missing_ok=True)


def make_model(family, tokenizer, width):
    """A model of a family that transformers knows, with random weights."""
    # Not qwen2: transformers imposes that family's own tokenizer class on every folder with a qwen2 config.
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config)


def mixture_at(step):
    """The weights of the styles, in the order of SLIP."""
    for until, weights in MIXTURE:
        if step < until * STEPS:
            return weights


def learning_rate(step):
    """100 steps of warm-up, times a cosine from 1 down to 0.02."""
    decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / STEPS))
    return LR * min(1.0, step / 100) * decay


def make_batch(rng, tokenizer, mixture):
    """BATCH new problems of one length, with responses -> ids, labels (B,T), labels -100 on the prompts."""
    n, texts = rng.choice((2, 3, 3, 4, 4, 5, 6, 7, 8)), []
    for style in rng.choices(tuple(SLIP), mixture, k=BATCH):
        terms = draw_terms(rng, n)
        texts.append((write_problem(terms), write_response(terms, rng, style, SLIP[style])))
    rows = [tokenizer(problem + response)["input_ids"] + [tokenizer.eos_token_id]
            for problem, response in texts]
    ids = torch.zeros(BATCH, max(map(len, rows)), dtype=torch.long)                 # (B,T)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        problem, _ = texts[i]
        start = len(tokenizer(problem)["input_ids"])
        ids[i, :len(row)] = torch.tensor(row)
        labels[i, start:len(row)] = torch.tensor(row[start:])
    return ids, labels


if __name__ == "__main__":
    main(*sys.argv[1:])
