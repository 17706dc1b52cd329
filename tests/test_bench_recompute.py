"""bench/recompute.py: the memory that --recompute saves on real ranks is what the plan predicts.

    pytest tests/test_bench_recompute.py
"""
from dataclasses import replace

import pytest

import recompute
from bench import plan


@pytest.mark.slow
def test_real_ranks_hold_what_is_predicted_for_all_and_no_blocks_recomputed():
    peaks = {}
    for world, way in ((1, "none"), (2, "all")):
        predicted = plan.simulate(recompute.SHAPE, replace(recompute.CFG, recompute=way), world, bf16=False)
        peaks[way] = recompute.measured(world, way)
        assert peaks[way] * 1e9 == pytest.approx(predicted["peak"], rel=0.15)
    assert peaks["none"] > 2 * peaks["all"]
