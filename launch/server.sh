#!/usr/bin/env bash
# A vLLM server for a run whose config names it under engine.servers.urls, on the GPUs that this node shows:
#   GRPO_ENGINE_TOKEN=... ./launch/server.sh configs/r1_zero_math_7b.yaml 8000 [key=value ...]
# The trainer has the same variable and the same config; the server starts with random weights and gets the learner's.
set -euo pipefail
cd "$(dirname "$0")/.."
(($# >= 2)) || { sed -n '2,4s/^# //p' "$0"; exit 2; }
exec .venv/bin/python -m grpo.engines.server "$@"
