"""Numbers from a command line: each lies in the interval that its flag names.

    check_interval("--lr", 1e-6, "(0, inf)")          # as in mathematics: ( and ) exclude, [ and ] include
    check_interval("--lr", float("nan"), "(0, inf)")  # ValueError: --lr nan: must lie in (0, inf)

nan lies in none, and inf only where the interval ends in "inf]".

To copy: this file. It needs nothing.
"""


def check_interval(flag, value, interval):
    """Raise ValueError, naming the flag, unless `value` lies in `interval`."""
    low, high = interval[1:-1].split(",")
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    below = value <= float(high) if interval[-1] == "]" else value < float(high)
    if not (above and below):
        raise ValueError(f"{flag} {value}: must lie in {interval}")
