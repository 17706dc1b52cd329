"""support/layouts.py, support/readers.py, support/inventory.py: the layouts of data that people bring, with
the columns and types of the public files; splits and configurations; and what is said of it all at the start.

    pytest tests/test_layouts.py
"""
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import Example, load_examples, parse_row, tokenize
from grading.answers import judge
from support.inventory import Inventory
from support.readers import of_one_split, split_of
from tiny.task import make_tokenizer

CHAT = pyarrow.list_(pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())]))
TEXT, BOOLS, TEXTS = pyarrow.string(), pyarrow.list_(pyarrow.bool_()), pyarrow.list_(pyarrow.string())
REWARD = pyarrow.struct([("ground_truth", TEXT), ("style", TEXT)])


def info(index):
    return pyarrow.struct([("index", index), ("split", TEXT)])


# The columns of open-r1/OpenR1-Math-220k, Elliott/Openr1-Math-46k-8192 (LUFFY's openr1.parquet; HPT's lacks
# the system turn), BytedTsinghua-SIA/DAPO-Math-17k and openai/gsm8k, as their cards give them.
SCHEMAS = {
    "OpenR1-Math-220k": pyarrow.schema([
        ("problem", TEXT), ("solution", TEXT), ("answer", TEXT), ("problem_type", TEXT),
        ("question_type", TEXT),
        ("source", TEXT), ("uuid", TEXT), ("is_reasoning_complete", BOOLS), ("generations", TEXTS),
        ("correctness_math_verify", BOOLS), ("correctness_llama", BOOLS), ("finish_reasons", TEXTS),
        ("correctness_count", pyarrow.int64()), ("messages", CHAT)]),
    "Openr1-Math-46k-8192": pyarrow.schema([
        ("data_source", TEXT), ("prompt", CHAT), ("target", CHAT), ("ability", TEXT),
        ("reward_model", REWARD),
        ("extra_info", info(pyarrow.int64()))]),
    "DAPO-Math-17k": pyarrow.schema([
        ("data_source", TEXT), ("prompt", CHAT), ("ability", TEXT), ("reward_model", REWARD),
        ("extra_info", pyarrow.struct([("index", TEXT)]))]),
    "gsm8k": pyarrow.schema([("question", TEXT), ("answer", TEXT)]),
}


def generated(verified, llama=None, complete=None):
    """A row of OpenR1-Math-220k whose three generations have these verdicts."""
    return {"problem": "p", "solution": "a human's", "answer": "7", "problem_type": "Algebra", "uuid": "u-1",
            "question_type": "math-word-problem", "source": "olympiads", "is_reasoning_complete": complete,
            "generations": ["first", "second", "third"], "correctness_math_verify": verified,
            "correctness_llama": llama, "finish_reasons": ["stop", "length", None], "correctness_count": 1,
            "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "third"}]}


SYSTEM, USER = {"role": "system", "content": "Your task is ..."}, {"role": "user", "content": "p"}
OPENR1 = {"data_source": "", "prompt": [SYSTEM, USER], "target": [{"role": "assistant", "content": "d"}],
          "ability": "math", "reward_model": {"ground_truth": "7", "style": "rule"},
          "extra_info": {"index": 3, "split": "train"}}
FRAME = ("Solve the following math problem step by step. The last line of your response should be of the "
         "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\np\n\nq\n\n"
         "Remember to put your answer on its own line after \"Answer:\".")
DAPO = {"data_source": "math_dapo", "prompt": [{"role": "user", "content": FRAME}], "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"}}
GSM8K = {"question": "p", "answer": "In May 48/2 = <<48/2=24>>24 clips.\n"
                                    "That is $1,000+24 = $<<1000+24=1024>>1024.\n"
                                    "#### 1,024"}
WORKED_OUT = "In May 48/2 = 24 clips.\nThat is $1,000+24 = $1024.\nThe answer is \\boxed{1024}."
NO, YES = [False] * 3, [True] * 3


