"""Reads the rows of a problem set from a local file or from the Hugging Face hub.

This module handles file formats (JSONL, JSON, parquet, CSV). It contains nothing that is specific
to one problem set. Error messages name the file and the line or row.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo import json_lines
from grpo.types import DownloadError, Problem, UserError, first_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_CSV_CELL = 2**31 - 1  # characters
# Fields of an evaluation set that are copied to `Problem.meta`.
EVALUATION_META_FIELDS = ("subject", "level", "unit", "tolerance", "year")


class Row(NamedTuple):
    """One row of a data set, with its location for error messages.

    Example: `Row("train.jsonl: line 3", {"question": "2+2?", "answer": 4})`.
    """

    location: str
    fields: dict[str, Any]


class HubDataset(NamedTuple):
    """One split of a data set on the hub, such as `HubDataset("openai/gsm8k", "main", "train")`."""

    id: str
    config: str | None
    split: str
    is_gated: bool = False  # its terms must be accepted on its page of the hub


def check_split(name: str, split: str) -> None:
    """Raises UserError if `split` is neither `train` nor `test`."""
    if split not in ("train", "test"):
        raise UserError(f"data.{name}: unknown split {split!r}. Available: train, test.")


def check_evaluation_split(name: str, split: str) -> None:
    """Raises UserError if `split` is not `test`, for a set that is used for evaluation only."""
    check_split(name, split)
    if split == "train":
        raise UserError(
            f"data.{name}: this set is for evaluation only and has no train split. Use it in "
            "eval.data."
        )


def read_rows(
    path: str | None,
    *,
    stems: Sequence[str],
    hub: HubDataset | None,
    malformed: list[str] | None = None,
) -> list[Row]:
    """Returns all rows of a data set, in file order.

    Args:
        path: A file, or a folder that contains a file named after one of `stems`. None: read `hub`.
        stems: File names without suffix, in order of preference. Suffixes: .jsonl, .json, .parquet,
            .csv.
        hub: The data set on the hub. Required if `path` is None.
        malformed: A list that receives the reason for each row that is no object of text, which is
            then skipped. None: such a row is an error.

    Raises:
        UserError: There is no such file, or it is malformed, empty or in an unsupported format.
        DownloadError: The data set cannot be fetched from the hub.
    """
    if path is None:
        assert hub is not None, "a problem set without a hub data set must require a path"
        return _read_hub(hub)
    file = Path(path).expanduser()
    if file.is_dir():
        file = _find_file(file, stems)
    if not file.is_file():
        raise UserError(f"data.path: no such file or folder: {path}")
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"data.path: {path} has an unsupported format. Supported: {', '.join(SUFFIXES)}."
        )
    if file.suffix == ".parquet":
        rows = _read_parquet(file)
    elif file.suffix == ".csv":
        rows = list(csv_rows(file, malformed))
    else:
        rows = list(json_rows(file, malformed))
    if not rows:
        raise UserError(f"{file}: no rows")
    return rows


def _find_file(folder: Path, stems: Sequence[str]) -> Path:
    names = []
    for stem in stems:
        names += [stem + suffix for suffix in SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"data.path: {folder} has none of {', '.join(names)}. Add one of them, or set data.path to "
        "a file."
    )


def find_field(row: Row, names: Sequence[str]) -> str:
    """Returns the first of `names` that is a field of the row. Raises UserError if none is."""
    for name in names:
        if name in row.fields:
            return name
    expected = " or ".join(repr(name) for name in names)
    raise UserError(
        f"{row.location}: no field {expected}. The row has the fields {', '.join(row.fields)}."
    )


def text_field(row: Row, *names: str) -> str:
    """Returns the value of the row's first field out of `names`, as text without outer white space.

    Raises:
        UserError: The row has none of the fields, or the value is empty or neither text nor a
            number.
    """
    name = find_field(row, names)
    value = row.fields[name]
    is_blank = isinstance(value, str) and not value.strip()
    is_nan = isinstance(value, float) and not math.isfinite(value)  # how pandas writes a gap
    if value is None or is_blank or is_nan:
        raise UserError(f"{row.location}: field {name!r} is empty")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(
            f"{row.location}: field {name!r} is a {type(value).__name__}, expected text or a number"
        )
    return str(value).strip()


def evaluation_problems(
    name: str, split: str, rows: Iterable[Row], id_prefix: str = ""
) -> list[Problem]:
    """Returns the problems of a set that is used for evaluation only.

    Args:
        name: Name of the problem set.
        split: Must be `test`.
        rows: Rows with the fields `problem` or `question`, and `answer` or `final_answer`. If the
            answer is a list, its first element is the gold answer.
        id_prefix: Prefix of the row number in problem ids. It distinguishes the parts of a set,
            such as `2024/`.

    Raises:
        UserError: `split` is `train`, or a row is incomplete.
    """
    check_evaluation_split(name, split)
    problems = []
    for index, row in enumerate(rows):
        question = text_field(row, "problem", "question")
        solution = row.fields.get("solution")
        meta = {}
        for field in EVALUATION_META_FIELDS:
            if row.fields.get(field) is not None:
                meta[field] = row.fields[field]
        problem = Problem(
            id=f"{name}/{id_prefix}{index}",
            question=question,
            answer=_gold_answer(row),
            source=name,
            solution=solution if isinstance(solution, str) else None,
            meta=meta,
        )
        problems.append(problem)
    check_unique_ids(problems)
    return problems


def _gold_answer(row: Row) -> str:
    answer = row.fields.get("answer", row.fields.get("final_answer"))
    if isinstance(answer, list) and answer:
        answer = answer[0]
    return text_field(Row(row.location, {"answer": answer}), "answer")


def check_unique_ids(problems: Iterable[Problem]) -> None:
    """Raises UserError if two problems have the same id: samples and seeds are keyed by it."""
    ids: set[str] = set()
    for problem in problems:
        if problem.id in ids:
            raise UserError(
                f"data: id {problem.id!r} appears twice. Make the ids unique, or remove the field "
                "'id'."
            )
        ids.add(problem.id)


# JSON is not read through `datasets`: it turns date-like text into timestamps, rejects columns of
# mixed types, adds the fields of all rows to each row, and its errors do not name a line.
def json_rows(
    file: Path, malformed: list[str] | None = None, *, allow_lists: bool = False
) -> Iterator[Row]:
    """Yields the rows of a JSONL file, or of a JSON file with one list of all rows.

    Args:
        file: The file.
        malformed: As for `read_rows`.
        allow_lists: Whether a row may be a list. Its fields are then named "0", "1", ..., as
            `datasets` names them.

    Raises:
        UserError: The file is not JSON, or a row is no object of text.
    """
    values: Iterable[tuple[int, Any]]
    elements = _list_in_json(file) if file.suffix == ".json" else None
    if elements is not None:
        unit = "row"
        values = enumerate(elements, start=1)
    else:
        unit = "line"
        values = json_lines.read(file)
    for number, value in values:
        fields = value
        if allow_lists and isinstance(value, list):
            fields = {str(index): element for index, element in enumerate(value)}
        try:
            yield _row(f"{file}: {unit} {number}", fields)
        except UserError as error:
            if malformed is None:
                raise
            malformed.append(str(error))


def _list_in_json(file: Path) -> list[Any] | None:
    """Returns the list of all rows in a JSON file, None if its lines are the rows."""
    try:
        text = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        if not text.lstrip().startswith(b"["):
            return None
        elements: list[Any] = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: not a readable JSON file: {one_line(error)}") from error
    return elements


# CSV is not read through `datasets`: it guesses types, so that the answer 1.50 becomes 1.5, and 42
# in a column with an empty cell becomes 42.0.
def csv_rows(file: Path, malformed: list[str] | None = None) -> Iterator[Row]:
    """Yields the rows below the header of a CSV file. All values are text; an empty cell is None.

    Args:
        file: The file.
        malformed: As for `read_rows`, for rows with another number of cells than the header.

    Raises:
        UserError: The file is not CSV, or two of its columns have the same name.
    """
    csv.field_size_limit(MAX_CSV_CELL)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise UserError(f"{file}: two columns have the same name: {', '.join(names)}")
            for number, cells in enumerate(reader, start=1):
                if len(cells) == len(names):
                    fields = {name: cell or None for name, cell in zip(names, cells, strict=True)}
                    yield Row(f"{file}: row {number}", fields)
                elif cells:  # not a blank line
                    reason = (
                        f"{file}: row {number}: {len(cells)} cells, expected {len(names)}: "
                        f"{', '.join(names)}"
                    )
                    if malformed is None:
                        raise UserError(reason)
                    malformed.append(reason)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: not a readable CSV file: {one_line(error)}") from error


def _row(location: str, fields: object) -> Row:
    if not isinstance(fields, dict):
        raise UserError(
            f"{location}: got a {type(fields).__name__}, expected an object with fields"
        )
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{location}: the values are nested too deeply") from None
    except UnicodeEncodeError as error:
        code_point = f"U+{ord(error.object[error.start]):X}"
        raise UserError(
            f"{location}: contains the lone surrogate {code_point}, which no tokenizer accepts. "
            "Remove it."
        ) from None
    return Row(location, fields)


def _read_parquet(file: Path) -> list[Row]:
    from tempfile import TemporaryDirectory

    datasets = import_datasets()
    # The default cache directory could return an older version of the file.
    with TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True, cache_dir=cache)
            return [
                Row(f"{file}: row {number}", fields) for number, fields in enumerate(table, start=1)
            ]
        # Several libraries raise here, each with its own exceptions.
        except Exception as error:
            cause = error.__cause__ or error
            raise UserError(f"{file}: not a readable parquet file: {one_line(cause)}") from error


def _read_hub(hub: HubDataset) -> list[Row]:
    datasets = import_datasets()
    try:
        table = datasets.load_dataset(hub.id, hub.config, split=hub.split)
    # Network, authorization and cache errors of several libraries. The way out is the same.
    except Exception as error:
        access = ""
        if hub.is_gated:
            access = "It is gated: accept its terms on its page, and log in with `hf auth login`. "
        raise DownloadError(
            f"{hub.id} cannot be fetched from the hub. {access}Set data.path to a local file or "
            f"folder; in `sets`, each set has its own path. ({one_line(error)})"
        ) from error
    return [
        Row(f"{hub.id} {hub.split}: row {number}", dict(fields))
        for number, fields in enumerate(table, start=1)
    ]


def import_datasets() -> Any:
    """Imports `datasets` and turns off its progress bars and messages."""
    import logging

    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def one_line(error: BaseException) -> str:
    """Returns the type and the first line of an error, in at most 200 characters."""
    return f"{type(error).__name__}: {first_line(error)}".strip()[:200]
