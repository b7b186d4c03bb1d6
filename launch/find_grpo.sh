#!/usr/bin/env bash
# Sets `bin`, the folder of the commands grpo and python: .venv/bin if grpo is installed there, else
# that of the grpo on PATH. For the other scripts, in the folder that contains launch/:
#   source launch/find_grpo.sh
set -euo pipefail
bin=.venv/bin
if [[ ! -x .venv/bin/grpo ]]; then
  grpo="$(command -v grpo)" || {
    echo "grpo is neither in .venv/bin nor on PATH: run ./launch/setup.sh in a clone, or activate the" \
      "environment with grpo-trainer" >&2
    return 2
  }
  bin="$(dirname "$(readlink -f "$grpo")")"
  [[ -x "$bin/python" ]] || {
    echo "$bin has grpo, but no python: install grpo-trainer into a virtual environment" >&2
    return 2
  }
fi
