"""paper/compare.py, the intervals of paper/tables.py: published values, coverage, folders that do not match.

    pytest tests/test_compare.py
"""
import doctest
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import eval as E
from conftest import ENV, ROOT
from paper import compare as C
from paper import tables as T

BOTH = ["oat", "math-verify"]

# ----------------------------------------------------------------------------------------------------------
# Intervals.


def test_the_inputs_and_outputs_in_the_docstrings_are_true():
    failed, tried = doctest.testmod(C)
    assert tried and not failed


# Newcombe 1998, Statistics in Medicine 17, 857, Table I.
@pytest.mark.parametrize("right, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_interval_of_a_share_is_wilsons_as_published(right, n, low, high):
    values = [1.0] * right + [0.0] * (n - right)
    assert T.interval(values) == pytest.approx([low, high], abs=5e-5)
    mirrored = T.interval([1 - value for value in values])
    assert mirrored == pytest.approx([1 - high, 1 - low], abs=5e-5)


@pytest.mark.parametrize("won, lost, n, z, low, high", [
    (1, 7, 21, 1.959964, -0.517, -0.026),         # Fagerland, Lydersen and Laake 2014, doi:10.1002/sim.6148
    (28, 25, 618, 1.644854, -0.0148, 0.0247)])    # PropCIs (R), scoreci.mp, at 90 %
def test_the_interval_of_a_paired_difference_is_tangos_as_published(won, lost, n, z, low, high, monkeypatch):
    monkeypatch.setattr(C, "Z", z)
    digits = 3 if n == 21 else 4
    found = C.paired_interval([1] * won + [-1] * lost + [0] * (n - won - lost))
    assert [round(limit, digits) for limit in found] == [low, high]
    mirrored = C.tango(lost, won, n)
    assert [round(limit, digits) for limit in mirrored] == [-high, -low]


def test_0_lies_in_the_interval_of_a_difference_exactly_if_mcnemars_test_does_not_tell_them_apart():
    for n in (10, 40):
        for won in range(n + 1):
            for lost in range(n + 1 - won):
                low, high = C.tango(won, lost, n)
                tells = abs(won - lost) > T.Z * math.sqrt(won + lost)
                assert (low <= 0 <= high) != tells, (won, lost, n)
                assert -1 <= low <= (won - lost) / n <= high <= 1


@pytest.mark.parametrize("values", [[0] * 20, [1] * 20, [0.5] * 20, [1 / 32] * 500, [1], [0]])
def test_equal_values_leave_a_width_of_their_own(values):
    low, high = T.interval(values)
    assert 0 <= low <= np.mean(values) <= high <= 1 and high - low > 1 / len(values) / 8
    low, high = C.paired_interval(np.subtract(values, values))
    assert high == -low == pytest.approx(T.Z ** 2 / (len(values) + T.Z ** 2), abs=1e-9)


def test_shares_of_several_samples_are_surer_than_single_answers_and_never_surer_than_all_answers_together():
    shares = np.random.default_rng(0).binomial(32, 0.4, 30) / 32          # problems that are equally hard
    low, high = T.interval(shares)
    one_each, all_together = T.wilson(shares.mean(), 30), T.wilson(shares.mean(), 30 * 32)
    assert one_each[0] < low < all_together[0] and all_together[1] < high < one_each[1]


def covers(limits, true):
    return limits[0] <= true <= limits[1]


@pytest.mark.parametrize("n", [20, 30, 500])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
def test_of_single_answers_19_intervals_of_20_hold_the_accuracy_at_the_edges_too(p, n):
    chance = 0.0                                                          # exactly, not by chance
    for right in range(n + 1):
        if covers(T.wilson(right / n, n), p):
            logarithm = math.lgamma(n + 1) - math.lgamma(right + 1) - math.lgamma(n - right + 1)
            chance += math.exp(logarithm + right * math.log(p) + (n - right) * math.log(1 - p))
    assert 0.93 < chance < 0.985


def problems(rng, mean, spread, count):
    """How hard `count` problems are: each one's chance of a right answer. spread 0: all alike; 1: 0 or 1."""
    if not spread:
        return np.full(count, mean)
    scale = 1 / spread - 1
    return rng.beta(mean * scale, (1 - mean) * scale, count)


@pytest.mark.parametrize("count, n", [(30, 32), (83, 32), (200, 4)])
@pytest.mark.parametrize("mean, spread", [(0.02, 0.3), (0.35, 0.6), (0.5, 0.05), (0.5, 0.9), (0.98, 0.3)])
def test_of_several_samples_too(mean, spread, count, n):
    rng, held = np.random.default_rng(count), 0
    for _ in range(500):
        shares = rng.binomial(n, problems(rng, mean, spread, count)) / n
        held += covers(T.interval(shares), mean)
    assert held > 465


@pytest.mark.parametrize("count, n", [(20, 1), (500, 1), (30, 32), (200, 4)])
@pytest.mark.parametrize("mean, gain", [(0.02, 0.0), (0.02, 0.5), (0.5, 0.0), (0.5, 0.2), (0.98, 0.5)])
def test_and_that_of_a_paired_difference(mean, gain, count, n):
    """B solves the share `gain` of what A does not, and of the rest each problem a little better or worse."""
    rng, held = np.random.default_rng(count), 0
    true = gain * (1 - mean)
    for _ in range(300):
        a = problems(rng, mean, 0.5, count)
        b = a + (1 - a) * gain + rng.uniform(-1, 1, count) * np.minimum(a, (1 - a) * (1 - gain)) * 0.5
        differences = rng.binomial(n, b) / n - rng.binomial(n, a) / n
        held += covers(C.paired_interval(differences), true)
    assert held > 276


@pytest.mark.parametrize("count, n, gain", [(30, 32, 0.03), (83, 32, 0.02), (200, 4, 0.01)])
def test_nor_do_a_few_problems_that_flip_among_many_that_hardly_change_escape_it(count, n, gain):
    rng, held = np.random.default_rng(count), 0
    for _ in range(300):
        flips = rng.random(count) < gain / 0.9
        differences = rng.binomial(n, np.where(flips, 1.0, 0.1)) / n - rng.binomial(n, 0.1, count) / n
        held += covers(C.paired_interval(differences), gain)
    assert held > 276


# ----------------------------------------------------------------------------------------------------------
# Folders of results.

def rows_of(name, matrix, views=BOTH, prompt="What is {}?", **more):
    """Rows of a benchmark, as eval.py writes them: matrix[problem][sample] is the reward in every view."""
    rows = []
    for i, rewards in enumerate(matrix):
        for sample, reward in enumerate(rewards):
            verdicts = {view: {"reward": float(reward), "reason": "ok"} for view in views}
            rows.append({"benchmark": name, "id": f"{i:03}", "sample": sample, "prompt": prompt.format(i),
                         "answer": "2", "response": "long", "tokens": 3, "finished": True,
                         "verdicts": verdicts} | more)
    return rows


SETTINGS = {"model": "m", "temperature": 0.6, "seed": 0, "grading": "g", "weights": {"x": 1},
            "versions": {"torch": "2", "vllm": "1"}, "out": "o", "engine_sequences": 4}


def folder(path, rows, **settings):
    path.mkdir(parents=True)
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return path


@pytest.fixture
def both(tmp_path):
    """Compare the folders of these rows; returns what compare.json holds."""
    def call(a, b, settings=None):
        C.report(folder(tmp_path / "x/eval", a), folder(tmp_path / "y/eval", b, **settings or {}),
                 tmp_path / "out")
        return json.loads((tmp_path / "out/compare.json").read_text())
    return call


A = [[1, 1], [0, 0], [0, 1], [0, 0], [1, 1]]
B = [[1, 1], [1, 1], [0, 0], [0, 1], [1, 1]]


def test_the_difference_is_paired_and_every_problem_that_changed_is_told_with_both_shares(
        both, capsys, tmp_path):
    found = both(rows_of("aime24", A), rows_of("aime24", B)[::-1], {"weights": {"x": 2}})
    one = found["benchmarks"]["aime24"]
    assert found["notes"] == [] and one["problems"] == 5 and one["samples"] == [2, 2]
    for view in BOTH:
        assert one[view]["difference"] == pytest.approx(0.2)
        assert one[view]["difference/interval"] == C.paired_interval([0, 1, -0.5, 0.5, 0])
        assert (one[view]["a"], one[view]["b"]) == (0.5, 0.7)
        assert one[view]["a/interval"] == T.interval([1, 0, 0.5, 0, 1])
        assert [(p["id"], p["a"], p["b"]) for p in one[view]["won"]] == [("001", 0, 1), ("003", 0, 0.5)]
        assert [(p["id"], p["a"], p["b"]) for p in one[view]["lost"]] == [("002", 0.5, 0)]
    text, screen = (tmp_path / "out/compare.md").read_text(), capsys.readouterr().out
    for said in (text, screen):
        assert "| AIME24 | 5 | 2 / 2 | oat | 50.0 [" in said and "| +20.0 [-" in said
        assert said.count("cannot tell") == 2
        assert "AIME24 (oat): 2 won" in said and "| 001 | 0.00 | 1.00 | What is 1? |" in said
    assert "AIME24 (math-verify): 2 won" in text and "AIME24 (math-verify): 2 won" not in screen


def test_a_clear_gain_or_loss_is_said_and_the_screen_shows_some_of_many_changes(both, capsys, tmp_path):
    wrong, right = [[0]] * 30, [[1]] * 30
    found = both(rows_of("mine", wrong) + rows_of("math500", right),
                 rows_of("mine", right) + rows_of("math500", wrong))
    assert found["benchmarks"]["mine"]["oat"]["difference"] == 1
    said = capsys.readouterr().out
    assert "B is better" in said and "A is better" in said and "... and 20 more in compare.md" in said
    assert (tmp_path / "out/compare.md").read_text().count("| What is 29? |") == 4    # both verifiers


def test_what_is_graded_by_its_letter_is_shown_so(both):
    found = both(rows_of("arc_c", A, ["choice"], order=[0]), rows_of("arc_c", B, ["choice"], order=[0]))
    assert C.ways_of(found["benchmarks"]["arc_c"]) == ["choice"]


def test_settings_versions_and_graders_that_differ_are_named_and_so_are_equal_weights(both):
    assert both(rows_of("mine", A), rows_of("mine", B), {
        "temperature": 1.0, "grading": "h", "versions": {"torch": "3", "vllm": "1"}, "out": "p", "model": "n",
        "engine_sequences": 9})["notes"] == [
            "the code that graded differs: eval.py --model, into a new --out, grades anew",
            "temperature: 0.6 for A, 1.0 for B", "versions: torch 2 for A, 3 for B",
            "A and B are the same weights"]


def test_problems_samples_and_benchmarks_that_only_one_has_are_named_and_left_out(both):
    a = rows_of("mine", A) + rows_of("gsm8k", [[1]])
    b = rows_of("mine", B[:3])[:-1] + rows_of("math500", [[1]])
    found = both(a, b, {"weights": {}})
    assert found["benchmarks"]["mine"]["problems"] == 3 and list(found["benchmarks"]) == ["mine"]
    assert found["notes"] == [
        "mine: 2 problems that only A has are left out",
        "mine: B has fewer than 2 samples of 1 problems: its evaluation has not ended",
        "GSM8K: only A has it", "MATH500: only B has it"]


def test_a_problem_with_another_reference_is_left_out_by_name(both):
    b = rows_of("mine", B)
    for row in b[:2]:
        row["answer"] = "3"
    found = both(rows_of("mine", A), b)
    assert found["notes"][-1] == "mine: other reference answers, so left out: 000"
    assert found["benchmarks"]["mine"]["problems"] == 4


@pytest.mark.parametrize("b, says", [
    (rows_of("mine", B, prompt="Why {}?"), "hold different problems under mine 000: .* one --seed"),
    (rows_of("other", B), "have no problem in common: mine and other"),
    (rows_of("mine", B, ["reward"]), "mine: A was graded by oat, math-verify, B by reward: .* one --grader")])
def test_what_cannot_be_compared_is_refused(both, b, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        both(rows_of("mine", A), b)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_eval_pys_are_refused_and_torn_ones_counted(both, tmp_path, capsys):
    with pytest.raises(ValueError, match="y/eval/results.jsonl: expected rows .*, found one without id,"):
        both(rows_of("mine", A), [{"benchmark": "mine", "step": 3}])
    a, b = folder(tmp_path / "a", rows_of("mine", A)), folder(tmp_path / "b", rows_of("mine", A))
    with (b / "results.jsonl").open("a") as file:
        file.write('{"benchmark": "mi')
    C.report(a, b, tmp_path / "torn")
    assert "skipped 1 torn lines" in capsys.readouterr().out


def test_a_folder_compared_with_itself_differs_by_nothing(tmp_path):
    a = folder(tmp_path / "a", rows_of("mine", A))
    C.report(a, a, tmp_path / "out")
    found = json.loads((tmp_path / "out/compare.json").read_text())
    assert found["notes"] == ["A and B are the same weights"]
    assert found["benchmarks"]["mine"]["oat"]["difference"] == 0


def test_that_each_model_has_a_name_on_the_hub_is_no_difference_but_another_commit_of_a_benchmark_is():
    a = {"weights": {}, "hub": {"org/a": "1", "openai/gsm8k": "3"}}
    b = {"weights": {}, "hub": {"org/b": "2", "openai/gsm8k": "4"}}
    assert C.other_settings(a, b) == ["hub: openai/gsm8k 3 for A, 4 for B"]


def test_text_of_problems_does_not_break_the_table(both, tmp_path):
    row = dict(prompt="a|b\n\n| c | {}" + "x" * 99, id="i|d")
    both(rows_of("mine", [[0]], **row), rows_of("mine", [[1]], **row))
    line = [line for line in (tmp_path / "out/compare.md").read_text().splitlines() if "i\\|d" in line][0]
    assert line.startswith("| i\\|d | 0.00 | 1.00 | a\\|b \\| c \\| ") and line.endswith("... |")


def test_folders_are_compared_from_the_command_line_without_loading_torch(tmp_path):
    a, b = folder(tmp_path / "a", rows_of("mine", A)), folder(tmp_path / "b", rows_of("mine", B))
    code = ("import sys; from paper import compare; compare.main(sys.argv[1:]); "
            "assert not {'torch', 'vllm', 'transformers', 'sympy'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code, a, b, "--out", tmp_path / "out"], env=ENV, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "cannot tell" in done.stdout, done.stderr
    with pytest.raises(SystemExit) as left:
        C.main([str(a), str(tmp_path)])
    assert left.value.code == 1


def test_eval_compares_folders_of_results_without_an_engine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(E, "measure", None)
    monkeypatch.chdir(tmp_path)
    a, b = tmp_path / "base/eval", tmp_path / "srft/eval"
    folder(a, rows_of("mine", A))
    folder(b, rows_of("mine", B))
    C.of_both(E.parse(["--compare", str(a), str(b)]), None)
    assert "cannot tell" in capsys.readouterr().out
    assert (tmp_path / "out/compare/base-srft/compare.md").exists()


def test_a_model_is_evaluated_into_a_folder_of_its_own_first_and_results_are_not(tmp_path):
    def measure(models):
        assert [(one.model, one.out, one.temperature) for one in models] == [
            ("hub/model", str(tmp_path / "out/b"), 0.3)]
        folder(tmp_path / "out/b", rows_of("mine", B))

    a, out = folder(tmp_path / "a", rows_of("mine", A)), str(tmp_path / "out")
    flags = ["--compare", str(a), "hub/model", "--out", out, "--temperature", "0.3"]
    C.of_both(E.parse(flags), measure)
    assert json.loads((tmp_path / "out/compare.json").read_text())["b"] == str(tmp_path / "out/b")


@pytest.mark.parametrize("a, b, flags, asked", [
    ("base", "run", [], ["none", "none"]),
    ("results", "base", [], ["none"]),                          # results are not asked again
    ("base", "run", ["--template", "luffy"], ["luffy", "luffy"]),
    ("run", "other", [], [None, None]),                         # each its own
    ("base", "base", [], [None, None])])
def test_a_base_model_is_asked_with_the_template_of_what_was_trained_from_it(a, b, flags, asked, tmp_path):
    for name, settings in [("base", {"hidden_size": 8}), ("run", {"template": "none"}),
                           ("other", {"template": "paper"})]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    folder(tmp_path / "results", rows_of("mine", A), template="none")
    seen = []

    def measure(models):
        for one in models:
            seen.append(one.template)
            one.out = folder(tmp_path / f"of-{len(seen)}", rows_of("mine", B))

    out = ["--out", str(tmp_path / "out")]
    C.of_both(E.parse(["--compare", str(tmp_path / a), str(tmp_path / b), *out, *flags]), measure)
    assert seen == asked


def job(model, out, eos=2, **config):
    config = {"hidden_size": 8, "rope_theta": 1e4, "_name_or_path": model} | config
    return SimpleNamespace(args=SimpleNamespace(model=model, out=out),
                           tokenizer=SimpleNamespace(eos_token_id=eos),
                           config=SimpleNamespace(to_dict=lambda: config))


@pytest.mark.parametrize("other, says", [
    (job("n", "p"), None), (job("n", "p", dtype="x", use_cache=False), None),
    (job("n", "o"), "both write to o; pass --out DIR"),
    (job("n", "p", hidden_size=16, rope_theta=4e4), "they differ in hidden_size, rope_theta. Evaluate each"),
    (job("n", "p", eos=3), "they differ in eos of the tokenizer")])
def test_two_models_that_one_engine_cannot_serve_are_refused_with_the_commands_to_type(other, says):
    if says is None:
        C.check_pair([job("m", "o"), other])
        return
    with pytest.raises(ValueError, match=says) as error:
        C.check_pair([job("m", "o"), other])
    assert "pass --out" in says or "eval.py --compare DIR/a DIR/b" in str(error.value)
