"""support/resume.py and support/claim.py: who may write into a run's folder, and what a resume goes on with.

    pytest tests/test_resume.py
"""
import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import data
import eval as E
import srft
from config import SAME_CONTENT, SAME_FLAGS, TINY, parse_args, settings
from conftest import ENV, ROOT, SMALL, metrics, run, start
from data import Example, Prompt, demo_key, digest
from support import checkpoint, claim, resume
from test_model import checkpoints, mesh  # noqa: F401 (fixtures)
from test_run import TWO_RANKS, assert_same_run, read_jsonl, write_jsonl

# ruff: noqa: F811        (the fixture `mesh` is imported, and named as an argument)


# ----------------------------------------------------------------------------------------------------------
# A folder that one process holds.

def hold(folder):
    """A process that has claimed the folder, until it is killed."""
    code = f"from support.claim import claim; claim({str(folder)!r}); print('HELD', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], env=ENV, cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "HELD\n"
    return process


def no_locks(monkeypatch, number=errno.ENOLCK):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(claim, "_warned", set())


def test_a_second_process_is_refused_by_host_number_and_start_and_a_killed_one_blocks_nobody(tmp_path):
    out = tmp_path / "deep" / "out"
    holder = hold(out)
    expected = rf"{out}: process {holder.pid} on {socket.gethostname()}, since 20\d\d-.*, writes there; wait"
    with pytest.raises(ValueError, match=expected):
        claim.claim(out)
    holder.kill()
    holder.wait()
    claim.claim(out)
    claim.claim(out)                                      # once more is no error
    assert claim.is_claimed(out)
    second = subprocess.run([sys.executable, "-c", f"from support.claim import claim; claim({str(out)!r})"],
                            env=ENV, cwd=ROOT, text=True, capture_output=True)
    assert f"process {os.getpid()} on " in second.stderr


@pytest.mark.parametrize("number", claim.WITHOUT_LOCKS, ids=errno.errorcode.get)
def test_without_locks_a_living_holder_is_refused_and_what_a_killed_one_left_is_not(
        tmp_path, monkeypatch, number):
    holder = hold(tmp_path)
    no_locks(monkeypatch, number)
    with pytest.raises(ValueError, match=f"process {holder.pid} on "):
        claim.claim(tmp_path)
    holder.kill()
    holder.wait()
    with pytest.warns(UserWarning, match=f"has no locks .*The last to write there was process {holder.pid}"):
        claim.claim(tmp_path)
    assert claim.is_claimed(tmp_path)


def test_a_folder_is_known_by_its_lock_and_not_by_its_name_or_that_of_the_host(tmp_path, monkeypatch):
    """A host may be renamed while a run goes on, and a folder may be made anew under the old one's name."""
    claim.claim(tmp_path / "run")
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    assert claim.is_claimed(tmp_path / "run")
    claim.claim(tmp_path / "run")                                   # once more is no error
    (tmp_path / "run").rename(tmp_path / "moved")
    assert not claim.is_claimed(tmp_path / "run")
    shutil.copytree(tmp_path / "moved", tmp_path / "run")
    assert not claim.is_claimed(tmp_path / "run")


@pytest.mark.parametrize("note, warns", [
    ({"host": "here", "pid": os.getpid(), "start": 1, "since": "then"}, "process .* on here"),      # reused
    ({"host": "elsewhere", "pid": 1, "start": 1, "since": "then"}, "process 1 on elsewhere, since then"),
    ({}, "nothing else writes there.$"), ("torn", "nothing else writes there.$")],
    ids=["reused pid", "elsewhere", "empty", "torn"])
def test_without_locks_what_cannot_be_known_to_live_is_a_warning_and_no_refusal(
        tmp_path, monkeypatch, note, warns):
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    no_locks(monkeypatch)
    (tmp_path / ".lock").write_text(json.dumps(note))
    with pytest.warns(UserWarning, match=warns):
        claim.claim(tmp_path)
    assert claim.is_claimed(tmp_path)


