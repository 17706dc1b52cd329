#!/usr/bin/env bash
# The paper's run on one node of 8 GPUs: Qwen2.5-Math-7B, 128 prompts x (8 rollouts + 1 demonstration) a step,
# 500 steps; then the eight benchmarks of Table 2.
#
#     runs/paper.sh
#     OUT=out/grpo runs/paper.sh --method grpo        # another row of Table 1 or 2
#     BENCHMARKS=math500=FILE,minerva=FILE runs/paper.sh --model DIR --data FILE       # without the hub
#
# Flags go on to srft.py. The same command goes on where it was interrupted. `--eval_data
# HuggingFaceH4/MATH-500` draws an accuracy curve on the way.
#
# Needs:   8 GPUs of 80 GB (`python srft.py --dry_run` knows what others need), `pip install -r
#          requirements.txt`, 62 GiB of host memory, 300 GB of disk and 15 GB in the hub's cache (HF_HOME); the
#          hub, and its terms for GPQA-Diamond accepted there.
# Takes:   modelled, not measured: on 8 x H100, 18 hours where responses have 2,000 tokens on average, 63
#          where all are as long as they may be; then half an hour for the benchmarks' 18,464 responses.
#          docs/benchmarks.md has the assumptions.
# Writes:  $OUT: metrics.jsonl, samples.jsonl, curves.png, report.html, checkpoints/ (91 GB each, three at a time), hf/,
#          the trained model, and eval/ with results.jsonl, summary.json and summary.md.
#
# Not yet run on 8 GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/srft}

# --local_addr: else torchrun asks the network for this machine's own name, and waits for minutes where nobody
# knows it. --shutdown-timeout: seconds to finish a step and save, after Ctrl-C or SIGTERM; else torchrun kills
# its ranks after 30. --device cuda: else a torch without CUDA would train on the CPU.
torchrun --local_addr=127.0.0.1 --nproc_per_node=8 --shutdown-timeout 1800 srft.py --device cuda \
    --resume --out "$OUT" "$@"

torchrun --local_addr=127.0.0.1 --nproc_per_node=8 eval.py --device cuda --model "$OUT" \
    ${BENCHMARKS:+--benchmarks "$BENCHMARKS"}
