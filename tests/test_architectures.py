"""Which models train, which are refused and by what name, and what an export says to older readers.

    pytest tests/test_architectures.py          # -m "not slow" for those that start no engine

The models are random and tiny, made by transformers from a config, with the tokenizer of the tiny task.
"""
import json
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

import model as M
from config import TINY, parse_args
from conftest import SMALL, metrics, run
from model import Sequence, collate
from support.weights import stored_tensors
from test_model import CPU, VOCAB, load, mesh, save_model, some_sequences, unpacked  # noqa: F401 (fixture)
from tiny import task
from updates import whole_update

# ruff: noqa: F811        (the fixture `mesh` is imported, and named as an argument)

LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=64)
SOUND = {
    "Qwen2": dict(kind="Qwen2", tie_word_embeddings=False),
    "Qwen3": dict(kind="Qwen3", head_dim=16, tie_word_embeddings=True),
    "Llama 3": dict(kind="Llama", rope_parameters=LLAMA3_ROPE, eos_token_id=[0, 6]),
    "Mistral": dict(kind="Mistral", sliding_window=None),
    "OLMo-2": dict(kind="Olmo2"),
    "SmolLM2": dict(kind="Llama", tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="default", rope_theta=100_000.0)),
}


# ----------------------------------------------------------------------------------------------------------
# Models that train.

def made_up_groups():
    """Two prompts, each with two rollouts, one of them right, and a demonstration."""
    rng, sequences = np.random.default_rng(0), []
    for group in range(2):
        for k in range(3):
            n = int(rng.integers(4, 30))
            sequences.append(Sequence(
                rng.integers(0, 21, 5), rng.integers(0, 21, n), is_demo=k == 2, group=group,
                reward=float(k != 1), advantage=float(k != 1) - 0.5,
                engine_logp=None if k == 2 else -3 * rng.random(n)))
    return sequences


@pytest.mark.parametrize("spec", SOUND.values(), ids=SOUND)
def test_a_sound_model_passes_the_checks_of_the_start_and_one_update_changes_every_weight_by_something_finite(
        tmp_path, mesh, spec):
    save_model(tmp_path, **spec)
    policy, sequence = load(tmp_path, mesh, recompute=None), some_sequences()[3]
    M.check_packing(policy, CPU, VOCAB)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    logp = policy(collate([sequence], CPU))[0][0]
    torch.testing.assert_close(logp, unpacked(own, sequence)[0], atol=1e-5, rtol=1e-5)
    cfg, packs = parse_args(["--preset", "tiny"]), M.pack(made_up_groups(), 100)
    policy.reshard()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.01)
    before = {name: tensor.clone() for name, tensor in M.full_parameters(policy, torch.float32)}
    stats = whole_update(policy, optimizer, packs, made_up_groups(), cfg, CPU)
    assert len(packs) > 1 and all(np.isfinite(x) for x in stats.values()) and stats["grad_norm"] > 0
    for name, tensor in M.full_parameters(policy, torch.float32):
        assert tensor.isfinite().all() and not torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama 3", "OLMo-2", "Qwen3"])
def test_a_whole_run_of_another_architecture_agrees_with_its_engine_and_leaves_a_model(tmp_path, kind):
    shape = dict(vocab_size=21, hidden_size=128, num_attention_heads=4, head_dim=32)
    save_model(tmp_path / "base", **SOUND[kind] | shape)
    task.make_tokenizer().save_pretrained(tmp_path / "base")
    run([*SMALL, "--model", tmp_path / "base", "--steps", "2", "--max_response_tokens", "80",
         "--out", tmp_path / "run"])
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["engine/logp_diff_max"] < 1e-3 for row in rows[1:])
    assert rows[1]["grad_norm"] > 0 and rows[2]["steps_skipped"] == 0
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight) and type(before) is type(after)


# ----------------------------------------------------------------------------------------------------------
# Models that would train on wrong numbers.

LONGROPE = dict(rope_type="longrope", rope_theta=10_000.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
                factor=4.0, original_max_position_embeddings=128)
