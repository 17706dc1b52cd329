"""The memory plan of a run, found on a CPU machine from a model config alone: no weights, no GPU.

    python srft.py --dry_run                                   # the paper's 7B run on 8 x 80 GB
    python srft.py --dry_run --model DIR --n_rollouts 16       # DIR needs nothing but a config.json
    python srft.py --dry_run --dry_run_ranks 64                # 8 nodes of 8: HSDP

`simulate` runs the training path of model.py (FSDP2, packed forward, chunked head, accumulation) on fake
tensors, which have shapes but no data, for ranks of which one exists, while torch's FSDPMemTracker adds up
what is allocated. `budget` sets the result beside vLLM's share of the card.
"""
import json
import math
import os
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
from config import check_config, sequences_per_prompt
from rollout import kv_bytes
from support import logprobs
from support.hub import split_name
from support.processes import mesh_shape

GIB = 2**30
CARD = 80e9              # bytes, as the name "80 GB" promises
RESIDUAL = 2 * GIB       # assumed, in both phases: CUDA context, NCCL buffers
GRAPHS = 1 * GIB         # assumed: the engine's CUDA graphs, which stay while it sleeps. vllm 0.32 takes them
                         # out of its share, 0.25.1 beside it: the plan counts both
WORKSPACE = 2 * GIB      # assumed, out of vLLM's share: activations of the engine's largest batch
NODE = 8                 # cards a node, as far as a plan goes; a run asks torchrun
TYPICAL = (256, 2000)    # prompt and response tokens of the "typical" row

# config.json of Qwen/Qwen2.5-Math-7B on the Hugging Face hub, for machines without network.
DEFAULT_MODEL = "Qwen/Qwen2.5-Math-7B"
DEFAULT_CONFIG = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
    tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=4096)


def read_config(name, rope_theta=0.0, window=0):
    """(config with App. B's overrides, where it is from). Reads config.json only, from a folder or the hub.

    Raises FileNotFoundError naming --model if there is none; the default model's public shape is built in.
    """
    if (Path(name) / "config.json").exists():
        return M.load_config(name, rope_theta, window), name
    try:
        text, source = _hub_config(name), f"{name} (config from the Hugging Face hub)"
    except (OSError, ValueError) as error:              # no network, no such model, gated, not a hub name
        if name != DEFAULT_MODEL:
            raise FileNotFoundError(
                f"--model {name}: no config.json in such a folder, nor on the hub ({error!s:.150}). "
                "--dry_run needs no more than a folder with a config.json: --model DIR") from None
        text, source = json.dumps(DEFAULT_CONFIG), f"{name} (public shape, built in; no answer from hub)"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text)
        return M.load_config(folder, rope_theta, window), source


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


def simulate(config, cfg, world=8, per_node=NODE):
    """Memory of a rank in training, in bytes of tensors: fragmentation and scratch in kernels come on top.
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

    And two counts, "parameters" and "vocabulary" (embedding, head). config is the model's, cfg config.Config.
    """
    peak, weights, moments, gradients, parameters = tracked_step(config, cfg, world, per_node)
    kept = weights + moments + gradients
    found = {"weights": weights, "optimizer": moments, "activations": peak - kept, "gradients": gradients}
    host = 0
    if cfg.offload:
        host = kept
        found["weights"] = found["optimizer"] = 0
        if world <= per_node:
            found["gradients"] = 0
    found["peak"] = sum(found.values())
    found["host"] = host
    found["attention"] = attention_backward(config, cfg.micro_batch_tokens)
    found["parameters"] = parameters
    found["vocabulary"] = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    found["reference"] = found["weights"] + 2 * found["vocabulary"] if cfg.kl_coef else 0
    return found


def tracked_step(config, cfg, world, per_node):
    """(peak, weights, moments, gradients: bytes of a rank; parameters of the model) of two steps on fake
    tensors.

    The first step, untracked, creates the optimizer's state. No tracked step has clip and AdamW in it:
    DTensor finds the shapes of their results with unsharded fakes, which the tracker counts, 120 GiB at 7B.
    """
    with simulated_gpus(world, per_node) as mesh:
        device = torch.device("cpu")
        policy = M.build_policy(config, mesh, device, cfg.activation_checkpointing, bf16=True)
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
    return peak, weights, moments, gradients, parameters


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


def kv_room(cfg, parameters):
    """Bytes for the engine's KV cache: its share of the card less a bf16 copy of all the model (tensor
    parallel 1; the head's product is in fp32, its weights are not), its CUDA graphs and its workspace."""
    return max(0.0, cfg.engine_memory * CARD - 2 * parameters - graphs(cfg) - WORKSPACE)


def budget(cfg, memory):
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
            (f"vLLM: asleep, {cfg.engine_memory:.0%} of card awake", 0, cfg.engine_memory * CARD),
            ("vLLM's CUDA graphs (assumed)", graphs(cfg), graphs(cfg)),
            ("CUDA, NCCL (assumed)", RESIDUAL, RESIDUAL)]
    training = sum(row[1] for row in rows)
    generating = sum(row[2] for row in rows)
    return rows, [training, generating], kv_room(cfg, memory["parameters"])


def show(cfg):
    """Print the plan of `cfg` on --dry_run_ranks cards of 80 GB and return what `simulate` returns; on rank 0
    only. Raises FileNotFoundError without a model config, ValueError for what could not run."""
    if int(os.environ.get("RANK", 0)) != 0:
        return None
    world = cfg.dry_run_ranks
    if world < 1 or world > NODE and world % NODE:
        raise ValueError(f"--dry_run_ranks {world}: up to {NODE} cards on one node, or whole nodes of {NODE}")
    config, source = read_config(cfg.model, cfg.rope_theta, cfg.window)
    check_config(cfg, world, config.max_position_embeddings)
    print(f"simulating two training steps on {world} ranks (half a minute at 7B) ...", flush=True)
    memory = simulate(config, cfg, world)
    print("\n".join(report(config, cfg, memory, source, world)), flush=True)
    return memory


