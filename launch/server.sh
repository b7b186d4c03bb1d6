#!/usr/bin/env bash
# A vLLM server for a run whose config names it under engine.servers.urls, on the GPUs that this node shows:
#   GRPO_ENGINE_TOKEN=... ./launch/server.sh configs/r1_zero_math_7b.yaml 8000 [key=value ...]
# The trainer has the same variable and the same config; the server starts with random weights and gets the learner's.
# RESTARTS (default 20): how often one that dies is started again; a mistake in what it was given ends it.
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,5s/^# //p' "$0"; exit 2; }
server="" stopped=0 code=143
trap 'stopped=1; [[ -z "$server" ]] || kill -TERM "$server" 2>/dev/null || true' TERM INT
for ((left = ${RESTARTS:-20}; left >= 0 && !stopped; left--)); do
  .venv/bin/python -m grpo.engines.servers "$@" &
  server=$! code=0
  ((!stopped)) || kill -TERM "$server" 2>/dev/null || true # the signal came before its number was known
  wait "$server" || code=$?
  if ((stopped)); then wait "$server" || code=$?; fi # the trap ended the first wait
  ((code != 2 && left > 0 && !stopped)) || break
  echo "server.sh: the server ended with code $code; starting it again" >&2
  sleep 5
done
exit "$code"
