"""The policy pi_theta: a Hugging Face causal LM, sharded by FSDP2, that turns packed sequences into log-probs
and entropies.

    config = load_config(folder, rope_theta=40_000, window=16_384)                 # App. B
    policy = load_policy(folder, config, mesh, device)       # each rank reads its shards of the safetensors
    for sequences in pack(all_sequences, token_budget=9216):
        logp, entropy, _ = policy(collate(sequences, device))       # (B,T) nats; entropy has no gradient
    engine.sync_weights(full_parameters(policy, torch.bfloat16), version)
    export_hf(folder, policy, tokenizer, torch.bfloat16)

Covers App. B of the paper (RoPE theta, window) and everything that Eq. 1-13 take for granted: log
pi_theta(y_t | x, y_<t) and the full-vocabulary entropy H_t of the same distribution, from one forward pass.
The head, from hidden states to these, is support/logprobs.py; checkpoints are support/checkpoint.py.

To copy: `Sequence`, `Batch` and `collate` need numpy, torch and support.device.to_device, and know no model.
How sequences are dealt to micro-batches is support/packing.py.

Letters: B sequences, T response tokens, N packed tokens, R response tokens in a pack, V vocabulary, D hidden
size.
"""
import gc
import inspect
import json
from dataclasses import dataclass
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
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.device import to_device
from support.disk import discard, read_json
from support.health import check_alive
from support.logprobs import token_kl, token_logprobs
from support.packing import pack  # noqa: F401  (so that callers find pack beside collate)
from support.weights import WeightsReader

# ----------------------------------------------------------------------------------------------------------
# Packing. A step's 128 prompts x (8 rollouts + 1 demonstration) are 1,152 sequences of up to 1,024 + 8,192
# tokens, many far shorter. No padding: they lie end to end in one row of N tokens, up to 9,216, which is a
# micro-batch, and attention looks no further back than the start of its own sequence.

@dataclass
class Sequence:
    """One training sequence: a prompt with a rollout or a demonstration (tokens as int lists or arrays)."""
    prompt: list                   # x
    response: list                 # y; EOS included when the response ended by itself
    is_demo: bool = False
    group: int = 0                 # which prompt of the step; Eq. 6 forms the augmented group from it
    reward: float = 0.0            # R(x, y) of Eq. A2: 1.0 or 0.0
    advantage: float = 0.0         # A of Eq. 7
    engine_logp: list | None = None   # log pi_engine(y_t) of each response token; None for a demonstration
    engine: int = 0                # the rank whose engine sampled it
    finished: bool = True          # False: the rollout was cut at the length limit

    def __len__(self):
        return len(self.prompt) + len(self.response)


@dataclass
class Batch:
    """A packed micro-batch on a device: the hidden state at `where[r]` predicts `targets[r]`."""
    ids: torch.Tensor              # (1, N)
    positions: torch.Tensor        # (1, N), restarting at 0 with every sequence, as the engine counts them
    cu_seqlens: torch.Tensor       # (sequences + 1,) int32, where each sequence starts, and N
    max_seqlen: int
    where: torch.Tensor            # (R,)
    targets: torch.Tensor          # (R,)
    lengths: list                  # response tokens of each sequence; they sum to R


def collate(sequences, device):
    """Sequences -> Batch.

    prompt [5, 6] with response [7, 8, 9], and prompt [1] with response [2]:

        ids         [[5, 6, 7, 8, 9, 1, 2]]
        positions   [[0, 1, 2, 3, 4, 0, 1]]
        cu_seqlens  [0, 5, 7]                 max_seqlen 5
        where       [1, 2, 3, 5]              6 predicts 7, 7 predicts 8, 8 predicts 9; 1 predicts 2
        targets     [7, 8, 9, 2]              lengths [3, 1]

    Prompts predict nothing: Eq. 1-13 are about responses. An empty list gives a batch of one token that
    predicts nothing, by which a rank without work still joins every collective of its group.
    """
    nothing = np.zeros(0, np.int64)                              # np.concatenate wants at least one array
    ids, positions, where, targets, lengths = [], [], [nothing], [nothing], []
    starts = [0]
    for sequence in sequences:
        start = starts[-1]
        ids += [sequence.prompt, sequence.response]
        positions.append(np.arange(len(sequence)))
        # The hidden state at a token predicts the next one: the response's first token is predicted by the
        # prompt's last, and the response's last token predicts nothing.
        where.append(start + len(sequence.prompt) - 1 + np.arange(len(sequence.response)))
        targets.append(sequence.response)
        lengths.append(len(sequence.response))
        starts.append(start + len(sequence))
    if not sequences:
        ids, positions, starts = [[0]], [[0]], [0, 1]
    return Batch(
        ids=to_device(np.concatenate(ids).astype(np.int64), device)[None],
        positions=to_device(np.concatenate(positions), device)[None],
        cu_seqlens=to_device(np.array(starts), device, torch.int32), max_seqlen=int(np.diff(starts).max()),
        where=to_device(np.concatenate(where), device),
        targets=to_device(np.concatenate(targets), device, torch.int64),
        lengths=lengths)


