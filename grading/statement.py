r"""Does a box state ONE answer, and worked out as far as the reference is? Asked of answers that are equal.

    fault(r"47+35-60", "22")                    # "unevaluated": it is 22, but it restates the problem
    fault(r"41 = 42", "42")                     # "ambiguous": a chain, a hedge, a denial, another unit
    fault(r"x = 42\text{ cm}", "42")            # None: a name with one equals sign, a unit

A parser that shall find an answer in any text skips what it does not know. To it `> 42`, `42 or not` and
`41 = 42` are 42, and a policy that is rewarded for them learns to write them. 47+35-60 is 22 indeed, and a
policy that is rewarded for that learns to copy the problem.

unevaluated   The answer has an operation that the reference has not, see OPERATIONS. Worked out as they stand
              are fractions, mixed numbers, percent, scientific notation, roots, powers, and the coefficients
              of roots, pi, i or a unit.
ambiguous     Beside the value stand more values than the reference has, a relation other than that of a name,
              words of logic, another unit than the reference's, a percent sign that only one of the two has,
              or signs without a meaning here.

One pass over tokens: no parser, no evaluation, safe in any process, in time linear in the length of the text.
"""
from collections import Counter
from dataclasses import dataclass, field

from grading.notation import boxed, clean, reference, split_modulus
from grading.tokens import ARGUMENTS, kinds, tokenize

# What an answer must not have unless the reference has it, or one of those behind it, whose result may have
# it: the sine of 75 degrees is a sum of roots, and an integral may come to a logarithm.
OPERATIONS = {
    "arithmetic": ("function", "exponential", "factorial", "calculus"),     # sums, and products of numbers
    "numbers": ("function", "exponential", "factorial", "calculus"),        # those of rational numbers alone
    "function": ("exponential", "calculus"),
    "exponential": ("function", "calculus", "unknown"),                     # e to the i, or to an unknown
    "factorial": ("calculus",),                                             # and binomials
    "calculus": (),                                                         # integral, limit, sum, derivative
    "unknown": ("calculus",)}                                               # a letter, neither name nor unit
FAULTS = ("unevaluated", "ambiguous")
INEQUALITIES = {"<", "<="}
# x > 3 is 3 < x: what is asked here has been found equal.
SAME = {r"\lt": "<", r"\gt": "<", ">": "<", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", ">=": "<=",
        r"\ge": "<=", r"\geq": "<=", r"\geqslant": "<=", "==": "=", ":=": "=", r"\simeq": r"\approx",
        r"\doteq": r"\approx"}
OPERANDS = {"number", "frac", "group", "root", "power", "constant", "letter", "unit", "factorial", "over"}

# Words that take back, qualify or multiply what they stand beside. All others carry no logic.
LOGIC = set("""
    not no nor neither never none without except excluding but unless if iff wrong incorrect incorrectly
    false untrue invalid cannot can't maybe perhaps possibly probably likely either otherwise else
    rather instead alternatively alternative vs versus between under over below above less more fewer
    greater larger smaller bigger least most than almost nearly guess unknown undefined impossible plus
    minus opposite negative inverse reciprocal double triple half halves quarter third tenths twice thrice
    dozen hundred thousand million billion trillion lakh crore myriad mod modulo depending depends doubt
    unsure assuming only until unlike contradiction nope nah isnt doesnt dont cant etc
    nicht kein oder falsch ou pas faux
    """.split())
# Behind a value only: where a sentence about it begins, and what makes it another one.
BEHIND = set("""
    is are was were be may might could would should can will must does do did has have seems think
    believe fails fail failed rejected excluded omitted eliminated denied extraneous bogus
    erroneous mistake mistaken error guessing hopefully presumably supposedly up upward upwards onward
    onwards counting squared cubed doubled tripled halved negated reversed backwards factorial point root
    mille permille promille permil ppm bps basis base fold score gross kilo mega giga micro nano k M B bn
    mn mln mil mio
    """.split())
# The same in Chinese: not, or, wrong; a hundred to a hundred million; minus, twice, half, more, less.
LOGIC_SIGNS = set("\u4e0d\u975e\u6216\u5426\u9519\u932f\u65e0\u7121\u6ca1\u672a"
                  "\u767e\u5343\u4e07\u842c\u4ebf\u5104\u8d1f\u53cd\u500d\u534a\u591a\u5c11\u5927\u5c0f")

