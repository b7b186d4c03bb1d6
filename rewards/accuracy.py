"""Accuracy reward: is the final answer equal in value and kind to the gold answer? Where it stands: `_parse`; equality: `_equal`."""

from __future__ import annotations

from grpo.types import Completion, Problem, Verdict
from rewards._equal import equal
from rewards._parse import TAGS, final_answer

MAX_BARE = 200  # characters of an answer without tags or box


def reward(completion: Completion, problem: Problem) -> Verdict:
    """The verdict on the completion's final answer; wrong when there is none. Source: DeepSeek-R1 2501.12948 section 2.2.2."""
    answer = final_answer(completion.text)
    return Verdict(value="wrong", reason="no final answer") if answer is None else equal(answer, problem.answer)


def verify(prediction: str, gold: str) -> Verdict:
    """The verdict on a whole completion, or on a short bare answer: `verify("1/2", "0.5")` is correct."""
    bare = len(prediction) <= MAX_BARE and not any(mark in prediction for mark in (*TAGS, r"\boxed"))
    answer = prediction if bare else final_answer(prediction)
    return Verdict(value="wrong", reason="no final answer") if answer is None else equal(answer, gold)
