"""How a run fits into the memory of a machine: a list of plans, and the first one that fits.

The plans go from the simplest to the most thrifty one. Each is tried with the memory estimates
behind `grpo doctor` (grpo/metrics/memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo.metrics.memory import (
    GB,
    GPU_ENGINE_RESERVE_BYTES,
    UNUSABLE_GPU_BYTES,
    UPDATE_PARTS,
    LearnerMemory,
    cpu_engine_memory,
    gpu_engine_memory,
    learner_memory,
    max_memory_fraction,
    shared_gpu_bytes,
)
from grpo.metrics.roofline import ModelShape
from grpo.tools.init.hardware import Hardware
from grpo.tools.init.settings import NO_LIMIT, Overrides, Setting, make_config
from grpo.tools.init.sizes import LORA_RATIO, learning_rate
from grpo.types import UserError

# The memory that PyTorch reserves on a GPU for an update, over the estimate. Measured: 50 GiB where
# 30 GiB are estimated (docs/benchmarks.md, "The update").
UPDATE_MARGIN = 1.7
# What CUDA reports of a GPU's nominal memory: 79.1 of 80 GB, 23.6 of 24 GB.
GPU_SHARE = 0.98
CPU_SHARE = 0.8  # of the free main memory that a run may need, or of all of it for offloading
KL_COEF = 0.001  # as in configs/
LARGE_MICRO_BATCH = 16384
SMALL_MICRO_BATCH = 8192
CPU_MICRO_BATCH = 4096
CPU_SMALL_MICRO_BATCH = 1024
MIN_SEQUENCES = 32  # that the engine must be able to decode at the same time
MAX_SEQUENCES = 512
SERVER_FRACTION = 0.85  # `engine.memory_fraction` of a server on a GPU of its own
MAX_CPU_KV_CACHE_GB = 4.0
# Machines that an error may suggest.
GPU_SIZES_GB = (16, 24, 32, 40, 48, 80, 96, 141)
GPU_COUNTS = (2, 4, 8, 16)

CHECKPOINTING = Setting(
    "model.gradient_checkpointing", True, "updates need less memory, and one more forward pass"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run that has to fit.

    Attributes:
        stage: `train` or `sft`.
        settings: The settings so far.
        overrides: The assignments of the command line.
        shape: Sizes of the model.
        num_heads: Number of query heads and of key-value heads.
    """

    stage: str
    settings: tuple[Setting, ...]
    overrides: Overrides
    shape: ModelShape
    num_heads: tuple[int, int]

    def config(self, settings: Sequence[Setting] = ()) -> Any:
        """Returns the config with further settings.

        Raises:
            UserError: They contradict the assignments of the command line.
        """
        return make_config(self.stage, (*self.settings, *settings), self.overrides)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence of the run in tokens."""
        config = self.config([Setting("learner.micro_batch_tokens", NO_LIMIT)])
        return int(config.max_sequence_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A way to fit a run into memory.

    Example: `Plan(name="gradient checkpointing", settings=(CHECKPOINTING,))`.

    Attributes:
        name: What distinguishes the plan, in words.
        settings: The keys that it sets.
    """

    name: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A plan on a machine: the memory that it needs on each GPU, or in the main memory.

    Attributes:
        plan: The plan, with the settings of the engine.
        learner: The estimated memory of a learner.
        engine_bytes: The estimated memory of an engine; 0 without one.
        needed_bytes: What both need at the same time, with a margin for the error of the estimate.
        usable_bytes: What the machine has for them.
        num_ranks: Number of learner ranks.
        optimizer_bytes: The optimizer states in the main memory of a machine with GPUs.
        main_memory_bytes: What that machine has for them; None if it is unknown.
    """

    plan: Plan
    learner: LearnerMemory
    engine_bytes: float
    needed_bytes: float
    usable_bytes: float
    num_ranks: int = 1
    optimizer_bytes: float = 0.0
    main_memory_bytes: float | None = None

    @property
    def missing_bytes(self) -> float:
        """The memory that is missing; at most 0 if the plan fits."""
        missing_bytes = self.needed_bytes - self.usable_bytes
        if self.main_memory_bytes is None:
            return missing_bytes
        return max(missing_bytes, self.optimizer_bytes - self.main_memory_bytes)

    def shortage(self) -> str:
        """Returns the needed and the missing memory, for an error message."""
        if self.needed_bytes <= self.usable_bytes:
            return (
                f"{self.plan.name} needs {self.optimizer_bytes / GB:.1f} GB of main memory, "
                f"{self.missing_bytes / GB:.1f} GB more than can be used"
            )
        return (
            f"{self.plan.name} needs {self.needed_bytes / GB:.1f} GB (learner "
            f"{self.learner.total_bytes / GB:.1f}, engine {self.engine_bytes / GB:.1f}), "
            f"{self.missing_bytes / GB:.1f} GB more than the {self.usable_bytes / GB:.1f} GB that "
            "can be used"
        )


def plans(run: Run, hardware: Hardware) -> list[Plan]:
    """Returns the plans for a machine, from the simplest to the most thrifty one."""
    if hardware.num_gpus == 0:
        return _cpu_plans(run)
    return _gpu_plans(run, hardware.num_gpus)


def _cpu_plans(run: Run) -> list[Plan]:
    longest = run.max_sequence_tokens
    micro_batch = Setting("learner.micro_batch_tokens", max(CPU_MICRO_BATCH, longest))
    small_micro_batch = Setting("learner.micro_batch_tokens", max(CPU_SMALL_MICRO_BATCH, longest))
    kl = _kl_settings(run)
    small = (CHECKPOINTING, small_micro_batch)
    return [
        Plan(name="full training", settings=(micro_batch, *kl)),
        Plan(name="gradient checkpointing", settings=(CHECKPOINTING, micro_batch, *kl)),
        Plan(name="small micro-batches", settings=(*small, *kl)),
        Plan(name="no reference model", settings=(*small, *_without_kl(run))),
        Plan(name="LoRA", settings=(*small, *_lora_settings(run), *kl)),
    ]


def _gpu_plans(run: Run, num_gpus: int) -> list[Plan]:
    longest = run.max_sequence_tokens
    large = Setting("learner.micro_batch_tokens", max(LARGE_MICRO_BATCH, longest))
    small = Setting("learner.micro_batch_tokens", max(SMALL_MICRO_BATCH, longest))
    least = Setting("learner.micro_batch_tokens", longest)
    kl, no_kl = _kl_settings(run), _without_kl(run)
    offload = Setting("learner.offload_optimizer", True)
    zero: tuple[Setting, ...] = ()
    if num_gpus > 1:
        comment = "splits gradients and optimizer states over the GPUs"
        zero = (Setting("learner.zero_stage", 2, comment),)
    split = (CHECKPOINTING, *zero)
    result = [
        Plan(name="full training", settings=(*zero, large, *kl)),
        Plan(name="smaller micro-batches", settings=(*zero, small, *kl)),
        Plan(name="gradient checkpointing", settings=(*split, large, *kl)),
        Plan(
            name="gradient checkpointing and smaller micro-batches", settings=(*split, small, *kl)
        ),
    ]
    if num_gpus > 1:
        comment = "splits weights, gradients and optimizer states over the GPUs"
        split = (CHECKPOINTING, Setting("learner.zero_stage", 3, comment))
        result.append(Plan(name="ZeRO stage 3", settings=(*split, small, *kl)))
    result.append(Plan(name="optimizer in main memory", settings=(*split, small, offload, *kl)))
    if run.stage == "train":
        result.append(Plan(name="no reference model", settings=(*split, small, offload, *no_kl)))
    thrifty = (*split, least, offload, *no_kl)
    result.append(Plan(name="one sequence per micro-batch", settings=thrifty))
    for size in _sequence_parallel_sizes(run, num_gpus):
        comment = f"{size} GPUs share each sequence"
        shared = Setting("learner.sequence_parallel", size, comment)
        result.append(Plan(name="shared sequences", settings=(*thrifty, shared)))
    if run.stage == "train" and num_gpus > 1:
        result += _server_plans(run, num_gpus, (*split, small, offload, *no_kl))
    lora = (CHECKPOINTING, *zero, *_lora_settings(run), *kl)
    result.append(Plan(name="LoRA", settings=(*lora, small)))
    result.append(Plan(name="LoRA and one sequence per micro-batch", settings=(*lora, least)))
    return result


def _kl_settings(run: Run) -> tuple[Setting, ...]:
    return (Setting("algorithm.kl_coef", KL_COEF),) if run.stage == "train" else ()


def _without_kl(run: Run) -> tuple[Setting, ...]:
    if run.stage != "train":
        return ()
    return (Setting("algorithm.kl_coef", 0.0, "a reference model would not fit"),)


def _lora_settings(run: Run) -> tuple[Setting, ...]:
    lr = float(f"{LORA_RATIO * learning_rate(run.shape, run.stage):.1e}")  # 1e-5, not 9.99e-6
    return (
        Setting("model.lora", {"rank": 16}, "training all weights does not fit"),
        Setting("learner.lr", lr, "adapters need about ten times that of all weights"),
    )


def _sequence_parallel_sizes(run: Run, num_gpus: int) -> list[int]:
    """Returns the numbers of GPUs that can share a sequence."""
    return [
        size
        for size in (2, 4, 8)
        if num_gpus % size == 0 and all(heads % size == 0 for heads in run.num_heads)
    ]


def _server_plans(run: Run, num_gpus: int, learner: tuple[Setting, ...]) -> list[Plan]:
    """Returns plans in which half of the GPUs sample, each server on 1, 2, 4 or 8 of them."""
    num_servers = num_gpus // 2
    result = []
    for size in (1, 2, 4, 8):
        if num_servers % size or any(heads % size for heads in run.num_heads):
            continue
        comment = f"on {num_servers} of the {num_gpus} GPUs; the learner uses the others"
        servers = {"count": num_servers // size, "tensor_parallel": size}
        settings = (*learner, Setting("engine.servers", servers, comment))
        result.append(Plan(name="servers on GPUs of their own", settings=settings))
    return result


def choose_plan(run: Run, hardware: Hardware) -> Fit:
    """Returns the first plan that fits.

    Raises:
        UserError: No plan fits, or the command line contradicts every plan. The message says how
            much memory is missing, and which machine would do.
    """
    fits = _try_plans(run, hardware)
    if fits[-1].missing_bytes <= 0:
        return fits[-1]
    closest = min(fits, key=lambda fit: fit.missing_bytes)
    raise UserError(
        f"the model does not fit on {hardware}: {closest.shortage()}. "
        f"{_larger_machine(run, hardware)}"
    )


def _try_plans(run: Run, hardware: Hardware) -> list[Fit]:
    """Returns the plans up to the first one that fits. Plans with an invalid config are skipped.

    Raises:
        UserError: The command line contradicts every plan.
    """
    fits = []
    first_error: UserError | None = None
    for plan in plans(run, hardware):
        try:
            fit = estimate(run, plan, hardware)
        except UserError as error:
            first_error = first_error or error
            continue
        fits.append(fit)
        if fit.missing_bytes <= 0:
            break
    if not fits:
        assert first_error is not None
        raise first_error
    return fits


def _larger_machine(run: Run, hardware: Hardware) -> str:
    """Returns the smallest machines on which the run fits, as a sentence."""
    num_gpus = max(1, hardware.num_gpus)
    machines = []
    for gpu_gb in GPU_SIZES_GB:
        larger = Hardware(num_gpus=num_gpus, memory_gb=float(gpu_gb))
        is_larger = hardware.num_gpus == 0 or gpu_gb > hardware.memory_gb
        if is_larger and _try_plans(run, larger)[-1].missing_bytes <= 0:
            machines.append(str(larger))
            break
    for count in GPU_COUNTS:
        larger = replace(hardware, num_gpus=count)
        is_larger = 0 < hardware.num_gpus < count
        if is_larger and _try_plans(run, larger)[-1].missing_bytes <= 0:
            machines.append(str(larger))
            break
    if not machines:
        return "Choose a smaller model, or lower sampling.max_tokens"
    return f"It fits on {' or on '.join(machines)} (--gpus, --gpu-gb). Or choose a smaller model"


def estimate(run: Run, plan: Plan, hardware: Hardware) -> Fit:
    """Returns the memory that a plan needs on a machine.

    Raises:
        UserError: The plan contradicts the assignments of the command line.
    """
    if hardware.num_gpus == 0:
        return _estimate_on_cpu(run, plan, hardware)
    return _estimate_on_gpus(run, plan, hardware)


def _estimate_on_cpu(run: Run, plan: Plan, hardware: Hardware) -> Fit:
    settings = plan.settings
    config = run.config(settings)
    learner = learner_memory(config, run.shape)
    engine_bytes = 0.0
    if run.stage == "train":
        sequence_bytes = config.max_sequence_tokens * run.shape.kv_bytes_per_token
        num_wanted = min(MAX_SEQUENCES, config.train.num_completions)
        cache_gb = math.ceil(2 * num_wanted * sequence_bytes / GB) / 2
        cache_gb = min(MAX_CPU_KV_CACHE_GB, cache_gb)
        num_sequences = min(num_wanted, int(cache_gb * GB / sequence_bytes))
        room = f"room for {num_sequences} sequences of {config.max_sequence_tokens:,} tokens"
        settings = (
            *settings,
            Setting("engine.kv_cache_gb", cache_gb, room),
            Setting("engine.max_sequences", max(1, num_sequences)),
        )
        config = run.config(settings)
        engine_bytes = cpu_engine_memory(config.engine, run.shape.weight_bytes).total_bytes
    return Fit(
        plan=replace(plan, settings=settings),
        learner=learner,
        engine_bytes=engine_bytes,
        needed_bytes=shared_gpu_bytes(learner, engine_bytes, sleep=False),
        usable_bytes=CPU_SHARE * hardware.memory_gb * GB,
    )


def _estimate_on_gpus(run: Run, plan: Plan, hardware: Hardware) -> Fit:
    config = run.config(plan.settings)
    num_ranks = _num_ranks(run, config, hardware)
    learner = learner_memory(config, run.shape, num_ranks)
    reserved = _with_margin(learner)
    gpu_bytes = GPU_SHARE * hardware.memory_gb * GB
    engine_bytes = 0.0
    needed_bytes = reserved.total_bytes
    settings = plan.settings
    if run.stage == "train":
        settings = (*settings, *_engine_settings(run, config, reserved, hardware))
        config = run.config(settings)
        engine = gpu_engine_memory(config.engine, run.shape.weight_bytes, gpu_bytes)
        cache_bytes = max(engine.kv_cache_bytes, _least_cache_bytes(run, config))
        engine_bytes = engine.weight_bytes + engine.reserve_bytes + cache_bytes
        if config.engine.servers:  # on GPUs of their own
            needed_bytes = max(needed_bytes, engine_bytes)
        else:
            sleep = config.engine.sleep
            needed_bytes = shared_gpu_bytes(reserved, engine_bytes, sleep=sleep)
    fit = Fit(
        plan=replace(plan, settings=settings),
        learner=learner,
        engine_bytes=engine_bytes,
        needed_bytes=needed_bytes,
        usable_bytes=gpu_bytes - UNUSABLE_GPU_BYTES,
        num_ranks=num_ranks,
    )
    if not config.learner.offload_optimizer:
        return fit
    optimizer_bytes = 12.0 * run.shape.num_weights
    if hardware.main_memory_gb is None:
        return replace(fit, optimizer_bytes=optimizer_bytes)
    main_memory_bytes = CPU_SHARE * hardware.main_memory_gb * GB
    return replace(fit, optimizer_bytes=optimizer_bytes, main_memory_bytes=main_memory_bytes)


def _num_ranks(run: Run, config: Any, hardware: Hardware) -> int:
    """Returns the number of learner ranks: one per GPU without a server.

    Raises:
        UserError: The servers of the command line need all GPUs.
    """
    if run.stage != "train" or not config.engine.servers:
        return hardware.num_gpus
    servers = config.engine.servers
    num_ranks = hardware.num_gpus - servers.count * servers.tensor_parallel
    if num_ranks < 1:
        raise UserError(
            f"engine.servers: {servers.count} servers on {servers.tensor_parallel} GPUs each leave "
            f"no GPU for the learner on {hardware}: lower engine.servers.count"
        )
    return int(num_ranks)


def _with_margin(learner: LearnerMemory) -> LearnerMemory:
    """Returns the memory that PyTorch reserves for a learner."""
    parts = {
        name: size * UPDATE_MARGIN if name in UPDATE_PARTS else size
        for name, size in learner.parts.items()
    }
    return LearnerMemory(parts=parts)


def _least_cache_bytes(run: Run, config: Any) -> float:
    """Returns the KV cache that is necessary to sample at a reasonable speed."""
    num_sequences = min(MIN_SEQUENCES, config.train.num_completions)
    return float(num_sequences * config.max_sequence_tokens * run.shape.kv_bytes_per_token)


def _engine_settings(
    run: Run, config: Any, reserved: LearnerMemory, hardware: Hardware
) -> list[Setting]:
    """Returns the settings of the engine: its share of the memory, and how many sequences fit."""
    gpu_bytes = GPU_SHARE * hardware.memory_gb * GB
    servers = config.engine.servers
    weight_bytes: float = run.shape.weight_bytes
    if servers:
        weight_bytes /= servers.tensor_parallel
        num_engines = max(1, servers.count)
        max_fraction = min(SERVER_FRACTION, 1 - UNUSABLE_GPU_BYTES / gpu_bytes)
    else:
        num_engines = hardware.num_gpus
        max_fraction = max_memory_fraction(reserved, gpu_bytes, sleep=config.engine.sleep)
    sequence_bytes = config.max_sequence_tokens * run.shape.kv_bytes_per_token
    num_wanted = min(MAX_SEQUENCES, math.ceil(config.train.num_completions / num_engines))
    fixed_bytes = weight_bytes + GPU_ENGINE_RESERVE_BYTES
    wanted_fraction = (fixed_bytes + num_wanted * sequence_bytes) / gpu_bytes
    wanted_fraction = math.ceil(20 * wanted_fraction) / 20  # in steps of 5 %
    fraction = max(0.01, min(wanted_fraction, math.floor(100 * max_fraction) / 100))
    num_fitting = int((fraction * gpu_bytes - fixed_bytes) / sequence_bytes)
    num_sequences = _round_down(max(1, min(num_wanted, num_fitting)))
    comment = (
        f"{fraction * gpu_bytes / GB:.0f} GB: weights {weight_bytes / GB:.1f} GB, and a KV cache "
        f"for {num_sequences} sequences of {config.max_sequence_tokens:,} tokens"
    )
    return [
        Setting("engine.memory_fraction", fraction, comment),
        Setting("engine.max_sequences", num_sequences),
    ]


def _round_down(number: int) -> int:
    """Returns a multiple of 8, or a smaller number unchanged."""
    return number - number % 8 if number >= 8 else number


def memory_comments(run: Run, fit: Fit, hardware: Hardware) -> list[Setting]:
    """Returns the settings of a plan, with the estimated memory in their comments."""
    learner = fit.learner
    memory = (
        f"learner {learner.resident_bytes / GB:.1f} GB, {learner.total_bytes / GB:.1f} GB during "
        "updates"
    )
    if hardware.num_gpus > 1:
        memory += ", per GPU"
    comments = {
        "learner.micro_batch_tokens": memory,
        "learner.offload_optimizer": f"{fit.optimizer_bytes / GB:.0f} GB of main memory",
    }
    if run.config(fit.plan.settings).model.lora:
        comments["algorithm.kl_coef"] = "the reference is the model without its adapters"
    elif "reference" in learner.parts:
        gigabytes = learner.parts["reference"] / GB
        comments["algorithm.kl_coef"] = f"the reference model takes {gigabytes:.1f} GB"
    settings = []
    for setting in fit.plan.settings:
        comment = setting.comment or comments.get(setting.key, "")
        settings.append(setting._replace(comment=comment))
    return settings
