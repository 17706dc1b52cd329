"""support/watch.py: a run that hangs ends by itself and names the rank that is behind; errors name rank and
phase. support/processes.py, support/device.py: the group, and which device a run takes. support/profiler.py.

    pytest tests/test_processes.py
"""
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import srft
from conftest import ENV, ROOT, SMALL, free_port, start
from support import device, processes, watch

MINUTES = 0.04                    # 2.4 s in one phase


def finish(args, ranks=2, per_node=None, limit_s=240):
    """Start, wait; returns (outputs, exit codes). Fails if a rank does not end by itself."""
    started = start(args, ranks, per_node)
    try:
        outputs = [p.communicate(timeout=limit_s)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    return outputs, [p.returncode for p in started]


def test_where_all_ranks_are_is_one_line_that_names_those_behind(monkeypatch):
    now, store = time.time(), dist.HashStore()
    for rank in range(8):
        place = watch.Place(59, "exchange", 12, now - 1800 - rank)
        if rank == 3:
            place = watch.Place(57, "rollout", 12, now - 1860)
        store.set(str(rank), json.dumps(place))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(watch._here, "store", store)
    monkeypatch.setattr(watch._here, "place", watch.Place(59, "exchange", 12, now - 1800))
    assert watch.whereabouts() == (
        "phase 'exchange' of step 12 for 0:30:00. Behind the others: rank 3 in phase 'rollout' of step 12 "
        "for 0:31:00; then ranks 0-2, 4-7 in phase 'exchange' of step 12 for 0:30:07")
    store.set("3", json.dumps((59, "exchange", 12, now)))
    assert watch.whereabouts().startswith("phase 'exchange' of step 12 for 0:30:00, like all ranks")
    monkeypatch.setattr(watch._here, "store", None)                   # alone, or rank 0 is gone
    monkeypatch.delenv("WORLD_SIZE")                                      # an error before there is a group
    assert watch.whereabouts() == "phase 'exchange' of step 12 for 0:30:00"


def test_a_mistake_is_one_line_and_a_library_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    in_one_line = processes.mistakes_in_one_line
    expected = r"^srft.py \(rank 1\): 3 ranks are not whole nodes of 2"
    with pytest.raises(SystemExit, match=expected), in_one_line("srft.py"):
        processes.mesh_shape(3, 2)
    with pytest.raises(SystemExit, match="No such file"), in_one_line("srft.py"):
        (tmp_path / "none").read_text()
    with pytest.raises(json.JSONDecodeError), in_one_line("srft.py"):
        json.loads("{")


@pytest.mark.parametrize("where", ["setup", "train"])
def test_a_full_gpu_comes_with_what_to_do(where, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(srft, "setup", lambda cfg: None)
    monkeypatch.setattr(srft, where, full)
    monkeypatch.setattr(sys, "argv", ["srft.py", "--preset", "tiny"])
    with pytest.raises(torch.OutOfMemoryError) as raised:
        srft.main()
    notes = "\n".join(raised.value.__notes__)              # the hang watch's, too: in which phase
    assert "raise --recompute" in notes and "--dry_run" in notes


NVIDIA = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue"


def no_card(monkeypatch, build="13.0", driver=NVIDIA, hidden=None):
    """A torch built for this CUDA on a machine with this driver, whose cards torch cannot use."""
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = Path.read_text

    def read(path, *args, **kwargs):
        if str(path) != "/proc/driver/nvidia/version":
            return text(path, *args, **kwargs)
        if driver is None:
            raise FileNotFoundError(path)
        return driver

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)


def test_a_build_for_gpus_without_a_usable_one_is_refused_with_what_it_needs_and_what_was_found(monkeypatch):
    no_card(monkeypatch)
    expected = r"CUDA 13.0 and finds no usable GPU. .* r580 or newer; found is 550.54.15. .*--device cpu"
    with pytest.raises(ValueError, match=expected):
        processes.init_distributed()
    assert not dist.is_initialized()                                  # before any group, and before any model
    no_card(monkeypatch, driver=None)
    with pytest.raises(ValueError, match="none is loaded here .in a container"):
        device.choose_device("cuda")
    no_card(monkeypatch, build="12.8", hidden="")
    expected = "r525 .*CUDA_VISIBLE_DEVICES is '', which may hide the cards: unset it"
    with pytest.raises(ValueError, match=expected):
        device.choose_device()


def test_on_purpose_a_build_for_gpus_runs_on_the_cpu_and_a_build_for_cpus_refuses_a_gpu(monkeypatch):
    no_card(monkeypatch)
    assert device.choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.choose_device().type == "cpu"
    with pytest.raises(ValueError, match="--device cuda: .* built for CPUs alone"):
        device.choose_device("cuda")


def test_each_rank_takes_the_card_of_its_place_on_the_node_and_one_rank_too_many_is_refused(monkeypatch):
    no_card(monkeypatch, hidden="4,5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose_device("auto", 1) == torch.device("cuda", 1)
    expected = r"local rank 2 has no GPU .* shows 2 \(CUDA_VISIBLE_DEVICES is 4,5\); start --nproc_per_node=2"
    with pytest.raises(ValueError, match=expected):
        device.choose_device("cuda", 2)


@pytest.mark.parametrize("name, card, teraflops", [
    ("NVIDIA H100 80GB HBM3", "H100", 989), ("NVIDIA H100 PCIe", "H100 PCIe", 756),
    ("NVIDIA H100 NVL", "H100 NVL", 835), ("NVIDIA H200", "H200", 989), ("NVIDIA H200 NVL", "H200 NVL", 835),
    ("NVIDIA B200", "B200", 2250), ("NVIDIA GB200", "GB200", 2500), ("NVIDIA GH200 480GB", "GH200", 989),
    ("NVIDIA A100-SXM4-80GB", "A100", 312), ("NVIDIA A100 80GB PCIe", "A100", 312),
    ("NVIDIA L40S", "L40S", 362), ("NVIDIA GeForce RTX 4090", "RTX 4090", 165), ("NVIDIA A10", None, None),
    ("Tesla T4", None, None)])
def test_the_peak_is_that_of_the_very_card(name, card, teraflops):
    assert device.peak_flops(name) == (card, teraflops and teraflops * 1e12)


@pytest.mark.slow
def test_a_rank_that_sleeps_in_a_whole_run_ends_it_and_both_ranks_name_it(tmp_path):
    outputs, codes = finish(["tests/ranks.py", "sleeper", *SMALL[1:], "--steps", "3",
                             "--hang_minutes", "0.25", "--out", tmp_path / "run"])
    assert codes == [1, 1], outputs
    for rank, output in enumerate(outputs):
        assert output.count("HANG") == 1 and f"ranks.py (rank {rank}): HANG: ranks.py (rank" in output
        assert "Behind the others: rank 1 in phase 'rollout' of step 2" in output
        assert "then rank 0 in phase 'exchange' of step 2" in output
    assert "in generate" in outputs[1] and "in all_gather_object" in outputs[0]             # the stacks
    slept = float(re.findall(r"SLEEPS AT ([\d.]+)", outputs[1])[-1])
    assert time.monotonic() - slept < 15 + 40                            # the limit; looking, telling, ending


@pytest.mark.slow
def test_a_run_that_only_starts_slowly_goes_through_on_two_nodes():
    # Its groups' timeouts are asserted there.
    outputs, codes = finish(["tests/phases.py", "long first step", MINUTES], per_node=1)
    assert codes == [0, 0], outputs
    assert all("DONE" in output and "HANG" not in output for output in outputs)


@pytest.mark.slow
def test_a_rank_whose_c_code_keeps_the_gil_ends_too_and_the_other_names_it():
    outputs, codes = finish(["tests/phases.py", "keep the GIL", MINUTES])
    assert codes == [1, 1], outputs
    assert "Behind the others: rank 1 in phase 'rollout' of step 2" in outputs[0]
    assert "Timeout" in outputs[1] and "in match" in outputs[1]                         # faulthandler's stack


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])                                  # rank 0 takes the store with it
def test_when_a_rank_is_killed_the_error_of_the_other_names_its_own_rank_and_phase(victim):
    outputs, codes = finish(["tests/phases.py", f"kill {victim}", MINUTES])
    other = 1 - victim
    assert codes[victim] == -9 and codes[other] == 1, outputs
    assert "Traceback" in outputs[other] and "in steps" in outputs[other]
    expected = rf"phases.py \(rank {other}\): phase 'train' of step 2 for 0:00:0\d"
    assert re.search(expected, outputs[other], re.M)


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others_too_which_name_it():
    outputs, codes = finish(["tests/phases.py", "raise", 0.2])
    assert codes == [1, 1] and "KeyError: 'a bug'" in outputs[1]
    assert "phases.py (rank 1): phase 'train' of step 2" in outputs[1]
    expected = "phases.py (rank 0): phases.py (rank 1) failed (KeyError). Here: phase 'train' of step 2"
    assert expected in outputs[0], outputs[0]


