"""AMC 12 of 2022 and 2023.

40 competition problems with a number as answer (Mathematical Association of America). To judge by.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.common.files import Hub, for_judging, rows
from grpo.types import Problem


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """The problems. `path`: amc23.jsonl or its folder; None: the hub."""
    return for_judging(
        "amc", split, rows(path, stems=["amc23", "amc"], hub=Hub("math-ai/amc23", None, "test"))
    )