def report(config, cfg, memory, source, world=8):
    """The lines of the plan."""
    rows, used, kv = budget(cfg, memory)
    room = kv / kv_bytes(config)                                                  # tokens
    lines = ["", *lines_of_run(cfg, memory, source, world), "", *lines_of_tokens(cfg, world), "",
             *lines_of_memory(rows, used)]
    fill = " or ".join(f"{int(room / (prompt + response)):,} sequences of {prompt + response:,}"
                       for prompt, response in lengths(cfg).values())
    lines += [f"vLLM's share: {2 * memory['parameters'] / GIB:.2f} weights, {graphs(cfg) / GIB:.2f} CUDA "
              f"graphs and {WORKSPACE / GIB:.2f} workspace",
              f"  (both assumed), KV cache of {room:,.0f} tokens: {fill}"]
    if memory["host"]:
        node = memory["host"] * min(world, NODE)
        lines.append(f"in host memory (--offload): {memory['host'] / GIB:.2f} GiB a rank, {node / GIB:.1f} a "
                     "node: weights, optimizer, gradients")
    lines.append(f"on disk     {12 * memory['parameters'] / 1e9:,.0f} GB a checkpoint; "
                 f"{cfg.keep + 1} at a time with --keep {cfg.keep}")
    return lines + [""] + verdicts(cfg, used, room)


def lengths(cfg):
    """(prompt, response) tokens of the two kinds of step that are planned."""
    prompt, response = TYPICAL
    longest = cfg.max_prompt_tokens, cfg.max_response_tokens
    return {"worst case": longest, "typical": (min(prompt, longest[0]), min(response, longest[1]))}


def lines_of_run(cfg, memory, source, world):
    """The model, the mesh, the sequences of a step."""
    def number(name):
        return f"{memory[name] / 1e9:.2f} B" if memory[name] >= 1e8 else f"{memory[name]:,}"

    nodes, shard = max(1, world // NODE), min(world, NODE)
    mesh = f"x {nodes} copies, HSDP" if nodes > 1 else "FSDP2"
    blocks = "blocks recomputed" if cfg.activation_checkpointing else "nothing recomputed"
    rollouts, demos = sequences_per_prompt(cfg)
    sequences = cfg.prompts_per_step * (rollouts + demos)
    return [f"model       {source}",
            f"parameters  {number('parameters')}, {number('vocabulary')} of them embedding and head",
            f"mesh        {world} ranks, shard {shard} ({mesh}); fp32 master weights, bf16 compute, {blocks}",
            f"one step    {cfg.prompts_per_step} prompts x ({rollouts} rollouts + {demos} demonstration) = "
            f"{sequences:,} sequences"]


def lines_of_tokens(cfg, world):
    lines = [f"{'Tokens a step (prompt + response)':<36}{'tokens':>12}  micro-batches of "
             f"{cfg.micro_batch_tokens:,}"]
    for name, (prompt, response) in lengths(cfg).items():
        _, tokens, packs = tokens_per_step(cfg, world, prompt + response)
        lines.append(f"  {f'{name}: {prompt:,} + {response:,}':<34}{tokens:>12,}  {packs:,} a rank")
    return lines


def lines_of_memory(rows, used):
    """The table of `budget`, its sums, and what they leave of the card."""
    def gib(size):
        return f"{size / GIB:12.2f}" if size else f"{'-':>12}"

    training, generating = used
    rows = [*rows, ("total", training, generating),
            (f"left of 80 GB = {CARD / GIB:.1f} GiB", CARD - training, CARD - generating)]
    lines = [f"{'Memory a rank, GiB':<36}{'training':>12}{'generating':>12}"]
    for name, training, generating in rows:
        if training or generating:
            lines.append(f"  {name:<34}{gib(training)}{gib(generating)}")
    return lines


def verdicts(cfg, used, room):
    """Does it fit? used: bytes in training and generating; room: tokens of KV cache."""
    training, generating = used
    smaller = f"lower --micro_batch_tokens {cfg.micro_batch_tokens}"
    if not cfg.activation_checkpointing:
        smaller = f"pass --activation_checkpointing, {smaller}"
    # The allocator fragments, so training should leave a tenth of the card; vLLM takes its share exactly.
    lines = [verdict(cfg, "training", training, 0.1 * CARD, smaller),
             verdict(cfg, "generating", generating, 0, f"lower --engine_memory {cfg.engine_memory}")]
    if room < cfg.max_prompt_tokens + cfg.max_response_tokens:
        lines.append("engine      DOES NOT FIT: no KV cache for one whole sequence; raise --engine_memory "
                     f"{cfg.engine_memory}, or lower --max_response_tokens {cfg.max_response_tokens}")
    return lines


def verdict(cfg, phase, used, reserve, advice):
    """One phase's line; where it is not a plain "fits", with the flags that help."""
    space = f"{abs(CARD - used) / GIB:.1f} GiB {'over' if used > CARD else 'to spare'}"
    if used + reserve <= CARD:
        return f"{phase:<12}fits 80 GB, {space}"
    fits = "fits, but tightly," if used <= CARD else "DOES NOT FIT"
    more = "or use more ranks" if cfg.offload else "use more ranks, or pass --offload"
    return f"{phase:<12}{fits} 80 GB, {space}; {advice}, {more}"
