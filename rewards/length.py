"""Length reward: 0 up to a soft limit, then falling linearly to -1. DAPO's overlong punishment."""

from __future__ import annotations

from grpo.types import Completion, Problem, UserError


def prepare(max_tokens: int, buffer: int) -> None:
    """Raises UserError unless 0 < buffer <= max_tokens."""
    if not 0 < buffer <= max_tokens:
        raise UserError(
            f"rewards.length.options: got buffer={buffer} and max_tokens={max_tokens}, expected "
            "0 < buffer <= max_tokens"
        )


def reward(completion: Completion, problem: Problem, *, max_tokens: int, buffer: int) -> float:
    """Returns a penalty from 0 to -1 that grows linearly over the last `buffer` tokens.

    With max_tokens=100 and buffer=20: 0.0 for 80 tokens, -0.5 for 90, -1.0 for 100 and more.

    Args:
        completion: The completion to score.
        problem: Unused.
        max_tokens: Length at which the penalty reaches -1.
        buffer: Number of tokens before `max_tokens` over which the penalty grows.

    Source: DAPO 2503.14476 Eq. 13 (max_tokens 20,480, buffer 4,096).
    """
    num_over = len(completion.token_ids) - (max_tokens - buffer)
    return -min(max(num_over / buffer, 0.0), 1.0)
