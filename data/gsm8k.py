"""GSM8K: 7,473 train and 1,319 test word problems with an integer answer (arXiv 2110.14168)."""

from __future__ import annotations

import re
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

CALCULATION = re.compile(r"<<[^<>]*>>")  # `<<2*600=1200>>`, an annotation for a calculator


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """Returns the problems of a split, in file order.

    Args:
        split: `train` or `test`.
        seed: Unused.
        path: gsm8k_train.jsonl or gsm8k_test.jsonl, or its folder. None: the hub.

    Raises:
        UserError: A row is incomplete.
    """
    check_split("gsm8k", split)
    hub = HubDataset("openai/gsm8k", "main", split)
    rows = read_rows(path, stems=[f"gsm8k_{split}"], hub=hub)
    problems = [_problem(row, f"gsm8k/{split}/{index}") for index, row in enumerate(rows)]
    check_unique_ids(problems)
    return problems


def _problem(row: Row, problem_id: str) -> Problem:
    question = text_field(row, "problem", "question")
    answer = text_field(row, "answer")
    solution = row.fields.get("solution")
    # On the hub the field `answer` is the worked solution followed by `#### 42`.
    if "####" in answer:
        solution, _, answer = answer.rpartition("####")
        solution = CALCULATION.sub("", solution).strip()
    answer = answer.strip().replace(",", "")
    if not answer:
        raise UserError(f"{row.location}: nothing after '####' in the field 'answer'")
    return Problem(
        id=problem_id, question=question, answer=answer, source="gsm8k", solution=solution
    )
