"""support/trackers.py: each tracker read back by its own library, and libraries that fail.

    pytest tests/test_trackers.py
"""
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import srft
from conftest import ROOT
from support import runlog, trackers
from support.processes import Ranks
from support.runlog import RunLog
from support.trackers import Tracker, check_tracker

NAMES = ["tensorboard", "wandb", "trackio"]
SAMPLE = {"step": 2, "id": "a", "prompt": "1+1=?", "answer": "2", "response": "*three*", "reward": 0.0,
          "reason": "wrong"}


def a_run(folder, name, steps=(0, 1, 2), resumed=-1):
    """Steps of a run, of which the even ones are evaluated."""
    log = RunLog(folder, active=True, step=resumed, track=name)
    log.write_settings({"lr": 0.5, "model": "org/name"})
    for step in steps:
        log.write({"step": step, "reward/mean": step / 2, "perf/mfu": None}
                  | ({"eval/held": step / 4} if step % 2 == 0 else {}), [SAMPLE] if step else [])
    log.close()
    return log


# ----------------------------------------------------------------------------------------------------------
# By each library's own reader.

@pytest.mark.slow
def test_tensorboards_reader_finds_metrics_settings_samples_and_curves_also_of_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    a_run(tmp_path, "tensorboard")
    a_run(tmp_path, "tensorboard", steps=[2, 3], resumed=1)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)]
             for name in events.Tags()["scalars"]}
    assert found == {"reward/mean": [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)],
                     "eval/held": [(0, 0.0), (2, 0.5)]}
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in
             events.Tags()["tensors"]}
    assert '"lr": 0.5' in texts["config/text_summary"]
    assert "    *three*" in texts["samples/0/text_summary"]                # as code: not as three in italics
    assert events.Images("curves")[-1].width > 500


# wandb asks for an account only where it is to send: offline it has all but that.
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.mark.slow
def test_wandb_offline_keeps_metrics_settings_samples_and_curves_of_one_run_over_a_resume(
        tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a_run(tmp_path, "wandb")
        a_run(tmp_path, "wandb", steps=[2, 3], resumed=1)
    name = (tmp_path / "tracker.txt").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{name}.wandb"}
    history, settings = [], {}
    for file in files:
        for record in wandb_records(file):
            if record.HasField("run"):
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                                for item in record.history.item})
    assert settings["lr"] == 0.5
    rewards = [(row["step"], row["reward/mean"]) for row in history if "reward/mean" in row]
    assert rewards == [(0, 0.0), (1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5)]
    assert [row["eval/held"] for row in history if "eval/held" in row] == [0.0, 0.5, 0.5]
    shown = [row for row in history if "samples/_type" in row]
    assert shown[-1]["samples/_type"] == "table-file" and shown[-1]["curves/_type"] == "image-file"
    [table] = files[0].parent.glob(f"files/{shown[1]['samples/path']}")
    assert json.loads(table.read_text())["data"][0][:4] == ["a", "1+1=?", "2", "*three*"]


