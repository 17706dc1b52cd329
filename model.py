"""The policy: a Hugging Face causal LM, sharded by FSDP2, that turns packed sequences into
log-probs and entropies.

    policy = load_policy(path, config, mesh, device)              # shards read straight from safetensors
    for batch in pack(sequences, token_budget):               # no padding anywhere: sequences lie end to end
        logp, entropy, _ = policy(collate(batch, device))     # (B,T) nats each; entropy has no gradient
    save_checkpoint(...); load_checkpoint(...); export_hf(...)

Covers App. B of the paper (RoPE theta, window) and everything that Eq. 1-13 take for granted: log
pi_theta(y_t | x, y_<t) and the full-vocabulary entropy H_t of the same distribution, from one forward pass.

Letters: B sequences, T response tokens, N packed tokens, R response tokens in a pack, V
vocabulary, D hidden size.
"""
import gc
import heapq
import inspect
import json
import math
import shutil
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from support.device import to_device
from support.logprobs import token_kl, token_logprobs

# ----------------------------------------------------------------------------------------------------------
# Packing: sequences lie end to end in one row of N tokens; attention is block-diagonal and causal.

@dataclass
class Sequence:
    """One training sequence: a prompt with a rollout or a demonstration (tokens as int lists or arrays)."""
    prompt: list
    response: list                 # EOS included when the response ended by itself
    is_demo: bool = False
    group: int = 0                 # which prompt of the step; Eq. 6 forms the augmented group from it
    reward: float = 0.0            # R(x, y) of Eq. A2
    advantage: float = 0.0         # Eq. 7
    engine_logp: list | None = None   # log pi_engine(y_t) of each response token; None for a demonstration
    engine: int = 0                # the rank whose engine sampled it
    finished: bool = True          # False: the rollout was cut at the length limit

    def __len__(self):
        return len(self.prompt) + len(self.response)


def karmarkar_karp(costs, k):
    """Indices of `costs` in k lists whose sums differ little: the largest differencing method, k-way.

    Every item starts as a partition of its own (k sums, all but one 0). The two partitions with the widest
    spread are merged, largest sum with smallest, until one is left. Empty parts are not stored.
    """
    heap = [(-cost, i, [(cost, [i])]) for i, cost in enumerate(costs)]         # (-spread, tie-break, parts)
    heapq.heapify(heap)
    for tie in range(len(heap), 2 * len(heap) - 1):
        a, b = heapq.heappop(heap)[2], heapq.heappop(heap)[2]                  # parts, the largest first
        met = max(0, len(a) + len(b) - k)                                      # so many of each must share
        a, small_a = a[:len(a) - met], a[len(a) - met:]
        b, small_b = b[:len(b) - met], b[len(b) - met:]
        parts = a + b + [(x + y, p + q) for (x, p), (y, q) in zip(small_a, reversed(small_b))]
        parts.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (-parts[0][0] + (parts[-1][0] if len(parts) == k else 0), tie, parts))
    parts = [indices for _, indices in heap[0][2]] if heap else []
    return parts + [[] for _ in range(k - len(parts))]


