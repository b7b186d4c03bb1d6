"""Format reward: 1.0 for `<think>...</think><answer>...</answer>` without other text, else 0.0.

The tags are found by plain text search. Thoughts and answer must show something; nothing else about
their content matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.rewards.verifier.invisible import is_blank
from grpo.rewards.verifier.parse import TAGS
from grpo.types import Completion, Problem, Score

TAG_NAMES = ("think", "think end", "answer", "answer end")  # names of TAGS in the reasons


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatVerdict:
    """The result of `check`. It is true if the completion is well-formed.

    Example: `FormatVerdict(ok=False, reason="text after answer")`.

    The reasons, in the order of the checks: `no NAME` or `several NAME` for each of TAG_NAMES;
    `tags out of order`; `text before think`, `empty thoughts`, `text between`, `empty answer` and
    `text after answer`.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        """Returns whether the completion is well-formed."""
        return self.ok


def reward(completion: Completion, problem: Problem) -> Score:
    """Returns 1.0 if the completion is well-formed, else 0.0 with the reason.

    If the prompt ends with `<think>`, the text of the completion already begins with it.

    Source: DeepSeek-R1 2501.12948 section 2.2.2. The exact rules (see `check`) are grpo's.
    """
    verdict = check(completion.text)
    return Score(value=float(verdict.ok), reason=verdict.reason)


def check(completion: str, prefilled: bool = False) -> FormatVerdict:
    """Returns whether a completion is well-formed, and the reason if it is not.

    A completion is well-formed if each of the four tags occurs exactly once, in lower case and in
    order; if the thoughts and the answer are not empty; and if there is only white space outside of
    them. The check takes time linear in the length of the text.

    Thoughts or an answer are empty if they have only white space, invisible characters such as
    zero-width spaces, and marks without a letter. Outside of the tags, an invisible character is
    text: nothing can be hidden there.

    Args:
        completion: The text to check.
        prefilled: Whether the prompt ends with the opening `<think>`, so that the text lacks it.
    """
    text = "<think>" + completion if prefilled else completion
    reason = _tag_fault(text)
    if not reason:
        reason = _content_fault(text)
    return FormatVerdict(ok=not reason, reason=reason)


def _tag_fault(text: str) -> str:
    """Returns the reason if a tag is missing, repeated or out of order, else ""."""
    for tag, name in zip(TAGS, TAG_NAMES, strict=True):
        count = text.count(tag)
        if count == 0:
            return f"no {name}"
        if count > 1:
            return f"several {name}"
    starts = [text.index(tag) for tag in TAGS]
    if starts != sorted(starts):
        return "tags out of order"
    return ""


def _content_fault(text: str) -> str:
    """Returns the reason if a part of a text with correct tags is empty or misplaced, else ""."""
    before_think, _, text = text.partition("<think>")
    thoughts, _, text = text.partition("</think>")
    between, _, text = text.partition("<answer>")
    answer, _, after_answer = text.partition("</answer>")
    if before_think.strip():
        return "text before think"
    if is_blank(thoughts):
        return "empty thoughts"
    if between.strip():
        return "text between"
    if is_blank(answer):
        return "empty answer"
    if after_answer.strip():
        return "text after answer"
    return ""
