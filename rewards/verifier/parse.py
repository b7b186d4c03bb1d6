r"""Extracts the answer of a completion from its tags or its last `\boxed{...}`.

All rewards that need an answer extract it with this module. It does not interpret the answer. All
functions take time linear in the length of the text.
"""

from __future__ import annotations

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def visible(text: str) -> str:
    """Returns the part of a completion outside the thoughts.

    It starts after the last `</think>` and ends before a `<think>` that is never closed.
    """
    after_thoughts = text.rpartition("</think>")[2]
    return after_thoughts.partition("<think>")[0]


def final_answer(text: str) -> str | None:
    r"""Returns the answer of a completion, or None if it has none.

    Only the text outside the thoughts is considered:

    - With a complete pair of answer tags, the answer is the content of the last pair. If this
      content has a `\boxed`, the answer is the content of its last box.
    - Without such a pair, the answer is the content of the last `\boxed{...}`.
    - An empty answer, or a last box that is empty or never closed, is no answer.

    Examples: `"<think>1+1</think><answer>2</answer>"` -> "2", `"so \boxed{2}"` -> "2".
    """
    visible_text = visible(text)
    end = visible_text.rfind("</answer>")
    start = visible_text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return last_boxed(visible_text)
    answer = visible_text[start + len("<answer>") : end].strip()
    if r"\boxed" in answer:
        return last_boxed(answer)
    return answer or None


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, with balanced braces.

    Without braces, the box contains the word that follows: `\boxed 5`. Returns None if
    there is no box, or if the last one is empty or never closed.
    """
    _, command, after_command = text.rpartition(r"\boxed")
    box = after_command.lstrip()
    if not command:
        return None
    if not box.startswith("{"):
        word = re.match(r"[^\s$,;{}]+", box)
        return word.group().rstrip(".") if word else None
    depth = 0
    for index, char in enumerate(box):
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
        if depth == 0:
            return box[1:index].strip() or None
    return None