def pack(sequences, token_budget, multiple_of=1, cost=len):
    """Distribute sequences over micro-batches of at most `token_budget` tokens.

    Returns a list of lists; every sequence appears once. The number of micro-batches is what first-fit on
    decreasing lengths needs, rounded up to a multiple of `multiple_of` (the ranks), so that rank r trains on
    micro-batches r, r + ranks, ...; some may be empty. Those of one round run side by side, and all ranks
    wait for the costliest: of the distributions that keep the budget (Karmarkar-Karp on costs, on tokens,
    first-fit) the one with the shortest rounds is taken. cost: of a sequence; the training loop passes FLOPs,
    in which attention is quadratic. Raises ValueError when one sequence alone is over the budget.
    """
    tokens, costs = [len(s) for s in sequences], [cost(s) for s in sequences]
    if tokens and max(tokens) > token_budget:
        raise ValueError(f"a sequence of {max(tokens)} tokens exceeds --micro_batch_tokens {token_budget}")
    first_fit, loads = [], []
    for i in sorted(range(len(sequences)), key=lambda i: -tokens[i]):
        b = next((b for b, used in enumerate(loads) if used + tokens[i] <= token_budget), len(loads))
        if b == len(loads):
            first_fit.append([])
            loads.append(0)
        first_fit[b].append(i)
        loads[b] += tokens[i]
    count = max(1, math.ceil(len(first_fit) / multiple_of)) * multiple_of
    first_fit += [[] for _ in range(count - len(first_fit))]

    total = lambda numbers, part: sum(numbers[i] for i in part)
    rounds = lambda parts: sum(total(costs, part) for part in parts[::multiple_of])
    candidates = [sorted(parts, key=lambda part: -total(costs, part))
                  for parts in (karmarkar_karp(costs, count), karmarkar_karp(tokens, count), first_fit)
                  if all(total(tokens, part) <= token_budget for part in parts)]
    return [[sequences[i] for i in sorted(part)] for part in min(candidates, key=rounds)]


@dataclass
class Batch:
    """A packed micro-batch on a device. `where[r]` is the position whose hidden state
    predicts `targets[r]`."""
    ids: torch.Tensor              # (1, N)
    positions: torch.Tensor        # (1, N), restarting at 0 with every sequence
    cu_seqlens: torch.Tensor       # (sequences + 1,) int32, where each sequence starts
    max_seqlen: int
    where: torch.Tensor            # (R,)
    targets: torch.Tensor          # (R,)
    lengths: list                  # response tokens of each sequence; they sum to R


def collate(sequences, device):
    """Sequences -> Batch. An empty list gives a batch of one token that predicts nothing, by which a rank
    without work still joins every collective of its group."""
    tokens = ([np.concatenate([s.prompt, s.response]).astype(np.int64) for s in sequences]
              or [np.zeros(1, np.int64)])
    starts = np.cumsum([0] + [len(t) for t in tokens])
    where = [start + len(s.prompt) - 1 + np.arange(len(s.response)) for s, start in zip(sequences, starts)]
    positions = [np.arange(len(t)) for t in tokens]
    targets = [s.response for s in sequences]
    nothing = np.zeros(0, np.int64)
    return Batch(
        ids=to_device(np.concatenate(tokens), device)[None],
        positions=to_device(np.concatenate(positions), device)[None],
        cu_seqlens=to_device(starts, device, torch.int32), max_seqlen=max(map(len, tokens)),
        where=to_device(np.concatenate([nothing, *where]), device),
        targets=to_device(np.concatenate([nothing, *targets]), device, torch.int64),
        lengths=[len(s.response) for s in sequences])


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *,
                     cu_seq_lens_q=None, max_length_q=None, position_ids=None, use_cache=None, **asked):
    """Block-diagonal causal attention over packed sequences, in the calling convention of transformers.

    query (1, heads, N, d), key and value (1, kv_heads, N, d) -> (1, N, heads, d). On CUDA the flash
    kernel that ships with torch, told where sequences start, so that no layer waits for the device; on
    CPU one call for each run of sequences of one length. Raises ValueError, by name, for whatever else a
    model asks of its attention: softcap, s_aux (sinks), a sliding_window, a mask of its own.
    """
    asked = [name for name, x in (asked | {"attention_mask": attention_mask}).items() if x is not None]
    if asked or cu_seq_lens_q is None:
        why = ", ".join(asked) or "nothing: it does not pass on where sequences start (cu_seq_lens_q)"
        raise ValueError(f"{type(module).__name__} asks its attention for {why}; packed attention is plain "
                         "causal attention and would give other numbers: use a model of the Qwen2, Qwen3, "
                         "Llama, Mistral or OLMo-2 kind")
    qkv = [x[0].transpose(0, 1) for x in (query, key, value)]                               # (N, heads, d)
    gqa = query.shape[1] != key.shape[1]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn
        # torch 2.11 takes grouped heads as they are; later versions ask for a word.
        grouped = {"enable_gqa": gqa} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        out = varlen_attn(*qkv, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                          window_size=(-1, 0), **grouped)                      # (-1, 0): causal, all the way
        return out[None], None
    runs = [(len(list(run)), length) for length, run in groupby(cu_seq_lens_q.diff().tolist())]
    # split, not slices: the gradient of each slice would be a tensor of all N tokens.
    parts = zip(*(x.split([count * length for count, length in runs]) for x in qkv))
    outs = [F.scaled_dot_product_attention(*(x.unflatten(0, run).transpose(1, 2) for x in part),
                                           is_causal=True, scale=scaling, enable_gqa=gqa)
            for run, part in zip(runs, parts)]                                     # (count, heads, length, d)
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in outs])[None], None


