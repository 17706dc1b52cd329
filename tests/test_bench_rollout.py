"""bench/rollout.py from its command line: both ways to generate give the same tokens, and the JSON says on what machine."""
import json

import pytest
from conftest import run
from config import TINY


@pytest.mark.slow
def test_the_bench_of_the_engine_compares_like_with_like(tmp_path):
    table = run(["bench/rollout.py", "--model", TINY, "--prompts", 2, "--group", 3, "--tokens", 8, "--pairs", 1,
                 "--device", "cpu", "--out", tmp_path / "rollout.json"])
    found = json.loads((tmp_path / "rollout.json").read_text())
    assert found["results"]["generate"]["same_tokens"] and 6 <= found["results"]["generate"]["tokens"] <= 48
    sync = found["results"]["sync"]
    assert sync["ratio"] == pytest.approx(sync["sync_s"] / sync["copy_s"]) and sync["gb"] == pytest.approx(4e-9 * found["results"]["parameters"])
    assert found["machine"]["versions"]["torch"] and found["machine"]["cores"] >= 1 and found["flags"]["group"] == 3
    assert "bare LLM.generate" in table and "sync_weights" in table
