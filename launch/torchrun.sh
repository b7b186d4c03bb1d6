#!/usr/bin/env bash
# A run under torchrun on this machine: ./launch/torchrun.sh train configs/r1_zero_math_1.5b.yaml [key=value ...] [--resume]
# GPUS: learner ranks (default 1; the learner runs on one rank so far and says so when given more).
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,3s/^# //p' "$0"; exit 2; }
./launch/setup.sh
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node="${GPUS:-1}" --no-python .venv/bin/grpo "$@"