AttentionInterface.register("packed", packed_attention)


# ----------------------------------------------------------------------------------------------------------
# The policy.

class Policy(nn.Module):
    """pi_theta. A thin root around the language model, because FSDP2 gathers the root's
    parameters (embedding, final norm, head) only inside the root's own forward: hidden states and
    head must meet here."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.generation = {}          # the model's own defaults of sampling, which its export keeps

    def forward(self, batch, temperature=1.0, entropy_grad=False, reference=None, features=False,
                own_logits=False):
        """Batch -> (logp, entropy, kl), each (B,T), right-padded with zeros; T is the longest response in the
        batch. `reference`: the `features` of the same batch by the model that kl is to; without, kl is None.

        features: return the hidden states that predict the responses, (R,D), and the head, (V,D), instead.
        own_logits: return logp alone, from the logits of transformers' own forward, which holds (N,V): for
        check_packing, and one short sequence.
        """
        if own_logits:
            logits = self.lm(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits[0]
            return logits[batch.where].float().log_softmax(-1).gather(-1, batch.targets[:, None]).T
        # vLLM serves some models (OLMo-2) by transformers' own class, and gives it a __call__ that only the
        # engine's instances can take. nn.Module's is the one it had.
        hidden = nn.Module.__call__(
            self.lm.base_model, input_ids=batch.ids, position_ids=batch.positions, attention_mask=None,
            use_cache=False, cu_seq_lens_q=batch.cu_seqlens,
            max_length_q=batch.max_seqlen).last_hidden_state[0]                                  # (N, D)
        hidden, head = hidden[batch.where], self.lm.get_output_embeddings().weight               # (V, D)
        if features:
            return hidden, head
        logp, entropy = token_logprobs(hidden, head, batch.targets, temperature, entropy_grad=entropy_grad)
        kl = token_kl(hidden, head, *reference, temperature) if reference else None
        if not batch.lengths:           # nothing to predict: keep the graph, so that backward still runs
            return logp[None].clone(), entropy[None].clone(), None
        return tuple(None if x is None else pad_sequence(x.split(batch.lengths), batch_first=True)
                     for x in (logp, entropy, kl))


    def flops(self, sequences):
        """Model FLOPs of one forward and backward over `sequences`."""
        return forward_backward_flops(self.lm.config, sum(p.numel() for p in self.parameters()), sequences)


def compute_dtype(device):
    """Of the engine and of exported models."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def accumulate(policy, last):
    """Before each micro-batch of an update: is it the `last`? Until then embedding and head stay gathered, as
    no weight changes in between, and gradients are summed within a node only: across nodes (HSDP) once."""
    policy.set_reshard_after_backward(last, recurse=False)
    policy.set_requires_all_reduce(last)


# A head that is more than hidden @ weight.T, by its field in config.json; None or 1 leaves it plain.
HEADS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")       # the angle of a position is that position's alone


