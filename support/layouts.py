r"""What a row of data says, in the layouts that people bring.

    read_row(row)            # {"id": ..., "problem": ..., "answer": ..., "demo": ...}
    unread(row)              # the columns that look like a demonstration and are not read as one

A column has one of a few names (PROBLEM, ANSWER, DEMO), and four public layouts are known by their columns:
that of Openr1-Math-46k-8192, LUFFY, HPT and DAPO, OpenR1-Math-220k, and GSM8K. docs/data.md shows each.

To copy: this file. It needs numpy.
"""
import math
import re
from functools import cache

import numpy as np

PROBLEM = ("problem", "question", "prompt")
ANSWER = ("answer", "ground_truth", "final_answer")
DEMO = ("solution", "demonstration", "response", "completion", "output")
VERDICTS = ("correctness_math_verify", "correctness_llama")           # of OpenR1-Math-220k's generations
# Words of a column's name by which it may hold demonstrations.
LIKE_A_DEMO = {"solution", "demonstration", "demo", "response", "completion", "output", "target",
               "generation", "message", "conversation", "reasoning", "rationale", "thinking", "thought",
               "trace", "cot", "chosen"}
# DAPO asks for a last line "Answer: ...", which no reward here reads. The problem stands within.
DAPO = re.compile(r"Solve the following math problem step by step\. The last line of your response .*?\n\n"
                  r"(?P<problem>.+)\n\nRemember to put your answer on its own line after .*", re.DOTALL)


def read_row(row):
    r"""A row of any layout -> its id ("" if it has none), problem, answer, and demonstration or None.

    Plain: one column each of PROBLEM, ANSWER and DEMO, the last of which may be absent.

    >>> read_row({"id": "sums/1", "problem": "2+2=?", "answer": 4, "solution": "\\boxed{4}"})
    {'id': 'sums/1', 'problem': '2+2=?', 'answer': '4', 'demo': '\\boxed{4}'}

    GSM8K: the answer is a derivation, which is the demonstration, and what follows ####.

    >>> read_row({"question": "2+2=?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 4"})
    {'id': '', 'problem': '2+2=?', 'answer': '4', 'demo': 'It is 2+2=4.\nThe answer is \\boxed{4}.'}

    OpenR1-Math-220k: the first of `generations` that is verified, not the human `solution`.

    >>> read_row({"uuid": "7", "problem": "2+2=?", "answer": "4", "solution": "Count.",
    ...           "generations": ["\\boxed{5}", "\\boxed{4}"], "correctness_math_verify": [False, True]})
    {'id': '7', 'problem': '2+2=?', 'answer': '4', 'demo': '\\boxed{4}'}

    Openr1-Math-46k-8192 (Sec. 5.1), LUFFY, HPT, DAPO: chats in `prompt` and `target`, the answer in
    `reward_model`. The system turn of `prompt` is not read: --template brings its own.

    >>> question = [{"role": "system", "content": "Your task is ..."}, {"role": "user", "content": "2+2=?"}]
    >>> response = [{"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\\boxed{4}"}]
    >>> read_row({"prompt": question, "target": response, "reward_model": {"ground_truth": "4"},
    ...           "extra_info": {"index": 17}})
    {'id': '17', 'problem': '2+2=?', 'answer': '4', 'demo': '<think>\n2+2=4\n</think>\n\\boxed{4}'}

    Raises ValueError with what was expected and found. Where reading the row has failed already, its reader
    gives the error in its place: that is raised.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named columns, found {str(row)[:80]!r}")
    if _has_chats(row):
        return _read_chats(row)
    answer, demo = _text(row, ANSWER), None
    if row.get("generations") is not None:
        demo = _verified(row)
    else:
        demo = _text(row, DEMO, required=False)
        if "####" in answer:
            answer, worked_out = _of_gsm8k(answer)
            demo = demo or worked_out
    id = _text(row, ("id",), required=False) or _text(row, ("uuid",), required=False) or ""
    return {"id": id, "problem": _text(row, PROBLEM), "answer": answer, "demo": demo}


def _has_chats(row):
    """Is it a row of Openr1-Math-46k-8192's layout? A plain row may have a column `prompt`, too: of text."""
    return "reward_model" in row or isinstance(row.get("prompt"), (list, tuple))


def _read_chats(row):
    truth = row.get("reward_model")
    if not isinstance(truth, dict):
        raise ValueError(f"expected 'reward_model' to hold ground_truth, found {str(truth)[:80]!r}")
    info, demo = row.get("extra_info"), None
    if not isinstance(info, dict):
        info = {}
    if row.get("target") is not None:
        demo = _message(row, "target")
    if isinstance(row.get("prompt"), (list, tuple)):
        problem = _message(row, "prompt", "user")
    else:
        problem = _text(row, PROBLEM)
    framed = DAPO.fullmatch(problem)
    if framed:
        problem = framed["problem"]
    return {"id": _text(info, ("index",), required=False) or "", "problem": problem,
            "answer": _text(truth, ("ground_truth",)), "demo": demo}


