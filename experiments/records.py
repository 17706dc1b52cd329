"""The results of runs as they are committed: a file a table, in it a line a run and seed.

    records = Records(Path("experiments/results/runs"))
    records.add("table1", "sft", 0, {"recipe": [...], "seconds": 55}, rows)
    records.rows["sft", 0][-1]["eval/heldout"]

A line has the run's settings and the columns of its metrics.jsonl, with null where a step has no such metric.
"""
import json
import threading


class Records:
    """All that is known: facts and rows, dictionaries by (run, seed)."""

    def __init__(self, folder):
        self.folder, self.lock = folder, threading.Lock()           # runs end in threads
        self.facts, self.rows, self.tables = {}, {}, {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                facts = json.loads(line)
                key = facts.pop("run"), facts.pop("seed")
                self.rows[key] = rows_of(facts.pop("columns"))
                self.facts[key], self.tables[key] = facts, file.stem

    def add(self, table, run, seed, facts, rows):
        """Write a run's results, all or none, in the place of older ones."""
        with self.lock:
            self.facts[run, seed], self.rows[run, seed], self.tables[run, seed] = facts, rows, table
            lines = []
            for key in sorted(key for key, its in self.tables.items() if its == table):
                name, number = key
                line = {"run": name, "seed": number, **self.facts[key], "columns": columns_of(self.rows[key])}
                lines.append(json.dumps(line, separators=(",", ":")) + "\n")
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{table}.partial"
            partial.write_text("".join(lines))
            partial.rename(self.folder / f"{table}.jsonl")


def columns_of(rows):
    """[{"step": 0}, {"step": 1, "loss": 2.0}] -> {"step": [0, 1], "loss": [None, 2.0]}"""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def rows_of(columns):
    """The opposite of columns_of."""
    rows = []
    for values in zip(*columns.values()):
        rows.append({name: value for name, value in zip(columns, values) if value is not None})
    return rows