def misread(config):
    """What would make this file's log-probs wrong without a sign of it, or None: a head, a RoPE, experts or
    layers that it does not know. (check_packing finds those that no field of the config tells.)"""
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ROPE_TYPES:
        return (f"RoPE of type {rope!r} is not supported: where its angles depend on the longest sequence of "
                "a batch, a response's log-probs depend on what it is packed with")
    for name in HEADS:
        if getattr(config, name, None) not in (None, 1):
            return (f"a scaled or capped head ({name} {getattr(config, name)}) is not supported: log-probs "
                    "here are those of the plain product of hidden states and head")
    if getattr(config, "attn_logit_softcapping", None):
        return f"capped attention (attn_logit_softcapping {config.attn_logit_softcapping}) is not supported"
    for name in EXPERTS:
        if getattr(config, name, None):
            return (f"a mixture of experts ({name} {getattr(config, name)}) is not supported: its files name "
                    "other weights than its modules, and routing may differ between engine and trainer")
    layers = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layers or (not layers and getattr(config, "sliding_window", None)):
        return "sliding-window attention is not supported"
    if layers - {"full_attention"}:
        return f"layers of type {', '.join(sorted(layers - {'full_attention'}))} are not supported"


def stored_generation(path):
    """The fields of the folder's generation_config.json; {} if it has none."""
    file = Path(path) / "generation_config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def load_config(path, rope_theta=0.0, window=0):
    """The model's config with App. B's overrides; 0 keeps the model's own value. Its eos_token_id is that of
    generation_config.json, where there is one: a list, if several tokens end a response.

    Raises ValueError where the override is not App. B's (RoPE theta 10,000 -> 40,000, which makes room for a
    longer window) and would quietly break the model, and for a model that would train on wrong numbers.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except ValueError as error:                        # of transformers: not a type of model that it knows
        raise ValueError(f"{path}: {error}") from error
    own = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if own is None:
        raise ValueError(f"{path}: has no single RoPE theta; use a Qwen2, Llama or one of their kin")
    if reason := misread(config):
        raise ValueError(f"{path}: {reason}; use a dense full-attention model of the Qwen2, Qwen3, Llama, "
                         f"Mistral or OLMo-2 kind (this one is {config.model_type})")
    if window:
        if window > config.max_position_embeddings and rope_theta in (0, own):
            raise ValueError(f"{path}: --window {window} is over its {config.max_position_embeddings} "
                             "tokens, and its RoPE stays as it is; pass --window 0 to keep the model's own")
        config.max_position_embeddings = window
    if rope_theta:
        if own not in (10_000, rope_theta):
            raise ValueError(f"{path}: its RoPE theta is {own:,.0f}, and changing it to {rope_theta:,.0f} "
                             "would break it; pass --rope_theta 0 --window 0 to keep the model's own")
        config.rope_parameters["rope_theta"] = float(rope_theta)
    eos = stored_generation(path).get("eos_token_id")
    if eos is not None:                                # config.json often names one of several, or none
        config.eos_token_id = eos
    config.use_cache = False
    return config


def build_policy(config, mesh, device, checkpointing=True, bf16=None, offload=False):
    """The sharded policy with uninitialized weights: fp32 master weights and gradient reduction
    everywhere; compute in bf16 on GPU, fp32 on CPU, unless `bf16` says otherwise. One FSDP2 unit a
    decoder block, the rest in the root. offload: shards, their gradients and so the optimizer's state lie in
    host memory; each block's shard crosses to the GPU when it is gathered."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="packed")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("a language-model head with a bias is not supported")
    unknown = [name for name, _ in lm.named_buffers() if not name.endswith("inv_freq")]
    if unknown:                          # to_empty would leave them without contents: only weights are read
        raise ValueError(f"{config.model_type}: numbers in buffers ({', '.join(unknown[:3])}) are not "
                         "supported; use a model of the Qwen2, Qwen3, Llama, Mistral or OLMo-2 kind")
    for module in lm.modules():          # pi_theta is one function: the engine has no dropout either
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if checkpointing:
        # Each decoder block keeps only its input and is recomputed in backward. Nothing in it is random, so
        # no generator's state need be saved and set at every block.
        lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    policy = Policy(lm.train())
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    bf16 = device.type == "cuda" if bf16 is None else bf16
    host = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    kwargs = dict(mesh=mesh, mp_policy=mixed if bf16 else MixedPrecisionPolicy(),
                  offload_policy=host if offload else OffloadPolicy())
    for block in lm.base_model.layers:
        fully_shard(block, **kwargs)
    fully_shard(policy, **kwargs)
    for module in policy.modules():
        # Losses divide by counts over all ranks and micro-batches themselves, so gradients are summed,
        # not averaged: 1 rank x 8, 2 x 4 and any split in between then agree.
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)     # a plain sum, which gloo knows too
    policy.to_empty(device="cpu" if offload else device)
    lm.tie_weights()
    for module in policy.modules():         # to_empty also emptied RoPE's frequencies, which no file holds
        if hasattr(module, "inv_freq"):
            for name, buffer in type(module)(config).named_buffers():
                module.register_buffer(name, buffer.to(device), persistent=False)
    return policy


