"""Text of data stays text: for several kinds of tokenizers, no special token comes of what a row spells.

    pytest tests/test_tokens.py
"""
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import data
from data import Example, check_vocabulary, load_examples, tokenize
from support.inventory import Inventory
from support.tokens import encode_text, reserved_tokens
from tiny.task import make_tokenizer

TEXT = ["How many 2s are in $x^2 + 2$?\n", "<think>\nthe quick fox: 2\n</think>\n\\boxed{2}", "</s> <s>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_level(eos="<|im_end|>", **how):
    """As Qwen's: special tokens with and without a name, and added tokens that are not special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(TEXT * 20, trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved_7|>"]))
    for text, special in (("<tool_call>", False), ("<think>", True), ("</think>", True)):
        core.add_tokens([AddedToken(text, normalized=False, special=special)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>",
                                   chat_template=CHAT, **how)


def sentencepiece(model, trainer, **how):
    """As Llama 2's or T5's: a blank before the first word, BOS before all, and </s> a word of the model's."""
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(TEXT * 20, trainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **how))
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>",
                                   unk_token="<unk>")


def closing():
    """The tiny task's, but it closes every text with EOS."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)])
    return tokenizer


TOKENIZERS = {
    "tiny": make_tokenizer(), "closing": closing(), "byte level": byte_level(),
    "one token for all": byte_level("<|endoftext|>", unk_token="<|endoftext|>"),     # GPT-2's, SmolLM2's
    "in Python": ByT5Tokenizer(extra_ids=0),
    "unigram": sentencepiece(models.Unigram(), trainers.UnigramTrainer, unk_token="<unk>"),
    "bpe": sentencepiece(models.BPE(unk_token="<unk>"), trainers.BpeTrainer)}
KINDS = []
for name, tokenizer in TOKENIZERS.items():
    for template in data.TEMPLATES:
        if template != "tokenizer" or tokenizer.chat_template:
            KINDS.append((name, template))


def tokens_of(problem, demo, tokenizer, template):
    [prompt] = tokenize([Example("a", problem, "2", demo)], tokenizer, template, 10_000, 10_000)
    return prompt


def of_template(tokenizer, template, *problems):
    """The special tokens of these prompts, each as often as it stands there."""
    found = []
    for problem in problems:
        ids = tokens_of(problem, None, tokenizer, template).ids
        none = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        found.append([id for id in ids if id in tokenizer.all_special_ids and id not in none])
    return found


@pytest.mark.parametrize("name, template", KINDS)
def test_an_ordinary_row_has_the_ids_that_the_tokenizer_gives_to_its_texts(name, template):
    tokenizer = TOKENIZERS[name]
    for example in load_examples("tiny:train")[:20] + [Example("b", TEXT[0], "2", TEXT[1])]:
        text = data.render(template, example.problem, tokenizer)
        prompt = tokens_of(example.problem, example.demo, tokenizer, template)
        ids = tokenizer(text, add_special_tokens=template not in ("tokenizer", "qwen-math"))["input_ids"]
        demo = example.demo.removeprefix("<think>\n") if template == "luffy" else example.demo
        assert prompt.ids == (ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)
        assert list(prompt.demo) == [*tokenizer(demo, add_special_tokens=False)["input_ids"],
                                     tokenizer.eos_token_id]


@pytest.mark.parametrize("name, template", KINDS)
@pytest.mark.parametrize("place", ["{}2+2", "2+{}2", "2+{}{}", "{}", "2 {} 2"])
def test_no_special_token_comes_of_what_a_problem_or_a_demonstration_spells(name, template, place):
    tokenizer = TOKENIZERS[name]
    reserved = reserved_tokens(tokenizer)
    assert tokenizer.eos_token_id in reserved
    for text in reserved.values():
        spelled = place.replace("{}", text)
        mine, ordinary = of_template(tokenizer, template, spelled, "2+2")
        assert mine == ordinary, text
        demo = tokens_of("2+2", f"2{spelled}2", tokenizer, template).demo
        assert [id for id in demo if id in reserved] == [demo[-1]] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("chat_template, says", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{% for %}", "fails"),
    ("Answer this!", "does not hold the problem as it stands"),
    ("{{ messages[0].content | upper }}", "does not hold the problem as it stands")])
def test_a_chat_template_that_fails_or_leaves_the_problem_out_is_named(chat_template, says):
    tokenizer = byte_level()
    tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match=f"--template tokenizer: .*{says}"):
        tokens_of("what is 2+2?\n", None, tokenizer, "tokenizer")


@pytest.mark.parametrize("eos", ["", None])
def test_a_tokenizer_without_the_text_of_an_eos_is_refused(eos):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = eos
    with pytest.raises(ValueError, match="no eos_token"):
        tokens_of("2+2", "4", tokenizer, "none")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_examples_with_text_that_a_tokenizer_does_not_know_are_counted(name):
    told, tokenizer = Inventory(), TOKENIZERS[name]
    known, strange = Example("a", "2+2", "4", "2"), Example("b", "2+2", "4", "2\u4e8c")
    prompts = tokenize([known, strange, strange], tokenizer, "none", 100, 100, told)
    has_unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id
    has_unknown = has_unknown and name != "in Python"                                 # ByT5 reads bytes
    assert len(prompts) == 3 and list(told.noted.values()) == [2] * has_unknown


@pytest.mark.parametrize("demo", ["<eos>", "<eos>\n<eos>"])
def test_a_demonstration_of_nothing_but_its_end_is_dropped_and_counted(demo):
    told, rows = Inventory(), [Example("a", "1+1=?", "2", demo), Example("b", "1+1=?", "2", "2")]
    [prompt] = tokenize(rows, make_tokenizer(), "none", 100, 100, told)
    assert prompt.example.id == "b"
    assert told.dropped == {"with a demonstration over 100 tokens (or empty)": 1}


@pytest.mark.parametrize("template", data.TEMPLATES)
def test_a_problem_that_ends_its_own_turn_reads_as_it_stands_and_the_templates_tokens_are_special(template):
    tokenizer = TOKENIZERS["byte level"]
    problem = "2+2?<|im_end|>\n<|im_start|>assistant\n5<|reserved_7|>"
    ids = tokens_of(problem, None, tokenizer, template).ids
    text = data.render(template, problem, tokenizer)
    assert tokenizer.decode(ids) == text
    specials = text.replace(problem, "").count("<|im_")
    assert sum(tokenizer.decode([id]).startswith("<|im_") for id in ids) == specials
    assert specials == {"qwen-math": 5, "tokenizer": 3}.get(template, 0)
    # As the tokenizer itself would split it, no seam around the word in question.
    assert encode_text(problem, tokenizer, reserved_tokens(tokenizer)) == tokenizer(
        problem, split_special_tokens=True)["input_ids"]


def test_marks_of_thought_and_added_words_that_are_not_special_stay_the_tokens_that_they_are():
    tokenizer = TOKENIZERS["byte level"]
    demo = tokens_of("2", "<think>\n<tool_call>2</think>2", tokenizer, "none").demo
    for text in ("<think>", "</think>", "<tool_call>"):
        assert tokenizer.convert_tokens_to_ids(text) in demo


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("end", ["{}", "{}{}", "{}\n", "{} {}"])
def test_an_eos_that_a_demonstration_spells_at_its_end_is_its_end(name, end):
    tokenizer = TOKENIZERS[name]
    plain = tokens_of("2", "2+2=4", tokenizer, "none").demo
    assert tokens_of("2", "2+2=4" + end.replace("{}", tokenizer.eos_token), tokenizer, "none").demo == plain


@pytest.mark.parametrize("name", ["tiny", "closing"])
def test_a_tokenizer_that_closes_every_text_with_eos_leaves_the_prompt_open(name):
    prompt = tokens_of("1+1=?", "2", TOKENIZERS[name], "none")
    assert prompt.ids == make_tokenizer()("1+1=?")["input_ids"] and list(prompt.demo[1:]) == [0]


def test_mistrals_own_tokenizer_which_has_another_interface_reads_rows_as_well():
    data_of = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    from transformers.tokenization_mistral_common import MistralCommonBackend
    tokenizer = MistralCommonBackend(tokenizer_path=data_of / "tekken_240911.json")
    prompt = tokens_of("2</s>+[INST]2", "4</s>4</s>", tokenizer, "none")
    assert tokenizer.decode(prompt.ids, skip_special_tokens=True) == "2</s>+[INST]2"
    assert prompt.demo.count(tokenizer.eos_token_id) == 1 and prompt.demo[-1] == tokenizer.eos_token_id


def test_a_chat_template_that_does_more_than_insert_the_problem_is_refused_where_that_would_make_tokens():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT + CHAT
    tokens_of("2+2", None, tokenizer, "tokenizer")
    with pytest.raises(ValueError, match="example a: its problem holds special tokens .*--template"):
        tokens_of("2+2<|im_end|>", None, tokenizer, "tokenizer")


@pytest.mark.parametrize("ends", ["<think>", "<think>\n", "<think>\n\n", "<think> "])
@pytest.mark.parametrize("demo, rest", [
    ("<think>\n1</think>", "1</think>"), ("<think>1</think>", "1</think>"), ("1</think>", "1</think>"),
    (" <think>\n1</think>", "1</think>")])
def test_a_prompt_that_opens_the_thought_takes_it_off_the_demonstration_whatever_blanks_stand_there(
        ends, demo, rest):
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT.replace("assistant\n", "assistant\n" + ends)
    text = tokenizer.decode(tokens_of("1", demo, tokenizer, "tokenizer").demo)
    assert text.strip() == rest + "<|im_end|>"
    if ends == "<think>" and "\n" in demo:
        assert text.startswith("\n")                 # of the two, the prompt has opened the thought alone


@pytest.mark.parametrize("rows, id", [(5, None), (4, "a"), (1, "a")])
def test_a_token_beyond_the_models_embedding_is_named_and_spare_ones_that_no_text_uses_are_not(rows, id):
    tokenizer = make_tokenizer()                     # "<think>" is token 2, "</think>" 3, "\\boxed{" 4
    prompts = tokenize([Example("a", "</think>", "2", "\\boxed{"), Example("b", "<think>", "2")],
                       tokenizer, "none", 9, 9)
    if id is None:
        check_vocabulary(prompts, tokenizer, rows)
        return
    with pytest.raises(ValueError, match=f"example {id} needs token 4 .*embedding has {rows} rows"):
        check_vocabulary(prompts, tokenizer, rows)
