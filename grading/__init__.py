"""Is this the answer? The graders (answers.py, oat.py), what they read alike (notation.py, values.py), if an
answer is stated as one and worked out (statement.py, tokens.py), and where they run: in a child of a warm
worker (worker.py, warmup.py) behind a fence (fence.py), as many at a time as there are CPUs (cpus.py).

Imports no file of the root, and loads neither sympy nor Math-Verify before something is graded.
"""
