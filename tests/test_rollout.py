"""rollout.py: what only a GPU would show is recorded from a stand-in for vLLM; more of the real engine is in
test_distributed.py.

    pytest tests/test_rollout.py
"""
import itertools
import json
import random
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

import preloaded
import rollout
from config import TINY
from conftest import metrics, run
from model import load_config
from rollout import (
    RolloutEngine,
    StaleWeightsError,
    check_environment,
    config_folder,
    weight_names,
)
from support.weights import stored_tensors
from tiny.task import make_tokenizer


class Recorder:
    """Stands where vLLM's LLM does and writes down what is asked of it."""

    def __init__(self):
        self.calls, self.idle = [], True

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, dict(kwargs["weights_iterator"])))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache",))
        return self.idle


@pytest.fixture
def engine():
    engine = object.__new__(RolloutEngine)
    engine.llm, engine.cuda, engine.untied = Recorder(), True, False
    engine.asleep, engine.weights_version, engine.broken = set(), 0, False
    engine.names, engine.aliases = {"a"}, set()
    engine.request_ids = itertools.count()
    return engine


def test_on_a_gpu_weights_are_woken_and_filled_before_the_cache_and_old_prefixes_are_dropped_last(engine):
    engine.sleep()
    assert engine.weights_version is None                      # level 2 drops the weights
    engine.sync_weights([("a", 1)], version=1)
    assert engine.llm.calls == [("sleep", 2), ("wake_up", ["weights"]), ("reload_weights", {"a": 1}),
                                ("wake_up", ["kv_cache"]), ("reset_prefix_cache",)]
    engine.sync_weights([("a", 2)], version=2)                 # awake: nothing to wake
    assert engine.llm.calls[5:] == [("reload_weights", {"a": 2}), ("reset_prefix_cache",)]


def test_a_transfer_that_fails_half_way_leaves_no_valid_weights(engine):
    def broken():
        yield "a", 1
        raise OSError("lost")

    with pytest.raises(OSError):
        engine.sync_weights(broken(), version=1)
    with pytest.raises(StaleWeightsError):
        engine.generate([[1]], 1, 1.0, 1, seed=0)
    # vLLM would count what it has of that one.
    with pytest.raises(RuntimeError, match="start a new engine"):
        engine.sync_weights([("a", 2)], version=2)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sent, message", [
    (["b"], "1 of 2 weights did not come, such as a"), (["a", "b", "c"], "no weight c; .* example"),
    (["a", "c", "b"], "no weight c; it has, for example, b"), ([], "2 of 2 .* a, b"),
    (["a", "a", "b"], "the weight a came twice")])
def test_weights_that_are_not_those_of_the_model_are_refused_at_any_sync(engine, version, sent, message):
    engine.names = {"a", "b"}
    if version == 2:
        engine.sync_weights([("a", 1), ("b", 1)], version=1)
    with pytest.raises(ValueError, match=message):
        engine.sync_weights([(name, 1) for name in sent], version=version)
    assert engine.weights_version is None


