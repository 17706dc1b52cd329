"""bench/engine.py from its command line: both ways to generate give the same tokens, and the JSON says on
what machine."""
import json

import pytest

from config import TINY
from conftest import run


@pytest.mark.slow
def test_the_bench_of_the_engine_compares_like_with_like(tmp_path):
    table = run(["bench/engine.py", "--model", TINY, "--prompts", 2, "--group", 3, "--tokens", 8,
                 "--pairs", 1, "--device", "cpu", "--out", tmp_path / "engine.json"])
    found = json.loads((tmp_path / "engine.json").read_text())
    generate, sync = found["results"]["generate"], found["results"]["sync"]
    assert generate["same_tokens"] and 6 <= generate["tokens"] <= 48
    assert sync["ratio"] == pytest.approx(sync["sync_s"] / sync["copy_s"])
    assert sync["gb"] == pytest.approx(4e-9 * found["results"]["parameters"])
    assert found["machine"]["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert found["flags"]["group"] == 3
    assert "bare LLM.generate" in table and "sync_weights" in table
