"""bench/faults.py: what it says of a run that is as it should be, and of one that is not."""
import argparse
import re
import subprocess
import sys

import pytest

from bench import faults
from conftest import ENV, ROOT

# Stands for a run: a second of work, then its files; what it writes can be spoilt by a file beside it.
RUN = """
import pathlib, subprocess, sys, time
out = pathlib.Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
if (out / "leave a child").exists():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(1)
(out / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "time/step": %f}\\n' % time.time())
(out / "samples.jsonl").write_text("")
(out / "hf").mkdir()
(out / "hf" / "model.safetensors").write_bytes(b"spoilt" if (out / "spoilt").exists() else b"weights")
"""


def touch(name):
    def fault(job, dice):
        job.out.mkdir(parents=True, exist_ok=True)
        (job.out / name).write_text("")
        job.send(job.processes())
    return fault


@pytest.mark.slow
@pytest.mark.parametrize("fault, says", [
    (faults.KINDS["kill -9 of all"], None),
    (faults.KINDS["SIGTERM"], None),
    (touch("spoilt"), "other weights"),
    (touch("leave a child"), "left processes behind"),
    (lambda job, dice: "was not refused", "was not refused")])
def test_what_differs_is_left_behind_or_not_refused_is_reported(fault, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(faults, "RUN", [sys.executable, "-c", RUN])
    monkeypatch.setattr(faults, "GRACE_S", 1)
    monkeypatch.setattr(faults, "KINDS", {"it": fault})
    args = argparse.Namespace(seed=0, minutes=0.05, kinds="it")
    with (tmp_path / "log").open("w") as log:
        wrong = faults.torment(args, tmp_path / "disk" / "run", log)
    assert "faults in" in capsys.readouterr().out
    assert (not wrong) if says is None else any(says in text for text in wrong), wrong


@pytest.mark.slow
def test_some_seconds_of_faults_change_nothing(tmp_path):
    # By this seed the first comes after 0.17 of the time that a run takes: on a slow machine, too, in time.
    done = subprocess.run([sys.executable, "-m", "bench.faults", "--minutes", "0.5", "--seed", "4", "--kinds",
                           "kill -9 of all,SIGTERM,disk full", "--out", tmp_path / "f"], cwd=ROOT, env=ENV,
                          text=True, capture_output=True, timeout=1200)
    assert done.returncode == 0 and "wrong: 0" in done.stdout, done.stdout + done.stderr
    assert re.search("^[1-9][0-9]* faults in", done.stdout, re.M), done.stdout
