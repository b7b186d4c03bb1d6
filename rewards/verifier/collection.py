"""Splits lists, sets, tuples, intervals, unions and matrices into their elements."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from rewards.verifier.exact_values import exact_value
from rewards.verifier.latex import find_closing, split_at_top_level

UNORDERED_KINDS = ("list", "set", "union")


class Collection(NamedTuple):
    """The kind of a collection and its elements. A single value has the kind "".

    Kinds: `list`, `set`, `union`, the two brackets of a tuple or interval such as `(]`, and
    `matrix` with the lengths of its rows such as `matrix [2, 2]`.
    """

    kind: str
    elements: list[str]


def read_collection(text: str) -> Collection:
    r"""Splits a collection into its elements.

    Examples: `\{1,2\}` -> ("set", ["1", "2"]), `(3,4]` -> ("(]", ["3", "4"]), `5` -> ("", ["5"]).
    An element with `\pm`, alone or in a list or set, counts as two elements.

    Raises:
        TooLargeError: A number exceeds a bound.
    """
    matrix = _read_matrix(text)
    if matrix is not None:
        return matrix
    intervals = _read_reals_without_points(text)
    if intervals is not None:
        return intervals
    parts = split_at_top_level(text, (r"\cup",))
    if len(parts) > 1:
        return Collection("union", parts)
    if text.startswith(r"\{") and find_closing(text, 1) == len(text) - 1:
        content = text[2:-1].rstrip("\\")
        return Collection("set", _with_both_signs(split_at_top_level(content)))
    if text.startswith(("(", "[")) and find_closing(text, 0) == len(text) - 1:
        elements = split_at_top_level(text[1:-1])
        if len(elements) > 1:
            return Collection(text[0] + text[-1], elements)
    elements = _with_both_signs(split_at_top_level(text))
    return Collection("list" if len(elements) > 1 else "", elements)


def _read_matrix(text: str) -> Collection | None:
    """Returns the cells of a matrix, row by row, each multiplied by a factor before the matrix."""
    match = re.fullmatch(
        r"(?P<factor>[^&]*?)\\begin\{(?P<kind>[pb]?)matrix\}(?P<rows>.*)\\end\{(?P=kind)matrix\}",
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


def _read_reals_without_points(text: str) -> Collection | None:
    r"""Returns the intervals around the excluded points of `\mathbb{R} \setminus \{1, 2\}`.

    Raises:
        TooLargeError: A point exceeds a bound.
    """
    match = re.fullmatch(
        r"\\mathbb\{R\} ?(?:\\setminus|\\backslash|-) ?\\\{(?P<points>.*)\\\}", text
    )
    if match is None or len(match["points"]) >= 100:
        return None
    points = sorted(split_at_top_level(match["points"]), key=lambda point: exact_value(point) or 0)
    bounds = [r"-\infty", *points, r"\infty"]
    return Collection("union", [f"({low},{high})" for low, high in itertools.pairwise(bounds)])


def _with_both_signs(elements: Sequence[str]) -> list[str]:
    r"""Replaces each element that has one `\pm` with two elements: `1\pm x` -> `1+x`, `1-x`.

    `\mp` has the opposite sign.
    """
    result = []
    for element in elements:
        if element.count(r"\pm") == 1:
            result.append(element.replace(r"\pm", "+").replace(r"\mp", "-"))
            result.append(element.replace(r"\pm", "-").replace(r"\mp", "+"))
        else:
            result.append(element)
    return result
