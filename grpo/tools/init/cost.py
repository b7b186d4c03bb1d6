"""How long a step takes on the CPU of this machine, from its measured rates."""

from __future__ import annotations

from statistics import mean
from typing import Any

from grpo.experience.prompts import EXAMPLE
from grpo.metrics.roofline import ModelShape, Roofline, measure_machine
from grpo.tools.doctor import TYPICAL_RATIO
from grpo.tools.init.sizes import Lengths
from grpo.types import Completion, Group

SFT_RATIO = 2.0  # measured time of a supervised update over its lower bound (docs/benchmarks.md)


def step_seconds(config: Any, shape: ModelShape, lengths: Lengths, stage: str) -> float:
    """Returns the typical time of a rollout with its update, or of a supervised update.

    Completions are assumed to be as long as `sampling.max_tokens`, solutions as long as the mean.

    Args:
        config: The config of the run.
        shape: Sizes of the model.
        lengths: The measured lengths of prompts and solutions.
        stage: `train` or `sft`.
    """
    limits = Roofline(machine=measure_machine(config.model.dtype), shape=shape)
    prompt_tokens = round(mean(lengths.prompts))
    if stage == "train":
        group = _group(prompt_tokens, config.sampling.max_tokens, config.train.group_size)
        bounds = limits.bounds(
            [group] * config.train.problems,
            updates=config.train.updates_per_rollout,
            reference=config.algorithm.kl_coef > 0,
        )
        return TYPICAL_RATIO * sum(bounds.values())
    group = _group(prompt_tokens, round(mean(lengths.solutions)), 1)
    bounds = limits.bounds([group] * config.sft.batch_size, updates=1, reference=False)
    return SFT_RATIO * bounds["update"]


def _group(prompt_tokens: int, completion_tokens: int, size: int) -> Group:
    """Returns a group of completions of one length. Their tokens do not matter."""
    completion = Completion(
        token_ids=(0,) * completion_tokens,
        logprobs=(),
        text="",
        finish_reason="stop",
        versions=(),
    )
    return Group(problem=EXAMPLE, prompt_ids=(0,) * prompt_tokens, completions=(completion,) * size)


def in_words(seconds: float) -> str:
    """Returns a duration with two digits, e.g. "75 s", "12 minutes" or "3.5 hours"."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
