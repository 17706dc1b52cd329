r"""grading/answers.py: what equals what in training, and which letter a response settles on.

    pytest tests/test_answers.py            # 5 s; only harmless texts, so the graders are called directly
"""
import time

import pytest

from grading import answers, oat
from grading.answers import choice_letter, judge, last_box
from grading.notation import repair_scientific, undollar


def boxed(text):
    return rf"so it is $\boxed{{{text}}}$."


def judged(response, answer, kind="math-verify", strict_box=True, seconds=5):
    return judge({"kind": kind, "response": response, "answer": answer, "strict_box": strict_box}, seconds)


def reason(*args, **options):
    return judged(*args, **options)[0]


# ---- Letters -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dress", [
    "%s", "(%s)", "%s.", "%s)", "[%s]", "$%s$", " %s ", "{%s}", "**%s**", r"\text{%s}", r"\text{(%s)}",
    r"\mathrm{%s}", r"\textbf{%s}", r"\textbf{(%s)}\ 204", r"\text{%s) Planetary days will become longer.}",
    "%s: longer days",
    r"\text{%s. }4.5\times10^{3}", "Option %s", r"\text{Option %s}", "The answer is %s.", "Answer: %s",
    r"(\text{%s})", r"\(%s\)"])
def test_a_letter_counts_in_every_usual_dress(dress):
    for letter in "ABCDEFGHIJ":
        assert choice_letter(boxed(dress % letter)) == letter
        assert choice_letter(boxed(dress % letter.lower())) == letter


@pytest.mark.parametrize("dress", [
    "the answer is %s", "The answer is (%s).", "**Answer: %s**", "**Answer:** %s", "Answer: $%s$",
    "Final answer: [%s]", "The correct option is %s.", "So option %s is correct.",
    "the correct choice is **%s**",
    "The answer is:\n\n%s", r"The answer is \textbf{(%s)}", r"the answer is $\mathbf{%s}$",
    "The answer is %s, the rest is too short.",
    "The answer is %s and I am sure.",
    "The answer is %s, A planet being too big."])
def test_without_a_box_a_letter_counts_where_it_is_called_the_answer(dress):
    for letter in "ABCDEFGHIJ":
        assert choice_letter("Option A is too short, and so on. " + dress % letter) == letter


@pytest.mark.parametrize("text, letter", [
    (r"\boxed{C) P(A) = 0.5}", "C"), (r"\boxed{B) 20 J.}", "B"), (r"\boxed{\text{D) } 25^\circ C.}", "D"),
    (r"\boxed{A. Hepatitis B.}", "A"), (r"\boxed{A) not this. It is D}", None),
    ("The correct answer is C. Option D is incorrect.", "C"),
    ("The answer is (C) because option A is wrong.", "C"),
    ("Answer: I think D", None), ('The answer is "C".', "C"), ("The answer is A since it is.", "A")])
def test_letters_in_the_options_text_or_of_other_options_do_not_count(text, letter):
    assert choice_letter(text) == letter


@pytest.mark.parametrize("box", [
    "AC", "A, C", "A and C", "(A) or (C)", r"\text{none}", "", "3", "K", "2C", "C_1", "A planet", "CD)",
    r"\text{(A) longer days (C) shorter days}"])
def test_a_box_without_exactly_one_letter_is_no_choice(box):
    assert choice_letter(boxed(box)) is None


@pytest.mark.parametrize("text", [
    "", "I do not know", "(A) or (C)", "A planet rotates faster.", "the answer is a planet",
    "The answer is AC.",
    "the answer is D's", r"it is \boxed{C", r"The answer is B, so \boxed{C", "the answer is k",
    "The answer is (A) or (C).", "Answer: A, C", "The answer is A and C.", "The answer is both A and C.",
    "Answer: A/C"])
def test_prose_without_exactly_one_letter_is_no_choice(text):
    assert choice_letter(text) is None


@pytest.mark.parametrize("text, letter", [
    ("A planet rotates faster after an impact, so option B is correct.", "B"),
    ("The answer is A? No, the answer is B.", "B"),
    (r"The answer is A. \boxed{B}", "B"), (r"\boxed{B}. The answer is A.", "B"),
    (r"The answer is A. \boxed{3}", None), (r"\boxed{A} no, \boxed{B}", "B"),
    (r"\boxed{A} no, \boxed{B or C}", None)])
