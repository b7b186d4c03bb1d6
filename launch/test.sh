#!/usr/bin/env bash
# The checks: lint, types, tests with the real vLLM and DeepSpeed on tiny models. --all adds the long drills of tests/slow/.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
if [[ "${1:-}" == --all ]]; then shift; else set -- --ignore tests/slow "$@"; fi
exec .venv/bin/python -m pytest "$@"
