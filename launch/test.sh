#!/usr/bin/env bash
# Checks format, lint and types, then runs the tests with vLLM and DeepSpeed on tiny models.
#   ./launch/test.sh              the checks before each commit
#   ./launch/test.sh --all        also the slow tests (kills, chains, a full disk), 1.5 to 3 hours
#   ./launch/test.sh ARGUMENT...  arguments of pytest: a file, -k NAME, -n 0 (one process, to debug)
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/mypy
workers=$(nproc)
((workers <= 4)) || workers=4
if nvidia-smi -L >/dev/null 2>&1; then workers=0; fi # parallel engines would compete for GPU memory
tests() { .venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"; }
if [[ "${1:-}" == --all ]]; then
  tests "${@:2}"
  tests -n 0 -m slow "${@:2}"
else
  tests "$@"
fi
