"""Brackets in LaTeX: finds their ends, splits text outside of them, adds missing braces."""

from __future__ import annotations

import re

COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
NUM_ARGUMENTS = {r"\frac": 2, r"\sqrt": 1}


def with_braces(text: str) -> str:
    r"""Returns the text with braces around the arguments of `\frac` and `\sqrt`.

    Examples: `\frac12` -> `\frac{1}{2}`, `\frac{270}7` -> `\frac{270}{7}`, `\sqrt[3]5` ->
    `\sqrt[3]{5}`.
    """
    pieces: list[str] = []
    num_missing = 0  # arguments that the last \frac or \sqrt still needs
    index = 0
    while index < len(text):
        command = COMMAND.match(text, index)
        token = command.group() if command else text[index]
        index += len(token)
        if token in NUM_ARGUMENTS:
            # As an argument it gets no braces, because its own arguments follow: \frac\sqrt23.
            pieces.append(token)
            num_missing = NUM_ARGUMENTS[token]
        elif num_missing == 0:
            pieces.append(token)
        elif token == " ":
            continue
        elif token == "[" and pieces[-1] == r"\sqrt" and "]" in text[index:]:
            end = text.index("]", index) + 1
            pieces.append(text[index - 1 : end])
            index = end
        elif token == "{":
            end = find_closing(text, index - 1)
            if end < 0:
                pieces.append(text[index - 1 :])
                break
            pieces.append("{" + with_braces(text[index:end]) + "}")
            num_missing -= 1
            index = end + 1
        else:  # a character, or a command without arguments: \frac\pi2
            pieces.append("{" + token + "}")
            num_missing -= 1
    return "".join(pieces)


def _depth_change(char: str) -> int:
    """Returns 1 for an opening bracket of any kind, -1 for a closing one, 0 otherwise."""
    if char in "([{":
        return 1
    if char in ")]}":
        return -1
    return 0


def nesting_depth(text: str) -> int:
    """Returns the depth of the most deeply nested brackets: 2 for `((x)+1)`."""
    depth = 0
    max_depth = 0
    for char in text:
        depth += _depth_change(char)
        max_depth = max(max_depth, depth)
    return max_depth


def find_closing(text: str, start: int) -> int:
    """Returns the index at which the bracket at `start` is closed, -1 if it is never closed.

    All kinds of brackets are equivalent: an interval such as (3,4] is closed by its `]`.
    """
    depth = 0
    for index in range(start, len(text)):
        depth += _depth_change(text[index])
        if depth == 0:
            return index
    return -1


def split_at_top_level(text: str, separators: tuple[str, ...] = (",", ";")) -> list[str]:
    """Splits text at separators outside all brackets: `"(1,2),3"` -> `["(1,2)", "3"]`."""
    pieces = []
    piece_start = 0
    depth = 0
    index = 0
    while index < len(text):
        separator = _separator_at(text, index, separators) if depth == 0 else ""
        if separator:
            pieces.append(text[piece_start:index].strip())
            index += len(separator)
            piece_start = index
        else:
            depth += _depth_change(text[index])
            index += 1
    pieces.append(text[piece_start:].strip())
    return pieces


def _separator_at(text: str, index: int, separators: tuple[str, ...]) -> str:
    """Returns the separator that begins at `index`, "" if none does."""
    for separator in separators:
        if text.startswith(separator, index):
            return separator
    return ""


def split_relations(text: str, sign: re.Pattern[str]) -> list[str]:
    """Splits text at signs outside braces and environments: `["x", "<", "5"]`.

    `sign` has one group.
    """
    pieces = []
    start = 0
    for match in sign.finditer(text):
        before = text[: match.start()]
        is_outside = before.count(r"\begin") == before.count(r"\end")
        if is_outside and before.count("{") == before.count("}"):
            pieces += [text[start : match.start()], match.group(1)]
            start = match.end()
    pieces.append(text[start:])
    return pieces
