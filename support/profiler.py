"""A profile of one step, to open in Perfetto or chrome://tracing.

    profiler = start_profiler()
    ...                                        # phase() of support/watch.py names its ranges
    write_profile(profiler, Path("out/run/profile"))

To copy: this file. It needs torch alone.
"""
import warnings

import torch
import torch.distributed as dist


def start_profiler():
    """A torch profiler that runs: CPU and, where there is one, GPU. phase() names its ranges."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=kinds)
    profiler.start()
    return profiler


def write_profile(profiler, folder):
    """Stop it; write folder/trace-rankN.json.gz and, on rank 0, folder/operators-rank0.txt: the operators
    that took most time themselves. Where that fails (a full disk), a warning: a run is worth more than it."""
    profiler.stop()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-rank{dist.get_rank()}.json.gz"))
        if dist.get_rank() == 0:
            kind = "cuda" if torch.cuda.is_initialized() else "cpu"
            table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=50)
            (folder / "operators-rank0.txt").write_text(table)
    except (OSError, RuntimeError) as error:
        warnings.warn(f"{folder}: could not write the profile: {error}")
