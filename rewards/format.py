"""Format reward: 1.0 for exactly `<think>...</think><answer>...</answer>`.

A plain parser; knows nothing of right answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.types import Completion, Problem, Score
from rewards.verifier.parse import TAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatVerdict:
    """`FormatVerdict(ok=False, reason="text after answer")`; true when well-formed.

    The reasons, in the order in which they are looked for: `no think`, `several think`, and so on
    for the four tags (`think end`, `answer`, `answer end`); `tags out of order`; `text before
    think`, `empty thoughts`, `text between`, `empty answer`, `text after answer`.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        """Returns whether the completion is well-formed."""
        return self.ok


def reward(completion: Completion, problem: Problem) -> Score:
    """1.0 when the completion is well-formed, else 0.0 and why.

    Source: DeepSeek-R1 2501.12948 section 2.2.2; ours: every rule of `check`.

    A `<think>` that the prompt ended in stands in front of the completion's text already.
    """
    verdict = check(completion.text)
    return Score(value=float(verdict.ok), reason=verdict.reason)


def check(completion: str, prefilled: bool = False) -> FormatVerdict:
    """Returns whether a completion is well-formed, and if not, why.

    The four tags stand exactly once, lower case and in order; both parts are filled; outside there
    is only white space.

    `prefilled`: the opening `<think>` stood at the end of the prompt and is put back in front.
    Linear in the text.
    """
    text = "<think>" + completion if prefilled else completion
    for tag, name in zip(TAGS, ("think", "think end", "answer", "answer end"), strict=True):
        if (count := text.count(tag)) != 1:
            return FormatVerdict(ok=False, reason=f"{'several' if count else 'no'} {name}")
    think, think_end, answer, answer_end = (text.index(tag) for tag in TAGS)
    if not think < think_end < answer < answer_end:
        return FormatVerdict(ok=False, reason="tags out of order")
    parts = {
        "text before think": (text[:think], False),
        "empty thoughts": (text[think + len("<think>") : think_end], True),
        "text between": (text[think_end + len("</think>") : answer], False),
        "empty answer": (text[answer + len("<answer>") : answer_end], True),
        "text after answer": (text[answer_end + len("</answer>") :], False),
    }
    fault = next(
        (fault for fault, (part, filled) in parts.items() if bool(part.strip()) != filled), ""
    )
    return FormatVerdict(ok=not fault, reason=fault)
