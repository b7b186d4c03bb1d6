"""The configs for GPUs in configs/: each states the memory that it needs, and fits its machine."""

from pathlib import Path

import pytest
import yaml
from model_shapes import LLAMA, QWEN

from grpo import config as configs
from grpo.config import TrainConfig
from grpo.metrics.memory import (
    GB,
    UNUSABLE_GPU_BYTES,
    gpu_engine_memory,
    learner_memory,
    max_memory_fraction,
)
from grpo.stages.registry import stage_for_config

CONFIGS = Path(__file__).parents[1] / "configs"
# Name of the config: sizes of the model, number of GPUs, memory of a GPU in GB
MACHINES = {
    "countdown_3b": (QWEN["3B"], 1, 80),
    "gsm8k_llama3.2_1b": (LLAMA["1B"], 1, 80),
    "gsm8k_qwen2.5_0.5b": (QWEN["0.5B"], 1, 48),
    "gsm8k_qwen2.5_1.5b": (QWEN["1.5B"], 1, 80),
    "gsm8k_qwen2.5_1.5b_base": (QWEN["1.5B"], 1, 80),
    "r1_distill_llama3.1_8b": (LLAMA["8B"], 1, 80),
    "r1_distill_llama3.1_8b_8x80gb": (LLAMA["8B"], 8, 80),
    "r1_distill_qwen2.5_1.5b": (QWEN["1.5B"], 1, 80),
    "r1_distill_qwen2.5_7b": (QWEN["7B"], 1, 80),
    "r1_distill_qwen2.5_7b_8x80gb": (QWEN["7B"], 8, 80),
    "r1_rl_qwen2.5_7b": (QWEN["7B"], 1, 141),
    "r1_zero_math_1.5b": (QWEN["1.5B"], 1, 80),
    "r1_zero_math_1.5b_8x80gb": (QWEN["1.5B"], 8, 80),
    "r1_zero_math_7b": (QWEN["7B"], 1, 80),
    "r1_zero_math_7b_8x80gb": (QWEN["7B"], 8, 80),
}

# Prefixes of the configs for a CPU
SMALL = ("tiny", "smollm2", "gsm8k_smollm2", "r1_tiny")


def load(name):
    path = CONFIGS / f"{name}.yaml"
    stage = stage_for_config(yaml.safe_load(path.read_text()))
    return configs.load(str(path), kind=stage.config_class)


def memory_statement(name):
    """Returns what the config has to say about its machine, as `grpo doctor --gpus` prints it."""
    config = load(name)
    shape, num_gpus, gpu_gb = MACHINES[name]
    machine = f"For one GPU with {gpu_gb} GB"
    if num_gpus > 1:
        machine = f"For {num_gpus} GPUs with {gpu_gb} GB each"
    learner = learner_memory(config, shape, num_gpus)
    resident_gb, total_gb = learner.resident_bytes / GB, learner.total_bytes / GB
    statement = (
        f"{machine}. The learner needs {resident_gb:.1f} GB per GPU, {total_gb:.1f} GB during "
        "updates"
    )
    if isinstance(config, TrainConfig):
        fraction = max_memory_fraction(learner, gpu_gb * GB, sleep=config.engine.sleep)
        statement += f", the engine at most {fraction:.2f} of the memory"
    statement += " (estimates of grpo doctor --gpus)."
    if config.learner.offload_optimizer:
        optimizer_gb = 12 * shape.num_weights / num_gpus / GB
        statement += f" The optimizer states are in CPU memory: {optimizer_gb:.0f} GB."
    return statement


def comment_at_the_top(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


@pytest.mark.parametrize("name", MACHINES)
def test_a_config_states_its_memory_and_fits_its_machine(name):
    assert memory_statement(name) in comment_at_the_top(name)
    config = load(name)
    shape, num_gpus, gpu_gb = MACHINES[name]
    gpu_bytes = gpu_gb * GB
    learner = learner_memory(config, shape, num_gpus)
    assert learner.total_bytes <= gpu_bytes - UNUSABLE_GPU_BYTES
    if not isinstance(config, TrainConfig):
        return
    fraction = max_memory_fraction(learner, gpu_bytes, sleep=config.engine.sleep)
    assert config.engine.memory_fraction <= fraction
    engine = gpu_engine_memory(config.engine, shape.weight_bytes, gpu_bytes)
    num_cached_tokens = engine.kv_cache_bytes / shape.kv_bytes_per_token
    assert num_cached_tokens >= 16 * config.max_sequence_tokens


def test_every_config_is_for_a_cpu_or_states_its_memory_or_trains_nothing():
    for path in CONFIGS.glob("*.yaml"):
        is_small = path.stem.startswith(SMALL)
        trains = "\nlearner:" in path.read_text()
        assert is_small or path.stem in MACHINES or not trains, path.stem
