"""Length reward: 0 up to a soft limit, then down to -1. DAPO's soft overlong punishment."""

from __future__ import annotations

from grpo.types import Completion, Problem, UserError


def prepare(max_tokens: int, buffer: int) -> None:
    """Raises UserError for a buffer that is none."""
    if not 0 < buffer <= max_tokens:
        raise UserError(
            f"rewards.length.options: got buffer={buffer}, max_tokens={max_tokens}; give 0 < "
            "buffer <= max_tokens"
        )


def reward(completion: Completion, problem: Problem, *, max_tokens: int, buffer: int) -> float:
    """0 to -1: falls linearly over the last `buffer` of `max_tokens` tokens.

    Source: DAPO 2503.14476 Eq. 13 (20,480 and 4,096 there).

    With max_tokens=100, buffer=20: 80 tokens 0.0, 90 tokens -0.5, 100 and more -1.0.
    """
    over = len(completion.token_ids) - (max_tokens - buffer)
    return -min(max(over / buffer, 0.0), 1.0)