def test_the_last_statement_counts_and_a_box_beats_prose(text, letter):
    assert choice_letter(text) == letter


@pytest.mark.parametrize("response, want", [
    (r"\boxed{C}", ("ok", "C")), (r"\boxed{c}", ("ok", "C")), (r"\boxed{D}", ("wrong", "D")),
    (r"\boxed{3}", ("parse_fail", "")), (r"\boxed{C", ("unclosed", "")), ("I give up", ("no_box", "")),
    ("The answer is C.", ("ok", "C")), ("", ("no_box", ""))])
def test_a_choice_is_judged_by_its_letter(response, want):
    reason, extracted, trace = judged(response, " C ", kind="choice")
    assert (reason, extracted) == want and trace[0].startswith("letter: ")


# ---- Boxes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, content", [
    (r"so $\boxed{42}$.", "42"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{}", ""),
    (r"\boxed {5}", "5"), (r"\boxed 5", "5"),
    (r"\boxed{\{1,2\}} and }", r"\{1,2\}"), (r"\boxed{\{}", r"\{"), (r"\boxed{1} no, \boxed{2}", "2"),
    (r"\boxed{\boxed{3}}", "3"), ("\\boxed{4\n} \\boxed", "4\n"), (r"\boxed{x\\}", r"x\\")])
def test_the_last_box_ends_at_its_own_brace(text, content):
    assert last_box(text) == (content, None)


@pytest.mark.parametrize("text, why", [
    ("", "no_box"), ("42", "no_box"), (r"\boxed x", "no_box"), (r"\fbox{5}", "no_box"),
    (r"\boxed{", "unclosed"),
    (r"\boxed{\frac{1}{2}", "unclosed"), (r"\boxed{1} so \boxed{2", "unclosed"), (r"\boxed{\{x", "unclosed"),
    (r"\boxed{x\}", "unclosed")])
def test_a_missing_or_unclosed_last_box_has_no_content(text, why):
    assert last_box(text) == ("", why)


# ---- Repairs -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, repaired", [
    ("4.5e33", r"4.5 \times 10^{33}"), ("-2E-7", r"-2 \times 10^{-7}"), ("1e+05", r"1 \times 10^{5}"),
    (".5e3", r".5 \times 10^{3}"), ("1.e3", r"1. \times 10^{3}"),
    ("(1e3, 2e4)", r"(1 \times 10^{3}, 2 \times 10^{4})")])
def test_a_float_of_program_output_becomes_latex(text, repaired):
    assert repair_scientific(text) == repaired


@pytest.mark.parametrize("text", ["", "e", "2e", "2e^3", "e^{-1}", "x2e3", "2e3x", "2e-3x", "3e8m", "2.5.1e3",
                                  "0x1e5", r"1\mathrm{e}5"])
def test_what_is_no_float_is_left_alone(text):
    assert repair_scientific(text) == text


@pytest.mark.parametrize("answer, bare", [
    ("$x$", "x"), (" $x$\n", "x"), ("x+$ $y", "x+ y"), ("$x$ and $y$", "$x$ and $y$"), ("x", "x"),
    (r"\$5", r"\$5"),
    ("$", "$"), ("$$", "")])
def test_dollars_around_an_answer_go(answer, bare):
    assert undollar(answer) == bare


# ---- Math-Verify, repaired ---------------------------------------------------------------------

SCIENTIFIC = [r"4.5 \times 10^{33}", r"45 \times 10^{32}", r"4.5\cdot10^{33}", "4.5E33", "4.5e33", "4.5e+33",
              "4.5×10³³", "4.5e33.", "4.5e33,", r"4.5\times10^{33}\text{ erg}"]