UNITS = kinds(
    mm="mm millimeter millimetre", cm="cm centimeter centimetre", m="m meter metre",
    km="km kilometer kilometre", inch="inch inche in", ft="ft foot feet", yd="yd yard", mile="mi mile",
    g="g gram", kg="kg kilogram", mg="mg milligram", lb="lb lbs pound", oz="oz ounce", ton="ton tonne",
    s="s sec second", min="min minute", h="h hr hour", day="day", week="week", month="month",
    year="yr year", deg="degree deg", rad="rad radian", dollar="dollar usd", cent="cent", euro="euro eur",
    l="l liter litre", ml="ml milliliter millilitre", gallon="gal gallon", newton="newton", joule="joule",
    watt="watt", volt="volt", ohm="ohm", hz="hz hertz", acre="acre", pascal="pa pascal", kelvin="kelvin",
    mol="mol mole", nm="nm nanometer nanometre", um="um micrometer micrometre micron",
    dm="dm decimeter decimetre", ms="ms millisecond", rupee="rupee rs", yen="yen")
SPEEDS = {"mph": "mile", "kmh": "km", "kph": "km", "kmph": "km"}
SINGLE_UNITS = set("mgshlLJNWVAKCF") | {r"\Omega", r"\mu"}      # letters that after a number may be a unit


def fault(box, answer):
    """What is wrong with how a box states an answer that was found equal to the reference `answer`: None,
    "unevaluated" or "ambiguous"."""
    answer, modulus = split_modulus(reference(answer))
    box = boxed(box)
    if modulus:
        box, _ = split_modulus(box)
    answer = clean(answer)
    given, wanted = Reading(clean(box)), Reading(answer)
    if given.tokens == wanted.tokens:
        return None
    if {"arithmetic", "unknown"} <= wanted.operations and not (given.letters or given.words or given.names):
        return "ambiguous"                          # 3 for 3 + d: a unit, the parser thinks
    # With its names: y = 5 - x is x + y = 5.
    wanted.operations |= Reading(answer, names=True).operations
    missing = set()
    if given.letters <= wanted.all_letters:
        given.operations.discard("unknown")         # s/2 for 0.5 s
    for operation in given.operations - wanted.operations:
        if not wanted.operations.intersection(OPERATIONS[operation]):
            missing.add(operation)
    if missing - {"unknown"}:
        return "unevaluated"
    if _ambiguous(given, wanted):
        return "ambiguous"
    if missing and not _is_a_name(given, wanted):
        return "unevaluated"
    return None


def _is_a_name(given, wanted):
    """Of the letter of 3 < x <= 4, for the interval (3, 4]; or of a point, for words: P, for \\text{P}."""
    return not wanted.values or _is_an_interval_as_relations(given, wanted)


def _is_an_interval_as_relations(given, wanted):
    return wanted.interval and len(given.letters) == 1 and INEQUALITIES.issuperset(given.relations)


def _ambiguous(given, wanted):
    if given.strange - wanted.strange or given.percent != wanted.percent:
        return True
    if (wanted.strange - given.strange) & {"prime", "a line over it"}:
        return True
    if {word for word in given.words if denies(word)} - wanted.words:
        return True
    if given.relations - wanted.signs and not _is_an_interval_as_relations(given, wanted):
        return True
    if given.names > max(1, wanted.names):
        return True
    if given.sets != wanted.sets and given.interval != wanted.interval:
        return True                                 # {1, 2} for (1, 2)
    if given.names and not wanted.values and given.words - wanted.words:
        return True                                 # Sunday = Monday
    if wanted.values and given.values > wanted.values + wanted.members:
        return True
    if not wanted.values and given.phrases > wanted.phrases:
        return True
    letters = given.letters or wanted.letters       # of a formula, in which m is none of metres
    if wanted.things and given.things and wanted.things.isdisjoint(given.things) and not letters:
        return True
    return bool(wanted.units) and not given.units <= wanted.units


def denies(word):
    """Whether a word is one of logic, in lower case."""
    stem = word.removesuffix("s").removesuffix("th")            # tenths, millions
    return word in LOGIC or stem in LOGIC or word.endswith("n't") or not LOGIC_SIGNS.isdisjoint(word)


# ----------------------------------------------------------------------------------------------------------
# Reading.