def test_a_tied_head_is_loaded_with_its_embedding_and_any_parameter_that_is_not_is_an_error():
    """As on a GPU, where head and embedding are one parameter (on a CPU the engine unties them)."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 2), "norm": torch.nn.LayerNorm(2),
                                 "head": torch.nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    model.load_weights = lambda weights: {name for name, _ in weights}
    rollout.refuse_partial_loads(model)
    names = ["embed.weight", "norm.weight", "norm.bias"]
    assert model.load_weights((name, None) for name in names) == set(names)
    with pytest.raises(ValueError, match="vLLM left 1 of its 3 parameters as they were, such as norm.bias"):
        model.load_weights((name, None) for name in names[:2])


def test_prefixes_of_old_weights_that_vllm_keeps_are_an_error(engine):
    engine.llm.idle = False
    with pytest.raises(RuntimeError, match="prefixes"):
        engine.sync_weights([("a", 1)], version=1)
    assert engine.weights_version is None


def test_memory_that_torch_keeps_is_free_before_the_engine_asks_for_it_and_a_sleeping_one_wakes_to_be_closed(
        engine, monkeypatch):
    llm = engine.llm
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: llm.calls.append(("empty_cache",)))
    core = SimpleNamespace(shutdown=lambda: llm.calls.append(("shutdown",)))
    llm.llm_engine = SimpleNamespace(engine_core=core)
    engine.sleep()
    engine.close()
    assert llm.calls == [("sleep", 2), ("empty_cache",), ("empty_cache",), ("wake_up", ["weights"]),
                         ("empty_cache",), ("wake_up", ["kv_cache"]), ("shutdown",)]


class Requests:
    """Stands where vLLM's LLMEngine does: takes requests, and ends or loses them."""

    def __init__(self, refuse=None, lose=()):
        self.refuse, self.lose, self.open, self.aborted = refuse, lose, [], []

    def add_request(self, id, prompt, params):
        if len(self.open) == self.refuse:
            raise ValueError("refused")
        self.open.append(id)

    def has_unfinished_requests(self):
        return bool(self.open)

    def step(self):
        id = self.open.pop(0)
        sample = SimpleNamespace(token_ids=[3], logprobs=[{3: SimpleNamespace(logprob=-1.0)}],
                                 finish_reason="stop")
        return [] if id in self.lose else [SimpleNamespace(request_id=id, finished=True, outputs=[sample])]

    def abort_request(self, ids):
        self.aborted += ids


def generate(engine, requests):
    engine.llm = SimpleNamespace(llm_engine=requests)
    engine.tokenizer = SimpleNamespace(decode=lambda *_, **__: "3")
    return engine.generate([[1], [2]], 2, 1.0, 8, seed=0)


def test_a_request_that_is_refused_or_lost_leaves_none_of_the_others_to_the_next_call(engine):
    requests = Requests(refuse=3)
    with pytest.raises(ValueError):
        generate(engine, requests)
    assert set(requests.aborted) >= set(requests.open) == {"0", "1", "2"}
    with pytest.raises(RuntimeError, match="lost 1 of 4"):
        generate(engine, Requests(lose=["5"]))                 # no id is used twice, whatever went before
    assert [[r.tokens for r in group] for group in generate(engine, Requests())] == [[[3], [3]]] * 2


def test_where_the_engine_unties_the_head_it_gets_the_embedding_twice_and_each_other_tensor_once(engine):
    engine.untied, engine.names = True, {"model.embed_tokens.weight", "model.norm.weight"}
    sent = [("model.embed_tokens.weight", torch.ones(1)), ("model.norm.weight", torch.zeros(1))]
    engine.sync_weights(sent, version=1)
    received = sorted(engine.llm.calls[0][1])
    assert received == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_the_names_of_a_models_weights_are_those_of_its_file_and_a_tied_head_is_an_alias():
    names, aliases = weight_names(load_config(TINY))
    assert names == {name for name, _ in stored_tensors(TINY)} and aliases == {"lm_head.weight"}


