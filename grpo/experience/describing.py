"""What scored groups are in numbers: metrics, histograms, and one row per completion."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from grpo.learning.advantages import has_signal
from grpo.types import Completion, Sample, ScoredGroup


def describe(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Returns the metrics of scored groups.

    Every `mean` is over completions, every `group/` share over groups.
    """
    completions: list[Completion] = []
    rewards: list[float] = []  # without those of completions that have none
    for scored in groups:
        completions += scored.group.completions
        rewards += [reward for reward in scored.rewards if reward is not None]
    lengths = [len(completion.token_ids) for completion in completions]
    truncated = [float(completion.finish_reason == "length") for completion in completions]
    metrics: dict[str, Any] = {
        "reward/mean": mean(rewards),
        "reward/missing": 1 - len(rewards) / len(completions),
        "group/no_signal": mean([float(not has_signal(scored.rewards)) for scored in groups]),
        "completion/length": mean(lengths),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": mean(truncated),
        "completion/tokens": float(sum(lengths)),
        # completions of 2^i to 2^(i+1) - 1 tokens
        "histogram/length": _histogram([length.bit_length() - 1 for length in lengths]),
    }
    for name in groups[0].parts[0]:
        metrics[f"reward/{name}"] = mean(_values_of_reward(groups, name))
    for name, count in sorted(_fault_counts(groups).items()):
        metrics[name] = count / len(completions)
    metrics.update(_verdict_metrics(groups))
    return metrics


def _values_of_reward(groups: Sequence[ScoredGroup], name: str) -> list[float]:
    """Returns the values that one reward gave, before weights."""
    values = []
    for scored in groups:
        for part in scored.parts:
            value = part[name]
            if value is not None:
                values.append(value)
    return values


def _fault_counts(groups: Sequence[ScoredGroup]) -> Counter[str]:
    """Returns how many completions have each fault: `{"format/no_answer": 3}`."""
    counts: Counter[str] = Counter()
    for scored in groups:
        for faults in scored.faults:
            for name, reason in faults.items():
                counts[f"{name}/{reason.replace(' ', '_')}"] += 1
    return counts


def _verdict_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Returns the shares of undecided completions and of groups with one verdict throughout.

    Without verdicts there are none.
    """
    undecided = []
    for scored in groups:
        for verdict in scored.verdicts:
            if verdict is not None:
                undecided.append(float(verdict.value == "undecided"))
    if not undecided:
        return {}
    return {
        "reward/undecided": mean(undecided),
        "group/all_correct": mean([float(_all_are(scored, "correct")) for scored in groups]),
        "group/all_wrong": mean([float(_all_are(scored, "wrong")) for scored in groups]),
    }


def _all_are(scored: ScoredGroup, value: str) -> bool:
    return all(verdict is not None and verdict.value == value for verdict in scored.verdicts)


def staleness(groups: Sequence[ScoredGroup], version: int) -> dict[str, Any]:
    """Returns by how many versions the weights that sampled each token lag behind the learner's.

    The metrics are the mean, the maximum, and the tokens by age. `version`: the learner's.
    """
    tokens_by_age = Counter[int]()
    for scored in groups:
        for completion in scored.group.completions:
            for sampled, start, end in completion.versions:
                tokens_by_age[version - sampled] += end - start
    total = sum(tokens_by_age.values())
    max_age = max(tokens_by_age)
    return {
        "staleness/mean": sum(age * count for age, count in tokens_by_age.items()) / total,
        "staleness/max": float(max_age),
        "histogram/staleness": [tokens_by_age[age] for age in range(max_age + 1)],
    }


def sample_rows(
    groups: Sequence[ScoredGroup],
    used: Sequence[ScoredGroup] = (),
    values: Sequence[Sequence[tuple[float, ...]]] = (),
) -> list[dict[str, Any]]:
    """Returns one JSON object per completion: problem, text, how it was scored, its advantage.

    Args:
        groups: the groups to describe.
        used: the groups that are learned from now; completions of others have no advantage.
        values: the advantages of `used`, by group, completion and token.
    """
    values_of = {id(scored): rows for scored, rows in zip(used, values, strict=True)}
    rows = []
    for scored in groups:
        advantages = values_of.get(id(scored))
        for i in range(len(scored.group.completions)):
            advantage = advantages[i][0] if advantages is not None else None
            rows.append(_sample_row(scored, i, advantage))
    return rows


def _sample_row(scored: ScoredGroup, i: int, advantage: float | None) -> dict[str, Any]:
    problem = scored.group.problem
    completion = scored.group.completions[i]
    verdict = scored.verdicts[i]
    return {
        "problem": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "meta": problem.meta,
        "completion": completion.text,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "reward": scored.rewards[i],
        "parts": scored.parts[i],
        "faults": scored.faults[i],
        "verdict": verdict.value if verdict is not None else None,
        "reason": verdict.reason if verdict is not None else None,
        "advantage": advantage,
        "version": completion.versions[0][0],
    }


def advantage_histogram(samples: Sequence[Sample]) -> list[int]:
    """Returns how many samples have which mean advantage of their tokens.

    The bins are 0.5 wide, around -4 to 4. The outer ones hold what lies beyond.
    """
    places = []
    for sample in samples:
        advantage = mean(sample.advantages)
        if not math.isnan(advantage):
            bounded = max(-4.0, min(4.0, advantage))
            places.append(round(2 * bounded) + 8)
    return _histogram(places, 17)


def _histogram(places: Sequence[int], size: int = 0) -> list[int]:
    counts = Counter(places)
    return [counts[i] for i in range(size or max(places) + 1)]


def mean(values: Sequence[float]) -> float:
    """Returns the mean, NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
