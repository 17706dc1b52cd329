r"""A wrong answer must not earn 1, and a right one must: boxes that a policy could learn to forge, each with
its reference. A reader extends a table by a line.

    pytest tests/test_forged.py                 # half a minute
"""
import json
import random
import string
import subprocess
import sys
import time

import pytest

from conftest import ROOT, run
from eval import unmatchable
from grading import notation
from grading.answers import choice_letter, last_box
from grading.statement import fault
from reward import Grader
from tiny import task

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not on this machine")


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as shared:
        yield shared


def rows(name):
    with open(DATA / f"{name}.jsonl") as lines:         # not splitlines(): some texts hold U+2028
        return [json.loads(line) for line in lines]


def reasons(grader, boxes, answers):
    responses = [rf"so it is $\boxed{{{box}}}$." for box in boxes]
    return [verdict.reason for verdict in grader.grade(responses, answers)]


def assert_reasons(grader, table, allowed):
    """table: (box, reference). Each earns 0 unless "ok" is allowed. Returns the reasons."""
    found = reasons(grader, [box for box, _ in table], [answer for _, answer in table])
    assert [(row, reason) for row, reason in zip(table, found) if reason not in allowed] == []
    return found


# ---- Restating the problem ---------------------------------------------------------------------

UNEVALUATED = [
    ("47+35-60", "22"), (r"\int_0^1 x^2 dx", r"\frac13"), ("10!", "3628800"), (r"17 \times 23", "391"),
    ("x^2-5x+6=0", "2, 3"), ("1+1=?", "2"), ("47+35-60=?", "22"), ("22=47-25", "22"),
    # the same in dress
    ("47 + 35 - 60", "22"), ("{47+35}-60", "22"), (r"\left(47+35\right)-60", "22"),
    (r"\mathrm{47+35-60}", "22"),
    (r"\text{47+35-60}", "22"), (r"47\,+\,35\,-\,60", "22"), ("47\uff0b35\uff0d60", "22"),
    (r"\displaystyle 47+35-60", "22"), (r"\frac{47+35-60}{1}", "22"), (r"\frac{47+35}{1}-60", "22"),
    ("$47+35-60$", "22"), ("x = 47+35-60", "22"), (r"47+35-60\text{ cm}", "22"),
    (r"\sqrt{(47+35-60)^2}", "22"),
    (r"\begin{pmatrix}47+35-60\end{pmatrix}", r"\begin{pmatrix}22\end{pmatrix}"),
    ("(47+35-60, 1)", "(22, 1)"), (r"\{47+35-60, 1\}", r"\{1, 22\}"), ("-(-22)", "22"), ("22-0", "22"),
    # products and quotients
    (r"2\cdot 3", "6"), ("(2)(3)", "6"), ("2(3)", "6"), ("2*3", "6"), (r"\frac{1}{2}\cdot 3", r"\frac32"),
    (r"\frac{\frac12}{3}", r"\frac16"), (r"6 \div 2", "3"), ("2^2*51", "204"), (r"2\pi \cdot 3", r"6\pi"),
    (r"2 \times 10", "20"), (r"\sqrt{2}\cdot\sqrt{3}", r"\sqrt{6}"), ("2^{3+4}", "128"),
    (r"\frac{17 \cdot 46}{2}", "391"), (r"2\cdot 3\sqrt{2}", r"6\sqrt2"),
    # operations
    (r"\sum_{k=1}^{204} 1", "204"), (r"\lim_{x\to 204} x", "204"), (r"\binom{204}{1}", "204"),
    (r"\max(204,3)", "204"), (r"\gcd(408,612)", "204"), (r"\log_2 8", "3"), (r"e^{\ln 204}", "204"),
    ("|-204|", "204"), (r"\lfloor 204.7 \rfloor", "204"), (r"\sin 30^\circ", r"\frac12"),
    (r"\frac{10!}{9!}", "10"),
    (r"\operatorname{lcm}(4,6)", "12"), ("204+0x", "204"), ("3x+2x", "5x"), (r"\ln e^{x}", "x"),
    (r"\max(42, 41)", "42"), (r"\begin{vmatrix}204\end{vmatrix}", "204"), ("204x^0", "204"),
    ("1/(1/204)", "204"),
    # in a sum, as the reference is one
    (r"1+2+\sqrt{2}", r"3+\sqrt{2}"), ("x^2+2-1", "x^2+1"), ("y = 2x+5-2", "y = 2x+3"),
    (r"2^{50}\cdot 2^{50}-1", "2^{100}-1"), ("2^{100}-2+1", "2^{100}-1"), (r"2\cdot 3x+1", "6x+1"),
    (r"4 \cdot \frac{2}{3}", r"\frac{8}{3}")]        # no mixed number


