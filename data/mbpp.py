"""MBPP: short Python tasks in prose, with tests for the reward `code` (Austin et al. 2108.07732).

374 problems of the paper are for training, 500 for testing. In the sanitized subset, which was
verified by hand, it is 120 and 257.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from grpo.data.common.files import (
    HubDataset,
    Row,
    check_split,
    check_unique_ids,
    read_rows,
    text_field,
)
from grpo.data.common.procedural import check_range
from grpo.types import Problem, UserError

# Names of local files by subset.
STEMS = {
    "full": ["mbpp", "mbpp_full"],
    "sanitized": ["sanitized-mbpp", "mbpp_sanitized"],
}
# Task ids of the splits. The others are few-shot prompts (1 to 10) and validation (511 to 600).
TASK_IDS = {"test": range(11, 511), "train": range(601, 975)}


def load(
    split: str,
    *,
    seed: int,
    path: str | None = None,
    subset: str = "full",
    shown_tests: int | None = None,
) -> Sequence[Problem]:
    """Returns the problems of a split, in file order.

    As in the paper, the question contains the tests: they are the only place with the name of the
    function.

    Args:
        split: `train` or `test`.
        seed: Unused.
        path: mbpp.jsonl or sanitized-mbpp.json, or its folder. None: the hub.
        subset: `full` or `sanitized`.
        shown_tests: Number of tests in the question. None: all. In training, 1 leaves the other
            tests unseen.

    Raises:
        UserError: An option is wrong, a row is incomplete, or the split has no problems.
    """
    check_split("mbpp", split)
    if subset not in tuple(STEMS):
        raise UserError(
            f"data.mbpp.subset: unknown subset {subset!r}. Available: {', '.join(STEMS)}."
        )
    if shown_tests is not None:
        check_range("mbpp.shown_tests", shown_tests, 1, 1000)  # a test has the function's name
    hub = HubDataset("google-research-datasets/mbpp", subset, split)
    problems = []
    for row in read_rows(path, stems=STEMS[subset], hub=hub):
        task_id = _task_id(row)
        if task_id in TASK_IDS[split]:
            problems.append(_problem(row, task_id, shown_tests))
    if not problems:
        raise UserError(
            f"data.mbpp: {path} has no {split} problems, which have the task ids "
            f"{TASK_IDS[split].start} to {TASK_IDS[split].stop - 1}"
        )
    check_unique_ids(problems)
    return problems


def _task_id(row: Row) -> int:
    """Returns 12 for the field `task_id: 12` or `id: "mbpp/12"`."""
    text = text_field(row, "task_id", "id")
    match = re.fullmatch(r"(?:mbpp/)?(\d+)", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"{row.location}: field 'task_id' is {text!r}, expected a number")
    return int(match[1])


def _problem(row: Row, task_id: int, shown_tests: int | None) -> Problem:
    tests = _texts(row, "test_list")
    if not tests:
        raise UserError(f"{row.location}: field 'test_list' is missing or empty")
    setup = row.fields.get("test_setup_code") or "\n".join(_texts(row, "test_imports"))
    task = text_field(row, "text", "prompt", "problem")
    shown = "\n".join(tests[:shown_tests])
    return Problem(
        id=f"mbpp/{task_id}",
        question=f"{task}\nYour code should pass these tests:\n\n{shown}",
        answer=text_field(row, "code", "answer"),
        source="mbpp",
        meta={"test_list": tests, "test_setup_code": setup},
    )


def _texts(row: Row, field: str) -> list[str]:
    """Returns a field that is a list of texts, [] if it is missing."""
    values: Any = row.fields.get(field) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{row.location}: field {field!r} is no list of texts")
    return list(values)
