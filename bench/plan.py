"""Memory of a rank in training and in generation, found on a CPU from a model's config alone: no weights, no
GPU.

    config, source = read_config("Qwen/Qwen2.5-Math-7B", rope_theta=40_000, window=16_384)
    memory = simulate(config, cfg, world=8)
    rows, (training, generating), kv_cache = budget(cfg, memory, card=80e9)                          # bytes

`simulate` runs the training path of model.py (FSDP2, packed forward, chunked head, accumulation) on fake
tensors, which have shapes but no data, for ranks of which one exists, while torch's FSDPMemTracker adds up
what is allocated. `budget` sets the result beside vLLM's share of the card. bench/dry_run.py prints it.
"""
import json
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from urllib.request import Request, urlopen

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import model as M
from config import recomputed_blocks, sequences_per_prompt
from support import logprobs
from support.hub import split_name
from support.processes import mesh_shape

GIB = 2**30
RESIDUAL = 2 * GIB       # assumed, in both phases: CUDA context, NCCL buffers
GRAPHS = 1 * GIB         # assumed: the engine's CUDA graphs, which stay while it sleeps. vllm 0.32 takes them
                         # out of its share, 0.25.1 beside it: the plan counts both
WORKSPACE = 2 * GIB      # assumed, out of vLLM's share: activations of the engine's largest batch
RESERVE = 0.1            # share of the card that training leaves to the allocator's fragmentation, and to the
                         # idle pools of FSDP2's own streams: about 2 GiB at 7B (estimated)
NODE = 8                 # cards a node, as far as a plan goes; a run asks torchrun
TYPICAL = (256, 2000)    # prompt and response tokens of the "typical" row

# Fields of config.json on the Hugging Face hub, for machines without network.
DEFAULT_MODEL = "Qwen/Qwen2.5-Math-7B"
DEFAULT_CONFIG = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
    tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=4096)
SHAPES = {
    DEFAULT_MODEL: DEFAULT_CONFIG,
    "Qwen/Qwen2.5-Math-1.5B": DEFAULT_CONFIG | dict(
        hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B": DEFAULT_CONFIG | dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, rope_theta=1000000.0,
        max_position_embeddings=32768),
    "Qwen/Qwen2.5-14B": DEFAULT_CONFIG | dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0, max_position_embeddings=131072)}


def read_config(name, rope_theta=0.0, window=0, keep_own=False):
    """(config with App. B's overrides, where it is from). Reads config.json only, from a folder or the hub.

    Raises FileNotFoundError naming --model if there is none. The public shapes of SHAPES are built in.
    """
    if (Path(name) / "config.json").exists():
        return M.load_config(name, rope_theta, window, keep_own), name
    try:
        text, source = _hub_config(name), f"{name} (config from the Hugging Face hub)"
    except (OSError, ValueError) as error:              # no network, no such model, gated, not a hub name
        if name not in SHAPES:
            raise FileNotFoundError(
                f"--model {name}: no config.json in such a folder, nor on the hub ({error!s:.150}). "
                "--dry_run needs no more than a folder with a config.json: --model DIR") from None
        text, source = json.dumps(SHAPES[name]), f"{name} (public shape, built in; no answer from hub)"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text)
        return M.load_config(folder, rope_theta, window, keep_own), source


def _hub_config(name):
    """config.json of a hub model. By one request: without network, hf_hub_download would retry for 23 s."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers
    repo, revision, _ = split_name(name)
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).read_text()
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(repo, "config.json", revision=revision)
    with urlopen(Request(url, headers=build_hf_headers()), timeout=5) as reply:
        return reply.read().decode()


@contextmanager
def simulated_gpus(world, per_node=NODE):
    """A mesh of `world` ranks that exist in name only, and fake tensors that take model.py's GPU paths.
    Of the shape that processes.init_distributed makes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = init_device_mesh("cpu", **mesh_shape(world, per_node))
        # A CPU build of torch cannot index fake CUDA tensors. So these lie on "cpu" but claim `is_cuda`, for
        # which model.py takes the flash kernel (linear in N) and the head gradient without a temporary.
        gpu = mock.patch.object(FakeTensor, "is_cuda", True)
        # The head's products write in place and allocate nothing, and torch 2.11 cannot fake one of them.
        products = mock.patch.object(logprobs, "_addmm_fp32", lambda *args, **kwargs: None)
        with FakeTensorMode(allow_non_fake_inputs=True), gpu, products:
            yield mesh
    finally:
        dist.destroy_process_group()