RIGHT = [(text, "4.5e33") for text in SCIENTIFIC] + [
    ("2.88×10⁻¹⁹", "2.88e-19"), ("4.5e33", r"4.5 \times 10^{33}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{99}}"), ("2^{-99}", r"\frac{1}{2^{99}}"), ("1/2^99", "1/2^99"),
    ("0.0", "0"), ("0", "-0"), ("1-1", "0"), (r"\sin(2\pi)", "0"), (r"\sqrt{2}\sqrt{2}-2", "0"),
    ("0", r"\sin(2\pi)"),
    ("0.001", r"\frac{1}{1000}"), ("0.333333", r"\frac13"),
    ("１２３", "123"), ("\u0661\u0662\u0663", "123"), ("𝟒𝟐", "42"), ("½", "0.5"), ("2½", "2.5"),
    ("90°", "90"), ("90º", r"90^\circ"),
    ("4\u200b2\u200b", "42"), ("\ufeff42", "42"), ("x²", "x^2"), ("10⁻³", "0.001"),
    (r"58\,500", "58500"), (r"58\,500", "58,500"), (r"58{,}500", "58500"), ("58,500", "58500"),
    (r"1\,234\,567", "1234567"),
    ("42.", "42"), ("42,", "42"), ("42~", "42"), ("42 ~.", "42"), (r"42\ ", "42"), ("42;", "42"),
    ("42。", "42"), ("42...", "42"),
    ("2516_8", "2516_8"), ("2516_{8}", "2516_8"), ("2516_{ 8 }", "2516_8"), ("2516", "2516_8"),
    ("2516_{10}", "2516"), ("x_1", "x_1"),
    ("3√13", r"3\sqrt{13}"), ("3√(13)", r"3\sqrt{13}"), ("１／２", "0.5"), ("–5", "-5"), ("−5", "-5"),
    ("2·3", "6"),
    ("0.001667", r"\frac{1}{600}"), (r"\$36", r"\$36"), ("$36$", "36"), (r"x \neq 5", r"x \ne 5"),
    ("C", "C"), ("c", "C"), ("(C)", "C"), (r"\text{C) longer days}", "C"), (r"\textbf{(C)}\ 204", "C"),
    ("Option I", "I"), ("E", "E"),
    (r"\text{Yes}", "yes"), (r"\{5,2\}", r"\{2,5\}"), (r"2\sqrt3", r"\sqrt{12}")]
WRONG = [
    ("4.6e33", "4.5e33"), (r"4.5 \times 10^{32}", "4.5e33"), ("4.5", "4.5e33"), ("0", "2.88e-19"),
    ("2.89e-19", "2.88e-19"), ("-2.88e-19", "2.88e-19"), ("0", r"\frac{1}{2^{99}}"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), ("1/2^98", "1/2^99"),
    *((rf"{no} 5", "5") for no in [r"\neq", r"\ne", r"\neg", r"x \not=", r"6\equiv"]),
    ("A) or B", "A"), ("A: B", "A"), ("C) or maybe (D)", "C"),
    ("0.0000001", "0"), (r"\frac{1}{2^{99}}", "0"), ("0.0033", r"\frac{1}{300}"),
    ("(10^{-9}, 1)", "(10^{-8}, 1)"),
    ("１２４", "123"), ("½", "2"), (r"58\,501", "58500"), (r"0{,}250", "250"), (r"4\,5", "45"), ("x³", "x^2"),
    ("2516_9", "2516_8"), ("2516_{9}", "2516_8"), ("2516_{ 9 }", "2516_8"), ("2516_8", "2516"),
    ("2516_{10}", "2516_8"), ("x_2", "x_1"), ("D", "C"), ("A, C", "C"), (r"\text{B) longer days}", "C"),
    ("1", "I"),
    ("no", "yes"), ("", "5"), ("(2,5)", "[2,5)"), ("(5,2)", "(2,5)")]


@pytest.mark.parametrize("text, answer", RIGHT)
def test_a_right_answer_earns_one_whatever_its_typography(text, answer):
    reason, extracted, trace = judged(boxed(text), answer)
    assert (reason, extracted) == ("ok", text), trace


@pytest.mark.parametrize("text, answer", WRONG)
def test_a_wrong_answer_earns_nothing_however_close(text, answer):
    reason, extracted, trace = judged(boxed(text), answer)
    assert reason in ("wrong", "parse_fail") and extracted == text, trace


