r"""The benchmarks of Table 2, from their public files to the questions that a model sees.

The paper's eight (Sec. 5.1, App. B and C.2, Table A2), and GSM8K beside them:

    load_benchmark("math500", seed=0)                  from the hub, by `datasets`; "math500@REVISION" pins it
    load_benchmark("gpqa=gpqa_diamond.csv", seed=0)    a local copy, in any public format
    load_benchmark("my_test.jsonl", seed=0)            one's own: problem, answer and, if any, options
    load_benchmark("tiny:heldout", seed=0)             the built-in task of tiny/task.py

    name, problems = load_benchmark("arc_c", seed=0)
    problems[0].problem     'An astronomer observes ... in rotation?\n\nA) Planetary days will ...\nB) ...\n'
    problems[0].answer      'A': the letter after the shuffle, which problems[0].order undoes

Options are shuffled "to mitigate potential information leakage" (Sec. 5.1). How is not said; here the order
depends on (seed, id) alone, whatever else is evaluated.
"""
import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

from data import Example, load_examples, parse_row
from grading.answers import last_box
from grading.notation import repair_scientific
from support.layouts import after_marks, check_characters
from support.readers import READERS, data_files, each_name_once

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """One column of Table 2."""
    title: str          # its heading
    count: int          # problems (Table A2)
    samples: int        # responses a problem: 32 for avg@32, 1 for pass@1 (Sec. 5.1)
    hub: tuple          # dataset, configuration or None, split
    choice: bool        # multiple choice


BENCHMARKS = {
    # App. C seems to describe Maxwell-Jia/AIME_2024, where three problems held their solution for a while.
    "aime24": Benchmark("AIME24", 30, 32, ("HuggingFaceH4/aime_2024", None, "train"), False),
    "amc23": Benchmark("AMC", 83, 32, ("AI-MO/aimo-validation-amc", None, "train"), False),
    "math500": Benchmark("MATH500", 500, 1, ("HuggingFaceH4/MATH-500", None, "test"), False),
    "minerva": Benchmark("Minerva", 272, 1, ("math-ai/minervamath", None, "test"), False),
    "olympiad": Benchmark("Olympiad", 674, 1,
                          ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), False),
    "arc_c": Benchmark("ARC-C", 1172, 1, ("allenai/ai2_arc", "ARC-Challenge", "test"), True),
    "gpqa": Benchmark("GPQA-D", 198, 1, ("Idavidrein/gpqa", "gpqa_diamond", "train"), True),
    "mmlu_pro": Benchmark("MMLU-Pro", 12032, 1, ("TIGER-Lab/MMLU-Pro", None, "test"), True),
    "gsm8k": Benchmark("GSM8K", 1319, 1, ("openai/gsm8k", "main", "test"), False),     # not in the paper
}
OTHER_COUNTS = {                                                        # what another number usually is
    ("aime24", 90): "AIME 2022 to 2024",
    ("amc23", 40): "AMC 12 of 2023 alone",
    ("olympiad", 675): "Qwen2.5-Math's copy, where 15 relay problems do not say what their T is",
    ("gpqa", 448): "gpqa_main",
    ("gpqa", 546): "gpqa_extended",
    ("gsm8k", 7473): "the train split",
}


@dataclass
class Problem(Example):
    """A problem as it is asked: `problem` with its options, `answer` a letter where it has any.

    order       multiple choice: shown option j is the file's option order[j]; else None
    repaired    `answer` as repair_scientific writes it, None where that changes nothing. For the OAT grader
                neither form equals the other: a response is right that equals `answer` or `repaired`.
    """
    order: list | None = None
    repaired: str | None = None


