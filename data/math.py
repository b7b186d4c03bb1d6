"""MATH: competition problems (Hendrycks et al. 2103.03874).

The test split is MATH-500 (PRM800K, 2305.20050).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from data.common.files import Hub, Row, check_split, rows, text, unique
from grpo.types import Problem, UserError

HUBS = {
    "train": Hub("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
    "test": Hub("HuggingFaceH4/MATH-500", None, "test"),
}
STEMS = {"train": ["math_train"], "test": ["math500", "math_test"]}
log = logging.getLogger(__name__)


def load(
    split: str, *, seed: int, path: str | None = None, levels: list[int] | None = None
) -> Sequence[Problem]:
    """The problems of a split with one of `levels` (1 to 5; None: all).

    `path`: math_train.jsonl, math500.jsonl or their folder.
    """
    check_split("math", split)
    if levels is not None and (not levels or not set(levels) <= {1, 2, 3, 4, 5}):
        raise UserError(f"data.math.levels: got {levels}; give some of 1, 2, 3, 4, 5")
    problems = []
    without_answer = 0
    for i, row in enumerate(rows(path, stems=STEMS[split], hub=HUBS[split])):
        answer = (
            text(row, "answer") if "answer" in row.fields else _last_boxed(text(row, "solution"))
        )
        if not answer:  # two rows of the hub's train split have an empty box
            without_answer += 1
            continue
        meta = {
            "level": _level(row),
            "subject": row.fields.get("subject") or row.fields.get("type"),
        }
        if levels is None or meta["level"] in levels:
            solution = row.fields.get("solution")
            question = text(row, "problem")
            problems.append(
                Problem(
                    id=f"math/{split}/{i}",
                    question=question,
                    answer=answer,
                    source="math",
                    solution=solution,
                    meta=meta,
                )
            )
    if without_answer:
        log.warning("math %s: left out %d problems without a boxed answer", split, without_answer)
    return unique(problems)


def _level(row: Row) -> int | None:
    """5 for `5` and for "Level 5"; None for "Level ?"."""
    value: Any = row.fields.get("level")
    digits = str(value).removeprefix("Level ").strip()
    return int(digits) if digits.isdecimal() else None


def _last_boxed(solution: str) -> str:
    start = max(solution.rfind(r"\boxed{"), solution.rfind(r"\fbox{"))
    if start < 0:  # `\boxed 5`, without braces
        return (
            solution.rpartition(r"\boxed ")[2].split("$")[0].strip()
            if r"\boxed " in solution
            else ""
        )
    start = solution.index("{", start) + 1
    depth = 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start:end].strip()
    return ""
