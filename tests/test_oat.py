r"""grading/oat.py: what equals what under the OAT-Grader, right or not, and that none takes over its time.

    pytest tests/test_oat.py                # half a minute
"""
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grading import oat
from grading.oat import equal, extract

ROOT = Path(oat.__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not on this machine")


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def traced(given, gold, **options):
    trace = []
    return equal(given, gold, trace=trace, **options), trace


def decided_by(given, gold, fast=False):
    """The comparison that found both equal, or None."""
    verdict, trace = traced(given, gold, fast=fast)
    return trace[-1].split(":")[0] if verdict else None


# ---- Extraction --------------------------------------------------------------------------------

@pytest.mark.parametrize("text, content", [
    (r"so $\boxed{42}$.", "42"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{}", ""),
    ("\\boxed{\n4 }", "\n4 "), (r"\boxed{\{1,2\}} and }", r"\{1,2\}"), (r"\\boxed{7}", "7"),
    (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}")])
def test_the_content_of_a_box_ends_at_its_own_brace(text, content):
    assert extract(text) == content


def test_the_last_box_counts_even_if_an_earlier_one_is_around_it():
    assert extract(r"\boxed{1} no, \boxed{2}") == "2"
    assert extract(r"\boxed{\boxed{3}}") == "3"


@pytest.mark.parametrize("text", [
    "", "42", r"\boxed{42", r"\boxed{\frac{1}{2}", r"\boxed", r"\boxed 5", r"\boxed {5}", r"\Boxed{5}",
    r"\boxed(5)", r"\fbox{5}", r"\boxed{1} so \boxed{2", r"\boxed{1} so \boxed 2"])
def test_without_a_closed_box_written_exactly_there_is_no_answer(text):
    assert extract(text) is None


def test_extraction_does_not_load_sympy():
    code = ("import sys; from grading import oat; assert oat.extract(r'\\boxed{1}') == '1'; "
            "print('sympy' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


# ---- 1. string ---------------------------------------------------------------------------------

@pytest.mark.parametrize("given, gold", [
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac12", r"\frac{1}{2}"), (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\\frac{1}{2}", r"\frac{1}{2}"), ("-3/4", r"\frac{-3}{4}"), ("0.5", r"\frac{1}{2}"), (".5", r"\frac12"),
    (r"\sqrt2", r"\sqrt{2}"), (r"\left( 1 , 2 \right)", "(1,2)"), ("x = 5", "5"), (r"a \leq b", r"a\le b"),
    (r"1\!0", "10"), (r"\$5", "5"), (r"5\%", "5"), (r"5^{\circ}", r"5^\circ"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{array}{c}1\\2\end{array}", r"\begin{pmatrix}1\\2\end{pmatrix}")])
def test_one_string_stands_for_all_spellings(given, gold):
    assert decided_by(given, gold) == "string" == decided_by(gold, given)


@pytest.mark.parametrize("given", [
    r"12\text{ cm}", r"12\text{ cm}^2", "12 cm", "12 miles", "12 sq m", "12 m a day", r"12^\circ",
    r"12^{\circ}", r"\$12", r"12\%", "12 hours", "12 square inches", "12 a . m", r"12 \text{apples}",
    r"\text{12}"])
def test_units_do_not_count(given):
    assert equal(given, "12", fast=True) and not equal(given, "13")


def test_an_answer_that_is_only_a_unit_or_a_text_stays():
    assert decided_by("c", r"\text{c}") == "string"
    assert not equal("c", "d") and not equal(r"\text{A}", r"\text{B}")


def test_longer_names_and_left_hand_sides_stay():
    assert not equal("abc=5", "7") and oat._one_spelling("abc=5") == "abc=5"
    assert oat._one_spelling("x=y=5") == "x=y=5"


# ---- 2. text -----------------------------------------------------------------------------------

@pytest.mark.parametrize("given, gold", [
    ("Monday", r"\text{monday}"), ("1,234", "1234"), ("1,234,567.0", "1234567"), ("1e3", "1000"),
    ("1,000,000,000", "1000000000"), (r"11,\! 111", "11111"), (r"1,\!000xyz", "1000xyz"), ("- 5", "-5.0"),
    ("3 million", r"3\times 10^6"), (r"7 \frac{3}{4}", "7+3/4"), (r"7\frac{3}{4}", "7 3/4"), ("50%", "50"),
    ("{5}", "5"), (r"1 \text{ or } 2", r"1\text{ or }2"), ("1 or 2", "1 , 2"), ("5 centimeters^2", "5"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-inf,2)\cup(3,inf)"), (r"\frac{a \cdot b}{c}xyz", "a*b/cxyz")])
def test_answers_with_the_same_text_are_equal(given, gold):
    assert decided_by(given, gold, fast=True) in ("string", "text") and equal(gold, given, fast=True)


def test_latex_becomes_text_that_sympy_may_read():
    assert oat._as_text(r"$2 \frac{3}{4}$ miles") == "2+3/4"
    assert oat._as_text(r"(1, \sqrt{2}]") == "(1,sqrt(2)]"
    assert oat._as_text(r"\frac{x+1}{2}") == oat._as_text(r"x+\frac12") == "x+1/2"      # structure is lost


@pytest.mark.parametrize("given, gold", [
    ("x+1", "1+x"), ("(x+1)^2", "x^2+2x+1"), (r"2\sqrt{3}", r"\sqrt{12}"), ("1.50", "3/2"),
    ("sqrt(8)", r"2\sqrt{2}"), ("2pi", r"\pi+\pi")])
def test_sympy_finds_a_difference_of_zero(given, gold):
    assert decided_by(given, gold, fast=True) == decided_by(gold, given, fast=True) == "sympy"


@pytest.mark.parametrize("given, gold, why", [
    ("2/4", "1/2", "fractions"), ("-2/4", "-1/2", "fractions"), ("4/2", "2", "only one is an integer"),
    ("2+2", "4", "only one is an integer"), ("x+y+z", "z+y+x", "sympy"), ("sin(x)", "-sin(-x)", "sympy"),
    ("x^10*x", "x^9*x^2", "sympy"), ("2^(3)", "2^3+y-y", "sympy"), ("1e1000000", "x", "sympy")])
def test_what_must_be_reduced_computed_or_is_not_parsed_stays_unequal(given, gold, why):
    verdict, trace = traced(given, gold, fast=True)
    assert not verdict and trace[-1].startswith(why)
    assert why != "sympy" or trace[-1].endswith("is not parsed")


@pytest.mark.parametrize("given, gold, verdict", [
    ("(1, 2)", "(1,2)", True), ("(1,3/2)", "(1,1.5)", True), ("(x+1,2]", "(1+x,2]", True),
    ("(1,000, 2)", "(1000,2)", True), ("(2,1)", "(1,2)", False), ("[1,2]", "(1,2)", False),
    ("(1,2]", "(1,2)", False), ("(1,2,3)", "(1,2)", False), ("1,2", "(1,2)", False),
    ("(1,2/4)", "(1,1/2)", False), ("(1,4/2)", "(1,2)", False), ("((1,2),3)", "((2,1),3)", False)])
def test_tuples_and_intervals_are_compared_element_by_element(given, gold, verdict):
    assert equal(given, gold, fast=True) == verdict


@pytest.mark.parametrize("given, gold", [
    ("", "1"), ("1", ""), ("", "x"), ("()", "(1)"), ("x", "y"), ("3", "3.5"), ("5", "-5"), ("1/2", "1/3")])
def test_different_answers_are_not_equal(given, gold):
    assert not equal(given, gold)


# ---- 3. latex, and all together ----------------------------------------------------------------

@pytest.mark.parametrize("given, gold", [
    (r"\frac{2}{4}", r"\frac{1}{2}"), (r"\frac{4}{2}", "2"), (r"\{2, 1\}", r"\{1,2\}"), ("2^{10}", "1024"),
    (r"\frac{x+1}{2}", r"\frac{x}{2}+\frac{1}{2}"), (r"\sin(x)\cos(y)", r"\cos(y) \sin(x)"),
    ("x+y+z", "z+y+x"), (r"\frac{1}{3}", "0.3333333333")])
def test_only_the_strict_mode_asks_math_verify(given, gold):
    assert not equal(given, gold, fast=True) and decided_by(given, gold) == "latex"
    assert equal(f"${given}$", f"${gold}$") and equal("84, 69", "$69$,$84$")


def test_a_long_repetitive_answer_is_not_given_to_math_verify():
    verdict, trace = traced("x+y+z+" * 30 + "x", "31x+30y+30z")
    assert not verdict and trace[-1] == "latex: too repetitive" and equal("x+y+z+" * 3 + "x", "4x+3y+3z")
    varied = "+".join(f"{7 * i * i % 101}x^{{{i}}}" for i in range(30))
    assert not oat._repetitive(varied) and equal(varied, " + ".join(reversed(varied.split("+"))))


def test_the_box_of_a_gold_is_opened():
    assert equal("5", r"it is \boxed{5}") and not equal("5", r"it is \boxed{6}")
    assert traced("5", r"\boxed{5") == (False, ["gold: its box is never closed"])


# Wrong verdicts of the OAT-Grader, kept because a result can only be compared under one grader.
@pytest.mark.parametrize("given, gold", [
    ("b - 1", "1"), ("x+a", "x+c"), ("2 m", "2 s"), ("20 4", "204"), ("52_8", "528"), ("205=204", "204"),
    (r"\frac{x+1}{2}", r"x+\frac{1}{2}"), (r"\binom{n}{k}", r"\binom{k}{n}"), ("10000000000000001", "1e16"),
    ("Sunday", "sun"), ("5%", "5"), (r"500\%", "5")])
def test_known_false_positives_are_kept(given, gold):
    assert equal(given, gold)


@pytest.mark.parametrize("given, gold", [
    ("12 m/s", "12"), ("½", r"\frac{1}{2}"), (r"3 < x \le 4", "(3,4]"), (r"\text{Option B}", "B")])
def test_known_false_negatives_are_kept(given, gold):
    assert not equal(given, gold)


# ---- The trace ---------------------------------------------------------------------------------

def test_the_trace_has_one_readable_line_for_each_comparison():
    assert traced(r"\dfrac{1}{2}", "1/2") == (True, [r"string: '\\frac{1}{2}' = '\\frac{1}{2}'"])
    assert traced("x+1", "1+x") == (True, [
        "string: 'x+1' != '1+x'", "text: 'x+1' != '1+x'", "sympy: '(1+x)-(x+1)' -> 0"])
    assert traced("(1,3)", "(1,2)") == (False, [
        "string: '(1,3)' != '(1,2)'", "text: '(1,3)' != '(1,2)'",
        "sympy: '(1)-(1)' -> 0", "sympy: '(2)-(3)' -> not 0", "latex: '(1,3)' != '(1,2)'"])
    assert traced("4/2", "2")[1][2:] == ["only one is an integer: '4/2' != '2'", "latex: '4/2' = '2'"]


def test_the_trace_shows_no_novels_and_names_what_went_wrong():
    verdict, trace = traced("7" * 30_000, "x")
    assert not verdict and all(len(line) < 600 for line in trace + traced("abc" * 1000, "x")[1])
    assert traced("1+*", "y", fast=True)[1][-1] == "text: SyntaxError"
    assert "text: out of time (0.2 s of CPU)" in traced("9**9**9**9", "x", seconds=0.2)[1]


# ---- Limits ------------------------------------------------------------------------------------

BOMBS = [
    "9**9**9**9", "1e999999999", "(10^9)!", "99999999!", "(((((((((9)^9)^9)^9)^9)^9)^9)^9)^9)^9",
    "x**x**x**x**x", "9^{9^{9^9}}", "2^{-10^{10}}", "(a+b+c+d+e)^{40}", r"\binom{10^9}{5\cdot 10^8}",
    r"\sum_{k=1}^{10000000}\sin(k)",
    "(" * 50_000 + "1" + ")" * 50_000, "{" * 50_000 + "1" + "}" * 50_000, "1+" * 25_000 + "1", "9" * 50_000,
    r"\frac{1}{" * 5000 + "1" + "}" * 5000, r"\text{ " * 8000, "\0", "\ud800", "[1]*10**9"]


@pytest.mark.slow
def test_no_bomb_outlives_three_time_limits_or_needs_over_two_gigabytes():
    code = ("import json, resource, sys, time\n"
            "from grading import oat\n"
            "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
            "oat.equal('1/2', '3')\n"
            "for bomb in json.load(sys.stdin):\n"
            "    start = time.process_time()\n"
            "    verdict = oat.equal(bomb, r'\\frac{x}{2}+1', seconds=0.2)\n"
            "    print(json.dumps([verdict, time.process_time() - start]), flush=True)\n")
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(BOMBS), capture_output=True,
                          text=True, cwd=ROOT, timeout=100)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(BOMBS), done.stderr[-2000:]
    assert [bomb[:40] for bomb, (verdict, took) in zip(BOMBS, results) if verdict or took > 3 * 0.2 + 1] == []


def test_an_alarm_of_the_caller_rings_in_time():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda signum, frame: rang.append(time.monotonic()))
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert not equal("9**9**9**9", "x", seconds=0.6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(rang) == 1 and 0.1 < rang[0] - start < 0.5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_python_drops_in_a_destructor_rings_again():
    class Slow:
        def __del__(self):
            end = time.process_time() + 0.4
            while time.process_time() < end:
                pass

    def compare(given, gold, trace):
        Slow()
        end = time.process_time() + 5
        while time.process_time() < end:
            pass
        return True

    trace = []
    assert not oat._in_time("slow", compare, "1", "1", 0.2, trace)
    assert trace == ["slow: out of time (0.2 s of CPU)"]


def test_no_timer_is_left_behind():
    before = signal.getsignal(signal.SIGPROF)
    for given in ("1/2", "9**9**9**9", "x=1="):
        equal(given, "x", seconds=0.2)
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGPROF) == before


def test_another_thread_is_refused():
    raised = []

    def run():
        try:
            equal("1", "1")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(raised) == 1 and "main thread" in raised[0]     # and not denied in silence


# ---- Agreement ---------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "minerva", "olympiad"])
def test_every_gold_of_a_benchmark_equals_itself_with_and_without_dollars(name):
    golds = [row["answer"] for row in rows(name)]
    assert golds and all(extract(rf"so \boxed{{{gold}}}") == gold for gold in golds)
    for dress in (lambda gold: gold, lambda gold: gold.strip("$"), lambda gold: f"${gold}$"):
        assert [gold for gold in golds if not equal(dress(gold), gold)] == []