def load_benchmark(source, seed, limit=None, log=print):
    """source "NAME", "NAME@REVISION", "NAME=PATH" or "PATH" (named by its stem) -> (name, list[Problem]), the
    first `limit`. A collective where it asks the hub.

    A count other than the paper's is logged, before `limit`. FileNotFoundError: no such benchmark or path,
    or the hub cannot be read. ValueError: the file, the row, what was expected and found. No row is skipped.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{source}: expected a limit of at least 1, found {limit}")
    if str(source).startswith("tiny:"):
        examples = load_examples(str(source))
        problems = [Problem(example.id, example.problem, example.answer) for example in examples]
        return str(source).removeprefix("tiny:"), problems[:limit]
    name, revision, path = _parse_source(str(source))
    expected = BENCHMARKS.get(name)
    rows = _read_path(path) if path is not None else _read_hub(name, revision)
    problems, ids = [], set()
    for place, fallback_id, row in rows:
        try:
            id, problem, answer, options, index = parse_problem(row)
            if options is None and expected and expected.choice:
                raise ValueError(f"expected options, for {name} is multiple choice, found only columns "
                                 f"{', '.join(row)}; options written into the question cannot be shuffled")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        # Seeds and results go by ids, so they must differ.
        if not id or id in ids:
            id = fallback_id
        while id in ids:                           # another row spells it out
            id += "+"
        ids.add(id)
        # Public files have stray blanks; in one's own, a last newline may be part of the prompt.
        if expected:
            problem = problem.strip()
        problems.append(_ask(id, problem, answer, options, index, seed))
    if not problems:
        raise ValueError(f"{source}: expected at least one row, found none")
    if expected and len(problems) != expected.count:
        log(f"{source}: {len(problems)} problems instead of {expected.count}, probably "
            f"{_guess(name, len(problems))}; the result will not compare with the paper's")
    return name, problems[:limit]


def _parse_source(source):
    """NAME, NAME@REVISION, NAME=PATH or PATH -> (name, revision or None, path or None: the hub is asked)."""
    name, equals, path = source.partition("=")
    if name in BENCHMARKS and equals:
        return name, None, path
    name, _, revision = source.partition("@")
    if name in BENCHMARKS:
        return name, revision or None, None
    return Path(source).stem, None, source                 # a path, which may hold both signs itself


def _ask(id, problem, answer, options, index, seed):
    """What parse_problem found in a row -> the Problem as a model sees it, its options in a drawn order."""
    if options is None:
        repaired = repair_scientific(answer)
        if repaired == answer:
            repaired = None
        return Problem(id, problem, answer, repaired=repaired)
    order, index = shuffle(options, index, seed, id)
    shown = [options[place] for place in order]
    return Problem(id, with_options(problem, shown), LETTERS[index], order=order)


def _guess(name, count):
    """What a copy of a benchmark probably is that has not the paper's number of problems."""
    if (name, count) in OTHER_COUNTS:
        return OTHER_COUNTS[name, count]
    if count < BENCHMARKS[name].count:
        return "a part of it"
    return "repeated problems, or other splits with it"


# ----------------------------------------------------------------------------------------------------------
# Where rows come from: (its place in words, an id should it have none, the row or a ValueError).

def _read_hub(name, revision):
    """The rows of a benchmark on the Hugging Face hub, by `datasets`. Rank 0 alone asks, and hands them to
    all: a collective, once there is a group."""
    from support.collectives import from_rank_0
    repo, config, split = BENCHMARKS[name].hub

    def load():
        from support.hub import COMMITS, data_commit, way_out
        try:
            # Only needed here: who has local copies needs no such package.
            from datasets import load_dataset
            commit = data_commit(repo, revision)
            rows = load_dataset(repo, config, split=split, revision=commit)
            # Without network, `datasets` takes what its cache got last, whatever was asked for.
            for file in rows.cache_files:
                found = Path(file["filename"]).parent.name
                if found != commit:
                    raise ValueError(f"the cache of `datasets` has commit {found}, and {commit} is asked for")
        except Exception as error:                    # the hub's errors share no useful base class
            gated = ""
            if name == "gpqa":
                gated = ("It is gated: accept its terms there and log in with a token. Its authors ask that "
                         "it is not republished, so no copy comes with this code. ")
            raise FileNotFoundError(f"{name}: cannot read {repo} from the hub ({type(error).__name__}: "
                                    f"{str(error)[:200]}). {gated or way_out(error)}For a local copy pass "
                                    f"{name}=PATH") from error
        COMMITS[repo] = commit
        return list(rows)

    for number, row in enumerate(from_rank_0(load), 1):
        yield f"{repo}, row {number}", f"{name}/{number}", row


def _read_path(path):
    """The rows of a file, or of every file in a folder, in the order of their paths."""
    if not path or not Path(path).exists():
        raise FileNotFoundError(f"{path or 'no path'}: neither a benchmark nor a file or folder; expected "
                                "NAME, NAME=PATH (a local copy) or PATH (one's own problems), with NAME one "
                                f"of {', '.join(BENCHMARKS)}")
    path = Path(path)
    readers = {**READERS, ".json": _read_json, ".csv": _read_csv}
    for file in data_files(path, readers):
        own = file.relative_to(path) if path.is_dir() else file.name
        for number, row in readers[file.suffix](file):
            yield f"{file}, row {number}", f"{own}/{number}", row


def _read_json(file):
    """(number, row) of a file that is one JSON list."""
    try:
        rows = json.loads(file.read_bytes(), object_pairs_hook=each_name_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a JSON list of rows ({error}); "
                         "one object a line is .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a JSON list of rows, found {str(rows)[:80]}")
    yield from enumerate(rows, 1)


