"""What was read of one source of data, and what became of its rows, told in a few lines at the start.

    inventory = Inventory("--data mine/")
    inventory.count("a.jsonl", example, unread=())                  # each row, while reading
    inventory.dropped["with a prompt over 1,024 tokens"] += 1
    print(inventory)

    --data mine/: 2,000 rows, 1,995 usable, 1,990 of them with a demonstration
      read: a.jsonl 1,500, b.jsonl 500; left alone: test.jsonl
      dropped: 5 with a prompt over 1,024 tokens

To copy: this file. It needs nothing.
"""
from collections import Counter
from dataclasses import dataclass, field

MOST = 5                # names that are listed; of more, their number is told
UNREADABLE = "unreadable"


@dataclass
class Inventory:
    """Counts, most of them under the words that tell of them."""
    source: str = "data"
    held_out: bool = False                                 # demonstrations have no part in it
    rows: Counter = field(default_factory=Counter)         # file -> rows that could be read, used or not
    left: list = field(default_factory=list)               # files of the folder that are not read
    used: int = 0
    demonstrations: int = 0                                # of those used
    dropped: Counter = field(default_factory=Counter)      # why -> rows
    noted: Counter = field(default_factory=Counter)        # what is odd about rows that are kept -> rows
    unread: set = field(default_factory=set)               # columns that look like a demonstration
    first_bad: str = ""                                    # the error of the first unreadable row
    seen: set = field(default_factory=set, repr=False)     # hashes of the problems and of the rows so far

    def count(self, file, example, unread):
        """A row that could be read."""
        self.rows[file] += 1
        self.unread.update(unread)
        problem, row = hash(example.problem), hash((example.problem, example.answer, example.demo))
        if row in self.seen:
            self.noted["repeating an earlier row"] += 1
        elif problem in self.seen:
            self.noted["repeating an earlier problem, with another answer or demonstration"] += 1
        self.seen |= {problem, row}

    def skip(self, error):
        """A row that could not."""
        self.dropped[UNREADABLE] += 1
        self.first_bad = self.first_bad or error

    def __str__(self):
        total = self.rows.total() + self.dropped[UNREADABLE]
        shown = f", {self.demonstrations:,} of them with a demonstration" if not self.held_out else ""
        lines = [f"{self.source}: {total:,} rows, {self.used:,} usable{shown}"]
        if len(self.rows) + len(self.left) > 1:
            gave = [f"{name} {count:,}" for name, count in self.rows.items()]
            left = f"; left alone: {listed(self.left)}" if self.left else ""
            lines.append(f"read: {listed(gave)}{left}")
        return "\n  ".join(lines + self.remarks())

    def remarks(self):
        """The lines on what is missing or odd; [] where nothing is."""
        lines = []
        if self.dropped:
            lines.append(f"dropped: {_told(self.dropped)}")
        if self.first_bad:
            lines.append(f"the first unreadable one: {self.first_bad}")
        if self.noted:
            lines.append(f"kept: {_told(self.noted)}")
        if self.unread and not self.held_out:
            lines.append(f"not read, though named like a demonstration: {listed(sorted(self.unread))}; what "
                         "is to be one belongs in the column `solution`")
        return lines


def _told(counts):
    return "; ".join(f"{count:,} {words}" for words, count in counts.items())


def listed(names):
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
