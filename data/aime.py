"""AIME: 30 competition problems per year with an integer answer of 0 to 999.

They are by the Mathematical Association of America. To judge by.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.common.files import Hub, for_judging, rows
from grpo.types import Problem, UserError

HUBS = {
    2024: Hub("HuggingFaceH4/aime_2024", None, "train"),
    2025: Hub("math-ai/aime25", None, "test"),
}


def load(split: str, *, seed: int, path: str | None = None, year: int = 2024) -> Sequence[Problem]:
    """The problems of a year, 2024 or 2025.

    `path`: aime24.jsonl or aime25.jsonl, or their folder; None: the hub.
    """
    if year not in HUBS:
        raise UserError(f"data.aime.year: got {year}; have {', '.join(map(str, HUBS))}")
    return for_judging(
        "aime",
        split,
        rows(path, stems=[f"aime{year % 100}", f"aime_{year}"], hub=HUBS[year]),
        f"{year}/",
    )
