#!/usr/bin/env bash
# The paper's run on one node of 8 GPUs: Qwen2.5-Math-7B, 128 prompts x (8 rollouts + 1 demonstration) a step,
# 500 steps; then the eight benchmarks of Table 2.
#
#     runs/paper.sh
#     OUT=out/grpo runs/paper.sh --method grpo        # another row of Table 1 or 2
#     BENCHMARKS=math500=FILE,minerva=FILE runs/paper.sh --model DIR --data FILE       # without the hub
#
# Flags go on to srft.py, in the plan and in training. The same command goes on where it was interrupted.
#
# Needs:   8 GPUs of 80 GB, `pip install -r requirements.txt`, 300 GB of disk; the hub, and its terms for
#          GPQA-Diamond accepted there.
# Takes:   modelled, not measured: on 8 x H100, 18 hours where responses have 2,000 tokens on average, 63
#          where all are as long as they may be; docs/benchmarks.md has the assumptions.
# Writes:  $OUT: metrics.jsonl, samples.jsonl, curves.png, report.html, checkpoints/ (91 GB each, three at a time), hf/,
#          the trained model, and eval/ with results.jsonl, summary.json and summary.md.
#
# Not yet run on 8 GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/srft}

# The plan first: a minute on the CPU, before hours on the GPUs.
python srft.py --dry_run "$@"

# --local_addr: else torchrun asks the network for this machine's own name, and waits for minutes where nobody
# knows it.
torchrun --local_addr=127.0.0.1 --nproc_per_node=8 srft.py --resume --out "$OUT" "$@"

torchrun --local_addr=127.0.0.1 --nproc_per_node=8 eval.py --model "$OUT" \
    ${BENCHMARKS:+--benchmarks "$BENCHMARKS"}
