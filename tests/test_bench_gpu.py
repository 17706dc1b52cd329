"""bench/gpu.py on a CPU: its parts run and find what is wrong, its runner keeps what it had.

    pytest tests/test_bench_gpu.py            # -m "not slow" leaves out the whole bench
"""
import json
import math
import subprocess
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import gpu
import gpu_parts
import model as M
from bench import plan
from config import Config
from conftest import ENV, ROOT
from support import logprobs

CPU = torch.device("cpu")


def rows(folder, part):
    return json.loads((folder / f"{part}.json").read_text())["rows"]


def verdicts(folder, part):
    return {row["what"]: gpu.verdict(row["ok"]) for row in rows(folder, part)}


# ----------------------------------------------------------------------------------------------------------
# Rows.

def test_a_row_is_in_both_files_as_soon_as_it_is_known_and_the_next_process_adds_to_it(tmp_path):
    gpu.Report(tmp_path, "mfu").add("8,192 tokens", "a | b", number=7.0)
    assert rows(tmp_path, "mfu")[0]["number"] == 7.0
    assert "| mfu  | 8,192 tokens | a / b |" in (tmp_path / "gpu.md").read_text()
    later = gpu.Report(tmp_path, "mfu")
    later.below("error", 1e-3, 1e-2)
    assert [row["what"] for row in rows(tmp_path, "mfu")] == ["8,192 tokens", "error"]
    warm = gpu.Report(tmp_path, "warm")
    assert warm.number("mfu", "8,192 tokens") == 7.0
    assert warm.number("mfu", "unknown") is warm.number("engine", "start") is None


def test_an_exception_becomes_a_row_and_what_follows_goes_on(tmp_path):
    report = gpu.Report(tmp_path, "kernels")
    with report.attempt("a kernel"):
        raise TypeError("got an unexpected\nkeyword")
    report.add("the next", "1")
    assert rows(tmp_path, "kernels")[0]["found"] == "TypeError: got an unexpected keyword"
    assert verdicts(tmp_path, "kernels") == {"a kernel": "FAIL", "the next": "-"}
    assert report.number("kernels", "a kernel") is None


@pytest.mark.parametrize("error, ok", [(0.009, True), (0.01, False), (math.nan, False), (math.inf, False)])
def test_an_error_is_right_below_its_limit_and_nan_never_is(error, ok, tmp_path):
    report = gpu.Report(tmp_path, "kernels")
    report.below("error", error, 0.01)
    assert report.rows[0]["ok"] is ok


def test_the_table_names_the_machine_and_has_the_parts_in_their_order(tmp_path):
    machine = {"gpu": "NVIDIA H100, 580.1", "cpu": "a CPU", "python": "3.12",
               "versions": {"torch": "2.11.0"}, "git_commit": None}
    gpu.Report(tmp_path, "decode", machine).add("128 sequences", "9,000 tokens/s")
    gpu.Report(tmp_path, "kernels", machine).add("attention", "TypeError", ok=False)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert lines[:2] == ["NVIDIA H100, 580.1; Python 3.12, torch 2.11.0; commit unknown.", ""]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["part", "what", "found", "expected", ""] and set(cells[1][0]) == {"-"}
    assert cells[2:] == [["kernels", "attention", "TypeError", "", "FAIL"],
                         ["decode", "128 sequences", "9,000 tokens/s", "", "-"]]
    assert len({len(line) for line in lines[2:]}) == 1


# ----------------------------------------------------------------------------------------------------------
# Processes.

def worker(code):
    """A process that waits for a line, like those of start_worker, and then runs `code`."""
    code = f"import sys, time, os\nsys.stdin.readline()\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, process_group=0)


def supervised(folder, codes, **limits):
    """supervise() on parts whose only task is a piece of code; seconds of each part by keyword."""
    parts = {name: gpu.Part(limits.get(name, 60), ("task",)) for name in codes}
    with mock.patch.object(gpu, "PARTS", parts):
        return gpu.supervise(folder, list(codes), lambda name, task: worker(codes[name]))