def test_the_second_name_of_a_tied_head_in_a_file_is_passed_over_and_frequencies_of_rope_are_not_weights(
        engine, tmp_path):
    engine.aliases = {"lm_head.weight"}
    names = ("a", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    engine.sync_weights(stored_tensors(tmp_path), version=1)
    assert list(engine.llm.calls[0][1]) == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("case, error", [
    ("k_proj is missing", "1 of 38 weights did not come, such as model.layers.1.self_attn.k_proj.weight"),
    ("k_proj is missing at the second sync",
     "1 of 38 weights did not come, such as model.layers.1.self_attn.k_proj.weight"),
    ("the norm is renamed at the second sync",
     "the engine's model has no weight model.nrom.weight; it has, for example, model.norm.weight"),
    ("vllm leaves the norm", "vLLM left 1 of its 27 parameters as they were, such as model.norm.weight")])
def test_a_real_engine_refuses_weights_that_are_not_all_its_own_and_serves_none_of_them(
        tmp_path, case, error):
    run(["tests/ranks.py", "incomplete", tmp_path / "found", case])
    assert torch.load(tmp_path / "found") == {"error": error, "serves nothing": True}


THETAS = [1e4 + k for k in range(10)]


def make_folders(cache, barrier, queue):
    """In a process of its own: a folder for each theta, and what is in it when it is handed out."""
    config, tokenizer, made = load_config(TINY), make_tokenizer(), []
    for theta in THETAS:
        config.rope_parameters["rope_theta"] = theta
        barrier.wait()
        folder = rollout.write_config(config, tokenizer, cache)
        made.append((folder, {file.name: file.read_bytes() for file in folder.iterdir()}))
    queue.put(made)


def test_whoever_writes_an_engines_folder_at_the_same_time_all_end_with_one_whole_folder_for_each_config(
        tmp_path):
    context = preloaded.context
    barrier, queue = context.Barrier(4), context.SimpleQueue()
    children = [context.Process(target=make_folders, args=(tmp_path, barrier, queue)) for _ in range(4)]
    for child in children:
        child.start()
    made, *others = [queue.get() for _ in children]
    for child in children:
        child.join()
    assert others == [made] * 3                                             # whole, whoever was first
    assert {folder for folder, _ in made} == set(tmp_path.iterdir())        # nothing else is left behind
    for theta, (folder, content) in zip(THETAS, made):
        assert content == {file.name: file.read_bytes() for file in folder.iterdir()}
        assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == theta
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()


def test_a_cache_that_cannot_be_written_costs_one_line_not_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = config_folder(load_config(TINY), make_tokenizer())
    assert (folder / "config.json").exists() and tmp_path not in folder.parents
    assert capsys.readouterr().err.count("\n") == 1
    shutil.rmtree(folder.parent)


def test_an_engines_folder_that_lost_a_file_is_named_and_another_one_is_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = config_folder(load_config(TINY), make_tokenizer())
    (folder / "tokenizer.json").unlink()                                    # whoever cleans caches
    other = config_folder(load_config(TINY), make_tokenizer())
    assert other.parent != folder.parent and (other / "tokenizer.json").exists()
    said = capsys.readouterr().err
    assert f"{folder} is not what was written there; delete it: the engine compiles" in said


@pytest.mark.slow
def test_a_second_start_of_the_engine_finds_what_vllm_has_compiled_for_the_first(tmp_path):
    for k in "12":
        run(["tests/ranks.py", "start", tmp_path / k, tmp_path / "cache"])
    first, second = (torch.load(tmp_path / k) for k in "12")
    assert first == second and Path(first["folder"]).parent == tmp_path / "cache" / "srft"


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def built_for(monkeypatch, kind):
    """vLLM's platform is of this kind: "cuda", "cpu", or "", its answer on a machine it is not built for."""
    platform = SimpleNamespace(device_type=kind, is_cuda=lambda: kind == "cuda")
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))


def test_a_vllm_for_another_device_than_the_trainers_is_refused(monkeypatch):
    check_environment(CPU)                                                      # the one of this environment
    for built, device in (("cuda", CPU), ("", CUDA), ("cpu", CUDA)):
        built_for(monkeypatch, built)
        message = f"this vLLM finds {built or 'no device .*'}, and the trainer runs on {device.type}"
        with pytest.raises(ValueError, match=message):
            check_environment(device)


@pytest.fixture
def sound(monkeypatch, tmp_path):
    """A machine on which an engine could start on a GPU."""
    built_for(monkeypatch, "cuda")
    for name in ("CC", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: {"gcc": "/usr/bin/gcc", "/opt/cc": "/opt/cc"}.get(name))
    check_environment(CUDA)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_refused_with_the_fix_before_anything_is_loaded(sound, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments: True")
    with pytest.raises(ValueError, match=f"take it out of {name}"):
        check_environment(CUDA)
    monkeypatch.setenv(name, "expandable_segments:False")
    check_environment(CUDA)


def test_a_missing_c_compiler_or_python_header_is_named_with_the_package_that_has_it(
        sound, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/nowhere/cc")                             # Triton would take this, and no other
    with pytest.raises(ValueError, match="/nowhere/cc.*build-essential"):
        check_environment(CUDA)
    monkeypatch.setenv("CC", "/opt/cc")
    check_environment(CUDA)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="gcc or clang.*build-essential"):
        check_environment(CUDA)
    built_for(monkeypatch, "cpu")
    check_environment(CPU)                                                      # no GPU, no such kernels
    built_for(monkeypatch, "cuda")
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "Python.h").unlink()
    with pytest.raises(ValueError, match="Python.h.*python3-dev"):
        check_environment(CUDA)


