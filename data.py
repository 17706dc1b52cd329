"""Prompts, templates and demonstrations: everything between a file and a list of token ids.

    load_examples("train.parquet")    the schema of Openr1-Math-46k-8192 (Sec. 5.1), or plain
                                      problem/answer/solution
    tokenize(examples, ...)           Fig. A3 / A4 templates, demonstration tokens with EOS, length limits
    Order(n, seed)                    which example comes next; its whole state is one integer
    tiny_examples("train")            a built-in reasoning task that a laptop learns in minutes

A demonstration is what the paper calls an element of D_demo: a problem x with a response y of a stronger
model (DeepSeek-R1 there). Nothing here touches a model; `tokenizer` is any Hugging Face tokenizer.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# ----------------------------------------------------------------------------------------------------------
# Templates. {question} is replaced literally, so braces in a problem are safe.

SYSTEM = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. "
    "This involves analyzing, summarizing, exploring, reassessing, and refining your thought process "
    "through multiple iterations. Structure your response into two sections: Thought and Solution. In the "
    'Thought section, present your reasoning using the format: "<think>\\n {thoughts}</think>\\n". Each '
    "thought should include detailed analysis, brainstorming, verification, and refinement of ideas. "
    'After "</think>\\n" in the Solution section, provide the final, logical, and accurate answer, '
    "clearly derived from the exploration in the Thought section. If applicable, include the Answer in "
    "\\boxed{ } for closed-form results like multiple choices or mathematical solutions."
)
TEMPLATES = {
    "paper": SYSTEM + "\n\nQuestion: {question}\n\nAnswer: ",                                # Fig. A3
    "qwen-math": "<|im_start|>system\nPlease reason step by step, and put your final answer within "
                 "\\boxed{}.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
                 "<|im_start|>assistant\n",                                                  # Fig. A4
    "none": "{question}",                                                                    # Table A1
    "luffy": SYSTEM + "\n\nUser: This is the problem:\n{question}\n\nAssistant: <think>\n",  # opens thought
    "tokenizer": None,                    # the model's own chat template, the question as the user's turn
}


def render(template, question, tokenizer=None):
    """The prompt's text. `template`: a key of TEMPLATES. Raises ValueError for an unknown one.

    >>> render("none", "1+1=?")
    '1+1=?'
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}")
    if template == "tokenizer":
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("--template tokenizer: this tokenizer has no chat template; "
                             "use --template paper")
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return TEMPLATES[template].replace("{question}", question)


# ----------------------------------------------------------------------------------------------------------
# Examples and their readers.

@dataclass
class Example:
    """One problem x with its ground truth and, where there is one, its demonstration y (text)."""
    id: str
    problem: str
    answer: str
    demo: str | None = None


def _text(row, *names, required=True):
    """The first of the columns `names` that the row has, as text. Finite numbers are accepted
    (answers often are)."""
    found = {name: row[name] for name in names if row.get(name) is not None}
    for value in found.values():
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return repr(value)
    if required or any(value != "" for value in found.values()):
        raise ValueError(f"expected text in column {' or '.join(map(repr, names))}, "
                         f"found {str(found)[:80] if found else 'no such column'}")


def _message(row, column, role=None):
    """The content of the last message (of that role) in a chat column [{role, content}, ...]."""
    turns = row.get(column)
    if not isinstance(turns, (list, tuple)) or not all(isinstance(t, dict) for t in turns):
        raise ValueError(f"expected {column!r} to be a list of {{role, content}}, "
                         f"found {str(turns)[:80]!r}")
    texts = [t.get("content") for t in turns if role is None or t.get("role") == role]
    if not texts or not isinstance(texts[-1], str) or not texts[-1].strip():
        raise ValueError(f"expected a non-empty {role or ''} message in {column!r}, "
                         f"found {str(turns)[:80]!r}")
    return texts[-1]


