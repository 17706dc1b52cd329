"""data.py: what is read, what is refused and how it is said, what becomes tokens, and the tiny task.

    pytest tests/test_data.py
"""
import doctest
import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

import data
from data import Example, Order, load_examples, render, tokenize
from support import layouts, readers
from support.inventory import Inventory
from tiny import task
from tiny.task import draw_terms, write_response

GOOD = {"problem": "1+1=?", "answer": "2", "solution": "<think>\n</think>\n\\boxed{2}"}


@pytest.fixture(scope="module")
def tokenizer():
    return task.make_tokenizer()


def openr1(problem="1+1=?", answer="2", demo="<think>\n</think>\n2", index=0):
    """A row in the schema of Openr1-Math-46k-8192."""
    return {"data_source": "math", "ability": "math", "extra_info": {"index": index, "split": "default"},
            "prompt": [{"role": "system", "content": "You think."}, {"role": "user", "content": problem}],
            "target": [{"role": "assistant", "content": demo}],
            "reward_model": {"ground_truth": answer, "style": "rule"}}


def jsonl(path, *rows):
    """Write rows (objects, or bytes as they are) one a line."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


# ----------------------------------------------------------------------------------------------------------
# Readers.

@pytest.mark.parametrize("module", [data, task, layouts, readers], ids=lambda module: module.__name__)
def test_the_inputs_and_outputs_in_the_docstrings_are_true(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.parametrize("write, name", [(parquet, "d.parquet"), (jsonl, "d.jsonl")])
@pytest.mark.parametrize("row", [
    openr1("p", "7", "d"), {"problem": "p", "answer": "7", "solution": "d"},
    {"question": "p", "answer": "7", "solution": "d"}], ids=["openr1", "problem", "question"])
def test_both_schemas_are_read_from_both_formats(tmp_path, write, name, row):
    [example] = load_examples(write(tmp_path / name, row))
    assert (example.problem, example.answer, example.demo) == ("p", "7", "d")


@pytest.mark.parametrize("value, text", [
    (7, "7"), (-0.5, "-0.5"), (4.0, "4.0"), (0.1, "0.1"), (10**30, "1" + "0" * 30),
    (1e-7, "0.0000001"), (1e17, "1" + "0" * 17 + ".0")])               # to some graders, e is Euler's number
def test_numbers_are_accepted_as_answers(tmp_path, value, text):
    assert load_examples(jsonl(tmp_path / "d.jsonl", {"problem": "p", "answer": value}))[0].answer == text
    assert load_examples(jsonl(tmp_path / "e.jsonl", openr1(answer=value)))[0].answer == text


@pytest.mark.parametrize("row", [
    {"problem": "p", "answer": "1"}, {"problem": "p", "answer": "1", "solution": None},
    openr1() | {"target": None}])
def test_a_demonstration_is_optional(tmp_path, row):
    assert load_examples(jsonl(tmp_path / "d.jsonl", row))[0].demo is None


def test_a_folder_is_read_file_by_file_in_sorted_order_and_other_files_are_left_alone(tmp_path, monkeypatch):
    rglob = Path.rglob                                                   # a file system may list in any order
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(sorted(rglob(path, pattern))))
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("not data")
    for name in ("c.jsonl", "a.jsonl", "sub/b.jsonl"):
        jsonl(tmp_path / name, GOOD | {"problem": name})
    parquet(tmp_path / "b.parquet", GOOD | {"problem": "b.parquet"})
    read, told = ["a.jsonl", "b.parquet", "c.jsonl", "sub/b.jsonl"], Inventory()
    assert [e.problem for e in load_examples(tmp_path, inventory=told)] == read
    assert told.rows == dict.fromkeys(read, 1) and told.left == ["README.md"]


def test_of_a_folder_it_is_said_what_is_read_and_what_is_not(tmp_path):
    for name in ("a.jsonl", *(f"b{i}.jsonl" for i in range(9))):
        jsonl(tmp_path / name, GOOD | {"problem": name})
    for name in ("C.JSONL", "d.jsonl.gz", "e.json", ".hidden"):
        (tmp_path / name).write_text("x")
    told = Inventory("--data mine")
    assert len(load_examples(tmp_path, inventory=told)) == 10
    assert str(told).splitlines()[1] == (
        "  read: a.jsonl 1, b0.jsonl 1, b1.jsonl 1, b2.jsonl 1, b3.jsonl 1 and 5 more; "
        "left alone: C.JSONL, d.jsonl.gz, e.json")


@pytest.mark.parametrize("target", ["elsewhere", "folder", "."], ids=["", "loop", "itself"])
def test_a_link_to_a_folder_is_refused_and_not_left_out(tmp_path, target):
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", GOOD)
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / target, target_is_directory=True)
    with pytest.raises(ValueError, match="folder/link: a link to a folder, which is not followed"):
        load_examples(folder)
    (tmp_path / "other").symlink_to(folder / "a.jsonl")
    (tmp_path / "to it").symlink_to(tmp_path / "elsewhere")                      # the name itself may be one
    jsonl(tmp_path / "elsewhere" / "a.jsonl", GOOD)
    assert len(load_examples(tmp_path / "to it")) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_empty_file_beside_others_is_an_error_and_not_a_smaller_data_set(name, tmp_path):
    jsonl(tmp_path / "b.jsonl", GOOD)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: is empty"):
        load_examples(tmp_path, skip_bad_rows=True)


def test_two_values_of_one_name_are_a_bad_row_or_a_bad_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1", "answer": "2"}\n')
    with pytest.raises(ValueError, match="a.jsonl, row 1: .*names answer twice"):
        load_examples(tmp_path / "a.jsonl")
    columns = [pyarrow.array([text]) for text in "p12"]
    table = pyarrow.Table.from_arrays(columns, ["problem", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: .*two columns named answer"):
        load_examples(tmp_path / "a.parquet", skip_bad_rows=True)


def test_no_two_examples_have_one_id_even_where_one_spells_another_ones_place(tmp_path):
    rows = [GOOD | {"id": "d.jsonl/2"}, GOOD, GOOD | {"id": "d.jsonl/2"}, GOOD | {"id": "d.jsonl/3"}]
    ids = [e.id for e in load_examples(jsonl(tmp_path / "d.jsonl", *rows))]
    assert len(set(ids)) == 4 and ids[0] == "d.jsonl/2"


@pytest.mark.parametrize("name", [
    "._a.jsonl", ".hidden.parquet", ".ipynb_checkpoints/a-checkpoint.jsonl", ".cache/huggingface/a.parquet",
    "sub/.git/a.jsonl"])
def test_a_folders_hidden_files_which_other_programs_leave_are_not_data(name, tmp_path):
    folder = tmp_path / ".data"                                          # its own name may begin with a point
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"\0\5\26\7")                            # as macOS begins its ._ files
    jsonl(folder / "a.jsonl", GOOD)
    (folder / "b.jsonl").mkdir()
    assert len(load_examples(folder)) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_git_lfs_pointer_is_named_in_the_place_of_the_data_that_was_not_fetched(name, skip, tmp_path):
    jsonl(tmp_path / "b.jsonl", GOOD)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1a2b\nsize 123\n")
    with pytest.raises(ValueError, match=f"{name}: a Git-LFS pointer.*git lfs pull"):
        load_examples(tmp_path, skip_bad_rows=skip)


def test_a_link_to_a_file_that_is_gone_is_an_error_and_not_a_smaller_data_set(tmp_path):
    jsonl(tmp_path / "b.jsonl", GOOD)
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="a.jsonl"):
        load_examples(tmp_path)


def test_rows_that_repeat_an_earlier_one_or_its_problem_are_kept_and_counted(tmp_path):
    told, rows = Inventory(), [GOOD, GOOD, GOOD | {"solution": "2"}, GOOD | {"id": "own"}]
    jsonl(tmp_path / "a.jsonl", *rows)
    jsonl(tmp_path / "b.jsonl", GOOD)
    assert len(load_examples(tmp_path, inventory=told)) == 5
    assert told.noted == {"repeating an earlier row": 3,
                          "repeating an earlier problem, with another answer or demonstration": 1}


def test_a_parquet_row_whose_text_is_no_utf_8_is_a_bad_row_like_any_other(tmp_path):
    path = parquet(tmp_path / "d.parquet", *[GOOD | {"answer": str(i)} for i in range(3)])
    table = pyarrow.parquet.read_table(path)
    broken = pyarrow.array([b"p", b"\xff", b"q"]).cast(pyarrow.string(), safe=False)
    table = table.set_column(table.schema.get_field_index("problem"), "problem", broken)
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="d.parquet, row 2: expected text in UTF-8"):
        load_examples(path)
    examples = load_examples(path, skip_bad_rows=True)
    assert [(e.problem, e.answer) for e in examples] == [("p", "0"), ("q", "2")]


def test_empty_lines_and_windows_line_ends_are_no_rows(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\n  \n" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(load_examples(tmp_path / "d.jsonl")) == 1


BAD_ROWS = {
    b'{"problem": "p", ': "JSON object",
    b'{"problem": "\xff", "answer": "1"}': "'utf-8' codec can't decode",
    b'["p", "1"]': "expected an object",
    b'"p"': "expected an object",
    b"null": "expected an object",
    b'{"answer": "1"}': "'problem' or 'question' or 'prompt', found no such column",
    b'{"problem": "p"}': "'answer' or 'ground_truth' or 'final_answer', found no such column",
    b'{"problem": ["p"], "answer": "1"}': "{'problem': ['p']}",
    b'{"problem": "p", "answer": {"x": 1}}': "'answer': {'x': 1}",
    b'{"problem": "p", "answer": true}': "'answer': True",
    b'{"problem": " ", "answer": "1"}': "'problem': ' '",
    b'{"problem": "p", "answer": ""}': "'answer': ''",
    json.dumps(openr1() | {"reward_model": None}).encode(): "'reward_model' to hold ground_truth",
    json.dumps(openr1(answer="")).encode(): "'ground_truth': ''",
    json.dumps(openr1() | {"prompt": None}).encode(): "or 'prompt', found no such column",
    json.dumps(openr1() | {"prompt": ["p"]}).encode(): "'prompt' to be a list of {role, content}",
    json.dumps(openr1() | {"prompt": [{"role": "system", "content": "s"}]}).encode():
        "user message in 'prompt'",
    json.dumps(openr1(demo="")).encode(): "message in 'target'",
    json.dumps(openr1() | {"target": ["d"]}).encode(): "'target' to be a list of {role, content}",
    json.dumps(GOOD | {"problem": "a\ud83d"}).encode(): r"'problem', found half a character (the lone "
                                                        r"surrogate '\ud83d', at place 1)",
    json.dumps(GOOD | {"answer": "\udc00"}).encode(): "'answer', found half a character",
    json.dumps(GOOD | {"solution": "\udc00"}).encode(): "'solution', found half a character",
    json.dumps(GOOD | {"id": "\udc00"}).encode(): "'id', found half a character",
    json.dumps(openr1("\ud800")).encode(): "'prompt', found half a character",
    json.dumps(openr1(demo="\ud800")).encode(): "'target', found half a character",
}


@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda b: b[:40].decode(errors="replace"))
def test_a_bad_row_is_named_by_file_and_row_with_what_was_expected_or_skipped_and_counted(tmp_path, bad):
    path, told = jsonl(tmp_path / "d.jsonl", GOOD, bad, GOOD | {"answer": "3"}, bad), Inventory()
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 2: ")) as error:
        load_examples(path)
    assert BAD_ROWS[bad] in str(error.value) and "expected" in str(error.value)
    assert "--skip_bad_rows" in str(error.value)
    assert len(load_examples(path, skip_bad_rows=True, inventory=told)) == 2
    [dropped, first] = told.remarks()[:2]
    assert dropped == "dropped: 2 unreadable"
    assert first.startswith(f"the first unreadable one: {path}, row 2: ")


def test_a_bad_parquet_row_is_named_by_its_number_in_the_file(tmp_path):
    path = parquet(tmp_path / "d.parquet", *[GOOD] * 1500, GOOD | {"answer": None})     # in the second batch
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 1501: ")):
        load_examples(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:len(b) // 2], lambda b: b"",
                                    lambda b: b[:100] + b"\xff" * 100 + b[200:]],
                         ids=["cut at the end", "cut in half", "empty", "overwritten inside"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = parquet(tmp_path / "d.parquet", *[openr1(str(i)) for i in range(300)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_examples(path)


@pytest.mark.parametrize("name, error", [
    ("none.jsonl", FileNotFoundError), ("d.csv", ValueError), ("empty.jsonl", ValueError),
    ("folder", ValueError), ("bad.jsonl", ValueError), ("empty.parquet", ValueError)])
def test_a_path_that_yields_no_example_is_an_error_that_names_it(tmp_path, name, error):
    (tmp_path / "d.csv").write_text("problem,answer\n")
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "empty.jsonl")
    jsonl(tmp_path / "bad.jsonl", b"{")
    parquet(tmp_path / "empty.parquet", GOOD)
    table = pyarrow.parquet.read_table(tmp_path / "empty.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(error, match=re.escape(str(tmp_path / name))):
        load_examples(tmp_path / name, skip_bad_rows=True)


def a_folder_with_two_files_of_one_stem(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "a.jsonl", GOOD)
    return tmp_path


@pytest.mark.parametrize("write", [
    lambda p: jsonl(p / "d.jsonl", GOOD, GOOD),
    lambda p: jsonl(p / "d.jsonl", *(GOOD | {"id": i} for i in "ab")),
    lambda p: jsonl(p / "d.jsonl", openr1(index=3), openr1(index=4)),
    lambda p: parquet(p / "d.parquet", openr1("1+1=?", index=-1), openr1("1+2=?", index=-1)),
    lambda p: jsonl(p / "d.jsonl", *(GOOD | {"id": None} for _ in range(2))),
    lambda p: jsonl(p / "d.jsonl", *(GOOD | {"id": "a"} for _ in range(2))),
    a_folder_with_two_files_of_one_stem],
    ids=["no id", "own ids", "index", "index -1 throughout", "null ids", "repeated ids",
         "same file name in two folders"])
def test_every_example_has_an_id_of_its_own(tmp_path, write):
    write(tmp_path)
    assert len({e.id for e in load_examples(tmp_path)}) == 2


@pytest.mark.parametrize("row", [
    GOOD | {"solution": ["d"]}, GOOD | {"solution": {"text": "d"}}, GOOD | {"answer": float("nan")},
    GOOD | {"solution": float("nan")}], ids=str)
def test_a_demonstration_of_another_type_or_a_nan_is_an_error(tmp_path, row):
    with pytest.raises(ValueError, match="row 1"):
        load_examples(jsonl(tmp_path / "d.jsonl", row))


# ----------------------------------------------------------------------------------------------------------
# Templates.

@pytest.mark.parametrize("template", [t for t in data.TEMPLATES if t != "tokenizer"])
@pytest.mark.parametrize("question", ["1+1=?", r"Let $S = \{1, 2\}$, find \frac{1}{2}.",
                                      "{question} {answer} {0} {}", "{{x}}"])
def test_each_template_holds_the_question_once_as_it_is(template, question):
    text = render(template, question)
    before, after = data.TEMPLATES[template].split("{question}")
    assert text == before + question + after


def test_no_template_is_the_bare_question_and_an_unknown_one_is_refused_by_name():
    assert render("none", "q") == "q"
    with pytest.raises(ValueError, match="'papper'.*paper, qwen-math"):
        render("papper", "q")


def test_the_paper_s_template_has_the_words_of_fig_a3():
    text = render("paper", "Q?")
    for words in (
            "Your task is to follow a systematic, thorough reasoning process before providing the final "
            "solution.",
            "analyzing, summarizing, exploring, reassessing, and refining your thought process through "
            "multiple iterations.",
            "Structure your response into two sections: Thought and Solution.",
            "<think>\\n {thoughts}</think>\\n",
            "Each thought should include detailed analysis, brainstorming, verification, and refinement of "
            "ideas.",
            "provide the final, logical, and accurate answer, clearly derived from the exploration in the "
            "Thought section.",
            "\\boxed{ } for closed-form results like multiple choices or mathematical solutions.",
            "Question: Q?"):
        assert words in text
    assert text.rstrip().endswith("Answer:")


def test_the_tokenizer_s_template_is_its_chat_template_and_its_absence_is_explained():
    chatty, plain = task.make_tokenizer(), task.make_tokenizer()
    chatty.chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                            "{% if add_generation_prompt %}[go]{% endif %}")
    assert render("tokenizer", "1+{1}", chatty) == "[user]1+{1}[go]"
    with pytest.raises(ValueError, match="no chat template"):
        render("tokenizer", "q", plain)


# ----------------------------------------------------------------------------------------------------------
# From text to tokens.

def test_prompt_and_demonstration_become_tokens_and_eos_ends_the_demonstration(tokenizer):
    example = Example("a", "1+1=?\n", "2", "<think>\n1+1=2\n</think>\n\\boxed{2}")
    [prompt] = tokenize([example], tokenizer, "none", 40, 40)
    assert tokenizer.decode(prompt.ids) == "1+1=?\n"
    assert tokenizer.decode(prompt.demo) == "<think>\n1+1=2\n</think>\n\\boxed{2}<eos>"
    assert tokenize([Example("a", "1+1=?\n", "2")], tokenizer, "none", 40, 40)[0].demo is None


@pytest.mark.parametrize("text", ["\\boxed{2}", "\\boxed{2}<eos>"])
def test_eos_ends_a_demonstration_exactly_once(tokenizer, text):
    [prompt] = tokenize([Example("a", "1+1=?\n", "2", text)], tokenizer, "none", 40, 40)
    assert prompt.demo.count(tokenizer.eos_token_id) == 1 and prompt.demo[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = task.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        tokenize([Example("a", "1", "1")], tokenizer, "none", 40, 40)


@pytest.mark.parametrize("template, demo, expected", [
    ("luffy", "<think>\n1</think>", "1</think><eos>"),
    ("luffy", "1</think>", "1</think><eos>"),
    ("paper", "<think>\n1</think>", "<think>\n1</think><eos>"),
    ("none", "<think>\n1</think>", "<think>\n1</think><eos>")])
def test_a_prompt_that_opens_the_thought_takes_it_off_the_demonstration(tokenizer, template, demo, expected):
    [prompt] = tokenize([Example("a", "1=?", "1", demo)], tokenizer, template, 10_000, 40)
    assert tokenizer.decode(prompt.demo) == expected


@pytest.mark.parametrize("max_prompt, max_response, kept", [(4, 6, 1), (3, 6, 0), (4, 5, 0)])
def test_limits_include_eos_and_drop_and_count_what_is_over_them(tokenizer, max_prompt, max_response, kept):
    told, fits = Inventory(), Example("fits", "1", "1")
    example = Example("a", "1+1=", "2", "12345")                          # 4 tokens; 5 and EOS
    prompts = tokenize([example, fits], tokenizer, "none", max_prompt, max_response, told)
    assert [p.example.id for p in prompts] == ["a"] * kept + ["fits"]
    assert (told.used, told.demonstrations) == (1 + kept, kept)
    if max_prompt < 4:
        assert told.dropped == {"with a prompt over 3 tokens (or empty)": 1}
    if max_response < 6:
        assert told.dropped == {"with a demonstration over 5 tokens (or empty)": 1}
    if not kept:
        limits = f"--max_prompt_tokens {max_prompt} and --max_response_tokens {max_response}"
        with pytest.raises(ValueError, match=limits):
            tokenize([example], tokenizer, "none", max_prompt, max_response)


# ----------------------------------------------------------------------------------------------------------
# Order.

def test_an_epoch_is_a_permutation_and_epochs_and_seeds_differ():
    a, b = Order(50, seed=0), Order(50, seed=1)
    epochs = [a.take(50), a.take(50), b.take(50)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("n, k", [(7, 3), (5, 5), (3, 8), (1, 2)])
def test_an_order_resumed_at_any_position_continues_identically(n, k):
    whole = Order(n, seed=3).take(4 * n + k)
    for position in range(4 * n):
        resumed = Order(n, seed=3, position=position)
        assert resumed.take(k) == whole[position:position + k] and resumed.position == position + k
    pieces = Order(n, seed=3)
    assert [i for _ in range(4) for i in pieces.take(n)] == whole[:4 * n] and pieces.take(0) == []


# ----------------------------------------------------------------------------------------------------------
# The tiny task.

def boxed(text):
    return re.findall(r"\\boxed\{(-?\d+)\}", text)[-1]


def test_the_tiny_task_is_the_same_each_time_its_splits_disjoint_and_its_answers_right():
    splits = {name: load_examples(f"tiny:{name}") for name in task.SPLITS}
    assert all(load_examples(f"tiny:{name}") == examples for name, examples in splits.items())
    problems = [e.problem for examples in splits.values() for e in examples]
    ids = {e.id for examples in splits.values() for e in examples}
    assert len(problems) == len(set(problems)) == len(ids)
    for name, examples in splits.items():
        assert len(examples) == task.SPLITS[name][0]
        for e in examples:
            assert re.fullmatch(r"[\d+-]+=\?\n", e.problem) and e.answer == str(eval(e.problem[:-3]))
            assert len(re.findall(r"\d+", e.problem)) in task.SPLITS[name][1]
            assert (e.demo is not None) == (name == "train")
    with pytest.raises(ValueError, match="tiny:test.*train, heldout, long"):
        load_examples("tiny:test")


def test_five_to_thirty_percent_of_the_tiny_demonstrations_are_wrong():
    wrong = [boxed(e.demo) != e.answer for e in load_examples("tiny:train")]
    assert 0.05 < sum(wrong) / len(wrong) < 0.30


@pytest.mark.parametrize("style", ["careful", "plain"])
def test_reasoning_without_slips_ends_in_the_right_answer_and_each_line_is_true(style):
    rng = random.Random(0)
    for _ in range(100):
        terms = draw_terms(rng, 5)
        text = write_response(terms, rng, style)
        assert boxed(text) == str(sum(terms)) and all(0 <= sum(terms[:n]) <= 199 for n in range(1, 6))
        assert all(eval(line.replace("=", "==")) for line in text.splitlines() if "=" in line)


def test_the_tiny_tokenizer_returns_every_text_also_after_a_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == tokenizer.eos_token_id == 0 and len(loaded) == len(task.TOKENS)
    examples = [e for name in task.SPLITS for e in load_examples(f"tiny:{name}")]
    texts = [text for e in examples for text in (e.problem, e.demo or "")]
    texts += [write_response([50, 60], random.Random(0), "guess"), "<think>\n</think>\n"]
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and loaded.unk_token_id not in ids
        assert loaded.decode(ids) == text
    assert loaded.decode(loaded("1=?")["input_ids"] + [0], skip_special_tokens=True) == "1=?"