@dataclass
class Frame:
    """What stands in one pair of brackets, or is one argument of a command; one frame is around all."""
    kind: str                           # "all", "set", "matrix", "group", or the command that it belongs to
    after: str = ""                     # the kind of what stands before it
    last: str = ""                      # the kind of the last thing in it so far, ...
    token: str = ""                     # ... and its last token
    base: str = ""                      # the token before an exponent
    tokens: int = 0
    pending: list = field(default_factory=list)     # the arguments that the last command waits for
    fraction: list = field(default_factory=list)    # the numerator, closed, of which the denominator follows
    # Of the current term:
    factors: list = field(default_factory=list)     # its numbers, each one's kind
    others: int = 0                                 # its roots of numbers, its matrices
    quotients: int = 0                              # its slashes
    mixed: bool = False                             # whether it has more than these: letters, roots, powers
    units: bool = False                             # whether a unit has begun, ...
    measure: str = ""                               # ... and the last one, which an exponent may follow
    # Of all terms:
    numbers: int = 0
    fractions: int = 0                  # slashes included
    arithmetic: bool = False
    addends: int = 0                    # terms of fractions and whole numbers, since a comma or relation
    combined: bool = False              # whether several of these are added, or any numbers multiplied
    irrational: bool = False            # whether a term was mixed
    letters: bool = False               # whether an unknown is in it
    imaginary: bool = False
    commas: int = 0
    signed: bool = False                # whether it begins with a sign


