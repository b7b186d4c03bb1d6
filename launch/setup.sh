#!/usr/bin/env bash
# Installs grpo and its pinned packages into .venv at the project's root. Does nothing if .venv is
# up to date.
#   ./launch/setup.sh
#   GRPO_DEVICE=cpu|cuda     the packages to install; default: cuda if nvidia-smi lists a GPU
#   PYTHON=python3.12        the interpreter; default: the first of python3.11, 3.12, 3.13, python3
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${GRPO_DEVICE:-}" ]]; then
  if nvidia-smi -L >/dev/null 2>&1; then GRPO_DEVICE=cuda; else GRPO_DEVICE=cpu; fi
fi
lock="launch/requirements-$GRPO_DEVICE.txt"
[[ -f "$lock" ]] || {
  echo "setup: GRPO_DEVICE=$GRPO_DEVICE is unknown: set it to cpu or cuda" >&2
  exit 2
}
stamp=".venv/.setup-$(cat "$lock" pyproject.toml launch/setup.sh | sha256sum | cut -c1-16)"
[[ -f "$stamp" ]] && exit 0

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
  done
fi
[[ -n "$python" ]] || {
  echo "setup: no Python 3.11 or later found: install one, or set PYTHON=/path/to/python" >&2
  exit 2
}
echo "setup: installing the $GRPO_DEVICE packages into .venv (takes some minutes)" >&2

rm -f .venv/.setup-*
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
log=.venv/setup.log
: >"$log"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }
trap 'echo "setup: installation failed; the last lines of $log:" >&2; tail -n 15 "$log" >&2' ERR
pip install "pip>=25" "setuptools>=77,<81" wheel ninja
torch="$(grep -E '^torch==' "$lock")"
if [[ "$GRPO_DEVICE" == cpu ]]; then
  # Torch comes first, because most package indexes have no +cpu builds. Only torch is installed
  # from the second index.
  pip install --no-deps "$torch" || pip install --no-deps "$torch" --index-url https://download.pytorch.org/whl/cpu
else
  pip install "$torch" # with dependencies: torch pins the CUDA libraries
fi
pip install --no-deps --no-build-isolation -r "$lock"
# An earlier installation may have left these packages: their CUDA builds break the import of every
# transformers model. The CPU wheel of vLLM lists them as requirements.
if [[ "$GRPO_DEVICE" == cpu ]]; then pip uninstall --yes torchvision torchaudio torchcodec; fi
rm -rf grpo.egg-info # one from an older installation would hide the new entry points
pip install --no-deps --no-build-isolation --editable .
touch "$stamp"
echo "setup: done. Run .venv/bin/grpo, or activate the environment: source .venv/bin/activate" >&2