def load_policy(path, config, mesh, device, checkpointing=True, offload=False):
    """build_policy, with the weights read from the safetensors in `path`: each rank reads
    only its own shards."""
    if not list(Path(path).glob("*.safetensors")):
        raise FileNotFoundError(f"{path}: no *.safetensors here; --model takes a Hugging Face model folder")
    policy = build_policy(config, mesh, device, checkpointing, offload=offload)
    policy.generation = stored_generation(path)
    # A tied head appears once.
    state = {name.removeprefix("lm."): p.detach() for name, p in policy.named_parameters()}
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (Exception, dcp.api.CheckpointException) as e:       # the latter derives from BaseException
        raise ValueError(f"{path}: the weights do not fit this config "
                         f"({type(e).__name__}: {str(e)[-300:]})") from e
    return policy


def full_parameters(policy, dtype):
    """Stream (Hugging Face name, full tensor in `dtype`), one parameter at a time; a
    tied tensor comes once.

    A collective: every rank must consume the whole stream. Shards are cast before they are moved and
    gathered, so that bf16 moves half the bytes of the fp32 master weights, each of them once.
    """
    policy.reshard()
    for name, p in policy.named_parameters():
        yield name.removeprefix("lm."), p.detach().to(dtype).to(p.device_mesh.device_type).full_tensor()


@torch.no_grad()
def check_packing(policy, device, vocab_size):
    """Abort unless log-probs of packed sequences are those of each alone, and those of transformers' own
    forward with its own head.

    Guards against two silent faults: a mask that lets one sequence see another (0.5 nats off and more), and a
    head of a kind that this file does not know (2-4 nats). In nats a token, averaged over each response of 64
    or more random tokens, fp32 may differ by 1e-3 and bf16, which rounds products of different sizes
    differently, by 0.2. Short sequences are enough: no RoPE that load_config lets pass depends on length.
    transformers' attention is "sdpa"; "eager" rounds its scores to bf16 and may be off by 0.4 for that alone.
    Raises RuntimeError. A collective.
    """
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(0, vocab_size, n)
    sequences = [Sequence(tokens(3 + i), tokens(64 + 4 * i)) for i in range(3)]
    batch = collate(sequences, device)
    hidden, _ = policy(batch, features=True)                                                    # (204, D)
    limit = 0.2 if hidden.dtype == torch.bfloat16 else 1e-3
    packed = policy(batch)[0]                                                                   # (3, 72)

    def alone(attention, own):
        """Log-probs of each response, its sequence by itself: list of (T,)."""
        policy.lm.set_attn_implementation(attention)
        found = [policy(collate([s], device), own_logits=own)[0].flatten() for s in sequences]
        policy.lm.set_attn_implementation("packed")
        return found

    for found, what in ((alone("packed", own=False), "each sequence alone"),
                        (alone("sdpa", own=True), "transformers' own forward")):
        for row, logp in zip(packed, found):
            error = (row[:len(logp)] - logp).abs().mean().item()
            if not error < limit:
                raise RuntimeError(
                    f"packed log-probs differ from {what} by {error:.4f} nats a token (limit {limit}): "
                    f"with this architecture ({policy.lm.config.model_type}) or transformers version, packed "
                    "sequences see each other, or head or attention are of a kind that this code does not "
                    "know. Use a model of the Qwen2, Qwen3, Llama, Mistral or OLMo-2 kind, or the pinned "
                    "versions.")
    policy.reshard()      # a forward without backward leaves the root gathered: named_parameters() are copies


