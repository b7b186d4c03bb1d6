#!/usr/bin/env bash
# The checks: format, lint, types, then tests with the real vLLM and DeepSpeed on tiny models.
#   ./launch/test.sh              what a contributor runs before a commit
#   ./launch/test.sh --all        and the drills (kills, chains, a full disk): an hour more
#   ./launch/test.sh ARGUMENT...  pytest's own: a file, -k NAME, -n 0 (one process, for a debugger)
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/mypy
workers=$(nproc)
((workers <= 4)) || workers=4
if nvidia-smi -L >/dev/null 2>&1; then workers=0; fi # engines would share the memory of a GPU
tests() { .venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"; }
if [[ "${1:-}" == --all ]]; then
  tests "${@:2}"
  tests -n 0 -m slow "${@:2}"
else
  tests "$@"
fi