def wandb_records(file):
    """The records of a .wandb file: a log of LevelDB's kind after 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, place, content = file.read_bytes(), 7, b""
    while place + 7 < len(data):
        left = 32_768 - place % 32_768
        if left < 7:                                                       # too short for a header
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place:place + 7])
        content += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                                                 # a whole record, or its last part
            yield Record.FromString(content)
            content = b""


@pytest.mark.slow
def test_trackios_store_has_metrics_settings_samples_and_curves_of_one_run_over_a_resume(
        tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))             # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="--track")
        a_run(tmp_path / "run", "trackio")
        a_run(tmp_path / "run", "trackio", steps=[2, 3], resumed=1)
    name = (tmp_path / "run" / "tracker.txt").read_text().strip()
    assert SQLiteStorage.get_runs("srft") == [name]
    assert SQLiteStorage.get_run_config("srft", name)["lr"] == 0.5
    rows = SQLiteStorage.get_logs("srft", name)
    rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert rewards == [(0, 0.0), (1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5)]
    shown = [row for row in rows if "samples" in row]
    assert shown[1]["samples"]["_value"][0]["response"] == "*three*"
    assert shown[-1]["curves"]["_type"] == "trackio.image"


# ----------------------------------------------------------------------------------------------------------
# Trackers that fail.

class Recorder:
    """A tracker that notes what it is told."""
    told = []

    def __init__(self, run, settings, step):
        self.told.append("begin")

    def log(self, step, metrics):
        self.told.append(metrics)

    def show(self, step, samples):
        self.told.append(samples)

    def close(self):
        self.told.append("close")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", str)                        # takes a second each time
    monkeypatch.setattr(Recorder, "told", [])
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recorder)
    return Recorder


def test_a_tracker_gets_numbers_only_samples_as_text_and_its_end(recorder, tmp_path):
    a_run(tmp_path, "wandb", steps=[1, 2])
    shown = ["a", "1+1=?", "2", "*three*", "0.0", "wrong"]
    assert recorder.told == ["begin", {"reward/mean": 0.5},
                             {"reward/mean": 1.0, "eval/held": 0.5}, [shown], "close"]


def test_an_evaluation_after_a_resume_reaches_the_tracker_too(recorder, tmp_path):
    log = RunLog(tmp_path, active=True, step=2, track="wandb")
    log.write_settings({})
    log.amend(2, {"eval/held": 0.5})
    log.close()
    assert recorder.told == ["begin", {"eval/held": 0.5}, [], "close"]


@pytest.mark.parametrize("method", ["__init__", "log", "show", "close"])
@pytest.mark.parametrize("error", [RuntimeError, ImportError, SystemExit])
def test_a_tracker_that_raises_is_one_warning_and_the_run_goes_on(
        method, error, recorder, tmp_path, monkeypatch):
    def fail(*_):
        raise error("no network")

    monkeypatch.setattr(recorder, method, fail)
    with pytest.warns(UserWarning) as caught:
        a_run(tmp_path, "wandb", steps=range(6))
    assert [str(warning.message) for warning in caught] == [
        f"--track wandb: {error.__name__}: no network. The run goes on without it; metrics.jsonl has all"]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6 and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("method", ["__init__", "log", "show", "close"])
def test_a_tracker_that_hangs_keeps_no_step_waiting_and_the_end_not_for_long(
        method, recorder, tmp_path, monkeypatch):
    released = threading.Event()

    def hang(*_):
        released.wait(30)

    monkeypatch.setattr(recorder, method, hang)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    with pytest.warns(UserWarning, match="--track wandb: not done 0.2 s after the end"):
        a_run(tmp_path, "wandb")
    released.set()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


NO_NETWORK = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
SENDS = """
import sys
from support.trackers import Tracker
tracker = Tracker("wandb", sys.argv[1], {}, -1)
tracker.log(0, {"a": 1})
tracker.close()
print("DONE")
"""


@pytest.mark.slow
@pytest.mark.parametrize("variables, error", [({}, "UsageError: No API key"), (NO_NETWORK, "CommError")],
                         ids=["no account", "no network"])
def test_wandb_itself_without_account_or_network_is_one_warning_and_lets_the_program_end(
        variables, error, tmp_path):
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)} | variables
    done = subprocess.run([sys.executable, "-c", SENDS, tmp_path], env=environment, cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=100)
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr
    assert done.stderr.count("--track wandb: ") == 1 and f"--track wandb: {error}" in done.stderr, done.stderr


def test_a_rank_that_does_not_write_has_no_tracker(recorder, tmp_path):
    log = RunLog(tmp_path / "run", active=False, step=-1, track="wandb")
    log.write_settings({})
    log.write({"step": 1})
    log.close()
    assert recorder.told == [] and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------
# Which one.

@pytest.fixture
def installed(monkeypatch):
    """A function: from now on, these trackers are installed and no others."""
    find = importlib.util.find_spec

    def these(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: (
            (object() if name in names else None) if name in NAMES else find(name, *package)))

    return these


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_asked_for_and_not_installed_is_refused_with_the_command_that_installs_it(
        name, installed):
    installed(*[other for other in NAMES if other != name])
    with pytest.raises(ValueError, match=f"--track {name}: it is not installed: pip install {name}"):
        check_tracker(name)
    for other in ("auto", "none", *NAMES):
        if other != name:
            check_tracker(other)


def test_a_run_refuses_it_before_the_model_is_loaded(installed, monkeypatch, tmp_path):
    installed()
    monkeypatch.setattr(srft, "fetch", None)
    monkeypatch.setattr(srft, "init_distributed", lambda _: Ranks(0, 1, torch.device("cpu"), None))
    command = ["srft.py", "--preset", "tiny", "--device", "cpu", "--track", "wandb", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="pip install wandb"):
        srft.main()


def test_by_default_it_is_tensorboard_where_that_is_installed(installed, tmp_path, monkeypatch):
    installed("wandb", "trackio")
    assert Tracker("auto", tmp_path, {}, -1).over
    installed("tensorboard")
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Recorder)
    tracker = Tracker("auto", tmp_path, {}, -1)
    tracker.close()
    assert tracker.name == "tensorboard"


@pytest.mark.parametrize("folder", ["tiny", "a b/c d", "x" * 200, "\u00e9\u4e2d#?"])
def test_a_run_has_a_name_that_no_other_has_and_keeps_it_over_a_resume_but_not_over_a_new_beginning(
        folder, tmp_path):
    run = tmp_path / folder
    run.mkdir(parents=True)
    name = trackers.run_name(run, -1)
    assert len(name) <= 80 and not set(name) & set("/\\#?%: ") and name.isascii()
    assert trackers.run_name(run, 7) == name
    assert trackers.run_name(run, -1) != name