@pytest.mark.slow
def test_a_path_that_only_one_node_has_is_an_error_on_all_ranks_and_no_hang(tmp_path):
    outputs, codes = finish(["tests/phases.py", f"fetch {tmp_path}", 0.2], per_node=1)
    assert codes == [1, 1] and not any("FETCHED /" in output or "HANG" in output for output in outputs)
    assert all("only ranks [0] have this path; put it on every node" in output for output in outputs), outputs


def tree(pid):
    """A process and all that descend from it: torchrun's ranks lead sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [pid]
    for child in children:
        found += tree(int(child))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("lost", [0, 1])                            # node 0 takes torchrun's store with it
def test_when_a_node_is_lost_the_other_ends_by_itself_and_names_it(lost, number, tmp_path):
    command = [str(Path(sys.executable).with_name("torchrun")), "--nnodes=2", "--nproc_per_node=2",
               "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes, logs = [], [tmp_path / "0", tmp_path / "1"]
    try:
        for node_rank, log in enumerate(logs):
            nodes.append(subprocess.Popen(
                [*command, f"--node_rank={node_rank}", "tests/phases.py", "forever", "0.2"],
                env=ENV, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT))
        until(lambda: all(log.read_text().count("STEP 5\n") == 2 for log in logs), 60)
        ranks = tree(nodes[lost].pid)
        for pid in ranks:
            os.kill(pid, number)
        assert nodes[1 - lost].wait(timeout=60) == 1, logs[1 - lost].read_text()
        says = rf"LOST: ranks 2-3 on node {socket.gethostname()}, silent for 0:00:.*--resume"
        if lost == 0:
            says = "LOST: node 127.0.0.1, which holds the group's store, is silent for 0:00:.*--resume"
        assert re.search(says, logs[1 - lost].read_text()), logs[1 - lost].read_text()
    finally:
        for node in nodes:
            if node.poll() is None:
                for pid in tree(node.pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_that_is_lost_before_it_has_joined_is_missed_and_named(tmp_path):
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2", "tests/phases.py",
               "absent", "0.1"]
    log = tmp_path / "log"
    node = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT)
    try:
        until(lambda: "LOST: rank 1 did not join within 0:00:06: killed" in log.read_text(), 60)
    finally:
        for pid in tree(node.pid):
            os.kill(pid, signal.SIGKILL)


def until(condition, timeout):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.1)


def test_a_mesh_is_one_node_or_whole_nodes():
    assert processes.mesh_shape(4, 8) == {"mesh_shape": (4,), "mesh_dim_names": ("shard",)}
    assert processes.mesh_shape(16, 8) == {"mesh_shape": (2, 8), "mesh_dim_names": ("replicate", "shard")}
    with pytest.raises(ValueError, match="12 ranks are not whole nodes of 8"):
        processes.mesh_shape(12, 8)


@pytest.mark.slow
def test_one_process_without_torchrun_is_watched_too():
    done = subprocess.run([sys.executable, "tests/phases.py", "sleep", str(MINUTES)], env=ENV, cwd=ROOT,
                          text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"HANG.* Here: phase 'rollout' of step 2 for 0:00:0\d$", done.stderr, re.M)


@pytest.mark.slow
def test_a_profile_of_one_step_holds_its_phases_and_operators_and_no_other_step(whole_run):
    folder = whole_run / "profile"
    with gzip.open(folder / "trace-rank0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for name in ("rollout", "grade", "exchange", "train", "sync"):
        assert names.count(name) == 1
    assert "aten::mm" in names
    assert "checkpoint" not in names
    assert "aten::mm" in (folder / "operators-rank0.txt").read_text()


def said_by(code, ranks=1):
    """Run the code on ranks, and return what each says. No forks of this process: in one, the locks that its
    other threads held stay locked for ever."""
    port, children = free_port(), []
    for rank in range(ranks):
        env = ENV | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                     "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children.append(subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        return [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("a file")
    code = f"""
