"""Is this the answer? The graders (answers.py, oat.py), what they read alike (notation.py, values.py), if it
is stated as one answer, worked out (statement.py, tokens.py), and the process that they run in (worker.py).

Imports no file of the root, and loads neither sympy nor Math-Verify before something is graded.
"""
