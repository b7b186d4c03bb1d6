#!/usr/bin/env bash
# Runs steps on a GPU machine without a network. Call it in the root of the checkout:
#   OUT=FOLDER bash .gpukit/s/gpu.sh SECONDS STEP...
# tests/gpu/README.md explains the steps; STEP+STEP runs two at the same time. A step that does not
# end within SECONDS is stopped, and steps for which no time remains are skipped. If a step fails, the next one runs all the same, except
# after `setup`.
# Results: $OUT/summary.txt, $OUT/logs.tar.gz. Unpacked packages remain in /tmp/gk as long as the
# machine runs, so later calls do not need `setup`.
set -u
checkout=$PWD
kit=/tmp/gk
scripts=$PWD/.gpukit/s
budget=$1
shift
mkdir -p $kit/logs $kit/parts "$OUT"
cp .gpukit/*/smollm2.part* $kit/parts/ 2>/dev/null # the machine drops the parts of earlier calls
repository=$kit/repo
[[ -d grpo ]] && repository=$checkout
scratch=/tmp
(($(df -Pk /dev/shm | awk 'END {print $4}') > 30000000)) && scratch=/dev/shm
export TMPDIR=$scratch PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRITON_CACHE_DIR=$kit/triton CUDA_MODULE_LOADING=LAZY
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=INFO VLLM_CACHE_ROOT=$kit/vllm
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0 # the archive contains neither library
export TORCH_COMPILE_DISABLE=${TORCH_COMPILE_DISABLE-1}   # engines do not compile, but use CUDA graphs
export LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/nvidia/lib:${LD_LIBRARY_PATH:-}
[[ -f $kit/env ]] && . $kit/env # variables that the step `engine` has found

log() { printf '%4d s  %s\n' $SECONDS "$*" | tee -a "$OUT/summary.txt"; }

# step NAME LIMIT LINES COMMAND...: runs COMMAND for at most LIMIT seconds and adds the last LINES
# lines of its output to the summary, without the figures of tests.
step() {
  local name=$1 limit=$2 lines=$3 start=$SECONDS remaining=$((budget - SECONDS - 4)) code
  shift 3
  ((remaining < 10)) && { log "$name: skipped, no time remains"; return 1; }
  ((limit > remaining)) && limit=$remaining
  (cd "$repository" 2>/dev/null || cd /tmp; exec timeout -k 3 "$limit" "$@") >$kit/logs/$name.log 2>&1
  code=$?
  log "$name: exit code $code, $((SECONDS - start)) s"
  grep -avE '^\s*$|Loading weights|it/s\]|figure: ' $kit/logs/$name.log | tail -n "$lines" | cut -c1-220 | tee -a "$OUT/summary.txt"
  return $code
}

# tests NAME FILE...: runs the tests in FILES and adds the figures that they print to the summary.
tests() {
  rm -f $kit/logs/"$1".log
  step "$1" 240 8 python3 -m pytest -s "${@:2}" --basetemp=$scratch/pytest-"$1"
  grep -aoh 'figure: .*' $kit/logs/"$1".log 2>/dev/null | tee -a "$OUT/summary.txt"
}

# train NAME CONFIG OVERRIDES...: trains SmolLM2. Its engine may use a fifth of the GPU memory. A run
# that its canary stops is repeated with a limit that rounding noise does not reach.
train() {
  local name=$1 command
  command=(python3 -m grpo train "$2" run_dir=$scratch/"$name" engine.memory_fraction=0.2 engine.kv_cache_gb=null logging.progress=line "${@:3}")
  step smol-model 60 2 python3 "$scripts/gk_smol.py" $kit/parts || return
  step "$name" 400 16 "${command[@]}" && return
  grep -aq 'the canary found' $kit/logs/"$name".log || return
  rm -rf "${scratch:?}/$name"
  step "$name-large-gap" 400 16 "${command[@]}" probe.max_gap=2
}

cycle_path=$repository/tests/benchmarks:$scripts${PYTHONPATH:+:$PYTHONPATH} # for gk_cycle.py

run_word() {
  local word=$1
  case "$word" in
    setup)
      step setup 60 3 python3 "$scripts/gk_setup.py" "$checkout" || return
      nohup setsid python3 -m compileall -q -j 8 $kit/site >/dev/null 2>&1 &
      ;;
    facts) step facts 40 16 bash "$scripts/facts.sh" ;;
    kernels) step kernels 100 26 python3 "$scripts/gk_kernels.py" ;;
    logprobs) tests logprobs tests/gpu/test_2_kernels.py::test_logprob_kernels_match_pytorch_operations ;;
    engine)
      step engine 240 10 python3 "$scripts/gk_engine.py"
      [[ -f $kit/env ]] && . $kit/env
      ;;
    ipc) tests ipc tests/gpu/test_1_weights.py ;;
    learner) tests learner tests/gpu/test_2_kernels.py tests/gpu/test_3_learner.py ;;
    run) tests run tests/gpu/test_4_runs.py ;;
    nccl) tests nccl tests/gpu/test_5_nccl.py ;;
    deterministic) tests deterministic tests/gpu/test_6_deterministic.py ;;
    cycle*) # cycle:NAME=VALUE,key=value: environment variables (upper case), config keys (lower case)
      local environment=() overrides=()
      for part in $(tr ':,' '  ' <<<"${word#cycle}"); do
        if [[ $part =~ ^[A-Z] ]]; then environment+=("$part"); else overrides+=("$part"); fi
      done
      step "cycle-$SECONDS" 180 18 env PYTHONPATH="$cycle_path" "${environment[@]}" python3 "$scripts/gk_cycle.py" ours "${overrides[@]}"
      ;;
    trl) step trl 150 14 env PYTHONPATH="$cycle_path" python3 "$scripts/gk_cycle.py" trl ;;
    smol) train smol configs/smollm2.yaml learner.micro_batch_tokens=16384 ;;
    gsm8k)
      train gsm8k configs/gsm8k_smollm2.yaml data.path=$kit/data learner.micro_batch_tokens=32768 engine.max_sequences=256 train.rollouts=72 checkpoint.every=0
      ;;
    *) log "unknown step $word" ;;
  esac
}

for word in "$@"; do
  if [[ $word == *+* ]]; then
    processes=()
    for part in ${word//+/ }; do
      run_word "$part" &
      processes+=($!)
    done
    wait "${processes[@]}"
  else
    run_word "$word" || [[ $word != setup ]] || break
  fi
done
find $scratch $kit/logs -name '*.log' -size -20M -print0 2>/dev/null | tar --null -czf "$OUT/logs.tar.gz" -T - 2>/dev/null
for run in smol gsm8k; do cp $scratch/$run/metrics.jsonl "$OUT/$run.jsonl" 2>/dev/null; done
log "end; GPU memory in use $(nvidia-smi --query-gpu=memory.used --format=csv,noheader)"
