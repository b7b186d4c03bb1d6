"""AMC 12A and 12B of 2023: 40 competition problems with a numeric answer. Evaluation only.

Source: Mathematical Association of America.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.data.common.files import HubDataset, evaluation_problems, read_rows
from grpo.types import Problem

HUB_DATASET = HubDataset("math-ai/amc23", None, "test")


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """Returns the problems.

    Args:
        split: Must be `test`.
        seed: Unused.
        path: amc23.jsonl or its folder. None: the hub.

    Raises:
        UserError: `split` is `train`, or a row is incomplete.
    """
    rows = read_rows(path, stems=["amc23", "amc"], hub=HUB_DATASET)
    return evaluation_problems("amc", split, rows)
