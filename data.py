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
import re
from array import array
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from support.inventory import Inventory
from support.layouts import read_row, unread
from support.readers import READERS, data_files, visible_files
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
# Examples: what rows say. Their layouts are in support/layouts.py.

@dataclass
class Example:
    """One problem x with its ground truth and, where there is one, its demonstration y (text)."""
    id: str
    problem: str
    answer: str
    demo: str | None = None


def parse_row(row):
    """A row of any layout that support/layouts.py knows -> Example, its id empty if the row has none."""
    return Example(**read_row(row))


def load_examples(path, skip_bad_rows=False, inventory=None, split="train"):
    """Read a parquet or JSONL file, or such files of a directory (sorted), into Examples.

    Of a directory with several splits one is read: "train", or "validation" (see readers.of_one_split). Also
    takes the names tiny:train, tiny:heldout, tiny:long, tiny:valid and tiny:few of the built-in task. What is
    found is counted in `inventory`, an Inventory. Raises FileNotFoundError, or ValueError naming the file and
    row of the first bad row and what was expected there; with `skip_bad_rows` such rows are counted instead.
    At least one example must remain.
    """
    inventory = inventory or Inventory()
    if str(path).startswith("tiny:"):
        from tiny.task import rows
        name = str(path).removeprefix("tiny:")
        examples = [parse_row(row) for row in rows(name)]
        inventory.rows[name] = len(examples)
        return examples
    path = Path(path)
    examples, ids = [], set()
    files = data_files(path, split=split)
    if path.is_dir():
        inventory.left += [str(file.relative_to(path)) for file in visible_files(path) if file not in files]
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        for number, row in READERS[file.suffix](file):
            try:
                example = parse_row(row)
            except ValueError as error:
                inventory.skip(f"{file}, row {number}: {error}")
                if not skip_bad_rows:
                    raise ValueError(f"{inventory.first_bad} (--skip_bad_rows skips and counts)") from error
                continue
            inventory.count(name, example, unread(row))
            # Ids must differ: samples.jsonl names examples by them. Some public copies carry index -1 in
            # every row.
            if example.id in ids:
                inventory.noted["with an id that came before, and now with another"] += 1
            if not example.id or example.id in ids:
                example.id = f"{name}/{number}"
            while example.id in ids:               # another row spells it out
                example.id += "+"
            ids.add(example.id)
            examples.append(example)
    if not examples:
        raise ValueError(f"{path}: no usable row among {inventory.dropped.total()} (docs/data.md shows what "
                         f"rows look like). {inventory.first_bad}".rstrip())
    return examples


# ----------------------------------------------------------------------------------------------------------
# From text to tokens.

@dataclass
class Prompt:
    """An Example as tokens. `demo` holds the response's tokens with EOS, or None."""
    example: Example
    ids: list[int]
    demo: array | None             # int32: as lists, 46,000 of 2,000 tokens would take 3.5 GB a rank


def tokenize(examples, tokenizer, template, max_prompt_tokens, max_response_tokens, inventory=None):
    r"""Examples -> Prompts, within limits: in the paper's run prompts to 1,024 tokens,
    responses to 8,192 (Sec. 5.1). What is found is counted in `inventory`, an Inventory.

    >>> from tiny.task import make_tokenizer      # a token for each character and mark; EOS is token 0
    >>> example = Example(id="a", problem="1+1=?\n", answer="2", demo="\\boxed{2}")
    >>> [prompt] = tokenize([example], make_tokenizer(), "none", max_prompt_tokens=6, max_response_tokens=4)
    >>> prompt.ids, prompt.demo
    ([12, 9, 12, 7, 8, 6], array('i', [4, 13, 5, 0]))

    The EOS is the fourth token of the response: with max_response_tokens=3 this example would be dropped.
    What is over a limit is dropped and counted (public code cuts it, and the EOS with it, in silence).
    Raises ValueError if the tokenizer has no EOS, or no example is left.
    """
    if tokenizer.eos_token_id is None or not tokenizer.eos_token:
        raise ValueError("this tokenizer has no eos_token, so a response could never end; "
                         "set one in its config")
    inventory = inventory or Inventory()
    prompts, dropped = [], inventory.dropped
    reserved = reserved_tokens(tokenizer)
    for example in examples:
        text = render(template, example.problem, tokenizer)
        ids = _prompt_ids(example, text, tokenizer, template, reserved)
        demo = None
        if example.demo is not None:
            demo = array("i", _demo_ids(example.demo, text, tokenizer, reserved))
        if not 0 < len(ids) <= max_prompt_tokens:
            dropped[f"with a prompt over {max_prompt_tokens:,} tokens (or empty)"] += 1
        elif demo and not 1 < len(demo) <= max_response_tokens:        # 1: EOS alone
            dropped[f"with a demonstration over {max_response_tokens:,} tokens (or empty)"] += 1
        else:
            prompts.append(Prompt(example, ids, demo))
    if not prompts:
        raise ValueError(f"no example fits --max_prompt_tokens {max_prompt_tokens} and "
                         f"--max_response_tokens {max_response_tokens}; "
                         "raise them, or use a shorter --template")
    if tokenizer.unk_token_id not in (None, *reserved):
        for prompt in prompts:
            if tokenizer.unk_token_id in prompt.ids or tokenizer.unk_token_id in (prompt.demo or ()):
                inventory.noted[f"with text that this tokenizer reads as {tokenizer.unk_token}"] += 1
    inventory.used = len(prompts)
    inventory.demonstrations = sum(prompt.demo is not None for prompt in prompts)
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
        largest = max([*prompt.ids, *(prompt.demo or ()), tokenizer.eos_token_id])
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
        content.update(array("i", [*prompt.ids, *(prompt.demo or ())]).tobytes())
    return content.hexdigest()


def demo_key(example):
    """What the reward of a demonstration is remembered by: its text, the answer, the problem (a reward of
    one's own may look at it), and the code that graded it, so that a mended one is graded anew."""
    texts = [example.demo, example.problem, example.answer, grader_digest()]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


@cache
def grader_digest():
    """SHA-256 of the code whose verdicts rewards are, as hexadecimal text."""
    content, here = hashlib.sha256(), Path(__file__).parent
    for file in [here / "reward.py", *sorted((here / "grading").glob("*.py"))]:
        content.update(file.read_bytes())
    return content.hexdigest()
