"""A set on the Hugging Face hub, or its local copy, in any format that has a question per row.

`columns` names the columns of the question, the answer and so on. The sets in
common/published_sets.py need nothing but their id.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from grpo.data.common.columns import has_column, json_value, value_at
from grpo.data.common.files import SUFFIXES, Row, check_split, text_field
from grpo.data.common.mixture import stable_hash
from grpo.data.common.procedural import check_range
from grpo.data.common.published_sets import NO_ANSWERS, PublishedSet, find_published_set
from grpo.data.common.tables import FILE_SPLIT, StoredSet, is_file, table_rows
from grpo.data.traces import (
    ASSISTANT_ROLES,
    USER_ROLES,
    message_of,
    thoughts_of,
    with_think_tags,
)
from grpo.types import Problem, UserError

# Columns that are tried for a field without an entry in `columns`, in order of preference.
# `reward_model.ground_truth` is verl's.
USUAL_COLUMNS = {
    "question": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "reward_model.ground_truth"),
    "solution": ("solution",),
    "id": ("id",),
    "source": ("source",),
}
DEFAULT_TEST_FRACTION = 0.1
OTHER_SET = PublishedSet(source="", license=None, columns={})
logger = logging.getLogger(__name__)


# The keyword parameters are keys of the section `data`, or options of the data set in a config.
def load(  # noqa: PLR0913
    split: str,
    *,
    seed: int,
    path: str | None = None,
    stored_split: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    subset: str | None = None,
    revision: str | None = None,
    test_split: str | None = None,
    test_fraction: float | None = None,
    max_rows: int | None = None,
    answers: bool | None = None,
    keep_instruction: bool = False,
    malformed: list[str] | None = None,
) -> Sequence[Problem]:
    """Returns the problems of a split, in the order in which they are stored.

    Without `test_split`, a question is in the test split if its hash falls into `test_fraction`.
    The hash depends only on the question, so no question is in both splits.

    Rows that repeat the question and the solution of an earlier row are skipped, and the rows that
    an entry of the published sets excludes. A log message counts them.

    Args:
        split: `train` or `test`.
        seed: Unused.
        path: OWNER/NAME on the hub, or a local path: a .jsonl, .json, .parquet or .csv file, a
            folder of such files, or a folder written by `save_to_disk`. What exists locally is
            read.
        stored_split: `data.split`, the set's own split that is read. None: that of the published
            set, or train. A single file is the split train.
        columns: `data.columns`, the columns of the fields question, answer, solution, id and
            source. A dotted path leads into nested values: `reward_model.ground_truth`,
            `prompt.0.content`. A list of messages stands for its only message of the user or, as a
            solution, of the assistant. None as a value: no column. Fields that are not named have
            the column of the published set, or the usual one. All other columns become
            `Problem.meta`.
        subset: The set's configuration, such as `main`. None: that of the published set, or the
            only one.
        revision: Branch, tag or commit on the hub.
        test_split: The set's own split that is the test split. Then all of `stored_split` is
            the train split.
        test_fraction: Share of the questions in the test split, from 0 to 1. None: 0.1, and 1 if
            `stored_split` is `test`. Unused with `test_split`.
        max_rows: Only the first rows of a split are read. From the hub they are then streamed,
            and the set is not downloaded. None: all rows; a set of the hub is downloaded and
            cached by `datasets`.
        answers: False: the rows have no gold answers, for supervised training, or rewards that
            need none. All of them are in the train split. None: that of the published set if
            `columns` names no answer, or true.
        keep_instruction: Keep the text around each question that the published set removes.
        malformed: A list that receives the reason for each row that cannot be read, which is then
            skipped. None: such a row is an error.

    Raises:
        UserError: An option is invalid, the set cannot be read, a column does not exist, a row is
            incomplete, or the split has no problems.
        DownloadError: The hub cannot be reached.
    """
    check_split("hub", split)
    if not path:
        raise UserError("data.path: missing. Set it to OWNER/NAME on the hub, or to a local path.")
    if max_rows is not None:
        check_range("hub.max_rows", max_rows, 1, 10**12)
    _check_types("true or false", bool, answers=answers, keep_instruction=keep_instruction)
    _check_types("text", str, subset=subset, revision=revision, test_split=test_split)
    published = find_published_set(path)
    settings = published or OTHER_SET
    columns = columns or {}
    has_answer = _has_answer(settings, columns, answers)
    if stored_split is None:
        stored_split = FILE_SPLIT if is_file(path) else settings.split
    splits = _Splits(stored_split, test_split, test_fraction, has_answer)
    splits.check()
    source_split = splits.source_of(split)
    stored = StoredSet(
        path,
        subset=subset,
        usual_subset=settings.subset,
        revision=revision,
        max_rows=max_rows,
        ignored=settings.ignored,
    )
    reader = _ProblemReader(
        name=_name_of(path),
        part=f"{subset}/{source_split}" if subset else source_split,
        columns=dict(columns),
        published=published,
        has_answer=has_answer,
        keep_instruction=keep_instruction,
    )
    collection = _Collection(problems=[], answers={}, ids=set(), skipped=Counter())
    num_read = 0
    for index, row in enumerate(table_rows(stored, source_split, malformed)):
        problem = _read_row(reader, row, index, collection.skipped, malformed)
        if problem is None:
            continue
        num_read += 1
        if splits.contains(problem.question, split):
            collection.add(problem)
    if collection.skipped:
        counts = [f"{count:,} ({why})" for why, count in sorted(collection.skipped.items())]
        logger.warning("%s %s: skipped rows: %s", path, source_split, ", ".join(counts))
    if not collection.problems:
        way_out = splits.way_out(split) if num_read > 0 else _why_empty(source_split, malformed)
        raise UserError(f"data.hub: {path} has no {split} problems. {way_out}")
    return collection.problems


def _why_empty(source_split: str, malformed: list[str] | None) -> str:
    """Returns why no row of a split is a problem."""
    if malformed:
        return f"{len(malformed):,} rows were dropped: {malformed[0]}"
    return f"Its split {source_split} has no row with a problem."


def _has_answer(
    settings: PublishedSet, columns: Mapping[str, str | None], answers: bool | None
) -> bool:
    """Returns whether the rows have gold answers.

    Args:
        settings: The entry of the published sets, or `OTHER_SET`.
        columns: The user's columns by field.
        answers: The user's option, None without it.

    Raises:
        UserError: The columns and the option contradict each other.
    """
    column = columns.get("answer")
    if column is None:
        return settings.has_answer if answers is None else answers
    if column == columns.get("question"):
        raise UserError(
            f"data.columns: the question and the answer have the same column {column!r}"
        )
    if answers is False:
        raise UserError(
            f"data.hub.answers: false contradicts data.columns.answer={column}: remove one of them"
        )
    return True


def _check_types(expected: str, kind: type, **options: object) -> None:
    """Raises UserError if one of the options is neither None nor of a type."""
    for name, value in options.items():
        if value is not None and not isinstance(value, kind):
            raise UserError(f"data.hub.{name}: got {value!r}, expected {expected}")


def _read_row(
    reader: _ProblemReader,
    row: Row,
    index: int,
    skipped: Counter[str],
    malformed: list[str] | None,
) -> Problem | None:
    """Returns the problem of a row, None if the row is skipped or malformed.

    Args:
        reader: Makes the problem.
        row: The row.
        index: Position of the row.
        skipped: Number of rows by reason; a skipped row is counted.
        malformed: As for `load`.
    """
    try:
        reason = reader.skip_reason(row)
        if not reason:
            return reader.read(row, index)
    except UserError as error:
        if malformed is None:
            raise
        malformed.append(str(error))
        return None
    skipped[reason] += 1
    return None


def _name_of(path: str) -> str:
    """Returns the name of a set: `NuminaMath-1.5` for `AI-MO/NuminaMath-1.5`."""
    name = PurePath(path).name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


class _Splits(NamedTuple):
    """How the splits of a set become `train` and `test`. The attributes are those of `load`."""

    stored_split: str
    test_split: str | None
    test_fraction: float | None
    has_answer: bool

    def check(self) -> None:
        share = self.test_fraction
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 <= share <= 1):
            raise UserError(f"data.hub.test_fraction: got {share!r}, expected a share from 0 to 1")
        if not self.has_answer and (self.test_split or self.test_fraction):
            raise UserError(
                "data.hub.options: test_split and test_fraction need gold answers, because "
                "evaluations compare with them. Name the column of the answer, or remove them."
            )
        if self.test_split == self.stored_split:
            raise UserError(
                f"data.hub.test_split: {self.test_split} is also the split of the training, so "
                "evaluations would have its problems. Set another one, or test_fraction."
            )

    def source_of(self, split: str) -> str:
        """Returns the set's own split that contains the problems of `train` or `test`."""
        if split == "test" and self.test_split is not None:
            return self.test_split
        return self.stored_split

    def contains(self, question: str, split: str) -> bool:
        """Returns whether a question of `source_of(split)` belongs to `train` or `test`."""
        if self.test_split is not None:
            return True
        is_held_out = stable_hash(question) < self._held_out_share() * 2**64
        return is_held_out == (split == "test")

    def way_out(self, split: str) -> str:
        """Returns what to set if `train` or `test` has no problems."""
        if not self.has_answer:
            return "It has no gold answers, so all its problems are in train. Set eval.data."
        if self.test_split is not None:
            return f"Its split {self.source_of(split)} has none."
        if split == "train" and self._held_out_share() == 1:
            return "All are held out for evaluation. Set another data.split, or test_fraction."
        return "Set data.options.test_split or test_fraction, or use a larger set."

    def _held_out_share(self) -> float:
        if not self.has_answer:
            return 0.0
        if self.test_fraction is not None:
            return self.test_fraction
        return 1.0 if self.stored_split == "test" else DEFAULT_TEST_FRACTION


