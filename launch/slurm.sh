#!/usr/bin/env bash
# Runs a grpo command as a Slurm job. After a preemption or a time limit the job requeues itself and
# resumes.
#   sbatch --nodes=2 launch/slurm.sh train configs/r1_zero_math_7b.yaml [key=value ...]
#   ENGINE_NODES=1 TENSOR_PARALLEL=1 sbatch --nodes=3 launch/slurm.sh train CONFIG [key=value ...]
# ENGINE_NODES (default 0): the last nodes run vLLM servers, the others run learner ranks.
# TENSOR_PARALLEL (default 1): GPUs per server.
# First run ./launch/setup.sh on a node with a GPU, and mkdir -p runs: Slurm does not create the
# directory of the logs, runs/slurm-JOB.log and runs/slurm-JOB-ROLE-NODE.log. Submit from the
# project's root, which must be on a file system that all nodes share.
#SBATCH --job-name=grpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail
(($# >= 2)) || { echo "usage: sbatch launch/slurm.sh COMMAND CONFIG [key=value ...]" >&2; exit 2; }
config="$2"
engine_nodes="${ENGINE_NODES:-0}" tensor_parallel="${TENSOR_PARALLEL:-1}"
gpus="${SLURM_GPUS_PER_NODE:-8}"
gpus="${gpus##*:}" # the value may have a type: a100:8
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not inherit it from sbatch
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
learners=$((${#nodes[@]} - engine_nodes))
((learners >= 1)) || {
  echo "slurm.sh: ENGINE_NODES=$engine_nodes leaves no node for the learner in a job of" \
    "${#nodes[@]} nodes: lower ENGINE_NODES or raise --nodes" >&2
  exit 2
}
server_overrides=()

if ((engine_nodes > 0)); then
  GRPO_ENGINE_TOKEN="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
  export GRPO_ENGINE_TOKEN # passed on by srun; an argument would be visible in process lists
  urls=()
  for node in "${nodes[@]:learners}"; do
    for ((i = 0; i < gpus / tensor_parallel; i++)); do
      urls+=("http://$node:$((8000 + i))")
      first_gpu=$((i * tensor_parallel))
      devices="$(seq -s, "$first_gpu" $((first_gpu + tensor_parallel - 1)))"
      # `here` is a placeholder: only the trainer needs the addresses.
      srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --output="runs/slurm-%j-server$i-%N.log" \
        env CUDA_VISIBLE_DEVICES="$devices" ./launch/server.sh "$config" $((8000 + i)) "engine.servers={urls: [here], tensor_parallel: $tensor_parallel}" &
    done
  done
  server_overrides+=("engine.servers={urls: [$(IFS=,; echo "${urls[*]}")], tensor_parallel: $tensor_parallel}")
fi

# Slurm sends TERM to this script 600 s before the job ends (--signal above). The ranks then save a
# checkpoint, and the job is requeued.
preempted=0
srun --overlap --nodes="$learners" --ntasks="$learners" --nodelist="$(IFS=,; echo "${nodes[*]:0:learners}")" --kill-on-bad-exit=1 \
  --output="runs/slurm-%j-learner-%N.log" \
  .venv/bin/python -m torch.distributed.run --nnodes="$learners" --nproc-per-node="$gpus" --shutdown-timeout=500 \
  --rdzv-backend=c10d --rdzv-endpoint="${nodes[0]}:29500" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --no-python .venv/bin/grpo "$@" "${server_overrides[@]}" --auto-resume &
learner=$!
trap 'preempted=1; kill -TERM "$learner"' TERM
code=0
wait "$learner" || code=$?
if ((preempted)); then wait "$learner" || code=$?; fi # the signal interrupted the first wait
trap - TERM
if ((preempted)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code" # the servers are steps of this job and end with it
