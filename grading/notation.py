r"""One notation for the many in which people, data sets and models write the same answer.

    clean(r"**1 000 000 .**")           # '1000000'
    clean(r"11 5/6")                    # '11\frac{5}{6}'
    reference(r"\[5 (mod 7)\]")         # '5 \pmod{7}'
    says_nothing("see solution")        # True: no response can match such a reference answer

What is only written differently shall be graded alike; nothing here computes. No parser is called, so all of
it is safe in any process, and its time is linear in the length of the text.
"""
import re
import unicodedata

# Of a reference answer that was left out where the data were made. `none`, `unknown` are answers to some.
NO_ANSWER = re.compile(
    r"(?i)(?:(?:proof|prove|see|refer to|not (?:found|given|provided|available)|no answer|answer not)"
    r"(?![a-z]).{0,60}|notfound|not ?solved|proved|qed|incomplete|missing|omitted|null|nan|n/a|answer"
    r"|solution|[-?. ]*)")
MODULUS = re.compile(r"[\s,~]*(?:\\[ ,;:!]|\\q?quad)*\s*\(?\s*\\?[pb]?mod(?:ulo)?\b"
                     r"\s*\{?\s*(\d+)\s*\}?\s*\)?\s*")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SPACED = re.compile(r"(?<![\d.,/^_])(?<!\d )[1-9]\d{0,2}(?:[ ~]\d{3})+(?![\d.,/]| \d)")         # 1 000 000
# Degrees are written in two ways, and so is the minus sign.
SIGNS = {"\u00b0": r"^\circ", "\u00ba": r"^\circ", "\u2013": "-", "\u2212": "-", "\u00b7": r"\cdot ",
         "\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b1": r"\pm ", "\u03c0": r"\pi ", "\u221e": r"\infty ",
         "\u2264": r"\le ", "\u2265": r"\ge ",
         "\u2260": r"\ne ", "\u2248": r"\approx ", "\u2208": r"\in ", "\u222a": r"\cup ", "\u2229": r"\cap ",
         "\u2205": r"\emptyset ", "\u222b": r"\int ", "\u2211": r"\sum ", "\u220f": r"\prod "}
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
         "twelve": 12, "sixteen": 16}
# What only another font, size or colour says, and the end of a proof.
DRESS = re.compile(r"\\(?:boldsymbol|bm|emph|[lL]arge|LARGE|[hH]uge|[bB]igg?[lr]?|checkmark|blacksquare)"
                   r"(?![a-zA-Z])|\\(?:text)?color ?\{ ?[a-zA-Z]{1,20} ?\}|\u2713")
SPELLED = {r"\degree": r"^\circ ", r"\varnothing": r"\emptyset ", r"\bigcup": r"\cup ", r"\colon": ":",
           r"\lbrace": r"\{", r"\rbrace": r"\}"}
# The marks of figures: a triangle ABC may be called ABC.
FIGURE = re.compile(r"\\(?:triangle|angle|measuredangle|overline|overrightarrow|odot|square|vec)(?![a-zA-Z])")


def says_nothing(answer):
    """Whether a reference answer is words of no answer: "proof", "notfound", "see solution", or empty."""
    words = re.sub(r"\\(?:text|math)\w* ?\{|[}$*\"'.]", " ", answer)
    return NO_ANSWER.fullmatch(" ".join(words.split())) is not None


def reference(answer):
    r"""A reference answer as LaTeX, from the notations in which data sets have it: `\[5\]` -> `5`,
    `5 (mod 7)` -> `5 \pmod{7}`, `1) 3; 2) 4` -> `3, 4`, `True` -> `\text{true}`. Else as it is."""
    answer = SPACED.sub(_digits, _without_numbering(undollar(answer)))
    value, modulus = split_modulus(answer)
    if modulus:
        return rf"{value} \pmod{{{modulus}}}"
    if re.fullmatch("(?i)true|false|yes|no", answer):
        return rf"\text{{{answer.lower()}}}"
    return answer


