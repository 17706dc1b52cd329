"""The colocated vLLM engine: it samples the rollouts of Sec. 4.2 in the same processes, on the
same GPUs, as training.

    engine = RolloutEngine(config, tokenizer, torch.bfloat16, max_tokens=9216)  # one a rank, no weights yet
    engine.sync_weights(full_parameters(policy, dtype), version=0)     # straight from the FSDP2 shards
    rollouts = engine.generate(prompts, n=8, temperature=1.0, max_tokens=8192, seed=0, version=0)
    engine.sleep(); train(); engine.sync_weights(..., version=1)       # wakes by itself

Only vLLM's public API is used, and no other file imports vllm. The engine never reads weights from disk,
so it can serve nothing but what it was sent: by the trainer, or, in eval.py, by `stored_tensors`. Each
transfer carries a version, and asking for another version than the one loaded is an error: stale weights, the
classic silent bug of RL stacks, cannot happen.
"""
import gc
import itertools
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

# Read by vLLM at import. One engine in this very process; the trainer keeps its own threads on CPU;
# only errors are logged.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch  # noqa: E402  (after the environment above)
import torch._dynamo  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tqdm import tqdm  # noqa: E402

warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")      # of no use to our users
if not torch.cuda.is_available():
    # vLLM compiles one small log-prob helper even in eager mode: on CPU that costs 4 s
    # and needs a C++ compiler.
    torch._dynamo.config.disable = True


class StaleWeightsError(RuntimeError):
    """The engine holds other weights than the caller is training."""


@dataclass
class Rollout:
    """One response y ~ pi_engine(. | x). `logprobs` are of the sampled tokens, after
    temperature, in nats."""
    tokens: list[int]              # EOS included if the response ended by itself
    logprobs: list[float]
    text: str                      # special tokens removed
    finished: bool                 # False: cut at max_tokens


