"""bench/graders.py from its command line: a row for each kind and each version."""
import json

import pytest

from conftest import ROOT, run


@pytest.mark.slow
def test_the_bench_of_the_graders_measures_both_kinds_of_both_versions(tmp_path):
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"response": r"\boxed{\frac24}", "gold": "0.5"}) + "\n")
    table = run(["bench/graders.py", "--cases", cases, "--against", ROOT, "--repeats", "1"])
    rows = [line.split() for line in table.splitlines() if "ms of CPU each" in line]
    assert sorted({row[0] for row in rows}) == ["math-verify", "oat"] and float(rows[0][1]) > 0
