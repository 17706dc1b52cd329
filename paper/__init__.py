"""What the paper compares, measures and draws. `srft.py` at its defaults needs none of it."""
