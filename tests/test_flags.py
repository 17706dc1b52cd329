"""Every number on a command line: one rule, checked before anything is fetched or loaded.

    pytest tests/test_flags.py
"""
import argparse
import dataclasses
import math

import pytest

import eval
import srft
from config import Config, check_flags, parse_args
from support.intervals import check_interval

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


@pytest.mark.parametrize("flags", [
    ["--lr", "nan"], ["--engine_memory", "1.1"], ["--seed", str(2**32)], ["--out", ""]])
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
