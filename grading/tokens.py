r"""A short answer in LaTeX as tokens, each with its kind: what grading/statement.py reads.

    tokenize(r"x = \dfrac12\text{ cm}")
    # [("letter", "x"), ("relation", "="), ("frac", "\\dfrac"), ("brace", "{"), ("number", "1"),
    #  ("unbrace", "}"), ("brace", "{"), ("number", "2"), ("unbrace", "}"), ("word", "cm")]

Regular expressions alone: no parser, no evaluation; time grows with the length of the text alone.
"""
import re

TOKEN = re.compile(r"""
      \\(?:begin|end)\ ?\{[a-z]{1,20}\*?\}(?:\ ?\{[clr|\ ]{0,40}\})?
    | \\[a-zA-Z]+ | \\. | \d+(?:,\d{3}(?!\d))+(?:\.\d+)? | \d+\.?\d* | \.\d+
    | [a-zA-Z](?:\.[a-zA-Z])+\.? | [a-zA-Z]+(?:'(?:t|s|re)\b)? | \.\.+ | '+
    | != | <= | >= | == | := | \S""", re.VERBOSE)


def kinds(**words):
    """kind="a b", ... -> {"a": kind, "b": kind, ...}"""
    return {word: kind for kind, text in words.items() for word in text.split()}


KINDS = kinds(
    skip=r"""\left \right \bigl \bigr \Bigl \Bigr \big \Big \bigg \Bigg \limits \nolimits \displaystyle
        \textstyle \scriptstyle \quad \qquad \enspace \thinspace \space \hfill \, \; \: \! \ \/ \- ~ $ \(
        \) \[ \] \bf \rm \it \therefore \boxed \square \blacksquare " ` { }""",
    text=r"""\text \textbf \textit \textrm \textsf \texttt \textnormal \textup \emph \mbox \hbox \fbox
        \mathrm \mathbf \mathit \mathsf \mathtt \mathbb \mathcal \mathfrak \boldsymbol \bm \operatorname
        \underline""",
    plus=r"+ - \pm \mp", times=r"\cdot \times \ast * \bullet \div", slash=r"/ \over",
    frac=r"\frac \dfrac \tfrac \cfrac frac", root=r"\sqrt sqrt", power="^", sub="_", prime=r"' '' ''' \prime",
    separator=r", ; & \\ \newline and or", opening=r"( [ \{ \langle \lbrace \lbrack \lparen",
    closing=r") ] \} \rangle \rbrace \rbrack \rparen", brace="{", unbrace="}",
    bar=r"| \| \vert \Vert \lvert \rvert \lVert \rVert \mid",
    relation=r"""= == := < > <= >= != \lt \gt \le \leq \leqslant \ge \geq \geqslant \ll \gg \ne \neq
        \notin \nless \ngtr \nleq \ngeq \not \in \ni \owns \subset \subseteq \supset \approx \simeq \doteq
        \sim \cong \equiv \propto \to \gets \rightarrow \leftarrow \Rightarrow \Leftarrow \implies \iff
        \Leftrightarrow \leftrightarrow \longrightarrow \mapsto \lor \land \vee \wedge \neg \lnot \forall
        \exists \because""",
    function=r"""\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \log \ln \lg \exp
        \max \min \sup \inf \gcd \lcm \det \lfloor \rfloor \lceil \rceil \bmod \pmod \mod \arg \deg \Re
        \Im \dim \ker \Pr sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp gcd lcm
        max min det floor ceil round abs mod arg deg""",
    calculus=r"\int \iint \iiint \oint \lim \limsup \liminf \sum \prod \coprod \partial \nabla lim",
    binomial=r"\binom \dbinom \tbinom", factorial=r"! \choose", percent=r"% \% percent",
    money="\\$ \\pounds \\euro \u20ac \u00a3 \u00a2 \u00a5 \u20b9",
    constant=r"\pi pi e i \infty infty inf infinity \imath \emptyset \varnothing",
    over=r"\overline \vec \overrightarrow \hat \bar \widehat \tilde \widetilde \dot \ddot",
    mark=r"\triangle \angle \measuredangle \odot \cup \cap \setminus \backslash : \colon \circ \degree",
    dots=r"\ldots \dots \cdots \vdots \ddots \dotsc \dotsb")