import pathlib, torch.distributed as dist
from support.processes import init_distributed
from support.profiler import start_profiler, write_profile
init_distributed("cpu")
write_profile(start_profiler(), pathlib.Path({str(tmp_path / "profile")!r}))
print("WENT ON")
"""
    (said,) = said_by(code)
    assert "WENT ON" in said and "could not write the profile" in said, said


def test_a_signal_after_the_group_is_gone_ends_nothing():
    code = """
import os, signal
import torch.distributed as dist
from support.processes import init_distributed
from support.watch import finish_step_on_signals
init_distributed("cpu")
received = finish_step_on_signals()
dist.destroy_process_group()
os.kill(os.getpid(), signal.SIGTERM)
print("WENT ON", received)
"""
    (said,) = said_by(code)
    assert "WENT ON [15]" in said and "finishing this step" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_outlasts_the_time_of_silence_is_not_lost_to_itself(ranks):
    """Alone there is no store to hear from, ever; with others there are signs of life."""
    code = """
import time
from support import processes, watch
watch.SILENT_MINUTES = 0.02
with watch.hang_watch():
    processes.init_distributed("cpu")
    time.sleep(4)
    watch.wait_for_all()
print("DONE")
"""
    for process in start(["-c", code], ranks):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "DONE" in output, output


def test_what_differs_between_ranks_or_fails_on_one_is_an_error_on_all():
    code = """
from support.collectives import agreed, all_or_none, anyone, from_rank_0, of_all_ranks
from support.processes import init_distributed
rank, world, *_ = init_distributed("cpu")
agreed("--seed", 3)
print("ALL", of_all_ranks(rank), anyone(rank == 1), anyone(False))
try:
    agreed("--data", rank)
except ValueError as error:
    print("SAID", error)
try:
    with all_or_none():
        if rank == 1:
            raise OSError
except ValueError as error:
    print("SAID", error)
def look():
    if rank == 1:
        raise AssertionError
    return "rank 0's"
def fail():
    raise FileNotFoundError("gone")
print("FIRST", from_rank_0(look))
try:
    from_rank_0(fail)
except FileNotFoundError as error:
    print("SAID", error)
"""
    for output in said_by(code, ranks=2):
        assert "ALL [0, 1] True False" in output, output
        assert "SAID --data: ranks [1] read another one than rank 0; put the same on every node" in output
        assert "SAID OSError()" in output
        assert "FIRST rank 0's" in output and "SAID gone" in output
