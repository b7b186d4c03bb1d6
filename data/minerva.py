"""Minerva: 272 undergraduate science and mathematics problems from MIT OpenCourseWare.

Evaluation only. Source: Lewkowycz et al. 2206.14858.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.data.common.files import HubDataset, evaluation_problems, read_rows
from grpo.types import Problem

HUB_DATASET = HubDataset("math-ai/minervamath", None, "test")


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """Returns the problems.

    Args:
        split: Must be `test`.
        seed: Unused.
        path: minerva.jsonl or its folder. None: the hub.

    Raises:
        UserError: `split` is `train`, or a row is incomplete.
    """
    rows = read_rows(path, stems=["minerva", "minerva_math"], hub=HUB_DATASET)
    return evaluation_problems("minerva", split, rows)
