#!/usr/bin/env bash
# Runs a grpo command as a Slurm job. After a preemption or a time limit the job requeues itself and
# resumes.
#   sbatch --account=A --partition=P launch/slurm.sh train configs/r1_zero_math_7b_8x80gb.yaml [key=value ...]
#   ENGINE_NODES=1 TENSOR_PARALLEL=1 sbatch --nodes=3 launch/slurm.sh train CONFIG [key=value ...]
# train, sft, distill and doctor run one rank per GPU of all nodes. Other commands (collect, eval,
# quantize, pipeline) run in one process on one node; for collect and eval, `engine.servers={count: 8}`
# uses all its GPUs.
#   ENGINE_NODES (default 0)     the last nodes run vLLM servers, the others run the command (train,
#                                distill, collect, eval)
#   TENSOR_PARALLEL (default 1)  GPUs per server
#   SRUN_OPTIONS                 more options of each srun, e.g. --container-image=... (Pyxis)
#   RUN_IN                       words before each command, e.g. apptainer exec --nv grpo.sif
# Before the first job, run GRPO_DEVICE=cuda ./launch/setup.sh in a clone; or install grpo-trainer,
# run `grpo files --copy FOLDER` and activate the environment. Submit from the folder that contains
# launch/. It and the environment must be on a file system that all nodes share. The job's log is
# slurm-JOB.log; the logs of its steps are runs/slurm-JOB/ROLE-NODE.log. docs/cluster.md describes
# containers and nodes without internet.
#SBATCH --job-name=grpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

fail() { echo "slurm.sh: $*" >&2; exit 2; }

(($# >= 2)) || fail "usage: sbatch launch/slurm.sh COMMAND CONFIG [key=value ...]"
[[ -f launch/server.sh ]] || fail "$PWD has no launch/: submit the job from the folder that has it"
srun_options=() run_in=()
read -rd '' -a srun_options <<<"${SRUN_OPTIONS:-}" || true # the value may have several lines
read -rd '' -a run_in <<<"${RUN_IN:-}" || true
bin=.venv/bin # of the container
((${#srun_options[@]} + ${#run_in[@]})) || source launch/find_grpo.sh ||
  fail "for GPUs, run GRPO_DEVICE=cuda ./launch/setup.sh first, or set a container"
command="$1" config="$2"
engine_nodes="${ENGINE_NODES:-0}" tensor_parallel="${TENSOR_PARALLEL:-1}"
gpus="${SLURM_GPUS_PER_NODE:-8}"
gpus="${gpus##*:}" # the value may have a type: a100:8
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not inherit it from sbatch
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_nodes=$((${#nodes[@]} - engine_nodes)) # the nodes that run the command
((main_nodes >= 1)) ||
  fail "ENGINE_NODES=$engine_nodes leaves no node for the learner in a job of ${#nodes[@]} nodes:" \
    "lower ENGINE_NODES or raise --nodes"

case "$command" in
  train | distill | collect | eval) ;;
  *) ((engine_nodes == 0)) || fail "grpo $command uses no vLLM servers: remove ENGINE_NODES" ;;
esac
case "$command" in
  train | sft | distill | doctor)
    # Slurm sends TERM to this script 600 s before the job ends (--signal above). The ranks then have
    # 500 s to save a checkpoint.
    launcher=("$bin/python" -m torch.distributed.run
      --nnodes="$main_nodes" --nproc-per-node="$gpus" --shutdown-timeout=500
      --rdzv-backend=c10d --rdzv-endpoint="${nodes[0]}:29500"
      --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --no-python)
    ;;
  *)
    ((main_nodes == 1)) ||
      fail "grpo $command runs in one process, but the job has $main_nodes nodes for it: submit it" \
        "with --nodes=$((engine_nodes + 1))"
    launcher=()
    ;;
esac

logs="runs/slurm-$SLURM_JOB_ID"
mkdir -p "$logs" # srun does not create it
echo "slurm.sh: grpo $*; the logs of its steps are in $logs/"

server_overrides=()
if ((engine_nodes > 0)); then
  GRPO_ENGINE_TOKEN="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
  export GRPO_ENGINE_TOKEN # passed on by srun; an argument would be visible in process lists
  urls=()
  for node in "${nodes[@]:main_nodes}"; do
    for ((i = 0; i < gpus / tensor_parallel; i++)); do
      urls+=("http://$node:$((8000 + i))")
      first_gpu=$((i * tensor_parallel))
      devices="$(seq -s, "$first_gpu" $((first_gpu + tensor_parallel - 1)))"
      # `here` is a placeholder: only the trainer needs the addresses.
      srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
        --output="$logs/server$i-%N.log" --open-mode=append \
        "${srun_options[@]}" env CUDA_VISIBLE_DEVICES="$devices" "${run_in[@]}" \
        ./launch/server.sh "$config" $((8000 + i)) "${@:3}" \
        "engine.servers={urls: [here], tensor_parallel: $tensor_parallel}" &
    done
  done
  server_overrides+=("engine.servers={urls: [$(IFS=,; echo "${urls[*]}")], tensor_parallel: $tensor_parallel}")
fi

preempted=0
srun --overlap --nodes="$main_nodes" --ntasks="$main_nodes" --kill-on-bad-exit=1 \
  --nodelist="$(IFS=,; echo "${nodes[*]:0:main_nodes}")" \
  --output="$logs/$command-%N.log" --open-mode=append \
  "${srun_options[@]}" "${run_in[@]}" "${launcher[@]}" \
  "$bin/grpo" "$@" "${server_overrides[@]}" --auto-resume &
main_step=$!
trap 'preempted=1; kill -TERM "$main_step"' TERM
code=0
wait "$main_step" || code=$?
if ((preempted)); then wait "$main_step" || code=$?; fi # the signal interrupted the first wait
trap - TERM
if ((preempted)); then scontrol requeue "$SLURM_JOB_ID"; fi
((code == 0)) || echo "slurm.sh: grpo $command ended with exit code $code: see $logs/" >&2
exit "$code" # the servers are steps of this job and end with it