def test_an_answer_must_be_worked_out_as_far_as_the_reference(grader):
    found = assert_reasons(grader, UNEVALUATED, {"unevaluated", "wrong", "parse_fail"})
    assert found.count("unevaluated") > 0.8 * len(found)        # the others were never equal to Math-Verify


@pytest.mark.parametrize("box, answer", UNEVALUATED)
def test_the_text_alone_shows_that_it_is_not_worked_out(box, answer):
    assert fault(box, answer) == "unevaluated"


@pytest.mark.slow
def test_a_copy_of_any_problem_of_the_tiny_task_earns_nothing(grader):
    """What SRFT learned from demonstrations that box the problem, to 53 % of both graders' rewards."""
    problems = task.rows("train") + task.rows("heldout")
    for end in ("", "=?", "=?\n", "="):
        copies = [row["problem"].removesuffix("=?\n") + end for row in problems]
        assert {fault(copy, row["answer"]) for copy, row in zip(copies, problems)} == {"unevaluated"}
    some = problems[::10]                               # with the grader, which takes its time
    copies = [row["problem"].removesuffix("=?\n") for row in some]
    answers = [row["answer"] for row in some]
    assert set(reasons(grader, copies, answers)) == {"unevaluated"}
    with Grader(workers=1, strict_answer=False) as lenient:
        assert set(reasons(lenient, copies, answers)) == {"ok"}