def head_width(config):
    """Numbers of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward_backward_flops(config, parameters, sequences):
    """Model FLOPs of one forward and backward over `sequences` (for MFU): 6 per weight and token, the
    embedding look-up not counted and the head counted on response tokens only, plus causal attention.
    Recomputation does not count."""
    head = config.vocab_size * config.hidden_size
    body = parameters - head * (1 if config.tie_word_embeddings else 2)
    width = config.num_hidden_layers * config.num_attention_heads * head_width(config)
    n = sum(map(len, sequences))
    return (6 * body * n + 6 * head * sum(len(s.response) for s in sequences)
            + 6 * width * sum(len(s)**2 for s in sequences))


def readable_by_transformers_4(folder):
    """Say in an exported model's JSON files what transformers 4.57 reads under other names; transformers 5
    and vLLM read both.

    RoPE: without rope_theta and rope_scaling, 4.57 takes theta 10,000 and no scaling, without a word. The
    tokenizer: 4.57 knows neither the class TokenizersBackend nor a list of extra_special_tokens.
    """
    def rewrite(file, change):
        fields = json.loads(file.read_text())
        change(fields)
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")

    def spell_out_rope(config):
        scaling = dict(config["rope_parameters"])
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in scaling:
                config[name] = scaling.pop(name)
        if scaling["rope_type"] != "default":
            config["rope_scaling"] = scaling

    def rename_tokens(config):
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if "extra_special_tokens" in config:
            config["additional_special_tokens"] = config.pop("extra_special_tokens")

    rewrite(folder / "config.json", spell_out_rope)
    rewrite(folder / "tokenizer_config.json", rename_tokens)


def export_hf(folder, policy, tokenizer, dtype):
    """Write safetensors, config (with the RoPE override), tokenizer, and the base model's own generation
    defaults but for its limits of length, as transformers (4.57 too) and `vllm serve` open them. A
    collective; rank 0 holds the whole model in host memory once, in `dtype`."""
    rank0, folder, state = dist.get_rank() == 0, Path(folder), {}
    for name, tensor in full_parameters(policy, dtype):
        if rank0:
            state[name] = tensor.to("cpu", copy=True)          # gathered, it may be a view of a padded one
    if rank0:
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Not by the model's own save_pretrained: it needs a second instance, which the engine may prevent
        # (Policy.forward), and refuses generation defaults that from_pretrained reads gladly.
        config = type(policy.lm.config).from_dict(policy.lm.config.to_dict() | {
            "use_cache": True, "dtype": dtype, "architectures": [type(policy.lm).__name__]})
        config.save_pretrained(partial)
        save_torch_state_dict(state, partial)
        generation = {name: x for name, x in policy.generation.items() if not name.startswith("max_")}
        generation["eos_token_id"] = config.eos_token_id
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer.save_pretrained(partial)
        readable_by_transformers_4(partial)
        for file in partial.iterdir():
            file.chmod(0o644)                                  # safetensors are written for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    del state
    gc.collect()
    dist.barrier()
