"""Reward for ending: 1.0 if a completion ended by itself, 0.0 if `sampling.max_tokens` cut it off.

Source: the hard form of DAPO's overlong punishment (2503.14476 section 3.4), as a bonus instead of
a penalty.
"""

from __future__ import annotations

from grpo.types import Completion, Problem


def reward(completion: Completion, problem: Problem) -> float:
    """Returns 1.0 if the completion ended by itself, else 0.0."""
    return float(completion.finish_reason == "stop")