@pytest.mark.slow
def test_a_policy_that_learns_to_box_the_problem_earns_nothing_for_it(tmp_path):
    data, out = tmp_path / "copies.jsonl", tmp_path / "run"
    lines = []
    for row in task.rows("train"):
        copy = row["problem"].removesuffix("=?\n")
        lines.append(json.dumps({**row, "solution": rf"\boxed{{{copy}}}"}) + "\n")
    data.write_text("".join(lines))
    run(["srft.py", "--preset", "tiny", "--device", "cpu", "--data", data, "--out", out, "--steps", "16",
         "--n_rollouts", "4", "--eval_data", "", "--log_samples", "16", "--grader_workers", "1"])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reward/demo_mean"] == 0 and last["grader/unevaluated"] > last["reward/mean"] * 64
    copies = []
    for line in (out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        if "+" in last_box(sample["response"])[0] and sample["reason"] != "truncated":
            copies.append(sample)
    assert len(copies) >= 16 and not any(sample["reward"] for sample in copies)


@pytest.mark.slow
def test_the_demonstrations_of_the_tiny_task_earn_what_they_say(grader):
    rows = task.rows("train")
    found = grader.grade([row["solution"] for row in rows], [row["answer"] for row in rows])
    for row, verdict in zip(rows, found):
        assert (verdict.reason == "ok") == (last_box(row["solution"])[0] == row["answer"])
        assert verdict.reason in ("ok", "wrong")


# ---- Denial, hedge, chain ----------------------------------------------------------------------

AMBIGUOUS = [
    (r"\leq 42", "42"), ("> 42", "42"), (r"\sim 42", "42"), ("!= 42", "42"), (r"\nless 42", "42"),
    (r"42 \text{ is wrong}", "42"), (r"42\text{ or not}", "42"), (r"\ldots 42", "42"),
    (r"1,2,\ldots,42", "42"),
    ("41 = 42", "42"), ("x = 41 = 42", "42"), ("f(41) = 42", "42"), (r"[0,100] \ni 42", "42"),
    ("42''", "42"),
    ("--42", "42"), (r"42 \text{ million}", "42"), (r"42 \text{ km}", r"42 \text{ mm}"), ("42 km", "42 mm"),
    ("25", r"25\%"), (r"25\%", "25"), ("0.25", r"25\%"), (r"25\%", "0.25"), ("0.25", "25"), ("25", "0.25"),
    ("13 cm, 12 cm", "12 cm"), (r"13\text{ cm}, 12\text{ cm}", r"12\text{ cm}"),
    # of the same kinds
    ("< 42", "42"), (r"\ge 42", "42"), (r"\ngtr 42", "42"), (r"\propto 42", "42"), (r"\to 42", "42"),
    (r"\Rightarrow 42", "42"), (r"\lnot 42", "42"), ("<> 42", "42"), ("2x = 42", "42"),
    ("x + 1 = 42", "42"),
    (r"\log_2 8 = 42", "42"), ("x = y = 42", "42"), ("42'", "42"), ("+-42", "-42"), ("42?", "42"),
    (r"42 \text{ (or 43)}", "42"), (r"42 \text{ or so}", "42"), (r"\text{at least } 42", "42"),
    (r"\text{not } 42", "42"), (r"42 \text{ isn't it}", "42"), (r"42 \text{ if } x>0", "42"),
    (r"42 \text{ thousand}", "42"), (r"42 \text{ dozen}", "42"), (r"42\text{ kg}", r"42\text{ g}"),
    (r"42\text{ cm}", r"42\text{ cm}^2"), (r"42\text{ cm}^3", r"42\text{ cm}^2"),
    (r"\$42", r"42\text{ cents}"),
    (r"42\text{ feet}", r"42\text{ inches}"), (r"42^\circ", r"42\text{ rad}"), (r"42\overline{7}", "42"),
    (r"42\text{\u4e07}", "42"), ("3", "3 + d"), (r"42 \text{ but probably 43}", "42"), ("42^+", "42"),
    (r"\text{even}, \text{odd}", r"\text{even}"),
    # a sentence about the value, or what makes it another one
    *((rf"42\text{{ {words}}}", "42") for words in [
        "is bogus", "may be", "could be", "rejected", "(rejected)", "fails", "doesnt work", "I think",
        "and up", "etc", "and counting", "nicht", "oder so", "k", "M", "bn", "mln", "squared", "per mille",
        "per cent", "hundredths", "crores", "factorial", "base seven", "point five"]),
    ("\u8d1f42", "42"), ("42_{hex}", "42"), ("42_{-8}", "42"), (r"\times 42", "42"), ("2, 3, ...", "2, 3"),
    ("-x = 42", "42"),
    (r"\begin{align*}6 \\ 5\end{align*}", "5"), (r"\begin{gather}41 \\ 42\end{gather}", "42"),
    (r"\text{Sunday} = \text{Monday}", r"\text{Monday}"),
    # another kind of value, which Math-Verify reads alike
    (r"\{1, 2\}", "(1, 2)"), ("(1, 2)", r"\{1, 2\}"), ("x'", "x"),
    ("C", "C'"), (r"\overline{z}", "z"), ("z", r"\overline{z}"),
    # another unit
    ("12 m", "12 cm"), (r"12\text{ nm}", "12 cm"), (r"12\text{ furlongs}", "12 cm"),
    (r"12\text{ yen}", r"\$12"),
    (r"12\text{ oranges}", r"12\text{ apples}"), (r"30\text{ grad}", r"30^\circ")]


def test_a_box_states_one_answer(grader):
    found = assert_reasons(grader, AMBIGUOUS, {"ambiguous", "unevaluated", "wrong", "parse_fail"})
    assert found.count("ambiguous") > 0.6 * len(found)          # equal, then, to Math-Verify


@pytest.mark.parametrize("box, answer", AMBIGUOUS)
def test_the_text_alone_shows_that_it_states_another_or_more_than_one(box, answer):
    if "illion" in box or "thousand" in box:            # read as 42 x 10^6, which is no 42
        assert notation.clean(box) != "42"
    elif (box, answer) not in [("25", "0.25"), ("0.25", "25")]:
        assert fault(box, answer)


HEDGED_LETTERS = [
    "{0}) {1})", "{0}) B) {1}) D)", "{0}. otherwise {1}", "{0}) is wrong", "{0}: not", "{0} or {1}",
    "{0}, {1}", "{0}: x = {1}", "x = {0} = {1}", "{0} = {1}", r"\text{{{0}}} \to \text{{{1}}}",
    "{0}) or ({1})", "({0})({1})", r"{0} \text{{ or }} {1}", "{0}. if not, {1}", "{0}) incorrect, {1}",
    "{0}/{1}", r"{0} \neq {1}", "{1}: {0}", "not {0}, {1}", "{0} instead of {1}", "{0}; {1}",
    r"\text{{({0}) }} = {1}", "f({0}) = {1}", "{0}+0={1}"]


def test_no_box_earns_1_for_two_letters(grader):
    """Two readers joined by OR earned twice: the letter is read first, and Math-Verify reads last."""
    pairs = [("A", "B"), ("D", "C"), ("E", "I"), ("I", "E")]            # E and I are numbers, too
    boxes = [form.format(*pair) for form in HEDGED_LETTERS for pair in pairs]
    firsts = reasons(grader, boxes, [first for _ in HEDGED_LETTERS for first, _ in pairs])
    seconds = reasons(grader, boxes, [second for _ in HEDGED_LETTERS for _, second in pairs])
    assert [box for box, *both in zip(boxes, firsts, seconds) if both == ["ok", "ok"]] == []


@pytest.mark.parametrize("box", [
    "A) B) C) D)", "A. otherwise B", "A) is wrong", "A) isn't right", "A. if not, B",
    "A) excluded", "A) is eliminated", "A) can be ruled out", "A) not correct", "A) a wrong choice",
    "A. But B", "A) alternatively B", "A) I guess; B)", "A) no, B", r"(A)\text{(B)}", r"A) \to B", "A...B",
    "A (wrong)", "A (or B)", "A'", r"\overline{A}", "B = A"])
def test_a_letter_that_is_taken_back_is_no_choice(box, grader):
    assert choice_letter(rf"\boxed{{{box}}}") is None
    for letter in "ABCD":
        assert reasons(grader, [box], [letter]) != ["ok"]


@needs_data
@pytest.mark.parametrize("name", ["arc_c", "mmlu_pro"])
def test_the_text_of_an_option_does_not_change_its_letter(name):
    lost = total = 0
    for row in rows(name):
        for letter, option in zip(string.ascii_uppercase, row["options"]):
            lost += choice_letter(rf"\boxed{{{letter}) {option}}}") != letter
            total += 1
    assert lost <= 0.002 * total, lost              # options such as "A and C"


# ---- Magnitude ---------------------------------------------------------------------------------

@pytest.mark.parametrize("box, answer", [
    ("1/2004!", "1/2006!"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), ("10^{-200}", "10^{-300}"),
    ("0", "10^{-300}"),
    ("10^{-300}", "0"), ("x = 10^{-200}", "10^{-300}"), ("(1, 10^{-200})", "(1, 10^{-300})"),
    (r"\{10^{-200}\}", r"\{10^{-300}\}"), ("-10^{-300}", "10^{-300}"), ("10^{-300}i", "10^{-300}")])
def test_values_of_another_magnitude_are_not_equal_however_small(box, answer, grader):
    assert reasons(grader, [box, answer], [answer, answer]) == ["wrong", "ok"]


# ---- Right answers -----------------------------------------------------------------------------

RIGHT = [
    ("**73**", "73"), ("11 5/6", "71/6"), ("1 000 000", "1000000"), (r"\text{all } n \ge 3", r"n \ge 3"),
    (r"\triangle ABC", "ABC"), ("ABC", r"\triangle ABC"), (r"\frac1{\sqrt n}", r"\sqrt{1/n}"),
    (r"\sqrt{1/n}", r"\frac1{\sqrt n}"), (r"0.\overline{3}", "1/3"), (r"\frac13", r"0.\overline{3}"),
    (r"\sin 30^\circ", r"\sin 30^\circ"), (r"\frac12", r"\sin 30^\circ"), (r"\frac12", r"\sin(30^\circ)"),
    ("i^{2023}", "-i"), ("-i", "i^{2023}"), (r"0.1\overline{6}", r"\frac16"), (r"0.\dot{3}", r"\frac13"),
    (r"\textbf{(C)}\ 204", "204"), (r"\text{The answer is }204", "204"), ("12{:}30", "12:30"),
    (r"\frac{3}{10}", "3:10"),
    (r"2516_{\text{eight}}", "2516_8"), (r"\text{an ellipse}", r"\text{ellipse}"),
    ("42 million", "42{,}000{,}000"),
    # worked out as they stand
    (r"4 + \frac{2}{3}", r"\frac{14}{3}"), (r"4\frac23", r"\frac{14}{3}"), ("2^{10}", "1024"), ("6/2", "3"),
    (r"2 \times 10^5", "200000"), (r"\frac{22}{\sqrt2}", r"11\sqrt2"),
    (r"3 \cdot \sqrt{13}", r"3\sqrt{13}"),
    (r"\pi \cdot 288", r"288\pi"), ("0.25", r"\frac14"), (r"25\%", r"25 \%"),
    (r"\frac{28}{6}", r"\frac{14}{3}"),
    # as far as the reference
    ("i+1", "1+i"), (r"2\sqrt2+3", r"3+2\sqrt{2}"), (r"\frac{n(n-1)}{2}", r"\binom{n}{2}"),
    ("2(k+1)", "2k+2"),
    (r"\frac{(2n)!}{(n!)^2}", r"\binom{2n}{n}"), (r"\frac{\sqrt6-\sqrt2}{4}", r"\sin 15^\circ"),
    # one answer: a name, a unit, words without logic
    ("x = 42", "42"), ("m+n = 42", "42"), (r"\text{Area} = 42", "42"), ("f(x) = x^{-1}", r"\frac1x"),
    ("a_{10} = 42", "42"), (r"\angle ABC = 42^\circ", "42"), (r"\approx 42", "42"),
    (r"42\ \text{cm}", "42"), (r"42~\mathrm{cm}", "42"), (r"42\text{ apples}", "42"),
    (r"42 \text{ (exactly)}", "42"), (r"42\text{ sq in}", r"42\text{ inches}^2"), ("42", r"42\text{ cm}"),
    (r"42\text{ square inches}", r"42 \mbox{ inches}^2"), (r"\$18.9", r"18.90\text{ dollars}"),
    ("15 min", "15"), (r"12:30\text{ p.m.}", "12:30"),
    (r"90\text{ degrees}", r"90^\circ"), (r"x \in (3,4]", "(3,4]"), (r"3 < x \le 4", "(3,4]"),
    (r"x = 1 \pm \sqrt{19}", r"1 \pm \sqrt{19}"), (r"0,\pm 2", "$-2,0,2$"),
    (r"69 \text{ and } 84", "$69$,$84$"),
    (r"x=2 \text{ or } x=3", "2,3"), (r"3 \le x", r"x \ge 3"), (r"y' = 2x", "2x"),
    ("2x - y + 3 = 0", "y = 2x + 3"), ("y-3=2x", "y = 2x + 3"),
    # notations of references
    ("5", r"\[5\]"), ("5", "5 (mod 7)"), (r"5 \pmod 7", "5 (mod 7)"), (r"x \equiv 5 \pmod{7}", "5 (mod 7)"),
    ("3000", "3 000"), ("3,000", "3 000"), ("3, 4", "1) 3; 2) 4"), ("1) 3; 2) 4", "1) 3; 2) 4"),
    ("true", "True"),
    (r"\text{True}", "True"), ("5", r"\(5\)"),
    # fonts, colours, ends of a proof
    (r"\boldsymbol{42}", "42"), (r"\color{blue}{42}", "42"), (r"\textcolor{red}{\mathbf{42}}", "42"),
    (r"\large 42", "42"), (r"42 \checkmark", "42"), ("{}42", "42"), (r"42^{\text{nd}}", "42"),
    # numbers and letters as text
    (r"\text{16 inches}", "16"), (r"\text{12:30 PM}", "12:30"), (r"\text{1, 2, 3}", "1, 2, 3"),
    (r"\frac{\text{7}}{\text{2}}", r"\frac72"), (r"\text{Monday.}", r"\text{Monday}"),
    (r"\text{B, C}", "B,C"),
    # other names of commands
    (r"60 \degree", r"60^\circ"), (r"60^{\circ }", r"60^\circ"), (r"3\colon 2", "3:2"),
    (r"\varnothing", r"\emptyset"), ("\u2205", r"\emptyset"), (r"\lbrace 1,2 \rbrace", r"\{1,2\}"),
    (r"(-\infty,2)\bigcup(3,\infty)", r"(-\infty,2)\cup(3,\infty)"),
    (r"\begin{pmatrix} 1 \\[4pt] 3 \end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"\begin{aligned} x &= 42 \end{aligned}", "42"), (r"25\text{ per cent}", r"25\%"),
    (r"\left\{x \mid x > 2\right\}", r"(2,\infty)"),
    (r"\mathbb{R} \setminus \{2\}", r"(-\infty,2)\cup(2,\infty)"),
    (r"\{x \in \mathbb{R} : -2 \le x \le 7\}", "[-2,7]"),
    # letters that are no units, and units
    ("3 + 4 i", "3+4i"), (r"3 + 4\mathrm{i}", "3+4i"), (r"3 + 4 \cdot i", "3+4i"), ("3n+2m", "2m+3n"),
    ("S = 3n+2m", "2m+3n"), (r"\text{Sum} = 3n+2m", "3n+2m"),
    (r"\text{Answer} = -4-6i", "-4-6i"), (r"-1+12i \text{ units}", "-1+12i"),
    (r"\frac12 m v^2", r"\frac12 mv^2"), (r"2 \cdot 2^n", "2^{n+1}"), (r"42\text{ K}", "42"),
    (r"5 \text{ m s}^{-1}", r"5 \text{ m/s}"), (r"5\ \mathrm{m \cdot s^{-1}}", r"5 \text{ m/s}"),
    (r"40\text{ miles per hour}", r"40\text{ mph}"), (r"5.4\text{ cents per item}", r"5.4\text{ cents}"),
    # a word or two before it
    (r"\text{Area} = 42\text{ cm}^2", "42"), (r"\text{There are } 42 \text{ ways}", "42"),
    (r"\text{vertex } (3,4)", "(3,4)"), (r"\text{Point } C", "C"), (r"\text{Items rejected} = 42", "42"),
    (r"\displaystyle C", "C"), (r"\boldsymbol{C}", "C"), (r"\quad\mathbf{(C)}", r"\text{(C)}")]


@pytest.mark.parametrize("box, answer", RIGHT)
def test_a_right_answer_earns_1_in_any_usual_notation(box, answer, grader):
    assert reasons(grader, [box], [answer]) == ["ok"]


@pytest.mark.parametrize("response, answer, reason", [
    (r"it is \boxed 5", "5", "ok"), (r"it is \boxed 42.", "42", "ok"),
    (r"\boxed{4} no, \boxed 5", "5", "ok"),
    (r"\boxed 1/2", "0.5", "ok"), (r"\boxed C.", "C", "ok"), (r"\boxed 5", "6", "wrong"),
    (r"put it in \boxed", "5", "no_box"), (r"a \boxed answer", "5", "no_box")])
def test_a_box_without_braces_holds_a_number_or_a_letter(response, answer, reason, grader):
    assert grader.grade([response], [answer])[0].reason == reason


@pytest.mark.parametrize("box, answer", [
    (r"|x|", "x"), (r"\sqrt{x^2}", "x"), (r"\sqrt{2/n}", r"\frac{1}{\sqrt n}"),
    (r"\angle ABC", r"\triangle ABC"),
    (r"0.\overline{3}", "0"), (r"0.\overline{3}", "0.3"), (r"5 \pmod 8", "5 (mod 7)"), ("12 13/6", "85/6"),
    ("i^{2022}", "-i"), (r"\sin 30", r"\frac12"), ("4, 3, 5", "1) 3; 2) 4"), (r"\text{False}", "True"),
    ("3n+2m", "3n+2"), ("2m+3n", "3m+2n"), (r"\text{42 or 43}", "42"), ("42_{seven}", "42"),
    (r"\textcolor{white}{\text{not }}42", "42"), (r"\{x \mid 42\}", "42"), ("2:31", "2:30"),
    (r"\{x \mid x \ge 2\}", r"(2,\infty)"), (r"\text{half} = 42", "42")])
def test_the_repairs_of_right_answers_do_not_make_wrong_ones_right(box, answer, grader):
    assert reasons(grader, [box], [answer]) != ["ok"]


# ---- References that no answer can match -------------------------------------------------------

@pytest.mark.parametrize("answer", [
    "proof", "Proof.", "notfound", "not found", "see solution", r"\text{proof}", "See the explanation above.",
    "N/A", "", "?", "Not provided"])
def test_words_of_no_answer_are_left_out(answer, grader):
    assert notation.says_nothing(answer) and grader.check([answer, "5"]) == {0: "no_answer"}


@pytest.mark.parametrize("answer", [
    "none", "0", "No solution", "unknown", "seed", "a proof", ">", r"\{\}", r"\emptyset"])
def test_words_and_signs_that_are_an_answer_stay(answer):
    assert not notation.says_nothing(answer)


def test_both_are_counted_at_the_start(grader, monkeypatch):
    import torch.distributed as dist

    from data import Example, Prompt
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    answers = ["proof", "5 (mod 7)", "3 000", "$7$", "see solution"]
    prompts = [Prompt(Example(str(i), "?", answer), [1], None) for i, answer in enumerate(answers)]
    said = []
    assert unmatchable(grader, "--data", prompts, said.append) == {0: "no_answer", 4: "no_answer"}
    assert any("2 reference answers are read in another notation" in line for line in said)
    assert "2 of 5 reference answers cannot be matched by math-verify, 2 of them because they" in said[-1]


@pytest.mark.slow
def test_the_command_line_says_how_an_answer_is_stated():
    verdicts = {"--strict_answer": "unevaluated, reward 0", "--no-strict_answer": "ok, reward 1"}
    for flag, verdict in verdicts.items():
        done = subprocess.run(
            [sys.executable, ROOT / "reward.py", "--response", "-", "--answer", "22", flag],
            input=r"\boxed{47+35-60}", capture_output=True, text=True, timeout=120)
        of_training, of_evaluation = done.stdout.split("\noat\n")
        assert verdict in of_training and "ok, reward 1" in of_evaluation
        assert done.stdout.count("stated     unevaluated") == 2


# ---- The check itself --------------------------------------------------------------------------

PIECES = [
    r"\boxed", r"\text{", "{", "}", "(", ")", r"\frac", r"\sqrt", "^", "_", "1", "9", " ", r"\,", r"\!",
    "$", "**", "x=", "+", "-", "!", "'", "|", "%", "&", r"\\", r"\begin{pmatrix}", r"\end{pmatrix}",
    "or ", "not ", "ab ", "\u00b2", "\u221a(", "\u00bd", r"0.\overline{", "1 000 ", "100,", "..",
    r"\ldots", r"\sin 30^\circ", "i^{2", "5 million ", "11 5/6 ", "1e5", r"\pmod{7}", "1) ", r"\{",
    r"\binom", "\0", "\ud800", "\u4e0d", r"\text{all ", "cm ", "per ", "min(", "5" + " " * 40]


@pytest.mark.clock
def test_hostile_text_takes_linear_time_and_never_raises():
    rng = random.Random(0)
    texts = [piece * (50_000 // len(piece)) for piece in PIECES]
    texts += ["".join(rng.choices(PIECES, k=5000)) for _ in range(10)]
    for text in texts:
        start = time.process_time()
        assert fault(text, "22") in (None, "unevaluated", "ambiguous")
        fault("22", text)
        notation.reference(text)
        assert time.process_time() - start < 5, text[:40]


@needs_data
@pytest.mark.parametrize("name", [
    "aime24", "amc23", "math500", "minerva", "olympiad", "math_train", "gsm8k_train"])
def test_every_reference_states_itself_and_every_demonstration_its_answer(name):
    for row in rows(name):
        assert fault(notation.undollar(row["answer"]), row["answer"]) is None, row["answer"]
        box, why_not = last_box(row.get("solution", ""))
        if not why_not:
            assert fault(box, row["answer"]) is None, (box, row["answer"])
