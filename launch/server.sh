#!/usr/bin/env bash
# A vLLM server for a run whose config names it under engine.servers.urls, on the GPUs that this node shows:
#   GRPO_ENGINE_TOKEN=... ./launch/server.sh configs/r1_zero_math_7b.yaml 8000 [key=value ...]
# The trainer has the same variable and the same config; the server starts with random weights and gets the learner's.
# RESTARTS (default 20): how often one that dies is started again; a mistake in what it was given ends it.
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,5s/^# //p' "$0"; exit 2; }
server=""
trap 'RESTARTS=0; [[ -z "$server" ]] || kill -TERM "$server"' TERM INT
for ((left = ${RESTARTS:-20}; left >= 0; left--)); do
  .venv/bin/python -m grpo.engines.server "$@" &
  server=$! code=0
  wait "$server" || code=$?
  ((code != 2 && left > 0 && ${RESTARTS:-20} > 0)) || break
  echo "server.sh: the server ended with code $code; starting it again" >&2
  sleep 5
done
exit "$code"
