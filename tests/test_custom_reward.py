"""grading/custom.py: a reward of the user's own, in the workers, in training and in eval.py.

    pytest tests/test_custom_reward.py
"""
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import config
import eval as E
import srft
from conftest import ROOT, SMALL, metrics, run
from data import Example
from grading import custom
from paper import tables
from reward import Grader
from support.disk import read_json

# A response is a Python expression, and the reward is its value: what a user's function may come to.
ANY = """
import os, socket, sys, time, warnings
import numpy as np

def fail():
    raise KeyError("no such thing")          # line 6

def loop():
    while True:
        pass

class Mute(Exception):
    __str__ = None

def mute():
    raise Mute           # line 16

def again():
    return again()

seen = []

def any(response, answer, example):
    return eval(response, {**globals(), "answer": answer, "example": example})
"""


def write(folder, text=ANY, name="mine.py"):
    (folder / name).write_text(textwrap.dedent(text))
    return folder / name


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    file = write(tmp_path_factory.mktemp("reward"))
    with Grader(workers=1, deadline_s=1.0, reward=f"{file}:any") as shared:
        yield shared


# ----------------------------------------------------------------------------------------------------------
# What a function may return, and do.

@pytest.mark.parametrize("response, reason, says", [
    ("True", "ok", ""), ("False", "wrong", ""), ("1", "ok", ""), ("0", "wrong", ""), ("1.0", "ok", ""),
    ("0.0", "wrong", ""), ("np.bool_(True)", "ok", ""), ("np.bool_(False)", "wrong", ""),
    ("np.int64(1)", "ok", ""), ("np.float32(0)", "wrong", ""),
    ("None", "reward_error", "TypeError: returned 'None' (NoneType), and not True or False"),
    ("0.5", "reward_error", "returned '0.5' (float)"), ("2", "reward_error", "returned '2' (int)"),
    ("-1", "reward_error", "(int)"), ("float('nan')", "reward_error", "'nan'"),
    ("'True'", "reward_error", "(str)"), ("[]", "reward_error", "(list)"),
    ("np.array([True])", "reward_error", "(ndarray)"),
    ("1/0", "reward_error", "ZeroDivisionError: division by zero (line 24)"),
    ("fail()", "reward_error", "KeyError: 'no such thing' (line 6)"),
    ("mute()", "reward_error", "Mute: has no words (line 16)"), ("again()", "reward_error", "RecursionError"),
    ("(", "reward_error", "SyntaxError"), ("sys.exit(3)", "reward_error", "SystemExit: 3"),
    ("len(bytearray(4 << 30))", "reward_error", "MemoryError"),
    ("loop()", "timeout", ""), ("os._exit(0)", "killed", ""), ("os.abort()", "killed", ""),
    # The fence.
    ("open('/etc/passwd')", "reward_error", "PermissionError: a grader must not: open"),
    ("socket.socket()", "reward_error", "a grader must not: socket"),
    ("os.system('true')", "reward_error", "a grader must not: os.system"),
    ("__import__('this')", "reward_error", "ImportError: a grader must not import this"),
    # What it prints is dropped.
    ("print('x' * 100_000) is None", "ok", ""), ("sys.stderr.write('x') == 1", "ok", ""),
    ("warnings.warn('x') is None", "ok", ""), ("__import__('re') is not None", "ok", ""),
], ids=str)
def test_what_a_function_returns_or_does_is_a_verdict(grader, response, reason, says):
    verdict, = grader.grade([response], ["5"])
    assert (verdict.reason, verdict.reward) == (reason, float(reason == "ok"))
    assert says in " ".join(verdict.trace) and bool(says) == bool(verdict.trace) and verdict.fault == ""


def test_it_is_told_response_answer_and_problem_and_nothing_else(grader):
    about = custom.about(Example("p/7", "2+3=?", "5", demo="secret"))
    response = "(answer, example) == ('5', {'id': 'p/7', 'problem': '2+3=?', 'answer': '5'})"
    assert grader.grade([response], ["5"], examples=[about])[0].reward == 1
    assert grader.grade(["example == {}"], ["5"])[0].reward == 1
    with pytest.raises(ValueError):
        grader.grade(["True", "True"], ["5", "5"], examples=[about])


def test_what_it_changes_is_as_before_in_the_next_call(grader):
    changes = "not seen.append(1) and example.clear() is None and len(seen) == 1"
    example = {"id": "p/1"}
    assert [v.reward for v in grader.grade([changes] * 2, ["5"] * 2, examples=[example] * 2)] == [1, 1]
    assert example == {"id": "p/1"}


