#!/usr/bin/env bash
# A run as a Slurm job that goes on by itself after a preemption or a time limit:
#   sbatch --nodes=2 launch/slurm.sh train configs/r1_zero_math_7b.yaml [key=value ...]
#   ENGINE_NODES=1 TENSOR_PARALLEL=1 sbatch --nodes=3 launch/slurm.sh train ...     # the last nodes hold vLLM servers, the others learn
# Submit from the project's root, which all nodes see, after ./launch/setup.sh on a node with a GPU. Logs: runs/slurm-JOB-ROLE-NODE.log.
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
engine_nodes="${ENGINE_NODES:-0}" size="${TENSOR_PARALLEL:-1}" gpus="${SLURM_GPUS_PER_NODE:-8}"
gpus="${gpus##*:}" # a100:8
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from sbatch
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
learners=$((${#nodes[@]} - engine_nodes))
((learners >= 1)) || { echo "slurm.sh: ENGINE_NODES=$engine_nodes of ${#nodes[@]} nodes leaves none to learn" >&2; exit 2; }
more=()

if ((engine_nodes > 0)); then
  GRPO_ENGINE_TOKEN="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
  export GRPO_ENGINE_TOKEN # srun passes it on, no command line shows it
  urls=()
  for node in "${nodes[@]:learners}"; do
    for ((i = 0; i < gpus / size; i++)); do
      urls+=("http://$node:$((8000 + i))")
      devices="$(seq -s, $((i * size)) $((i * size + size - 1)))"
      srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --output="runs/slurm-%j-server$i-%N.log" \
        env CUDA_VISIBLE_DEVICES="$devices" ./launch/server.sh "$config" $((8000 + i)) "engine.servers={urls: [here], tensor_parallel: $size}" &
    done
  done
  more+=("engine.servers={urls: [$(IFS=,; echo "${urls[*]}")], tensor_parallel: $size}")
fi

# Slurm sends TERM to this script ten minutes before the end: the ranks save, and the job goes back into the queue.
preempted=0
srun --overlap --nodes="$learners" --ntasks="$learners" --nodelist="$(IFS=,; echo "${nodes[*]:0:learners}")" --kill-on-bad-exit=1 \
  --output="runs/slurm-%j-learner-%N.log" \
  .venv/bin/python -m torch.distributed.run --nnodes="$learners" --nproc-per-node="$gpus" --shutdown-timeout=500 \
  --rdzv-backend=c10d --rdzv-endpoint="${nodes[0]}:29500" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --no-python .venv/bin/grpo "$@" "${more[@]}" --auto-resume &
learner=$!
trap 'preempted=1; kill -TERM "$learner"' TERM
code=0
wait "$learner" || code=$?
if ((preempted)); then wait "$learner" || code=$?; fi # the trap ended the first wait
trap - TERM
if ((preempted)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code" # what is left of the job, the servers, ends with this script
