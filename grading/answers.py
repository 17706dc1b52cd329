r"""The graders themselves: is the answer in this text the reference answer?

    math-verify   the training reward (Sec. 5.1): Math-Verify on the last box, with its known slips repaired
    oat           the final evaluation (Sec. 5.1): the OAT-Grader, see grading/oat.py
    choice        multiple choice: the letter, in any usual dress; the two above deny that `C)` is C

    judge({"kind": "math-verify", "response": r"\boxed{0.5}", "answer": r"\frac12", "strict_box": True}, 5)
    # ("ok", "0.5", ["reference, parsed: [1/2, '\\frac12']", ...])

Only for the killable workers of reward.py: here, what a model wrote reaches sympy's parser, which is `eval`.
"""
import functools
import math
import re
import time
import unicodedata

from grading import oat

KINDS = ("math-verify", "oat", "choice")
DENIAL = r"\\(?:neq?|neg|not|equiv)(?![a-z])"      # Math-Verify reads \neq 5 as 5
REASONS = ("ok", "wrong", "no_box", "unclosed", "parse_fail", "timeout")    # what `judge` may answer


def judge(item, seconds):
    """(one of REASONS, extracted text, trace). seconds: an int, which limits each parse and comparison."""
    from math_verify.errors import TimeoutException
    trace = []
    grade = {"math-verify": math_verify, "oat": oat_grader, "choice": choice}[item["kind"]]
    try:
        return *grade(item["response"], item["answer"], item["strict_box"], seconds, trace), trace
    except TimeoutException as error:   # derives from BaseException
        return "timeout", "", [*trace, repr(error)]
    except Exception as error:          # what sympy raises on nonsense; MemoryError, RecursionError
        return "parse_fail", "", [*trace, repr(error)]


def math_verify(text, answer, strict_box, seconds, trace):
    """(reason, extracted text): Math-Verify's verdict, with its slips repaired before and after. seconds
    limits each of: parse the reference, parse the response, compare. trace: a list that gets a line each."""
    from math_verify import parse, verify
    box = ""
    if strict_box:
        box, why = last_box(text)
        if why:
            return why, ""
        if re.search(DENIAL, box) and not re.search(DENIAL, answer):
            trace.append(f"a denial is no answer: {box}")
            return "wrong", box
        text = "\\boxed{%s}" % _clean(re.sub(r"(?<!\\)\$", "", box))
    gold = _parse_reference(answer, seconds)
    trace.append(f"reference, parsed: {gold}")
    prediction = parse(text, parsing_timeout=seconds, raise_on_error=True)
    trace.append(f"response, parsed: {prediction}")
    if not prediction:
        return (last_box(text)[1] or "parse_fail"), box
    start = time.monotonic()            # verify is asymmetric: the reference comes first
    equal = verify(gold, prediction, timeout_seconds=seconds, allow_set_relation_comp=True)
    trace.append(f"math_verify.verify: {equal}")
    extracted = box or str(prediction[-1])
    if not equal and re.fullmatch("[A-J]", answer.strip()):
        equal = choice_letter(text) == answer.strip()
        trace.append(f"same letter: {equal}")
    elif not equal and time.monotonic() - start >= seconds:         # verify hides its timeouts
        return "timeout", extracted
    for differs, name in ((_rounded_away, "equal only by rounding"), (_other_base, "another base")):
        if equal and differs(gold, prediction):
            trace.append(f"but {name}")
            equal = False
    return ("ok" if equal else "wrong"), extracted


@functools.lru_cache(4096)              # the G rollouts of a prompt have one reference
def _parse_reference(answer, seconds):
    """As inline math, which suits numbers and LaTeX but would end at a newline; else as it is."""
    from math_verify import parse
    parsed = (parse(f"${_clean(' '.join(undollar(answer).split()))}$", parsing_timeout=seconds)
              or parse(answer, parsing_timeout=seconds))
    if not parsed:                      # not returned: it may have been a timeout, and would be cached
        raise ValueError("the reference answer cannot be parsed")
    return parsed


def _rounded_away(gold, prediction):
    """Math-Verify rounds to 6 decimals: 0, 1/2^98 and 1/2^99 are the same to it."""
    try:
        a, b = (0.0 if abs(float(parsed[0])) < 1e-100 else float(parsed[0]) for parsed in (gold, prediction))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False                    # no real numbers. (Below 1e-100: sympy's value of sin(2 pi))
    return abs(a) < 0.01 and not math.isclose(a, b, rel_tol=1e-3)


def _other_base(gold, prediction):
    """Math-Verify ignores subscripts: 2516_8 = 2516_9. An omitted base is not another one."""
    a, b = (re.search(r"\d_\{?\s*(\d+)\s*\}?$", str(parsed[-1])) for parsed in (gold, prediction))
    return bool(b) and b[1] != (a[1] if a else "10")


