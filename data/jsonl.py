"""A user's JSONL, JSON or parquet file.

Fields: `problem`, `question` or `prompt`; `answer`; optionally `id`, `solution` and `source`. All
other fields become `Problem.meta`.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpo.data.common.files import (
    Row,
    check_split,
    check_unique_ids,
    find_field,
    read_rows,
    text_field,
)
from grpo.data.common.mixture import stable_hash
from grpo.types import Problem, UserError

QUESTION_FIELDS = ("problem", "question", "prompt")
OTHER_FIELDS = ("answer", "id", "solution", "source")


# The keyword parameters are the options of the data set in a config.
def load(  # noqa: PLR0913
    split: str,
    *,
    seed: int,
    path: str | None = None,
    test_path: str | None = None,
    test_fraction: float = 0.1,
    answers: bool = True,
    malformed: list[str] | None = None,
) -> Sequence[Problem]:
    """Returns the problems of a split, in file order.

    With `test_path`, `path` is the train split and `test_path` is the test split. Otherwise a
    question of `path` is in the test split if its hash falls into `test_fraction`. The hash depends
    only on the question, so no question is in both splits.

    Args:
        split: `train` or `test`.
        seed: Unused.
        path: The file, or a folder with a file train.jsonl (or .json, .parquet).
        test_path: File of the test split, or a folder with a file test.jsonl (or .json, .parquet).
        test_fraction: Share of the questions of `path` in the test split, in [0, 1). Unused with
            `test_path`.
        answers: False: the rows are prompts without gold answers, for rewards that need none, such
            as `preference`. All of them are in the train split.
        malformed: A list that receives the reason for each row that cannot be read, which is then
            skipped. None: such a row is an error.

    Raises:
        UserError: An option is invalid, a row is incomplete, or the split has no problems.
    """
    check_split("jsonl", split)
    if path is None:
        raise UserError("data.path: missing. Set it to a .jsonl, .json or .parquet file.")
    if not 0 <= test_fraction < 1:
        raise UserError(
            f"data.jsonl.test_fraction: got {test_fraction}, expected a share in [0, 1)"
        )
    if test_path is not None and not answers:
        raise UserError(
            "data.jsonl: test_path cannot be used with answers=false, because problems without a "
            "gold answer cannot be evaluated"
        )
    if test_path is None:
        rows = read_rows(path, stems=["train"], hub=None, malformed=malformed)
    else:
        split_path = test_path if split == "test" else path
        rows = read_rows(split_path, stems=[split], hub=None, malformed=malformed)
    problems = []
    for index, row in enumerate(rows):
        try:
            problem = _problem(row, f"jsonl/{split}/{index}", has_answer=answers)
        except UserError as error:
            if malformed is None:
                raise
            malformed.append(str(error))
            continue
        is_held_out = answers and stable_hash(problem.question) < test_fraction * 2**64
        hash_split = "test" if is_held_out else "train"
        if test_path is not None or hash_split == split:
            problems.append(problem)
    if not problems:
        raise UserError(
            f"data.jsonl: {path} has no {split} problems. Set test_path, or use a larger file."
        )
    check_unique_ids(problems)
    return problems


def _problem(row: Row, default_id: str, *, has_answer: bool) -> Problem:
    question_field = find_field(row, QUESTION_FIELDS)
    meta = {
        field: value
        for field, value in row.fields.items()
        if field != question_field and field not in OTHER_FIELDS
    }
    has_id = row.fields.get("id") is not None
    solution = row.fields.get("solution")
    if solution is not None and not isinstance(solution, str):
        raise UserError(
            f"{row.location}: field 'solution' is a {type(solution).__name__}, expected text"
        )
    return Problem(
        id=text_field(row, "id") if has_id else default_id,
        question=text_field(row, question_field),
        answer=text_field(row, "answer") if has_answer else "",
        source=str(row.fields.get("source") or "jsonl"),
        solution=solution,
        meta=meta,
    )
