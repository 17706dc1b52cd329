"""bench/logprob.py and bench/packing.py: each script runs end to end on tiny sizes, and what it checks can
fail.

    pytest tests/test_bench_logprob.py
"""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import logprob
import model as M
import packing

INPUTS = logprob.make_inputs(200, 1000, 16, torch.float32)


@pytest.fixture(scope="module")
def reference():
    return logprob.exact(*INPUTS, rows=64)


def errors(function, reference):
    return logprob.errors(logprob.forward_backward(function, *INPUTS), reference)


@pytest.fixture(autouse=True)
def threads_and_environment(monkeypatch):
    """The scripts fix the number of threads and join a process group, as processes of their own may."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("name", ["ours", "full"])
def test_a_right_head_agrees_with_float64(name, reference):
    found = errors(logprob.FUNCTIONS[name], reference)
    assert list(found) == list(logprob.OUTPUTS) and all(0 < e < 1e-5 for e in found.values())


def wrong(logp, entropy, add=0, scale=1):
    """The last log-prob is off by `add`, the entropies by the factor `scale`."""
    return torch.cat([logp[:-1], logp[-1:] + add]), entropy * scale


LIES = {"logp": lambda h, w, t: wrong(*logprob.ours(h, w, t), add=0.01),
        "entropy": lambda h, w, t: wrong(*logprob.ours(h, w, t), scale=1.0001),
        "grad_hidden": lambda h, w, t: logprob.ours(torch.cat([h[:-1], h[-1:].detach()]), w, t),
        "grad_weight": lambda h, w, t: logprob.ours(h, w * 0.999 + w.detach() * 0.001, t)}


@pytest.mark.parametrize("where", LIES)
def test_a_head_that_gets_one_thing_wrong_is_seen_there(where, reference):
    assert errors(LIES[where], reference)[where] > 1e-5


def test_what_a_path_does_not_offer_is_left_out(reference):
    assert errors(lambda *x: (logprob.ours(*x)[0], None), reference)["entropy"] is None


def test_the_inputs_have_sure_and_unsure_tokens():
    hidden, weight, targets, _ = logprob.make_inputs(400, 32_000, 64, torch.float32)
    p = logprob.full(hidden, weight, targets)[0].exp()
    assert p.min() < 1e-5 and p.max() > 0.999 and 0.2 < (p > 0.5).float().mean() < 0.8


@pytest.mark.slow
def test_the_head_s_bench_runs_and_names_the_reason_for_what_it_leaves_out(tmp_path, monkeypatch, capfd):
    out = tmp_path / "logprob.json"
    monkeypatch.setattr(logprob, "PATHS", ("ours", "full", "TRL"))
    # The interpreter of the tests stands for another environment, one that may or may not have TRL.
    results = logprob.main(["--cases", "300,2000,16", "400,3000,16", "--rounds", "2", "--limit_gb", "0.01",
                            "--device", "cpu", "--out", str(out), "--trl_python", sys.executable])
    report = json.loads(out.read_text())
    assert report["machine"]["versions"]["torch"] and report["flags"]["rounds"] == 2
    assert report["results"] == results
    for case, (n, vocab) in zip(results, ((300, 2000), (400, 3000))):
        assert (case["tokens"], case["vocabulary"], case["width"]) == (n, vocab, 16)
        assert list(case["paths"]) == list(logprob.PATHS)
        assert "Error: " in case["paths"]["TRL"].get("skipped", "Error: ")
        for path in case["paths"].values():
            if "skipped" not in path:
                assert path["seconds"] > 0 and len(path["rounds"]) == 2
                assert path["errors"]["grad_weight"] < 1e-5
    small, large = (case["paths"] for case in results)
    assert small["full"]["ratio"] == 1 and small["ours"]["against"] == "full"
    assert large["full"] == {"skipped": "needs 0.014 GB"} and large["ours"]["against"] == "ours"
    assert "| 300 | 2,000 | 16 | ours" in capfd.readouterr().out


class Scripted:
    """A worker that takes the given seconds and gives back `function`'s outputs."""
    error = None

    def __init__(self, folder, seconds, function=logprob.ours):
        self.folder, self.seconds, self.function = folder, iter(seconds), function

    def run(self, case, save):
        inputs = torch.load(f"{self.folder}/inputs.pt")
        torch.save(logprob.forward_backward(self.function, *inputs), f"{self.folder}/outputs.pt")
        return {"seconds": next(self.seconds), "gb": 0.5}


def test_ratios_are_medians_over_rounds_and_errors_those_of_each_path(tmp_path):
    args = SimpleNamespace(dtype="float32", limit_gb=8, rounds=3)
    workers = {"ours": Scripted(tmp_path, [2, 9, 3], LIES["logp"]), "full": Scripted(tmp_path, [1, 3, 3])}
    paths = logprob.run_case(args, workers, "100,500,16", tmp_path)["paths"]
    assert (paths["ours"]["seconds"], paths["full"]["seconds"], paths["ours"]["ratio"]) == (3, 3, 2)
    assert paths["ours"]["errors"]["logp"] > 1e-5 > paths["full"]["errors"]["logp"]
    assert paths["TRL"] == {"skipped": "no --trl_python"}


TINY = ["--shapes", "tiny", "--sequences", "12", "--max_tokens", "32", "--padded_batch", "4", "--rounds", "1"]


def test_the_bench_of_packing_reports_each_distribution_and_equal_log_probs(tmp_path):
    out = tmp_path / "packing.json"
    packing.main([*TINY, "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["machine"]["versions"]["torch"]
    assert [r["lengths"] for r in report["results"]] == list(packing.LENGTHS)
    for r in report["results"]:
        assert r["filled"]["packed"] == 1 and r["filled"]["padded"] <= r["filled"]["sorted"] <= 1
        assert r["speedup"]["padded"] > 0
        assert 0 <= r["differences"]["logp"] < 1e-4 and r["differences"]["gradient"] < 1e-3
    constant, _, heavy = report["results"]
    assert constant["filled"] == {"packed": 1, "padded": 1, "sorted": 1} and heavy["filled"]["padded"] < 0.7


def one_sequence_sees_another(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    return M.packed_attention(module, query, key, value, mask, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)


def test_the_bench_of_packing_stops_where_packed_and_padded_compute_different_things(tmp_path, monkeypatch):
    monkeypatch.setitem(M.AttentionInterface._global_mapping, "packed", one_sequence_sees_another)
    with pytest.raises(RuntimeError, match="padded computes something else"):
        packing.main([*TINY, "--device", "cpu", "--lengths", "heavy tail", "--out", str(tmp_path / "x.json")])
    assert not torch.distributed.is_initialized()


def test_the_heavy_tail_is_heavy():
    lengths = sorted(len(s.response) for s in packing.draw("heavy tail", 2000, 1000, 9))
    assert 230 < sum(lengths) / 2000 < 310                                          # mean
    assert 160 < lengths[1000] < 200                                                # median
    assert 0.02 < lengths.count(1000) / 2000 < 0.07                                 # at the limit