@pytest.mark.slow
def test_a_part_over_its_limit_is_stopped_with_its_children_and_the_next_goes_on(tmp_path):
    alive = tmp_path / "alive"
    child = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 2; touch {alive}']); time.sleep(60)"
    after = f"time.sleep(2.5); open('{tmp_path}/ran', 'w')"
    assert not supervised(tmp_path, {"mfu": child, "decode": after}, mfu=0.5)
    assert rows(tmp_path, "mfu")[0]["found"] == "stopped after 0 s" and (tmp_path / "ran").exists()
    assert verdicts(tmp_path, "mfu") == {"process of `task`": "FAIL"} and not alive.exists()
    assert verdicts(tmp_path, "decode") == {"process of `task`": "-"}


def test_a_process_that_dies_before_its_turn_is_a_row_and_the_next_goes_on(tmp_path):
    def start(name, task):
        if name == "decode":
            return worker(f"open('{tmp_path}/ran', 'w')")
        dead = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], stdin=subprocess.PIPE,
                                text=True, process_group=0)
        dead.wait()
        return dead

    parts = {name: gpu.Part(60, ("task",)) for name in ("mfu", "decode")}
    with mock.patch.object(gpu, "PARTS", parts):
        assert not gpu.supervise(tmp_path, ["mfu", "decode"], start)
    assert rows(tmp_path, "mfu")[0]["found"] == "ended with exit code 3" and (tmp_path / "ran").exists()


def test_a_process_that_dies_is_a_row_and_fails_the_run(tmp_path):
    assert not supervised(tmp_path, {"mfu": "os._exit(3)", "decode": ""})
    assert rows(tmp_path, "mfu")[0]["found"] == "ended with exit code 3"
    assert supervised(tmp_path / "fine", {"decode": ""})


@pytest.mark.slow
def test_the_tasks_of_a_part_share_its_time(tmp_path):
    def start(name, task):
        return worker("time.sleep(0.7)")

    with mock.patch.dict(gpu.PARTS, engine=gpu.Part(1.0, ("a", "b"))):
        assert not gpu.supervise(tmp_path, ["engine"], start, patience=1)
        assert gpu.supervise(tmp_path / "patient", ["engine"], start, patience=5)
    assert verdicts(tmp_path, "engine") == {"process of `a`": "-", "process of `b`": "FAIL"}


def test_the_next_process_imports_while_one_works(tmp_path):
    started, waited = [], []

    def start(name, task):
        started.append(task)
        return worker(f"open('{tmp_path}/{task}', 'w')")

    def wait(process, seconds):
        assert len(started) == min(len(waited) + 2, 3)
        waited.append(process.wait())

    with (mock.patch.dict(gpu.PARTS, engine=gpu.Part(60, ("a", "b", "c"))),
          mock.patch.object(gpu, "wait", wait)):
        assert gpu.supervise(tmp_path, ["engine"], start)
    assert started == ["a", "b", "c"] and all((tmp_path / task).exists() for task in started)


