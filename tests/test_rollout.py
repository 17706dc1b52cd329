"""rollout.py: what only a GPU would show is recorded from a stand-in for vLLM; the real engine is in test_distributed.py."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rollout import RolloutEngine, StaleWeightsError, stored_tensors


class Recorder:
    """Stands where vLLM's LLM does and writes down what is asked of it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, dict(kwargs["weights_iterator"])))


@pytest.fixture
def engine():
    engine = object.__new__(RolloutEngine)
    engine.llm, engine.cuda, engine.untied, engine.asleep, engine.weights_version = Recorder(), True, False, set(), 0
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
        id, sample = self.open.pop(0), SimpleNamespace(token_ids=[3], logprobs=[{3: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")
        return [] if id in self.lose else [SimpleNamespace(request_id=id, finished=True, outputs=[sample])]

    def abort_request(self, ids):
        self.aborted += ids


def generate(engine, requests):
    engine.llm, engine.tokenizer = SimpleNamespace(llm_engine=requests), SimpleNamespace(decode=lambda *_, **__: "3")
    return engine.generate([[1], [2]], 2, 1.0, 8, seed=0)


def test_a_request_that_is_refused_or_lost_leaves_none_of_the_others_to_the_next_call(engine):
    requests = Requests(refuse=3)
    with pytest.raises(ValueError):
        generate(engine, requests)
    assert set(requests.aborted) >= set(requests.open) == {"0", "1", "2"}
    with pytest.raises(RuntimeError, match="lost 1 of 4"):
        generate(engine, Requests(lose=["5"]))                         # no id is used twice, whatever went before
    assert [[r.tokens for r in group] for group in generate(engine, Requests())] == [[[3], [3]]] * 2


def test_where_the_engine_unties_the_head_it_gets_the_embedding_twice_and_each_other_tensor_once(engine):
    engine.untied = True
    engine.sync_weights([("model.embed_tokens.weight", torch.ones(1)), ("model.norm.weight", torch.zeros(1))], version=1)
    assert sorted(engine.llm.calls[0][1]) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_stored_weights_are_those_of_the_index_and_a_missing_file_is_refused_before_anything_is_read(tmp_path):
    for name, key in (("a", "x"), ("b", "y"), ("consolidated", "z")):
        save_file({key: torch.full((2,), ord(key))}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors"):
        stored_tensors(tmp_path)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {name: tensor[0].item() for name, tensor in stored_tensors(tmp_path)} == {"x": ord("x"), "y": ord("y")}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks b.safetensors"):
        stored_tensors(tmp_path)
