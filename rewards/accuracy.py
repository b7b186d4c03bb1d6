"""Accuracy reward: is the final answer equal to the gold answer, in value and kind?

The rules: verifier/parse.py extracts the answer, verifier/equal.py compares it.
"""

from __future__ import annotations

from grpo.rewards.verifier.equal import MAX_CHARS, compare_answers, why_unreadable
from grpo.rewards.verifier.latex import normalize
from grpo.rewards.verifier.parse import TAGS, final_answer
from grpo.rewards.verifier.verdicts import wrong
from grpo.types import Completion, Problem, Verdict

# Time limit of one call in a worker of the pool. It is a second line of defence: the verifier
# bounds the size of an answer, so that no answer should take this long.
TIMEOUT_S = 5.0


def reward(completion: Completion, problem: Problem) -> Verdict | None:
    """Returns the verdict on the completion's final answer, or None if there is no gold answer.

    A completion without a final answer is wrong.

    Source: DeepSeek-R1 2501.12948 section 2.2.2.
    """
    if not problem.answer:
        return None
    return _verdict(final_answer(completion.text), problem.answer)


def check_problem(problem: Problem) -> str | None:
    """Returns why the gold answer of a problem cannot be read, None if it can be read."""
    if not problem.answer:
        return None
    return why_unreadable(problem.answer) or None


def verify(prediction: str, gold: str) -> Verdict:
    """Returns the verdict on a completion or on a bare answer.

    The text is never evaluated as code, and no exception is raised.

    Args:
        prediction: A completion, or a bare answer (without tags and box) of at most MAX_CHARS
            characters.
        gold: The gold answer.

    Example: `verify("1/2", "0.5")` is correct.
    """
    return _verdict(_answer_of(prediction), gold)


def _verdict(answer: str | None, gold: str) -> Verdict:
    if answer is None:
        return wrong("no final answer")
    return compare_answers(answer, gold)


def explain(prediction: str, gold: str) -> str:
    """Returns the verdict of `verify` as text, with the answer, its origin and normalized forms."""
    answer = _answer_of(prediction)
    verdict = _verdict(answer, gold)
    origin = "a bare answer" if _is_bare_answer(prediction) else "in the completion"
    lines = [f"{'answer':20}{answer!r}", f"{'found':20}{origin!r}", f"{'gold':20}{gold!r}"]
    if answer is not None and len(answer) <= MAX_CHARS:
        lines.append(f"{'answer, normalized':20}{normalize(answer)!r}")
        lines.append(f"{'gold, normalized':20}{normalize(gold)!r}")
    if verdict.reason:
        lines.append(f"{'verdict':20}{verdict.value}: {verdict.reason}")
    else:
        lines.append(f"{'verdict':20}{verdict.value}")
    return "\n".join(lines)


def warm_up() -> None:
    """Computes constants to the digits that formulas need, so that no answer waits for them."""
    for example in (r"\frac{a}{b}\cdot(1+\pi)", r"\cos(2x)\log_2 3", r"y=2x+e^{-t}", "|x|!"):
        compare_answers(example, example + "+1")


def _answer_of(prediction: str) -> str | None:
    if _is_bare_answer(prediction):
        return prediction
    return final_answer(prediction)


def _is_bare_answer(prediction: str) -> bool:
    """Returns whether a text is an answer itself, not a completion with tags or a box."""
    has_mark = any(mark in prediction for mark in (*TAGS, r"\boxed"))
    return len(prediction) <= MAX_CHARS and not has_mark
