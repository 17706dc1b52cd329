"""Every number on a command line: one rule, checked before anything is fetched or loaded.

    pytest tests/test_flags.py
"""
import argparse
import ast
import dataclasses
import importlib
import math
import os
from pathlib import Path

import pytest

import eval
import srft
from config import Config, check_flags, parse_args
from conftest import ROOT
from support.intervals import check_interval, number_in

NUMBERS = [f for f in dataclasses.fields(Config) if f.type in (int, float)]
ABSURD = [math.nan, -math.inf, -1, -1e-9]


@pytest.mark.parametrize("interval, inside, outside", [
    ("[1, inf)", [1, 2, 1e300], [0, 0.999, -1, math.inf, math.nan]),
    ("(0, 1]", [1e-300, 0.5, 1], [0, -0.0, 1.0000001, math.nan]),
    ("(0, inf]", [1e-9, math.inf], [0, -math.inf, math.nan]),
    ("[0, 4294967295]", [0, 2**32 - 1], [-1, 2**32])])
def test_an_interval_means_what_it_means_in_mathematics(interval, inside, outside):
    for value in inside:
        check_interval("--flag", value, interval)
    for value in outside:
        with pytest.raises(ValueError, match="--flag .*must lie in"):
            check_interval("--flag", value, interval)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_of_a_run_has_its_values_and_absurd_ones_are_refused(field):
    assert field.metadata["within"] or field.metadata["choices"]
    if field.metadata["choices"]:
        return
    absurd = ABSURD if field.type is float else [-1, -10**30]
    for value in absurd + [math.inf] * (field.type is float and field.name != "grad_clip"):
        with pytest.raises(ValueError, match=f"--{field.name} .*must lie in"):
            check_flags(dataclasses.replace(Config(), **{field.name: value}))


# Too large for a clock, or for a machine: it would be found when the first step is done.
@pytest.mark.parametrize("flag", ["hang_minutes", "grader_deadline", "grader_workers"])
def test_what_a_clock_or_a_machine_cannot_hold_is_refused_too(flag, capsys):
    with pytest.raises(ValueError, match=f"--{flag} .*must lie in"):
        check_flags(dataclasses.replace(Config(), **{flag: 10**10}))
    with pytest.raises(SystemExit):
        eval.parse(["--model", "m", f"--{flag}={10**10}"])
    assert f"--{flag} " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    ["--lr", "nan"], ["--engine_memory", "1.1"], ["--seed", str(2**32)], ["--out", ""],
    ["--out", os.fsdecode(b"out/\xff")], ["--out", "out/a\nb"],
    ["--data", ""], ["--model", " "]])
def test_a_run_refuses_them_before_it_loads_anything(flags, monkeypatch):
    monkeypatch.setattr(srft, "init_distributed", lambda device: srft.Ranks(0, 1, None, None))
    monkeypatch.setattr(srft, "check_environment", lambda device: None)
    monkeypatch.setattr(srft, "fetch", None)
    with pytest.raises(ValueError, match=flags[0]):
        srft.setup(parse_args(["--preset", "tiny", *flags]))


@pytest.mark.parametrize("name", [
    "samples", "temperature", "top_p", "max_tokens", "seed", "rope_theta", "window", "engine_memory",
    "engine_sequences", "grader_workers", "grader_deadline"])
def test_every_number_of_an_evaluation_refuses_absurd_values(name, capsys):
    args = eval.parse(["--model", "m"])
    numbers = {key for key, value in vars(args).items() if type(value) in (int, float)}
    assert numbers == eval.add_flags(argparse.ArgumentParser()).keys() and name in numbers
    for value in ["-1"] + ["nan", "inf"] * isinstance(getattr(args, name), float):
        with pytest.raises(SystemExit):
            eval.parse(["--model", "m", f"--{name}={value}"])
        assert f"--{name} " in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# The other programs: paper/figures.py, reward.py and whatever stands in bench/ and experiments/.

FILES = [ROOT / "reward.py"]
for room in ("paper", "bench", "experiments"):
    FILES += sorted((ROOT / room).glob("*.py"))
PROGRAMS = [str(path.relative_to(ROOT)) for path in FILES if "parse_args(" in path.read_text()]


class Caught(Exception):
    """The parser of a program, caught before it has read anything."""


def parser_of(program, monkeypatch):
    def catch(parser, argv=None):
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    name = Path(program).stem
    module = importlib.import_module(f"paper.{name}" if program.startswith("paper") else name)
    with pytest.raises(Caught) as caught:
        if program == "reward.py":
            module.explain([])
        else:
            getattr(module, "parse", getattr(module, "main", None))()
    monkeypatch.undo()
    return caught.value.args[0]


def flags_of(parser):
    """All flags of a parser and of its subcommands, by name."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                found += flags_of(subparser)
        elif action.option_strings:
            found.append((parser, action))
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_of_every_other_program_has_its_interval_and_refuses_absurd_values(
        program, monkeypatch, capsys):
    for parser, action in flags_of(parser_of(program, monkeypatch)):
        flag = action.option_strings[0]
        assert action.type not in (int, float) or action.choices, f"{program} {flag}: has no interval"
        if action.type is None or action.choices:
            continue
        for value in ["-1", "-0.5", "nan", "-inf", "inf", "", "x", "1e400", "-" + "9" * 400]:
            with pytest.raises(SystemExit):
                parser.parse_args([f"{flag}={value}"])
            said = capsys.readouterr().err
            assert flag in said and ("must lie in" in said or "invalid" in said), f"{program} {flag}={value}"


def test_all_programs_are_walked():
    assert {"paper/figures.py", "reward.py", "bench/step.py", "bench/scale.py", "bench/engine.py",
            "bench/packing.py", "bench/logprob.py", "bench/gpu.py", "experiments/tiny_paper.py",
            "experiments/smollm2_gsm8k.py"} <= set(PROGRAMS)


@pytest.mark.parametrize("path", [ROOT / "eval.py", *FILES], ids=lambda path: path.name)
def test_no_flag_takes_any_number_there_is(path):
    for node in ast.walk(ast.parse(path.read_text())):
        keywords = {keyword.arg: keyword.value for keyword in getattr(node, "keywords", [])}
        kind = keywords.get("type")
        if isinstance(kind, ast.Name) and kind.id in ("int", "float"):
            assert "choices" in keywords, f"{path.name}, line {node.lineno}: use support.intervals.number_in"


def test_a_type_for_argparse_names_flag_value_and_interval(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=number_in(float, "(0, 1]"))
    assert parser.parse_args(["--share", "0.5"]).share == 0.5
    for value, says in (("1.5", "1.5 must lie in (0, 1]"), ("half", "invalid float value: 'half'")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--share", value])
        assert f"argument --share: {says}" in capsys.readouterr().err