@pytest.mark.parametrize("number", claim.WITHOUT_LOCKS, ids=errno.errorcode.get)
def test_results_of_a_whole_chunk_are_written_where_there_are_no_locks_with_one_warning(
        tmp_path, monkeypatch, number):
    no_locks(monkeypatch, number)
    with pytest.warns(UserWarning, match="has no locks") as caught:
        E.append_results(tmp_path / "results.jsonl", [{"a": 1}])
        E.append_results(tmp_path / "results.jsonl", [{"a": 2}])
    assert len(caught) == 1 and [row["a"] for row in E.read_results(tmp_path / "results.jsonl")] == [1, 2]


@pytest.mark.slow
def test_of_two_runs_that_are_started_at_once_one_is_refused_on_all_its_ranks_and_one_is_whole(tmp_path):
    out = tmp_path / "run"
    command = [*SMALL, "--out", out, "--steps", "3", "--resume"]
    runs = [start(command, ranks=2), start(command, ranks=2)]
    outputs = [[p.communicate(timeout=240)[0] for p in processes] for processes in runs]
    codes = [[p.returncode for p in processes] for processes in runs]
    assert sorted(codes) == [[0, 0], [1, 1]], outputs
    refused = outputs[codes.index([1, 1])]
    for text in refused:
        assert "writes there; wait until it has ended" in text and "Traceback" not in text
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed():
    command = [*TWO_RANKS, "tests/phases.py", "sleep", "10"]
    launcher = subprocess.Popen(list(map(str, command)), env=ENV, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)
    ranks, said = [], []
    while len(ranks) < 2:
        said.append(launcher.stdout.readline())
        assert said[-1], "".join(said)                                   # they have ended by themselves
        ranks += map(int, re.findall(r"PID (\d+)", said[-1]))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in ranks if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid):
    return claim._start_time(pid) is not None


# ----------------------------------------------------------------------------------------------------------
# What is in the folder.

def rows(*steps):
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


NO_CHECKPOINTS = "and none of its checkpoints, so there is nothing to resume"


@pytest.mark.parametrize("files, flag, says", [
    ({}, False, None),
    ({}, True, None),
    ({"metrics.jsonl": rows(0)}, True, None),                                     # killed in its first step
    ({"metrics.jsonl": rows(0, 1, 2), "checkpoints/.none-yet": ""}, True, None),  # before a checkpoint
    ({"metrics.jsonl": rows(0)}, False, "already holds a run: pass --resume"),
    ({"metrics.jsonl": ""}, False, "already holds a run: pass --resume"),
    ({"checkpoints/step-1/manifest.json": "{"}, False, "already holds a run: pass --resume"),
    ({"metrics.jsonl": rows(0, 1, 2)}, True, f"a run of 2 steps {NO_CHECKPOINTS}"),
    ({"metrics.jsonl": rows(0, 1), "hf/config.json": "", "checkpoints/.none-yet": ""}, True, NO_CHECKPOINTS),
    ({"hf/config.json": ""}, True, NO_CHECKPOINTS),
    ({"hf/config.json": ""}, False, NO_CHECKPOINTS),
    ({"metrics.jsonl": rows(0), "checkpoints/step-1/manifest.json": "{"}, True, "none of its 1 checkpoint"),
], ids=str)
def test_a_run_begins_only_where_that_deletes_no_records(tmp_path, mesh, files, flag, says):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if says is None:
        assert resume.open_run(tmp_path, flag, 0) is None and claim.is_claimed(tmp_path)
        assert checkpoint.has_none_yet(tmp_path / "checkpoints")
        return
    with pytest.raises(ValueError, match=says):
        resume.open_run(tmp_path, flag, 0)
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("steps, says", [
    ([0, 1, 2, 3], None), ([0, 1, 2, 3, 4], None),
    ([2, 3], "has no row of 1 of the 3 steps done, such as step 1"),
    ([0, 1, 2], "of 1 of the 3 steps done, such as step 3"),
    ([], "of 3 of the 3 steps done, such as step 1")])
def test_a_resume_says_which_steps_done_have_lost_their_rows(tmp_path, mesh, monkeypatch, steps, says):
    (tmp_path / "metrics.jsonl").write_text(rows(*steps))
    found = ("step-3", {"state": {"step": 3}})
    monkeypatch.setattr(resume, "newest_checkpoint", lambda *_: found)
    said = []
    assert resume.open_run(tmp_path, True, 0, said.append) == found
    assert len(said) == (says is not None)
    assert not said or f"{tmp_path}/metrics.jsonl: " in said[0] and says in said[0]