DYNAMIC_ROPE = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)


@pytest.mark.parametrize("kind, overrides, named", [
    ("Granite", dict(logits_scaling=8.0), "logits_scaling 8.0"), ("Granite", dict(logits_scaling=1.0), None),
    ("Cohere", {}, "logit_scale 0.0625"), ("Cohere", dict(logit_scale=1.0), None),
    ("FalconH1", dict(lm_head_multiplier=0.5), "lm_head_multiplier 0.5"),
    ("Gemma2", {}, "final_logit_softcapping 30.0"),
    ("Gemma2", dict(final_logit_softcapping=None), "attn_logit_softcapping 50.0"),
    ("Gemma2", dict(final_logit_softcapping=None, attn_logit_softcapping=None), "sliding-window attention"),
    ("Phi3", dict(rope_parameters=LONGROPE), "RoPE of type 'longrope'"),
    ("Llama", dict(rope_parameters=DYNAMIC_ROPE), "RoPE of type 'dynamic'"),
    ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), None),
    ("Llama", dict(rope_parameters=LLAMA3_ROPE), None),
    ("Qwen2Moe", {}, "mixture of experts .num_experts 60"),
    ("Mixtral", {}, "mixture of experts .num_experts 8"),
    ("DeepseekV3", {}, "mixture of experts .num_local_experts 256"),
    ("Lfm2", dict(layer_types=["conv", "full_attention"] * 2), "layers of type conv"),
    ("Llama", dict(quantization_config=dict(quant_method="fp8")), "quantized model .quant_method fp8")],
    ids=str)
def test_a_model_that_this_code_would_misread_is_refused_at_load_by_the_field_that_tells(
        tmp_path, kind, overrides, named):
    base = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
                max_position_embeddings=512, vocab_size=VOCAB, pad_token_id=0)
    getattr(transformers, kind + "Config")(**base | overrides).save_pretrained(tmp_path)
    refused = pytest.raises(ValueError, match=f"{tmp_path}: .*{named}.* (is|are) not supported")
    with refused if named else nullcontext():
        assert M.load_config(tmp_path).vocab_size == VOCAB


def test_a_model_with_numbers_in_buffers_which_no_optimizer_holds_is_refused_by_their_name(tmp_path, mesh):
    save_model(tmp_path, "Gemma", head_dim=8)
    with pytest.raises(ValueError, match="gemma: numbers in buffers .model.embed_tokens.embed_scale."):
        load(tmp_path, mesh)


def attend(**asked):
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    mask = asked.pop("attention_mask", None)
    return M.packed_attention(torch.nn.Module(), q, k, v, mask, cu_seq_lens_q=torch.tensor([0, 5]),
                              max_length_q=5, **asked)[0]


@pytest.mark.parametrize("asked", [
    dict(softcap=50.0), dict(s_aux=torch.zeros(2)), dict(sliding_window=4), dict(is_causal=False),
    dict(position_bias=torch.zeros(1, 2, 5, 5)), dict(attention_mask=torch.ones(1, 1, 5, 5))],
    ids=lambda asked: next(iter(asked)))
def test_what_packed_attention_does_not_compute_is_an_error_that_names_it(asked):
    (name,) = asked
    with pytest.raises(ValueError, match=f"asks its attention for {name}; packed attention is plain"):
        attend(**asked)
    assert attend(**{name: None}).shape == (1, 5, 2, 8)


@pytest.mark.parametrize("kind, named", [
    ("Gemma2", "Gemma2Attention asks its attention for .*softcap"),
    ("GptOss", "GptOssAttention asks its attention for .*s_aux"),
    ("StableLm", "does not pass on where sequences start")])