@pytest.mark.slow
def test_prompts_that_together_exceed_vllms_budget_of_tokens_are_trained_on_and_evaluated(tmp_path):
    rng, problems = random.Random(0), []
    for _ in range(100):            # of 44 tokens: 4,400 in one decoding step, where vLLM's budget is 4,096
        terms = [rng.randint(10, 99) for _ in range(14)]
        problem = "+".join(map(str, terms)) + "=?\n"
        problems.append(json.dumps({"problem": problem, "answer": str(sum(terms)),
                                    "solution": f"\\boxed{{{sum(terms)}}}"}))
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(problems))
    run(["srft.py", "--preset", "tiny", "--device", "cpu", "--data", long, "--eval_data", long,
         "--steps", "1", "--prompts_per_step", "25", "--n_rollouts", "4", "--max_response_tokens", "16",
         "--grader_workers", "1", "--out", tmp_path / "run"])
    assert [row["eval_len/long"] > 1 for row in metrics(tmp_path / "run")] == [True, True]
    run(["eval.py", "--model", TINY, "--device", "cpu", "--template", "none", "--benchmarks", long,
         "--max_tokens", "16", "--grader_workers", "1", "--out", tmp_path / "eval"])
    assert len((tmp_path / "eval" / "results.jsonl").read_text().splitlines()) == 100


def test_on_a_cpu_a_step_has_room_for_the_longest_sequence_beside_all_others():
    arguments = rollout.cpu_arguments(load_config(TINY), max_tokens=9216, max_sequences=256, untied=True)
    assert arguments["max_num_batched_tokens"] >= 9216 + 255 and arguments["enable_chunked_prefill"] is False


@pytest.mark.parametrize("cuda", [True, False])
def test_what_vllm_is_given_on_a_gpu_and_on_a_cpu(monkeypatch, tmp_path, cuda):
    class LLM(Recorder):
        def __init__(self, folder, **given):
            super().__init__()
            self.calls.append((folder, given))

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    built_for(monkeypatch, "cuda" if cuda else "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = RolloutEngine(load_config(TINY), make_tokenizer(), torch.bfloat16, 512, 64,
                           gpu_memory_utilization=0.3)
    (folder, given), asked = engine.llm.calls
    assert Path(folder).parent == tmp_path / "srft"
    assert given["load_format"] == "dummy" and given["max_model_len"] == 512
    assert asked == ("apply_model", rollout.refuse_partial_loads)
    on_gpu = {"enforce_eager": False, "enable_sleep_mode": True, "gpu_memory_utilization": 0.3,
              "hf_overrides": {"head_dtype": "float32"}}
    on_cpu = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096,
              "hf_overrides": {"tie_word_embeddings": False}}
    assert given.items() >= (on_gpu if cuda else on_cpu).items()
    assert not given.keys() & ((on_cpu if cuda else on_gpu).keys() - {"enforce_eager", "hf_overrides"})


@pytest.mark.slow
def test_on_a_gpu_vllm_is_asked_for_logits_in_fp32_in_its_own_words():
    said = run(["-c", f"""if True:
        import rollout, vllm
        from vllm.config import ModelConfig
        overrides = rollout.gpu_arguments(0.5)["hf_overrides"]
        config = ModelConfig(model={TINY!r}, dtype="bfloat16", hf_overrides=overrides)
        print("HEAD", vllm.__version__, config.head_dtype)"""])
    version, dtype = said.split("HEAD ")[1].split()[:2]
    if version.startswith("0.25."):
        assert dtype == "torch.bfloat16"            # it has this for pooling models only
    else:
        assert dtype == "torch.float32"
