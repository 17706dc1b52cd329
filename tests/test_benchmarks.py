"""paper/benchmarks.py: every public format, the shuffle, repaired golds, what is said about bad input.

    pytest tests/test_benchmarks.py           # 10 s on 2 cores; the files of ../shared/data are optional
"""
import csv
import doctest
import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import Example
from paper import benchmarks, tables
from paper.benchmarks import (
    BENCHMARKS,
    LETTERS,
    Problem,
    load_benchmark,
    parse_problem,
    repair_scientific,
    shuffle,
    with_options,
)
from reward import Grader
from support import hub

ROOT = Path(benchmarks.__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PAPER = ROOT.parent / "shared" / "paper" / "srft-paper.md"
FILES = {"aime24": "aime24", "amc23": "amc23", "math500": "math500", "minerva": "minerva",
         "olympiad": "olympiad", "arc_c": "arc_c", "mmlu_pro": "mmlu_pro", "gsm8k": "gsm8k_test"}
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is not part of the repository")
quiet = dict(log=lambda *_: None)


def jsonl(path, *rows):
    """Write rows (objects, or bytes as they are) one a line."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def json_list(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def csv_file(path, *rows):
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {".jsonl": jsonl, ".json": json_list, ".parquet": parquet, ".csv": csv_file}


def local_rows(name):
    return [json.loads(line) for line in (DATA / f"{FILES[name]}.jsonl").open()]


# ----------------------------------------------------------------------------------------------------------
# The table.

@pytest.mark.parametrize("module", [benchmarks, tables], ids=["benchmarks", "tables"])
def test_the_inputs_and_outputs_in_the_docstrings_are_true(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_the_table_has_the_columns_of_table_2_in_their_order_with_32_responses_for_the_two_small_ones():
    assert [b.title for b in BENCHMARKS.values()] == [
        "AIME24", "AMC", "MATH500", "Minerva", "Olympiad", "ARC-C", "GPQA-D", "MMLU-Pro", "GSM8K"]
    assert [b.count for b in BENCHMARKS.values()] == [30, 83, 500, 272, 674, 1172, 198, 12032, 1319]
    assert {n for n, b in BENCHMARKS.items() if b.samples == 32} == {"aime24", "amc23"}
    assert {b.samples for b in BENCHMARKS.values()} == {1, 32}
    assert {n for n, b in BENCHMARKS.items() if b.choice} == {"arc_c", "gpqa", "mmlu_pro"}
    for benchmark in BENCHMARKS.values():
        repo, _, split = benchmark.hub
        assert "/" in repo and split in ("train", "test")


@pytest.mark.skipif(not PAPER.exists(), reason="the paper is not part of the repository")
@pytest.mark.parametrize("name", [n for n in BENCHMARKS if n != "gsm8k"])
def test_each_count_is_the_one_in_table_a2(name):
    benchmark = BENCHMARKS[name]
    [row] = re.findall(rf"^{benchmark.title}\t–\t([\d,]+)\t", PAPER.read_text(), re.MULTILINE | re.IGNORECASE)
    assert int(row.replace(",", "")) == benchmark.count


# ----------------------------------------------------------------------------------------------------------
# Rows: one of each public format -> id, problem, answer, options, answer_index.

ARC = {"id": "Mercury_1", "question": "Which?", "answerKey": "C",
       "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}}
GPQA = {"Pre-Revision Question": "old", "Question": "Which,\n\"exactly\"?\n", "Correct Answer": "right\n",
        "Incorrect Answer 1": " w1", "Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3",
        "Record ID": "rec1"}
MMLU_PRO = {"question_id": 70, "question": "Which?", "options": ["a", "b", "c"], "answer": "B",
            "answer_index": 1, "cot_content": "", "category": "law", "src": "x"}
FORMATS = {
    "HuggingFaceH4/MATH-500": (
        {"problem": "p", "solution": r"so \boxed{8}", "answer": r"\frac12", "subject": "Algebra", "level": 2,
         "unique_id": "test/algebra/1.json"}, ("test/algebra/1.json", "p", r"\frac12", None, None)),
    "HuggingFaceH4/aime_2024": (
        {"id": 60, "problem": "p", "solution": "s", "answer": "025", "url": "u", "year": "2024"},
        ("60", "p", "025", None, None)),
    "Maxwell-Jia/AIME_2024": (
        {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204},
        ("2024-I-1", "p", "204", None, None)),
    "math-ai/aime24": (
        {"id": 60, "problem": "p", "solution": r"\boxed{204}", "url": "u"}, ("60", "p", "204", None, None)),
    "AI-MO/aimo-validation-amc": (
        {"id": 0, "problem": "p", "answer": 142.0, "url": "u"}, ("0", "p", "142", None, None)),
    "Qwen2.5-Math minerva_math": (
        {"problem": "p", "solution": r"first \boxed{1}, so \boxed{\frac{a}{b}} cm", "type": "t", "idx": 0},
        ("", "p", r"\frac{a}{b}", None, None)),
    "math-ai/minervamath": ({"question": "p", "answer": "4.5e33"}, ("", "p", "4.5e33", None, None)),
    "Hothan/OlympiadBench": (
        {"id": 1606, "question": "p", "solution": [r"a list \boxed{9}"], "final_answer": ["$2^{1009}$"],
         "context": None, "unit": None}, ("1606", "p", "$2^{1009}$", None, None)),
    "OlympiadBench, several answers": (
        {"id": 1, "question": "p", "final_answer": ["1", "$3$"]}, ("1", "p", "1, $3$", None, None)),
    "openai/gsm8k": (
        {"question": "p", "answer": "####1: 2+3 = <<2+3=5>>5\n#### -1,234,567"},
        ("", "p", "-1234567", None, None)),
    "allenai/ai2_arc": (ARC, ("Mercury_1", "Which?", "C", ["a", "b", "c", "d"], 2)),
    "allenai/ai2_arc, digits": (
        ARC | {"choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        ("Mercury_1", "Which?", "B", ["a", "b", "c"], 1)),
    "TIGER-Lab/MMLU-Pro": (MMLU_PRO, ("70", "Which?", "B", ["a", "b", "c"], 1)),
    "Idavidrein/gpqa": (GPQA, ("rec1", "Which,\n\"exactly\"?", "A", ["right", "w1", "w2", "w3"], 0)),
    "HPT": ({"prompt": "p", "answer": "7", "source": "math", "id": "x"}, ("x", "p", "7", None, None)),
    "plain": ({"id": "a", "problem": " p\n", "answer": " 7 "}, ("a", " p\n", "7", None, None)),
    "plain, no options": ({"problem": "p", "answer": "7", "options": None}, ("", "p", "7", None, None)),
    "plain, letter alone": (
        {"problem": "p", "answer": "B", "options": ["x", "y"]}, ("", "p", "B", ["x", "y"], 1)),
    "plain, index alone": (
        {"problem": "p", "answer_index": 0, "options": ["x", "y"]}, ("", "p", "A", ["x", "y"], 0)),
    "LUFFY": (
        {"data_source": "amc",
         "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
         "reward_model": {"ground_truth": "142.0", "style": "rule"},
         "extra_info": {"index": 3, "split": "default"}},
        ("3", "p", "142.0", None, None)),
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_each_public_format_is_understood(format):
    row, expected = FORMATS[format]
    before = json.dumps(row)
    assert parse_problem(row) == expected
    assert json.dumps(row) == before


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_read_from_each_kind_of_file_that_can_hold_it(tmp_path, format, suffix):
    row, (id, problem, answer, options, index) = FORMATS[format]
    if suffix == ".csv" and any(isinstance(value, (list, dict)) or value is None for value in row.values()):
        pytest.skip("a CSV field is one text")
    name, [read] = load_benchmark(WRITERS[suffix](tmp_path / f"own{suffix}", row), seed=0)
    assert name == "own" and isinstance(read, Problem) and isinstance(read, Example) and read.demo is None
    assert read.id == (id or f"own{suffix}/1")
    if options is None:
        if not (suffix == ".csv" and isinstance(row.get("answer"), float)):     # a CSV says "142.0"
            assert read.answer == answer
        assert read.problem == problem and read.order is None
    else:
        shown = [options[i] for i in read.order]
        assert read.problem == with_options(problem, shown) and read.repaired is None
        assert shown[LETTERS.index(read.answer)] == options[index]


def test_a_csv_with_a_byte_order_mark_quotes_and_line_breaks_is_read_and_rows_are_counted_as_rows(tmp_path):
    path = csv_file(tmp_path / "d.csv", *[{"Question": "first column"} | GPQA] * 3)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [p.id for p in load_benchmark(path, seed=0)[1]] == ["rec1", "d.csv/2", "d.csv/3"]


def test_a_folder_is_read_whole_in_the_order_of_its_paths_and_what_is_no_data_is_left_alone(tmp_path):
    (tmp_path / "b").mkdir()
    parquet(tmp_path / "b" / "0.parquet", {"question": "3", "answer": "c"})
    jsonl(tmp_path / "a.jsonl", {"question": "1", "answer": "a"}, {"question": "2", "answer": "b"})
    json_list(tmp_path / "c.json", {"question": "4", "answer": "d"})
    (tmp_path / "README.md").write_text("notes")
    _, problems = load_benchmark(f"gsm8k={tmp_path}", seed=0, **quiet)
    assert [(p.id, p.problem) for p in problems] == [
        ("a.jsonl/1", "1"), ("a.jsonl/2", "2"), ("b/0.parquet/1", "3"), ("c.json/1", "4")]


# ----------------------------------------------------------------------------------------------------------
# Local files, counts, limits, ids.

@needs_data
@pytest.mark.parametrize("name", FILES)
def test_each_local_file_has_the_paper_s_count_and_its_content_arrives(name):
    said, rows = [], local_rows(name)
    found, problems = load_benchmark(f"{name}={DATA / FILES[name]}.jsonl", seed=1, log=said.append)
    assert found == name and said == [] and len(problems) == BENCHMARKS[name].count == len(rows)
    assert len({p.id for p in problems}) == len(problems)
    for row, read in zip(rows, problems):
        assert read.id == row["id"]
        if BENCHMARKS[name].choice:
            shown = [row["options"][i].strip() for i in read.order]
            assert sorted(read.order) == list(range(len(row["options"])))
            assert shown[LETTERS.index(read.answer)] == row["options"][row["answer_index"]].strip()
            assert read.problem == with_options(row["problem"].strip(), shown) and read.repaired is None
        else:
            assert (read.problem, read.answer, read.order) == (row["problem"].strip(), row["answer"], None)
            assert (read.repaired is not None) == bool(re.match(r"^[\d.]+e-?\d+$", read.answer))


@needs_data
def test_a_missing_row_is_printed_and_the_limit_comes_after_the_count(tmp_path):
    lines = (DATA / "aime24.jsonl").read_bytes().splitlines()
    whole, cut, said = jsonl(tmp_path / "w.jsonl", *lines), jsonl(tmp_path / "c.jsonl", *lines[:-1]), []
    for limit, count in ((1, 1), (30, 30), (99, 30)):
        assert len(load_benchmark(f"aime24={whole}", 0, limit=limit, log=said.append)[1]) == count
    assert said == []
    name, problems = load_benchmark(f"aime24={cut}", 0, limit=5, log=said.append)
    assert [p.id for p in problems] == [f"aime24/{i}" for i in range(5)] and len(said) == 1
    assert "29 problems instead of 30" in said[0] and "a part of it" in said[0] and "aime24" in said[0]


@pytest.mark.parametrize("name, count, guess", [("amc23", 40, "2023 alone"), ("amc23", 166, "repeated"),
                                                ("aime24", 90, "2022 to 2024"), ("olympiad", 675, "relay")])
def test_the_log_says_what_another_count_probably_means(tmp_path, name, count, guess):
    said, path = [], jsonl(tmp_path / "d.jsonl", *[{"problem": "p", "answer": "1"}] * count)
    load_benchmark(f"{name}={path}", 0, log=said.append)
    assert len(said) == 1 and guess in said[0]
    assert f"{count} problems instead of {BENCHMARKS[name].count}" in said[0]


def test_a_file_that_is_called_like_a_benchmark_is_taken_for_it(tmp_path):
    said = []
    path = jsonl(tmp_path / "gsm8k.jsonl", {"question": "p", "answer": "1"})
    assert load_benchmark(path, 0, log=said.append)[0] == "gsm8k"
    assert len(said) == 1 and "1 problems instead of 1319" in said[0]
    with pytest.raises(ValueError, match="multiple choice"):
        load_benchmark(jsonl(tmp_path / "arc_c.jsonl", {"question": "p", "answer": "1"}), 0)


def test_ids_are_made_unique_and_an_own_file_is_named_by_its_stem_and_has_no_count_to_meet(tmp_path):
    rows = [{"id": i, "problem": "p", "answer": "1"} for i in ("a", "a", "", None, -1, -1)]
    said, path = [], jsonl(tmp_path / "my=test.jsonl", *rows)
    name, problems = load_benchmark(path, 0, log=said.append)
    assert name == "my=test" and said == []
    assert [p.id for p in problems] == ["a", "my=test.jsonl/2", "my=test.jsonl/3", "my=test.jsonl/4", "-1",
                                        "my=test.jsonl/6"]


# ----------------------------------------------------------------------------------------------------------
# The hub: a stand-in for `datasets`, and the real one without a network.

class Rows(list):
    cache_files = ()


def stand_in(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub, "data_commit", lambda repo, revision: revision or "0123abc")


@pytest.mark.parametrize("source, commit", [("gsm8k", "0123abc"), ("gsm8k@v1.0", "v1.0")])
def test_a_name_alone_is_asked_of_the_hub_with_its_configuration_split_and_revision(
        source, commit, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Rows([{"question": "p", "answer": "a\n#### 1,000"}] * 1319)

    stand_in(monkeypatch, load_dataset)
    said = []
    name, problems = load_benchmark(source, 0, limit=2, log=said.append)
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": commit})]
    assert name == "gsm8k" and said == []
    assert [(p.id, p.answer) for p in problems] == [("gsm8k/1", "1000"), ("gsm8k/2", "1000")]


@pytest.mark.parametrize("error", [
    ConnectionError("no route"), ValueError("no such split"), RuntimeError("")])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_hub_out_of_reach_is_one_message_that_says_what_to_pass(monkeypatch, name, error):
    def load_dataset(*args, **kwargs):
        raise error

    stand_in(monkeypatch, load_dataset)
    with pytest.raises(FileNotFoundError, match=f"^{name}: cannot read .*{name}=PATH$") as caught:
        load_benchmark(name, 0)
    said = str(caught.value)
    assert BENCHMARKS[name].hub[0] in said and str(error) in said and type(error).__name__ in said
    assert all((word in said) == (name == "gpqa") for word in ("gated", "token", "not republished"))


def test_a_cache_of_another_commit_than_the_one_asked_for_is_refused(monkeypatch):
    rows = Rows([{"question": "p", "answer": "1"}])
    rows.cache_files = [{"filename": "/cache/openai___gsm8k/main/0.0.0/feed42/gsm8k-test.arrow"}]
    stand_in(monkeypatch, lambda *_, **__: rows)
    with pytest.raises(FileNotFoundError, match="has commit feed42, and 0123abc is asked for.*gsm8k=PATH"):
        load_benchmark("gsm8k", 0)
    assert load_benchmark("gsm8k@feed42", 0, **quiet)[0] == "gsm8k"


def test_without_the_package_the_same_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="ModuleNotFoundError.*datasets.*math500=PATH"):
        load_benchmark("math500", 0)


@pytest.mark.slow
def test_the_real_package_offline_gives_that_message_too_and_is_imported_only_then(tmp_path):
    code = ("import sys\nfrom paper import benchmarks\n"
            "assert not {'datasets', 'torch', 'pyarrow'} & set(sys.modules)\n"
            "try:\n    benchmarks.load_benchmark('gpqa', 0)\n"
            "except FileNotFoundError as error:\n    print(error)\n")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpqa: cannot read Idavidrein/gpqa from the hub")
    assert "gpqa=PATH" in done.stdout


# ----------------------------------------------------------------------------------------------------------
# The shuffle.

def chi_squared(counts, cells):
    """Pearson's statistic of a Counter against equal shares of `cells` outcomes; unseen ones count as 0."""
    expected = sum(counts.values()) / cells
    return sum(n * n for n in counts.values()) / expected - sum(counts.values())


# 0.999 quantiles, n - 1 degrees
@pytest.mark.parametrize("n, critical", [(3, 13.82), (4, 16.27), (10, 27.88)])
@pytest.mark.parametrize("gold", [0, 2])
def test_the_right_option_is_shown_under_each_letter_equally_often(n, critical, gold):
    counts = Counter(shuffle(["o"] * n, gold, 0, f"mmlu_pro/{i}")[1] for i in range(4000))
    assert chi_squared(counts, n) < critical


def test_all_24_orders_of_four_options_are_equally_frequent_over_ids_and_over_seeds():
    over_ids = Counter(tuple(shuffle("abcd", 0, 0, f"arc_c/{i}")[0]) for i in range(4800))
    over_seeds = Counter(tuple(shuffle("abcd", 0, i, "arc_c/0")[0]) for i in range(4800))
    for counts in (over_ids, over_seeds):
        assert set(counts) == set(itertools.permutations(range(4)))
        assert chi_squared(counts, 24) < 49.73                                 # 0.999 quantile, 23 degrees


@pytest.mark.parametrize("n", range(2, 11))
def test_the_order_undoes_the_shuffle(n):
    options = [f"option {i}" for i in range(n)]
    for i in range(50):
        order, index = shuffle(options, i % n, seed=7, id=str(i))
        shown = [options[j] for j in order]
        assert sorted(order) == list(range(n)) and all(options[order[j]] == shown[j] for j in range(n))
        assert shown[index] == options[i % n]


def test_the_order_is_the_seed_s_and_the_id_s_alone(tmp_path):
    rows = [ARC | {"id": f"q{i}"} for i in range(40)]

    def orders(rows, seed):
        _, problems = load_benchmark(jsonl(tmp_path / "d.jsonl", *rows), seed)
        return {problem.id: problem.order for problem in problems}

    all_of_them = orders(rows, 0)
    assert orders(rows, 0) == all_of_them
    assert orders(rows[::-3], 0) == {row["id"]: all_of_them[row["id"]] for row in rows[::-3]}
    others = orders(rows, 1)
    assert sum(others[id] != all_of_them[id] for id in all_of_them) > 30         # 1 in 24 is equal by chance
    assert len({tuple(order) for order in all_of_them.values()}) > 10


def test_the_order_stays_the_same_in_later_versions():
    assert shuffle("abcd", 0, 0, "arc_c/0") == ([1, 2, 3, 0], 3)
    assert shuffle("abcdefghij", 4, 1, "mmlu_pro/70") == ([9, 3, 5, 8, 7, 6, 2, 4, 1, 0], 7)


# ----------------------------------------------------------------------------------------------------------
# Golds that graders cannot read.

@pytest.mark.parametrize("answer, repaired", [
    ("4.5e33", r"4.5 \times 10^{33}"), ("1e-20", r"1 \times 10^{-20}"), ("-1.6e-19", r"-1.6 \times 10^{-19}"),
    ("4.5E+33", r"4.5 \times 10^{33}"), ("1.70e4", r"1.70 \times 10^{4}"), ("3e08", r"3 \times 10^{8}"),
    ("4.5e33 m", r"4.5 \times 10^{33} m"), ("(1e5)", r"(1 \times 10^{5})"), ("+2e3", r"+2 \times 10^{3}"),
    (".5e1", r".5 \times 10^{1}"), ("5.e1", r"5. \times 10^{1}")])
def test_scientific_notation_is_rewritten_and_only_once(answer, repaired):
    assert repair_scientific(answer) == repaired == repair_scientific(repaired)


@pytest.mark.parametrize("answer", ["0xe5", "2e", "e", "e5", "E", "e^{t}", "3e^{-2t}", "2e x", "1.2.3e4",
                                    r"4.5 \times 10^{33}", "2e5e5", "12", "", "1e2.5", "-e5", "1 e5", "2e-"])
def test_what_is_not_scientific_notation_stays_as_it_is(answer):
    assert repair_scientific(answer) == answer


@needs_data
def test_58_of_minerva_s_golds_are_repaired_and_no_gold_of_another_benchmark():
    for name in FILES:
        if not BENCHMARKS[name].choice:
            golds = [row["answer"] for row in local_rows(name)]
            changed = [gold for gold in golds if repair_scientific(gold) != gold]
            assert len(changed) == (58 if name == "minerva" else 0)
            for gold in changed:
                assert repair_scientific(repair_scientific(gold)) == repair_scientific(gold)


def test_the_oat_grader_needs_the_repaired_gold_for_latex_and_the_raw_one_for_the_raw_spelling():
    golds = ["4.5e33", "1e-20", "-1.6e-19", "7e37"]
    latex = [r"4.5 \times 10^{33}", "10^{-20}", r"-1.6 \times 10^{-19}", r"7 \times 10^{37}"]
    fixed = [repair_scientific(gold) for gold in golds]
    with Grader(kind="oat", workers=1) as grader:
        def rewards(texts, golds):
            verdicts = grader.grade([rf"\boxed{{{text}}}" for text in texts], golds)
            return [verdict.reward for verdict in verdicts]

        assert rewards(latex, golds) == [0, 0, 0, 0] and rewards(latex, fixed) == [1, 1, 1, 1]
        assert rewards(golds, golds) == [1, 1, 1, 1] and rewards(golds, fixed) == [0, 0, 0, 0]


# ----------------------------------------------------------------------------------------------------------
# Bad input.

@pytest.mark.parametrize("source", [
    "aime25", "math500=", "math500=nowhere.jsonl", "no.jsonl", "math50=x.jsonl", ""])
def test_an_unknown_name_or_path_is_answered_with_the_names_and_the_forms(source):
    with pytest.raises(FileNotFoundError) as error:
        load_benchmark(source, 0)
    assert all(name in str(error.value) for name in BENCHMARKS) and "NAME=PATH" in str(error.value)
    if source not in ("math500=", ""):
        assert source.removeprefix("math500=") in str(error.value)


BAD_ROWS = [
    ("own", [1, 2], "object with named columns"),
    ("own", {"answer": "1"}, "'problem'"),
    ("own", {"problem": "", "answer": "1"}, "'problem'"),
    ("own", {"problem": "p", "answer": " "}, "'answer'"),
    ("own", {"problem": "p", "answer": float("nan")}, "'answer'"),
    ("own", {"problem": "p", "solution": "no box"}, "found columns problem, solution"),
    ("own", {"question": "p", "final_answer": []}, "'answer'"),
    ("own", {"question": "p", "solution": [r"\boxed{1}"]}, "found columns question, solution"),
    ("own", {"problem": "p", "solution": r"\boxed{}"}, "answer"),
    ("gsm8k", {"question": "p", "answer": "thinking\n#### "}, "an answer after ####"),
    ("mmlu_pro", {"question": "p", "answer": "A"}, "multiple choice, found only columns question, answer"),
    ("arc_c", FORMATS["LUFFY"][0], "cannot be shuffled"),
    ("mmlu_pro", MMLU_PRO | {"answer_index": 3}, "0 to 2.*found answer_index 3 and answer 'B'"),
    ("mmlu_pro", MMLU_PRO | {"answer_index": -1, "answer": None}, "answer_index -1"),
    ("mmlu_pro", MMLU_PRO | {"answer_index": True}, "answer_index True"),
    ("mmlu_pro", MMLU_PRO | {"answer_index": 2}, "agreement, found answer_index 2 and answer 'B'"),
    ("mmlu_pro", MMLU_PRO | {"answer_index": None, "answer": "D"}, "found answer_index None and answer 'D'"),
    ("mmlu_pro", MMLU_PRO | {"answer_index": None, "answer": ""}, "found answer_index None and answer ''"),
    ("mmlu_pro", MMLU_PRO | {"options": list("abcdefghijk")}, "2 to 10 options"),
    ("mmlu_pro", MMLU_PRO | {"options": ["a"]}, "2 to 10 options"),
    ("mmlu_pro", MMLU_PRO | {"options": "['a' 'b']"}, "list of 2 to 10"),
    ("mmlu_pro", MMLU_PRO | {"options": ["a", " "]}, "each a text"),
    ("mmlu_pro", MMLU_PRO | {"options": ["a", "b\ud800"]}, "'options', found half a character"),
    ("gpqa", {k: v for k, v in GPQA.items() if k != "Incorrect Answer 2"}, "2 to 10 options"),
    ("arc_c", ARC | {"answerKey": "E"}, "answerKey.*'E' and labels"),
    ("arc_c", ARC | {"choices": None}, "answerKey.*labels"),
    ("arc_c", ARC | {"choices": {"text": ["a"], "label": ["A", "B", "C"]}}, "2 to 10 options"),
    ("arc_c", ARC | {"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}}, "answer_index 2"),
    ("own", b"{", "one JSON object"),
]


@pytest.mark.parametrize("name, bad, expected", BAD_ROWS, ids=lambda value: str(value)[:60])
def test_a_bad_row_stops_the_evaluation_and_is_named_with_what_was_expected(tmp_path, name, bad, expected):
    good = FORMATS["plain, letter alone"][0] | {"id": "good"}
    path = jsonl(tmp_path / "d.jsonl", good, bad)
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 2: ")) as error:
        load_benchmark(path if name == "own" else f"{name}={path}", 0, **quiet)
    assert re.search(expected, str(error.value)) and "expected" in str(error.value)


@pytest.mark.parametrize("name, content, expected", [
    ("d.jsonl", b"", "is empty"), ("d.json", b"[]", "found none"),
    ("d.csv", b"problem,answer\n", "found none"),
    ("d.csv", b"problem,answer,answer\np,1,2\n", "answer twice"),
    ("d.json", b"", "is empty"), ("d.json", b'{"a": 1}\n{"a": 2}\n', "is .jsonl"),
    ("d.json", b'{"rows": []}', "JSON list of rows, found"),
    ("d.json", b'[{"problem": "p", "answer": 1, "answer": 2}]', "answer twice"),
    ("d.csv", b'problem,answer\n"p,1\n', "readable CSV"),
    ("d.csv", b"problem,answer\np\xff,1\n", "readable CSV"),
    ("d.csv", b"problem,answer\np,1\nq\n", "row 2: .*fields"),
    ("d.csv", b"problem,answer\np,1,2\n", "row 1: .*fields"), ("d.parquet", b"PAR1", "parquet"),
    ("d.txt", b"p", "found .txt"), ("d.jsonl", b'{"problem": "p\xff"}\n', "row 1: ")])
def test_an_empty_or_damaged_file_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as error:
        load_benchmark(tmp_path / name, 0)
    assert re.search(expected, str(error.value))


def test_an_empty_folder_and_a_limit_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found none inside"):
        load_benchmark(f"math500={tmp_path}", 0)
    path = jsonl(tmp_path / "d.jsonl", {"problem": "p", "answer": "1"})
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, found {limit}"):
            load_benchmark(path, 0, limit=limit)
