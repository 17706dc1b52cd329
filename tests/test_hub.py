"""support/hub.py and the benchmarks' names, by the real huggingface_hub and `datasets`, against a stand-in
for the hub on a loopback address.

    pytest tests/test_hub.py
"""
import doctest
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from bench import plan
from config import TINY
from conftest import ENV, ROOT, SMALL, free_port, start
from data import load_examples
from standin import StandIn
from support import hub as H
from support.hub import COMMITS, fetch
from tiny.task import rows

MODEL = {}
for file in [*Path(TINY).glob("*.json"), Path(TINY) / "model.safetensors"]:
    MODEL[file.name] = file.read_bytes()
CARD = {"README.md": b"---\nlicense: mit\n---\n"}


def lines(*some):
    return "".join(json.dumps(row) + "\n" for row in some).encode()


ROWS = lines(*rows("train")[:40])
SUMS = {**CARD, "main/train-00000-of-00002.jsonl": ROWS, "x.bin": b"0" * 9, "other/train.jsonl": ROWS,
        "main/train-00001-of-00002.jsonl": lines(*rows("train")[40:60]),
        "main/test-00000-of-00001.jsonl": lines(*rows("heldout")[:9])}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, and the clients of this process turned to it, with an empty cache."""
    with StandIn() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        COMMITS.clear()
        yield stand_in
        huggingface_hub.close_session()


def environment(stand_in, folder):
    """Of a process that is to find the stand-in where the hub is."""
    return ENV | {"HF_ENDPOINT": stand_in.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder),
                  "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def files_in(folder):
    return {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}


def test_the_inputs_and_outputs_in_the_docstring_are_true():
    failed, tried = doctest.testmod(H)
    assert tried and not failed


@pytest.mark.parametrize("name, parts", [
    ("a/b", ("a/b", None, "")), ("a/b@v1.0", ("a/b", "v1.0", "")), ("a/b/c/d", ("a/b", None, "c/d")),
    ("a/b@refs/pr/3/c", ("a/b", "refs/pr/3", "c")), ("a/b@new%2Fbranch", ("a/b", "new/branch", "")),
    ("a/b@refs/convert/parquet", ("a/b", "refs/convert/parquet", "")), ("/a/b/c", ("/a/b/c", None, "")),
    ("gpt2", ("gpt2", None, ""))])
def test_a_name_may_say_its_revision_and_a_place_within(name, parts):
    assert H.split_name(name) == parts


# ----------------------------------------------------------------------------------------------------------
# Only what is needed, from the commit that is asked for.

def test_of_a_model_the_weights_are_fetched_once_and_nothing_that_is_not_read(hub):
    files = {**MODEL, **CARD, "pytorch_model.bin": b"0", "onnx/model.onnx": b"0"}
    commit = hub.put("models", "me/tiny", files)
    folder = fetch("me/tiny", "model", "--model")
    assert files_in(folder) == set(MODEL) and COMMITS == {"me/tiny": commit}
    assert sorted(hub.downloads()) == sorted(MODEL)


@pytest.mark.parametrize("name, split, got", [
    ("me/sums/main", "train", ["main/train-00000-of-00002.jsonl", "main/train-00001-of-00002.jsonl"]),
    ("me/sums/main", "validation", ["main/test-00000-of-00001.jsonl"]),
    ("me/sums/other/train.jsonl", "train", ["other/train.jsonl"])])
def test_of_a_data_set_one_split_of_one_configuration_is_fetched(name, split, got, hub):
    commit = hub.put("datasets", "me/sums", SUMS)
    path = fetch(name, "dataset", "--data", split)
    assert sorted(hub.downloads()) == sorted(["README.md", *got]) and COMMITS == {name: commit}
    count = sum(SUMS[file].count(b"\n") for file in got)
    assert len(load_examples(path, split=split)) == count


@pytest.mark.parametrize("kind, name", [("models", "me/tiny"), ("datasets", "me/sums")])
def test_a_tag_or_a_commit_pins_a_model_and_data_where_main_has_gone_on(kind, name, hub):
    file = "config.json" if kind == "models" else "train.jsonl"
    files = {**MODEL, **CARD} if kind == "models" else {**CARD, "train.jsonl": ROWS}
    old = hub.put(kind, name, files, tag="v1")
    new = hub.put(kind, name, {**files, file: files[file] + b"\n"})
    for revision, commit in (("", new), ("@v1", old), ("@" + old, old), ("@main", new)):
        folder = fetch(name + revision, kind[:-1], "--flag")
        assert COMMITS[name + revision] == commit and Path(folder).name == commit
        assert (Path(folder) / file).read_bytes() == files[file] + b"\n" * (commit == new)


def test_several_configurations_of_a_data_set_are_named_before_anything_is_fetched(hub):
    hub.put("datasets", "me/sums", SUMS)
    says = "^--data me/sums: me/sums: holds several configurations, main, other: name one, as me/sums/main"
    with pytest.raises(FileNotFoundError, match=says):
        fetch("me/sums", "dataset", "--data")
    assert hub.downloads() == ["README.md"]


def test_data_in_another_format_is_named(hub):
    hub.put("datasets", "me/sums", {**CARD, "data.csv": b"0"})
    says = "no file of .parquet or .jsonl there; it has README.md, data.csv"
    with pytest.raises(FileNotFoundError, match=says):
        fetch("me/sums", "dataset", "--data")



def test_a_plan_reads_the_config_of_a_pinned_model_too(hub):
    hub.put("models", "me/tiny", MODEL, tag="v1")
    hub.put("models", "me/tiny", {"config.json": b"{}"})
    config, source = plan.read_config("me/tiny@v1")
    assert config.vocab_size == json.loads(MODEL["config.json"])["vocab_size"]
    assert source.startswith("me/tiny@v1 ")


# ----------------------------------------------------------------------------------------------------------
# What goes wrong.

@pytest.mark.parametrize("refusal, says", [
    ((403, "GatedRepo"), "GatedRepoError.*gated: accept its terms on its page .* `hf auth login` or a token"),
    ((401, "GatedRepo"), "GatedRepoError.*gated: accept its terms on its page .* `hf auth login` or a token"),
    ((404, "RepoNotFound"), "RepositoryNotFoundError.*Check its name; if it is private, run `hf auth login`"),
    ((403, ""), "The hub does not let this machine read it: log in by `hf auth login`, or set a token"),
    ((429, ""), "429.*Too many requests .*: wait some minutes, or log in by `hf auth login`"),
    ((503, ""), "503.*Without network, pass local paths")])
@pytest.mark.parametrize("kind, flag", [("models", "--model"), ("datasets", "--data")])
def test_what_the_hub_refuses_is_one_line_with_the_way_out(kind, flag, refusal, says, hub):
    hub.put(kind, "me/mine", {**MODEL, **CARD, "train.jsonl": ROWS})
    hub.refusals["me/mine"] = refusal
    with pytest.raises(FileNotFoundError, match=f"^{flag} me/mine: no such local path, .*{says}") as error:
        fetch("me/mine", kind[:-1], flag)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, says", [
    ("me/none", "RepositoryNotFoundError.*Check its name"),
    ("me/mine@v9", "RevisionNotFoundError.*stands behind the @"),
    ("/me/mine", "HFValidationError"), ("me/mine/config.json", "on the hub a model is called OWNER/NAME")])
def test_a_name_that_the_hub_does_not_know_is_one_line_too(name, says, hub):
    hub.put("models", "me/mine", MODEL)
    with pytest.raises(FileNotFoundError, match=f"^--model {name}: no such local path.*{says}") as error:
        fetch(name, "model", "--model")
    assert "\n" not in str(error.value)


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)            # by itself of 10 MB
    hub.put("models", "me/tiny", MODEL)
    hub.cuts["model.safetensors"] = 100_000
    folder = fetch("me/tiny", "model", "--model")
    assert (Path(folder) / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    ranges = [part for method, path, part in hub.asked if method == "GET" and path.endswith("safetensors")]
    assert ranges == ["", "bytes=100000-"], hub.asked


def test_a_warm_cache_needs_no_network_and_a_cold_or_torn_one_is_named(hub, monkeypatch):
    hub.put("models", "me/tiny", MODEL, tag="v1")
    hub.put("datasets", "me/sums", SUMS)
    names = [("me/tiny", "model"), ("me/tiny@v1", "model"), ("me/sums/main", "dataset")]
    warm = [fetch(name, kind, "--flag") for name, kind in names]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert [fetch(name, kind, "--flag") for name, kind in names] == warm
    for name, kind in (("me/other", "model"), ("me/tiny@v2", "model"), ("me/sums/other", "dataset")):
        with pytest.raises(FileNotFoundError, match="Without network, pass local paths"):
            fetch(name, kind, "--flag")
    (Path(warm[2]) / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="cannot find the requested files"):
        fetch("me/sums/main", "dataset", "--data")
    assert len(hub.asked) == asked


# ----------------------------------------------------------------------------------------------------------
# Several ranks.

RANKS = """
import os
from huggingface_hub import constants
os.environ.update(HF_ENDPOINT="{endpoint}", HF_HOME="{cache}", HF_UPDATE_DOWNLOAD_COUNTS="0")
constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = "{endpoint}", "{cache}", False
constants.HUGGINGFACE_CO_URL_TEMPLATE = "{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
from paper.benchmarks import load_benchmark
from support.hub import COMMITS, fetch
from support.processes import init_distributed, mistakes_in_one_line
init_distributed("cpu")
with mistakes_in_one_line("test"):
    fetch("me/tiny", "model", "--model")
    fetch("me/sums/main", "dataset", "--data")
    print("HAVE", sorted(COMMITS))
    print("ASKED", len(load_benchmark("gsm8k@v1", 0, log=str)[1]))
    fetch("me/gated", "model", "--reference")