def simulate(config, cfg, world=8, per_node=NODE, bf16=True):
    """Memory of a rank in training, in bytes of tensors: fragmentation and scratch in kernels come on top.
    bf16: compute as on a GPU; else in fp32, as on a CPU.
    Parameters are sharded over w = min(world, per_node) ranks, a node.

      weights      4P/w for P parameters, the fp32 master weights
      optimizer    8P/w, the two moments of AdamW
      gradients    4P/w, fp32, there from the first micro-batch of a step to its end
      peak         highest sum in the second step's two full micro-batches. What follows them is less: clip
                   and fused AdamW work on the shards in place
      activations  peak less these three: activations, gathered bf16 weights, unsharded gradients, buffers of
                   collectives, the head's (chunk, V) blocks and its fp32 (V, D) gradient
      reference    with kl_coef: shards of the frozen model, and its root, which stays gathered in bf16; its
                   forward and token_kl's three (chunk, V) blocks and (V, D) gradient are not simulated
      host         with offload: the first three, 16P/w, which then lie in host memory and count 0 here; but
                   for the gradients on several nodes, which stay here until they have been reduced across

      attention    by formula, and in no other number: see attention_backward

    Fake tensors that claim to be on a GPU cannot be offloaded. The simulation therefore runs without, and its
    activations, peak less the three, are taken over; on top, unseen, comes the fp32 shard of the one unit (a
    block or the root) that is just being copied.

    And "shards", the bytes of the first three wherever they lie, and two counts, "parameters" and
    "vocabulary" (embedding, head). config is the model's, cfg config.Config.
    """
    peak, shards, parameters = tracked_step(config, cfg, world, per_node, bf16)
    return place(config, cfg, peak - sum(shards), shards, parameters, world > per_node)


def place(config, cfg, activations, shards, parameters, several_nodes):
    """What `simulate` returns, from its parts. shards: bytes of weights, moments and gradients."""
    weights, moments, gradients = shards
    found = {"weights": weights, "optimizer": moments, "activations": activations, "gradients": gradients}
    host = 0
    if cfg.offload:
        host = sum(shards)
        found["weights"] = found["optimizer"] = 0
        if not several_nodes:
            found["gradients"] = 0
    found["peak"] = sum(found.values())
    found["host"], found["shards"] = host, shards
    found["attention"] = attention_backward(config, cfg.micro_batch_tokens)
    found["parameters"] = parameters
    found["vocabulary"] = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    found["reference"] = found["weights"] + 2 * found["vocabulary"] if cfg.kl_coef else 0
    return found


def tracked_step(config, cfg, world, per_node, bf16):
    """(peak, (weights, moments, gradients): bytes of a rank; parameters of the model) of two steps on fake
    tensors.

    The first step, untracked, creates the optimizer's state. No tracked step has clip and AdamW in it:
    DTensor finds the shapes of their results with unsharded fakes, which the tracker counts, 120 GiB at 7B.
    """
    with simulated_gpus(world, per_node) as mesh:
        device = torch.device("cpu")
        recomputed = recomputed_blocks(cfg, config.num_hidden_layers)
        policy = M.build_policy(config, mesh, device, recomputed, bf16)
        optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=cfg.weight_decay, fused=True)
        batch = M.collate(full_micro_batch(cfg), device)

        def micro_batch(last=True):
            M.accumulate(policy, last)
            loss = policy(batch, cfg.temperature, entropy_grad=bool(cfg.entropy_coef))[0].sum()
            loss.backward()

        micro_batch()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with FSDPMemTracker(policy, optimizer) as tracker:
            micro_batch(last=False)
            tracker.reset_mod_stats()                       # without it the tracker refuses a second forward
            micro_batch()                                   # beside the gradients of the first
            gradients = sum(p.grad.to_local().nbytes for p in policy.parameters())
        peak = tracker.get_tracker_snapshot("peak")[device]["Total"]
        weights = sum(p.to_local().nbytes for p in policy.parameters())
        moments = sum(state["exp_avg"].to_local().nbytes * 2 for state in optimizer.state.values())
        parameters = sum(p.numel() for p in policy.parameters())
    return peak, (weights, moments, gradients), parameters


