#!/bin/bash
#SBATCH --job-name=srft --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96 --exclusive
#SBATCH --time=24:00:00 --requeue --open-mode=append
#SBATCH --signal=TERM@1200     # 20 minutes before the time is up, to every torchrun: finish the step, save
# The paper's 64 GPUs under SLURM: 8 nodes of 8, weights sharded within a node and replicated across (HSDP).
#
#     OUT=/shared/srft sbatch runs/slurm.sh                              # from this repository, see below
#     OUT=/shared/srft sbatch runs/slurm.sh --model DIR --data FILE      # nodes without a network
#
# Flags go on to srft.py; --eval_data FILE,... draws held-out curves. Adapt CPUs, --time and OUT.
#
# Needs:   this repository, OUT, and .venv with requirements.txt (that of `make` is for CPUs) on a file system
#          that all nodes share; 80 GB a GPU.
# Takes:   modelled, not measured: docs/benchmarks.md. When the time is up, or a node is lost, the job
#          requeues itself and goes on from the newest checkpoint.
# Writes:  $OUT, as runs/paper.sh does without its evaluation, and here started-JOB, to tell new checkpoints.
#
# Not yet tried on such a cluster.
set -euo pipefail
OUT=${OUT:-/shared/srft}
. .venv/bin/activate
# sed, not head: head leaves early, and pipefail would take scontrol's broken pipe for a failure.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
touch "started-$SLURM_JOB_ID"
status=0
# Node 0 by its address: launchers that meet by --rdzv_backend=c10d would wait for a lost node for ever.
# $SLURM_NODEID is each task's own, so a shell on its node puts it in.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --node_rank="$SLURM_NODEID" --nproc_per_node=8 \
        --master_addr="$0" --master_port=29500 --shutdown-timeout 1100 srft.py --device cuda --resume "$@"' \
    "$HEAD" --out "$OUT" "$@" || status=$?
# Time up, a node lost, a hang: go on from the newest checkpoint, as long as each start has brought one.
# (hf/ is written when training is done.)
new=$(find "$OUT/checkpoints" -name 'step-*' -newer "started-$SLURM_JOB_ID" 2> /dev/null) || true
if [ ! -d "$OUT/hf" ] && [ -n "$new" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