def pad(rows, device):
    """Rows of different lengths -> (B,T) float tensor, zeros on the right."""
    rows = [torch.as_tensor(np.asarray(row, np.float32)) for row in rows]
    return to_device(pad_sequence(rows, batch_first=True), device)


def loss_inputs(sequences, device):
    """What a loss asks of the data, not of the policy, by name: mask (B,T), reward, advantage, is_demo (B,),
    and engine_logp (B,T), log pi_engine, 0 on demonstrations, which no engine has sampled. {} for none."""
    if not sequences:
        return {}
    masks, engine_logps = [], []
    for s in sequences:
        masks.append(np.ones(len(s.response)))
        engine_logps.append(np.zeros(len(s.response)) if s.is_demo else s.engine_logp)
    return {"mask": pad(masks, device), "engine_logp": pad(engine_logps, device),
            "reward": to_device([float(s.reward) for s in sequences], device, torch.float32),
            "advantage": to_device([float(s.advantage) for s in sequences], device, torch.float32),
            "is_demo": to_device([bool(s.is_demo) for s in sequences], device)}


# ----------------------------------------------------------------------------------------------------------
# Attention of packed sequences is block-diagonal, no sequence sees another, and causal, no token a later one.

def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *,
                     cu_seq_lens_q=None, max_length_q=None, position_ids=None, use_cache=None, **asked):
    """Block-diagonal causal attention over packed sequences, in the calling convention of transformers.

    query (1, heads, N, d), key and value (1, kv_heads, N, d) -> (1, N, heads, d). On CUDA the flash kernel
    that ships with torch, told where sequences start, so that no layer waits for the device; on CPU see
    attention_by_runs. position_ids have turned query and key already, and dropout is 0 (empty_model). Raises
    ValueError, by name, for whatever else a model asks of its attention: softcap, s_aux (sinks), a
    sliding_window, a mask of its own.
    """
    asked["attention_mask"] = attention_mask
    asked = [name for name, wanted in asked.items() if wanted is not None]
    if asked or cu_seq_lens_q is None:
        why = ", ".join(asked) or "nothing: it does not pass on where sequences start (cu_seq_lens_q)"
        raise ValueError(f"{type(module).__name__} asks its attention for {why}; packed attention is plain "
                         "causal attention and would give other numbers: use a model of the Qwen2, Qwen3, "
                         "Llama, Mistral or OLMo-2 kind")
    query = query[0].transpose(0, 1)                                                           # (N, heads, d)
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)                           # (N, kv_heads, d)
    if not query.is_cuda:
        return attention_by_runs(query, key, value, cu_seq_lens_q.diff().tolist(), scaling)[None], None
    from torch.nn.attention.varlen import varlen_attn
    options = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        # Fewer heads of keys than of queries: torch 2.11 takes them as they are, later versions want a word.
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
                      scale=scaling, window_size=(-1, 0), **options)          # (-1, 0): causal, all the way
    return out[None], None


def attention_by_runs(query, key, value, lengths, scaling):
    """Attention on a CPU: one call for each run of neighbours of one length, which are a batch as they lie.

    query (N, heads, d), key and value (N, kv_heads, d) -> (N, heads, d). lengths [5, 5, 3] make two calls,
    on (2, heads, 5, d) and (1, heads, 3, d).
    """
    runs = []                                                                          # [sequences, length]
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1][0] += 1
        else:
            runs.append([1, length])
    tokens = [count * length for count, length in runs]
    outs = []
    # split, not slices: the gradient of each slice would be a tensor of all N tokens.
    for run, q, k, v in zip(runs, query.split(tokens), key.split(tokens), value.split(tokens)):
        q = q.unflatten(0, run).transpose(1, 2)                                # (sequences, heads, length, d)
        k = k.unflatten(0, run).transpose(1, 2)
        v = v.unflatten(0, run).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                             enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


