"""The weights in a model's folder of Hugging Face's format: which files they are, and what identifies them.

    folder = snapshot("Qwen/Qwen2.5-Math-7B")                     # from the hub, those files and no more
    dcp.load(state, storage_reader=WeightsReader(folder))         # each rank reads its own shards
    for name, tensor in stored_tensors(folder): ...               # one at a time
    fingerprints(folder)                    # {"config.json": "663 1f0a...", "model.safetensors": ...}

A folder often holds more *.safetensors than its model: the same weights once more as
consolidated.safetensors, a shard that an earlier save has left. model.safetensors.index.json says which file
holds which tensor; without it there is one file, model.safetensors. Nothing else is read.

To copy: this file with support/readers.py. They need torch, safetensors and huggingface_hub.
"""
import hashlib
import json
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.filesystem import FileSystem

from support.readers import each_name_once

PLAIN = ("F64", "F32", "F16", "BF16")      # safetensors' names of the numbers that are what they say
ALONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BESIDES = ["*.json", "*.jinja", "*.txt", "*.model"]            # config, tokenizer, chat template, index
# Beside the weights, what a response depends on.
DECIDES = ["config.json", "generation_config.json", "*token*.json", "chat_template.*", "vocab.*",
           "merges.txt", "tekken.json", "*.model"]


def named_files(folder):
    """Names of the files that hold the weights, whether they are there or not; and tensor -> its file, {}
    without an index. Raises ValueError for an index that cannot be read."""
    index = Path(folder) / INDEX
    if not index.exists():
        return [ALONE], {}
    try:
        named = json.loads(index.read_text(), object_pairs_hook=each_name_once)["weight_map"]
        for name in named.values():
            if Path(name).name != name:                # "../other/model.safetensors": another folder's
                raise ValueError(f"names {name!r}, which is no file of this folder")
        return sorted(set(named.values())), named
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weights ({error!r}); fetch the model again") from None


def weight_files(folder):
    """Paths of the files that hold the weights. Raises FileNotFoundError if one is missing."""
    names, _ = named_files(folder)
    missing = [name for name in names if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: lacks {', '.join(missing[:3])}; expected a whole model as transformers' "
            f"save_pretrained writes it: {ALONE}, or the files that {INDEX} names")
    return [Path(folder) / name for name in names]


def weight_map(folder):
    """Tensor -> path of its file. Reads the files' heads only.

    Raises FileNotFoundError if a file is missing, ValueError if one is no safetensors, if a tensor stands in
    two of them, or if it is not where the index says.
    """
    _, named = named_files(folder)
    found = {}
    for file in weight_files(folder):
        for name in _names_in(file):
            if name in found:
                raise ValueError(f"{folder}: the weight {name} stands in {found[name].name} and in "
                                 f"{file.name}: which one counts? Fetch the model again")
            found[name] = file
    for name, file in named.items():
        if name not in found or found[name].name != Path(file).name:
            raise ValueError(f"{folder}: {INDEX} says that {name} is in {file}, and it is not; fetch the "
                             "model again")
    return found


def _names_in(file):
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            for name in names:
                kind = content.get_slice(name).get_dtype()
                if kind not in PLAIN:
                    raise ValueError(f"{file}: {name} is stored as {kind}, so it is quantized, and means "
                                     "other numbers; take the same model in bf16, fp16 or fp32")
            return names
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); a file of {file.stat().st_size:,} "
                         "bytes. Fetch it again (a git clone without LFS leaves pointers)") from None


def is_computed(name):
    """Is this no weight, but what the config makes anyway? Old files hold RoPE's frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def stored_tensors(folder):
    """(Hugging Face name, tensor on CPU) of every weight in a folder, one at a time.

    Raises at once what weight_map raises: the engine would serve random numbers for what is missing.
    """
    files = {}                                         # path -> names in it: each file is opened once
    for name, file in weight_map(folder).items():
        if not is_computed(name):
            files.setdefault(file, []).append(name)

    # A function in the function: what stands above runs now, what a generator does only when it is read.
    def tensors():
        for file, names in files.items():
            with safe_open(file, framework="pt") as content:
                for name in names:
                    yield name, content.get_tensor(name)

    return tensors()


class WeightsReader(dcp.HuggingFaceStorageReader):
    """torch's reader, on the files of weight_map alone. By itself it takes every *.safetensors in the folder;
    of two that hold a tensor of one name, the one that the file system lists last."""

    def __init__(self, folder):
        super().__init__(str(folder))
        self.fs = _TheseFiles()
        found = weight_map(folder)
        self.fs.paths = [str(path) for path in sorted(set(found.values()))]
        self.names = {name for name in found if not is_computed(name)}


class _TheseFiles(FileSystem):
    def ls(self, path):
        return self.paths


def fingerprints(folder):
    """Name -> size and hash of each file that a response depends on: weights, config, tokenizer. Equal for
    the same model anywhere.

    Every byte is hashed: a fine-tuning may leave weights frozen that stand at both ends of a file. 15 GB at
    7.6 B take 11 s at 1.4 GB/s, and are in memory then for loading them.
    """
    files = weight_files(folder)
    for pattern in DECIDES:
        files += Path(folder).glob(pattern)
    return {file.name: fingerprint(file) for file in sorted(files)}


def fingerprint(file):
    """"SIZE DIGEST" of a file: the first 16 hexadecimal digits of its SHA-256."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return f"{file.stat().st_size} {digest[:16]}"


def snapshot(name, revision=None, local_files_only=False):
    """A model from the Hugging Face hub: the folder of its config, tokenizer and weights. A repository often
    holds its weights two or three times."""
    from huggingface_hub import snapshot_download
    folder = snapshot_download(name, revision=revision, local_files_only=local_files_only,
                               allow_patterns=BESIDES)
    files, _ = named_files(folder)
    # The folder is called after the commit: both turns fetch from the same one.
    return snapshot_download(name, revision=Path(folder).name, local_files_only=local_files_only,
                             allow_patterns=[*BESIDES, *files])
