"""support/disk.py and those who write by it: full disks, folders that cannot be removed or are taken away.

    pytest tests/test_disk.py
"""
import errno
import io
import json
import math
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import eval as E
import model as M
from conftest import SMALL, metrics, run, start
from support import checkpoint, disk, runlog
from support.checkpoint import newest_checkpoint, save_checkpoint
from support.claim import is_claimed
from support.runlog import RunLog, read_rows
from test_model import checkpoints, mesh, names, trained  # noqa: F401 (fixtures)
from test_resume import hold
from test_run import read_jsonl, wait_for
from tiny.task import make_tokenizer

# ruff: noqa: F811        (the fixture `mesh` is imported, and named as an argument)

FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


def full(number=errno.ENOSPC):
    return OSError(number, os.strerror(number))


@pytest.fixture
def small_disk(tmp_path):
    """A function: a real file system of that many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder],
                              capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


# ----------------------------------------------------------------------------------------------------------
# One file: all of it, or nothing.

class Small(io.FileIO):
    """A file on a disk with room for `left` bytes more."""
    left, number = 7, errno.ENOSPC

    def write(self, data):
        if not self.left:
            raise full(self.number)
        written = super().write(data[:self.left])
        self.left -= written
        return written


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_of_lines_that_do_not_fit_on_the_disk_none_is_written_and_the_error_says_what_is_free(
        tmp_path, number):
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\n")
    with Small(path, "ab") as file:
        file.number = number
        with pytest.raises(OSError, match=rf"{path}: no room on the disk .*[\d.,]+ [MG]B free; make room, "):
            disk.append_whole(file, "two\nthree\n")
    assert path.read_text() == "one\n"
    with Small(path, "ab") as file:
        file.left = 100
        disk.append_whole(file, "two\nthree\n")
    assert path.read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_a_file_that_cannot_be_written_whole_stays_what_it_was(tmp_path, monkeypatch, number):
    def fsync(_):
        raise full(number)

    disk.write_whole(tmp_path / "config.json", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="config.json: no room on the disk"):
            disk.write_whole(tmp_path / "config.json", "new")
        with pytest.raises(OSError, match="results.jsonl: no room on the disk"):
            E.append_results(tmp_path / "results.jsonl", [{"a": 1}])
    assert names(tmp_path) == ["config.json", "results.jsonl"]                # and no half one beside it
    assert (tmp_path / "config.json").read_text() == "old"
    assert E.read_results(tmp_path / "results.jsonl") == []


def test_on_a_real_disk_that_is_full_no_file_of_a_run_is_left_in_part(small_disk):
    folder = small_disk(64)
    log = RunLog(folder, active=True, step=-1)
    log.drawn = float("inf")                                                   # no curves
    log.write_settings({"a": 1})
    row = {"step": 0, "x": "y" * 900}
    with pytest.raises(OSError, match="jsonl: no room on the disk"):
        for step in range(1000):
            log.write(row | {"step": step}, samples=[row | {"step": step}])
    with pytest.raises(OSError, match="results.jsonl: no room"):
        E.append_results(folder / "results.jsonl", [row] * 100)
    with pytest.raises(OSError, match="config.json: no room"):
        log.write_settings({"a": "b" * 9000})
    steps = [row["step"] for row in read_jsonl(folder / "metrics.jsonl")]      # every line is a whole one
    assert steps == list(range(len(steps))) and len(steps) > 10
    assert len(read_jsonl(folder / "samples.jsonl")) in (len(steps), len(steps) - 1)
    assert E.read_results(folder / "results.jsonl") == []
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}


# ----------------------------------------------------------------------------------------------------------
# Checkpoints and exports.

def test_a_checkpoint_that_will_not_fit_is_not_begun_and_the_last_one_stays(checkpoints, monkeypatch):
    folder, *training = checkpoints
    monkeypatch.setattr(dcp, "save", None)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match=r"c/step-6: the disk is full. A checkpoint takes 0.\d MB, 0.0 MB are "):
        save_checkpoint(folder, *training, {"step": 6}, keep=2)
    assert names(folder) == ["step-2", "step-4"]


@pytest.mark.parametrize("error", [
    full(), full(errno.EDQUOT), RuntimeError("unexpected pos 704 vs 598"),
    dcp.api.CheckpointException("write", {0: (RuntimeError("unexpected pos 704 vs 598"), None)})], ids=repr)
def test_what_was_written_of_a_checkpoint_when_the_disk_got_full_is_removed(checkpoints, monkeypatch, error):
    folder, *training = checkpoints

    def save(state, checkpoint_id):
        (Path(checkpoint_id) / "__0_0.distcp").write_bytes(b"part")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", save)
        with pytest.raises(OSError, match="c/step-6: could not be written. A checkpoint takes .* are free"):
            save_checkpoint(folder, *training, {"step": 6}, keep=1)
    assert names(folder) == ["step-2", "step-4"]
    save_checkpoint(folder, *training, {"step": 6}, keep=1)                     # there is room again
    assert names(folder) == ["step-6"]


def test_on_a_real_disk_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_the_room(
        small_disk, tmp_path, mesh, monkeypatch):
    policy, optimizer = trained(tmp_path / "model", mesh)
    folder = small_disk(1000) / "c"
    save_checkpoint(folder, policy, optimizer, {"step": 2}, keep=2)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(disk.free_bytes(folder) - 200_000))
    free = disk.free_bytes(folder)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: math.inf)           # so that it is tried
    with pytest.raises(OSError, match="c/step-4: could not be written. A checkpoint takes 0.* MB"):
        save_checkpoint(folder, policy, optimizer, {"step": 4}, keep=2)
    assert disk.free_bytes(folder) == free and newest_checkpoint(folder)[0] == folder / "step-2"
    ballast.unlink()
    save_checkpoint(folder, policy, optimizer, {"step": 4}, keep=2)
    assert newest_checkpoint(folder)[0] == folder / "step-4"


def test_an_export_to_a_full_disk_is_said_and_leaves_no_part_of_it(small_disk, tmp_path, mesh):
    policy, _ = trained(tmp_path / "model", mesh)
    folder = small_disk(60)
    with pytest.raises(OSError, match="hf: no room on the disk"), disk.words_if_full(folder / "hf"):
        M.export_hf(folder / "hf", policy, make_tokenizer(), torch.float32)
    assert names(folder) == []


@pytest.mark.parametrize("error, says", [
    (full(), True), (full(errno.EDQUOT), True), (RuntimeError("I/O error (os error 27)"), True),
    (RuntimeError("I/O error (os error 28)"), True),
    (RuntimeError("I/O error (os error 2)"), False), (OSError(errno.EIO, "I/O error"), False)], ids=repr)
def test_an_error_that_comes_of_a_full_disk_is_said_to_and_takes_the_partial_folder_along_no_other_does(
        tmp_path, error, says):
    (tmp_path / ".partial-hf").mkdir()
    with pytest.raises((ValueError, OSError)) as caught, disk.words_if_full(tmp_path / "hf"):
        raise ValueError("what a library makes of it") from error
    assert ("no room on the disk" in str(caught.value)) is says
    assert names(tmp_path) == ([] if says else [".partial-hf"])


@pytest.mark.slow
def test_when_one_rank_cannot_write_its_part_all_ranks_end_and_a_resume_goes_on_when_there_is_room(tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL[1:], "--out", out, "--steps", "4"]
    processes = start(["tests/ranks.py", "full_disk", *flags], ranks=2)
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [1, 1], outputs
    for output in outputs:
        assert f"{out}/checkpoints/step-4: could not be written. A checkpoint takes 9.5 MB" in output
        assert "No space left on device" in output and "HANG" not in output
    assert names(out / "checkpoints") == ["step-2"] and metrics(out)[-1]["step"] == 4
    output = run([*SMALL, "--out", out, "--steps", "4", "--resume"], ranks=2)
    assert f"resumed {out}/checkpoints/step-2" in output
    assert [row["step"] for row in metrics(out)] == [0, 1, 2, 3, 4] and (out / "hf").exists()


# ----------------------------------------------------------------------------------------------------------
# What cannot be removed, and what is taken away.

def test_a_checkpoint_that_cannot_be_removed_is_a_warning_counts_no_longer_and_is_tried_again(
        checkpoints, monkeypatch):
    folder, *training = checkpoints

    def rmtree(path, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", ".nfs0001")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.warns(UserWarning, match=r"step-2: cannot be removed, and takes room"):
            save_checkpoint(folder, *training, {"step": 6}, keep=2)
        with pytest.warns(UserWarning, match=r"step-6: cannot be removed"):
            save_checkpoint(folder, *training, {"step": 6}, keep=2)            # the same step once more
    assert sorted(folder.glob("step-*")) == [folder / "step-4", folder / "step-6"]
    assert newest_checkpoint(folder)[0] == folder / "step-6"
    save_checkpoint(folder, *training, {"step": 8}, keep=2)
    assert names(folder) == ["step-6", "step-8"]


def test_one_that_cannot_even_be_renamed_is_a_warning_too_and_stays_whole(checkpoints, monkeypatch):
    folder, *training = checkpoints
    rename = Path.rename

    def refuse(path, target):
        if path.name == "step-2":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.warns(UserWarning, match="step-2: cannot be removed"):
            save_checkpoint(folder, *training, {"step": 6}, keep=2)
    assert names(folder) == ["step-2", "step-4", "step-6"]
    save_checkpoint(folder, *training, {"step": 8}, keep=2)
    assert names(folder) == ["step-6", "step-8"]


def written(folder, *steps, log=None):
    log = log or RunLog(folder, active=True, step=-1)
    log.drawn = float("inf")
    log.write_settings({"a": 1})
    for step in steps:
        log.write({"step": step})
    return log


@pytest.mark.parametrize("take", [lambda folder: folder.rename(folder.with_name("moved")), shutil.rmtree],
                         ids=["renamed", "removed"])
def test_a_run_whose_folder_is_taken_away_says_so_once_and_goes_on_in_a_new_one(tmp_path, take):
    folder = tmp_path / "run"
    log = written(folder, 0, 1)
    take(folder)
    with pytest.warns(UserWarning, match=f"{folder}: was moved or removed .* from step 2 on") as caught:
        log.write({"step": 2})
        log.write({"step": 3})
    assert len(caught) == 1
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [2, 3]
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}


def test_so_does_one_whose_folder_is_moved_while_it_writes(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    log = written(folder, 0, 1)

    def looked_and_moved(run):
        run.rename(tmp_path / "moved")
        monkeypatch.setattr(runlog, "is_claimed", is_claimed)
        return True

    monkeypatch.setattr(runlog, "is_claimed", looked_and_moved)
    with pytest.warns(UserWarning, match="was moved or removed .* from step 2 on"):
        log.write({"step": 2})
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [2]


def test_it_does_not_go_on_where_another_run_has_taken_its_place(tmp_path):
    folder = tmp_path / "run"
    log = written(folder, 0)
    folder.rename(tmp_path / "moved")
    other = hold(folder)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=f"process {other.pid} .* writes there"):
        warnings.simplefilter("ignore")
        log.write({"step": 1})
    other.kill()
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("rows, expected", [
    ([1, 2], {1: None, 2: 0.5}), ([1], {1: None, 2: 0.5}), ([], {2: 0.5}), ([1, 2, 3], {1: None, 2: 0.5})])
def test_an_evaluation_that_is_made_after_a_resume_stands_in_the_row_of_its_step_alone(
        tmp_path, rows, expected, monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", str)                          # takes a second
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in rows))
    RunLog(tmp_path, active=True, step=2).amend(2, {"eval/held": 0.5})
    found = {row["step"]: row.get("eval/held") for row in read_rows(tmp_path / "metrics.jsonl")}
    assert found == expected


@pytest.mark.parametrize("text", [None, "", "{", "\ud800"])
def test_settings_that_a_kill_has_spoilt_do_not_stop_a_resume(tmp_path, text):
    written(tmp_path, 0, 1, 2)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))         # no UTF-8
    written(tmp_path, 3, log=RunLog(tmp_path, active=True, step=2))
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert (tmp_path / "config-until-2.json").exists() is (text is not None)


@pytest.mark.slow
def test_a_whole_run_whose_folder_is_renamed_ends_with_a_model_and_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    (process,) = start([*SMALL, "--out", out, "--steps", "8"])
    wait_for(out, 2, process)
    out.rename(tmp_path / "moved")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "was moved or removed while its run goes on" in output, output[-2000:]
    assert (out / "hf" / "model.safetensors").exists() and metrics(out)[-1]["step"] == 8
    run([*SMALL, "--out", out, "--steps", "9", "--resume"])
    assert metrics(out)[-1]["step"] == 9
