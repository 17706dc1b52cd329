r"""The graders themselves: is the answer in this text the reference answer?

    math-verify   the training reward (Sec. 5.1): Math-Verify on the last box, with its known slips repaired
    oat           the final evaluation (Sec. 5.1): the OAT-Grader, see grading/oat.py
    choice        multiple choice: the letter, in any usual dress; the two above deny that `C)` is C

    judge({"kind": "math-verify", "response": r"\boxed{0.5}", "answer": r"\frac12", "strict_box": True}, 5)
    # ("ok", "0.5", ["reference, parsed: [1/2, '\\frac12']", ...])

Only for the processes that grading/worker.py forks: here, what a model wrote reaches parsers, and `eval`.
What calls no parser is safe anywhere: last_box, choice_letter, repair_scientific, undollar.
"""
import math
import re
import time
import unicodedata

from grading import oat

KINDS = ("math-verify", "oat", "choice")
REASONS = ("ok", "wrong", "no_box", "unclosed", "parse_fail", "timeout")    # what `judge` may answer
FAILED = ("timeout", "killed")          # of a verdict; these say nothing about the response
DENIAL = r"\\(?:neq?|neg|not|equiv)(?![a-z])"      # Math-Verify reads \neq 5 as 5


def judge(item, seconds):
    """Grade an item -> (one of REASONS, the extracted text, the trace: a line for each step, to be read).

    item: dict of "kind", "response", "answer" and "strict_box". seconds: an int, which limits each parse and
    each comparison. What a grader raises is a verdict, too.
    """
    from math_verify.errors import TimeoutException
    graders = {"math-verify": math_verify, "oat": oat_grader, "choice": choice}
    grader = graders[item["kind"]]
    trace = []
    try:
        reason, extracted = grader(item["response"], item["answer"], item["strict_box"], seconds, trace)
        return reason, extracted, trace
    except TimeoutException as error:   # derives from BaseException
        return "timeout", "", [*trace, repr(error)]
    except Exception as error:          # what sympy raises on nonsense; MemoryError, RecursionError
        return "parse_fail", "", [*trace, repr(error)]


# ---- math-verify --------------------------------------------------------------------------------------

def math_verify(text, answer, strict_box, seconds, trace):
    """(reason, extracted text): Math-Verify's verdict, with its slips repaired before and after. seconds
    limits each of: parse the reference, parse the response, compare. trace: a list that gets a line each."""
    from math_verify import parse, verify
    box = ""
    if strict_box:
        box, why_not = last_box(text)
        if why_not:
            return why_not, ""
        if re.search(DENIAL, box) and not re.search(DENIAL, answer):
            trace.append(f"a denial is no answer: {box}")
            return "wrong", box
        without_dollars = re.sub(r"(?<!\\)\$", "", box)
        text = "\\boxed{%s}" % _clean(without_dollars)      # Math-Verify sees the box, and nothing around it

    gold = _parse_reference(answer, seconds)
    trace.append(f"reference, parsed: {gold}")
    prediction = parse(text, parsing_timeout=seconds, raise_on_error=True)
    trace.append(f"response, parsed: {prediction}")
    if not prediction:
        _, why_not = last_box(text)
        return why_not or "parse_fail", box

    start = time.monotonic()
    # verify is asymmetric: the reference comes first.
    equal = verify(gold, prediction, timeout_seconds=seconds, allow_set_relation_comp=True)
    trace.append(f"math_verify.verify: {equal}")
    extracted = box or str(prediction[-1])
    if not equal and re.fullmatch("[A-J]", answer.strip()):
        equal = choice_letter(text) == answer.strip()
        trace.append(f"same letter: {equal}")
    elif not equal and time.monotonic() - start >= seconds:
        return "timeout", extracted                         # verify says False when its time is up
    if equal and _rounded_away(gold, prediction):
        trace.append("but equal only by rounding")
        equal = False
    if equal and _other_base(gold, prediction):
        trace.append("but another base")
        equal = False
    return ("ok" if equal else "wrong"), extracted