"""


def put_gsm8k(hub):
    """The benchmark in miniature, and another one after it on main. Returns the first commit, v1."""
    questions = lines(*[{"question": "1+1=?\n", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"}] * 4)
    card = (b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n"
            b"    path: main/train.jsonl\n  - split: test\n    path: main/test.jsonl\n---\n")
    files = {"README.md": card, "main/train.jsonl": b"{}\n" + questions, "main/test.jsonl": questions}
    pinned = hub.put("datasets", "openai/gsm8k", files, tag="v1")
    hub.put("datasets", "openai/gsm8k", {**files, "main/test.jsonl": b"{}\n"})
    return pinned


@pytest.mark.slow
@pytest.mark.parametrize("per_node", [2, 1], ids=["one node", "two nodes"])
def test_one_rank_a_node_downloads_the_others_find_it_and_all_end_alike(per_node, hub, tmp_path):
    hub.put("models", "me/tiny", MODEL)
    hub.put("datasets", "me/sums", SUMS)
    put_gsm8k(hub)
    hub.refusals["me/gated"] = (403, "GatedRepo")
    code = RANKS.format(endpoint=hub.endpoint, cache=tmp_path / "theirs")
    outputs = [process.communicate(timeout=120)[0] for process in start(["-c", code], 2, per_node)]
    for rank, output in enumerate(outputs):
        assert "HAVE ['me/sums/main', 'me/tiny']" in output and "ASKED 4" in output, output
        assert f"test (rank {rank}): --reference me/gated: no such local path" in output
        assert "It is gated" in output
    wanted = [*MODEL, "README.md", "main/train-00000-of-00002.jsonl", "main/train-00001-of-00002.jsonl"]
    wanted += ["README.md", "main/train.jsonl", "main/test.jsonl"]                                 # of gsm8k
    assert sorted(hub.downloads()) == sorted(wanted)    # nodes share this cache; its first user locks it
    asked = [path for _, path, _ in hub.asked]
    assert asked.count("/api/models/me/gated/revision/main") == 2 // per_node
    assert asked.count("/api/datasets/openai/gsm8k/revision/v1") == 1                # by one rank for all


# ----------------------------------------------------------------------------------------------------------
# Whole programs, in new interpreters: their clients read the environment when they are imported.

@pytest.mark.slow
def test_a_whole_run_on_two_nodes_takes_model_and_data_from_the_hub_and_records_the_commits(tmp_path):
    port, ranks = free_port(), []
    with StandIn() as hub:
        model = hub.put("models", "me/tiny", MODEL, tag="v1")
        hub.put("models", "me/tiny", {**MODEL, "config.json": b"{}"})
        data = hub.put("datasets", "me/sums", SUMS)
        args = [*SMALL, "--model", "me/tiny@v1", "--data", "me/sums/main", "--eval_data", "me/sums/main",
                "--steps", "1", "--save_every", "1", "--out", str(tmp_path / "run")]
        for rank in range(2):
            env = environment(hub, tmp_path / "home") | {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            ranks.append(subprocess.Popen([sys.executable, *args], env=env, cwd=ROOT, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        try:
            outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert not any(rank.returncode for rank in ranks), "\n".join(output[-3000:] for output in outputs)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["hub"] == {"me/tiny@v1": model, "me/sums/main": data}
        told = "--data me/sums/main: 60 rows, 60 usable, 60 of them with a demonstration"
        assert told in outputs[0] and told not in outputs[1]
        assert "--eval_data me/sums/main: 9 rows, 9 usable" in outputs[0]
        assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
        assert len(hub.downloads()) == len(set(hub.downloads()))
        assert "other/train.jsonl" not in hub.downloads()


@pytest.mark.slow
def test_an_evaluation_takes_a_pinned_benchmark_from_the_hub_records_it_and_finds_it_again_offline(tmp_path):
    with StandIn() as hub:
        pinned, env = put_gsm8k(hub), environment(hub, tmp_path / "home")
        args = ["eval.py", "--model", TINY, "--benchmarks", "gsm8k@v1", "--template", "none",
                "--max_tokens", "8", "--grader", "math-verify", "--out", str(tmp_path / "out"),
                "--device", "cpu", "--grader_workers", "1"]
        done = subprocess.run([sys.executable, *args], env=env, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        settings = json.loads((tmp_path / "out" / "settings.json").read_text())
        assert settings["hub"] == {"openai/gsm8k": pinned}
        assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4
    code = ("from paper.benchmarks import load_benchmark\n"
            "print(len(load_benchmark('gsm8k@v1', 0)[1]))\n"
            "try:\n    load_benchmark('gsm8k', 0)\n"
            "except FileNotFoundError as error:\n    print(error)\n")
    offline = env | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.splitlines()[-2] == "4", done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("gsm8k: cannot read openai/gsm8k from the hub")
