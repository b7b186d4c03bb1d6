#!/usr/bin/env bash
# The checks: lint, types, tests with the real vLLM and DeepSpeed on tiny models. `--all` adds the drills of tests/slow/ (kills, full disk).
# Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ "${1:-}" == --all ]] && set -- -m "slow or not slow" "${@:2}"
./launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
