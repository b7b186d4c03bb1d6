"""MATH: competition problems (Hendrycks et al. 2103.03874).

The test split is MATH-500 (PRM800K, 2305.20050).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from grpo.data.common.files import (
    HubDataset,
    Row,
    check_split,
    check_unique_ids,
    read_rows,
    text_field,
)
from grpo.types import Problem, UserError

HUB_DATASETS = {
    "train": HubDataset("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
    "test": HubDataset("HuggingFaceH4/MATH-500", None, "test"),
}
STEMS = {"train": ["math_train"], "test": ["math500", "math_test"]}
logger = logging.getLogger(__name__)


def load(
    split: str, *, seed: int, path: str | None = None, levels: list[int] | None = None
) -> Sequence[Problem]:
    """Returns the problems of a split, in file order.

    Args:
        split: `train` or `test`.
        seed: Unused.
        path: math_train.jsonl or math500.jsonl, or its folder. None: the hub.
        levels: Difficulty levels to keep, each from 1 to 5. None: all.

    Raises:
        UserError: `levels` is invalid, or a row is incomplete.
    """
    check_split("math", split)
    if levels is not None and (not levels or not set(levels) <= {1, 2, 3, 4, 5}):
        raise UserError(f"data.math.levels: got {levels}, expected a list of levels from 1 to 5")
    problems = []
    num_without_answer = 0
    for index, row in enumerate(read_rows(path, stems=STEMS[split], hub=HUB_DATASETS[split])):
        answer = _answer(row)
        if not answer:  # two rows of the hub's train split have an empty box
            num_without_answer += 1
            continue
        level = _level(row)
        if levels is not None and level not in levels:
            continue
        problem = Problem(
            id=f"math/{split}/{index}",
            question=text_field(row, "problem"),
            answer=answer,
            source="math",
            solution=row.fields.get("solution"),
            meta={
                "level": level,
                "subject": row.fields.get("subject") or row.fields.get("type"),
            },
        )
        problems.append(problem)
    if num_without_answer > 0:
        logger.warning(
            "math %s: skipped %d problems without a boxed answer", split, num_without_answer
        )
    check_unique_ids(problems)
    return problems


def _answer(row: Row) -> str:
    if "answer" in row.fields:
        return text_field(row, "answer")
    return _last_boxed(text_field(row, "solution"))


def _level(row: Row) -> int | None:
    """Returns 5 for `5` and for `"Level 5"`, and None for `"Level ?"`."""
    digits = str(row.fields.get("level")).removeprefix("Level ").strip()
    return int(digits) if digits.isdecimal() else None


def _last_boxed(solution: str) -> str:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}`, "" if there is none.

    A last box that is never closed counts as none. `\boxed 5`, without braces, counts only in a
    solution that has no box with braces.
    """
    box_start = max(solution.rfind(r"\boxed{"), solution.rfind(r"\fbox{"))
    if box_start < 0:
        if r"\boxed " not in solution:
            return ""
        return solution.rpartition(r"\boxed ")[2].split("$")[0].strip()
    content_start = solution.index("{", box_start) + 1
    depth = 1
    for end in range(content_start, len(solution)):
        if solution[end] == "{":
            depth += 1
        elif solution[end] == "}":
            depth -= 1
        if depth == 0:
            return solution[content_start:end].strip()
    return ""