def is_mended(answer):
    """Whether a reference answer stands in a notation that no response could match as it is."""
    return reference(answer) != undollar(answer) or answer.strip().startswith((r"\[", r"\("))


def boxed(box):
    """The content of a box without dollars, brackets of display mathematics, and numbers of its parts."""
    return _without_numbering(undollar(re.sub(r"(?<!\\)\$", "", undollar(box))))


def split_modulus(text):
    r"""`5 \pmod{7}` -> ("5", "7"), `x \equiv 5 (mod 7)` -> ("x = 5", "7"); without a modulus (text, "")."""
    found = list(MODULUS.finditer(text[-60:]))
    start = max(0, len(text) - 60)
    if not found or start + found[-1].end() != len(text) or not text[:start + found[-1].start()].strip():
        return text, ""
    value = text[:start + found[-1].start()]
    return re.sub(r"\\equiv(?![a-zA-Z])|\u2261", "=", value).strip(), found[-1][1]


def undollar(answer):
    r"""'$x$' and '\[x\]' -> 'x', 'x+$ $y' -> 'x+ y' (a text that closes and opens); '$x$ and $y$' stays."""
    answer = re.sub(r"\$\s+\$", " ", answer.strip())
    for start, end in ((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$")):
        inside = answer[len(start):len(answer) - len(end)]
        if answer == start + inside + end and "$" not in inside and start not in inside:
            return inside.strip() if start != "$" else inside
    return answer


def repair_scientific(text):
    r"""Floats of program output as LaTeX: '4.5e33' -> '4.5 \times 10^{33}'; parsers read e as Euler's number.

    58 of Minerva's 272 references are written so, and no grader finds 4.5 \times 10^{33} equal to them.
    """
    def as_latex(number):
        exponent = int(number[2])       # without + and leading zeros
        return rf"{number[1]} \times 10^{{{exponent}}}"

    return re.sub(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,9})(?![\w.])", as_latex, text)


def clean(text):
    """A short answer in the notation that Math-Verify reads: typography, numbers, words that say no more."""
    # Single blanks also keep the patterns below linear.
    text = re.sub(r"[\s~]+", " ", text).strip()
    for mark in ("**", "__"):
        if len(text) > 4 and text.startswith(mark) and text.endswith(mark):                 # Markdown's bold
            text = text[2:-2].strip()
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", _superscript, text)
    text = re.sub(r"\u221a ?(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}", text)              # the sign of a root
    text = DRESS.sub("", text)
    text = re.sub(r"[^\x00-\x7f]", _ascii, text)
    text = re.sub(r"\\[a-z]+(?![a-zA-Z])", _one_spelling, text)
    text = re.sub(r"(?<![\d.])[1-9]\d{0,2}(?:(?:,\\! ?|\\[,!;: ]|\{,\})\d{3})+(?!\d)", _digits, text)
    text = SPACED.sub(_digits, text)
    for pattern, repaired in REPAIRS:
        text = pattern.sub(repaired, text)
    return _letter_at_end(repair_scientific(_without_end(text)))


# ---- The single repairs -------------------------------------------------------------------------------

def _without_end(text):
    """"42 ~." -> "42": without points, commas and spaces of both kinds, `\\,` and ` `, at the end."""
    end = len(text)
    while end and (text[end - 1] in " \t\n~.,;:\\\u3002" or text[max(0, end - 2):end] == "\\!"):
        end -= 1
    if ".." in text[end:].partition(",")[2]:
        return text                     # 2, 3, ... goes on
    return text[:end]


def _letter_at_end(text):
    """"3n+2m" -> "3n+2{m}": where numbers are added, the last letter is no unit, which would be dropped."""
    value = text.rpartition("=")[2]
    if not re.search(r"\d ?[a-hj-z]$", value[-3:]) or not re.search(r"[\w)}] ?[-+]", value):
        return text
    return text[:-1] + "{%s}" % text[-1]


def _without_numbering(answer):
    """"1) 3; 2) 4" -> "3, 4": the answers to the parts of a problem, numbered from 1 or a."""
    parts = re.split(r"(?:^|(?<=[\s,;]))\(?([1-9a-i])\)\s*", answer)
    labels = "".join(parts[1::2])
    if parts[0].strip() or len(labels) < 2 or not ("123456789".startswith(labels)
                                                   or "abcdefghi".startswith(labels)):
        return answer
    return ", ".join(part.strip(" \n\t,;.") for part in parts[2::2])


def _one_spelling(command):
    return SPELLED.get(command[0], command[0])


def _superscript(run):
    digits = unicodedata.normalize("NFKC", run[0])
    return "^{%s}" % digits.replace("\u2212", "-")


def _digits(number):
    return re.sub(r"\D", "", number[0])


def _mixed(number):
    whole, numerator, denominator = number.groups()
    if not 0 < int(numerator) < int(denominator):
        return number[0]
    return rf"{whole}\frac{{{numerator}}}{{{denominator}}}"


def _repeating(number):
    """0.1\\overline{6} as the fraction (16 - 1) / 90."""
    whole = number[1] or "0"
    period = number[3] or number[4]
    digits = whole + number[2]
    difference = int(digits + period) - int(digits)
    return r"\frac{%d}{%s}" % (difference, "9" * len(period) + "0" * len(number[2]))


def _scale(number):
    opened = number[2] or ""                            # \text{, which goes on: \text{ million dollars}
    return rf"{number[1]}\times 10^{{{SCALES[number[3]]}}} {opened}"


def _base(subscript):
    return "_{%d}" % BASES[subscript[1]]


def _sine(function):
    """The sine of 30 degrees; Math-Verify would take it for that of 30 radians."""
    name, power, in_brackets, bare = function.groups()
    return rf"\{name}{power or ''}(\frac{{{in_brackets or bare}\pi}}{{180}})"


def _power_of_i(power):
    return ("(1)", "i", "(-1)", "(-i)")[int(power[1] or power[2]) % 4]


def _ascii(match):
    """One character that is not ASCII, in LaTeX or ASCII; itself if it has no such spelling."""
    char = match[0]
    kind = unicodedata.category(char)
    plain = unicodedata.normalize("NFKC", char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))                               # full-width, Arabic-Indic, ...
    if kind == "No" and "\u2044" in plain:
        numerator, denominator = plain.split("\u2044")
        return r"\frac{%s}{%s}" % (numerator, denominator)                  # one half
    if kind == "Cf":
        return ""                                                           # zero-width space
    if char in SIGNS:
        return SIGNS[char]
    return plain if plain.isascii() else char