def _verified(row):
    """The first of OpenR1's generations that Math-Verify or Llama took for right and that came to its end."""
    generations = _list(row, "generations", "texts")
    if not any(name in row for name in VERDICTS):
        raise ValueError(f"expected {' or '.join(VERDICTS)} beside 'generations', found neither; put the "
                         "demonstration alone into `solution`")
    right = [False] * len(generations)
    for name in VERDICTS:
        for i, verdict in enumerate(_list(row, name, "booleans", len(generations))):
            right[i] = right[i] or verdict is True
    for i, complete in enumerate(_list(row, "is_reasoning_complete", "booleans", len(generations))):
        right[i] = right[i] and complete is not False
    for text, is_right in zip(generations, right):
        if is_right and isinstance(text, str) and text.strip():
            return check_characters(text, "generations")
    return None


def _list(row, column, of, length=None):
    """A column that holds a list, of this length; [] if it is absent."""
    found = row.get(column)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or length not in (None, len(found)):
        many = "" if length is None else f"{length} "
        raise ValueError(f"expected {column!r} to be a list of {many}{of}, found {str(found)[:80]!r}")
    return found


def after_marks(text):
    """What stands before the last ####, and the answer after it, a line, without commas between thousands; as
    GSM8K writes its `answer`."""
    derivation, _, answer = text.rpartition("####")
    answer = answer.strip()
    if not answer or "\n" in answer:                     # the heading of a section, as Markdown has it?
        raise ValueError(f"expected an answer after ####, on its line alone, found {text[-80:]!r}")
    if re.fullmatch(r"[-$]*\d{1,3}(,\d{3})+(\.\d+)?", answer):                       # and not (3,4)
        answer = answer.replace(",", "")
    return derivation, answer


def _of_gsm8k(text):
    """(answer, demonstration or None) of GSM8K's `answer`. A reward reads the last box, so one is added; the
    marks of a calculator, <<2+2=4>>, are no text that a model should learn."""
    derivation, answer = after_marks(text)
    derivation = re.sub(r"<<[^<>]*>>", "", derivation).strip()
    if not derivation:
        return answer, None
    return answer, f"{derivation}\nThe answer is \\boxed{{{answer}}}."


def _text(row, names, required=True):
    """What the one column of `names` that the row has says, as text; None without any, if not required.

    Finite numbers are accepted, since answers often are: 4 -> "4". ValueError: no text there, or two columns
    that differ.
    """
    present = {name: row[name] for name in names if row.get(name) is not None}
    filled = {name: value for name, value in present.items() if value != ""}
    if not filled and not required:
        return None
    texts = {name: _as_text(value, name) for name, value in filled.items()}
    columns = " or ".join(map(repr, names))
    if not texts or None in texts.values():
        raise ValueError(f"expected text in column {columns}, found {str(present or 'no such column')[:80]}")
    if len(set(texts.values())) > 1:
        raise ValueError(f"expected one of the columns {columns}, found {' and '.join(map(repr, texts))}: "
                         "which one counts? Remove or rename the other")
    return next(iter(texts.values()))


def _as_text(value, column):
    """A text or a finite number as text; None for anything else."""
    if isinstance(value, str) and value.strip():
        return check_characters(value, column)
    # To Python, True is an int; and nan, which is no answer, a float. math.isfinite takes no large int.
    if isinstance(value, int) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, float) and math.isfinite(value):
        # 1e-07 would have an e in it, which a grader may read as Euler's number.
        return np.format_float_positional(value, trim="0")
    return None


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


def unread(row):
    """The columns of a row that look like a demonstration, by name and content, and are not read as one.

    >>> unread({"problem": "2+2=?", "answer": "4", "r1_reasoning": "2+2 is ...", "response_len": 12})
    ['r1_reasoning']
    """
    if _has_chats(row):
        read = ("target",)
    elif row.get("generations") is not None:
        read = ("generations",)
    else:
        read = DEMO
    found = []
    for column, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        if first and isinstance(first, (str, dict)) and column not in read and _like_a_demonstration(column):
            found.append(column)
    return found


@cache
def _like_a_demonstration(column):
    words = re.split(r"[^a-z]+", column.lower())
    return any(word in LIKE_A_DEMO or word.removesuffix("s") in LIKE_A_DEMO for word in words)
