"""Minerva: 272 undergraduate problems of MIT OpenCourseWare in science and mathematics.

Source: Lewkowycz et al. 2206.14858. To judge by.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.common.files import Hub, for_judging, rows
from grpo.types import Problem


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """The problems. `path`: minerva.jsonl or its folder; None: the hub."""
    return for_judging(
        "minerva",
        split,
        rows(path, stems=["minerva", "minerva_math"], hub=Hub("math-ai/minervamath", None, "test")),
    )