def test_what_a_kill_has_left_half_written_is_removed_before_the_room_is_asked_for(tmp_path, mesh):
    left = [".partial-hf", "checkpoints/.partial-step-2", "checkpoints/.removing-step-1-17"]
    for folder in left:
        (tmp_path / folder / "deep").mkdir(parents=True)
    resume.open_run(tmp_path, True, 0)
    assert not any((tmp_path / folder).exists() for folder in left)


def test_the_first_checkpoint_takes_the_note_away_that_there_is_none(checkpoints):
    folder, *training = checkpoints
    checkpoint.begin_run(folder)
    checkpoint.save_checkpoint(folder, *training, {"step": 6}, keep=2)
    assert not checkpoint.has_none_yet(folder)


@pytest.mark.slow
def test_a_finished_run_that_has_lost_its_checkpoints_keeps_its_records(whole_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    shutil.rmtree(out / "checkpoints")
    for gone in (None, out / "hf"):
        if gone:
            shutil.rmtree(gone)
        output = run([*SMALL, "--out", out, "--steps", "6", "--resume"], ok=False)
        assert "take another --out" in output and "Traceback" not in output
        assert metrics(out) == metrics(whole_run)


@pytest.mark.slow
def test_a_broken_newest_checkpoint_costs_a_resume_nothing_which_needs_no_more_than_the_folder(
        whole_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    shard = out / "checkpoints" / "step-6" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    output = run(["srft.py", "--resume", "--out", out])
    assert f"refusing a checkpoint: {shard}: damaged" in output and "checkpoints/step-4" in output
    assert f"--resume: flags that are not given are as in {out}/config.json" in output
    assert f"  with --out {out}, until now {whole_run}\n" in output and output.count(", until now ") == 1
    assert_same_run(whole_run, out)
    assert json.loads((out / "config.json").read_text())["prompts_per_step"] == 4


# ----------------------------------------------------------------------------------------------------------
# The same run?

PROMPT = Prompt(Example("a", "1+1=?", "2", r"\boxed{2}"), [1, 2], [3, 0])


@pytest.mark.parametrize("change, same", [
    (dict(example=replace(PROMPT.example, id="b")), True),                 # as in a file of another name
    (dict(example=replace(PROMPT.example, problem="1+1=??")), False),
    (dict(example=replace(PROMPT.example, answer="3")), False),
    (dict(example=replace(PROMPT.example, demo=r"\boxed{3}")), False),
    (dict(example=replace(PROMPT.example, demo=None), demo=None), False),
    (dict(ids=[1, 4]), False), (dict(demo=[4, 0]), False), (dict(ids=[1, 2, 3], demo=[0]), False)], ids=str)
def test_a_digest_of_data_is_that_of_what_is_trained_on_and_of_nothing_else(change, same):
    other = replace(PROMPT, **change)
    assert (digest([other]) == digest([PROMPT])) is same
    assert digest([PROMPT, other]) != digest([PROMPT])
    assert same or digest([PROMPT, other]) != digest([other, PROMPT])


def test_the_reward_of_a_demonstration_is_remembered_by_its_text_its_problem_and_its_answer():
    example = PROMPT.example
    assert demo_key(example) == demo_key(replace(example, id="b"))
    others = [replace(example, answer="3"), replace(example, demo="4"), replace(example, problem="2=?")]
    assert len({demo_key(example), *map(demo_key, others)}) == 4


def test_it_is_not_remembered_where_the_code_that_grades_is_another(monkeypatch):
    before = demo_key(PROMPT.example)
    monkeypatch.setattr(data, "grader_digest", lambda: "another")
    assert demo_key(PROMPT.example) != before


def test_the_digest_of_the_grader_is_of_all_its_code(monkeypatch, tmp_path):
    digests = set()
    for room in ("a", "b", "c"):
        (tmp_path / room / "grading").mkdir(parents=True)
        (tmp_path / room / "reward.py").write_text("1" if room == "a" else "2")
        (tmp_path / room / "grading" / "oat.py").write_text("3" if room == "c" else "4")
        monkeypatch.setattr(data, "__file__", str(tmp_path / room / "data.py"))
        data.grader_digest.cache_clear()
        digests.add(data.grader_digest())
    data.grader_digest.cache_clear()
    assert len(digests) == 3


def manifest(flags=(), **identity):
    cfg = parse_args(["--preset", "tiny", *flags])
    known = {"data": "d", "model": {"config.json": "c"}, "reference": None, "eval_data": {"held": "h"},
             "reward": "r"}
    return cfg, ("out/checkpoints/step-2", {"state": {
        "step": 2, "settings": settings(cfg), "identity": known | identity}}), known | identity


def check_same_run(cfg, checkpoint, identity, log):
    """As srft.setup asks."""
    resume.check_same_run(checkpoint, settings(cfg), identity, SAME_FLAGS, SAME_CONTENT, log)


@pytest.mark.parametrize("now, refused", [
    ({"data": "e"}, "step-2: --data is not what this run was trained on until now"),
    ({"model": {"config.json": "b"}}, None), ({"eval_data": {"held": "i"}}, None), ({"reward": "s"}, None)],
    ids=str)
def test_other_data_are_refused_another_model_held_out_set_or_reward_of_one_name_is_said(now, refused):
    cfg, found, identity = manifest()
    said = []
    if refused:
        with pytest.raises(ValueError, match=refused):
            check_same_run(cfg, found, identity | now, said.append)
        return
    check_same_run(cfg, found, identity | now, said.append)
    (name,) = now
    assert said == [f"--{name} holds something else than until now; the run goes on from {found[0]}"]


def test_a_run_of_before_a_flag_was_replaced_goes_on_without_a_word():
    cfg, (path, found), identity = manifest()
    for name in ("recompute", "dry_run_cards"):
        del found["state"]["settings"][name]
    found["state"]["settings"] |= {"activation_checkpointing": True, "dry_run_ranks": 8}
    said = []
    check_same_run(cfg, (path, found), identity | {"rope": 10_000.0}, said.append)      # nor was that noted
    assert said == []


def test_another_model_that_keeps_another_rope_is_refused():
    cfg, found, identity = manifest(rope=40_000.0)
    with pytest.raises(ValueError, match="the RoPE theta of --model is not what this run was trained on"):
        check_same_run(cfg, found, identity | {"rope": 1e6}, print)


def test_another_base_model_is_refused_where_a_kl_is_taken_to_it_and_a_new_kl_is_not():
    cfg, found, identity = manifest(reference={"model.safetensors": "1 a"})
    with pytest.raises(ValueError, match=r"\(--reference, else --model\) is not what"):
        check_same_run(cfg, found, identity | {"reference": {"model.safetensors": "1 b"}}, print)
    check_same_run(cfg, found, identity | {"reference": None}, print)


@pytest.mark.parametrize("flag, value", [("method", "grpo"), ("template", "paper"), ("seed", 1),
                                         ("rope_theta", 40_000.0)])
def test_flags_that_make_another_run_are_refused_by_name(flag, value):
    cfg, found, identity = manifest()
    with pytest.raises(ValueError, match=f"was trained with --{flag} .*; resume with the run's own flags"):
        check_same_run(replace(cfg, **{flag: value}), found, identity, print)


def test_a_reference_is_identified_as_what_is_loaded_for_the_kl(mesh, tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text() + " ")
    assert srft.identify(TINY, None, [PROMPT], {}, None, 10_000.0)["reference"] is None
    own = srft.identify(TINY, TINY, [PROMPT], {}, None, 10_000.0)
    assert own["reference"] == own["model"]
    other = srft.identify(TINY, str(tmp_path / "base"), [PROMPT], {}, None, 10_000.0)
    assert other["model"] == own["model"] != other["reference"]


@pytest.mark.slow
def test_a_resume_takes_moved_data_and_refuses_mended_ones_before_a_model_is_loaded(tmp_path):
    lines = [{"problem": f"1{i}+11=?\n", "answer": str(21 + i), "solution": rf"\boxed{{{21 + i}}}"}
             for i in range(6)]
    write_jsonl(tmp_path / "a.jsonl", lines)
    command = [*SMALL, "--out", tmp_path / "run"]
    run([*command, "--steps", "2", "--data", tmp_path / "a.jsonl"])
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    output = run([*command, "--steps", "4", "--resume", "--data", tmp_path / "b.jsonl"])
    assert "with --data" in output and [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    lines[3]["solution"] = "24, so " + lines[3]["solution"]
    write_jsonl(tmp_path / "b.jsonl", lines)
    output = run([*command, "--steps", "6", "--resume", "--data", tmp_path / "b.jsonl"], ok=False)
    assert "--data is not what this run was trained on until now" in output and "Traceback" not in output


@pytest.mark.slow
def test_rewards_of_demonstrations_are_graded_anew_when_a_resume_grades_by_other_rules(tmp_path):
    lines = [{"problem": f"1{i}+11=?\n", "answer": str(21 + i), "solution": rf"\boxed{{{21 + i}}}"}
             for i in range(4)]
    write_jsonl(tmp_path / "a.jsonl", lines)
    command = [*SMALL, "--out", tmp_path / "run", "--data", tmp_path / "a.jsonl"]
    run([*command, "--steps", "2"])
    run([*command, "--steps", "3", "--resume", "--grade_text", "require_think"])
    assert [row["reward/demo_mean"] for row in metrics(tmp_path / "run")[1:]] == [1, 1, 0]
    told = [row for row in read_jsonl(tmp_path / "run" / "samples.jsonl") if row["demo"]]
    assert len(told) == 4 and {row["step"] for row in told} == {3}


# ----------------------------------------------------------------------------------------------------------
# Room on the disk.

@pytest.mark.parametrize("there, saves, keep, free_of_them, refused, said", [
    (0, 10, 2, 3.0, False, False),
    (0, 10, 2, 2.9, False, True), (0, 10, 2, 2.0, False, True), (0, 10, 2, 1.9, True, False),
    (0, 1, 2, 1.1, False, True), (0, 1, 2, 0.9, True, False), (0, 1, 2, 1.2, False, False),
    (2, 10, 2, 1.0, False, False), (2, 10, 2, 0.9, True, False),
    (1, 10, 2, 1.0, False, True),
    (5, 10, 2, 1.0, False, False), (5, 10, 2, 0.9, True, False),       # with a larger --keep until now
    (2, 0, 2, 0.1, False, True), (2, 0, 2, 0.2, False, False),         # done, but for the export
    (0, 10, 2, math.inf, False, False)])
def test_a_disk_without_room_for_the_next_checkpoint_is_refused_at_the_start_and_for_later_ones_a_warning(
        tmp_path, monkeypatch, there, saves, keep, free_of_them, refused, said):
    for step in range(1, there + 1):
        (tmp_path / f"step-{step}").mkdir()
    size = 12_000_000                                              # a million weights
    monkeypatch.setattr(resume, "free_bytes", lambda folder: free_of_them * size)
    told = []
    if refused:
        with pytest.raises(OSError, match=r"the disk has .* MB free, and this run needs .* checkpoints of "
                                          r"12.0 MB, . at a time .*Make room, lower --keep"):
            resume.check_room(tmp_path, 1_000_000, saves, keep, size // 6, told.append)
    else:
        resume.check_room(tmp_path, 1_000_000, saves, keep, size // 6, told.append)
    assert len(told) == said and all("WARNING" in text for text in told)


@pytest.mark.parametrize("steps, save_every, done, saves", [
    (6, 2, 0, 3), (7, 2, 0, 4), (6, 100, 0, 1), (6, 2, 4, 1), (6, 2, 3, 2), (6, 2, 6, 0),
    (6, 2, 7, 0), (6, 4, 5, 1), (10**18, 1, 1, 10**18 - 1)])                # as whoever means "for ever" says
def test_the_checkpoints_to_come_are_those_of_every_so_many_steps_and_of_the_last(
        mesh, monkeypatch, steps, save_every, done, saves):
    asked = []
    monkeypatch.setattr(srft, "check_room", lambda *args, **kwargs: asked.append((args, kwargs)))
    cfg = replace(parse_args(["--preset", "tiny"]), steps=steps, save_every=save_every)
    found = ("step", {"state": {"step": done}}) if done else None
    ranks = srft.Ranks(0, 1, srft.torch.device("cpu"), None)
    srft.ask_for_room(cfg, found, srft.M.load_config(TINY), ranks, print)
    (_, weights, asked_saves, _), how = asked[0]
    assert (asked_saves, how["exported"]) == (saves, 4 * weights)
    file = Path(TINY) / "model.safetensors"
    assert 0 < file.stat().st_size - 2 * weights < 10_000               # stored in bf16, after a head
