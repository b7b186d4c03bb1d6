"""Arguments and environment variables of a vLLM engine, for the child process and for servers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from grpo import config as configs
from grpo.engines.determinism import BATCH_INVARIANT_VARIABLE
from grpo.metrics.memory import cpu_kv_cache_bytes
from grpo.run import ranks
from grpo.run.addresses import LOOPBACK_VARIABLES

# A launcher sets these variables for the learner's process group. An engine must not inherit them:
# it is not a member of that group.
GROUP_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)
GROUP_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")
DEFAULT_CPU_BLOCK_SIZE = 32  # tokens per block of the KV cache on a CPU
MIN_CPU_STEP_TOKENS = 4096  # lower bound of the tokens per scheduling step on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that an engine serves.

    Attributes:
        model_dir: the directory with the model's config and weights.
        dtype: "float32" or "bfloat16".
        max_model_len: the maximum length of a sequence, prompt and completion, in tokens.
        load_weights: start with the weights in `model_dir`. If False, the engine starts with random
            weights and must receive weights before it samples.
        float32_head: compute the output head in float32.
    """

    model_dir: str
    dtype: str
    max_model_len: int
    load_weights: bool = False
    float32_head: bool = False


def llm_arguments(
    model: ServedModel, settings: configs.EngineSettings, *, cuda: bool
) -> dict[str, Any]:
    """Returns the keyword arguments of vLLM's `LLM`.

    Args:
        model: the model to serve.
        settings: the section `engine` of the config.
        cuda: True for an engine on a GPU, False for one on a CPU.
    """
    eager = settings.eager
    if eager is None:
        eager = not cuda
    block_size = settings.block_size
    if not block_size and not cuda:
        block_size = DEFAULT_CPU_BLOCK_SIZE
    arguments: dict[str, Any] = {
        "model": model.model_dir,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "load_format": "auto" if model.load_weights else "dummy",
        "max_num_seqs": settings.max_sequences,
        "enforce_eager": eager,
        "enable_prefix_caching": True,
        "seed": 0,  # not used for sampling: every request has a seed of its own
    }
    if model.float32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if block_size:
        arguments["block_size"] = block_size
    if cuda:
        arguments["gpu_memory_utilization"] = settings.memory_fraction
        arguments["enable_sleep_mode"] = settings.sleep
        if settings.kv_cache_gb:  # vLLM then does not measure the memory
            arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gb * 2**30)
    else:
        arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(settings)
        # When vLLM 0.32 splits a prompt into chunks, it rewinds the request's random generator
        # (`Generator.set_offset`), which a generator on a CPU does not support. Prompts are
        # therefore not split, and a scheduling step has room for a prompt of maximum length.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(model.max_model_len, MIN_CPU_STEP_TOKENS)
    return arguments


def vllm_environment(settings: configs.EngineSettings) -> dict[str, str]:
    """Returns the environment of a vLLM process.

    It is this process's environment without the variables of the learner's process group. With
    several ranks, it selects this rank's GPU and as many OpenMP threads as this rank's share of the
    CPU cores.

    Args:
        settings: the section `engine` of the config.
    """
    environment = {
        name: value for name, value in os.environ.items() if not _is_group_variable(name)
    }
    # All processes of an engine are on one machine.
    for name, value in LOOPBACK_VARIABLES.items():
        environment.setdefault(name, value)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if settings.deterministic:  # vLLM ignores it on a CPU
        environment[BATCH_INVARIANT_VARIABLE] = "1"
    if ranks.world_size() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = _rank_gpu()
        num_threads = max(1, ranks.num_cores() // ranks.local_world_size())
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def _is_group_variable(name: str) -> bool:
    return name in GROUP_VARIABLES or name.startswith(GROUP_PREFIXES)


def _rank_gpu() -> str:
    """Returns CUDA_VISIBLE_DEVICES of this rank's engine, which shares the learner's GPU."""
    visible_gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible_gpus:
        return visible_gpus[ranks.local_rank()]
    return str(ranks.local_rank())
