"""Summarizes scored groups: metrics, histograms, and one JSON object per completion.

The metrics are documented in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from grpo.experience.undecided import cause_counts
from grpo.learning.advantages import rewards_differ
from grpo.types import Completion, Sample, ScoredGroup, Verdict


def group_metrics(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Returns the metrics of scored groups by name.

    For example `{"reward/mean": 0.25, "group/no_signal": 0.5, "completion/length": 31.0, ...}`.

    `group/` metrics are shares of groups. All other metrics are over completions: `reward/mean`
    over those with a reward, `reward/NAME` over those to which the reward NAME applies.

    Args:
        groups: At least one group. All groups are scored with the same rewards.
    """
    completions: list[Completion] = []
    rewards: list[float] = []  # of the completions that have one
    for scored in groups:
        completions += scored.group.completions
        rewards += [reward for reward in scored.rewards if reward is not None]
    lengths = [len(completion.token_ids) for completion in completions]
    truncated = [float(completion.finish_reason == "length") for completion in completions]
    metrics: dict[str, Any] = {
        "reward/mean": mean(rewards),
        "reward/missing": 1 - len(rewards) / len(completions),
        "group/no_signal": mean([float(not rewards_differ(scored.rewards)) for scored in groups]),
        "completion/length": mean(lengths),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": mean(truncated),
        "completion/tokens": float(sum(lengths)),
        # Bin i counts completions of 2^i to 2^(i+1) - 1 tokens.
        "histogram/length": _histogram([length.bit_length() - 1 for length in lengths]),
    }
    for name in groups[0].parts[0]:
        metrics[f"reward/{name}"] = mean(_reward_values(groups, name))
    for name, count in sorted(_reason_counts(groups).items()):
        metrics[name] = count / len(completions)
    metrics.update(_verdict_metrics(groups))
    return metrics


def _reward_values(groups: Sequence[ScoredGroup], name: str) -> list[float]:
    """Returns the values of one reward function, before its weight."""
    values = []
    for scored in groups:
        for part in scored.parts:
            value = part[name]
            if value is not None:
                values.append(value)
    return values


def _reason_counts(groups: Sequence[ScoredGroup]) -> Counter[str]:
    """Returns the number of completions per reason for a low score: `{"format/no_answer": 3}`."""
    counts: Counter[str] = Counter()
    for scored in groups:
        for reasons in scored.faults:
            for name, reason in reasons.items():
                counts[f"{name}/{reason.replace(' ', '_')}"] += 1
    return counts


def _verdict_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Returns the metrics that need verdicts; empty if no reward returns verdicts.

    `undecided/` has the causes that occur: `{"undecided/gold_answer": 0.02, ...}`.
    """
    verdicts: list[Verdict | None] = []
    for scored in groups:
        verdicts += scored.verdicts
    if not any(verdicts):
        return {}
    counts = cause_counts(groups)
    metrics = {
        "reward/undecided": counts.total() / len(verdicts),
        "group/all_correct": mean([float(_all_are(scored, "correct")) for scored in groups]),
        "group/all_wrong": mean([float(_all_are(scored, "wrong")) for scored in groups]),
    }
    for cause, count in sorted(counts.items()):
        metrics[f"undecided/{cause.replace(' ', '_')}"] = count / len(verdicts)
    return metrics


def _all_are(scored: ScoredGroup, value: str) -> bool:
    return all(verdict is not None and verdict.value == value for verdict in scored.verdicts)


def staleness(groups: Sequence[ScoredGroup], learner_version: int) -> dict[str, Any]:
    """Returns the `staleness/` metrics: the age of the sampled tokens, in weight versions.

    The age of a token is `learner_version` minus the version that sampled it. The metrics are the
    mean age, the maximum age, and the numbers of tokens of age 0, 1, 2, ...:
    `{"staleness/mean": 1.4, "staleness/max": 2.0, "histogram/staleness": [0, 3, 2]}`.
    """
    tokens_by_age: Counter[int] = Counter()
    for scored in groups:
        for completion in scored.group.completions:
            for version, start, end in completion.versions:
                tokens_by_age[learner_version - version] += end - start
    num_tokens = sum(tokens_by_age.values())
    max_age = max(tokens_by_age)
    return {
        "staleness/mean": sum(age * count for age, count in tokens_by_age.items()) / num_tokens,
        "staleness/max": float(max_age),
        "histogram/staleness": [tokens_by_age[age] for age in range(max_age + 1)],
    }


def sample_rows(
    groups: Sequence[ScoredGroup],
    used: Sequence[ScoredGroup] = (),
    advantages: Sequence[Sequence[tuple[float, ...]]] = (),
) -> list[dict[str, Any]]:
    """Returns one JSON object per completion: problem, text, scores and advantage.

    Args:
        groups: The groups whose completions are returned.
        used: The groups in the update. The completions of all other groups have no advantage.
        advantages: The advantages of `used` per group, completion and token. A row contains the
            advantage of the completion's first token.
    """
    advantages_by_id = {id(scored): rows for scored, rows in zip(used, advantages, strict=True)}
    rows = []
    for scored in groups:
        group_advantages = advantages_by_id.get(id(scored))
        for index in range(len(scored.group.completions)):
            advantage = None
            if group_advantages is not None:
                advantage = group_advantages[index][0]
            rows.append(_sample_row(scored, index, advantage))
    return rows


def _sample_row(scored: ScoredGroup, index: int, advantage: float | None) -> dict[str, Any]:
    problem = scored.group.problem
    completion = scored.group.completions[index]
    verdict = scored.verdicts[index]
    return {
        "problem": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "meta": problem.meta,
        "completion": completion.text,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "reward": scored.rewards[index],
        "parts": scored.parts[index],
        "faults": scored.faults[index],
        "verdict": verdict.value if verdict is not None else None,
        "reason": verdict.reason if verdict is not None else None,
        "advantage": advantage,
        "version": completion.versions[0][0],
    }


def advantage_histogram(samples: Sequence[Sample]) -> list[int]:
    """Returns the number of samples per bin of their mean advantage over tokens.

    The 17 bins are 0.5 wide, with centers from -4 to 4. The outer bins include all values beyond.
    Samples without tokens or with a NaN advantage are not counted.
    """
    bins = []
    for sample in samples:
        advantage = mean(sample.advantages)
        if math.isnan(advantage):
            continue
        clamped = max(-4.0, min(4.0, advantage))
        bins.append(round(2 * clamped) + 8)
    return _histogram(bins, num_bins=17)


def _histogram(bins: Sequence[int], num_bins: int | None = None) -> list[int]:
    """Returns the number of values in each bin. `bins` holds the bin index of each value.

    Default of `num_bins`: up to the largest index.
    """
    if num_bins is None:
        num_bins = max(bins) + 1
    counts = Counter(bins)
    return [counts[index] for index in range(num_bins)]


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean, NaN for an empty sequence."""
    return sum(values) / len(values) if values else float("nan")
