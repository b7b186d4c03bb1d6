"""What scored groups are in numbers: metrics, histograms, and one row per completion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from grpo.learning.advantages import has_signal
from grpo.types import Sample, ScoredGroup


def describe(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Returns the metrics of scored groups.

    Every `mean` is over completions, every `group/` share over groups.
    """
    completions = [completion for scored in groups for completion in scored.group.completions]
    rewards = [reward for scored in groups for reward in scored.rewards]
    known = [reward for reward in rewards if reward is not None]
    lengths = [len(completion.token_ids) for completion in completions]
    metrics: dict[str, Any] = {
        "reward/mean": mean(known),
        "reward/missing": 1 - len(known) / len(rewards),
        "group/no_signal": mean([float(not has_signal(scored.rewards)) for scored in groups]),
        "completion/length": mean(lengths),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": mean(
            [float(completion.finish_reason == "length") for completion in completions]
        ),
        "completion/tokens": float(sum(lengths)),
        # completions of 2^i to 2^(i+1) - 1 tokens
        "histogram/length": _histogram([length.bit_length() - 1 for length in lengths]),
    }
    for name in groups[0].parts[0]:
        values = [
            value for scored in groups for part in scored.parts if (value := part[name]) is not None
        ]
        metrics[f"reward/{name}"] = mean(values)
    faults = Counter(
        f"{name}/{reason.replace(' ', '_')}"
        for scored in groups
        for fault in scored.faults
        for name, reason in fault.items()
    )
    metrics |= {fault: count / len(completions) for fault, count in sorted(faults.items())}
    verdicts = [verdict for scored in groups for verdict in scored.verdicts if verdict is not None]
    if verdicts:
        metrics["reward/undecided"] = mean(
            [float(verdict.value == "undecided") for verdict in verdicts]
        )
        metrics["group/all_correct"] = mean(
            [float(all(v and v.value == "correct" for v in scored.verdicts)) for scored in groups]
        )
        metrics["group/all_wrong"] = mean(
            [float(all(v and v.value == "wrong" for v in scored.verdicts)) for scored in groups]
        )
    return metrics


def staleness(groups: Sequence[ScoredGroup], version: int) -> dict[str, Any]:
    """Returns how many versions older than the learner's the weights were that sampled each token.

    The metrics are the mean, the maximum, and the tokens by age.
    """
    spans = [
        span
        for scored in groups
        for completion in scored.group.completions
        for span in completion.versions
    ]
    ages = Counter[int]()
    for sampled, start, end in spans:
        ages[version - sampled] += end - start
    total = sum(ages.values())
    return {
        "staleness/mean": sum(age * count for age, count in ages.items()) / total,
        "staleness/max": float(max(ages)),
        "histogram/staleness": [ages[age] for age in range(max(ages) + 1)],
    }


def sample_rows(
    groups: Sequence[ScoredGroup],
    used: Sequence[ScoredGroup] = (),
    values: Sequence[Sequence[tuple[float, ...]]] = (),
) -> list[dict[str, Any]]:
    """Returns one JSON object per completion.

    It has what was asked, what came, how it was judged, and the advantage if the completion is used
    now.
    """
    of_group = {id(scored): rows for scored, rows in zip(used, values, strict=True)}
    return [
        {
            "problem": scored.group.problem.id,
            "question": scored.group.problem.question,
            "answer": scored.group.problem.answer,
            "meta": scored.group.problem.meta,
            "completion": completion.text,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "reward": scored.rewards[i],
            "parts": scored.parts[i],
            "faults": scored.faults[i],
            "verdict": (verdict := scored.verdicts[i]) and verdict.value,
            "reason": verdict and verdict.reason,
            "advantage": of_group[id(scored)][i][0] if id(scored) in of_group else None,
            "version": completion.versions[0][0],
        }
        for scored in groups
        for i, completion in enumerate(scored.group.completions)
    ]


def advantage_histogram(samples: Sequence[Sample]) -> list[int]:
    """Returns how many samples have which mean advantage of their tokens.

    The bins are 0.5 wide, around -4 to 4. The outer ones hold what lies beyond.
    """
    means = [mean(sample.advantages) for sample in samples]
    return _histogram(
        [round(2 * max(-4.0, min(4.0, each))) + 8 for each in means if each == each], 17
    )


def _histogram(places: Sequence[int], size: int = 0) -> list[int]:
    counts = Counter(places)
    return [counts[i] for i in range(size or max(places) + 1)]


def mean(values: Sequence[float]) -> float:
    """Returns the mean, NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
