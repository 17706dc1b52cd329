"""Is this the answer? The graders (answers.py, oat.py), and where they run: in a child of a warm worker
(worker.py, warmup.py) behind a fence (fence.py), as many at a time as there are CPUs (cpus.py).

Imports no file of the root, and loads neither sympy nor Math-Verify before something is graded.
"""