def test_a_model_whose_attention_is_not_plain_is_stopped_at_its_first_packed_forward(kind, named):
    config = getattr(transformers, kind + "Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, num_local_experts=2)
    policy = M.Policy(AutoModelForCausalLM.from_config(config, attn_implementation="packed"))
    with pytest.raises(ValueError, match=named):
        policy(collate(some_sequences(), CPU))


@pytest.mark.parametrize("change", [
    lambda logits: logits / 4, lambda logits: 5 * torch.tanh(logits / 5),
    lambda logits: logits + logits.mean(0)],
    ids=["scaled", "capped", "shifted"])
def test_an_unknown_head_is_found_at_the_start_though_no_field_of_the_config_tells(
        tmp_path, mesh, monkeypatch, change):
    policy, plain = load(save_model(tmp_path), mesh), transformers.Qwen2ForCausalLM.forward
    M.check_packing(policy, CPU, VOCAB)

    def forward(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", forward)
    expected = "differ from transformers' own forward by .* nats a token .limit 0.001.: .*qwen2.* head"
    with pytest.raises(RuntimeError, match=expected):
        M.check_packing(policy, CPU, VOCAB)


@pytest.mark.slow
def test_the_reference_model_of_a_kl_is_checked_at_the_start_as_well(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    flags = [*SMALL[1:], "--kl_coef", "0.1", "--reference", str(tmp_path / "base"),
             "--out", str(tmp_path / "run")]
    code = f"""
import sys
import model as M, srft
from config import parse_args
checked = []
M.check_packing = lambda policy, device, vocab_size: checked.append(policy.lm.config.name_or_path)

def stop(*_):
    print("CHECKED", *checked)
    sys.exit(0)

srft.RolloutEngine = stop
srft.setup(parse_args({flags!r}))
"""
    assert f"CHECKED {TINY} {tmp_path / 'base'}" in run(["-c", code])


def one_sequence_sees_another(*args, cu_seq_lens_q=None, **kwargs):
    return M.packed_attention(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)


def test_in_bf16_the_start_allows_for_rounding_and_still_stops_a_leak(monkeypatch, mesh):
    """The shipped model, computing as on a GPU: its own forward differs more than fp32 may; a leak by nats.
    """
    policy = M.build_policy(M.load_config(TINY), mesh, CPU, bf16=True)
    own = dict(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).named_parameters())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.to_local().copy_(own[name.removeprefix("lm.")])
    M.check_packing(policy, CPU, 21)
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", one_sequence_sees_another)
    with pytest.raises(RuntimeError, match="each sequence alone by .* .limit 0.2."):
        M.check_packing(policy, CPU, 21)


# ----------------------------------------------------------------------------------------------------------
# Several tokens that end a response; exports that older readers open.

@pytest.mark.parametrize("stored, expected", [
    (None, 0), ({"eos_token_id": [0, 6]}, [0, 6]), ({"eos_token_id": 6}, 6), ({"top_p": 0.9}, 0),
    ({"eos_token_id": None}, 0), ({"eos_token_id": []}, 0)], ids=str)
def test_the_tokens_that_end_a_response_are_those_of_generation_config_where_it_names_any(
        tmp_path, stored, expected):
    save_model(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if stored is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    assert M.load_config(tmp_path).eos_token_id == expected


@pytest.mark.parametrize("name, text", [
    ("generation_config.json", "{"), ("generation_config.json", "[]"), ("generation_config.json", ""),
    ("generation_config.json", '{"eos_token_id": "0"}'), ("config.json", "{"), ("config.json", "[]"),
    ("config.json", '{"model_type": "llama", "vocab_size": "21"}'),
    ("config.json", '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}'),
    ("config.json", '{"model_type": "llama", "max_position_embeddings": null}')])
def test_a_folder_whose_config_is_damaged_is_named(tmp_path, name, text, capfd):
    save_model(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        M.load_config(tmp_path)
    assert "[y/N]" not in capfd.readouterr().out            # whether to run its code: nobody may be there


@pytest.mark.parametrize("stored", [
    dict(eos_token_id=[0, 6], pad_token_id=1, do_sample=True, temperature=0.6, top_p=0.9,
         max_new_tokens=2048),
    dict(eos_token_id=[0, 6], do_sample=False, temperature=0.6, max_length=4096)],
    ids=["sound", "inconsistent"])
def test_an_export_keeps_every_end_of_a_response_and_the_model_s_sampling_but_not_its_limits_of_length(
        tmp_path, mesh, stored):
    save_model(tmp_path / "base", "Llama")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(stored))
    M.export_hf(tmp_path / "hf", load(tmp_path / "base", mesh), task.make_tokenizer(), torch.float32)
    kept = {name: x for name, x in stored.items() if not name.startswith("max_")}
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == kept
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [0, 6]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (read.eos_token_id, read.temperature) == ([0, 6], 0.6)
    assert M.load_config(tmp_path / "hf").eos_token_id == [0, 6]


def test_an_export_in_several_files_is_whole_for_transformers_and_for_eval(tmp_path, mesh, monkeypatch):
    policy = load(save_model(tmp_path / "base", "Olmo2"), mesh)
    monkeypatch.setattr(M, "save_torch_state_dict", partial(M.save_torch_state_dict, max_shard_size="20KB"))
    M.export_hf(tmp_path / "hf", policy, task.make_tokenizer(), torch.bfloat16)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    sent = dict(M.full_parameters(policy, torch.bfloat16))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    for stored in (dict(read.named_parameters()), dict(stored_tensors(tmp_path / "hf"))):
        assert stored.keys() == sent.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in sent.items())


@pytest.mark.slow
def test_a_second_end_of_a_response_stops_rollouts_in_training_and_survives_into_the_exported_model(tmp_path):
    """The tiny model with a line break as its second EOS: what it would write on is never decoded."""
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    newline = task.TOKENS.index("\n")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, newline]}))
    run([*SMALL, "--model", tmp_path / "base", "--steps", "1", "--log_samples", "99",
         "--out", tmp_path / "run"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    responses = [row["response"] for row in rows if not row["demo"]]
    assert len(responses) == 16 and any("\n" in text for text in responses)
    assert not any("\n" in text[:-1] for text in responses)
    # Ended, not cut: such a response may earn its reward.
    assert metrics(tmp_path / "run")[-1]["response_len/truncated"] == 0
    exported = json.loads((tmp_path / "run" / "hf" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [0, newline]


@pytest.mark.parametrize("rope, scaling", [
    (dict(rope_type="default", rope_theta=10_000.0), None),
    (LLAMA3_ROPE | dict(rope_theta=10_000.0), {k: x for k, x in LLAMA3_ROPE.items() if k != "rope_theta"})],
    ids=["default", "llama3"])
def test_an_export_names_its_rope_in_the_words_of_transformers_4_and_of_5_with_the_same_numbers(
        tmp_path, mesh, rope, scaling):
    save_model(tmp_path / "base", "Llama", rope_parameters=rope)
    policy = load(tmp_path / "base", mesh, rope_theta=40_000.0, window=16_384)
    M.export_hf(tmp_path / "hf", policy, task.make_tokenizer(), torch.float32)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 40_000
    assert config.get("rope_scaling") == scaling
    read = AutoConfig.from_pretrained(tmp_path / "hf")
    assert read.rope_parameters == policy.lm.config.rope_parameters == rope | dict(rope_theta=40_000)
    again = M.load_config(tmp_path / "hf", rope_theta=40_000.0, window=16_384)   # the run's own flags
    assert again.rope_parameters == read.rope_parameters


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_an_exported_tokenizer_is_named_as_transformers_4_knows_it_and_reads_as_before(tmp_path, mesh, kind):
    save_model(tmp_path / "base", kind)
    tokenizer = task.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    M.export_hf(tmp_path / "hf", load(tmp_path / "base", mesh), tokenizer, torch.float32)
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|user|>", "<|end|>"]
    if kind == "Llama":        # on a Qwen2 config, transformers 5 imposes that family's own pre-tokenizer
        read = AutoTokenizer.from_pretrained(tmp_path / "hf")
        text = "<|user|>12+34=?\n<think>\n12<|end|>"
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read.decode(read(text)["input_ids"], skip_special_tokens=True) == "12+34=?\n<think>\n12"
