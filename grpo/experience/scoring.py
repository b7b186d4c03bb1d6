"""Groups become scored groups: the weighted sum of the rewards that apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo.experience.plugins import Prompt, RewardFunction, failed
from grpo.types import Group, Problem, Score, ScoredGroup, Verdict


def score(
    groups: Sequence[Group],
    rewards: Mapping[str, tuple[RewardFunction, float]],
    asked_as: Callable[[Problem], Prompt],
) -> list[ScoredGroup]:
    """Returns the groups with rewards: the weighted sum of the functions that apply.

    `rewards`: name -> (function, weight).

    `asked_as`: the prompt that a problem's rewards are shown.
    """
    asked = [asked_as(group.problem) for group in groups]
    columns = {name: function(groups, asked) for name, (function, _) in rewards.items()}
    weights = {name: weight for name, (_, weight) in rewards.items()}
    return [
        _score(group, {name: column[n] for name, column in columns.items()}, weights)
        for n, group in enumerate(groups)
    ]


def _score(
    group: Group, columns: Mapping[str, Sequence[Any]], weights: Mapping[str, float]
) -> ScoredGroup:
    totals, parts, verdicts, faults = [], [], [], []
    for i in range(len(group.completions)):
        values = {name: column[i] for name, column in columns.items()}
        verdict = next((value for value in values.values() if isinstance(value, Verdict)), None)
        part = {name: _number(value) for name, value in values.items()}
        undecided = any(
            isinstance(value, Verdict) and value.value == "undecided" for value in values.values()
        )
        for name, value in part.items():
            if value is not None and not math.isfinite(value):
                raise failed(name, group, i, f"it gave {value}")
        known = [weights[name] * value for name, value in part.items() if value is not None]
        totals.append(None if undecided or not known else sum(known))
        parts.append(part)
        verdicts.append(verdict)
        faults.append(
            {
                name: value.reason
                for name, value in values.items()
                if isinstance(value, Score) and value.reason
            }
        )
    return ScoredGroup(
        group=group,
        rewards=tuple(totals),
        parts=tuple(parts),
        verdicts=tuple(verdicts),
        faults=tuple(faults),
    )


def _number(value: float | Score | Verdict | None) -> float | None:
    if isinstance(value, Verdict):
        return {"correct": 1.0, "wrong": 0.0, "undecided": None}[value.value]
    return value.value if isinstance(value, Score) else None if value is None else float(value)
