r"""The graders themselves: is the answer in this text the reference answer?

    math-verify   the training reward (Sec. 5.1): Math-Verify on the last box, with its known slips repaired
    oat           the final evaluation (Sec. 5.1): the OAT-Grader, see grading/oat.py
    choice        multiple choice: the letter, in any usual dress; the two above deny that `C)` is C

    judge({"kind": "math-verify", "response": r"\boxed{0.5}", "answer": r"\frac12", "strict_box": True}, 5)
    # ("ok", "0.5", ["reference, parsed: [1/2, '\\frac12']", ...])

Only for the processes that grading/worker.py forks: here, what a model wrote reaches parsers, and `eval`.
What calls no parser is safe anywhere: last_box, choice_letter, misstated.
"""
import re
import time

from grading import notation, oat, statement, values

KINDS = ("math-verify", "oat", "choice")
REASONS = ("ok", "wrong", "no_box", "unclosed", "parse_fail", "timeout",       # what `judge` may answer,
           "reward_error")                                                     # or custom.judge
FAILED = ("timeout", "killed")          # of a verdict; these say nothing about the response
DENIAL = r"\\(?:neq?|neg|not|equiv)(?![a-z])"      # Math-Verify reads \neq 5 as 5


# In front of a value: "The answer is", its name, or the letter of an option.
LEAD = re.compile(
    r"^\\text(?:bf|it|rm)? ?\{ ?(?:(?:the )?(?:final )?(?:answer|result)(?: is)?:?|\([A-J]\)|there are|so,?"
    r"|point|vertex|(?:maximum|minimum)(?: value)?(?: is)?:?|[a-z ]{1,40}(?=\} ?=)) ?\}"
    r"(?: |\\[ ,;:]|\\q?quad|[:=~])*(?=[-+(\d\\])", re.IGNORECASE)


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
    box, why_not = last_box(text)
    if strict_box and why_not:
        return why_not, ""
    # One text, one reading: where the reference is a letter and the response settles on one, that is all.
    letter = reference_letter(answer)
    said = choice_letter(text) if letter else None
    if said or (letter and strict_box):
        trace.append(f"letter: {said}")
        return ("ok" if said == letter else "wrong"), box
    if not strict_box:
        return _compared(text, notation.reference(answer), "", seconds, trace)

    given, wanted, reason = _matched_notation(box, answer)
    if reason:
        trace.append(f"{reason}: {box}")
        return "wrong", box
    return _compared("\\boxed{%s}" % given, wanted, box, seconds, trace)    # the box, and nothing around it


def _matched_notation(box, answer):
    """(the box, the reference, why they cannot be equal or ""): both in one notation, without what only one
    of the two says: a modulus, that ABC is a triangle."""
    answer, modulus = notation.split_modulus(notation.reference(answer))
    box = notation.boxed(box)
    if modulus:
        box, other = notation.split_modulus(box)
        if other not in ("", modulus):
            return box, answer, "another modulus"
    if re.search(DENIAL, box) and not re.search(DENIAL, answer):
        return box, answer, "a denial is no answer"
    box = LEAD.sub("", notation.clean(box))
    answer = notation.clean(answer)
    if bool(notation.FIGURE.search(box)) != bool(notation.FIGURE.search(answer)):
        box = notation.FIGURE.sub(" ", box)
        answer = notation.FIGURE.sub(" ", answer)
    return box, answer, ""


def _compared(text, answer, box, seconds, trace):
    """(reason, extracted text) of Math-Verify on `text`. box: what is in it, "" if all of it counts."""
    from math_verify import parse, verify
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
    if not equal and time.monotonic() - start >= seconds:
        return "timeout", extracted                         # verify says False when its time is up
    if not equal and values.equal_where_real(gold, prediction):
        trace.append("but equal wherever both are real")
        equal = True
    if equal and values.rounded_away(gold, prediction):
        trace.append("but equal only by rounding")
        equal = False
    if equal and values.other_base(gold, prediction):
        trace.append("but another base")
        equal = False
    return ("ok" if equal else "wrong"), extracted


def _parse_reference(answer, seconds):
    """As inline math, which suits numbers and LaTeX but would end at a newline; else as it is."""
    from math_verify import parse
    parsed = parse(f"${notation.clean(answer)}$", parsing_timeout=seconds)
    if not parsed:
        parsed = parse(answer, parsing_timeout=seconds)
    if not parsed:
        raise ValueError("the reference answer cannot be parsed")
    return parsed


