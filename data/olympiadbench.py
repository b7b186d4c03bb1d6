"""OlympiadBench: 675 open-ended olympiad problems in English, text only. Evaluation only.

Source: He et al. 2402.14008.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.data.common.files import HubDataset, evaluation_problems, read_rows
from grpo.types import Problem

HUB_DATASET = HubDataset("math-ai/olympiadbench", None, "test")


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """Returns the problems.

    Args:
        split: Must be `test`.
        seed: Unused.
        path: olympiad.jsonl or its folder. None: the hub.

    Raises:
        UserError: `split` is `train`, or a row is incomplete.
    """
    rows = read_rows(path, stems=["olympiad", "olympiadbench"], hub=HUB_DATASET)
    return evaluation_problems("olympiadbench", split, rows)