# For an attention by a name of our own, transformers makes no mask: it would be (N, N).
AttentionInterface.register("packed", packed_attention)


# ----------------------------------------------------------------------------------------------------------
# The policy. FSDP2 in short: fully_shard(module) makes one unit of all parameters below a module, but for
# those that are in a unit already. Of each parameter a rank keeps one shard, cut along dimension 0 (it is a
# DTensor), and so of its gradient and of AdamW's two moments: of 7.6 B weights, 4 + 4 + 8 bytes each are
# 122 GB, and 15 GB a rank on 8. A unit's forward first all-gathers its parameters, which then stand in the
# module as plain tensors, and frees them at its end; its backward gathers them again, and at its end
# reduce-scatters the gradients: each rank gets the sum for its own shard. The root, which is whatever unit
# runs first, frees nothing after its forward, as its backward comes next. Hooks of the module's forward do
# all this, and all of it is collective: every rank must run the same units equally often.

class Policy(nn.Module):
    """pi_theta: a thin root around the language model.

    FSDP2 gathers the root's parameters (embedding, final norm, head) only inside the root's own forward, so
    hidden states and head must meet here. Were `lm` the root, its forward would make all (N,V) logits, and a
    call of lm.base_model past it would find the embedding in shards.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.parameter_count = sum(p.numel() for p in lm.parameters())      # a tied head counts once
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
        hidden = hidden[batch.where]                                 # (R, D): nothing predicts a prompt
        head = self.lm.get_output_embeddings().weight                # (V, D)
        if features:
            return hidden, head
        logp, entropy = token_logprobs(hidden, head, batch.targets, temperature, entropy_grad=entropy_grad)
        if not batch.lengths:
            # Nothing to predict: (1, 0) with its graph, so that backward still runs all collectives. Cloned,
            # as FSDP2 warns of a forward that returns views.
            return logp[None].clone(), entropy[None].clone(), None

        def rows(flat):                                                                # (R,) -> (B, T)
            return pad_sequence(flat.split(batch.lengths), batch_first=True)

        if reference is None:
            return rows(logp), rows(entropy), None
        ref_hidden, ref_head = reference
        return rows(logp), rows(entropy), rows(token_kl(hidden, head, ref_hidden, ref_head, temperature))

    def flops(self, sequences):
        """Model FLOPs of one forward and backward over a list of Sequences: see forward_backward_flops."""
        return forward_backward_flops(self.lm.config, self.parameter_count, sequences)


def accumulate(policy, last):
    """Before each micro-batch of an update: is it the `last`?

    Each backward reduce-scatters its gradients and adds them to the fp32 shards. (To add up first and reduce
    once, by set_requires_gradient_sync, takes whole gradients on every rank: 30 GB at 7.6 B.) Until the last,
    embedding and head stay gathered, as no weight changes in between (recurse=False: blocks are freed as
    always), and with several nodes (HSDP) gradients are summed within a node only, across nodes once.
    """
    policy.set_reshard_after_backward(last, recurse=False)
    policy.set_requires_all_reduce(last)


# ----------------------------------------------------------------------------------------------------------
# Loading. Which models train at all, and what would train on wrong numbers.

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
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        return (f"a quantized model (quant_method {quantized.get('quant_method')}) is not supported: its "
                "numbers stand for others")
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
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an object, found {str(found)[:80]}")
    return found


def load_config(path, rope_theta=0.0, window=0, keep_own=False):
    """The model's config with App. B's overrides; 0 keeps the model's own value. Its eos_token_id is that of
    generation_config.json, where there is one: a list, if several tokens end a response.

    RoPE turns pairs of a head's numbers by position x theta^(-2i/d). Qwen2.5-Math-7B has seen 4,096 positions
    at theta 10,000; at 40,000 its slow pairs turn up to four times slower, so that they meet angles they know
    at 16,384. Raises ValueError where the override is not that and would quietly break the model (keep_own:
    then its own RoPE stays instead, and its window), and for a model that would train on wrong numbers.
    """
    eos = stored_generation(path).get("eos_token_id")
    try:
        # trust_remote_code: by default it asks at the terminal whether to run code of the model's author.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if eos not in (None, []):                      # config.json often names one of several, or none
            config.eos_token_id = eos
    except Exception as error:                         # not a type of model that it knows, no whole file, ...
        raise ValueError(f"{path}: {error}") from error
    own = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if own is None:
        raise ValueError(f"{path}: has no single RoPE theta; use a Qwen2, Llama or one of their kin")
    reason = misread(config)
    if reason:
        raise ValueError(f"{path}: {reason}; use a dense full-attention model of the Qwen2, Qwen3, Llama, "
                         f"Mistral or OLMo-2 kind (this one is {config.model_type})")
    if keep_own and own not in (10_000, rope_theta):       # App. B changes 10,000, which is Qwen2.5-Math's
        rope_theta, window = 0.0, min(window, config.max_position_embeddings)
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
    config.use_cache = False                           # of keys and values, for generation: the engine's work
    return config


def load_tokenizer(path):
    """The tokenizer of a model's folder. Raises ValueError if there is none, or none that can be read."""
    # Looked for here, since transformers does not say that it is missing: for some types of model it makes an
    # empty tokenizer, for others it asks to install sentencepiece.
    kinds = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any(list(Path(path).glob(kind)) for kind in kinds):
        raise ValueError(f"{path}: no tokenizer here; copy tokenizer.json and tokenizer_config.json from the "
                         "model that it was made of")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:                         # several libraries raise, each its own errors
        raise ValueError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: "
                         f"{str(error).strip()[:150]}); copy tokenizer.json and tokenizer_config.json anew "
                         "from the model that it was made of") from error


