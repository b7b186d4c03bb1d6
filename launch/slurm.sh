#!/usr/bin/env bash
# A run as a Slurm job that goes on by itself after a preemption or a time limit:
#   sbatch launch/slurm.sh train configs/r1_zero_math_1.5b.yaml [key=value ...]
# Submit from the project's root, after ./launch/setup.sh on a node that sees the GPUs.
#SBATCH --job-name=grpo
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail
(($# >= 2)) || { echo "usage: sbatch launch/slurm.sh COMMAND CONFIG [key=value ...]" >&2; exit 2; }
resume=()
if [[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]]; then resume=(--resume); fi
# Slurm sends TERM five minutes before the end: the run saves and exits with 130, and the job goes back into the queue.
code=0
srun .venv/bin/grpo "$@" "${resume[@]}" || code=$?
if ((code == 130)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