KINDS["\\ "] = "skip"
LETTERS = set(r"""
    \alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu
    \nu \xi \rho \sigma \tau \upsilon \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi
    \Sigma \Upsilon \Phi \Psi \Omega \ell \hbar
    """.split())
AFTER_NUMBERS = set("min max sec deg det floor round abs mod arg inf".split())      # 15 min, but min(1, 2)
# How many arguments follow. Those of `over` stand over what they mark: \overline{AB}.
ARGUMENTS = {"frac": 2, "binomial": 2, "root": 1, "power": 1, "sub": 1, "over": 1}


def kind_of(token, in_text, called):
    """The kind of a token. in_text: whether it stands in a \\text{...}. called: whether a "(" follows."""
    if token[-1] == "}" and len(token) > 2:
        if "matrix" not in token and "array" not in token:
            return "skip"               # align, cases: lines, one after the other
        return "opening" if token.startswith(r"\begin") else "closing"
    if token[0].isdigit() or (token[0] == "." and token[1:].isdigit()):
        return "number"
    if token in LETTERS:
        return "letter"
    if token.startswith(".."):
        return "dots"
    if not token[0].isalpha():
        return KINDS.get(token, "strange")
    known = KINDS.get(token.lower(), "word")
    if token in AFTER_NUMBERS or (in_text and known != "separator"):
        if known == "function" and called:
            return "function"
        return "percent" if known == "percent" else "word"
    if "." in token:                    # p.m.
        return "word"
    if len(token) == 1 and token.isascii() and token not in ("e", "i"):
        return "letter"
    return known


def tokenize(text):
    """[(kind, token)] without dress: fonts, sizes, spaces, braces that group nothing. Each argument of a
    command stands between a "brace" and an "unbrace", `\\frac12` too. What `\\text{...}` holds are words."""
    found = []
    braces = []                 # of each open one: the arguments that it ends, or "text", or "dress"
    wanted = 0                  # arguments that the last command still takes, or "text"
    texts = 0                   # open braces of \text
    queue = TOKEN.findall(text)[::-1]
    while queue:
        token = queue.pop()
        if token == "{":
            braces.append(wanted or "dress")
            texts += wanted == "text"
            if wanted in (1, 2):
                found.append(("brace", token))
            wanted = 0
            continue
        if token == "}":
            opened = braces.pop() if braces else "dress"
            texts -= opened == "text"
            wanted = 0
            if opened in (1, 2):
                found.append(("unbrace", token))
                wanted = opened - 1
            continue
        called = queue[-1:] == ["("] or queue[-2:] == ["(", "}"]
        kind = kind_of(token, texts > 0, called)
        if token == "." and found and found[-1][0] == "word":
            continue                    # approx.
        if kind == "text":
            wanted = "text"
        elif wanted in (1, 2) and kind not in ("skip", *ARGUMENTS):
            wanted -= add_argument(found, kind, token, queue)
        elif kind != "skip":
            found.append((kind, token))
            wanted = ARGUMENTS.get(kind, 0)
    return found


def add_argument(found, kind, token, queue):
    """An argument without braces, as in `\\frac12`, `x^2`. Returns how many arguments it was."""
    of = found[-1][0]
    if of == "root" and token in ("[", "("):            # \sqrt[3]{2}: the index is no argument; sqrt(2)
        if token == "(":
            found.append((kind, token))
            return 1
        while queue and queue.pop() != "]":
            pass
        return 0
    if of == "power" and kind == "plus":                # 10^-3
        return 0
    if of in ("frac", "binomial", "unbrace") and kind == "number" and len(token) > 1:
        queue.append(token[1:])
        token = token[0]
    found.extend([("brace", "{"), (kind, token), ("unbrace", "}")])
    return 1
