#!/usr/bin/env bash
# A run on this machine, one learner rank a GPU, each with an engine on its own GPU unless the config has engine.servers:
#   GPUS=8 ./launch/torchrun.sh train configs/r1_zero_math_7b.yaml [key=value ...] [--resume]
# GPUS: learner ranks (default 1). With engine.servers={count: 4} and GPUS=4 the servers have the other four GPUs.
# Ctrl-C or SIGTERM saves the last whole rollout; GRACE (seconds, default 600) is how long that may take.
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,5s/^# //p' "$0"; exit 2; }
./launch/setup.sh
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node="${GPUS:-1}" --shutdown-timeout="${GRACE:-600}" \
  --no-python .venv/bin/grpo "$@"
