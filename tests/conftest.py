"""Shared by all tests: starting the program in processes of its own, one or several ranks."""
import json
import os
import random
import socket
import tempfile
from pathlib import Path

import pytest

import preloaded

ROOT = Path(__file__).resolve().parents[1]
# The program must not need a hub, a GPU, or more than one thread a process.
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT)}
ENV = os.environ | SETTINGS                 # of the processes that tests start
os.environ.update(SETTINGS)                 # of the tests' own process


def pytest_collection_modifyitems(items):
    """The longest files first: whoever is done early then finds something left to do."""
    longest = ("test_experiments.py", "test_run.py", "test_eval.py", "test_reward.py", "test_bench_faults.py",
               "test_bench_gpu.py", "test_distributed.py")
    items.sort(key=lambda item: item.path.name not in longest)           # stable: else as before


def free_port():
    """For a server that starts seconds later. Not one that the system may give away meanwhile: it takes those
    of outgoing connections from 32768 on."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):                # nobody answers
                return port


LOGS = tempfile.TemporaryDirectory()


def start(args, ranks=1, per_node=None):
    """Start `python args` on `ranks` ranks as torchrun would (per_node < ranks pretends several nodes)."""
    per_node, port, processes = per_node or ranks, free_port(), []
    for rank in range(ranks):
        env = ENV | {"RANK": rank, "LOCAL_RANK": rank % per_node, "MASTER_ADDR": "127.0.0.1",
                     "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": per_node, "MASTER_PORT": port}
        processes.append(preloaded.start(args, env, tempfile.mktemp(dir=LOGS.name)))
    return processes


def run(args, ranks=1, per_node=None, timeout=240, ok=True):
    """Run to the end; returns rank 0's output. Fails the test on a non-zero exit (ok=False: on a zero one),
    and on a hang."""
    processes = start(args, ranks, per_node)
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert ok is not any(p.returncode for p in processes), "\n".join(o[-3000:] for o in outputs)
    return outputs[0]


# A whole run in seconds: 4 prompts x 4 rollouts.
SMALL = ["srft.py", "--preset", "tiny", "--device", "cpu", "--data", "tiny:few", "--eval_data", "",
         "--prompts_per_step", "4", "--n_rollouts", "4", "--save_every", "2", "--engine_sequences", "32",
         "--grader_workers", "1", "--track", "none"]


def metrics(out):
    """The rows of a run's metrics.jsonl without what a clock or an allocator decides."""
    rows = []
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if not name.startswith(("time/", "perf/"))})
    return rows


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """One uninterrupted run of 6 steps on 1 rank, of which the second is profiled; returns its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run([*SMALL, "--out", out, "--steps", "6", "--profile", "2"])
    return out
