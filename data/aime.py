"""AIME: 30 competition problems per year with an integer answer from 0 to 999. Evaluation only.

Source: Mathematical Association of America.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.data.common.files import HubDataset, evaluation_problems, read_rows
from grpo.types import Problem, UserError

HUB_DATASETS = {
    2024: HubDataset("HuggingFaceH4/aime_2024", None, "train"),
    2025: HubDataset("math-ai/aime25", None, "test"),
}


def load(split: str, *, seed: int, path: str | None = None, year: int = 2024) -> Sequence[Problem]:
    """Returns the problems of one year.

    Args:
        split: Must be `test`.
        seed: Unused.
        path: aime24.jsonl or aime25.jsonl, or its folder. None: the hub.
        year: 2024 or 2025.

    Raises:
        UserError: The year is unknown, `split` is `train`, or a row is incomplete.
    """
    if year not in HUB_DATASETS:
        years = ", ".join(str(available) for available in HUB_DATASETS)
        raise UserError(f"data.aime.year: unknown year {year}. Available: {years}.")
    stems = [f"aime{year % 100}", f"aime_{year}"]
    rows = read_rows(path, stems=stems, hub=HUB_DATASETS[year])
    return evaluation_problems("aime", split, rows, id_prefix=f"{year}/")
