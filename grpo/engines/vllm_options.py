"""The arguments and the environment of a vLLM engine, for the child process and for servers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from grpo import config as configs
from grpo.run import ranks

# the learner's process group is not the engine's
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model of an engine.

    Attributes:
        model_dir: the directory with its config and weights.
        dtype: "float32" or "bfloat16".
        max_model_len: the longest sequence in tokens.
        load_weights: start from the weights in the directory. Without it the engine starts from
            random weights, and a sync must come first.
        float32_head: compute the output head in float32.
    """

    model_dir: str
    dtype: str
    max_model_len: int
    load_weights: bool = False
    float32_head: bool = False


def llm_arguments(model: ServedModel, settings: configs.Engine, *, cuda: bool) -> dict[str, Any]:
    """Returns the arguments of vLLM's `LLM` for the settings, on a GPU (`cuda`) or a CPU."""
    arguments: dict[str, Any] = {
        "model": model.model_dir,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "load_format": "auto" if model.load_weights else "dummy",
        "max_num_seqs": settings.max_sequences,
        "enforce_eager": not cuda if settings.eager is None else settings.eager,
        "enable_prefix_caching": True,
        "seed": 0,  # every request has its own
    }
    if model.float32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if settings.block_size or not cuda:
        arguments["block_size"] = settings.block_size or 32
    if cuda:
        arguments["gpu_memory_utilization"] = settings.memory_fraction
        arguments["enable_sleep_mode"] = settings.sleep
    else:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gb * 2**30)
        # A prompt in pieces makes vLLM 0.32 take a random number back, which a CPU's generator
        # cannot: whole prompts, as many as fit.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(model.max_model_len, 4096)
    return arguments


def vllm_environment() -> dict[str, str]:
    """Returns the environment of a vLLM process.

    It has nothing of the learner's process group. With several ranks it has this rank's GPU and its
    share of the cores.
    """
    environment = {
        name: value for name, value in os.environ.items() if not _is_of_process_group(name)
    }
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if ranks.world_size() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = _rank_gpu()
        num_threads = max(1, ranks.num_cores() // ranks.local_world_size())
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def _is_of_process_group(name: str) -> bool:
    return name in GROUP_VARIABLES or name.startswith(GROUP_PREFIXES)


def _rank_gpu() -> str:
    """Returns the CUDA_VISIBLE_DEVICES of this rank's engine, which shares the learner's GPU."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible:
        return visible[ranks.local_rank()]
    return str(ranks.local_rank())
