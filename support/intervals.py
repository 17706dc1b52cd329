"""Numbers from a command line: each lies in the interval that its flag names.

    check_interval("--lr", 1e-6, "(0, inf)")          # as in mathematics: ( and ) exclude, [ and ] include
    check_interval("--lr", float("nan"), "(0, inf)")  # ValueError: --lr nan: must lie in (0, inf)
    parser.add_argument("--seed", type=number_in(int, "[0, 4294967295]"))         # the same, said by argparse

nan lies in no interval, and inf only in one that ends in "inf]".

To copy: this file. It needs nothing.
"""
import argparse


def lies_in(value, interval):
    """Is the number in it?"""
    low, high = interval[1:-1].split(",")
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    below = value <= float(high) if interval[-1] == "]" else value < float(high)
    return above and below


def check_interval(flag, value, interval):
    """Raise ValueError, naming the flag, unless `value` lies in `interval`."""
    if not lies_in(value, interval):
        raise ValueError(f"{flag} {value}: must lie in {interval}")


def number_in(kind, interval):
    """A type for argparse: int or float (kind), in the interval."""
    def convert(text):
        value = kind(text)
        if not lies_in(value, interval):
            raise argparse.ArgumentTypeError(f"{value} must lie in {interval}")
        return value

    convert.__name__ = kind.__name__                 # argparse says "invalid int value: 'x'" by it
    return convert


positive = number_in(int, "[1, inf)")