def test_what_it_is_given_is_the_text_that_is_graded(grader, monkeypatch):
    thought = "'</think>' in 'no'</think>True"
    assert grader.grade([thought], ["5"])[0].reason == "ok"
    assert grader.grade(["True", "1/0"], ["5"] * 2, [False, False])[1].reason == "truncated"
    monkeypatch.setattr(grader, "text", "whole")
    assert grader.grade([thought], ["5"])[0].reason == "reward_error"
    monkeypatch.setattr(grader, "text", "require_think")
    assert grader.grade(["True"], ["5"])[0].reason == "unclosed"


def test_the_first_error_is_said_once_with_the_problem_and_the_line(grader, capfd, monkeypatch):
    monkeypatch.setattr(grader, "_told", False)
    examples = [{"id": "p/1"}, {"id": "p/2"}, {"id": "p/3"}]
    grader.grade(["True", "fail()", "1/0"], ["5"] * 3, examples=examples)
    assert capfd.readouterr().err == (
        "--reward: any on problem p/2: \"KeyError: 'no such thing' (line 6)\"; such a response earns 0, "
        "and is counted as reward_error\n")


def test_the_verifiers_are_there_beside_it(grader):
    assert grader.kind == "any"
    assert [v.reward for v in grader.grade([r"\boxed{5}"], ["5"], kind="math-verify")] == [1.0]
    with pytest.raises(ValueError, match="'other' must be one of .*'any'"):
        grader.grade(["True"], ["5"], kind="other")


@pytest.mark.slow
def test_a_worker_that_starts_after_the_file_has_changed_loads_what_it_was(tmp_path):
    file = write(tmp_path, "def mine(response, answer, example):\n    return True\n")
    with Grader(workers=1, reward=f"{file}:mine") as grader:
        file.write_text("def mine(response, answer, example):\n    return False\n")
        worker, = grader._pool
        worker.proc.kill()
        worker.proc.wait()
        assert grader.grade(["x"], ["5"])[0].reward == 1 and grader._pool != [worker]


# ----------------------------------------------------------------------------------------------------------
# What is refused before anything is loaded.

GOOD = "def mine(response, answer, example):\n    return True\n"


@pytest.mark.parametrize("text, spec, says", [
    (GOOD, "mine.py", "expected FILE.py:FUNCTION"), (GOOD, "mine.py:", "expected FILE.py:FUNCTION"),
    (GOOD, "mine.py:a b", "expected FILE.py:FUNCTION"), (GOOD, "other.py:mine", "No such file"),
    (GOOD, "mine.py:samples", "samples is the name of"),
    (GOOD, "mine.py:oat", "oat is the name of a verifier"), (GOOD, ".:mine", "Is a directory"),
    ("x = 1\ndef mine(response:\n", "mine.py:mine", "(line 2)"), ("x = '\0'", "mine.py:mine", "null bytes")],
    ids=str)
def test_a_file_that_is_not_there_or_is_no_python_is_refused_by_flag_and_line(
        tmp_path, text, spec, says, monkeypatch, capsys):
    write(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"--reward {spec}: ")) as refused:
        config.check_flags(config.parse_args(["--reward", spec]))
    assert says in str(refused.value)
    with pytest.raises(SystemExit):
        E.parse(["--model", "m", "--reward", spec])
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text, says", [
    ("def others(a, b, c):\n    pass\n", "has no function mine, but others"), ("mine = 5", "has no function"),
    ("import no_such_module\n" + GOOD, "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
    (GOOD + "\n\nraise SystemExit('no')", "SystemExit: no (line 5)"),
    ("def mine(response, answer):\n    return True\n", "too many positional arguments"),
    ("def mine(response, answer, example, more):\n    return True\n", "missing a required argument: 'more'")],
    ids=str)
