r"""The verdict of the OAT-Grader on a math answer: the grader of the final evaluation (Sec. 5.1, App. B).

    extract(r"so it is $\boxed{\frac12}$")      # '\\frac12'
    equal(r"\frac12", "0.5")                    # True

An answer equals the reference answer (gold) if one of three comparisons says so, the cheapest first:

    string   one spelling of LaTeX, without units (a normalisation made for the MATH data set): same string
    text     LaTeX turned into plain text (that of PRM800K): same string, or element by element by sympy
    latex    Math-Verify parses and compares both. Not with fast=True

It follows the behaviour of `math_grader.py` (github.com/sail-sg/understand-r1-zero), false verdicts included:
only results of one grader can be compared. Where it differs:

1. Every comparison has a limit of CPU time. There the second has none, and hangs on 9**9**9**9, 1e999999999.
2. Math-Verify has one limit in all; there 1 s (by the clock) for each of: parse gold, parse answer, compare.
3. All units are removed at once, not one unit after the other; a few that no answer contains are left out.
4. The text comparison reads 1,000,000,000 as a number; there only numbers with at most two commas.
5. Only the beginning of a long text is searched for repetitions.
6. sympy's parser calls no functions but sqrt, frac, ln and f(x); there, all whose names have two letters.

The text is untrusted, and sympy's parser is `eval`. So it gets only what `_is_formula` knows, token by token,
and finds no other names than `_names`. Still no signal stops C code, and nothing here limits memory: call
`equal` in a process that may be killed (see reward.py), in its main thread; its first call takes 1 s (it
imports sympy and builds Math-Verify's grammar). `extract` is safe anywhere.
To copy it, take this file alone; it needs math-verify, sympy and pylatexenc.
"""
import functools
import keyword
import math
import re
import signal
import string
import threading
import unicodedata
from contextlib import contextmanager
from itertools import pairwise
from os.path import commonprefix

# What the string comparison takes for units, plurals included; many stem from the word problems of MathQA.
# The single letters are the price: `12 m` equals `12`, but `x+a` equals `x+c` as well.
UNITS = """
    a c d g h l m o s t
    acre cc cm cube cubic dm feet ft gal gallon hectare inch inches km liter litre meter metre mile mm mt mtr
    rd sq square yard
    am day hour hr min minute month noon pm sec second year yr
    deg degree east west gm kg lb lt kmh kmph mp mph ohm
    decrease excess gain increase less loss more percent profit pure ratio rise rs rupee
    apple coin man mark men minw monkey number pie rounds soldier tile toy unit woman women
    ab are bc by per prime st th way
""".split()
STRING_UNIT = re.compile(rf"(?<!\w)(?:{'|'.join(UNITS)})s?(?!\w)")
LETTER_AND_ONE = re.compile(r"(?<!\w)[a-hq] .(?!\w)")   # meant for "a . m": so `b - 1` equals 1

TEXT_UNIT = re.compile(                                 # inside words too: "sunday" is "sun"
    "(?:centimeter|cm|day|degree|feet|foot|hour|inch|meter|mile|minute|month|second|week|yard|year)"
    r"(?:es)?s? *(?:\^[0-9]+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")      # the comma in 1,000
FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")    # of integers: 3/4, -3./4.

# All that sympy's parser may see. A point belongs to a number, an underscore to a number or an index, x_1. So
# nothing can name an attribute, quote a string, pass a keyword or index a list. (?>...): a token is as long
# as it can be, as it is to Python, so that in x1.n there is no number 1.
FORMULA = re.compile(r"(?>[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+|[^\W\d_]+(?:_?[0-9]+)?|[-+*/^!()\s])*")
FUNCTIONS = ("sqrt", "frac", "ln")
LONG = 128              # characters from which on a text is searched for repetitions, ...
SEARCHED = 1024         # ... and as many of it are


def extract(text):
    r"""The content of the last \boxed{...}; None if there is none, or if it is never closed.

    None too if anything but a brace follows the last \boxed, as in \boxed {5}. \fbox does not count.
    """
    start = text.rfind(r"\boxed")
    if not text.startswith(r"\boxed{", start):
        return None
    start += len(r"\boxed{")
    depth = 1                                                   # of open braces, the box's own included
    for brace in re.compile("[{}]").finditer(text, start):      # escaped ones (\{) too: they come in pairs
        if brace[0] == "{":
            depth += 1
        else:
            depth -= 1
        if depth == 0:
            return text[start:brace.start()]
    return None


