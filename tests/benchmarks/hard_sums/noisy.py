"""A reward that is wrong at times, as a verifier or a judge is."""

from __future__ import annotations

from grpo.data.common.mixture import seeded_random
from grpo.rewards import accuracy
from grpo.types import Completion, Problem


def noisy_accuracy(completion: Completion, problem: Problem, *, error: float) -> float:
    """Returns the accuracy, or with probability `error` its opposite.

    The draw is a function of the problem and the text: a repeated text gets the same reward.
    """
    verdict = accuracy.reward(completion, problem)
    is_correct = verdict is not None and verdict.value == "correct"
    if seeded_random("noisy_accuracy", problem.id, completion.text).random() < error:
        is_correct = not is_correct
    return float(is_correct)
