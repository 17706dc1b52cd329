"""The tiny task: sums and differences of two-digit numbers, reasoned out line by line.

It mirrors the paper's setting at a laptop's size. The base model (tiny/make.py) has seen three ways to respond:
blurting out a guess (its habit), adding term by term with slips, and, rarely, the careful way of the
demonstrations, which splits tens from units. Demonstrations are few (256) and imperfect (18 % end in a wrong
answer). A guess is right about once in fifty times. "long" asks for more terms than any training problem has.
"""
import random
import re

SPLITS = {"train": (256, (3, 4, 5), 1), "heldout": (200, (3, 4, 5), 2), "long": (200, (7, 8), 3),
               "valid": (200, (3, 4, 5), 4)}
TOKENS = ["<eos>", "<unk>", "<think>", "</think>", "\\boxed{", "}", "\n", "=", "?", "+", "-",
               *"0123456789"]


def draw_terms(rng, n):
    """n signed terms whose running sum stays within 0..199, e.g. [47, 35, -60]."""
    terms = [rng.randint(1, 99)]
    while len(terms) < n:
        term = rng.choice((1, -1)) * rng.randint(1, 99)
        if 0 <= sum(terms) + term <= 199:
            terms.append(term)
    return terms


def write_problem(terms):
    """[47, 35, -60] -> '47+35-60=?' and a newline."""
    return str(terms[0]) + "".join(f"{t:+d}" for t in terms[1:]) + "=?\n"


def write_response(terms, rng, style, slip=0.0):
    """A response in one of the three styles; each line of a reasoned one slips with probability `slip`.

    careful [47, 35]: '<think>\\n47+30=77\\n77+5=82\\n</think>\\n\\boxed{82}';   plain: one line '47+35=82';
    guess: no thought, a box with a number near the answer.
    """
    if style == "guess":
        return f"\\boxed{{{sum(terms) + round(rng.gauss(0, 20))}}}"
    value, lines = terms[0], []
    for term in terms[1:]:
        tens = int(term / 10) * 10                                # rounds towards zero: -35 -> -30
        for part in [p for p in (tens, term - tens) if p] if style == "careful" else [term]:
            result = value + part + (rng.choice((-10, -1, 1, 10)) if rng.random() < slip else 0)
            lines.append(f"{value}{part:+d}={result}\n")
            value = result
    return "<think>\n" + "".join(lines) + f"</think>\n\\boxed{{{value}}}"


def rows(split):
    """The built-in task's examples: "train" (with demonstrations), "heldout" and "valid" (as long), "long"
    (longer)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split tiny:{split}: choose one of {', '.join(SPLITS)}")
    seen, examples = set(), []
    for name, (count, lengths, seed) in SPLITS.items():  # in order, so that no split repeats another's
        rng, examples = random.Random(seed), []
        while len(examples) < count:
            terms = draw_terms(rng, rng.choice(lengths))
            if (problem := write_problem(terms)) in seen:
                continue
            seen.add(problem)
            row = {"id": f"tiny/{name}/{len(examples)}", "problem": problem, "answer": str(sum(terms))}
            if name == "train":
                row["solution"] = write_response(terms, rng, "careful", slip=0.03)
            examples.append(row)
        if name == split:
            return examples


def make_tokenizer():
    """A character-level Hugging Face tokenizer for the tiny task (marks such as <think> are one token)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="<unk>"))
    pieces = "|".join(re.escape(t) for t in TOKENS if len(t) > 1) + "|.|\n"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
