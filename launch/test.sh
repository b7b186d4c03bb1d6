#!/usr/bin/env bash
# The checks: lint, types, tests with the real vLLM and DeepSpeed on tiny models. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
