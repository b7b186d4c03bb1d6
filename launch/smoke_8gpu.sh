#!/usr/bin/env bash
# Smoke test of a machine with several GPUs: two short runs, and one table of what they measured.
#   ./launch/smoke_8gpu.sh
# ranks: a learner rank and an engine per GPU, ZeRO-3, weights over CUDA IPC. After the checkpoint of
#        rollout 2, all processes are killed with SIGKILL, and the run is resumed.
# pool:  half of the GPUs are servers that sample during the updates, weights over NCCL.
# GPUS (default: those of the machine): number of GPUs. On a machine without GPUs, two ranks and one
# server share the CPU cores, and weights travel through shared memory.
# MODEL (default tiny-qwen2): a directory or an id on the hub. RUNS (default runs/smoke): the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -f launch/setup.sh ]]; then ./launch/setup.sh; fi # only a clone has it
source launch/find_grpo.sh
gpus="${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}"
runs="$(realpath -m "${RUNS:-runs/smoke}")" # absolute, because the kill below finds the run by it
((gpus != 1)) || { echo "smoke: needs at least two GPUs, found one" >&2; exit 2; }
ranks=$gpus pool_ranks=$((gpus / 2)) servers=$((gpus - gpus / 2))
if ((gpus < 2)); then ranks=2 pool_ranks=1 servers=1; fi
export PYTHONPATH="$PWD/launch${PYTHONPATH:+:$PYTHONPATH}" # for the reward
rm -rf "$runs"
mkdir -p "$runs"

cat >"$runs/config.yaml" <<CONFIG
run_dir: set below
model: {path: ${MODEL:-tiny-qwen2}, dtype: bfloat16}
data: {name: arithmetic, options: {digits: 3}}
prompt: {template: plain, max_tokens: 128}
sampling: {max_tokens: 128, ignore_eos: true}
algorithm: {kl_coef: 0.0}
rewards: {"smoke:varied": 1.0}
train: {rollouts: 4, problems: $((4 * ranks)), group_size: 8}
learner: {zero_stage: 3, micro_batch_tokens: 8192}
engine: {memory_fraction: 0.3}
eval: {every: 0}
checkpoint: {every: 2}
logging: {progress: line}
CONFIG

# train NAME RANKS ARGUMENT...: runs `grpo train`. Its output is in NAME.log.
train() {
  local name=$1 num_ranks=$2
  shift 2
  GPUS=$num_ranks ./launch/torchrun.sh train "$runs/config.yaml" run_dir="$runs/$name" "$@" >>"$runs/$name.log" 2>&1
}

echo "smoke: ranks ($ranks)" >&2
train ranks "$ranks" 2>/dev/null & # bash would report that the launcher was killed
pid=$!
while kill -0 "$pid" 2>/dev/null && [[ ! -d "$runs/ranks/checkpoints/step-000002" ]]; do sleep 0.1; done
pkill -KILL -f "run_dir=$runs/ranks" || true # the launcher and the ranks; the engines end with them
wait "$pid" 2>/dev/null || true
train ranks "$ranks" --resume || true

echo "smoke: pool ($pool_ranks ranks, $servers servers)" >&2
train pool "$pool_ranks" "engine.servers={count: $servers}" train.max_staleness=1 train.rollouts=3 || true

"$bin/python" launch/smoke.py "$runs"