class Reading:
    """What a text states.

    operations  of OPERATIONS
    letters     its unknowns                all_letters  those of units, names and words, too
    words       in lower case               signs     Counter of all relations
    relations   the same without those between a name and its value, unless `names` asks for these
    names       the most that one value has
    values      how many are listed, two for each plus-minus
    members     how many more may be meant: 1,200 may be two, and so may (3, 4)
    phrases     how many parts the commas make
    interval    whether it has a pair in brackets, or one set without another
    sets        whether it has braces of a set
    units       set of units, each a set of (unit, power)
    things      what is counted: single units, and all longer words behind a value
    percent     whether there is a percent sign
    strange     tokens without a meaning here: dots, primes after numbers, doubled signs, unknown commands
    """

    def __init__(self, text, names=False):
        self.tokens = tokenize(text)
        rest, self.names = without_names(self.tokens)
        if names:
            rest = self.tokens
        self.signs = _relations(self.tokens)
        self.relations = _relations(rest)
        self.all_letters = set()
        for kind, token in self.tokens:
            if kind == "letter":
                self.all_letters.add(token)
            elif kind == "word":
                self.all_letters.update(token)          # of mv^2
        self.words = {token.lower() for kind, token in self.tokens if kind == "word"}
        self.operations, self.letters, self.strange, self.units = set(), set(), set(), set()
        self.things = set()
        self.percent = self.interval = self.sets = False
        self.values = self.members = self.bars = 0
        self.phrases = 1
        self._in_value = self._after_words = self._after_or = False
        self._unit = Counter()          # of the current value
        self._exponent_to_come = self._sign = 1      # of the unit to come, after "square" or "per"
        self._subscripts = 0            # open ones: what they hold does not count
        self._frames = [Frame("all")]
        for kind, token in rest:
            if kind not in ("brace", "unbrace", "opening"):
                self._frame.pending = []
            if kind not in ("unbrace", "closing"):
                self._frame.tokens += 1
            if kind in ARGUMENTS:
                self._frame.base = self._frame.token
                self._frame.pending = [kind] * ARGUMENTS[kind]
            else:
                getattr(self, "_" + kind)(token)
            self._frame.token = token
        self._finish()

    @property
    def _frame(self):
        return self._frames[-1]

    def _finish(self):
        while len(self._frames) > 1:    # brackets that are never closed
            self._leave()
        self._end_term()
        self._end_value()
        if self._frame.pending:
            self.strange.add("no argument")
        self._add_up(self._frame)
        if self.bars > 1 and not self.letters:
            self.operations.add("function")
        if self.letters:
            self.operations.add("unknown")

    # ---- Frames, terms, values

    def _enter(self, kind):
        self._subscripts += kind == "sub"
        self._frames.append(Frame(kind, after=self._frame.last))

    def _leave(self):
        """Close the last frame; returns it."""
        self._end_term()
        frame = self._frames.pop()
        if frame.kind == "sub":
            self._subscripts -= 1
            return frame
        # 2^{n+1} can be worked out no further.
        if not (frame.kind == "power" and frame.letters):
            self._add_up(frame)
        self._frame.letters |= frame.letters
        self._frame.imaginary |= frame.imaginary
        self._frame.mixed |= frame.irrational
        return frame

    def _add_up(self, frame):
        if frame.arithmetic:
            self.operations.add("arithmetic")
        if frame.combined:
            self.operations.add("numbers")

    def _end_term(self):
        """Several numbers in one term are a product, but for 4.5 x 10^3 and the mixed number 4 2/3."""
        frame = self._frame
        as_it_stands = frame.factors in (["number", "power of ten"], ["number", "proper fraction"])
        if (len(frame.factors) > 1 and not as_it_stands) or frame.others > 1 or frame.quotients > 1:
            frame.arithmetic = True
            frame.combined |= len(frame.factors) - frame.factors.count("irrational") > 1 or frame.others > 1
        frame.addends += bool(frame.factors) and not frame.mixed
        frame.combined |= frame.addends > 1
        frame.irrational |= frame.mixed
        frame.factors, frame.others, frame.quotients, frame.units, frame.mixed = [], 0, 0, False, False

    def _operand(self, kind, numeric=False, factor=None):
        """A number, root, letter, ... has ended. numeric: it is a number; factor: of which kind."""
        frame = self._frame
        if numeric:
            frame.numbers += 1
            if frame.last == "slash":
                frame.quotients += 1
                frame.fractions += 1
            else:
                product = factor == "proper fraction" and frame.last == "times"         # no mixed number
                frame.factors.append("fraction" if product else factor or kind)
        else:
            frame.mixed = True
        frame.last = kind
        frame.measure = ""
        if self._is_listed():
            # A comma begins another value, and so does a number after words.
            self.values += not self._in_value or (numeric and self._after_words)
            if numeric and self._after_words:
                self._end_unit()
            self._in_value, self._after_words, self._after_or = True, False, False

    def _is_listed(self):
        """Whether what comes is a value of its own, and not inside of one."""
        return len(self._frames) == 1 or (len(self._frames) == 2 and self._frame.kind == "set")

    def _end_unit(self):
        if self._unit:
            self.units.add(frozenset(self._unit.items()))
        self._unit = Counter()
        self._exponent_to_come = self._sign = 1

    def _end_value(self):
        self._end_unit()
        if self._after_or:
            self.strange.add("or")      # and no value after it: "42 or so"
        self._in_value = self._after_words = self._after_or = False

    def _operation(self, name):
        if not self._subscripts:
            self.operations.add(name)

    # ---- Tokens, by kind

    def _number(self, token):
        if len(self._frames) == 1:
            self.members += token.count(",")
        self._operand("number", numeric=True)

    def _letter(self, token):
        frame = self._frame
        if token in SINGLE_UNITS and (frame.units or frame.last in OPERANDS - {"letter"}):
            self.things.add(UNITS.get(token.lower(), token))
            frame.units = True
            frame.last = "unit"
            return
        if not self._subscripts:
            self.letters.add(token)
            frame.letters = True
        self._operand("letter")

    def _constant(self, token):
        self._frame.imaginary |= token == "i"
        self._operand("constant")

    def _word(self, token):
        if self._subscripts:
            return
        self._after_words = self._in_value
        word = token.lower()
        if self.values and (token in BEHIND or (word in BEHIND and len(word) > 1)):
            self.strange.add(word)
        for name in (word, word.removesuffix("s"), word.removesuffix("es")):
            # "in" is a word, unless it stands right behind a number or "square".
            if name in UNITS and (word != "in" or self._frame.last in OPERANDS or self._exponent_to_come > 1):
                self._unit[UNITS[name]] += self._exponent_to_come * self._sign
                self._exponent_to_come = self._sign = 1
                self.things.add(UNITS[name])
                self._frame.units, self._frame.measure, self._frame.last = True, UNITS[name], "unit"
                return
        if word in SPEEDS:
            for part in (SPEEDS[word], "per", "h"):
                self._word(part)
        elif word in ("square", "sq", "cubic", "cu"):
            self._exponent_to_come = 2 if word.startswith("s") else 3
        elif word == "per":
            self._sign = -1
        if self._in_value and len(word) > 3:            # not of 2abc
            self.things.add(word.removesuffix("s"))
        self._frame.last = "word"

    def _money(self, token):
        unit = "dollar" if token == r"\$" else token
        self._unit[unit] = 1
        self.things.add(unit)

    def _percent(self, token):
        self.percent = True
        self._frame.last = "percent"

    def _plus(self, token):
        frame = self._frame
        if token in (r"\pm", r"\mp") and self._is_listed():
            self.values += 1
        if frame.last in OPERANDS or frame.last == "percent":
            self._end_term()
            frame.arithmetic = True
        elif frame.last == "plus":
            self.strange.add("two signs")
        elif frame.tokens == 1:
            frame.signed = True
        frame.last = "plus"

    def _times(self, token):
        if not self._frame.last:
            self.strange.add("nothing multiplied")
        self._frame.arithmetic |= token == r"\div"
        self._frame.last = "times"

    def _slash(self, token):
        self._frame.last = "slash"
        if self._frame.measure:
            self._sign = -1

    def _factorial(self, token):
        if self._frame.last in OPERANDS:
            self._operation("factorial")
            self._frame.last = "factorial"
        else:
            self.strange.add(token)

    def _function(self, token):
        self._operation("function")
        self._operand("function")

    def _calculus(self, token):
        self._operation("calculus")
        self._operand("function")

    def _separator(self, token):
        self._relation(token)
        self._frame.commas += 1
        if self._is_listed():
            self.phrases += 1
            self._end_value()
            self._after_or = token == "or"
        elif token == "or":
            self.strange.add(token)     # 42 (or 43)

    def _relation(self, token):
        self._end_term()
        self._frame.addends = 0
        self._frame.last = ""

    def _bar(self, token):
        self.bars += 1
        self._frame.last = "" if self.bars % 2 else "group"

    def _mark(self, token):
        if token in (":", r"\cup", r"\cap", r"\setminus", r"\backslash"):
            self.members += token == r"\cup"
            self.interval |= token in (r"\setminus", r"\backslash")
            self._end_term()
            self._frame.last = ""
        elif token in (r"\circ", r"\degree"):
            self._unit["deg"] = 1
            self.things.add("deg")
            self._frame.last = "unit"

    def _prime(self, token):
        self.strange.add("prime")

    def _dots(self, token):
        if not (self._frame.last == "number" and "." in self._frame.token):      # 0.333...
            self.strange.add("dots")

    def _strange(self, token):
        self.strange.add(token)

    # ---- Brackets and arguments

    def _opening(self, token):
        pending = self._frame.pending
        if pending:                                     # sqrt(2)
            self._enter(pending.pop(0))
        elif token.startswith(r"\begin"):
            self._enter("matrix")
            if "vmatrix" in token:                      # a determinant
                self._operation("function")
        else:
            self._enter("set" if token in (r"\{", r"\lbrace") else "group")

    def _closing(self, token):
        if len(self._frames) == 1 or self._frame.kind in ("frac", "binomial", "power", "sub", "over"):
            self._frame.last = "group"                  # of an interval such as ]1,2[
            return
        closed = self._leave()
        if closed.kind == "root":
            self._argument(closed)
            return
        self.interval |= closed.commas == 1 and closed.kind == "group"
        self.sets |= closed.kind == "set"
        self.members += closed.commas
        if closed.kind == "matrix":
            self._frame.others += 1
        if closed.signed and closed.after == "plus" and not closed.commas:
            self._frame.arithmetic = True               # -(-5)
        numeric = closed.kind == "group" and closed.numbers > 0 and not closed.letters and not closed.commas
        self._operand("group", numeric, "irrational" if closed.irrational else "group")
        self._frame.quotients += numeric and closed.fractions > 0               # 1/(1/22)

    def _brace(self, token):
        self._enter(self._frame.pending.pop(0) if self._frame.pending else "group")

    def _unbrace(self, token):
        while len(self._frames) > 1 and self._frame.kind in ("group", "set", "matrix"):
            self._leave()                               # a bracket without its other half: \frac{(1}{2}
        if len(self._frames) > 1:
            self._argument(self._leave())

    def _argument(self, closed):
        """An argument of a command has been read to its end."""
        frame = self._frame
        if closed.kind == "frac":
            frame.fraction.append(closed)
            if len(frame.fraction) == 2:
                self._fraction(*frame.fraction)
                frame.fraction = []
        elif closed.kind == "root":
            frame.others += not closed.letters
            self._operand("root")
        elif closed.kind == "power":
            self._exponent(closed)
        elif closed.kind == "over":
            if closed.numbers or (closed.tokens == 1 and len(closed.token) == 1):       # of AB it is a figure
                self.strange.add("a line over it")
            self._operand("over")
        elif closed.kind == "sub" and closed.after == "number" and (closed.signed or not closed.numbers):
            self.strange.add("no base")
        elif closed.kind == "binomial" and not frame.pending:
            self._operation("factorial")
            self._operand("factorial")

    def _fraction(self, numerator, denominator):
        frame = self._frame
        unknown = numerator.letters or denominator.letters
        numeric = numerator.numbers + denominator.numbers > 0 and not unknown
        if numeric:
            # A fraction of fractions is a quotient that is to be worked out.
            frame.arithmetic |= numerator.fractions + denominator.fractions > 0
            frame.fractions += 1
        factor = "proper fraction" if _is_proper(numerator, denominator) else "fraction"
        if numerator.irrational or denominator.irrational:
            factor = "irrational"
        self._operand("frac", numeric, factor)

    def _exponent(self, closed):
        frame = self._frame
        if closed.tokens == 1 and closed.token in (r"\circ", r"\degree"):
            frame.last = "unit"
        elif closed.tokens == 1 and closed.token in (r"\prime", "'"):
            self._prime(closed.token)
        elif frame.last == "unit" and frame.measure:
            if closed.token.isdigit() and len(closed.token) == 1:
                self._unit[frame.measure] *= -int(closed.token) if closed.signed else int(closed.token)
        elif frame.last == "number" and frame.factors:
            frame.mixed = True
            frame.factors[-1] = "power of ten" if frame.base == "10" else "power"
            if closed.letters:
                frame.factors.pop()                     # 5 times 2^n is no product of numbers
        if frame.base == "e" and (closed.letters or closed.imaginary):
            self._operation("exponential")
        if frame.last != "unit" and frame.last != "function":
            frame.last = "power"