# Patterns and what they become, in this order. `clean` has left single blanks, so none of them has a run of
# blanks, over which two parts of a pattern could compete.
REPAIRS = [
    # 11 5/6
    (re.compile(r"(?<![\d.,/^_}] )(?<![\w.,/^}])(\d{1,9})(?: |\\[ ,;!])+(\d{1,9}) ?/ ?(\d{1,9})(?![\d.])"),
     _mixed),
    # 4 + 2/3, with \frac
    (re.compile(r"^(\d{1,9}) ?\+ ?\\[dt]?frac ?\{? ?(\d{1,9}) ?\}? ?\{? ?(\d{1,9}) ?\}?$"), _mixed),
    # 0.1\overline{6}
    (re.compile(r"(?<![\d.])(\d{0,40})\.(\d{0,40})\\(?:overline|bar|dot) ?(?:\{ ?(\d{1,40}) ?\}|(\d))"
                r"(?! ?\\(?:overline|bar|dot))"), _repeating),
    # 42 million
    (re.compile(r"(\d)(?: |\\[ ,;!]|~)*(\\text ?\{ ?)?(%s)\b" % "|".join(SCALES)), _scale),
    (re.compile(r"\\text ?\{ ?\}"), ""),
    # 2516_{\text{eight}}; 12{:}30
    (re.compile(r"_ ?(?:\{ ?)?(?:\\text ?)?\{ ?(%s) ?\}(?: ?\})?" % "|".join(BASES)), _base),
    (re.compile(r"\{ ?: ?\}"), ":"),
    # {}42; \frac{\text{7}}{2}; \text{16 inches}; \text{Monday.}; 42^{\text{nd}}; \\[4pt]; x &= 5
    (re.compile(r"(?:^|(?<=[\d ]))\{ ?\}"), ""),
    (re.compile(r"\\text ?\{ ?([-+(]?\d[\d.,:;() ]*|, ?) ?\}"), r"\1"),
    (re.compile(r"^\\text ?\{ ?([-+]?\d[\d.,:]*)( ?[a-zA-Z][^{}\d]*)\}$"), r"\1\\text{\2}"),
    (re.compile(r"^\{ ?(\\[a-z]{4,6} ?\{[^{}]*\}) ?\}$"), r"\1"),
    (re.compile(r"\\text ?\{ ?((?:[A-Z] ?, ?)+[A-Z]) ?\}"), r"\1"),
    (re.compile(r"(?<=[a-z])\.(?=\}$)"), ""),
    (re.compile(r"(?<=\d) ?\^ ?(\{ ?)?\\(?:text|mathrm) ?\{ ?(?:st|nd|rd|th) ?\}(?(1) ?\})"), ""),
    (re.compile(r"\\\\ ?\[[\d.]{1,9} ?(?:pt|em|ex|mm|cm)\]"), r"\\\\"),
    (re.compile(r"& ?="), "="),
    (re.compile(r"\^ ?\{ ?\\circ ?\}"), r"^\\circ"),
    # 3+4 i; {x | x > 3}
    (re.compile(r"(?<=\d) ?(?:\\cdot ?)?(?:\\mathrm ?\{ ?i ?\}|i)(?![a-zA-Z])"), "i"),
    (re.compile(r"^(?:\\left ?)?\\\{ ?[a-zA-Z] ?(?:\\in ?\\mathbb ?\{ ?R ?\} ?)?(?:\\mid|\\vert|[:|])"
                r"(?=[^{}]*[a-z<>])([^{}]*?)(?:\\right ?)?\\\}$"), r"\1"),
    (re.compile(r"\bper cent\b"), "percent"),
    # \sin 30^\circ
    (re.compile(r"\\(sin|cos|tan|cot|sec|csc) ?(\^ ?\{?\d\}?)? ?"
                r"(?:(?:\\left ?)?[({] ?(\d{1,9}(?:\.\d{1,9})?) ?\^ ?\{? ?\\circ ?\}? ?(?:\\right ?)?[)}]"
                r"|(\d{1,9}(?:\.\d{1,9})?) ?\^ ?(?:\{ ?\\circ ?\}|\\circ))"), _sine),
    # i^{2023}
    (re.compile(r"(?<![a-zA-Z\\_])i ?\^ ?(?:\{ ?(\d{1,9}) ?\}|(\d))"), _power_of_i),
    # all integers n >= 3; an ellipse
    (re.compile(r"^(?:\\text ?\{ ?)?(?:for )?(?:all|any|every)(?: (?:real|positive|natural|whole|integers?|"
                r"numbers?|values|of))* ?\}?(?= ?[a-zA-Z] ?(?:\\(?:ge|le|in)|[<>]))"), ""),
    (re.compile(r"^(\\text ?\{) ?(?:an?|the) (?=[a-z]{3})"), r"\1"),
    # True
    (re.compile("(?i)^(true|false|yes|no)$"), r"\\text{\1}"),
]
