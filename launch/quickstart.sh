#!/usr/bin/env bash
# Installs grpo (in a clone), then runs cold-start SFT and GRPO; 2 CPU cores are enough. Evaluates
# the model on held-out problems before SFT, after SFT and after GRPO, and prints a summary.
#   ./launch/quickstart.sh               a new 4M-parameter Qwen2 with random weights
#   ./launch/quickstart.sh --smollm2     the pretrained model SmolLM2-135M-Instruct
#   --seed N                             the seed (default 0)
# After an interruption, the same command continues the run and skips finished stages. All files are
# in runs/quickstart*/. Delete that directory to start again.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; }
name=tiny seed=0
while (($#)); do
  case "$1" in
    --smollm2) name=smollm2 ;;
    --seed) seed="${2:?--seed needs a number}"; shift ;;
    -h | --help) usage; exit 0 ;;
    *) usage; exit 2 ;;
  esac
  shift
done
run="runs/quickstart"
[[ "$name" == tiny ]] || run+="-$name"
[[ "$seed" == 0 ]] || run+="-seed$seed"

if [[ -f launch/setup.sh ]]; then ./launch/setup.sh; fi # only a clone has it
source launch/find_grpo.sh
dtype=()
# Without AVX-512, PyTorch multiplies bfloat16 matrices many times slower than float32 ones.
if [[ "$(uname -m)" == x86_64 ]] && ! grep -q avx512f /proc/cpuinfo &&
  ! nvidia-smi -L >/dev/null 2>&1; then
  dtype=(model.dtype=float32)
fi
stage() { # stage NAME COMMAND CONFIG OVERRIDE...: runs or resumes a stage; skips a finished one
  local folder="$run/$1" command="$2"
  if grep -qs '"status": "finished"' "$folder/manifest.json"; then return; fi
  if [[ "$command" == eval ]]; then rm -rf "$folder"; fi # an unfinished evaluation starts again
  local resume=()
  if [[ -f "$folder/manifest.json" ]]; then resume=(--resume); fi
  echo "== $1: grpo $command $3" >&2
  "$bin/grpo" "$command" "$3" run_dir="$folder" seed="$seed" "${dtype[@]}" "${@:4}" "${resume[@]}"
}
stage start eval "configs/$name.yaml" model.warm_start=
stage sft sft "configs/${name}_sft.yaml"
stage grpo train "configs/$name.yaml" model.warm_start= "model.path=$run/sft/final"
"$bin/python" launch/summary.py "$run"
