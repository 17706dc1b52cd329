"""Make the base model of the tiny task: pretrain a 0.8M-parameter Llama on a mixture of ways to respond.

    python tiny/make.py                          # about 25 minutes on one core; the result is shipped beside this file
    python tiny/make.py experiments/qwen3 qwen3  # the same of another family, shipped for experiments/tiny_paper.py

The mixture makes a base model in the paper's sense: it knows the arithmetic and has seen careful reasoning, but its habit
is to blurt out a guess, and its reasoning slips. Phase 1 teaches arithmetic, phase 2 the habits.
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
SLIP = {"guess": 0.0, "plain": 0.12, "careful": 0.06}             # chance that a line of reasoning goes wrong
MIXTURE = ((0.75, (0.10, 0.50, 0.40)), (1.0, (0.75, 0.17, 0.08)))  # until this share of the steps: guess, plain, careful


def main(folder=Path(__file__).resolve().parent, family="llama"):
    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), make_tokenizer()
    # Not qwen2: transformers imposes that family's own tokenizer class on every folder with a qwen2 config.
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(range(STEPS))
    for step in bar:
        mixture = next(m for until, m in MIXTURE if step < until * STEPS)
        n, texts = rng.choice((2, 3, 3, 4, 4, 5, 6, 7, 8)), []
        for style in rng.choices(tuple(SLIP), mixture, k=BATCH):
            terms = draw_terms(rng, n)
            texts.append((write_problem(terms), write_response(terms, rng, style, SLIP[style])))
        rows = [tokenizer(p + r)["input_ids"] + [tokenizer.eos_token_id] for p, r in texts]
        ids = torch.zeros(BATCH, max(map(len, rows)), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (row, (problem, _)) in enumerate(zip(rows, texts)):
            start = len(tokenizer(problem)["input_ids"])
            ids[i, :len(row)], labels[i, start:len(row)] = torch.tensor(row), torch.tensor(row[start:])
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / 100) * decay
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
