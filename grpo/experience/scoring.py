"""Scores groups: the reward of a completion is the weighted sum of the rewards that apply to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grpo.experience.plugins import Prompt, RewardFunction, RewardValue, reward_error
from grpo.experience.undecided import is_undecided
from grpo.types import Group, Problem, Score, ScoredGroup, Verdict

VERDICT_VALUES = {"correct": 1.0, "wrong": 0.0, "undecided": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoredCompletion:
    """The fields of a `ScoredGroup` for one completion."""

    reward: float | None
    values: dict[str, float | None]
    verdict: Verdict | None
    reasons: dict[str, str]


def score(
    groups: Sequence[Group],
    rewards: Mapping[str, tuple[RewardFunction, float]],
    render_prompt: Callable[[Problem], Prompt],
) -> list[ScoredGroup]:
    """Returns the groups with their rewards.

    A completion has no reward (None) if one of its verdicts is undecided or no reward applies.

    Args:
        groups: The groups to score.
        rewards: Function and weight per reward name.
        render_prompt: Returns the prompt of a problem in the form that reward functions expect.

    Raises:
        RuntimeError: A reward function failed, or returned something else than its kind of reward
            does. The message names the reward, and if possible the problem.
    """
    prompts = [render_prompt(group.problem) for group in groups]
    values: dict[str, Sequence[Sequence[RewardValue]]] = {}
    weights: dict[str, float] = {}
    for name, (function, weight) in rewards.items():
        values[name] = function(groups, prompts)
        _check_shape(name, groups, values[name])
        weights[name] = weight
    scored = []
    for index, group in enumerate(groups):
        group_values = {name: values[name][index] for name in values}
        scored.append(_score_group(group, group_values, weights))
    return scored


def _check_shape(
    name: str, groups: Sequence[Group], values: Sequence[Sequence[RewardValue]]
) -> None:
    """Raises RuntimeError if there is not one value for every completion of every group."""
    try:
        sizes = [len(values_of_group) for values_of_group in values]
    except TypeError:
        raise RuntimeError(
            f"reward {name} returned no list of lists, one for each group: {values!r:.300}"
        ) from None
    if len(sizes) != len(groups):
        raise RuntimeError(f"reward {name} returned {len(sizes)} lists for {len(groups)} groups")
    for group, size in zip(groups, sizes, strict=True):
        if size != len(group.completions):
            raise RuntimeError(
                f"reward {name} returned {size} values for the {len(group.completions)} "
                f"completions of problem {group.problem.id}"
            )


def _score_group(
    group: Group, values: Mapping[str, Sequence[RewardValue]], weights: Mapping[str, float]
) -> ScoredGroup:
    """Scores one group. `values` holds one value per completion for each reward name."""
    completions = []
    for index in range(len(group.completions)):
        completion_values = {name: values[name][index] for name in values}
        completions.append(_score_completion(group, index, completion_values, weights))
    return ScoredGroup(
        group=group,
        rewards=tuple(completion.reward for completion in completions),
        parts=tuple(completion.values for completion in completions),
        verdicts=tuple(completion.verdict for completion in completions),
        faults=tuple(completion.reasons for completion in completions),
    )


def _score_completion(
    group: Group, index: int, values: Mapping[str, RewardValue], weights: Mapping[str, float]
) -> _ScoredCompletion:
    numbers = {}
    for name, value in values.items():
        try:
            numbers[name] = _number(value)
        except (TypeError, ValueError):
            problem = f"it returned {value!r:.300}, expected a number, Score, Verdict or None"
            raise reward_error(name, group, index, problem) from None
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise reward_error(name, group, index, f"it returned {number}")
    verdict = _decisive_verdict(values)
    return _ScoredCompletion(
        reward=None if is_undecided(verdict) else _weighted_sum(numbers, weights),
        values=numbers,
        verdict=verdict,
        reasons=_reasons(values),
    )


def _decisive_verdict(values: Mapping[str, RewardValue]) -> Verdict | None:
    """Returns the first undecided verdict, or else the first verdict; None without one."""
    verdicts = [value for value in values.values() if isinstance(value, Verdict)]
    for verdict in verdicts:
        if is_undecided(verdict):
            return verdict
    return verdicts[0] if verdicts else None


def _weighted_sum(
    numbers: Mapping[str, float | None], weights: Mapping[str, float]
) -> float | None:
    """Returns the weighted sum of the rewards that apply, None if no reward applies."""
    terms = [weights[name] * number for name, number in numbers.items() if number is not None]
    return sum(terms) if terms else None


def _reasons(values: Mapping[str, RewardValue]) -> dict[str, str]:
    """Returns the reason of each low score by reward name: `{"format": "no answer"}`."""
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
    if isinstance(value, str):
        raise TypeError("a reward is no text, not even that of a number")
    return float(value)
