#!/usr/bin/env bash
# The tiny model trained with SRFT on a CPU, in two processes with FSDP2, vLLM and the grader: the demo.
#
#     make demo                                 # installs first, once
#     runs/tiny.sh                              # the same run, where .venv is there already
#     runs/tiny.sh --out out/mine --steps 20    # flags go on to srft.py; a folder that holds a run is refused
#
# Needs:   2 cores; no GPU, no network. TORCHRUN=DIR/torchrun is that of another environment.
# Takes:   two to four minutes.
# Writes:  out/tiny: metrics.jsonl, samples.jsonl, curves.png, report.html, checkpoints/, and hf/, the trained model.
set -euo pipefail
cd "$(dirname "$0")/.."

# One thread a process: two ranks with a thread pool each fight over the cores.
export OMP_NUM_THREADS=1
# torch's own errors only: on a CPU, vLLM warns through it of how it places memory.
export TORCH_CPP_LOG_LEVEL=ERROR

# --local_addr: else torchrun asks the network for this machine's own name, and waits for minutes where nobody
# knows it.
"${TORCHRUN:-.venv/bin/torchrun}" --standalone --local_addr=127.0.0.1 --nproc_per_node=2 \
    srft.py --preset tiny "$@"