def equal(given, gold, fast=False, seconds=1, trace=None):
    r"""Whether the answer `given` (from `extract`) equals the reference answer `gold`. str, str -> bool

    gold     may contain a \boxed{...}; then its content is meant
    fast     leaves out Math-Verify: faster on wrong answers, but denies that \frac{2}{4} is \frac{1}{2}
    seconds  > 0, of CPU time, for each of the three comparisons; one that does not finish says no
    trace    a list to which one line a comparison is appended, to see why an answer earned nothing
    No text makes it raise. RuntimeError: called outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("equal: call it in the main thread: its time limits are signals")
    # Here, and not at the top, because `extract` needs none of it; and on no comparison's time.
    import math_verify  # noqa: F401
    import pylatexenc.latex2text  # noqa: F401
    import sympy.parsing.sympy_parser  # noqa: F401
    if trace is None:
        trace = []
    if r"\boxed" in gold:
        gold = extract(gold)
    if gold is None:
        trace.append("gold: its box is never closed")
        return False
    comparisons = {"string": _equal_strings, "text": _equal_texts}
    if not fast:
        comparisons["latex"] = _equal_latex
    for name, compare in comparisons.items():
        if _in_time(name, compare, given, gold, seconds, trace):
            return True
    return False


def _in_time(name, compare, given, gold, seconds, trace):
    """What `compare` says of the two; False if it does not finish or fails."""
    try:
        with _time_limit(seconds):
            return compare(given, gold, trace)
    except _OutOfTime:
        trace.append(f"{name}: out of time ({seconds} s of CPU)")
    except Exception as error:      # parsers raise anything on nonsense, MemoryError and RecursionError too
        trace.append(f"{name}: {type(error).__name__}")
    return False


class _OutOfTime(BaseException):
    """Not an Exception: sympy and Math-Verify catch those, and would carry on without a limit."""


@contextmanager
def _time_limit(seconds):
    """Raises _OutOfTime in its block after `seconds` of CPU time: a busy machine changes no verdict.

    Its signal is SIGPROF; an alarm (SIGALRM) of the caller is not touched.
    """
    over = False

    def ring(signum, frame):
        if not over:
            raise _OutOfTime

    before = signal.signal(signal.SIGPROF, ring)
    try:
        # Again each tenth of a second: Python drops what is raised in a destructor or a weak reference's
        # callback, of which garbage collection runs many, and the block would go on without a limit.
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
        try:
            yield
        finally:
            over = True
    finally:                            # apart, because it may ring before the line above
        over = True
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _record(trace, comparison, given, gold, verdict):
    """Add a line to the trace, such as "text: '0.5' != '1/2'"; returns the verdict."""
    sign = "=" if verdict else "!="
    trace.append(f"{comparison}: {_shortened(given)} {sign} {_shortened(gold)}")
    return verdict


def _shortened(text):
    if len(text) > 200:
        text = text[:200] + "..."
    return repr(text)


# ---- 1. string ----------------------------------------------------------------------------------------

def _equal_strings(given, gold, trace):
    given = _one_spelling(given)
    gold = _one_spelling(gold)
    return _record(trace, "string", given, gold, given == gold)


def _one_spelling(latex):
    r"""One string for all usual spellings of an answer: "x = \dfrac12\text{ cm}" -> "\frac{1}{2}".

    The steps are those of the OAT-Grader and come in its order; each sees what the ones before have made.
    """
    latex = re.sub(r"^\\text\{(.+)\}$", r"\1", latex.strip()).strip()   # \text{yes} -> yes
    latex = re.sub(r"\n|\\!", "", latex)
    latex = re.sub(r"\\\\", r"\\", latex)                               # \\frac -> \frac
    latex = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", latex)
    latex = re.sub(r"\\end\{array\}", r"\\end{pmatrix}", latex)
    latex = re.sub("bmatrix", "pmatrix", latex)
    latex = re.sub("[td]frac", "frac", latex)
    latex = re.sub(r"\\([nlg])eq", r"\\\1e", latex)                     # \leq -> \le
    latex = re.sub(r"\\left|\\right", "", latex)

    latex = re.sub(r"\\text{.*?}$", "", latex).strip() or latex         # 5\text{ cm} -> 5; \text{B} stays
    for unit in (LETTER_AND_ONE, STRING_UNIT):
        latex = unit.sub("", latex) or latex                            # what is only a unit stays: c
    latex = re.sub(r"\^\\circ|\^\{\\circ\}|\\\$|\\%", "", latex)
    latex = re.sub(r"\\text\{ (?!.*\\text\{ ).*", "", latex)            # 5\text{ m}^2 -> 5

    latex = re.sub(r"(^|[ {])\.", r"\g<1>0.", latex)                    # .5 -> 0.5
    latex = re.sub("^[^=]{0,2}=([^=]*)$", r"\1", latex)                 # x=5 -> 5
    latex = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", latex)               # \sqrt2 -> \sqrt{2}
    latex = latex.replace(" ", "")
    latex = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", latex)     # \frac12 -> \frac{1}{2}
    latex = re.sub(r"\\frac([^{]){", r"\\frac{\1}{", latex)             # \frac1{72} -> \frac{1}{72}
    latex = re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", latex)      # 1/2 -> \frac{1}{2}
    if latex == "0.5":
        return r"\frac{1}{2}"
    return latex


# ---- 2. text ------------------------------------------------------------------------------------------

def _equal_texts(given, gold, trace):
    given = _as_text(given)
    gold = _as_text(gold)
    if _record(trace, "text", given, gold, given == gold):
        return True
    given_elements = _elements(given)
    gold_elements = _elements(gold)
    if len(given_elements) != len(gold_elements):
        return False
    if len(gold_elements) > 1 and (given[0], given[-1]) != (gold[0], gold[-1]):
        return False                                    # (0,1) is not [0,1]
    for given_element, gold_element in zip(given_elements, gold_elements):
        if not _equal_elements(given_element, gold_element, trace):
            return False
    return True


def _as_text(latex):
    r"""Plain text that sympy may read: "$2 \frac{3}{4}$ miles" -> "2+3/4", "(1, \sqrt{2}]" -> "(1,sqrt(2)]".

    Structure may get lost: \frac{x+1}{2} and x+\frac12 are both "x+1/2".
    """
    text = re.sub(r"\\?[$%]", "", latex)
    text = re.sub(" (or|and) ", " , ", text)
    for word, power in [("million", 6), ("billion", 9), ("trillion", 12)]:
        text = text.replace(word, f"*10^{power}")
    text = TEXT_UNIT.sub("", text)
    text = re.sub(r"\^ *\\circ", "", text)
    text = re.sub(r",\\! *", "", text)                  # 11,\! 111 -> 11111
    if "\\" in text:
        text = _latex_to_text(text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)   # mixed numbers: 2 3/4 -> 2+3/4
    text = re.sub("[ {}]", "", text).lower()
    return _integer(text) or text


def _latex_to_text(latex):
    from pylatexenc.latex2text import LatexNodes2Text
    latex = re.sub(r"\\[td]?frac", r" \\frac", latex)   # the space keeps 2\frac{3}{4} from becoming 23/4
    names = {"√": "sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*"}
    return LatexNodes2Text().latex_to_text(latex).translate(str.maketrans(names))


def _integer(text):
    """"1,000.0" -> "1000", "1e3" -> "1000"; None for what is no integer."""
    try:
        number = float(THOUSANDS.sub("", text))
    except ValueError:
        return None
    if not math.isfinite(number) or abs(number - round(number)) > 1e-7:
        return None
    return str(round(number))


def _elements(text):
    """"(1,2]" -> ["1", "2"]. What is not inside one pair of brackets is one element: "1,2" -> ["1,2"]."""
    text = THOUSANDS.sub("", text)
    inside = re.fullmatch(r"[()\[\]]([^()\[\]]+)[()\[\]]", text)
    if not inside:
        return [text]
    return inside[1].split(",")


def _equal_elements(given, gold, trace):
    if FRACTION.fullmatch(given) and FRACTION.fullmatch(gold):      # 2/4 for 1/2: it has to be reduced
        return _record(trace, "fractions", given, gold, given == gold)
    if bool(_integer(given)) != bool(_integer(gold)):               # 4/2 for 2: it has to be computed
        return _record(trace, "only one is an integer", given, gold, False)
    return _equal_by_sympy(f"({gold})-({given})", trace)


def _equal_by_sympy(difference, trace):
    """Whether sympy simplifies the difference of two answers to 0; no, for what is no formula or is huge."""
    from sympy import simplify
    from sympy.parsing import sympy_parser as parser
    letters = {char for char in re.sub("sqrt|frac", "", difference) if char.isalpha()}
    huge = r"\^\(|\^[0-9]+\^|\^[0-9][0-9]|e[+-]?[0-9]{6}"           # the last: no signal stops 1e999999999
    if len(letters) > 2 or re.search(huge, difference) or not _is_formula(difference):
        trace.append(f"sympy: {difference[:400]!r} is not parsed")  # with more letters: a word, no formula
        return False
    transformations = parser.standard_transformations + (parser.implicit_multiplication_application,)
    parsed = parser.parse_expr(difference.replace("^", "**"), transformations=transformations,
                               global_dict=_names())
    zero = bool(simplify(parsed) == 0)
    trace.append(f"sympy: {difference[:400]!r} -> {'0' if zero else 'not 0'}")
    return zero


def _is_formula(text):
    """Whether text may reach `eval`: numbers, letters, their products, FUNCTIONS, operators and brackets."""
    if not FORMULA.fullmatch(text):
        return False
    for word, bracket in re.findall(r"([^\W\d_]+)[0-9_]*\s*(\(?)", text):
        # A call. Of xsqrt(5), too: where LaTeX has become text, letters run into what follows.
        if bracket and len(word) > 1 and not word.endswith(FUNCTIONS):
            return False
        # Python reads a script e as e: what it reads must be what was looked at.
        if keyword.iskeyword(word) or unicodedata.normalize("NFKC", word) != word:
            return False
    return True


@functools.cache
def _names():
    """All that names in a formula can mean when it is evaluated, no built-ins; others become unknowns."""
    import sympy
    names = {"__builtins__": {}}
    # The parser writes these itself, for numbers, letters, ! and, where it shall not evaluate, for operators.
    written = ("Number", "Integer", "Float", "Rational", "Symbol", "Function", "factorial", "factorial2",
               "Add", "Mul", "Pow")
    for name in (*FUNCTIONS, "pi", *string.ascii_letters, *written):
        if hasattr(sympy, name):                                        # of the letters: E, I, N, O, Q, S
            names[name] = getattr(sympy, name)
    return names


def evaluate_formulas_only():
    """From now on, whoever asks sympy in this process to evaluate a text, it must be a formula.

    sympy itself asks for each number in LaTeX, Math-Verify for those outside of it. What they pass on they
    have seen to be digits and operators; this does not depend on their next versions. It is faster, too: of
    its own accord, sympy's parser gathers all names of sympy each time.
    """
    import math_verify.parser
    from sympy.parsing import sympy_parser
    parse = sympy_parser.parse_expr

    def guarded(text, local_dict=None, transformations=sympy_parser.standard_transformations,
                global_dict=None, evaluate=True):
        if not _is_formula(text):
            raise SyntaxError(f"no formula, so it is not evaluated: {text[:200]!r}")
        return parse(text, local_dict, transformations, _names(), evaluate)

    sympy_parser.parse_expr = guarded
    math_verify.parser.parse_expr = guarded


# ---- 3. latex -----------------------------------------------------------------------------------------

def _equal_latex(given, gold, trace):
    from math_verify import verify
    for text in (given, gold):
        if len(text) > LONG and _repetitive(text):
            trace.append("latex: too repetitive")
            return False
    given_parsed = _parse_latex(given)
    gold_parsed = _parse_latex(gold)
    # verify is asymmetric: the reference comes first. No limit of its own, which would be a SIGALRM.
    return _record(trace, "latex", given, gold, verify(gold_parsed, given_parsed, timeout_seconds=None))


def _parse_latex(text):
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    config = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    if "$" not in text:
        text = f"${text}$"
    return parse(text, config, fallback_mode="no_fallback", parsing_timeout=None)


def _repetitive(text):
    """Whether over a fifth of all substrings are repeats, as in x+x+x+x...: no answer, and slow to parse.

    Each of the sorted suffixes repeats as many substrings as it shares characters with the one before.
    """
    text = text[:SEARCHED]
    suffixes = sorted(text[start:] for start in range(len(text)))
    repeats = sum(len(commonprefix(pair)) for pair in pairwise(suffixes))
    return repeats > 0.2 * len(text) * (len(text) + 1) / 2