def compute_dtype(device):
    """The dtype that weights have in the engine and in exported models, and that the policy computes in: bf16
    on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_policy(config, mesh, device, recompute=None, bf16=None, offload=False):
    """The sharded policy with uninitialized weights: fp32 master weights and gradient reduction everywhere;
    compute in compute_dtype(device), unless `bf16` says otherwise. mesh: 1-D, or for HSDP (replicate, shard).

    recompute: the first so many decoder blocks (None: all) keep their input alone, and run again in backward.
    offload: shards, their gradients and so the optimizer's state lie in host memory; each block's shard
    crosses to the GPU when it is gathered. Raises ValueError for a model whose numbers are not all in its
    weights.
    """
    lm = empty_model(config)
    blocks = lm.base_model.layers
    if recompute is None:
        recompute = len(blocks)
    if recompute:
        # At 7B, a block's input of 9,216 x 3,584 bf16 numbers is 66 MB, those of 28 blocks 1.8 GB; all that
        # backward needs of one block is 2.1 GB. The price is a second forward. Nothing in a block is random,
        # so no generator's state need be saved. The first blocks, as backward comes to them last: when one of
        # them is run again, what the others had kept is free.
        lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for block in blocks[recompute:]:
            block.gradient_checkpointing = False
    policy = Policy(lm.train())               # transformers recomputes in training mode only
    if bf16 is None:
        bf16 = compute_dtype(device) == torch.bfloat16
    shard(policy, mesh, device, bf16, offload)
    # From "meta" to real memory, and only of this rank's shards: no rank ever holds the whole model.
    policy.to_empty(device="cpu" if offload else device)
    for module in policy.modules():
        # to_empty also emptied RoPE's frequencies, which no file holds: a new module computes them.
        if hasattr(module, "inv_freq"):
            for name, buffer in type(module)(config).named_buffers():
                module.register_buffer(name, buffer.to(device), persistent=False)
    return policy


def empty_model(config):
    """transformers' model of `config` on the device "meta", where tensors have shapes and no memory; with
    packed attention and without dropout."""
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
    return lm


def shard(policy, mesh, device, bf16, offload):
    """Make FSDP2 units of the policy, in place: one of each decoder block, one of the rest."""
    precision = MixedPrecisionPolicy()                            # compute in the weights' own dtype, fp32
    if bf16:
        # Gathered and computed with in bf16; shards stay fp32. AdamW moves a weight by about lr = 1e-6, and
        # bf16 near 0.02 has steps of 1e-4: such a weight would never move. Gradients are summed in fp32.
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    where = OffloadPolicy()                                       # shards lie on the device
    if offload:
        where = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # Bottom-up, since a unit takes what is left below it. So one block is whole at a time (at 7B 0.47 GB in
    # bf16, the next one under way), and the root holds embedding, final norm and head (2.2 GB).
    for block in policy.lm.base_model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=where)
    fully_shard(policy, mesh=mesh, mp_policy=precision, offload_policy=where)
    for module in policy.modules():
        # Losses divide by counts over all ranks and micro-batches themselves, so gradients are summed,
        # not averaged: 1 rank x 8, 2 x 4 and any split in between then agree.
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)     # a plain sum, which gloo knows too


def load_policy(path, config, mesh, device, recompute=None, offload=False):
    """build_policy, with the weights read from the safetensors of `path` (support/weights.py): each rank
    reads only its own shards. Raises FileNotFoundError if there are none, ValueError if they do not fit the
    config."""
    reader = WeightsReader(path)              # says now if files are missing, before anything is built
    policy = build_policy(config, mesh, device, recompute, offload=offload)
    # A config of fewer layers, or without biases, would make another model of the same files.
    own = {name for name, _ in policy.lm.named_parameters(remove_duplicate=False)}
    others = sorted(reader.names - own)
    if others:
        raise ValueError(f"{path}: the weights do not fit this config, which has no place for {len(others)} "
                         f"of them, such as {others[0]}")
    policy.generation = stored_generation(path)
    # dcp.load fills these DTensors in place, casting what is stored to fp32. A tied head appears once.
    state = {name.removeprefix("lm."): p.detach() for name, p in policy.named_parameters()}
    try:
        dcp.load(state, storage_reader=reader)
    except (Exception, dcp.api.CheckpointException) as e:       # the latter derives from BaseException
        raise ValueError(f"{path}: the weights do not fit this config "
                         f"({type(e).__name__}: {str(e)[-300:]})") from e
    return policy


# ----------------------------------------------------------------------------------------------------------
# What a policy hands out: its weights, two checks of them, its cost, its export.

def full_parameters(policy, dtype):
    """Stream (Hugging Face name, full tensor in `dtype`), one parameter at a time; a tied tensor comes once.

    A collective: full_tensor() gathers a parameter when it is asked for, so every rank must consume the whole
    stream, in step. Shards are cast before they are moved and gathered, so that bf16 moves half the bytes of
    the fp32 master weights, each of them once.
    """
    # After a forward without backward the root is still gathered, and named_parameters() would be the copies
    # that it computed with, bf16 on a GPU.
    policy.reshard()
    for name, p in policy.named_parameters():
        local = p.detach().to(dtype).to(p.device_mesh.device_type)        # offloaded shards lie on the host
        yield name.removeprefix("lm."), local.full_tensor()


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
    rng = np.random.default_rng(0)                                # the same tokens on every rank
    sequences = []
    for i in range(3):
        prompt = rng.integers(0, vocab_size, 3 + i)
        sequences.append(Sequence(prompt, rng.integers(0, vocab_size, 64 + 4 * i)))
    batch = collate(sequences, device)
    hidden, _ = policy(batch, features=True)                                                    # (204, D)
    limit = 0.2 if hidden.dtype == torch.bfloat16 else 1e-3
    packed = policy(batch)[0]                                                                   # (3, 72)

    def alone(attention, own_logits):
        """Log-probs of each response, its sequence by itself: list of (T,)."""
        policy.lm.set_attn_implementation(attention)
        found = []
        for sequence in sequences:
            logp = policy(collate([sequence], device), own_logits=own_logits)[0]
            found.append(logp.flatten())
        policy.lm.set_attn_implementation("packed")
        return found

    expected = {"each sequence alone": alone("packed", own_logits=False),
                "transformers' own forward": alone("sdpa", own_logits=True)}
    for what, found in expected.items():
        for row, logp in zip(packed, found):
            error = (row[:len(logp)] - logp).abs().mean().item()
            if not error < limit:                                 # nan is over the limit, too
                raise RuntimeError(
                    f"packed log-probs differ from {what} by {error:.4f} nats a token (limit {limit}): "
                    f"with this architecture ({policy.lm.config.model_type}) or transformers version, packed "
                    "sequences see each other, or head or attention are of a kind that this code does not "
                    "know. Use a model of the Qwen2, Qwen3, Llama, Mistral or OLMo-2 kind, or the pinned "
                    "versions.")
    # A forward without backward leaves the root gathered. An optimizer made now must find the shards.
    policy.reshard()


@torch.no_grad()
def look_for_life(policy, device):
    """Before weights are saved or exported: raise RuntimeError if they are not finite, or give no finite
    log-probs, or none that differ. A collective."""
    vocabulary = policy.lm.config.vocab_size
    tokens = [place % vocabulary for place in range(16)]                     # the same on every rank
    logp, *_ = policy(collate([Sequence(tokens[:8], tokens[8:])], device))                      # (1, 8)
    policy.reshard()                   # a forward without backward leaves the root gathered
    shards = [(name.removeprefix("lm."), p.to_local()) for name, p in policy.named_parameters()]
    check_alive(shards, logp, vocabulary)


def head_width(config):
    """Numbers of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward_backward_flops(config, parameters, sequences):
    """Model FLOPs of one forward and backward over `sequences` (for MFU); recomputation does not count.

    6 a weight and token: a multiplication and an addition in the forward, twice that in the backward. The
    embedding is looked up, not multiplied, and the head meets response tokens only. Attention's two products
    are 12 a pair of tokens and number of a head, and causal attention has half the pairs.
    """
    head = config.vocab_size * config.hidden_size
    body = parameters - head * (1 if config.tie_word_embeddings else 2)
    width = config.num_hidden_layers * config.num_attention_heads * head_width(config)
    tokens = sum(len(s) for s in sequences)
    predicted = sum(len(s.response) for s in sequences)
    pairs = sum(len(s)**2 for s in sequences)
    return 6 * body * tokens + 6 * head * predicted + 6 * width * pairs


