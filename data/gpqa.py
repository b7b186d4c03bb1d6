"""GPQA: multiple-choice questions in biology, physics and chemistry, for the reward `choice`.

Evaluation only. Source: Rein et al. 2311.12022. The data set is gated on the hub.
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
from grpo.data.common.mixture import stable_hash
from grpo.types import Problem, UserError

SUBSETS = ("diamond", "main", "extended")  # 198, 448 and 546 questions
CORRECT_FIELD = "Correct Answer"
OPTION_FIELDS = (
    CORRECT_FIELD,
    "Incorrect Answer 1",
    "Incorrect Answer 2",
    "Incorrect Answer 3",
)
LETTERS = "ABCD"


def load(
    split: str, *, seed: int, path: str | None = None, subset: str = "diamond"
) -> Sequence[Problem]:
    """Returns the problems of a subset, in file order.

    The question ends with the options (A) to (D). Their order is a function of the question and the
    options only, so it is the same in every run, and the correct letter is evenly distributed.

    Args:
        split: Must be `test`.
        seed: Unused.
        path: gpqa_diamond.csv (or .jsonl, .json, .parquet), or its folder. None: the hub.
        subset: `diamond`, `main` or `extended`.

    Raises:
        UserError: The subset is unknown, `split` is `train`, or a row is incomplete.
    """
    check_evaluation_split("gpqa", split)
    if subset not in SUBSETS:
        raise UserError(
            f"data.gpqa.subset: unknown subset {subset!r}. Available: {', '.join(SUBSETS)}."
        )
    name = f"gpqa_{subset}"
    hub = HubDataset("Idavidrein/gpqa", name, "train", is_gated=True)
    rows = read_rows(path, stems=[name], hub=hub)
    problems = [_problem(row, f"gpqa/{subset}/{index}") for index, row in enumerate(rows)]
    check_unique_ids(problems)
    return problems


def _problem(row: Row, problem_id: str) -> Problem:
    question = text_field(row, "Question")
    option_by_field = {field: text_field(row, field) for field in OPTION_FIELDS}
    fields = sorted(
        OPTION_FIELDS, key=lambda field: stable_hash(f"{question}\n{option_by_field[field]}")
    )
    options = [option_by_field[field] for field in fields]
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
    meta = {"choices": options}
    subject = row.fields.get("High-level domain")
    if subject:
        meta["subject"] = subject
    return Problem(
        id=problem_id,
        question=f"{question}\n\n" + "\n".join(lines),
        answer=LETTERS[fields.index(CORRECT_FIELD)],
        source="gpqa",
        meta=meta,
    )