@pytest.mark.parametrize("ok, code", [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_says_whether_a_check_failed_and_old_rows_of_the_part_are_gone(ok, code, tmp_path,
                                                                                     capsys):
    gpu.Report(tmp_path, "mfu").add("of an earlier run", "1", ok=False)

    def start(args, name, task):
        gpu.Report(tmp_path, name).add("found", "2", ok=ok)
        return worker("")

    with mock.patch.object(gpu, "start_worker", start), mock.patch.object(gpu.signal, "signal"):
        assert gpu.main(["mfu", "--device", "cpu", "--out", str(tmp_path)]) == code
    assert verdicts(tmp_path, "mfu") == {"found": gpu.verdict(ok), "process of `mfu`": "-"}
    assert "| mfu  | found " in capsys.readouterr().out


def test_table_gathers_json_files_and_an_unknown_part_is_an_error(tmp_path, capsys):
    gpu.Report(tmp_path, "mfu").add("of another call", "1")
    (tmp_path / "gpu.md").unlink()
    with mock.patch.object(gpu.signal, "signal"):
        assert gpu.main(["table", "--out", str(tmp_path)]) == 0
    assert "of another call" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit):
        gpu.main(["kernel", "--out", str(tmp_path)])
    assert "no such part: kernel; there are kernels, trainer" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Parts: right on what is right, and seen to find what is wrong.

@pytest.fixture
def report(tmp_path):
    return gpu.Report(tmp_path, "kernels")


def test_a_report_has_its_folder_before_its_first_row(tmp_path):
    assert gpu.Report(tmp_path / "a" / "new one", "kernels").folder.is_dir()


def failures(report):
    return [row["what"] for row in report.rows if row["ok"] is False]


def test_attention_products_and_heads_are_right_on_a_cpu(report):
    gpu_parts.kernels(report, CPU)
    assert len(report.rows) == 5 + 1 + 6 + 12 and not failures(report)


def test_sequences_that_see_each_other_are_found(report):
    real = M.packed_attention

    def one(*args, cu_seq_lens_q, **kwargs):
        return real(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)

    with mock.patch.object(M, "packed_attention", one):
        gpu_parts.attention(report, CPU)
    assert [what.split(", ")[2] for what in failures(report)] == ["1 + 7 + 30 + 64 tokens: output"]


def test_a_wrong_gradient_behind_a_right_output_is_found(report):
    real = M.packed_attention

    def steeper(module, q, k, v, *args, **kwargs):
        return real(module, q, k + 0.1 * (k - k.detach()), v, *args, **kwargs)

    with mock.patch.object(M, "packed_attention", steeper):
        gpu_parts.attention(report, CPU)
    assert len(failures(report)) == len(report.rows) - 1                # one token has no gradient of its key


def rounded_to_bf16(out, a, b, beta=1.0, alpha=1.0):
    out.mul_(beta).add_(alpha * (a @ b).float())


def without_beta(out, a, b, beta=1.0, alpha=1.0):
    out.copy_(alpha * (a.float() @ b.float()))


@pytest.mark.parametrize("broken", [rounded_to_bf16, without_beta])
def test_a_product_that_is_rounded_or_forgets_what_it_adds_to_is_found(broken, report):
    with mock.patch.object(logprobs, "_addmm_fp32", broken):
        gpu_parts.products(report, CPU)
    # The fp32 branch, or that with beta = 0, is right.
    assert len(failures(report)) == 4 and len(report.rows) == 6


def test_an_entropy_without_gradient_and_a_kl_of_another_temperature_are_found(report):
    right, right_kl = logprobs.token_logprobs, logprobs.token_kl

    def no_gradient(*args, entropy_grad=False):
        return right(*args)

    def other_temperature(*args):
        *tensors, temperature, chunk = args
        return right_kl(*tensors, 1.0, chunk)

    with (mock.patch.object(logprobs, "token_logprobs", no_gradient),
          mock.patch.object(logprobs, "token_kl", other_temperature)):
        gpu_parts.heads(report, CPU)
    found = failures(report)
    assert {what.split(",")[0] for what in found} == {"token_logprobs", "token_kl"}
    assert sum("entropy with gradient" in what for what in found) == 2 and len(found) == 6


def rollout(tokens, logprobs):
    return SimpleNamespace(tokens=tokens, logprobs=logprobs)


@pytest.mark.parametrize("again, ok, worst", [
    (([1, 2], [-1.0, -2.0]), True, 0),
    (([1, 2], [-1.0, -2.5]), False, 0.5),
    (([1, 3], [-1.25, -9.0]), False, 0.25),
    (([1, 3], [-1.0, -9.0]), False, 0),
    (([9, 9], [-9.0, -9.0]), False, math.nan)])
def test_another_token_or_another_log_prob_after_a_sync_is_found(again, ok, worst, report):
    gpu_parts.same_tokens(report, "again", [[rollout([1, 2], [-1.0, -2.0])]], [[rollout(*again)]])
    assert report.rows[0]["ok"] is ok and report.rows[0]["worst"] == pytest.approx(worst, nan_ok=True)


@pytest.mark.parametrize("mean, ok", [(0.01, True), (0.06, False), (math.nan, False)])
def test_an_engine_that_disagrees_with_the_trainer_is_found(mean, ok, report):
    metrics = {"engine/logp_diff_mean": mean, "engine/logp_diff_max": 1.0}
    gpu_parts.mismatch(report, "the product's head", metrics, torch.device("cuda"))
    assert report.rows[0]["ok"] is ok


def test_synchronisations_are_counted_at_the_line_that_waits():
    modes = []
    with mock.patch.object(torch.cuda, "set_sync_debug_mode", modes.append):
        with gpu_parts.synchronisations(torch.device("cuda")) as places:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation")
            warnings.warn("something else")
    (place, times), = places.items()
    assert place.startswith("test_bench_gpu.py:") and times == 3 and modes == ["warn", "default"]


@pytest.mark.slow
def test_the_patched_head_gives_fp32_sums_rounded_to_the_type_asked_for():
    layer = pytest.importorskip("vllm.model_executor.layers.logits_processor").LogitsProcessor
    hidden, head = torch.randn(3, 16).bfloat16(), SimpleNamespace(weight=torch.randn(24, 16).bfloat16())
    exact, before = hidden.float() @ head.weight.float().T, layer._get_logits
    for dtype in (torch.bfloat16, torch.float32):
        with gpu_parts.head_in(dtype):
            found = layer._get_logits(SimpleNamespace(org_vocab_size=21), hidden, head, None)
        assert found.dtype == dtype and torch.equal(found, exact[:, :21].to(dtype))
    assert layer._get_logits is before


@pytest.mark.parametrize("changes, failed", [
    ({}, 0), ({"step": 2}, 1), ({"grad_norm": math.inf}, 1), ({"steps_skipped": 1}, 1),
    ({"engine/logp_diff_mean": 0.1}, 1), ({"engine/logp_diff_mean": math.nan}, 2)])
def test_a_run_that_stops_early_or_is_not_finite_is_found(changes, failed, report, tmp_path):
    row = {"step": 4, "reward/mean": 0.1, "grad_norm": 1.0, "engine/logp_diff_mean": 1e-6,
           "engine/logp_diff_max": 1e-5, "steps_skipped": 0} | changes
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(row) + "\n")
    gpu_parts.last_step(report, "srft.py", tmp_path / "metrics.jsonl", 4, 1.0, CPU)
    assert len(failures(report)) == failed


