"""What samples of held-out problems say, and how surely.

pass@k, majority, intervals over problems, paired comparison. NumPy only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

RESAMPLES, LEVEL = 10_000, 0.95


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns the chance that at least one of k completions drawn from n is right.

    `right` of the n completions are right: 1 - C(n - right, k) / C(n, k).

    Unbiased. Source: Chen et al. 2107.03374 Eq. 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Returns what the most frequent answer of a problem is worth.

    A tie is drawn: 1 / tied answers, if the right one is among them.

    Right answers are one answer however they are spelled, wrong ones by their spelling. No answer
    is an answer nobody gives.
    """
    counts = Counter(
        ok or answer for answer, ok in zip(answers, right, strict=True) if ok or answer is not None
    )
    most = max(counts.values(), default=0)
    tied = [answer for answer, count in counts.items() if count == most]
    return (True in tied) / len(tied) if tied else 0.0


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean over problems.

    It comes from percentiles of 10,000 resamples, seeded.
    """
    means = _resampled(np.asarray(values, dtype=float), seed)
    return _bounds(means)


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Returns how B differs from A on the same problems.

    The values are the mean difference, its interval, the two-sided p, and on how many problems each
    is better.
    """
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    means = _resampled(difference, seed)
    low, high = _bounds(means)
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


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.concatenate(
        [
            values[draw.integers(0, len(values), (100, len(values)))].mean(1)
            for _ in range(RESAMPLES // 100)
        ]
    )


def _bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
