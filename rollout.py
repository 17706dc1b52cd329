"""The colocated vLLM engine: it samples the rollouts of Sec. 4.2 in the same processes, on the
same GPUs, as training.

    engine = RolloutEngine(config, tokenizer, torch.bfloat16, max_tokens=9216)  # one a rank, no weights yet
    engine.sync_weights(full_parameters(policy, dtype), version=0)     # straight from the FSDP2 shards
    rollouts = engine.generate(prompts, n=8, temperature=1.0, max_tokens=8192, seed=0, version=0)
    engine.sleep()                                                     # the GPU is the trainer's
    train()
    engine.sync_weights(full_parameters(policy, dtype), version=1)     # wakes by itself

vLLM is an inference server used as a library. It keeps a copy of the model of its own, in its own layout, and
a KV cache: the keys and values of all tokens that it has seen, so that each decoding step computes one token
a sequence. Both take a GPU's memory, so engine and trainer take turns in it.

Only vLLM's public API is used, but for a wrapper around its model's load_weights and for its core's shutdown.
The engine never reads weights from disk, so it can serve nothing but what it was sent: by the trainer, or, in
eval.py, by support/weights.py. Each transfer carries a version (in srft.py, the step whose update made these
weights) and must bring the whole model, and asking for another version than the one loaded is an error: stale
weights, the classic silent bug of RL stacks, cannot happen. No other file of the root imports vllm.

To copy the engine into another project, take this file alone, and vllm: it imports nothing else of this one.
`sync_weights` takes any iterator of (Hugging Face name, full tensor); full_parameters is in model.py.
"""
import atexit
import gc
import hashlib
import itertools
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
import transformers
from tqdm import tqdm

# vLLM reads these when it is first imported, which happens further down, in functions. Who sets one of them
# before the start has it so.
# The engine's core in this very process, not in one that it starts: only here can it be handed tensors.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# On a CPU it would bind this process, the trainer's threads included, to cores of its choice.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")       # it would report each start over the network
# FlashInfer's sampler takes no seeds, so nothing here could use it. Its import can end a start.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")      # of no use to our users
# vLLM logs a few lines before it has read its own level (that there is no Triton for CPUs, for one).
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
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


def check_environment(device):
    """Raise ValueError for what would stop the engine only after a 7B model has been loaded: a vLLM for
    another device than the trainer's, and on a GPU what its memory and its kernels cannot work with."""
    from vllm.platforms import current_platform
    if current_platform.device_type != device.type:
        found = current_platform.device_type or "no device that it is built for"
        raise ValueError(f"this vLLM finds {found}, and the trainer runs on {device.type}: install "
                         "requirements.txt for GPUs, requirements-cpu.txt for --device cpu")
    if device.type != "cuda":
        return
    # Sleep mode gives the engine's memory back to the driver page by page, from a pool of its own; torch's
    # expandable segments remap pages themselves, and vLLM's versions differ in what becomes of both together.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").replace(" ", "").lower():
            raise ValueError(f"{name} has expandable_segments:True, which the engine's sleep mode does not "
                             f"stand: take it out of {name} and start again")
    # Triton compiles the engine's sampling kernels, and a launcher for each in C, when they are first used.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise ValueError(f"no C compiler ({' or '.join(compilers)}), which the engine's Triton kernels need: "
                         "apt install build-essential, or dnf install gcc, or set CC to one")
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if not header.exists():
        raise ValueError(f"no {header}, which the engine's Triton kernels need: apt install python3-dev, or "
                         "dnf install python3-devel, of the very Python that runs this")