def _relations(tokens):
    return Counter(SAME.get(token, token) for kind, token in tokens if kind == "relation")


def _is_proper(numerator, denominator):
    """Whether a fraction may follow the whole number of a mixed one: 2/3, but not 4/3 or pi/3."""
    texts = [numerator.token, denominator.token]
    if numerator.tokens != 1 or denominator.tokens != 1 or not all(text.isdigit() for text in texts):
        return False
    return (len(texts[0]), texts[0]) < (len(texts[1]), texts[1])


def without_names(tokens):
    """(tokens without the names of values and the signs behind these, the most names that one value has):
    `x = 5` -> `5`, `m+n = 5, \\text{Area} = 6` -> `5, 6`; nothing of `41 = 42`, `f(41) = 42`, `2x = 5`."""
    found, part = [], []                # part: what came since the last comma or relation
    depth = names = most = 0
    for kind, token in tokens:
        depth += (kind in ("opening", "brace")) - (kind in ("closing", "unbrace"))
        part.append((kind, token))
        if depth > 0 or kind not in ("separator", "relation"):
            continue
        approximately = SAME.get(token, token) == r"\approx"
        if SAME.get(token, token) in ("=", r"\in", r"\approx") and is_name(part[:-1]):
            names += 1
            most = max(most, names)
        elif not (approximately and len(part) == 1):
            found += part
        if kind == "separator":
            names = 0
        part = []
    return found + part, most


def is_name(tokens):
    """Whether a value may be called so: letters or words without a sign before them, and no number but in a
    subscript or as a power."""
    if len(tokens) == 1 and tokens[0][1] in ("e", "i"):
        return True
    if not any(kind in ("letter", "word") for kind, _ in tokens) or tokens[0][0] == "plus":
        return False
    owners, before = [], ""             # of each open brace, the command before it
    for kind, token in tokens:
        if kind == "brace":
            owners.append(before)
        elif kind == "unbrace" and owners:
            owners.pop()
        elif kind == "number" and "sub" not in owners and (owners[-1:] != ["power"] or len(token) > 1):
            return False
        elif kind in ("relation", "strange", "dots", "percent", "calculus", "factorial"):
            return False
        before = kind
    return True