@dataclass(frozen=True, kw_only=True)
class _Collection:
    """The problems so far, and what tells repeated rows and ids."""

    problems: list[Problem]
    answers: dict[int, str]  # by the hash of the question and the solution
    ids: set[str]
    skipped: Counter[str]  # number of rows by reason

    def add(self, problem: Problem) -> None:
        """Adds a problem, unless it repeats an earlier one. Raises UserError if its id does."""
        content = stable_hash(f"{problem.question}\0{problem.solution}")
        if content in self.answers:
            is_equal = self.answers[content] == problem.answer
            self.skipped["repeated" if is_equal else "repeated with another answer"] += 1
            return
        if problem.id in self.ids:
            raise UserError(
                f"data.columns.id: the id {problem.id!r} appears twice. Set columns: {{id: null}} "
                "to number the rows."
            )
        self.answers[content] = problem.answer
        self.ids.add(problem.id)
        self.problems.append(problem)


@dataclass(frozen=True, kw_only=True)
class _ProblemReader:
    """Makes problems from the rows of a set.

    Attributes:
        name: name of the set, the default of `Problem.source`.
        part: subset and split, for ids such as `OpenR1-Math-220k/train/7`.
        columns: the user's columns by field.
        published: the entry of the published sets, None without one.
        has_answer: whether the problems have a gold answer.
        keep_instruction: whether to keep the published set's instruction.
    """

    name: str
    part: str
    columns: dict[str, str | None]
    published: PublishedSet | None
    has_answer: bool
    keep_instruction: bool

    def skip_reason(self, row: Row) -> str:
        """Returns why a row of a published set is skipped, "" if it is not."""
        if self.published is None:
            return ""
        for name, value in self.published.required.items():
            if row.fields.get(name, value) != value:
                return f"{name} is not {value}"
        for name, value in self.published.excluded.items():
            if row.fields.get(name) == value:
                return f"{name} is {value}"
        if not self.has_answer:
            return ""
        answer = self._answer_value(row)
        has_text = answer is not None and str(answer).strip().lower() not in NO_ANSWERS
        return "" if has_text else "no answer"

    def read(self, row: Row, index: int) -> Problem:
        """Returns the problem of a row.

        Args:
            row: The row.
            index: Position of the row in the split, for its default id.

        Raises:
            UserError: A column does not exist, or its value is empty or no text.
        """
        question = self._question(row)
        answer = self._text(row, "answer", self._answer_value(row)) if self.has_answer else ""
        row_id = self._value(row, "id")
        if row_id is None:
            row_id = f"{self.part}/{index}"
        return Problem(
            id=f"{self.name}/{row_id}",
            question=question,
            answer=answer,
            source=str(self._value(row, "source") or self.name),
            solution=self._solution(row),
            meta=self._meta(row),
        )

    def _question(self, row: Row) -> str:
        value = self._value(row, "question")
        if _is_conversation(value):
            value = message_of(row, value, USER_ROLES)
        question = self._text(row, "question", value)
        if self.published is not None and not self.keep_instruction:
            prefix, suffix = self.published.instruction
            question = question.removeprefix(prefix).removesuffix(suffix).strip()
        return question

    def _answer_value(self, row: Row) -> Any:
        """Returns the answer without the lists around it: `"42"` for `["42"]`."""
        value = self._value(row, "answer")
        if self.published is not None and self.published.json_answer and isinstance(value, str):
            value = _first_of_json_list(row, value)
        if isinstance(value, list) and len(value) == 1:
            return value[0]
        return value

    def _solution(self, row: Row) -> str | None:
        value = self._value(row, "solution")
        if _is_conversation(value):
            solution = message_of(row, value, ASSISTANT_ROLES)
            return with_think_tags(solution, thoughts_of(value)).strip()
        column = self._column(row, "solution")
        if column is not None and column == self._column(row, "question"):
            raise UserError(
                f"data.columns: the question and the solution have the same column {column!r}"
            )
        if value is None or value == "":
            return None
        return self._text(row, "solution", value)

    def _text(self, row: Row, field: str, value: Any) -> str:
        """Returns a value as text.

        Raises:
            UserError: The field has no column, or the value is empty or neither text nor a number.
        """
        column = self._column(row, field)
        if column is None:
            raise UserError(f"{row.location}: {self._no_column(row, field)}")
        return text_field(Row(row.location, {column: value}), column)

    def _no_column(self, row: Row, field: str) -> str:
        usual = " or ".join(repr(name) for name in USUAL_COLUMNS[field])
        message = (
            f"no column {usual}. The row has the columns {', '.join(row.fields)}. Name those of "
            "the question, the answer and, if there is one, the solution: "
            f"data.columns.{field}=COLUMN"
        )
        if field == "answer":
            message += ", or set data.options={answers: false} if there are no gold answers"
        return message

    def _value(self, row: Row, field: str) -> Any:
        """Returns the value of a field's column, None if the field has no column."""
        column = self._column(row, field)
        return None if column is None else value_at(row, field, column)

    def _column(self, row: Row, field: str) -> str | None:
        if field in self.columns:
            return self.columns[field]
        if self.published is not None:
            return self.published.columns.get(field)
        for column in USUAL_COLUMNS[field]:
            if has_column(row, column) and column not in self.columns.values():
                return column
        return None

    def _meta(self, row: Row) -> dict[str, Any]:
        """Returns the columns that are no field of the problem, as JSON values.

        A nested column that contains the question, the answer or the solution is left out.
        """
        used = set()
        for field in USUAL_COLUMNS:
            column = self._column(row, field)
            if column is None:
                continue
            used.add(column)
            if field in ("question", "answer", "solution"):
                used.add(column.partition(".")[0])
        ignored = self.published.ignored if self.published is not None else ()
        return {
            name: json_value(value)
            for name, value in row.fields.items()
            if name not in used and name not in ignored
        }


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict)


def _first_of_json_list(row: Row, text: str) -> Any:
    try:
        answers = json.loads(text)
    except ValueError:
        answers = None
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{row.location}: the answer {text[:60]!r} is no JSON list of answers")
    return answers[0]
