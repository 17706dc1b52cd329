"""A reward of the user's own: a function in a file of theirs, `--reward FILE.py:FUNCTION`.

    def exact(response, answer, example):
        return response.strip() == answer

    reward = read("mine.py:exact")          # in the parent: the text of the file, once for the whole run
    own = load(reward)                      # in a worker, which then forks a child for each response
    own(item)                               # in the child: ("ok", "", []), or "wrong", or "reward_error"

The file is code of the user's, and trusted: it is loaded before the fence (fence.py) is put up, and may then
import and read what it likes. The function is called behind the fence, since the response that it reads is a
model's: it may compute, and nothing else. What it prints is dropped.
"""
import functools
import hashlib
import inspect
import io
import numbers
import os
import sys
import types
from dataclasses import dataclass

from grading.answers import KINDS

# Beside the function's name, in the summaries of eval.py.
TAKEN = ("problems", "samples", "truncated", "response_len")


@dataclass(frozen=True)
class Reward:
    """FILE.py:FUNCTION, the file as it was when it was read: workers that start days later load the same."""
    path: str
    name: str
    source: bytes

    @property
    def digest(self):
        """SHA-256 of the file and the function's name. What the file imports is not in it."""
        return hashlib.sha256(self.name.encode() + b"\0" + self.source).hexdigest()


def function_name(spec):
    """FUNCTION of "FILE.py:FUNCTION". ValueError if that is not what it says."""
    path, _, name = spec.rpartition(":")
    if not path or not name.isidentifier():
        raise ValueError(f"--reward {spec}: expected FILE.py:FUNCTION")
    if name in (*KINDS, *TAKEN):
        raise ValueError(f"--reward {spec}: {name} is the name of a verifier, or of a figure of eval.py; "
                         "give the function another one")
    return name


def read(spec):
    """"FILE.py:FUNCTION" -> Reward. ValueError: there is no such file, or it is no Python."""
    name = function_name(spec)
    path = os.path.abspath(spec.rpartition(":")[0])
    try:
        with open(path, "rb") as file:
            source = file.read()
        compile(source, path, "exec")
    except (OSError, SyntaxError, ValueError) as error:         # the last: a zero byte
        raise ValueError(f"--reward {spec}: {in_words(error, path)}") from None
    return Reward(path, name, source)


def load(reward):
    """The function, as `judge` of an item. ValueError, with the line, if the file fails, or has no function
    that takes a response, an answer and an example."""
    # As for a script: what lies beside the file can be imported.
    sys.path.insert(0, os.path.dirname(reward.path))
    module = types.ModuleType("reward_of_the_user")
    module.__file__ = reward.path
    sys.modules[module.__name__] = module                       # dataclasses look for their module there
    try:
        exec(compile(reward.source, reward.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{reward.path}: {in_words(error, reward.path)}") from None
    function = getattr(module, reward.name, None)
    if not callable(function):
        found = [name for name, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise ValueError(f"{reward.path}: has no function {reward.name}, but {', '.join(found) or 'none'}")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        raise ValueError(f"{reward.path}: {reward.name}(response, answer, example): {error}") from None
    return functools.partial(judge, function, reward.path)


def judge(function, path, item):
    """Call it on an item -> (reason, "", trace), as answers.judge: "ok", "wrong", or "reward_error" where it
    raises, or returns anything but a truth value. The trace then says what, and in which line."""
    sys.stdout = sys.stderr = io.StringIO()                     # the fence lets nothing be written
    try:
        right = truth(function(item["response"], item["answer"], item["example"]))
        return "ok" if right else "wrong", "", []
    except (Exception, SystemExit) as error:
        return "reward_error", "", [in_words(error, path)]


def truth(value):
    """True or False, also where they are numpy's, or the numbers 1 and 0. TypeError for all else: Eq. A2
    knows no half-right answer."""
    if isinstance(value, numbers.Real) and value in (0, 1):     # Python's bool is a number, numpy's is not
        return bool(value)
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"returned {str(value)[:80]!r} ({type(value).__name__}), and not True or False")


def in_words(error, path):
    """What an error says, and in which line of the file `path` it arose."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename == path:
            line = place.tb_lineno
        place = place.tb_next
    try:
        text = str(getattr(error, "msg", error)) if isinstance(error, SyntaxError) else str(error)
    except Exception:                                           # the error has a __str__ of the user's, too
        text = "has no words"
    return f"{type(error).__name__}: {text}" + (f" (line {line})" if line else "")


def about(example):
    """What the function is told of a problem. example: like data.Example."""
    return {"id": example.id, "problem": example.problem, "answer": example.answer}
