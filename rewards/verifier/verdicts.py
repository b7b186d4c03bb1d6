"""The verdicts that verifiers return."""

from __future__ import annotations

from grpo.types import Verdict

CORRECT = Verdict(value="correct")


def wrong(reason: str) -> Verdict:
    """Returns the verdict on a wrong answer.

    Example: `wrong("no final answer")`.
    """
    return Verdict(value="wrong", reason=reason)
