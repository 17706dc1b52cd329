"""support/weights.py: a model's weights are those that its index names, for trainer, engine and hub alike.

    pytest tests/test_weights.py
"""
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import model as M
from config import TINY
from support import weights
from support.hub import fetch
from test_model import CPU, load, mesh, save_model  # noqa: F401 (fixture)

# ruff: noqa: F811        (the fixture `mesh` is imported, and named as an argument)

INDEX = "model.safetensors.index.json"


def tensors_of(policy):
    return {name: tensor.clone() for name, tensor in M.full_parameters(policy, torch.float32)}


def write(folder, **files):
    """{file without suffix: {tensor: number}}"""
    for name, tensors in files.items():
        save_file({key: torch.full((2,), float(x)) for key, x in tensors.items()},
                  folder / f"{name}.safetensors")


def write_index(folder, pairs):
    text = ", ".join(f'"{name}": "{file}.safetensors"' for name, file in pairs)
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {%s}}' % text)


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one file", "several files"])
def test_other_weights_of_the_same_names_in_the_folder_are_read_by_nobody(tmp_path, mesh, shard):
    folder = save_model(tmp_path, **({"shard": shard} if shard else {}))
    expected, prints = tensors_of(load(folder, mesh)), weights.fingerprints(folder)
    stale = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    # Which one a directory lists last depends on the file system: one of so many does.
    for name in ("consolidated", "aaa", "zzz", "model-00001-of-00007", "model-00007-of-00007", "adapter"):
        save_file(stale, Path(folder) / f"{name}.safetensors")
    (Path(folder) / "._model.safetensors").write_bytes(b"\0\5\26\7")             # as a Mac leaves them
    for found in (tensors_of(load(folder, mesh)), dict(weights.stored_tensors(folder))):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights.fingerprints(folder) == prints


def test_tensors_are_those_of_the_files_that_the_index_names(tmp_path):
    write(tmp_path, a={"x": 1}, b={"y": 2, "z.rotary_emb.inv_freq": 3}, model={"x": 8, "y": 9})
    write_index(tmp_path, [("x", "a"), ("y", "b")])
    found = {name: tensor[0].item() for name, tensor in weights.stored_tensors(tmp_path)}
    assert found == {"x": 1, "y": 2}
    (tmp_path / INDEX).unlink()
    found = {name: tensor[0].item() for name, tensor in weights.stored_tensors(tmp_path)}
    assert found == {"x": 8, "y": 9}


@pytest.mark.parametrize("index, says", [
    ([("x", "a"), ("y", "gone")], "lacks gone.safetensors"),
    ([("x", "a"), ("y", "a")], "says that y is in a.safetensors, and it is not"),
    ([("x", "a"), ("y", "b"), ("w", "b")], "says that w is in b.safetensors, and it is not"),
    ([("x", "a"), ("y", "b"), ("x", "b")], "names x twice"),
    ([("x", "a"), ("y", "again")], "x stands in a.safetensors and in again.safetensors"),
    ([("x", "a"), ("y", "pointer")], "pointer.safetensors: not a whole safetensors file"),
    ("{", "not an index of weights"), ("[]", "not an index of weights"), ("{}", "not an index of weights"),
    ('{"weight_map": ["a.safetensors"]}', "not an index of weights"),
    ('{"weight_map": {"x": 5}}', "not an index of weights"),
    ('{"weight_map": {"x": null}}', "not an index of weights"),
    ([("x", "../elsewhere/a")], "not an index of weights"), ([("x", "/a")], "not an index of weights"),
    (None, "lacks model.safetensors"),
], ids=str)
def test_an_index_that_does_not_fit_its_files_is_refused_before_a_model_is_built(
        tmp_path, index, says, monkeypatch):
    write(tmp_path, a={"x": 1}, b={"y": 2}, again={"x": 1, "y": 2})
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    if isinstance(index, str):
        (tmp_path / INDEX).write_text(index)
    elif index:
        write_index(tmp_path, index)
    monkeypatch.setattr(M, "build_policy", None)
    for read in (weights.stored_tensors, lambda folder: M.load_policy(folder, None, None, CPU)):
        with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.int32])
def test_quantized_weights_are_refused_as_numbers_that_mean_others(tmp_path, dtype):
    save_file({"x": torch.ones(2), "y": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors: y is stored as .*quantized"):
        weights.stored_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_plain_kind_are_read(tmp_path, dtype):
    save_file({"x": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    assert dict(weights.stored_tensors(tmp_path))["x"].dtype == dtype


@pytest.mark.parametrize("sharded", [False, True])
def test_from_the_hub_come_the_files_that_the_index_names_and_no_more(tmp_path, monkeypatch, sharded):
    repository, cache = tmp_path / "repository", tmp_path / "cache" / "0123abc"
    (repository / "original").mkdir(parents=True)
    named = ["model-1.safetensors", "model-2.safetensors"] if sharded else ["model.safetensors"]
    besides = ["consolidated.safetensors", "original/model.safetensors", "model-3.safetensors",
               "pytorch_model.bin", "adapter.safetensors"]
    for name in [*named, *besides, "config.json", "tokenizer.json"]:
        (repository / name).write_text(name)
    if sharded:
        index = {"weight_map": {"x": named[0], "y": named[1]}}
        (repository / INDEX).write_text(json.dumps(index))
    revisions = []

    def download(name, repo_type=None, revision=None, local_files_only=False, allow_patterns=()):
        revisions.append(revision)
        for file in repository.rglob("*"):
            path = str(file.relative_to(repository))
            if any(fnmatch(path, pattern) for pattern in allow_patterns):
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / path)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = Path(fetch("someone/model", "model", "--model"))
    got = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert got == {*named, "config.json", "tokenizer.json", *([INDEX] if sharded else [])}
    assert revisions == [None, "0123abc"]               # both turns from one commit


def test_a_fingerprint_tells_another_byte_anywhere_but_not_another_place(tmp_path):
    """Weights that a fine-tuning has left frozen may stand at both ends of a file."""
    shutil.copytree(TINY, tmp_path / "a", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = weights.fingerprints(tmp_path / "a")
    assert weights.fingerprints(tmp_path / "b") == before
    assert set(before) == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in before:
        content = (tmp_path / "b" / name).read_bytes()
        big = content * (1 + (3 << 20) // len(content))                   # of several megabytes
        for place in (0, len(big) // 2, len(big) - 1):
            prints = []
            for bit in (0, 1):
                (tmp_path / "b" / name).write_bytes(
                    big[:place] + bytes([big[place] ^ bit]) + big[place + 1:])
                prints.append(weights.fingerprints(tmp_path / "b"))
            assert prints[0] != prints[1]
        (tmp_path / "b" / name).write_bytes(content)
    assert weights.fingerprints(tmp_path / "b") == before


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "tokenizer.model"])
def test_what_else_decides_about_a_response_is_in_the_fingerprint_and_a_page_about_it_is_not(tmp_path, name):
    shutil.copytree(TINY, tmp_path / "a", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    before = weights.fingerprints(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("x")
    assert weights.fingerprints(tmp_path / "a") == before
    (tmp_path / "a" / name).write_text("{}")
    assert weights.fingerprints(tmp_path / "a").keys() == {*before, name}


def test_the_tiny_model_has_one_file_and_its_map_names_every_tensor_of_it():
    with safe_open(Path(TINY) / "model.safetensors", framework="pt") as content:
        assert set(weights.weight_map(TINY)) == set(content.keys())
