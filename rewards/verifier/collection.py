"""Splits lists, sets, tuples, intervals, unions and matrices into their elements."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from grpo.rewards.verifier.brackets import find_closing, split_at_top_level

UNORDERED_KINDS = ("list", "set", "union")
DOTS = re.compile(r"\\[lc]?dots|\.{3}")
MAX_DOTS = 500  # integers that dots stand for
# What separates the elements of a list.
SEPARATORS = (",", ";", r"\lor", r"\land")


class Collection(NamedTuple):
    """The kind of a collection and its elements. A single value has the kind "".

    Kinds: `list`, `set`, `union`, `ratio` (also a time such as `3:05`), the two brackets of a tuple
    or interval such as `(]`, and `matrix` with the lengths of its rows such as `matrix [2, 2]`.
    """

    kind: str
    elements: list[str]
    connector: str = ""  # "or" if a list has this word


def read_collection(text: str) -> Collection:
    r"""Splits a collection into its elements.

    Examples: `\{1,2\}` -> ("set", ["1", "2"]), `(3,4]` -> ("(]", ["3", "4"]), `5` -> ("", ["5"]).
    An element with `\pm`, alone or in a list or set, counts as two elements.
    """
    matrix = _read_matrix(text) or _read_rows(text)
    if matrix is not None:
        return matrix
    if text.startswith(r"\begin{cases}"):
        return Collection("", [text])
    parts = split_at_top_level(text, (r"\cup",))
    if len(parts) > 1:
        return Collection("union", parts)
    if text.startswith(r"\{") and find_closing(text, 1) == len(text) - 1:
        content = text[2:-1].rstrip("\\").strip()
        elements = _without_dots(split_at_top_level(content, SEPARATORS)) if content else []
        return Collection("set", _with_both_signs(elements))
    if text.startswith(("(", "[")) and find_closing(text, 0) == len(text) - 1:
        elements = split_at_top_level(text[1:-1])
        if len(elements) > 1:
            return Collection(text[0] + text[-1], elements)
    ratio = split_at_top_level(text, (":",))
    if len(ratio) > 1:
        return Collection("ratio", ratio)
    elements = _with_both_signs(split_at_top_level(text, SEPARATORS))
    connector = "or" if r"\lor" in text else ""
    return Collection("list" if len(elements) > 1 else "", elements, connector)


def _read_matrix(text: str) -> Collection | None:
    """Returns the cells of a matrix, row by row, each multiplied by a factor before the matrix."""
    match = re.fullmatch(
        r"(?P<factor>[^&]*?)\\begin\{(?P<kind>[pbB]?)(?:small)?matrix\}(?P<rows>.*)"
        r"\\end\{(?P=kind)(?:small)?matrix\}",
        text,
    )
    if match is None or "matrix}" in match["rows"]:
        return None
    factor = match["factor"]
    if factor == "-":
        factor = "-1"
    row_lengths = []
    cells = []
    for row in match["rows"].split(r"\\"):
        if row.strip():
            row_cells = split_at_top_level(row, ("&",))
            row_lengths.append(len(row_cells))
            cells += row_cells
    if factor:
        cells = [f"({factor})*({cell})" for cell in cells]
    return Collection(f"matrix {row_lengths}", cells)


def _read_rows(text: str) -> Collection | None:
    """Returns the cells of a matrix written as a list of rows: `[[1,2],[3,4]]`."""
    match = re.fullmatch(r"\[ ?(?P<rows>\[.*\]) ?\]", text)
    if match is None:
        return None
    rows = []
    for row in split_at_top_level(match["rows"]):
        if not (row.startswith("[") and row.endswith("]")):
            return None
        rows.append(split_at_top_level(row[1:-1]))
    row_lengths = [len(row) for row in rows]
    return Collection(f"matrix {row_lengths}", list(itertools.chain.from_iterable(rows)))


def _without_dots(elements: list[str]) -> list[str]:
    r"""Returns the elements with the integers that dots stand for: `1, 2, \ldots, 5`."""
    positions = [index for index, text in enumerate(elements) if DOTS.fullmatch(text)]
    if len(positions) != 1 or not 0 < positions[0] < len(elements) - 1:
        return elements
    before, after = elements[: positions[0]], elements[positions[0] + 1 :]
    if not all(re.fullmatch(r"-?\d{1,6}", text) for text in (*before, *after)):
        return elements
    step = int(before[-1]) - int(before[-2]) if len(before) > 1 else 1
    last = int(before[-1])
    if step == 0 or not 0 < (int(after[0]) - last) / step < MAX_DOTS:
        return elements
    return [*before, *map(str, range(last + step, int(after[0]), step)), *after]


def _with_both_signs(elements: Sequence[str]) -> list[str]:
    r"""Replaces each element that has one `\pm` with two elements: `1\pm x` -> `1+x`, `1-x`.

    `\mp` has the opposite sign.
    """
    result = []
    for element in elements:
        if element.count(r"\pm") + element.count(r"\mp") == 1 or element.count(r"\pm") == 1:
            result.append(element.replace(r"\pm", "+").replace(r"\mp", "-"))
            result.append(element.replace(r"\pm", "-").replace(r"\mp", "+"))
        else:
            result.append(element)
    return result
