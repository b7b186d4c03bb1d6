#!/usr/bin/env bash
# Makes .venv at the project's root with the pinned packages for this machine; does nothing, silently, when that is done already.
#   ./launch/setup.sh            GRPO_DEVICE=cpu|cuda overrides what is found        PYTHON=python3.12 chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${GRPO_DEVICE:-}" ]]; then
  if nvidia-smi -L >/dev/null 2>&1; then GRPO_DEVICE=cuda; else GRPO_DEVICE=cpu; fi
fi
lock="launch/requirements-$GRPO_DEVICE.txt"
[[ -f "$lock" ]] || { echo "setup: GRPO_DEVICE=$GRPO_DEVICE: expected cpu or cuda" >&2; exit 2; }
stamp=".venv/.setup-$(cat "$lock" pyproject.toml launch/setup.sh | sha256sum | cut -c1-16)"
[[ -f "$stamp" ]] && exit 0

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
  done
fi
[[ -n "$python" ]] || { echo "setup: needs Python 3.11 or later; set PYTHON=/path/to/python" >&2; exit 2; }
echo "setup: installing the $GRPO_DEVICE packages into .venv (some minutes, once)" >&2

rm -f .venv/.setup-*
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
log=.venv/setup.log
: >"$log"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }
trap 'echo "setup: failed; the end of $log:" >&2; tail -n 15 "$log" >&2' ERR
pip install "pip>=25" "setuptools>=77,<81" wheel ninja
torch="$(grep -E '^torch==' "$lock")"
if [[ "$GRPO_DEVICE" == cpu ]]; then
  # Torch first: any other package asking for plain `torch` takes the newest CUDA build. Most indexes have no +cpu builds.
  pip install --no-deps "$torch" || pip install --no-deps "$torch" --index-url https://download.pytorch.org/whl/cpu
else
  pip install "$torch" # with the CUDA libraries that it pins itself
fi
pip install --no-deps --no-build-isolation -r "$lock"
# CUDA builds that the CPU wheel of vLLM asks for; with them no model of transformers can be imported.
if [[ "$GRPO_DEVICE" == cpu ]]; then pip uninstall --yes torchvision torchaudio torchcodec; fi
rm -rf grpo.egg-info # of an older install: here it would hide the new one's entry points
pip install --no-deps --no-build-isolation --editable .
touch "$stamp"
echo "setup: done; run with .venv/bin/grpo, or: source .venv/bin/activate" >&2
