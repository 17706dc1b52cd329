r"""What a worker does before it grades anything, so that its children need not.

Each response is graded in a child that ends with it (worker.py). It begins with what its worker knows at the
fork: the modules that are loaded, the grammar's tables (ANTLR learns its decisions as it parses), compiled
patterns, sympy's caches. Cold, most of a grading is learning.
"""
import contextlib
import importlib

from grading.answers import judge
from grading.oat import evaluate_formulas_only

# Modules that sympy imports only in the function that needs them. A child cannot open their files any more.
LATE = """
    sympy.abc sympy.assumptions.handlers.matrices sympy.assumptions.lra_satask sympy.assumptions.satask
    sympy.assumptions.wrapper sympy.concrete.delta sympy.discrete.recurrences sympy.integrals.manualintegrate
    sympy.integrals.prde sympy.integrals.risch sympy.logic.algorithms.dpll sympy.logic.algorithms.dpll2
    sympy.physics.units sympy.polys.dispersion sympy.polys.distributedmodules
    sympy.polys.domains.old_polynomialring sympy.polys.domains.quotientring
    sympy.polys.numberfields.resolvent_lookup sympy.sets.handlers.add sympy.sets.handlers.functions
    sympy.sets.handlers.issubset sympy.sets.handlers.mul sympy.sets.handlers.power sympy.sets.setexpr
    sympy.tensor.array.array_derivatives sympy.tensor.tensor
""".split()

# A response's box and a reference answer, of the usual sorts. The first are equal.
ANSWERS = [
    (r"\frac{2}{4}", r"\frac{1}{2}"), (r"2\sqrt{3}+1", r"\sqrt{12}+2"), ("x^2+2x+1", "(x-1)^2"),
    (r"12\%", "0.13"), (r"\left(3, \frac{\pi}{2}\right)", "(1,3)"),
    (r"(-\infty, 2) \cup [3, 4)", r"x \in [-2, 7]"), (r"\{1, 2\}", "1, 2, 3"), ("y = 2x+3", "y=3x+2"),
    (r"\frac{n(n+1)}{2}", r"x \geq 3"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 5 \end{pmatrix}"),
    (r"\sin x + \ln 2 + 3i", r"\cos^2 x"), (r"5 \text{ cm}^2", r"60^\circ"), (r"4.5 \times 10^{33}", "1,000"),
    (r"\text{Monday}", "C")]


def lesson(kind, number):
    """An item made of ANSWERS[number]; number 0 is right."""
    box, answer = ANSWERS[number]
    response = rf"so it is $\boxed{{{box}}}$."
    return {"id": 0, "kind": kind, "response": response, "answer": answer, "strict_box": True}


def warm_up():
    """Load all that is ever needed, grade ANSWERS. SystemExit, with the reason, if a grader does not work."""
    for module in LATE:
        with contextlib.suppress(ImportError):          # of another version of sympy
            importlib.import_module(module)
    evaluate_formulas_only()
    for kind in ("math-verify", "oat"):
        for number in range(len(ANSWERS)):
            found = judge(lesson(kind, number), 60)
            if number == 0 and found[0] != "ok":
                raise SystemExit(f"grading/worker.py: {kind} denies 2/4 = 1/2 ({found}): wrong version, or "
                                 "memory_mb too low")