def kv_bytes(config, bytes_per_number=2):
    """Bytes of one token in the KV cache: 2 (K, V) x layers x KV heads x head width x bytes_per_number."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * bytes_per_number


class RolloutEngine:
    """A vLLM engine (tensor parallel 1) on this rank. Every method but `generate` and `sleep`
    is a collective when the weights come from sharded parameters, since those are gathered as
    the engine reads them."""

    def __init__(self, config, tokenizer, dtype, max_tokens, max_sequences=256, gpu_memory_utilization=0.45,
                 eager=None, seed=0):
        """config, tokenizer: of transformers. max_tokens: longest prompt + response. max_sequences: decoded
        at once. gpu_memory_utilization: share of the card for weights and KV cache while awake. eager: no
        CUDA graphs; default on CPU, where compiling costs more than it saves."""
        from vllm import LLM
        # On CPU all of the KV cache is resident from the start, so it gets what max_sequences need, at most
        # 1 GiB or one sequence. (VLLM_CPU_KVCACHE_SPACE, in GiB, would win over this.)
        one = kv_bytes(config, 4) * (max_tokens + 256)
        cpu = {"kv_cache_memory_bytes": max(one, min(2**30, one * max_sequences))}
        self.request_ids = itertools.count()
        self.cuda = torch.cuda.is_available()
        self.weights_version, self.asleep = None, set()
        # vLLM's CPU backend repacks a linear layer's weights when they are loaded, and a head tied to the
        # embedding is not reloaded by name: it would go on serving its first, packed weights. On CPU the
        # engine therefore unties it.
        self.untied = not self.cuda and config.tie_word_embeddings
        with tempfile.TemporaryDirectory() as folder:       # without weights: those come by sync_weights
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self.llm = LLM(
                folder, load_format="dummy", dtype=dtype, max_model_len=max_tokens,
                max_num_seqs=max_sequences, seed=seed, tensor_parallel_size=1,
                distributed_executor_backend="external_launcher",
                enforce_eager=not self.cuda if eager is None else eager, enable_sleep_mode=self.cuda,
                gpu_memory_utilization=gpu_memory_utilization, enable_prefix_caching=True,
                disable_log_stats=True, hf_overrides={"tie_word_embeddings": False} if self.untied else {},
                logprobs_mode="processed_logprobs",  # the distribution sampled from: the one the ratio needs
                **({} if self.cuda else cpu))
        self.tokenizer = tokenizer

    def generate(self, prompts, n, temperature, max_tokens, seed, version=None, top_p=1.0,
                 progress=False, on_step=None):
        """Sample n responses to each prompt.

        prompts: list of token-id lists; seed: an int, or one for each prompt, from which each of its n
        samples derives its own, so that what a prompt yields depends on nothing but its seed. on_step: called
        after every decoding step with [(index of the prompt, index of the sample, Rollout)] of the responses
        that ended in it, often none: the place to grade them while others are still being decoded. Returns,
        for each prompt, its n Rollouts. Raises StaleWeightsError unless weights were synced and, if
        `version` is given, are of that version.
        """
        if self.weights_version is None or version not in (None, self.weights_version):
            raise StaleWeightsError(f"asked for rollouts of weights version {version}, but the engine "
                                    f"holds {self.weights_version}: call sync_weights after every "
                                    "optimizer step")
        if not prompts:
            return []
        seeds = seed if isinstance(seed, (list, tuple)) else [seed + i * n for i in range(len(prompts))]
        engine, rollouts, left = self.llm.llm_engine, [[None] * n for _ in prompts], {}
        bar = tqdm(total=len(prompts) * n, desc="responses", leave=False, position=1, disable=not progress)
        try:
            # One request a sample, not n samples a request: a response is then handed out when it ends, not
            # when the longest of its group does. The prompt they share is computed once, by prefix caching.
            for i, k in ((i, k) for i in range(len(prompts)) for k in range(n)):
                id = str(next(self.request_ids))
                left[id] = i, k
                engine.add_request(id, {"type": "token", "prompt_token_ids": list(prompts[i])},
                                   self.sampling_params(temperature, top_p, max_tokens, seeds[i] + k))
            while left:
                ended = [(*left.pop(o.request_id), self._rollout(o)) for o in engine.step() if o.finished]
                if left and not engine.has_unfinished_requests():
                    raise RuntimeError(f"vLLM has lost {len(left)} of {len(prompts) * n} requests; nothing "
                                       "is known to do this but a vllm version other than the pinned one")
                for i, k, rollout in ended:
                    rollouts[i][k] = rollout
                bar.update(len(ended))
                if on_step:
                    on_step(ended)
        finally:
            bar.close()
            engine.abort_request(list(left))         # after an exception: nothing is left for the next call
        return rollouts

    def sampling_params(self, temperature, top_p, max_tokens, seed):
        """vLLM's parameters of one sample. logprobs=0: the sampled token's own."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        return SamplingParams(temperature=temperature, top_p=top_p, top_k=0, max_tokens=max_tokens,
                              seed=seed % 2**63, logprobs=0, detokenize=False,
                              output_kind=RequestOutputKind.FINAL_ONLY)

    def _rollout(self, output):
        sample = output.outputs[0]
        tokens = list(sample.token_ids)
        return Rollout(tokens, logprobs=[at[token].logprob for at, token in zip(sample.logprobs, tokens)],
                       text=self.tokenizer.decode(tokens, skip_special_tokens=True),
                       finished=sample.finish_reason == "stop")

    def sync_weights(self, named_tensors, version):
        """Load (Hugging Face name, full tensor) pairs, consumed lazily, one tensor at a time.

        Wakes a sleeping engine: the weights' memory first, then, when they are in place, the KV cache;
        cached prefixes of the old weights are dropped.
        """
        self.weights_version = None         # a transfer that fails half-way must not leave a valid version
        self.wake("weights")
        # Without an iterator, reload_weights would re-read the folder: stale weights without an error.
        self.llm.collective_rpc("reload_weights",
                                kwargs={"weights_iterator": self._with_head(named_tensors)})
        self.wake("kv_cache")
        self.llm.reset_prefix_cache()
        self.weights_version = version

    def wake(self, tag):
        """Map the memory of "weights" or "kv_cache" again, without contents; sync_weights calls it."""
        if tag in self.asleep:
            self.llm.wake_up(tags=[tag])
            self.asleep.remove(tag)

    def _with_head(self, named_tensors):
        for name, tensor in named_tensors:
            yield name, tensor
            if self.untied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor

    def sleep(self):
        """Give the GPU back to training: drop weights (the trainer has them) and KV cache.
        Nothing to do on CPU."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep, self.weights_version = {"weights", "kv_cache"}, None
            gc.collect()
            torch.cuda.empty_cache()

    def close(self):
        """Shut the engine down; call it before destroy_process_group."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()


def stored_tensors(folder):
    """(Hugging Face name, tensor on CPU) of every weight in a folder's safetensors, one at a time.

    Raises FileNotFoundError at once if files are missing: the engine would serve random numbers for them.
    """
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}: lacks {', '.join(missing[:3])}; expected a whole model as "
                                "transformers' save_pretrained writes it, in safetensors")

    def tensors():
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)

    return tensors()