def attention_backward(config, tokens):
    """Bytes that flash attention's backward kernel allocates for itself, which no fake tensor shows: the
    gradient of the queries in fp32 and, where query heads share keys, those of keys and values for each query
    head in bf16, before they are added up."""
    numbers = tokens * config.num_attention_heads * M.head_width(config)
    bytes_each = 4                                                                # dq
    if config.num_key_value_heads < config.num_attention_heads:
        bytes_each += 2 + 2                                                       # dk, dv
    return numbers * bytes_each


def full_micro_batch(cfg):
    """Sequences of half a prompt and a full response, the last one cut, that fill --micro_batch_tokens."""
    longest = max(1, cfg.max_prompt_tokens // 2)
    size = longest + cfg.max_response_tokens
    sequences = []
    for n in cfg.micro_batch_tokens // size * [size] + [cfg.micro_batch_tokens % size]:
        if n > 1:
            prompt = min(longest, n - 1)
            sequences.append(M.Sequence([0] * prompt, [0] * (n - prompt)))
    return sequences


def tokens_per_step(cfg, world, length):
    """(sequences, tokens, micro-batches a rank) of one step whose sequences all have this length."""
    sequences = cfg.prompts_per_step * sum(sequences_per_prompt(cfg))
    packs = math.ceil(sequences / cfg.updates_per_rollout / max(1, cfg.micro_batch_tokens // length))
    return sequences, sequences * length, cfg.updates_per_rollout * math.ceil(packs / world)


def graphs(cfg):
    """Bytes of the engine's CUDA graphs."""
    return 0 if cfg.engine_eager else GRAPHS


def kv_room(cfg, parameters, card):
    """Bytes for the engine's KV cache: its share of the card less a bf16 copy of all the model (tensor
    parallel 1; the head's product is in fp32, its weights are not), its CUDA graphs and its workspace."""
    return max(0.0, cfg.engine_memory * card - 2 * parameters - graphs(cfg) - WORKSPACE)


def budget(cfg, memory, card):
    """(rows of name, bytes in training, bytes generating; their two sums; bytes left for the KV cache).

    The engine sleeps in training: only its CUDA graphs stay. Awake it takes its share of the card.
    """
    weights, moments, reference = memory["weights"], memory["optimizer"], memory["reference"]
    rows = [("weights: fp32 shards", weights, weights),
            ("reference model: weights", reference, reference),
            ("optimizer: two moments of AdamW", moments, moments),
            ("gradients: fp32 shards", memory["gradients"], 0),
            ("activations, temporaries at peak", memory["activations"], 0),
            ("flash attention's own, in backward", memory["attention"], 0),
            (f"vLLM: asleep, {cfg.engine_memory:.0%} of card awake", 0, cfg.engine_memory * card),
            ("vLLM's CUDA graphs (assumed)", graphs(cfg), graphs(cfg)),
            ("CUDA, NCCL (assumed)", RESIDUAL, RESIDUAL)]
    training = sum(row[1] for row in rows)
    generating = sum(row[2] for row in rows)
    return rows, [training, generating], kv_room(cfg, memory["parameters"], card)


def fits(training, generating, card):
    """Do both phases fit, with room to spare in training? (vLLM takes its share exactly.) All in bytes."""
    return training + RESERVE * card <= card and generating <= card


def counts(config, memory):
    """(parameters of the decoder blocks, of the root) of what `simulate` returns."""
    root = memory["vocabulary"] + config.hidden_size                                   # and the final norm
    return memory["parameters"] - root, root
