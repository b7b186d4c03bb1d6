"""A user's own JSONL, JSON or parquet file.

Fields problem | question | prompt, answer, and optionally id, solution, source.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.common.files import check_split, rows, text, unique
from data.common.mixture import stable_hash
from grpo.types import Problem, UserError

QUESTION = ("problem", "question", "prompt")


def load(
    split: str,
    *,
    seed: int,
    path: str | None = None,
    test_path: str | None = None,
    test_fraction: float = 0.1,
    answers: bool = True,
) -> Sequence[Problem]:
    """The problems of a split.

    Test is `test_path`, or without it the questions whose hash falls into `test_fraction` of
    `path`.

    `answers=False`: general prompts without gold answers, for rewards that need none (preference);
    then nothing is held out. The hash reads the question alone, so no question is in both splits.
    Fields beyond those named above go into `meta`.
    """
    check_split("jsonl", split)
    if path is None:
        raise UserError("data.path: none given; give a .jsonl, .json or .parquet file")
    if not 0 <= test_fraction < 1:
        raise UserError(f"data.jsonl.test_fraction: got {test_fraction}; give a share in [0, 1)")
    own_test = test_path is not None
    file = test_path if own_test and split == "test" else path
    stems = [split] if own_test else ["train"]
    problems = []
    if not answers and own_test:
        raise UserError(
            "data.jsonl.answers: false: prompts without answers have no test set to judge by"
        )
    for i, row in enumerate(rows(file, stems=stems, hub=None)):
        question = text(row, *QUESTION)
        held_out = answers and stable_hash(question) < test_fraction * 2**64
        if own_test or held_out == (split == "test"):
            name = next(name for name in QUESTION if name in row.fields)
            meta = {
                key: value
                for key, value in row.fields.items()
                if key not in (name, "answer", "id", "solution", "source")
            }
            own_id = text(row, "id") if row.fields.get("id") is not None else f"jsonl/{split}/{i}"
            source, solution = str(row.fields.get("source") or "jsonl"), row.fields.get("solution")
            answer = text(row, "answer") if answers else ""
            problems.append(
                Problem(
                    id=own_id,
                    question=question,
                    answer=answer,
                    source=source,
                    solution=solution,
                    meta=meta,
                )
            )
    if not problems:
        raise UserError(
            f"data.jsonl: {path} gives no {split} problems; give test_path or a larger file"
        )
    return unique(problems)
