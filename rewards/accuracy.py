"""Accuracy reward: is the final answer equal in value and kind to the gold answer?

Where it stands: verifier/parse.py; equality: verifier/equal.py.
"""

from __future__ import annotations

from grpo.types import Completion, Problem, Verdict
from rewards.verifier.equal import equal
from rewards.verifier.latex import normalise
from rewards.verifier.parse import TAGS, final_answer

# in a worker of the pool; deterministic bounds come first, so that no answer should ever take as
# long
TIMEOUT_S = 5.0
MAX_BARE = 1000  # characters of an answer without tags or box


def reward(completion: Completion, problem: Problem) -> Verdict | None:
    """The verdict on the completion's final answer; wrong when there is none.

    None for a prompt that has no gold answer.

    Source: DeepSeek-R1 2501.12948 section 2.2.2.
    """
    if not problem.answer:
        return None
    answer = final_answer(completion.text)
    return (
        Verdict(value="wrong", reason="no final answer")
        if answer is None
        else equal(answer, problem.answer)
    )


def verify(prediction: str, gold: str) -> Verdict:
    """The verdict on a whole completion, or on a bare answer: `verify("1/2", "0.5")` is correct.

    Never raises, never evaluates the text.
    """
    answer = _answer(prediction)
    return (
        Verdict(value="wrong", reason="no final answer") if answer is None else equal(answer, gold)
    )


def explain(prediction: str, gold: str) -> str:
    """`verify` in words: where the answer was found, how both were read, and the verdict."""
    verdict, answer = verify(prediction, gold), _answer(prediction)
    lines = {
        "answer": answer,
        "found": "a bare answer" if answer is prediction else "in the completion",
        "gold": gold,
    }
    if answer is not None and len(answer) <= MAX_BARE:
        lines |= {"answer, normalised": normalise(answer), "gold, normalised": normalise(gold)}
    lines |= {"verdict": f"{verdict.value}{verdict.reason and ': ' + verdict.reason}"}
    return "\n".join(
        f"{name:20}{text!r}" if name != "verdict" else f"{name:20}{text}"
        for name, text in lines.items()
    )


def warm_up() -> None:
    """Loads sympy and the LaTeX parser: not the time of the first answer."""
    for example in (
        r"\sqrt{2}+x^2-3xy",
        r"\frac{a}{b}\cdot(1+\pi)",
        r"\cos(2x)\log_2 3",
        r"x\le 5",
        r"(1,\infty)\cup[2,3]",
        r"y=2x+e^{-t}",
        r"|x|!",
    ):
        equal(example, example + "+1")  # its tables grow with what it meets


def _answer(prediction: str) -> str | None:
    bare = len(prediction) <= MAX_BARE and not any(
        mark in prediction for mark in (*TAGS, r"\boxed")
    )
    return prediction if bare else final_answer(prediction)
