r"""Prompts, templates and demonstrations: everything between a file and a list of token ids.

    examples = load_examples("train.parquet")       # rows of files -> problems, answers, demonstrations
    examples = load_examples("tiny:train")          # the same of the built-in task, tiny/task.py
    prompts = tokenize(examples, tokenizer, "paper", 1024, 8192)    # templates, EOS, length limits
    order = Order(len(prompts), seed=0)             # which prompt comes next; its state is one integer
    indices = order.take(128)                       # the prompts of one step

A demonstration is what the paper calls an element of D_demo: a problem x with a response y of a stronger
model (DeepSeek-R1 there). Nothing here touches a model; `tokenizer` is any Hugging Face tokenizer.
"""
import hashlib
import json
import math
import re
from array import array
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from support.readers import READERS, data_files, read_and_left
from support.tokens import encode_text, reserved_tokens, split_at_reserved

# ----------------------------------------------------------------------------------------------------------
# Templates: the text around a question. {question} is replaced literally, so braces in a problem are safe.

SYSTEM = (                                                       # the words of Fig. A3
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
        # add_generation_prompt: the text ends where the assistant's turn begins, so the model answers.
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:                     # of jinja, or whatever the template raises
            raise ValueError(f"--template tokenizer: this chat template fails ({type(error).__name__}: "
                             f"{error}); use another --template") from error
        if question.strip() not in text:
            raise ValueError("--template tokenizer: this chat template's prompt does not hold the problem as "
                             "it stands; use another --template")
        return text
    # Not str.format: a LaTeX problem is full of braces, and SYSTEM itself has some.
    return TEMPLATES[template].replace("{question}", question)


# ----------------------------------------------------------------------------------------------------------
# Examples, and what a row says.

@dataclass
class Example:
    """One problem x with its ground truth and, where there is one, its demonstration y (text)."""
    id: str
    problem: str
    answer: str
    demo: str | None = None


def parse_row(row):
    r"""A row of either schema -> Example, its id empty if the row has none.

    Openr1-Math-46k-8192 (Sec. 5.1): chats in `prompt` and `target`, the answer in `reward_model`. The
    system turn of `prompt` is not read: the template of `tokenize` takes its place. `target` may be None.

    >>> question = [{"role": "system", "content": "Your task is ..."}, {"role": "user", "content": "2+2=?"}]
    >>> response = [{"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\\boxed{4}"}]
    >>> parse_row({"prompt": question, "target": response, "reward_model": {"ground_truth": "4"},
    ...            "extra_info": {"index": 17}})
    Example(id='17', problem='2+2=?', answer='4', demo='<think>\n2+2=4\n</think>\n\\boxed{4}')

    Plain: `problem` or `question`, `answer`; `id` and `solution`, the demonstration, may be absent.

    >>> parse_row({"id": "sums/1", "problem": "2+2=?", "answer": 4, "solution": "\\boxed{4}"})
    Example(id='sums/1', problem='2+2=?', answer='4', demo='\\boxed{4}')

    Raises ValueError with what was expected and found. Where reading the row has failed already, its reader
    gives the error in its place: that is raised.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named columns, found {str(row)[:80]!r}")
    # Plain. (A plain file may have a column "prompt" of its own; a chat in it marks the other schema.)
    if "reward_model" not in row and not isinstance(row.get("prompt"), (list, tuple)):
        return Example(id=_text(row, "id", required=False) or "", problem=_text(row, "problem", "question"),
                       answer=_text(row, "answer"), demo=_text(row, "solution", required=False))
    # Openr1-Math-46k-8192.
    truth = row.get("reward_model")
    if not isinstance(truth, dict):
        raise ValueError(f"expected 'reward_model' to hold ground_truth, found {str(truth)[:80]!r}")
    info = row.get("extra_info")
    if not isinstance(info, dict):
        info = {}
    example = Example(id=_text(info, "index", required=False) or "", problem=_message(row, "prompt", "user"),
                      answer=_text(truth, "ground_truth"))
    if row.get("target") is not None:
        example.demo = _message(row, "target")
    return example


def _text(row, *names, required=True):
    """The first of the columns `names` that the row has, as text; None without any, if not required.

    Finite numbers are accepted, since answers often are: 4 -> "4". ValueError: no text there.
    """
    found = {name: row[name] for name in names if row.get(name) is not None}
    for column, value in found.items():
        if isinstance(value, str) and value.strip():
            return check_characters(value, column)
        # To Python, True is an int; and nan, which is no answer, a float.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            # 1e-07 would have an e in it, which a grader may read as Euler's number.
            return np.format_float_positional(value, trim="0") if isinstance(value, float) else repr(value)
    if not required and all(value == "" for value in found.values()):
        return None
    columns = " or ".join(map(repr, names))
    raise ValueError(f"expected text in column {columns}, found {str(found or 'no such column')[:80]}")


def _message(row, column, role=None):
    """The content of the last message (of that role) in a chat column [{role, content}, ...]."""
    turns = row.get(column)
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"expected {column!r} to be a list of {{role, content}}, "
                         f"found {str(turns)[:80]!r}")
    texts = [turn.get("content") for turn in turns if role is None or turn.get("role") == role]
    if not texts or not isinstance(texts[-1], str) or not texts[-1].strip():
        raise ValueError(f"expected a non-empty {role or ''} message in {column!r}, "
                         f"found {str(turns)[:80]!r}")
    return check_characters(texts[-1], column)


def check_characters(text, column):
    """The text itself. Raises ValueError if it holds half a character (a lone surrogate), which JSON can
    spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text in column {column!r}, found half a character (the lone surrogate "
                         f"{text[error.start]!r}, at place {error.start})") from error
    return text


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
    examples, ids, bad = [], set(), []
    seen = set()
    files = data_files(path)
    if path.is_dir():
        log(f"{path}: {read_and_left(path, files)}")
    for file in files:
        name = file.relative_to(path) if path.is_dir() else file.name
        for number, row in READERS[file.suffix](file):
            try:
                example = parse_row(row)
            except ValueError as error:
                bad.append(f"{file}, row {number}: {error}")
                if not skip_bad_rows:
                    raise ValueError(f"{bad[0]} (--skip_bad_rows skips and counts)") from error
                continue
            # Ids must differ: samples.jsonl names examples by them. Some public copies carry index -1 in
            # every row.
            if not example.id or example.id in ids:
                example.id = f"{name}/{number}"
            while example.id in ids:               # another row spells it out
                example.id += "+"
            ids.add(example.id)
            examples.append(example)
            seen.add(hash((example.problem, example.answer, example.demo)))
    if bad:
        log(f"{path}: skipped {len(bad)} bad rows, {len(examples)} remain; the first: {bad[0]}")
    if len(seen) < len(examples):
        log(f"{path}: {len(examples) - len(seen)} of {len(examples)} rows repeat an earlier one, with the "
            "same problem, answer and demonstration; they are kept")
    if not examples:
        raise ValueError(f"{path}: no usable row among {len(bad)} (expected problem/answer/solution columns, "
                         "or prompt/target/reward_model)")
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
    r"""Examples -> Prompts, within limits: in the paper's run prompts to 1,024 tokens,
    responses to 8,192 (Sec. 5.1).

    >>> from tiny.task import make_tokenizer      # a token for each character and mark; EOS is token 0
    >>> example = Example(id="a", problem="1+1=?\n", answer="2", demo="\\boxed{2}")
    >>> [prompt] = tokenize([example], make_tokenizer(), "none", max_prompt_tokens=6, max_response_tokens=4)
    >>> prompt.ids, prompt.demo
    ([12, 9, 12, 7, 8, 6], [4, 13, 5, 0])

    The EOS is the fourth token of the response: with max_response_tokens=3 this example would be dropped.
    What is over a limit is dropped and counted (public code cuts it, and the EOS with it, in silence).
    Raises ValueError if the tokenizer has no EOS, or no example is left.
    """
    if tokenizer.eos_token_id is None or not tokenizer.eos_token:
        raise ValueError("this tokenizer has no eos_token, so a response could never end; "
                         "set one in its config")
    prompts, long_prompt, long_demo = [], 0, 0
    reserved = reserved_tokens(tokenizer)
    for example in examples:
        text = render(template, example.problem, tokenizer)
        ids = _prompt_ids(example, text, tokenizer, template, reserved)
        demo = None
        if example.demo is not None:
            demo = _demo_ids(example.demo, text, tokenizer, reserved)
        if not 0 < len(ids) <= max_prompt_tokens:
            long_prompt += 1
        elif demo and not 1 < len(demo) <= max_response_tokens:        # 1: EOS alone
            long_demo += 1
        else:
            prompts.append(Prompt(example, ids, demo))
    if long_prompt or long_demo:
        log(f"dropped {long_prompt} examples with a prompt over {max_prompt_tokens} tokens (or empty) and "
            f"{long_demo} with a demonstration over {max_response_tokens} (or empty); {len(prompts)} remain")
    if not prompts:
        raise ValueError(f"no example fits --max_prompt_tokens {max_prompt_tokens} and "
                         f"--max_response_tokens {max_response_tokens}; "
                         "raise them, or use a shorter --template")
    if tokenizer.unk_token_id not in (None, *reserved):
        unknown = sum(tokenizer.unk_token_id in prompt.ids + (prompt.demo or []) for prompt in prompts)
        if unknown:
            log(f"{unknown} of {len(prompts)} examples hold text that this tokenizer does not know, and "
                f"reads as {tokenizer.unk_token}")
    return prompts


def _prompt_ids(example, text, tokenizer, template, reserved):
    """The tokens of a prompt's text, from BOS (where the tokenizer has one) to where the response begins."""
    if template not in ("tokenizer", "qwen-math"):
        ids = encode_text(text, tokenizer, reserved, add_special_tokens=True)
    # These two templates spell out their special tokens, BOS too; the problem's text must not become any.
    elif any(token in example.problem for token in reserved.values()):
        ids = _prompt_ids_in_parts(example, text, tokenizer, template, reserved)
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # A few tokenizers close every text with EOS; a prompt is not over yet.
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def _prompt_ids_in_parts(example, text, tokenizer, template, reserved):
    """The tokens of a prompt in which the template's special tokens are special, and the problem is text."""
    place = "\ue000"                               # stands for the problem; a character that no text has
    before, _, after = render(template, place, tokenizer).partition(place)
    if not (text.startswith(before) and text.endswith(after)):
        raise ValueError(f"example {example.id}: its problem holds special tokens as text, and this chat "
                         "template does more than insert it; leave it out, or use another --template")
    problem = text[len(before):len(text) - len(after)]         # not example.problem: many templates strip it
    head, middle, tail = split_at_reserved(before, problem, after, reserved)
    return (tokenizer(head, add_special_tokens=False)["input_ids"]
            + encode_text(middle, tokenizer, reserved)
            + tokenizer(tail, add_special_tokens=False)["input_ids"])


def _demo_ids(response, prompt_text, tokenizer, reserved):
    """A demonstration's tokens as a response to this prompt, EOS at the end exactly once."""
    # "luffy" and some chat templates open the thought: the demonstration must not open it a second time.
    opened = re.search(r"<think>(\s*)$", prompt_text)
    if opened and response.lstrip().startswith("<think>"):
        response = response.lstrip().removeprefix("<think>").removeprefix(opened[1])
    while response.rstrip().endswith(tokenizer.eos_token):                # the text may spell EOS out
        response = response.rstrip().removesuffix(tokenizer.eos_token)
    # What a sampled response ends with, too: EOS is a response token, in the loss and in every length.
    return encode_text(response, tokenizer, reserved) + [tokenizer.eos_token_id]


def check_vocabulary(prompts, tokenizer, rows):
    """Raise ValueError if a token of the prompts has no row in the model's embedding, which has `rows`."""
    if max(tokenizer.get_vocab().values()) < rows:         # Qwen's embeddings have hundreds to spare
        return
    for prompt in prompts:
        largest = max([*prompt.ids, *(prompt.demo or []), tokenizer.eos_token_id])
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(f"example {prompt.example.id} needs token {largest} ({token!r}), but the "
                             f"model's embedding has {rows} rows: its folder holds another model's "
                             "tokenizer, or one with tokens added and the embedding not resized")


# ----------------------------------------------------------------------------------------------------------
# Which example comes next.

class Order:
    """An endless, deterministic order over n examples: epoch e is the permutation drawn from (seed, e).

    Its state is the one integer `position`, the number of examples handed out so far, which a checkpoint
    carries: resuming neither skips nor repeats an example.
    """

    def __init__(self, n, seed, position=0):
        self.n, self.seed, self.position = n, seed, position

    def take(self, k):
        """The next k indices, crossing into the next epoch where needed."""
        taken = []
        for position in range(self.position, self.position + k):
            epoch, place = divmod(position, self.n)
            if not taken or place == 0:           # the first of this call, or of an epoch
                permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            taken.append(int(permutation[place]))
        self.position += k
        return taken


# ----------------------------------------------------------------------------------------------------------
# Which data these are.

def digest(prompts):
    """SHA-256 of what a run uses of its data: problems, answers and demonstrations, as text and as tokens, in
    their order. Ids are left out: they may hold a file's name, and files move."""
    content = hashlib.sha256()
    for prompt in prompts:
        example = prompt.example
        texts = [example.problem, example.answer, example.demo, len(prompt.ids)]
        content.update(json.dumps(texts).encode())
        content.update(array("i", prompt.ids + (prompt.demo or [])).tobytes())
    return content.hexdigest()


def demo_key(example):
    """What the reward of a demonstration is remembered by: its text, the answer and the code that graded it,
    so that a mended one is graded anew."""
    texts = [example.demo, example.answer, grader_digest()]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


@cache
def grader_digest():
    """SHA-256 of the code whose verdicts rewards are, as hexadecimal text."""
    content, here = hashlib.sha256(), Path(__file__).parent
    for file in [here / "reward.py", *sorted((here / "grading").glob("*.py"))]:
        content.update(file.read_bytes())
    return content.hexdigest()
