r"""The tiny task: sums and differences of two-digit numbers, reasoned out line by line.

    >>> row = rows("train")[0]
    >>> row["problem"], row["answer"]
    ('73+33+64=?\n', '170')
    >>> print(row["solution"])
    <think>
    73+30=103
    103+3=106
    106+60=166
    166+4=170
    </think>
    \boxed{170}

It mirrors the paper's setting at a laptop's size. The base model (tiny/make.py) has seen three ways to
respond: blurting out a guess (its habit), adding term by term with slips, and, rarely, the careful way of the
demonstrations, which splits tens from units. Demonstrations are few (256) and imperfect (18 % end in a wrong
answer). A guess is right about once in fifty times. "long" asks for more terms than any training problem has.
"""
import random
import re

# Split: (problems, numbers of terms to choose from, seed). Only "train" has demonstrations.
SPLITS = {
    "train": (256, (3, 4, 5), 1),
    "heldout": (200, (3, 4, 5), 2),
    "long": (200, (7, 8), 3),             # stands where the paper has out-of-distribution benchmarks
    "valid": (200, (3, 4, 5), 4),         # for tuning: experiments/tiny_paper.py
}
# The vocabulary; a token's id is its place.
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
    others = [f"{term:+d}" for term in terms[1:]]
    return str(terms[0]) + "".join(others) + "=?\n"


def write_response(terms, rng, style, slip=0.0):
    r"""A response in one of the three styles; each line of a reasoned one slips with probability `slip`.

    careful [47, 35]: '<think>\n47+30=77\n77+5=82\n</think>\n\\boxed{82}';   plain: one line '47+35=82';
    guess: no thought, a box with a number near the answer. A slip is carried on, as it is by hand: the next
    line starts from the wrong result.
    """
    if style == "guess":
        return f"\\boxed{{{sum(terms) + round(rng.gauss(0, 20))}}}"
    value, lines = terms[0], []
    for term in terms[1:]:
        parts = [term]
        if style == "careful":
            tens = int(term / 10) * 10                                # rounds towards zero: -35 -> -30
            parts = [part for part in (tens, term - tens) if part]
        for part in parts:
            result = value + part
            if rng.random() < slip:
                result += rng.choice((-10, -1, 1, 10))
            lines.append(f"{value}{part:+d}={result}\n")
            value = result
    return "<think>\n" + "".join(lines) + f"</think>\n\\boxed{{{value}}}"


def rows(split):
    """The rows of one split of SPLITS, as a JSONL file would hold them: dicts with id, problem, answer and,
    in "train", solution. The same at every call. Raises ValueError for an unknown split.

    "few": the first 32 of "train", for runs of seconds, since a run first checks all reference answers.
    """
    if split == "few":
        return rows("train")[:32]
    if split not in SPLITS:
        raise ValueError(f"unknown split tiny:{split}: choose one of {', '.join(SPLITS)}, few")
    seen = set()
    # From the first split on, whichever is asked for: none repeats a problem of those before it.
    for name, (count, lengths, seed) in SPLITS.items():
        rng, found = random.Random(seed), []
        while len(found) < count:
            terms = draw_terms(rng, rng.choice(lengths))
            problem = write_problem(terms)
            if problem in seen:
                continue
            seen.add(problem)
            row = {"id": f"tiny/{name}/{len(found)}", "problem": problem, "answer": str(sum(terms))}
            if name == "train":
                row["solution"] = write_response(terms, rng, "careful", slip=0.03)
            found.append(row)
        if name == split:
            return found


def make_tokenizer():
    """A character-level Hugging Face tokenizer for the tiny task (marks such as <think> are one token)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    ids = {token: place for place, token in enumerate(TOKENS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    # First the marks, then any other character alone; "." of a regular expression does not match a newline.
    marks = [re.escape(token) for token in TOKENS if len(token) > 1]
    pieces = "|".join([*marks, ".", "\n"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    core.decoder = decoders.Fuse()        # tokens follow each other without blanks between them
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