def _parse_reference(answer, seconds):
    """As inline math, which suits numbers and LaTeX but would end at a newline; else as it is."""
    from math_verify import parse
    one_line = " ".join(undollar(answer).split())
    parsed = parse(f"${_clean(one_line)}$", parsing_timeout=seconds)
    if not parsed:
        parsed = parse(answer, parsing_timeout=seconds)
    if not parsed:
        raise ValueError("the reference answer cannot be parsed")
    return parsed


def _rounded_away(gold, prediction):
    """Math-Verify rounds to 6 decimals: 0, 1/2^98 and 1/2^99 are the same to it."""
    try:
        gold_value = _value(gold)
        value = _value(prediction)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False                    # no real numbers
    return abs(gold_value) < 0.01 and not math.isclose(gold_value, value, rel_tol=1e-3)


def _value(parsed):
    number = float(parsed[0])
    if abs(number) < 1e-100:            # sympy's value of sin(2 pi)
        return 0.0
    return number


def _other_base(gold, prediction):
    """Math-Verify ignores subscripts: 2516_8 = 2516_9. A response without a base has no other one; a
    reference without a base has base 10."""
    subscript = r"\d_\{?\s*(\d+)\s*\}?$"
    gold_base = re.search(subscript, str(gold[-1]))
    base = re.search(subscript, str(prediction[-1]))
    if base is None:
        return False
    if gold_base is None:
        return base[1] != "10"
    return base[1] != gold_base[1]


# ---- oat, choice --------------------------------------------------------------------------------------

def oat_grader(text, answer, strict_box, seconds, trace):
    """(reason, extracted text) by oat.py, for which only boxes count. strict_box: of no meaning here."""
    box = oat.extract(text)
    if box is None:
        _, why_not = last_box(text)
        return why_not or "no_box", ""          # a box that only oat does not see, as \boxed {5}
    equal = oat.equal(box, answer, seconds=min(seconds, 3), trace=trace)    # three comparisons, one deadline
    if not equal and any("out of time" in step for step in trace):
        return "timeout", box
    return ("ok" if equal else "wrong"), box


def choice(text, answer, strict_box, seconds, trace):
    """(reason, letter): `answer` is a letter A-J. strict_box, seconds: of no meaning here."""
    letter = choice_letter(text)
    trace.append(f"letter: {letter}")
    if letter is None:
        _, why_not = last_box(text)
        return why_not or "parse_fail", ""
    return ("ok" if letter == answer.strip() else "wrong"), letter


# ---- Boxes and letters --------------------------------------------------------------------------------

def last_box(text):
    r"""(content of the last \boxed{...}, None), or ("", "no_box" or "unclosed")."""
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        return "", "no_box"
    start = boxes[-1].end()
    depth = 1                                                       # of open braces, the box's own included
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):     # \{ and \} are tokens, and no braces
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
        if depth == 0:
            return text[start:start + token.start()], None
    return "", "unclosed"


def choice_letter(text):
    r"""The option A-J that a response settles on, or None; two different letters are none.

    In the last box: C, c, (C), C., C), \text{C) ...}, \textbf{(C)} ..., Option C. Without a box: the last
    "answer is C", "option (C)", "Answer: C", where the letter must be a capital ("the answer is a planet").
    """
    box, why_not = last_box(text)
    if why_not == "no_box":
        return _letter_in_prose(_without_markup(text))
    return _letter_in_box(_without_markup(box))                     # "" if it is never closed: no letter


def _without_markup(text):
    return re.sub(r"\\(?:text|math)\w*\b|\\[ ,;!()\[\]]|[{}$*`\"]", " ", text)