def test_a_function_that_cannot_be_loaded_is_refused_with_the_line(tmp_path, text, says, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(ValueError, match=f"^{tmp_path}/mine.py: ") as refused:
        custom.load(custom.read(f"{write(tmp_path, text)}:mine"))
    assert says in str(refused.value)


@pytest.mark.parametrize("text", [
    "import beside\nmine = beside.mine",
    "class Right:\n    def __call__(self, response, answer, example):\n        return True\nmine = Right()",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n" + GOOD,
    "mine = lambda response, answer, example=None: True", "def mine(*args):\n    return True"], ids=str)
def test_whatever_can_be_called_with_three_arguments_will_do(tmp_path, text, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    write(tmp_path, GOOD, "beside.py")
    own = custom.load(custom.read(f"{write(tmp_path, text)}:mine"))
    assert own({"response": "x", "answer": "5", "example": {}}) == ("ok", "", [])


def test_the_grader_says_so_when_it_starts(tmp_path):
    file = write(tmp_path, "import no_such_module\n" + GOOD)
    with Grader(workers=1, reward=f"{file}:mine") as grader:
        with pytest.raises(ValueError, match=f"--reward: {file}: .*no_such_module.* .line 1.$"):
            grader.start()


def test_where_no_worker_starts_the_file_is_named_among_what_may_be_at_fault(tmp_path):
    file = write(tmp_path, GOOD)
    with Grader(workers=1, memory_mb=20, reward=f"{file}:mine") as grader:
        with pytest.raises(ValueError, match=f"3 workers in a row died .*whether {file} can be loaded"):
            grader.start()


def test_switches_of_math_verify_have_no_part_in_it():
    for flag in ("--no-strict_box", "--no-strict_answer"):
        cfg = config.parse_args(["--preset", "tiny", "--reward", "x.py:f", flag])
        with pytest.raises(ValueError, match="have no part in --reward"):
            config.check_objective(cfg)


# ----------------------------------------------------------------------------------------------------------
# What a run is, and what it remembers.

def test_a_reward_is_known_by_its_text_and_its_name_wherever_it_lies(tmp_path):
    (tmp_path / "b").mkdir()
    one, moved = write(tmp_path, GOOD), write(tmp_path / "b", GOOD)
    digest = custom.read(f"{one}:mine").digest
    assert custom.read(f"{moved}:mine").digest == digest
    moved.write_text(GOOD + "# another\n")
    assert custom.read(f"{moved}:mine").digest != digest != custom.read(f"{one}:other").digest


@pytest.mark.parametrize("before, now, kept", [
    ("r", "r", True), ("r", "s", False), ("r", None, False), (None, "r", False), (None, None, True)])
def test_rewards_of_demonstrations_are_graded_anew_by_another_reward(before, now, kept, monkeypatch):
    cfg = config.parse_args(["--preset", "tiny"])
    state = {"step": 2, "demo_rewards": {"key": 1.0}, "settings": config.settings(cfg),
             "identity": {"reward": before} if before else {}}
    monkeypatch.setattr(srft, "load_checkpoint", lambda *_: state)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    progress = srft.restore(cfg, ("step-2", {}), {"reward": now}, None, optimizer, lambda _: None)
    assert progress.demo_rewards == ({"key": 1.0} if kept else {})


# ----------------------------------------------------------------------------------------------------------
# In eval.py.

@pytest.mark.parametrize("flags, kinds", [
    ([], ["oat", "math-verify"]), (["--grader", "oat"], ["oat"]), (["--reward", "{}:mine"], ["mine"]),
    (["--reward", "{}:mine", "--grader", "both"], ["mine", "oat", "math-verify"])])
def test_the_verdict_has_the_functions_name_and_others_are_beside_it_if_asked_for(flags, kinds, tmp_path):
    file = write(tmp_path, GOOD)
    args = E.parse(["--model", "m", *(flag.format(file) for flag in flags)])
    assert E.verifiers(args) == kinds
    letter, plain = Example("a", "?", "B"), Example("b", "?", "5")
    letter.order = [1, 0]
    assert [name for name, *_ in E.wanted_verdicts(plain, kinds)] == kinds
    asked = [name for name, *_ in E.wanted_verdicts(letter, kinds)]
    assert asked == [kind for kind in kinds if kind == "mine"] + ["choice"] * (kinds != ["mine"])


def test_each_view_of_the_summary_is_its_own_verdicts_also_of_multiple_choice():
    def row(id, **rewards):
        verdicts = {name: {"reward": reward, "reason": "ok", "fault": ""} for name, reward in rewards.items()}
        return {"id": id, "sample": 0, "finished": True, "tokens": 1, "verdicts": verdicts}

    rows = [row("a", mine=1.0, choice=0.0), row("b", mine=1.0, oat=1.0)]
    summary = tables.summarize({"x": rows}, ["mine", "oat"])["x"]
    assert (summary["mine"]["accuracy"], summary["oat"]["accuracy"]) == (1.0, 0.5)


def test_ranks_whose_files_differ_do_not_put_their_results_together(tmp_path, monkeypatch):
    def differ(what, value):
        raise ValueError(f"{what}: ranks [1] read another one")

    monkeypatch.setattr(E, "agreed", differ)
    monkeypatch.setattr(E, "fingerprints", str)
    args = E.parse(["--model", "m", "--out", str(tmp_path), "--reward", f"{write(tmp_path, GOOD)}:mine"])
    with pytest.raises(ValueError, match="--reward: ranks"):
        E.settle(args, tmp_path, torch.device("cpu"))
    assert not (tmp_path / "settings.json").exists()


def test_results_of_another_reward_are_not_mixed_and_the_table_names_it(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    file, out = write(tmp_path, GOOD), tmp_path / "out"
    args = E.parse(["--model", "m", "--template", "paper", "--out", str(out), "--reward", f"{file}:mine"])
    E.settle(args, tmp_path / "hf", torch.device("cpu"))
    E.append_results(out / "results.jsonl", [{}])
    E.settle(args, tmp_path / "hf", torch.device("cpu"))
    note, = tables.departures(args, {})
    assert note == f"--reward {file}:mine: that function gave the verdicts of its name"
    file.write_text(GOOD + "# another\n")
    with pytest.raises(ValueError, match="reward_code was "):
        E.settle(args, tmp_path / "hf", torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------------
# The page, and a whole run.

PAGE = (ROOT / "docs/data.md").read_text()
SHOWN = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.parametrize("name, right, wrong", [
    ("exact", " 12 ", "13"), ("exact", "Paris\n", "paris"),
    ("letter", "so the answer is (B)", "the answer is (C)"), ("letter", "A is wrong, B.", "It is A or B: A"),
    ("letter", "B", "none")])
def test_the_rewards_of_the_page_do_what_it_says(name, right, wrong, tmp_path, monkeypatch):
    for stream in ("stdout", "stderr", "path"):
        value = getattr(sys, stream)
        monkeypatch.setattr(sys, stream, value[:] if stream == "path" else value)
    text, = [block for block in SHOWN if f"def {name}(" in block]
    assert len(text.splitlines()) <= 10
    own = custom.load(custom.read(f"{write(tmp_path, text)}:{name}"))
    answer = right.strip() if name == "exact" else "B"
    found = [own({"response": r, "answer": answer, "example": {}})[0] for r in (right, wrong)]
    assert found == ["ok", "wrong"]


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_resumed_by_a_reward_of_its_own(tmp_path):
    rows = []
    for i in range(8):
        rows.append({"id": f"p{i}", "problem": f"1{i}+11=?\n", "answer": f"no number {i}",
                     "solution": f"2{i}"})
    for name in ("mine", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = write(tmp_path, """
        def digits(response, answer, example):
            assert answer == "no number " + example["id"][1:] and example["problem"].endswith("=?\\n")
            return 1 / 0 if example["id"] > "p3" else response.strip().isdigit()
        """)
    command = [*SMALL, "--data", tmp_path / "mine.jsonl", "--eval_data", tmp_path / "held.jsonl", "--out",
               tmp_path / "run", "--reward", f"{file}:digits", "--eval_every", "2"]
    output = run([*command, "--steps", "2"], ranks=2)
    assert output.count("reference answers are not checked") == 1 and "no response can match" not in output
    told = re.findall(r"--reward: digits on problem p[4-7]: .ZeroDivisionError: .* zero .line 4..;", output)
    assert len(told) == 1                                        # by rank 0
    first, second = metrics(tmp_path / "run")[1:]
    assert first["reward/demo_mean"] + second["reward/demo_mean"] == 1                   # 4 of 8 are right
    assert 4 <= first["grader/reward_error"] + second["grader/reward_error"] <= 20
    file.write_text(file.read_text().replace("isdigit()", "isalpha()").replace("1 / 0", "False"))
    output = run(["srft.py", "--resume", "--out", tmp_path / "run", "--steps", "4"])
    assert "--reward holds something else than until now" in output and "with --steps 4" in output
    assert [row["reward/demo_mean"] for row in metrics(tmp_path / "run")[3:]] == [0, 0]
    output = run(["eval.py", "--model", tmp_path / "run", "--benchmarks", tmp_path / "held.jsonl", "--device",
                  "cpu", "--max_tokens", "60", "--reward", f"{file}:digits", "--grader_workers", "1"])
    assert output.count("whether digits accepts the reference answers is not checked") == 1
    summary = read_json(Path(tmp_path / "run" / "eval" / "summary.json"))["held"]
    assert summary["digits"]["reasons"].keys() <= {"ok", "wrong"} and "oat" not in summary