def _read_csv(file):
    """(number, row or a ValueError) of a CSV file with a header."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:      # drops a byte order mark
            rows = csv.DictReader(lines, strict=True)
            each_name_once([(name, None) for name in rows.fieldnames or ()])
            for number, row in enumerate(rows, 1):
                # DictReader's marks: under the key None what is too much, as the value None what lacks.
                if None in row or None in row.values():
                    row = ValueError("expected as many fields as the header has")
                yield number, row
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file}: not a readable CSV file ({error}); download it again") from error


# ----------------------------------------------------------------------------------------------------------
# What a row says.

def parse_problem(row):
    r"""A row of any public format -> (id or "", problem, answer, options or None, answer_index or None).

    MATH-500, AIME, AMC, plain   problem, question or prompt; answer: a text, or a number (AMC's 142.0)
    Minerva of Qwen2.5-Math      no answer, but a solution: the last \boxed{...} in it
    GSM8K                        answer: what follows ####, without thousands separators
    OlympiadBench                final_answer: a list, joined by ", "
    ARC                          choices {text, label}, answerKey: a label (A to E, in 22 rows 1 to 4)
    MMLU-Pro, plain              options; answer_index, or answer as a letter, or both
    GPQA                         Correct Answer, Incorrect Answer 1 to 3
    Openr1 and LUFFY             prompt, reward_model (support/layouts.py)

    With options, `answer` is the letter of answer_index, before any shuffle. Columns may be in any case.
    ValueError says what was expected and found.

    >>> parse_problem({"question_id": 70, "question": "Which?", "options": ["a", "b"], "answer": "B"})
    ('70', 'Which?', 'B', ['a', 'b'], 1)
    """
    if not isinstance(row, dict) or "reward_model" in row:
        example = parse_row(row)
        return example.id, example.problem, example.answer.strip(), None, None
    row = {str(column).strip().lower(): value for column, value in row.items() if value is not None}
    options, index = _options(row)
    id = None
    for column in ("id", "unique_id", "question_id", "record id"):
        if column in row:
            id = row[column]
            break
    problem = row.get("problem", row.get("question", row.get("prompt")))
    answer = _answer(row) if options is None else LETTERS[index]
    # What is left is data.py's plain schema: it checks the texts, and writes numbers as text.
    example = parse_row({"id": id, "problem": problem, "answer": answer})
    problem = example.problem
    if options is not None:
        problem = problem.strip()      # else a last newline may matter
    return example.id, problem, example.answer.strip(), options, index


def _answer(row):
    """The gold of a row without options, as text or number."""
    answer, solution = row.get("answer", row.get("final_answer")), row.get("solution")
    if isinstance(answer, list):
        return ", ".join(map(str, answer))
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    if isinstance(answer, str) and "####" in answer:
        return after_marks(answer)[1]
    if answer is None and isinstance(solution, str):
        answer = last_box(solution)[0] or None
    if answer is None:
        raise ValueError(r"expected answer, final_answer, or a solution with \boxed{...}; "
                         f"found columns {', '.join(row)}")
    return answer


def _options(row):
    """(options, index of the right one), (None, None) where there are none. Checks that they agree."""
    index = letter = None
    if "correct answer" in row:
        options, index = [row["correct answer"]], 0
        for number in "123":
            options.append(row.get(f"incorrect answer {number}"))
    elif "answerkey" in row:
        choices = row["choices"] if isinstance(row.get("choices"), dict) else {}
        options, labels = choices.get("text"), choices.get("label") or []
        if row["answerkey"] not in labels:
            raise ValueError(f"expected answerKey to be a label of choices, found {row['answerkey']!r} "
                             f"and labels {labels}")
        index = labels.index(row["answerkey"])
    elif "options" in row:
        options, index, letter = row["options"], row.get("answer_index"), row.get("answer")
    elif "choices" in row:
        raise ValueError("expected answerKey beside choices, or options and answer_index")
    else:
        return None, None
    return _checked(options, index, letter)


def _checked(options, index, letter):
    """(options without stray blanks, the right one's index). index, letter: what the row says of it, or None;
    ValueError unless one of them does, and both agree."""
    texts = isinstance(options, list) and all(
        isinstance(option, str) and option.strip() for option in options)
    if not texts or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"expected a list of 2 to {len(LETTERS)} options, each a text (letters A to "
                         f"{LETTERS[-1]}), found {str(options)[:80]}")
    for option in options:
        check_characters(option, "options")
    letters = list(LETTERS[:len(options)])
    if index is None and letter in letters:
        index = letters.index(letter)
    # type(), not isinstance: True would pass for 1.
    if type(index) is not int or index not in range(len(options)) or letter not in (None, letters[index]):
        raise ValueError(f"expected answer_index 0 to {len(options) - 1}, or answer A to {letters[-1]}, or "
                         f"both in agreement, found answer_index {index!r} and answer {letter!r}")
    return [option.strip() for option in options], index


# ----------------------------------------------------------------------------------------------------------
# Multiple choice.

def shuffle(options, answer_index, seed, id):
    """-> (order, the answer's index after it): shown option j is options[order[j]]. Uniform over orders.

    >>> shuffle("abcd", 0, 0, "arc_c/0")
    ([1, 2, 3, 0], 3)
    """
    rng = random.Random(f"{seed}/{id}")
    # Not rng.shuffle: Python promises only that random() stays the same in later versions.
    keys = [rng.random() for _ in options]
    order = sorted(range(len(options)), key=lambda place: keys[place])
    return order, order.index(answer_index)


def with_options(question, options):
    r"""The question as shown, in the layout of LUFFY's public evaluation files.

    >>> with_options("2+2=?", ["4", "5"])
    '2+2=?\n\nA) 4\nB) 5\n'
    """
    lines = [f"{letter}) {option}\n" for letter, option in zip(LETTERS, options)]
    return f"{question}\n\n" + "".join(lines)
