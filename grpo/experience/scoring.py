"""Groups become scored groups: the weighted sum of the rewards that apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from grpo.experience.plugins import Prompt, RewardFunction, RewardValue, failed
from grpo.types import Group, Problem, Score, ScoredGroup, Verdict

VERDICT_VALUES = {"correct": 1.0, "wrong": 0.0, "undecided": None}


def score(
    groups: Sequence[Group],
    rewards: Mapping[str, tuple[RewardFunction, float]],
    asked_as: Callable[[Problem], Prompt],
) -> list[ScoredGroup]:
    """Returns the groups with rewards: the weighted sum of the functions that apply.

    Args:
        groups: the groups.
        rewards: function and weight by name.
        asked_as: returns the prompt of a problem as its rewards see it.
    """
    prompts = [asked_as(group.problem) for group in groups]
    values = {name: function(groups, prompts) for name, (function, _) in rewards.items()}
    weights = {name: weight for name, (_, weight) in rewards.items()}
    scored = []
    for n, group in enumerate(groups):
        values_of_group = {name: values[name][n] for name in values}
        scored.append(_score_group(group, values_of_group, weights))
    return scored


def _score_group(
    group: Group, values: Mapping[str, Sequence[RewardValue]], weights: Mapping[str, float]
) -> ScoredGroup:
    """Returns a scored group. `values`: by reward, one per completion."""
    rewards: list[float | None] = []
    parts: list[dict[str, float | None]] = []
    verdicts: list[Verdict | None] = []
    faults: list[dict[str, str]] = []
    for i in range(len(group.completions)):
        reward_values = {name: values[name][i] for name in values}
        numbers = {name: _number(value) for name, value in reward_values.items()}
        for name, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise failed(name, group, i, f"it gave {number}")
        verdicts_here = [value for value in reward_values.values() if isinstance(value, Verdict)]
        is_undecided = any(verdict.value == "undecided" for verdict in verdicts_here)
        rewards.append(None if is_undecided else _weighted_sum(numbers, weights))
        parts.append(numbers)
        verdicts.append(verdicts_here[0] if verdicts_here else None)
        faults.append(_reasons(reward_values))
    return ScoredGroup(
        group=group,
        rewards=tuple(rewards),
        parts=tuple(parts),
        verdicts=tuple(verdicts),
        faults=tuple(faults),
    )


def _weighted_sum(
    numbers: Mapping[str, float | None], weights: Mapping[str, float]
) -> float | None:
    """Returns the weighted sum of the rewards that apply; None if none does."""
    terms = [weights[name] * number for name, number in numbers.items() if number is not None]
    return sum(terms) if terms else None


def _reasons(values: Mapping[str, RewardValue]) -> dict[str, str]:
    """Returns what kept scores low, by reward."""
    reasons = {}
    for name, value in values.items():
        if isinstance(value, Score) and value.reason:
            reasons[name] = value.reason
    return reasons


def _number(value: RewardValue) -> float | None:
    if value is None:
        return None
    if isinstance(value, Verdict):
        return VERDICT_VALUES[value.value]
    if isinstance(value, Score):
        return value.value
    return float(value)