@pytest.mark.parametrize("response, strict, loose", [
    (boxed("42"), "ok", "ok"), ("The answer is 42.", "no_box", "ok"), ("It is 41.", "no_box", "wrong"),
    ("", "no_box", "no_box"), ("the final answer is $42$. I hope it is correct.", "no_box", "ok"),
    ("I do not know", "no_box", "no_box"),
    (r"\boxed{42}, or rather \boxed{4", "unclosed", "ok"), (r"\boxed{41} no, $42$", "wrong", "wrong"),
    (r"\boxed{42} and the answer is 41", "ok", "ok")])
def test_only_with_a_strict_box_must_the_answer_stand_in_the_last_box(response, strict, loose):
    assert reason(response, "42") == strict
    assert reason(response, "42", strict_box=False) == loose


def test_the_oat_grader_sees_its_own_box_and_its_own_comparisons():
    assert judged(boxed(r"\frac12"), "0.5", kind="oat")[:2] == ("ok", r"\frac12")
    assert reason(r"\boxed {5}", "5", kind="oat") == "no_box" and reason(r"\boxed {5}", "5") == "ok"
    assert reason(r"\boxed{1} so \boxed{2", "1", kind="oat") == "unclosed"
    assert reason("The answer is 5.", "5", kind="oat", strict_box=False) == "no_box"
    assert reason(boxed("6"), "5", kind="oat") == "wrong"


# ---- What is told about a verdict --------------------------------------------------------------

PARSED = ["reference, parsed: ", "response, parsed: "]


@pytest.mark.parametrize("kind, response, answer, extracted, trace", [
    ("math-verify", r"\boxed{\frac12}", "0.5", r"\frac12", [*PARSED, "math_verify.verify: True"]),
    ("math-verify", r"\boxed{0.3}", "0.5", "0.3", [*PARSED, "math_verify.verify: False"]),
    ("math-verify", r"\boxed{1/2^98}", "1/2^99", "1/2^98",
     [*PARSED, "math_verify.verify: True", "but equal only by rounding"]),
    ("math-verify", r"\boxed{7_9}", "7_8", "7_9", [*PARSED, "math_verify.verify: True", "but another base"]),
    ("math-verify", r"\boxed{\text{C) 1}}", "C", r"\text{C) 1}", ["letter: C"]),
    ("oat", r"\boxed{\frac12}", "0.5", r"\frac12", ["string: "]),
    ("oat", r"\boxed{6}", "5", "6", ["string: ", "text: ", "", "latex: "]),
    ("choice", r"\boxed{\text{(C)}}", "C", "C", ["letter: C"])])
def test_the_trace_names_each_comparison(kind, response, answer, extracted, trace):
    _, found, steps = judged(response, answer, kind=kind)
    assert found == extracted and len(steps) == len(trace)
    assert all(step.startswith(start) for step, start in zip(steps, trace)), steps


def test_a_reference_that_cannot_be_parsed_is_no_match():
    assert reason(boxed("5"), "") == reason(boxed("5"), "$$") == reason(boxed(""), "") == "parse_fail"


def test_an_exception_inside_a_grader_is_a_verdict(monkeypatch):
    from math_verify.errors import TimeoutException
    for error, want in [(RecursionError("deep"), "parse_fail"), (MemoryError(), "parse_fail"),
                        (TimeoutException("late"), "timeout")]:
        def raising(text, answer, strict_box, seconds, trace, error=error):
            trace.append("so far")
            raise error
        monkeypatch.setattr(answers, "choice", raising)
        assert judged("5", "5", kind="choice") == (want, "", ["so far", repr(error)])


def test_a_comparison_that_math_verify_gave_up_in_silence_is_a_timeout(monkeypatch):
    import math_verify
    monkeypatch.setattr(math_verify, "verify", lambda *args, **options: time.sleep(1))
    assert reason(boxed("6"), "5", seconds=1) == "timeout"


def test_an_oat_comparison_out_of_time_is_a_timeout_unless_another_says_equal(monkeypatch):
    monkeypatch.setattr(oat, "_equal_texts", lambda *args: all(iter(lambda: 1, 0)))      # for ever
    assert reason(boxed("6"), "5", kind="oat", seconds=1) == "timeout"
    assert reason(boxed("5"), "5", kind="oat", seconds=1) == "ok"
    assert reason(boxed(r"\frac{2}{4}"), r"\frac12", kind="oat", seconds=1) == "ok"     # by the third
