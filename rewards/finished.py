"""Reward for ending.

1.0 when a completion came to its end by itself, 0.0 when `sampling.max_tokens` cut it off.
"""

from __future__ import annotations

from grpo.types import Completion, Problem


def reward(completion: Completion, problem: Problem) -> float:
    """1.0 for an ended completion.

    The hard form of DAPO's overlong punishment (2503.14476 section 3.4), as a bonus and not a
    penalty.
    """
    return float(completion.finish_reason == "stop")