def oat_grader(text, answer, strict_box, seconds, trace):
    """(reason, extracted text) by oat.py, for which only boxes count."""
    box = oat.extract(text)
    if box is None:
        return last_box(text)[1] or "no_box", ""
    equal = oat.equal(box, answer, seconds=min(seconds, 3), trace=trace)    # three comparisons, one deadline
    if not equal and any("out of time" in step for step in trace):
        return "timeout", box
    return ("ok" if equal else "wrong"), box


def choice(text, answer, strict_box, seconds, trace):
    """(reason, letter): `answer` is a letter A-J."""
    letter = choice_letter(text)
    trace.append(f"letter: {letter}")
    if letter is None:
        return last_box(text)[1] or "parse_fail", ""
    return ("ok" if letter == answer.strip() else "wrong"), letter


def last_box(text):
    r"""(content of the last \boxed{...}, None), or ("", "no_box" or "unclosed")."""
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        return "", "no_box"
    depth, start = 1, boxes[-1].end()
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):         # \{ and \} are not braces
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[start:start + token.start()], None
    return "", "unclosed"


def choice_letter(text):
    r"""The option A-J that a response settles on, or None; two different letters are none.

    In the last box: C, c, (C), C., C), \text{C) ...}, \textbf{(C)} ..., Option C. Without a box: the last
    "answer is C", "option (C)", "Answer: C", where the letter must be a capital ("the answer is a planet").
    """
    box, why = last_box(text)
    plain = re.sub(r"\\(?:text|math)\w*\b|\\[ ,;!()\[\]]|[{}$*`\"]", " ", text if why == "no_box" else box)
    if why == "no_box":
        letter = (r"(?i:\s+is)?[\s:]*[(\[]?\s*([A-J])(?![\w'])"
                  r"(?!\s*[)\]]?\s*(?:,|/|and|or)\s*[(\[]?\s*[A-J]\b(?! +[a-z]))"     # (A) or (C)
                  r"(?!(?<=[AI]) +(?!(?:is|and|as|but|because|since)\b)[a-z])")           # A planet, I think
        said = (re.findall("(?i:answer)" + letter, plain) or re.findall("(?i:option|choice)" + letter, plain))
        return said[-1] if said else None
    found = re.fullmatch(r"(?is)\s*(?:the\s+)?(?:correct\s+)?(?:(?:answer|option|choice)(?:\s+is)?)?[\s:]*"
                         r"[(\[]?\s*([A-J])\s*(?:[)\].:](.*))?", plain)
    if not found:
        return None
    rest = (found[2] or "").strip()     # the option's text, which may hold letters: "C) P(A) = 0.5"
    another = r"(?<!\w)[(\[]\s*[A-J]\s*[)\]]|^[A-J]\W*$|^(?:or|and|not|maybe|but|,|/|&).*\b[A-J]\b"
    return None if re.search(another, rest) else found[1].upper()


def repair_scientific(text):
    r"""Floats of program output as LaTeX: '4.5e33' -> '4.5 \times 10^{33}'; parsers read e as Euler's number.

    58 of Minerva's 272 references are written so, and no grader finds 4.5 \times 10^{33} equal to them.
    """
    return re.sub(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])",
                  lambda number: rf"{number[1]} \times 10^{{{int(number[2])}}}", text)


def undollar(answer):
    """'$x$' -> 'x', 'x+$ $y' -> 'x+ y' (cut from a text that closes and opens); '$x$ and $y$' stays."""
    answer = re.sub(r"\$\s+\$", " ", answer.strip())
    return answer[1:-1] if re.fullmatch(r"\$[^$]*\$", answer) else answer


def _clean(text):
    """A short answer in the notation that Math-Verify reads: typography, thousands, floats, what trails."""
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+",         # superscripts
                  lambda run: "^{%s}" % unicodedata.normalize("NFKC", run[0]).replace("\u2212", "-"), text)
    text = re.sub(r"\u221a\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"[^\x00-\x7f]", _ascii, text)
    text = re.sub(r"(?<![\d.])[1-9]\d{0,2}(?:(?:\\[,!;: ]|\{,\})\d{3})+(?!\d)",
                  lambda number: re.sub(r"\D", "", number[0]), text)         # 58\,500
    while (shorter := re.sub(r"\\[ ,;:!]?$", "", text.rstrip(" \n\t~.,;:\u3002"))) != text:
        text = shorter
    return repair_scientific(text)


def _ascii(match):
    char, special = match[0], {"\u00b0": r"^\circ", "\u00ba": r"^\circ", "\u00b7": r"\cdot ",
                               "\u221e": r"\infty ", "\u2013": "-"}
    kind, plain = unicodedata.category(char), unicodedata.normalize("NFKC", char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))                               # full-width, Arabic-Indic, ...
    if kind == "No" and "\u2044" in plain:
        return r"\frac{%s}{%s}" % tuple(plain.split("\u2044"))              # one half
    if kind == "Cf":
        return ""                                                           # zero-width space
    return special.get(char, plain if plain.isascii() else char)