class RolloutEngine:
    """A vLLM engine (tensor parallel 1) on this rank.

    Collectives, so for all ranks to call: the constructor, in which vLLM makes process groups, and
    `sync_weights` when the weights come from sharded parameters, since those are gathered as the engine reads
    them. `generate` and `sleep` are none: each rank decodes its own prompts, for as long as they take.
    """

    def __init__(self, config, tokenizer, dtype, max_tokens, max_sequences=256, gpu_memory_utilization=0.45,
                 eager=None, seed=0):
        """config, tokenizer: of transformers. dtype: of weights and KV cache. max_tokens: longest prompt +
        response. max_sequences: decoded at once; more of them wait in vLLM, and enter as others end.
        gpu_memory_utilization: share of the card for weights and KV cache while awake. eager: no CUDA graphs;
        default on CPU, where compiling costs more than it saves."""
        from vllm import LLM
        from vllm.platforms import current_platform
        self.cuda = current_platform.is_cuda()
        self.tokenizer = tokenizer
        self.request_ids = itertools.count()        # of all calls of generate: none is used twice
        self.weights_version = None                 # of the weights that it holds; None: none to be served
        self.asleep = set()                         # what has no memory now: "weights", "kv_cache"
        self.broken = False                         # a transfer of weights has failed half-way
        self.names, self.aliases = weight_names(config)
        # vLLM's CPU backend repacks a linear layer's weights when they are loaded, and a head tied to the
        # embedding is not reloaded by name: it would go on serving its first, packed weights. On CPU the
        # engine therefore unties it.
        self.untied = not self.cuda and config.tie_word_embeddings
        if eager is None:
            eager = not self.cuda
        if self.cuda:
            arguments = gpu_arguments(gpu_memory_utilization)
        else:
            arguments = cpu_arguments(config, max_tokens, max_sequences, self.untied)
        threads = torch.get_num_threads()       # vLLM's GPU worker sets them to 1, and --offload wants them
        self.llm = LLM(
            str(config_folder(config, tokenizer)),
            load_format="dummy",                # random weights: those to serve come by sync_weights
            dtype=dtype,
            max_model_len=max_tokens,
            max_num_seqs=max_sequences,
            seed=seed,
            # torchrun has launched one process a GPU, and each is a whole engine: vLLM takes RANK, LOCAL_RANK
            # and the process group from there. By itself it would put every engine on the first GPU.
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=1,
            enforce_eager=eager,
            enable_prefix_caching=True,         # a prompt's n samples share its keys and values: see generate
            disable_log_stats=True,
            # Log-probs of the distribution that was sampled from, after temperature. The default, before it,
            # would make pi / pi_engine no importance weight.
            logprobs_mode="processed_logprobs",
            **arguments)
        torch.set_num_threads(threads)
        self.llm.apply_model(refuse_partial_loads)      # called with the model that vLLM has made

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
        if isinstance(seed, (list, tuple)):
            seeds = seed
        else:
            seeds = [seed + i * n for i in range(len(prompts))]
        rollouts = [[None] * n for _ in prompts]
        bar = tqdm(total=len(prompts) * n, desc="responses", leave=False, position=1, disable=not progress)
        running = {}                    # request id -> (index of the prompt, index of the sample)
        engine = self.llm.llm_engine    # under LLM.generate, which would return only when all have ended
        try:
            # One request a sample, not n samples a request: a response is then handed out when it ends, not
            # when the longest of its group does. The prompt they share is computed once, by prefix caching.
            # (The paper's step on 8 GPUs: 16 of its 128 prompts, 8 samples each, 128 requests on this rank.)
            for row, prompt in enumerate(prompts):
                for sample in range(n):
                    request_id = str(next(self.request_ids))
                    running[request_id] = (row, sample)
                    engine.add_request(
                        request_id, {"type": "token", "prompt_token_ids": list(prompt)},
                        self.sampling_params(temperature, top_p, max_tokens, seeds[row] + sample))
            while running:
                ended = self._decode_step(running, rollouts)
                if running and not engine.has_unfinished_requests():    # they would be waited for in vain
                    raise RuntimeError(
                        f"vLLM has lost {len(running)} of {len(prompts) * n} requests; nothing is known to "
                        "do this but a vllm version other than the pinned one")
                bar.update(len(ended))
                if on_step:
                    on_step(ended)
        finally:
            bar.close()
            engine.abort_request(list(running))     # after an exception: nothing is left for the next call
        return rollouts

    def _decode_step(self, running, rollouts):
        """One more token of every sequence that is being decoded. Moves the responses that it ends from
        `running` to `rollouts`, and returns them, as on_step takes them."""
        ended = []
        for output in self.llm.llm_engine.step():
            if output.finished:
                row, sample = running.pop(output.request_id)
                rollout = self._rollout(output)
                rollouts[row][sample] = rollout
                ended.append((row, sample, rollout))
        return ended

    def sampling_params(self, temperature, top_p, max_tokens, seed):
        """vLLM's parameters of one sample. logprobs=0: the sampled token's own."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=0,                                        # off: any cut biases the ratio pi / pi_engine
            max_tokens=max_tokens,
            seed=seed % 2**63,                              # vLLM's are signed, ours unsigned, of 64 bits
            logprobs=0,
            detokenize=False,                               # _rollout decodes once, vLLM would at every token
            output_kind=RequestOutputKind.FINAL_ONLY)       # no output of a response before it ends

    def _rollout(self, output):
        """vLLM's output of a request -> Rollout."""
        sample = output.outputs[0]
        tokens = list(sample.token_ids)
        logprobs = []
        for token, candidates in zip(tokens, sample.logprobs):      # candidates: token id -> Logprob
            logprobs.append(candidates[token].logprob)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Rollout(tokens, logprobs, text, finished=sample.finish_reason == "stop")     # else "length"

    def sync_weights(self, named_tensors, version):
        """Load (Hugging Face name, full tensor) pairs, consumed lazily, one tensor at a time.

        Wakes a sleeping engine: the weights' memory first, then, when they are in place, the KV cache;
        cached prefixes of the old weights are dropped. Raises ValueError unless these are the weights of
        config, each of them, and vLLM took all; after that, or any error in named_tensors, the engine serves
        no version and takes no further one.
        """
        if self.broken:     # vLLM still holds tensors of that transfer, and would count them for this one
            raise RuntimeError("an earlier transfer of weights failed half-way: start a new engine")
        self.weights_version = None     # until all is in place, so that no error on the way leaves old ones
        self.broken = True
        self.wake("weights")
        # "Collective" over the workers of this engine, of which there is one. A stream, because a whole copy
        # of a 7B model in bf16 takes 15 GB, its largest tensor 1.1 GB. Always an iterator: without one,
        # reload_weights reads the model's folder again, where others have found stale weights, and no error.
        self.llm.collective_rpc("reload_weights",
                                kwargs={"weights_iterator": self._complete(named_tensors)})
        # Only now: while tensors were gathered, the KV cache's memory was free for them.
        self.wake("kv_cache")
        # A prompt's keys and values come from the weights: those of the old ones must not be found again.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its cached prefixes, which belong to the old weights: "
                               "some request is still running")
        self.weights_version = version
        self.broken = False

    def _complete(self, named_tensors):
        """The stream for vLLM; an error if it lacks a weight, has one twice, or one that the model has not.

        vLLM itself does not mind a missing tensor. Where it fuses layers (q, k and v; gate and up) it counts
        numbers until the fused one is full: without k_proj it serves whatever was in that memory, and with
        q_proj twice it takes no v_proj.
        """
        missing = set(self.names)
        for name, tensor in named_tensors:
            if name in self.aliases:
                continue                            # of a tied head: it comes with the embedding
            if name not in self.names:
                raise ValueError(f"the engine's model has no weight {name}; it has, for example, "
                                 f"{', '.join(sorted(missing)[:3])}")
            if name not in missing:
                raise ValueError(f"the weight {name} came twice")
            missing.remove(name)
            yield name, tensor
            if self.untied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.names)} weights did not come, such as "
                             f"{', '.join(sorted(missing)[:3])}")

    def sleep(self):
        """Give the GPU back to training: drop weights (the trainer has them) and KV cache.
        Nothing to do on CPU."""
        if self.cuda and not self.asleep:
            # Level 1 would move the weights to host memory, to be used again; these are old after the update.
            # Level 2 drops them. The addresses stay reserved, so CUDA graphs that were captured stay valid.
            self.llm.sleep(level=2)
            self.asleep = {"weights", "kv_cache"}
            self.weights_version = None
            gc.collect()
            torch.cuda.empty_cache()

    def wake(self, tag):
        """Map the memory of "weights" or "kv_cache" again, without contents; sync_weights calls it."""
        if tag in self.asleep:
            # vLLM asks the driver for it, which does not see what torch keeps for the next backward.
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[tag])
            self.asleep.remove(tag)

    def close(self):
        """Shut the engine down; call it before destroy_process_group."""
        if self.llm is not None:
            for tag in sorted(self.asleep, reverse=True):      # vLLM can free only what is mapped
                self.wake(tag)
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()


