"""Estimates of the memory that learner and engine need, before a run.

`grpo doctor` compares the estimates with a machine. An engine on a CPU gets its size from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import EngineSettings
from grpo.metrics.roofline import ModelShape

GB = 2**30
# Memory of a GPU that neither learner nor engine can use: CUDA contexts, fragmentation, and what a
# sleeping engine keeps.
UNUSABLE_GPU_BYTES = 4 * GB
# Memory of an engine on a GPU besides weights and KV cache: activations, CUDA graphs, libraries.
GPU_ENGINE_RESERVE_BYTES = 3 * GB
CPU_ENGINE_RESERVE_BYTES = 1.5 * GB  # libraries
DEFAULT_CPU_KV_CACHE_GB = 2.0
# Parts of a learner that only an update needs. While the engine samples, their memory is free.
UPDATE_PARTS = ("activations", "logits", "rounded")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMemory:
    """The memory of a learner rank in bytes, by part: `{"weights": 3.1e9, "logits": 8e8}`."""

    parts: dict[str, float]

    @property
    def resident_bytes(self) -> float:
        """Bytes that are in use at all times: weights, gradients, optimizer states, reference."""
        return sum(size for name, size in self.parts.items() if name not in UPDATE_PARTS)

    @property
    def update_bytes(self) -> float:
        """Bytes that are in use during an update only."""
        return self.total_bytes - self.resident_bytes

    @property
    def total_bytes(self) -> float:
        """Bytes that are in use during an update."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """The memory of an engine, in bytes."""

    weight_bytes: float
    kv_cache_bytes: float
    reserve_bytes: float

    @property
    def total_bytes(self) -> float:
        """Bytes of all parts."""
        return self.weight_bytes + self.kv_cache_bytes + self.reserve_bytes


def learner_memory(
    config: Any,
    shape: ModelShape,
    ranks: int = 1,
    *,
    reference_weights: int | None = None,
    has_reference: bool = True,
) -> LearnerMemory:
    """Estimates the memory of a learner rank with full micro-batches.

    The parts are `weights`, `gradients`, `activations` and `logits`, and as needed `optimizer`,
    `reference` and `rounded`. The estimates are within a third of the measured memory.

    Args:
        config: Config of a stage with a learner.
        shape: Sizes of the policy.
        ranks: Number of learner ranks.
        reference_weights: Number of weights of all teachers, or of the reference. Default: the
            policy's.
        has_reference: Whether the learner holds the teacher or reference of the config, if any.

    Source: mixed-precision Adam needs 2 + 4 + 4 + 8 bytes per weight (ZeRO 1910.02054 section 3.1,
    with float32 gradients). Activations need 34 bytes per token, hidden unit and layer without
    checkpointing (2205.05198 Eq. 2, without its attention matrices) and 2 bytes with it.
    """
    learner, model = config.learner, config.model
    num_trained = shape.num_weights
    if model.lora:
        # A and B of seven linear layers, each about hidden_size x rank
        num_trained = shape.num_layers * 14 * shape.hidden_size * model.lora.rank
    parts: dict[str, float] = {"weights": shape.weight_bytes, "gradients": 4 * num_trained}
    if not learner.offload_optimizer:
        parts["optimizer"] = 12 * num_trained
    if has_reference and _needs_reference(config):
        num_reference = reference_weights or shape.num_weights
        parts["reference"] = num_reference * shape.bytes_per_weight
    if model.qat and not model.gradient_checkpointing:
        # the rounded weights of every layer are kept until its backward pass, on every rank
        parts["rounded"] = shape.body_weights * shape.bytes_per_weight
    for part, first_stage in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
        if part in parts and learner.zero_stage >= first_stage:
            parts[part] /= ranks
    num_tokens = learner.micro_batch_tokens // learner.sequence_parallel
    bytes_per_layer = 2 if model.gradient_checkpointing else 34
    hidden_values = num_tokens * shape.hidden_size
    parts["activations"] = hidden_values * (shape.num_layers * bytes_per_layer + 34)
    parts["logits"] = learner.logits_chunk_tokens * shape.vocab_size * 10
    return LearnerMemory(parts=parts)


def _needs_reference(config: Any) -> bool:
    """Returns whether the config has a second model: a teacher, or a reference for the KL."""
    if config.model.all_teachers:
        return True
    algorithm = getattr(config, "algorithm", None)
    # with LoRA, the reference is the policy without its adapters
    return bool(algorithm and algorithm.kl_coef and not config.model.lora)


def cpu_engine_memory(settings: EngineSettings, weight_bytes: float) -> EngineMemory:
    """Estimates the memory of an engine on a CPU.

    It has three copies of the weights: the weights, vLLM's packed weights and the copy in shared
    memory.

    Args:
        settings: The section `engine` of the config.
        weight_bytes: Size of the weights in the engine's dtype.
    """
    return EngineMemory(
        weight_bytes=3 * weight_bytes,
        kv_cache_bytes=cpu_kv_cache_bytes(settings),
        reserve_bytes=CPU_ENGINE_RESERVE_BYTES,
    )


def cpu_kv_cache_bytes(settings: EngineSettings) -> int:
    """Returns the size of the KV cache of an engine on a CPU, in bytes."""
    return int((settings.kv_cache_gb or DEFAULT_CPU_KV_CACHE_GB) * GB)


def gpu_engine_memory(
    settings: EngineSettings, weight_bytes: float, gpu_bytes: float
) -> EngineMemory:
    """Estimates the memory of an engine on each of its GPUs.

    Without `engine.kv_cache_gb`, the KV cache is `engine.memory_fraction` of the GPU less weights
    and reserve. It is negative if they do not fit into that fraction. vLLM itself measures the
    reserve when it starts.

    Args:
        settings: The section `engine` of the config.
        weight_bytes: Size of the weights in the engine's dtype.
        gpu_bytes: Memory of a GPU.
    """
    if settings.servers:
        weight_bytes /= settings.servers.tensor_parallel
    if settings.kv_cache_gb:
        kv_cache_bytes = settings.kv_cache_gb * GB
    else:
        engine_bytes = settings.memory_fraction * gpu_bytes
        kv_cache_bytes = engine_bytes - weight_bytes - GPU_ENGINE_RESERVE_BYTES
    return EngineMemory(
        weight_bytes=weight_bytes,
        kv_cache_bytes=kv_cache_bytes,
        reserve_bytes=GPU_ENGINE_RESERVE_BYTES,
    )


def shared_gpu_bytes(learner: LearnerMemory, engine_bytes: float, *, sleep: bool) -> float:
    """Returns the memory that learner and engine need on the same GPU, in bytes.

    A sleeping engine frees its memory for the update. What the learner needs at all times is in
    use while the engine samples.

    Args:
        learner: The memory of the learner's rank.
        engine_bytes: The memory of the engine.
        sleep: Whether the engine sleeps during updates.
    """
    if sleep:
        return learner.resident_bytes + max(learner.update_bytes, engine_bytes)
    return learner.total_bytes + engine_bytes


def max_memory_fraction(learner: LearnerMemory, gpu_bytes: float, *, sleep: bool) -> float:
    """Returns the largest `engine.memory_fraction` that leaves enough memory for the learner.

    The result is rounded down to two decimals, and 0 if the learner alone does not fit.

    Args:
        learner: The memory of the learner's rank on the same GPU.
        gpu_bytes: Memory of the GPU.
        sleep: Whether the engine sleeps during updates.
    """
    usable_bytes = gpu_bytes - UNUSABLE_GPU_BYTES
    if learner.total_bytes > usable_bytes:
        return 0.0
    learner_bytes = learner.resident_bytes if sleep else learner.total_bytes
    return math.floor(100 * (usable_bytes - learner_bytes) / gpu_bytes) / 100


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """The memory per GPU of a config on several numbers of GPUs, each with one rank.

    Attributes:
        config: The config of `grpo train`, or without `has_engine` of any stage with a learner.
        shape: Sizes of the policy.
        gpu_gb: Memory of a GPU in GiB.
        reference_weights: Number of weights of all teachers, or of the reference. Default: the
            policy's.
        has_reference: Whether the learner holds the teacher or reference of the config, if any.
        has_engine: Whether each GPU also has an engine.
    """

    config: Any
    shape: ModelShape
    gpu_gb: float = 80
    reference_weights: int | None = None
    has_reference: bool = True
    has_engine: bool = True

    def lines(self, gpus: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)) -> list[str]:
        """Returns a markdown table with one row per number of GPUs, in GiB.

        The last column states whether learner and engine fit on a GPU at the same time, with the
        complete KV cache or an eighth of it, or only alternately (`engine.sleep`). The column
        before it is the largest `engine.memory_fraction` with the config's `engine.sleep`.
        """
        columns = ["GPUs", "learner: at all times", "during updates"]
        if self.has_engine:
            columns += ["engine: weights", "KV cache of all sequences", "engine.memory_fraction"]
        columns.append(f"fits on {self.gpu_gb:g} GB")
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [self._row(num_gpus) for num_gpus in gpus]
        return lines

    def _row(self, num_gpus: int) -> str:
        learner = learner_memory(
            self.config,
            self.shape,
            num_gpus,
            reference_weights=self.reference_weights,
            has_reference=self.has_reference,
        )
        resident_gb = learner.resident_bytes / GB
        total_gb = learner.total_bytes / GB
        cells = [str(num_gpus), f"{resident_gb:.1f}", f"{total_gb:.1f}"]
        if self.has_engine:
            cells += self._engine_cells(learner, num_gpus)
        elif learner.total_bytes <= self.gpu_gb * GB - UNUSABLE_GPU_BYTES:
            cells.append("yes")
        else:
            cells.append("no")
        return "| " + " | ".join(cells) + " |"

    def _engine_cells(self, learner: LearnerMemory, num_gpus: int) -> list[str]:
        config = self.config
        weight_bytes = self.shape.weight_bytes
        num_completions = math.ceil(config.train.num_completions / num_gpus)
        num_sequences = min(config.engine.max_sequences, num_completions)
        sequence_bytes = config.max_sequence_tokens * self.shape.kv_bytes_per_token
        cache_bytes = num_sequences * sequence_bytes
        gpu_bytes = self.gpu_gb * GB
        fraction = max_memory_fraction(learner, gpu_bytes, sleep=config.engine.sleep)
        return [
            f"{weight_bytes / GB:.1f}",
            f"{cache_bytes / GB:.1f}",
            f"{fraction:.2f}",
            _fit(learner, weight_bytes + GPU_ENGINE_RESERVE_BYTES, cache_bytes, gpu_bytes),
        ]


def _fit(learner: LearnerMemory, engine_bytes: float, cache_bytes: float, gpu_bytes: float) -> str:
    """Returns how learner and engine fit on one GPU.

    Args:
        learner: The memory of the learner's rank.
        engine_bytes: The memory of the engine without its KV cache.
        cache_bytes: The KV cache of all sequences.
        gpu_bytes: Memory of the GPU.
    """
    usable_bytes = gpu_bytes - UNUSABLE_GPU_BYTES
    if shared_gpu_bytes(learner, engine_bytes + cache_bytes, sleep=False) <= usable_bytes:
        return "both"
    small_engine_bytes = engine_bytes + cache_bytes / 8
    if shared_gpu_bytes(learner, small_engine_bytes, sleep=False) <= usable_bytes:
        return "both, with part of the cache"
    if shared_gpu_bytes(learner, small_engine_bytes, sleep=True) <= usable_bytes:
        return "alternately"
    return "no"