@pytest.mark.parametrize("schema, row, example", [
    ("OpenR1-Math-220k", generated([False, True, True], None, YES), Example("u-1", "p", "7", "second")),
    ("OpenR1-Math-220k", generated([False, True, True], None, [True, False, True]),
     Example("u-1", "p", "7", "third")),
    ("OpenR1-Math-220k", generated(NO, [False, False, True], YES), Example("u-1", "p", "7", "third")),
    ("OpenR1-Math-220k", generated(None, [None, True, None]), Example("u-1", "p", "7", "second")),
    ("OpenR1-Math-220k", generated(NO, None, YES), Example("u-1", "p", "7", None)),
    ("OpenR1-Math-220k", generated(None, None, YES), Example("u-1", "p", "7", None)),
    ("Openr1-Math-46k-8192", OPENR1, Example("3", "p", "7", "d")),
    ("Openr1-Math-46k-8192", OPENR1 | {"prompt": [USER]}, Example("3", "p", "7", "d")),
    ("Openr1-Math-46k-8192", OPENR1 | {"target": None}, Example("3", "p", "7", None)),
    ("DAPO-Math-17k", DAPO, Example("9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "p\n\nq", "34", None)),
    ("gsm8k", GSM8K, Example("d.parquet/1", "p", "1024", WORKED_OUT))],
    ids=["verified", "not cut off", "by Llama", "by Llama alone", "none", "no verdict", "LUFFY", "HPT",
         "no target", "DAPO", "GSM8K"])
def test_the_public_layouts_are_read_from_parquet_with_their_columns_and_types(
        schema, row, example, tmp_path):
    table = pyarrow.Table.from_pylist([row], schema=SCHEMAS[schema])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert load_examples(tmp_path / "d.parquet") == [example]


@pytest.mark.parametrize("column, says", [
    (pyarrow.array([None, 10**7], pyarrow.int32()).cast(pyarrow.date32()), "date value out of range"),
    (pyarrow.StructArray.from_arrays([pyarrow.array(["a", "b"])] * 2, ["x", "x"]), "duplicate field names")],
    ids=["date", "names"])
def test_a_value_of_parquet_that_python_cannot_hold_makes_a_bad_row_by_name(column, says, tmp_path):
    table = pyarrow.table({"problem": ["p", "p"], "answer": ["7", "7"], "other": column})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=f"d.parquet, row [12]: expected what Python can hold.*{says}"):
        load_examples(tmp_path / "d.parquet")


def test_gsm8ks_derivation_earns_the_reward_as_a_demonstration():
    example = parse_row(GSM8K)
    item = {"kind": "math-verify", "response": example.demo, "answer": example.answer, "strict_box": True}
    assert judge(item, 5)[0] == "ok"


@pytest.mark.parametrize("row, says", [
    (generated([True, True]), "'correctness_math_verify' to be a list of 3 booleans"),
    (generated(NO, None, [True]), "'is_reasoning_complete' to be a list of 3 booleans"),
    (generated(NO) | {"generations": "first"}, "'generations' to be a list of texts, found 'first'"),
    ({"problem": "p", "answer": "7", "generations": ["d"]}, "correctness_math_verify or correctness_llama"),
    ({"question": "p", "answer": "Nothing comes\n####"}, "an answer after ####"),
    ({"problem": "p", "answer": "#### Step 1\nSo it\n#### Step 2\nSo it is 2."}, "after ####, on its line"),
    ({"problem": "p", "answer": "7", "solution": "d", "response": "e"},
     "'solution' and 'response': which one counts"),
    ({"problem": "p", "question": "q", "answer": "7"}, "'problem' and 'question': which one counts"),
    ({"problem": "p", "answer": "7", "final_answer": "8"}, "'answer' and 'final_answer': which one counts")])
def test_what_may_be_read_in_two_ways_is_refused_with_both_named(row, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_row(row)


@pytest.mark.parametrize("answer, read", [
    ("#### (3,4)", "(3,4)"), ("so\n#### 1,024.50", "1024.50"), ("####-$1,234,567", "-$1234567"),
    ("#### 2,50", "2,50"), ("#### 1, 2, 3", "1, 2, 3")])
def test_an_answer_loses_the_commas_between_thousands_and_no_others(answer, read):
    assert parse_row({"problem": "p", "answer": answer}).answer == read


def test_a_whole_number_of_any_length_is_an_answer():
    assert parse_row({"problem": "p", "answer": 10 ** 400}).answer == "1" + "0" * 400


@pytest.mark.parametrize("column", ["solution", "demonstration", "response", "completion", "output"])
def test_a_demonstration_has_one_of_a_few_names(column):
    assert parse_row({"problem": "p", "answer": "7", column: "d"}).demo == "d"


@pytest.mark.parametrize("row", [
    {"question": "p", "answer": "7"}, {"prompt": "p", "ground_truth": "7"},
    {"problem": "p", "final_answer": 7},
    {"problem": "p", "question": "p", "answer": "7"}, {"problem": "p", "question": "", "answer": "7"},
    {"problem": "p", "answer": "7", "generations": None},
    {"prompt": "p", "reward_model": {"ground_truth": "7"}, "solution": "7"}])
def test_so_have_problems_and_answers_and_what_says_the_same_twice_is_no_question(row):
    assert parse_row(row) == Example("", "p", "7", None)


# ----------------------------------------------------------------------------------------------------------
# Splits and configurations.

@pytest.mark.parametrize("name, split", [
    ("train.jsonl", "train"), ("data/train-00000-of-00010.parquet", "train"),
    ("validation/0.parquet", "validation"),
    ("dev.jsonl", "validation"), ("valid.arc_c.parquet", "validation"), ("gsm8k_test.jsonl", "test"),
    ("train/eval_2.jsonl", "test"), ("latest.jsonl", None), ("main/a.jsonl", None), ("strain.jsonl", None)])
def test_a_split_is_told_by_a_whole_word_of_the_path(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("names, train, held_out", [
    (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
    (["a/train/0.parquet", "a/test/0.parquet"], ["a/train/0.parquet"], ["a/test/0.parquet"]),
    (["openr1.parquet", "valid.parquet", "valid.all.parquet"], ["openr1.parquet"],
     ["valid.parquet", "valid.all.parquet"]),
    (["a.jsonl", "b/c.jsonl"], ["a.jsonl", "b/c.jsonl"], ["a.jsonl", "b/c.jsonl"]),
    (["test.jsonl"], ["test.jsonl"], ["test.jsonl"])])
def test_of_several_splits_train_alone_is_trained_on_and_another_one_evaluated(names, train, held_out):
    assert of_one_split(names, "train", "mine") == train
    assert of_one_split(names, "validation", "mine") == held_out


@pytest.mark.parametrize("names, folders", [
    (["main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"], "main, socratic: name one"),
    (["all/default-0.parquet", "data/train-0.parquet", "extended/train-0.parquet"],
     "all, data, extended: name one"),
    (["train.jsonl", "en/train/0.jsonl"], "en: name one")], ids=["gsm8k", "OpenR1-Math-220k", "at the top"])
def test_of_several_configurations_the_user_must_name_one(names, folders):
    with pytest.raises(ValueError, match=f"^mine: holds several configurations, {folders}"):
        of_one_split(names, "train", "mine")


# ----------------------------------------------------------------------------------------------------------
# What is said.

def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_that_became_of_a_folders_rows_is_told_in_a_few_lines(tmp_path):
    row = {"id": "a", "problem": "1+1=?", "answer": "2", "solution": "2", "messages": [USER], "output_len": 3}
    write(tmp_path / "a" / "train.jsonl", row, row, row | {"id": "b", "solution": "1"}, {"problem": "p"},
          row | {"problem": "1=?", "solution": None, "gpt_response": "1"})
    write(tmp_path / "a" / "more.jsonl", row | {"id": "c", "problem": "2" * 9},
          row | {"id": "d", "solution": "3" * 9},
          row | {"id": "e", "problem": "x=?"})
    write(tmp_path / "a" / "test.jsonl", row)
    told = Inventory("--data a")
    examples = load_examples(tmp_path / "a", skip_bad_rows=True, inventory=told)
    assert len(tokenize(examples, make_tokenizer(), "none", 8, 8, told)) == 5
    assert str(told).replace(str(tmp_path), "") == "\n  ".join([
        "--data a: 8 rows, 5 usable, 4 of them with a demonstration",
        "read: more.jsonl 3, train.jsonl 4; left alone: test.jsonl",
        "dropped: 1 unreadable; 1 with a prompt over 8 tokens (or empty); 1 with a demonstration "
        "over 8 tokens (or empty)",
        "the first unreadable one: /a/train.jsonl, row 4: expected text in column 'answer' or "
        "'ground_truth' or 'final_answer', found no such column",
        "kept: 2 repeating an earlier problem, with another answer or demonstration; 1 repeating an earlier "
        "row; 2 with an id that came before, and now with another; 1 with text that this tokenizer reads as "
        "<unk>",
        "not read, though named like a demonstration: gpt_response, messages; what is to be one belongs in "
        "the column `solution`"])


def test_one_file_without_oddities_is_one_line(tmp_path):
    write(tmp_path / "a" / "d.jsonl", {"problem": "p", "answer": "7"})
    told = Inventory(f"--data {Path('d.jsonl')}")
    load_examples(tmp_path / "a" / "d.jsonl", inventory=told)
    assert str(told) == "--data d.jsonl: 1 rows, 0 usable, 0 of them with a demonstration"


def test_of_a_held_out_set_demonstrations_are_not_told():
    told = Inventory("--eval_data d", held_out=True, unread={"messages"})
    assert str(told) == "--eval_data d: 0 rows, 0 usable"
