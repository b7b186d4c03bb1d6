"""HumanEval: 164 Python functions to complete, with tests for the reward `code`. Evaluation only.

Source: Chen et al. 2107.03374.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.data.common.files import (
    HubDataset,
    Row,
    check_evaluation_split,
    check_unique_ids,
    read_rows,
    text_field,
)
from grpo.types import Problem

HUB_DATASET = HubDataset("openai/openai_humaneval", "openai_humaneval", "test")


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """Returns the problems. The question is the head of the function, with imports and helpers.

    Args:
        split: Must be `test`.
        seed: Unused.
        path: humaneval.jsonl or HumanEval.jsonl, or its folder. None: the hub.

    Raises:
        UserError: `split` is `train`, or a row is incomplete.
    """
    check_evaluation_split("humaneval", split)
    rows = read_rows(path, stems=["humaneval", "HumanEval"], hub=HUB_DATASET)
    problems = [_problem(row, f"humaneval/{index}") for index, row in enumerate(rows)]
    check_unique_ids(problems)
    return problems


def _problem(row: Row, problem_id: str) -> Problem:
    # `text_field` would remove the indentation of the body.
    body = row.fields.get("canonical_solution", row.fields.get("answer"))
    return Problem(
        id=problem_id,
        question=text_field(row, "prompt", "problem"),
        answer=str(body or ""),
        source="humaneval",
        meta={"test": text_field(row, "test"), "entry_point": text_field(row, "entry_point")},
    )