@pytest.mark.slow
def test_a_command_that_fails_leaves_its_output_and_its_last_words(report, tmp_path):
    with pytest.raises(RuntimeError, match="exit code 2: srft.py: .*--no_such_flag"):
        gpu_parts.command(report, "srft.py", "--no_such_flag")
    assert "--no_such_flag" in (tmp_path / "srft.py.log").read_text()


# ----------------------------------------------------------------------------------------------------------
# The whole, in processes of its own.

def bench(folder, *parts):
    """Run these parts; every check must have passed and every row must be there. Returns gpu.md."""
    command = [sys.executable, "bench/gpu.py", *parts, "--device", "cpu", "--out", folder, "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not [row for part in parts for row in rows(folder, part) if row["ok"] is False]
    return (folder / "gpu.md").read_text()


@pytest.mark.slow
def test_the_plan_says_what_the_measured_peak_is_compared_with():
    cfg = Config(**gpu_parts.GPU.batch, recompute="all")
    found = plan.simulate(gpu_parts.shape(torch.device("cuda"), "wide"), cfg, world=1)
    assert found["peak"] == pytest.approx(gpu_parts.PLANNED_PEAK, rel=0.01)


@pytest.mark.slow
def test_the_parts_without_an_engine_run_where_there_is_no_vllm(tmp_path):
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text("raise ImportError('no vllm here')")
    with mock.patch.dict(ENV, PYTHONPATH=f"{tmp_path / 'site'}:{ROOT}"):
        table = bench(tmp_path, "kernels", "trainer", "mfu", "offload")
    for what in ("7B widths: check_packing", "tied: check_packing", "tiny: check_packing",
                 "its measured peak", "synchronisations of an update of",
                 "256 tokens, 0 of 2 blocks recomputed", "second update with --offload"):
        assert f"| {what}" in table
    assert "| MFU -, " in table                                          # a CPU has no peak


@pytest.mark.slow
def test_the_parts_with_an_engine_run_and_the_same_seeds_give_the_same_tokens_after_each_sync(tmp_path):
    table = bench(tmp_path, "engine", "warm", "end-to-end", "decode", "one-gpu")
    for name in ("7B widths", "tied"):
        for when in ("again, before any sleep", "after sync 1", "after sync 2"):
            assert f"| {name}: the same seeds {when}" in table
    assert table.count("| 4 of 4 responses equal, log-probs within 0 ") == 6 and "; the first took " in table
    assert "| step 2, reward" in table and "| step 4, reward" in table and "| 16 responses, " in table
    assert "| 4 sequences of 64 + 16 tokens, 2 layers" in table
    assert "| its second step, 2 prompts x 8 x 32 tokens" in table
