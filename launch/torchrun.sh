#!/usr/bin/env bash
# Runs a grpo command on this machine with one learner rank per GPU. Each rank has an engine on the
# same GPU unless the config has engine.servers.
#   GPUS=8 ./launch/torchrun.sh train configs/r1_zero_math_7b.yaml [key=value ...] [--resume]
# GPUS (default 1): number of learner ranks. With GPUS=4 and engine.servers={count: 4}, the servers
# use the other four of eight GPUs.
# GRACE (default 600): seconds that the ranks have to save the last complete rollout after Ctrl-C or
# SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,8s/^# //p' "$0"; exit 2; }
if [[ -f launch/setup.sh ]]; then ./launch/setup.sh; fi # only a clone has it
source launch/find_grpo.sh
# Without --local-addr, the ranks would look up this machine's host name.
exec "$bin/python" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="${GPUS:-1}" --shutdown-timeout="${GRACE:-600}" \
  --no-python "$bin/grpo" "$@"
