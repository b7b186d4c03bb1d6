"""The only reader of the tags: which part of a completion is its answer.

Linear in the text; knows nothing of what an answer means.
"""

from __future__ import annotations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def visible(text: str) -> str:
    """What stands outside the thoughts.

    The text after the last `</think>`, up to a `<think>` that is never closed.
    """
    return text[text.rfind("</think>") + len("</think>") if "</think>" in text else 0 :].partition(
        "<think>"
    )[0]


def final_answer(text: str) -> str | None:
    r"""The answer of a completion.

    `"<think>1+1</think><answer>2</answer>"` -> "2", `"so \boxed{2}"` -> "2", else None.

    The content of the last complete `<answer>` outside the thoughts, else of the last `\boxed`; a
    box inside the tags is opened. Nothing inside the thoughts is an answer, nor is a last box that
    does not end or an empty one.
    """
    shown = visible(text)
    end = shown.rfind("</answer>")
    start = shown.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return boxed(shown)
    answer = shown[start + len("<answer>") : end].strip()
    return boxed(answer) if r"\boxed" in answer else answer or None


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced.

    None without one, or when it is empty or does not end.
    """
    start = text.rfind(r"\boxed")
    rest = text[start + len(r"\boxed") :].lstrip() if start >= 0 else ""
    if not rest.startswith("{"):
        return None
    depth = 0
    for i, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:i].strip() or None
    return None
