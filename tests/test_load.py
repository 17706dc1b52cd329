"""What a run says of its data and its model's folder before anything heavy is loaded.

    pytest tests/test_load.py
"""
import json
import re
import shutil

import pytest
import torch.distributed as dist

import eval
import model as M
import srft
from config import METHODS, TINY, parse_args
from tiny.task import make_tokenizer

IMITATE = [name for name, method in METHODS.items() if method.demos != "none"]


class Checker:
    """Stands where the Grader does: "bad" answers match nothing, "late" ones ran out of time."""
    workers = 1

    def __init__(self):
        self.parts = []

    def check(self, answers, kind):
        self.parts.append(list(answers))
        reasons = {"bad": "parse_fail", "late": "timeout"}
        return {i: reasons[answer] for i, answer in enumerate(answers) if answer in reasons}


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load(tmp_path, rows, *flags, held=(), checker=None, vocab_size=21, said=None):
    """What srft.load_data makes of these rows; and what it says."""
    for name, content in (("mine", rows), ("held", held)):
        lines = [json.dumps({"problem": f"{i}+1=?\n"} | row) + "\n" for i, row in enumerate(content)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    flags = ["--preset", "tiny", "--data", str(tmp_path / "mine.jsonl"),
             "--eval_data", str(tmp_path / "held.jsonl") if held else "", *flags]
    said = [] if said is None else said
    prompts, heldout = srft.load_data(parse_args(flags), make_tokenizer(), vocab_size,
                                      checker or Checker(), said.append)
    return prompts, heldout, "\n".join(said)


BARE, SHOWN = {"answer": "2"}, {"answer": "2", "solution": "\\boxed{2}"}


@pytest.mark.parametrize("method", IMITATE)
@pytest.mark.parametrize("rows", [[BARE], [BARE | {"solution": ""}, BARE], [BARE, SHOWN | {"answer": "bad"}]],
                         ids=["no column", "empty ones", "only where the answer is unusable"])
def test_a_method_that_imitates_is_refused_on_data_without_demonstrations(method, rows, tmp_path):
    assert len(IMITATE) == 6
    says = f"--method {re.escape(method)} learns from demonstrations.*{tmp_path}.*`solution`.*--method grpo"
    with pytest.raises(ValueError, match=says):
        load(tmp_path, rows, "--method", method)


def test_what_looks_like_a_demonstration_and_is_not_read_is_told_before_it_is_refused(tmp_path):
    said = []
    with pytest.raises(ValueError, match="no example of --data"):
        load(tmp_path, [BARE | {"r1_response": "so 2"}], said=said)
    assert "not read, though named like a demonstration: r1_response; " in said[0]


def test_it_is_refused_before_minutes_are_spent_on_answers(tmp_path):
    checker = Checker()
    with pytest.raises(ValueError, match="no example of --data"):
        load(tmp_path, [BARE], checker=checker)
    assert not checker.parts


@pytest.mark.parametrize("method, kept", [("srft", 3), ("relift", 3), ("sft", 1), ("sft_kl", 1), ("grpo", 3)])
def test_examples_without_a_demonstration_are_counted_and_have_rollouts_only(method, kept, tmp_path):
    prompts, _, said = load(tmp_path, [BARE, SHOWN, BARE], "--method", method)
    assert len(prompts) == kept
    assert "3 rows, 3 usable, 1 of them with a demonstration" in said


@pytest.mark.parametrize("rows, held, name", [
    ([SHOWN | {"answer": "bad"}] * 2, [BARE], "--data"),
    ([SHOWN], [BARE | {"answer": "bad"}], "--eval_data")])
def test_data_whose_every_reference_is_unusable_is_refused(rows, held, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}.*: no reference answer can be matched"):
        load(tmp_path, rows, held=held)


def test_an_unusable_reference_leaves_training_stays_in_the_evaluation_and_a_late_check_proves_nothing(
        tmp_path):
    answers = ["2", "bad", "late"]
    prompts, heldout, said = load(tmp_path, [SHOWN | {"answer": answer} for answer in answers],
                                  held=[BARE | {"answer": answer} for answer in answers])
    assert [prompt.example.answer for prompt in prompts] == ["2", "late"]
    assert [prompt.example.answer for prompt in heldout["held"]] == answers
    assert said.count("no response can match the reference answer 'bad'") == 2


def test_with_a_reward_of_ones_own_reference_answers_are_not_checked_which_is_said_once(tmp_path):
    (tmp_path / "own.py").write_text("def own(response, answer, example):\n    return True\n")
    checker = Checker()
    prompts, _, said = load(tmp_path, [SHOWN | {"answer": "bad"}], "--reward", f"{tmp_path}/own.py:own",
                            held=[BARE | {"answer": "bad"}], checker=checker)
    assert len(prompts) == 1 and not checker.parts and said.count("reference answers are not checked") == 1


def test_each_distinct_answer_is_checked_once_in_parts_under_a_bar_and_all_its_prompts_are_told(
        tmp_path, monkeypatch):
    bars = []

    class Bar(eval.tqdm):
        def __init__(self, **how):
            super().__init__(**how)
            bars.append(self)

    monkeypatch.setattr(eval, "tqdm", Bar)
    rows, checker = [SHOWN | {"answer": str(i % 150)} for i in range(400)], Checker()
    rows[7]["answer"] = rows[300]["answer"] = "bad"
    prompts, _, said = load(tmp_path, rows, checker=checker)
    assert [len(part) for part in checker.parts] == [100, 51] and len(prompts) == 398
    assert "2 of 400 reference answers cannot be matched" in said
    [bar] = bars
    assert (bar.n, bar.total, bar.desc) == (151, 151, "--data: reference answers")


def test_a_tokenizer_larger_than_the_models_vocabulary_is_named_at_the_start(tmp_path):
    checker = Checker()
    with pytest.raises(ValueError, match="needs token 13 .*embedding has 12 rows"):
        load(tmp_path, [SHOWN], vocab_size=12, checker=checker)
    assert not checker.parts


# ----------------------------------------------------------------------------------------------------------
# A model's folder without a tokenizer, or with a damaged one.

def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("damage, says", [
    (without, "no tokenizer here; copy tokenizer.json"),
    (rewrite("tokenizer.json", ""), "cannot be read"),
    (rewrite("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    (rewrite("tokenizer.json", "{}"), "cannot be read"),
    (rewrite("tokenizer_config.json", "{"), "cannot be read")],
    ids=["none", "empty", "pointer", "no model in it", "config cut short"])
def test_a_folder_without_a_tokenizer_that_can_be_read_is_named_with_what_to_do(
        model_type, damage, says, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    damage(folder)
    with pytest.raises(ValueError, match=f"{folder}: .*{says}") as error:
        M.load_tokenizer(folder)
    assert "sentencepiece" not in str(error.value) and "tokenizer_config.json" in str(error.value)
