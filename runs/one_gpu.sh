#!/usr/bin/env bash
# The paper's run of a smaller model, Qwen2.5-Math-1.5B, on one card of 80 GB.
#
#     runs/one_gpu.sh
#     runs/one_gpu.sh --model DIR --data FILE         # without the hub; flags go on to srft.py
#
# Two steps of it have run on an H100, with random weights and shorter responses (docs/benchmarks.md). `python
# srft.py --dry_run --preset one_gpu` says that it fits, what it needs, and how long a step should take; with
# --dry_run_cards 1x24, which flags a card of 24 GB wants:
#
#     runs/one_gpu.sh --recompute 12 --offload --engine_memory 0.85
#
# Needs:   one GPU of 80 GB, `pip install -r requirements.txt`, 16 GB of host memory, 60 GB of disk. With the
#          flags above, one of 24 GB, and 40 GB of host memory.
# Takes:   27 hours on an H100, 100 on an RTX 4090, where responses have 2,000 tokens on average: modelled,
#          not measured. --prompts_per_step 16 is an eighth of the work, and another experiment.
# Writes:  out/one_gpu: metrics.jsonl, samples.jsonl, curves.png, report.html, checkpoints/ (19 GB each, three at a time),
#          and hf/, the trained model. The same command goes on where it was interrupted.
#
# The preset raises --hang_minutes: one card takes longer in one phase than the 30 minutes that eight may.
set -euo pipefail
cd "$(dirname "$0")/.."

python srft.py --preset one_gpu --device cuda --resume "$@"