def _letter_in_prose(text):
    letter = (r"(?i:\s+is)?[\s:]*[(\[]?\s*([A-J])(?![\w'])"                              # is (C
              r"(?!\s*[)\]]?\s*(?:,|/|and|or)\s*[(\[]?\s*[A-J]\b(?! +[a-z]))"            # not: (A) or (C)
              r"(?!(?<=[AI]) +(?!(?:is|and|as|but|because|since)\b)[a-z])")              # nor: A planet
    said = re.findall("(?i:answer)" + letter, text)
    if not said:
        said = re.findall("(?i:option|choice)" + letter, text)
    return said[-1] if said else None


def _letter_in_box(box):
    found = re.fullmatch(r"(?is)\s*(?:the\s+)?(?:correct\s+)?(?:(?:answer|option|choice)(?:\s+is)?)?[\s:]*"
                         r"[(\[]?\s*([A-J])\s*(?:[)\].:](.*))?", box)
    if not found:
        return None
    letter = found[1].upper()
    rest = (found[2] or "").strip()     # the option's text, which may hold letters: "C) P(A) = 0.5"
    another = r"(?<!\w)[(\[]\s*[A-J]\s*[)\]]|^[A-J]\W*$|^(?:or|and|not|maybe|but|,|/|&).*\b[A-J]\b"
    return None if re.search(another, rest) else letter


# ---- Repairs of notation ------------------------------------------------------------------------------

def repair_scientific(text):
    r"""Floats of program output as LaTeX: '4.5e33' -> '4.5 \times 10^{33}'; parsers read e as Euler's number.

    58 of Minerva's 272 references are written so, and no grader finds 4.5 \times 10^{33} equal to them.
    """
    def as_latex(number):
        exponent = int(number[2])       # without + and leading zeros
        return rf"{number[1]} \times 10^{{{exponent}}}"

    return re.sub(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])", as_latex, text)


def undollar(answer):
    """'$x$' -> 'x', 'x+$ $y' -> 'x+ y' (cut from a text that closes and opens); '$x$ and $y$' stays."""
    answer = re.sub(r"\$\s+\$", " ", answer.strip())
    if re.fullmatch(r"\$[^$]*\$", answer):
        return answer[1:-1]
    return answer


def _clean(text):
    """A short answer in the notation that Math-Verify reads: typography, thousands, floats, what trails."""
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", _superscript, text)
    text = re.sub(r"\u221a\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}", text)            # the sign of a root
    text = re.sub(r"[^\x00-\x7f]", _ascii, text)
    text = re.sub(r"(?<![\d.])[1-9]\d{0,2}(?:(?:\\[,!;: ]|\{,\})\d{3})+(?!\d)", _digits, text)      # 58\,500
    while True:
        shorter = re.sub(r"\\[ ,;:!]?$", "", text.rstrip(" \n\t~.,;:\u3002"))           # "42 ~." -> "42"
        if shorter == text:
            return repair_scientific(text)
        text = shorter


def _superscript(run):
    digits = unicodedata.normalize("NFKC", run[0])
    return "^{%s}" % digits.replace("\u2212", "-")


def _digits(number):
    return re.sub(r"\D", "", number[0])


def _ascii(match):
    """One character that is not ASCII, in LaTeX or ASCII; itself if it has no such spelling."""
    char = match[0]
    special = {"\u00b0": r"^\circ", "\u00ba": r"^\circ",                   # degrees, written in two ways
               "\u00b7": r"\cdot ", "\u221e": r"\infty ", "\u2013": "-"}
    kind = unicodedata.category(char)
    plain = unicodedata.normalize("NFKC", char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))                               # full-width, Arabic-Indic, ...
    if kind == "No" and "\u2044" in plain:
        numerator, denominator = plain.split("\u2044")
        return r"\frac{%s}{%s}" % (numerator, denominator)                  # one half
    if kind == "Cf":
        return ""                                                           # zero-width space
    if char in special:
        return special[char]
    return plain if plain.isascii() else char
