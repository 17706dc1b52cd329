#!/usr/bin/env bash
# The paper's 7B run on one card of 80 GB: weights, gradients and AdamW's moments lie in host memory.
#
#     runs/one_gpu.sh
#     runs/one_gpu.sh --model DIR --data FILE         # without the hub; flags go on to srft.py
#
# Planned, not yet run on a GPU. `python srft.py --dry_run --dry_run_ranks 1` with the flags below says
#
#     Memory a rank, GiB                      training  generating
#       activations, temporaries at peak         19.81           -
#       flash attention's own, in backward        0.88           -
#       vLLM: asleep, 80% of card awake              -       59.60
#       vLLM's CUDA graphs (assumed)              1.00        1.00
#       CUDA, NCCL (assumed)                      2.00        2.00
#       total                                    23.68       62.60
#       left of 80 GB = 74.5 GiB                 50.82       11.90
#     in host memory (--offload): 113.48 GiB a rank: weights, optimizer, gradients
#
# and that without --offload neither phase fits.
#
# Needs:   one GPU of 80 GB, `pip install -r requirements.txt`, 160 GB of host memory (the plan's, beside all
#          else), 300 GB of disk.
# Takes:   days: more than eight times what docs/benchmarks.md models for eight cards. Neither measured nor
#          modelled for one. --prompts_per_step 16 is an eighth of the work, and another experiment.
# Writes:  out/one_gpu: metrics.jsonl, samples.jsonl, curves.png, report.html, checkpoints/ (91 GB each, three at a time),
#          and hf/, the trained model. The same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."

# --offload              the 113 GiB above
# --engine_memory        trainer and engine share the card in turns: what the plan leaves is the engine's KV
#                        cache, and more sequences at once are fewer waves of generation
# --micro_batch_tokens   each micro-batch copies all weights to the card: half as many cost half of that
# --hang_minutes         one card takes longer in one phase than the 30 minutes that eight may
python srft.py --resume --out out/one_gpu --offload --engine_memory 0.8 --micro_batch_tokens 32768 \
    --hang_minutes 120 "$@"
