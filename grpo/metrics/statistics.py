"""Statistics of evaluations: pass@k, maj@n, bootstrap intervals and paired comparisons.

Depends on NumPy only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k: 1 - C(n - right, k) / C(n, k).

    Args:
        n: Number of completions of a problem.
        right: Number of correct completions among them.
        k: Number of completions drawn, at most `n`.

    Source: Chen et al. 2107.03374 Eq. 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_accuracy(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Returns the expected accuracy of the most frequent answer of a problem (maj@n).

    All correct answers count as one answer. Wrong answers are grouped by their text. A completion
    without an answer does not vote. Among t tied answers, the correct one is worth 1 / t.

    Args:
        answers: The answer of each completion, None if it has none.
        right: Whether each completion is correct.
    """
    votes: Counter[str | bool] = Counter()
    for answer, is_right in zip(answers, right, strict=True):
        if is_right:
            votes[True] += 1
        elif answer is not None:
            votes[answer] += 1
    if not votes:
        return 0.0
    max_votes = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == max_votes]
    return (True in winners) / len(winners)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean over problems (10,000 resamples).

    Args:
        values: One value per problem.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    means = _resampled_means(np.asarray(values, dtype=float), generator)
    return _percentile_bounds(means)


def average_interval(sets: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the unweighted average of the means of several sets.

    The problems of each set are resampled on their own; the sets are fixed.

    Args:
        sets: One value per problem for each set.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    means = [_resampled_means(np.asarray(values, dtype=float), generator) for values in sets]
    return _percentile_bounds(np.mean(means, axis=0))


def paired_comparison(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns a paired bootstrap comparison of B with A on the same problems.

    Args:
        a: One value of A per problem.
        b: One value of B per problem, in the same order.
        seed: Seed of the resampling.

    Returns:
        `difference` (mean of b - a), its 95 % interval `low` and `high`, the two-sided `p`, and the
        number of problems on which B is `better`, `worse` and `equal`.
    """
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    means = _resampled_means(difference, np.random.default_rng(seed))
    low, high = _percentile_bounds(means)
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return {
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p": min(1.0, 2 * tail),
        "better": int((difference > 0).sum()),
        "worse": int((difference < 0).sum()),
        "equal": int((difference == 0).sum()),
    }


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the means of resamples with replacement [NUM_RESAMPLES]."""
    means = []
    for _ in range(NUM_RESAMPLES // 100):  # in blocks, to bound the memory
        indices = generator.integers(0, len(values), (100, len(values)))
        means.append(values[indices].mean(1))
    return np.concatenate(means)


def _percentile_bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
