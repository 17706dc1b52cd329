#!/usr/bin/env bash
# The paper's run of a smaller model, Qwen2.5-Math-1.5B, on one card of 80 GB.
#
#     runs/one_gpu.sh
#     runs/one_gpu.sh --model DIR --data FILE         # without the hub; flags go on to srft.py
#
# Planned, not yet run on a GPU. `python srft.py --dry_run --preset one_gpu` says that it fits, what it needs and
# how long a step should take; with --dry_run_cards 1x24 also which flags a smaller card wants:
#
#     FLAGS24
#
# Needs:   one GPU, `pip install -r requirements.txt`, HOST GB of host memory, DISK GB of disk.
# Takes:   TAKES, modelled, not measured. --prompts_per_step 16 is an eighth of the work, and another experiment.
# Writes:  out/one_gpu: metrics.jsonl, samples.jsonl, curves.png, report.html, checkpoints/ (CKPT GB each, three at a time),
#          and hf/, the trained model. The same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."

python srft.py --preset one_gpu --resume "$@"