# ---- What vLLM is given -------------------------------------------------------------------------------

def gpu_arguments(memory):
    """What vLLM's LLM is given on GPUs only. memory: the engine's share of the card."""
    return {
        "gpu_memory_utilization": memory,
        "enable_sleep_mode": True,
        # Logits in fp32, as the trainer has them: the same product of bf16 numbers, only not rounded to bf16,
        # so the weights take no more memory. vllm 0.25.1 has this for pooling models alone, and ignores it
        # here.
        "hf_overrides": {"head_dtype": "float32"},
    }


def cpu_arguments(config, max_tokens, max_sequences, untied):
    """What it is given on a CPU only."""
    # All of the KV cache is resident from the start, so it gets what max_sequences need, at most 1 GiB or
    # one sequence. (VLLM_CPU_KVCACHE_SPACE, in GiB, would win over this.)
    one_sequence = kv_bytes(config, bytes_per_number=4) * (max_tokens + 256)
    return {
        "kv_cache_memory_bytes": max(one_sequence, min(2**30, one_sequence * max_sequences)),
        # A prompt is computed in one piece or waits for the next step. By default vLLM cuts the one that
        # exceeds a step's budget of tokens, draws a token after the first piece too, and rewinds the
        # request's generator for it, which a generator on a CPU cannot do. The budget has room for the
        # longest sequence beside all others, each of which takes one token.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_tokens + max_sequences),
        "hf_overrides": {"tie_word_embeddings": False} if untied else {},
    }