def parse_row(row):
    """A row of either schema -> Example, its id empty if the row has none. Raises ValueError
    with what was expected.

    Openr1-Math-46k-8192: `prompt` [{role, content}], `target` [{role, content}],
        `reward_model` {ground_truth}.
    Plain: `problem` or `question`, `answer`, and optionally `solution` (the demonstration) and `id`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named columns, found {str(row)[:80]!r}")
    if "reward_model" in row or isinstance(row.get("prompt"), (list, tuple)):
        truth = row.get("reward_model")
        if not isinstance(truth, dict):
            raise ValueError(f"expected 'reward_model' to hold ground_truth, found {str(truth)[:80]!r}")
        info = row.get("extra_info") if isinstance(row.get("extra_info"), dict) else {}
        return Example(id=_text(info, "index", required=False) or "",
                       problem=_message(row, "prompt", "user"), answer=_text(truth, "ground_truth"),
                       demo=_message(row, "target") if row.get("target") is not None else None)
    return Example(id=_text(row, "id", required=False) or "", problem=_text(row, "problem", "question"),
                   answer=_text(row, "answer"), demo=_text(row, "solution", required=False))


def read_rows(file):
    """(row number counted from 1, row or the ValueError that reading it raised) of one file."""
    if file.suffix == ".parquet":
        import pyarrow                        # the paper's data set comes as parquet; only needed for it
        import pyarrow.parquet as pq
        try:
            number = 0
            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches(1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file}: not a readable parquet file ({error}); download it again") from error
        return
    # Bytes, not text: a stray byte then spoils its own row only, and the row number stays right.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:      # bad JSON and bad UTF-8 are ValueErrors
                yield number, ValueError(f"expected one JSON object on the line: {error}")


def load_examples(path, skip_bad_rows=False, log=print):
    """Read a parquet or JSONL file, or every such file in a directory (sorted), into Examples.

    Also takes the names "tiny:train", "tiny:heldout", "tiny:long" and "tiny:valid" of the built-in task.
    Raises FileNotFoundError, or ValueError naming the file and row of the first bad row and what
    was expected there; with `skip_bad_rows` such rows are counted and logged instead. At least
    one example must remain.
    """
    if str(path).startswith("tiny:"):
        from tiny.task import rows
        return [parse_row(row) for row in rows(str(path).removeprefix("tiny:"))]
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; --data takes a parquet or JSONL file, "
                                "or a folder")
    files = (sorted(f for f in path.rglob("*") if f.suffix in (".parquet", ".jsonl"))
             if path.is_dir() else [path])
    if not files or files[0].suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{path}: expected .parquet or .jsonl, "
                         f"found {path.suffix or 'no such file inside'}")
    examples, seen, bad, first_bad = [], set(), 0, None
    for file in files:
        for number, row in read_rows(file):
            try:
                if isinstance(row, ValueError):
                    raise row
                example = parse_row(row)
                if not example.id or example.id in seen:  # some public copies carry index -1 in every row
                    example.id = f"{file.relative_to(path) if path.is_dir() else file.name}/{number}"
                seen.add(example.id)
                examples.append(example)
            except ValueError as error:
                bad += 1
                first_bad = first_bad or f"{file}, row {number}: {error}"
                if not skip_bad_rows:
                    raise ValueError(f"{file}, row {number}: {error} "
                                     "(--skip_bad_rows skips and counts)") from error
    if bad:
        log(f"{path}: skipped {bad} bad rows, {len(examples)} remain; the first: {first_bad}")
    if not examples:
        raise ValueError(f"{path}: no usable row among {bad} (expected problem/answer/solution columns, or "
                         "prompt/target/reward_model)")
    return examples


# ----------------------------------------------------------------------------------------------------------
# From text to tokens.

@dataclass
class Prompt:
    """An Example as tokens. `demo` holds the response's tokens with EOS, or None."""
    example: Example
    ids: list[int]
    demo: list[int] | None


def tokenize(examples, tokenizer, template, max_prompt_tokens, max_response_tokens, log=print):
    """Examples -> Prompts, within the limits of Sec. 5.1 and App. B (prompts to 1,024,
    responses to 8,192 tokens).

    The demonstration is tokenized as the response that follows this template: where the prompt already
    opens the thought ("luffy"), the demonstration's own leading "<think>\\n" is taken off. Its EOS counts
    towards the limit. Examples over a limit are dropped and counted (public code cuts them, and the EOS
    with them, in silence).
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no eos_token, so a response could never end; "
                         "set one in its config")
    prompts, long_prompt, long_demo = [], 0, 0
    for example in examples:
        text = render(template, example.problem, tokenizer)
        # A chat template writes its own special tokens; plain templates let the
        # tokenizer add its BOS, if any.
        ids = tokenizer(text, add_special_tokens=template not in ("tokenizer", "qwen-math"))["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:      # a few tokenizers close every text with EOS
            ids = ids[:-1]
        demo = None
        if example.demo is not None:
            response = example.demo
            if text.endswith("<think>\n"):
                response = response.removeprefix("<think>\n")
            demo = tokenizer(response, add_special_tokens=False)["input_ids"]
            while demo and demo[-1] == tokenizer.eos_token_id:
                demo.pop()                         # the text may spell EOS out; it must come exactly once
            demo.append(tokenizer.eos_token_id)
        if not 0 < len(ids) <= max_prompt_tokens:
            long_prompt += 1
        elif demo and len(demo) > max_response_tokens:
            long_demo += 1
        else:
            prompts.append(Prompt(example, ids, demo))
    if long_prompt or long_demo:
        log(f"dropped {long_prompt} examples with a prompt over {max_prompt_tokens} tokens (or empty) and "
            f"{long_demo} with a demonstration over {max_response_tokens}; {len(prompts)} remain")
    if not prompts:
        raise ValueError(f"no example fits --max_prompt_tokens {max_prompt_tokens} and "
                         f"--max_response_tokens {max_response_tokens}; "
                         "raise them, or use a shorter --template")
    return prompts


class Order:
    """An endless, deterministic order over n examples: epoch e is the permutation drawn from (seed, e).

    Its state is the one integer `position`, the number of examples handed out so far, which a checkpoint
    carries: resuming neither skips nor repeats an example.
    """

    def __init__(self, n, seed, position=0):
        self.n, self.seed, self.position = n, seed, position

    def take(self, k):
        """The next k indices, crossing into the next epoch where needed."""
        out = []
        for p in range(self.position, self.position + k):
            epoch, i = divmod(p, self.n)
            if not out or i == 0:
                permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            out.append(int(permutation[i]))
        self.position += k
        return out
