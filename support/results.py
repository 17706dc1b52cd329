"""A file of rows, one JSON object a line, which all ranks append to and a killed program continues.

    append_results(path, [{"id": "a", "reward": 1.0}])       # all of them or none, in one piece
    rows = read_results(path)                                # [] if there is none

To copy: this file with support/claim.py, support/disk.py and support/runlog.py; it needs nothing but Python.
"""
import json
import os

from support.claim import lock
from support.disk import append_whole
from support.runlog import json_line


def read_results(path):
    """The rows of the file, [] if there is none. Lines that a kill or a full disk cut short are counted and
    skipped: who continues makes their rows again."""
    if not path.exists():
        return []
    rows, torn = [], 0
    with path.open("rb") as lines:                    # bytes: what was cut may be half a character
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                torn += 1
    if torn:
        print(f"{path}: skipped {torn} torn lines")
    return rows


def append_results(path, rows):
    """One locked write for all rows, since ranks share the file; what a kill tore ends with its line."""
    lines = "".join(map(json_line, rows))
    with path.open("ab+", buffering=0) as file:
        lock(file)                                    # until the file is closed
        end = file.seek(0, os.SEEK_END)
        # A torn line has no newline: without one, the first row to come would be torn with it.
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            lines = "\n" + lines
        append_whole(file, lines)                     # on the disk, before anyone counts on it