def kv_bytes(config, bytes_per_number=2):
    """Bytes of one token in the KV cache: 2 (K, V) x layers x KV heads x head width x bytes_per_number."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * bytes_per_number


def config_folder(config, tokenizer):
    """A folder with config and tokenizer, and no weights: what vLLM wants to read from disk.

    Its path is part of the key under which vLLM keeps compiled kernels. In a folder with a random name, each
    start would compile for minutes; so it lies in the user's cache, under a hash of its content.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return write_config(config, tokenizer, cache / "srft")
    except (OSError, RuntimeError) as error:             # read-only; a user without a home
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{error}: the engine compiles its kernels anew at every start; set XDG_CACHE_HOME to a "
                  "folder where it can write", file=sys.stderr)
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return write_config(config, tokenizer, Path(folder))


def write_config(config, tokenizer, cache):
    """config_folder, in the folder `cache`. Ranks and runs may do this at the same time: each writes a folder
    of its own and renames it when it is whole, which only the first can."""
    cache.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    config.save_pretrained(new)
    tokenizer.save_pretrained(new)
    content = hashlib.sha256()
    for file in sorted(new.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    folder = cache / content.hexdigest()[:16]
    try:
        new.rename(folder)
    except OSError:                                     # another one was first, or it cannot be written
        kept = file_sizes(new)
        shutil.rmtree(new)
        if not folder.is_dir():
            raise
        if file_sizes(folder) != kept:
            raise OSError(f"{folder} is not what was written there; delete it") from None
    return folder


def file_sizes(folder):
    return {file.name: file.stat().st_size for file in folder.iterdir()}


# ---- Weights ------------------------------------------------------------------------------------------

def weight_names(config):
    """-> (Hugging Face's names of a model's weights; the second names of those that are tied to others)."""
    with torch.device("meta"):                                      # no memory, no time
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names, every - names


def refuse_partial_loads(model):
    """Make it an error that vLLM's `model` did not fill each of its parameters from what it was sent.

    Its `load_weights` returns the names of those it filled; a reload only logs a warning for the others.
    `model` is vLLM's own, whose names differ from Hugging Face's where it fuses layers (qkv_proj).
    """
    load = model.load_weights
    names = {name for name, _ in model.named_parameters()}

    def load_all(weights):
        loaded = load(weights)
        missing = names - loaded
        if missing:
            raise ValueError(f"vLLM left {len(missing)} of its {len(names)} parameters as they were, such as "
                             f"{', '.join(sorted(missing)[:3])}")
        return loaded

    model.load_weights = load_all