def readable_by_transformers_4(folder):
    """Say in an exported model's JSON files what transformers 4.57 reads under other names; transformers 5
    and vLLM read both.

    RoPE: without rope_theta and rope_scaling, 4.57 takes theta 10,000 and no scaling, without a word. The
    tokenizer: 4.57 knows neither the class TokenizersBackend nor a list of extra_special_tokens.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    scaling = dict(config["rope_parameters"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            config[name] = scaling.pop(name)
    if scaling["rope_type"] != "default":
        config["rope_scaling"] = scaling
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def export_hf(folder, policy, tokenizer, dtype):
    """Write safetensors, config (with the RoPE override), tokenizer, and the base model's own generation
    defaults but for its limits of length, as transformers (4.57 too) and `vllm serve` open them. A
    collective; rank 0 holds the whole model in host memory once, in `dtype`."""
    rank0, folder, state = dist.get_rank() == 0, Path(folder), {}
    for name, tensor in full_parameters(policy, dtype):        # all ranks gather, rank 0 keeps
        if rank0:
            state[name] = tensor.to("cpu", copy=True)          # gathered, it may be a view of a padded one
    if rank0:
        # Into a folder of another name, renamed when it is whole: a kill leaves the export before it.
        partial = folder.with_name(f".partial-{folder.name}")
        discard(partial)
        partial.mkdir(parents=True)
        # Not by the model's own save_pretrained: it needs a second instance, which the engine may prevent
        # (Policy.forward), and refuses generation defaults that from_pretrained reads gladly.
        fields = policy.lm.config.to_dict()
        fields.update(use_cache=True, dtype=dtype, architectures=[type(policy.lm).__name__])
        config = type(policy.lm.config).from_dict(fields)
        config.save_pretrained(partial)
        save_torch_state_dict(state, partial)
        generation = {name: x for name, x in policy.generation.items() if not name.startswith("max_")}
        generation["eos_token_id"] = config.eos_token_id
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        tokenizer.save_pretrained(partial)
        readable_by_transformers_4(partial)
        for file in partial.iterdir():
            file.chmod(0o644)                                  # safetensors are written for their owner alone
        discard(folder)
        partial.rename(folder)
    del state
    gc.collect()
    dist.barrier()                                             # no rank reads the export before it is there
