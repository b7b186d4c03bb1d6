"""OlympiadBench.

675 olympiad problems in English, text only, open-ended (He et al. 2402.14008). To judge by.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.common.files import Hub, for_judging, rows
from grpo.types import Problem


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """The problems. `path`: olympiad.jsonl or its folder; None: the hub."""
    return for_judging(
        "olympiadbench",
        split,
        rows(
            path,
            stems=["olympiad", "olympiadbench"],
            hub=Hub("math-ai/olympiadbench", None, "test"),
        ),
    )
