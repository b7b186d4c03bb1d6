#!/usr/bin/env bash
# The whole chain on 2 CPU cores: environment, cold-start SFT, GRPO, evaluation on held-out problems before and after each, a summary.
#   ./launch/quickstart.sh               a 4M-parameter Qwen2 made on the spot
#   ./launch/quickstart.sh --smollm2     SmolLM2-135M-Instruct, a real pretrained model
#   --seed N                             another seed (default 0)
# What is finished is not done again: after Ctrl-C the same command goes on. Everything lies in runs/quickstart*/; remove it to start afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

name=tiny seed=0
while (($#)); do
  case "$1" in
    --smollm2) name=smollm2 ;;
    --seed) seed="${2:?--seed needs a number}"; shift ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0"; [[ "$1" == -h || "$1" == --help ]] && exit 0 || exit 2 ;;
  esac
  shift
done
run="runs/quickstart"
[[ "$name" == tiny ]] || run+="-$name"
[[ "$seed" == 0 ]] || run+="-seed$seed"

./launch/setup.sh
stage() { # stage NAME COMMAND CONFIG OVERRIDE...: runs what is not finished, goes on with what was stopped
  local folder="$run/$1" command="$2"
  if grep -qs '"status": "finished"' "$folder/manifest.json"; then return; fi
  local resume=(--resume)
  if [[ "$command" == eval ]]; then rm -rf "$folder"; fi
  [[ -f "$folder/manifest.json" ]] || resume=()
  echo "== $1: grpo $command $3" >&2
  .venv/bin/grpo "$command" "$3" run_dir="$folder" seed="$seed" "${@:4}" "${resume[@]}"
}
stage start eval "configs/$name.yaml" model.warm_start=
stage sft sft "configs/${name}_sft.yaml"
stage grpo train "configs/$name.yaml" model.warm_start= "model.path=$run/sft/final"
.venv/bin/python launch/summary.py "$run"
