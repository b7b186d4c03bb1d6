"""GSM8K: 7,473 train and 1,319 test word problems with an integer answer (arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data.common.files import Hub, check_split, rows, text, unique
from grpo.types import Problem, UserError


def load(split: str, *, seed: int, path: str | None = None) -> Sequence[Problem]:
    """The problems of a split, in file order.

    `path`: gsm8k_train.jsonl / gsm8k_test.jsonl or their folder; None: the hub.
    """
    check_split("gsm8k", split)
    problems = []
    for i, row in enumerate(
        rows(path, stems=[f"gsm8k_{split}"], hub=Hub("openai/gsm8k", "main", split))
    ):
        question, answer = text(row, "problem", "question"), text(row, "answer")
        solution = row.fields.get("solution")
        if "####" in answer:  # the hub's form: the worked solution, then `#### 42`
            solution, _, answer = answer.rpartition("####")
            solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
        answer = answer.strip().replace(",", "")
        if not answer:
            raise UserError(f"{row.place}: nothing after '####' in the field 'answer'")
        problems.append(
            Problem(
                id=f"gsm8k/{split}/{i}",
                question=question,
                answer=answer,
                source="gsm8k",
                solution=solution,
            )
        )
    return unique(problems)
