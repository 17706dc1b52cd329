r"""Where Math-Verify's equality of two values is too coarse or too fine, from what it has parsed.

It compares differences, to 6 decimals or 15 digits: 10^-200 and 10^-300 are the same to it, and so are
1/2004! and 1/2006!. And it compares functions of a complex number: 1/sqrt(n) and sqrt(1/n) are two.

For workers only: what is evaluated here has been written by a model.
"""
import re

COARSE = 0.01           # below it, 6 decimals are too few for a value
AGREE = 1e-3            # how near, as a share of the value, two small ones must be
# Where functions are compared. No rule of algebra is special at them; some lie where roots are not real.
POINTS = (0.37, 1.61, -0.73, 2.93, -2.19, 5.27, 0.58, -1.37, 7.91)


def rounded_away(gold, prediction):
    """Whether two parsed answers, found equal, are only so by rounding: small ones of another magnitude."""
    golds = _leaves(gold[0])
    values = _leaves(prediction[0])
    if len(golds) != len(values):
        return False
    return any(_far(a, b) for a, b in zip(golds, values))


def _leaves(parsed):
    """The values in a parsed answer: in x = 5 the last one, in a set all, sorted; those with unknowns too."""
    from sympy import FiniteSet, Interval, MatrixBase, Tuple
    from sympy.core.relational import Relational
    if isinstance(parsed, Relational):
        return _leaves(parsed.args[-1])
    if isinstance(parsed, FiniteSet):
        return sorted((value for part in parsed.args for value in _leaves(part)), key=_size)
    if isinstance(parsed, Tuple | Interval):
        return [value for part in parsed.args for value in _leaves(part)]
    if isinstance(parsed, MatrixBase):
        return list(parsed.flat())
    return [parsed]


def _size(value):
    """To sort by: of numbers their value, without underflow."""
    number = _number(value)
    return (number is None, 0 if number is None or not number.is_real else number, str(value))


def _number(value):
    """A value as a number of sympy, whose exponent has no limit; 0 if it is 0 by all of its digits. None for
    what is no finite number."""
    if getattr(value, "free_symbols", True) or not hasattr(value, "evalf"):
        return None
    number = value.evalf(15)
    if not getattr(number, "is_number", False) or not number.is_finite:
        return None
    # Precision 1 is how sympy says that all digits cancelled, as in sqrt(2) sqrt(2) - 2.
    if number.is_Float and number._prec == 1:
        return 0 * number
    return number


def _far(gold, value):
    gold_number = _number(gold)
    number = _number(value)
    if gold_number is None or number is None or abs(gold_number) >= COARSE:
        return False
    return bool(abs(gold_number - number) > AGREE * abs(gold_number))


def equal_where_real(gold, prediction):
    """Whether two parsed answers with roots of unknowns agree where they are real, and are real together.

    At several points, negative ones too: |x| and x do not agree, sqrt(1/n) and 1/sqrt(n) do.
    """
    first, second = gold[0], prediction[0]
    symbols = sorted(getattr(first, "free_symbols", ()), key=str)
    if not 1 <= len(symbols) <= 3 or set(symbols) != getattr(second, "free_symbols", None):
        return False
    if not (_has_roots(first) or _has_roots(second)):
        return False
    agreed = 0
    for shift in range(len(POINTS)):
        point = {symbol: POINTS[(shift + 2 * place) % len(POINTS)] for place, symbol in enumerate(symbols)}
        one, other = complex(first.subs(point).evalf(15)), complex(second.subs(point).evalf(15))
        if (abs(one.imag) > 1e-9) != (abs(other.imag) > 1e-9):
            return False
        if abs(one.imag) > 1e-9:
            continue
        if abs(one - other) > 1e-9 * max(1.0, abs(one)):
            return False
        agreed += 1
    return agreed >= 3


def _has_roots(parsed):
    from sympy import Expr, Pow
    if not isinstance(parsed, Expr):
        return False
    return any(power.exp.is_Rational and not power.exp.is_Integer for power in parsed.atoms(Pow))


def other_base(gold, prediction):
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
