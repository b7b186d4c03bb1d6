#!/usr/bin/env bash
# Starts a vLLM server on this node's visible GPUs, for a run that lists it in engine.servers.urls:
#   GRPO_ENGINE_TOKEN=... ./launch/server.sh CONFIG PORT [key=value ...]
#   GRPO_ENGINE_TOKEN=... ./launch/server.sh configs/r1_zero_math_7b.yaml 8000
# Start the trainer with the same token and the same config. The server starts with random weights
# and receives the learner's weights from the trainer.
# RESTARTS (default 20): how often a server that ends is restarted. After an error in the config
# (exit code 2) it is not restarted.
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,8s/^# //p' "$0"; exit 2; }
source launch/find_grpo.sh
server="" stopped=0
code=143 # if a signal arrives before the first start
trap 'stopped=1; [[ -z "$server" ]] || kill -TERM "$server" 2>/dev/null || true' TERM INT
for ((restarts_left = ${RESTARTS:-20}; restarts_left >= 0 && !stopped; restarts_left--)); do
  "$bin/python" -m grpo.engines.servers "$@" &
  server=$! code=0
  # A signal may have come before `server` was set.
  ((!stopped)) || kill -TERM "$server" 2>/dev/null || true
  wait "$server" || code=$?
  if ((stopped)); then wait "$server" || code=$?; fi # the signal interrupted the first wait
  ((code != 2 && restarts_left > 0 && !stopped)) || break
  echo "server.sh: the server ended with exit code $code; restarting it in 5 s" >&2
  sleep 5
done
exit "$code"