def misstated(text, answer, extracted):
    """Of a response whose answer was found equal to the reference: does its last box (without one, what was
    extracted) state that one answer, worked out? None, or one of statement.FAULTS. Calls no parser."""
    box, why_not = last_box(text)
    letter = reference_letter(answer)
    if letter and choice_letter(text) == letter:
        return None
    return statement.fault(extracted if why_not else box, answer)


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
    r"""(content of the last \boxed{...}, None), or ("", "no_box" or "unclosed"). \boxed 42 holds 42."""
    # Without a brace: a number, or the letter of an option.
    boxes = list(re.finditer(r"\\boxed(?:\s*\{|\s{0,9}([-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?"
                             r"(?:\\?%)?|[A-J](?=[\s.$\\)]|$)))", text))
    if not boxes:
        return "", "no_box"
    if boxes[-1][1]:
        return boxes[-1][1], None
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


def reference_letter(answer):
    r"""The letter A-J that a reference answer is, in any dress: C, (C), C., \text{(C)}; or None."""
    found = re.fullmatch(r"[(\[]?\s*([A-J])\s*[)\].]?", _without_markup(answer).strip())
    return found[1] if found else None


def choice_letter(text):
    r"""The option A-J that a response settles on, or None; two different letters are none.

    In the last box: C, c, (C), C., C), \text{C) ...}, \textbf{(C)} ..., Option C. Without a box: the last
    "answer is C", "option (C)", "Answer: C", where the letter must be a capital ("the answer is a planet").
    """
    box, why_not = last_box(text)
    if why_not == "no_box":
        return _letter_in_prose(_without_markup(text))
    return _letter_in_box(_without_markup(box))                     # "" if it is never closed: no letter


# Behind a letter and its bracket: other options, as in `B) C) D)` and `or (C)`, or that it is wrong.
ANOTHER_LETTER = re.compile(
    r"(?<!\w)[(\[]\s*[A-J]\s*[)\]]|^[A-J]\W*$|^(?:[(\[]?[A-J][)\].:,;\s]+)+[A-J]?$"
    r"|^(?:or|and|not|maybe|but|,|/|&).*\b[A-J]\b|^\W\D*\s[A-J]\W*$|^not\W*$"
    r"|^\W*(?:(?:is|was|seems|can|must|should)\b.{0,20}\b(?:false|untrue|invalid|excluded|eliminated|rejected"
    r"|ruled out|wrong|incorrect)|(?:an? )?(?:wrong|incorrect)|excluded|eliminated|rejected)"
    r"(?: (?:answer|choice|option))?\W*$"
    r"|^(?:is|was|seems|can|does)?(?: ?not|n't) (?:be )?(?:correct|right|true|it|the answer|hold)\W*$")
# ... B
INSTEAD = re.compile(r"\b(?:otherwise|else|instead|rather|unless|perhaps|possibly|if not|but|alternatively"
                     r"|actually|no|nay|wait|hmm|guess|mean|sorry|correction)\b", re.IGNORECASE)


def _without_markup(text):
    return re.sub(r"\\(?:text|math|display|bold|mbox|bf|bm|rm|emph|underline|large|q?quad)\w*|\\[ ,;!()\[\]]"
                  r"|[{}$*`\"]", " ", text)


def _letter_in_prose(text):
    letter = (r"(?i:\s+is)?[\s:]*[(\[]?\s*([A-J])(?![\w'])"                              # is (C
              r"(?!\s*[)\]]?\s*(?:,|/|and|or)\s*[(\[]?\s*[A-J]\b(?! +[a-z]))"            # not: (A) or (C)
              r"(?!(?<=[AI]) +(?!(?:is|and|as|but|because|since)\b)[a-z])")              # nor: A planet
    said = re.findall("(?i:answer)" + letter, text)
    if not said:
        said = re.findall("(?i:option|choice)" + letter, text)
    return said[-1] if said else None


def _letter_in_box(box):
    found = re.fullmatch(r"(?is)\s*(?:the\s+)?(?:(?:correct|final)\s+)?(?:(?:answer|option|choice|point|graph"
                         r"|figure|statement|team|box)(?:\s+is)?)?[\s:]*[(\[]?\s*([A-J])\s*"
                         r"(?:(?:[)\].:]|(?=\())(.*))?", box)
    if not found:
        return None
    letter = found[1].upper()
    rest = (found[2] or "").strip(" .\n")   # the option's text, which may hold letters: "C) P(A) = 0.5"
    if ANOTHER_LETTER.search(rest) or (INSTEAD.search(rest) and re.search(r"\b[A-J]\W*$", rest[-9:])):
        return None
    return letter
