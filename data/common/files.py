"""Rows of a problem set, from the hub or from a local file.

Knows the formats and no set; every fault names its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo.types import Problem, Unreachable, UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


class Row(NamedTuple):
    """One row and where it stands.

    `Row("train.jsonl: line 3", {"question": "2+2?", "answer": 4})`.
    """

    place: str
    fields: dict[str, Any]


class Hub(NamedTuple):
    """A data set of the hub: `Hub("openai/gsm8k", "main", "train")`."""

    id: str
    config: str | None
    split: str


def check_split(name: str, split: str) -> None:
    """Raises UserError for a split other than train and test."""
    if split not in ("train", "test"):
        raise UserError(f"data.{name}: no split {split!r}; have train, test")


def rows(path: str | None, *, stems: Sequence[str], hub: Hub | None) -> list[Row]:
    """All rows of a set.

    `path` is a file, a folder that holds one of `stems` as .jsonl, .json or .parquet, or None for
    the hub.
    """
    if path is None:
        assert hub is not None, "a set without a hub must ask for its path"
        return _from_hub(hub)
    file = Path(path).expanduser()
    if file.is_dir():
        wanted = [stem + suffix for stem in stems for suffix in SUFFIXES]
        found = next((file / name for name in wanted if (file / name).is_file()), None)
        if found is None:
            raise UserError(
                f"data.path: {path} has none of {', '.join(wanted)}; put one there or give a file"
            )
        file = found
    if not file.is_file():
        raise UserError(f"data.path: no such file or folder: {path}")
    if file.suffix not in SUFFIXES:
        raise UserError(f"data.path: {path} is no {', '.join(SUFFIXES)} file")
    read = _from_parquet(file) if file.suffix == ".parquet" else _from_json(file)
    if not read:
        raise UserError(f"{file}: no rows")
    return read


def text(row: Row, *names: str) -> str:
    """The first of the fields `names` that the row has, as text.

    Raises UserError when there is none or it is empty.
    """
    name = next((name for name in names if name in row.fields), None)
    if name is None:
        raise UserError(
            f"{row.place}: no field {' or '.join(map(repr, names))}; have {', '.join(row.fields)}"
        )
    value = row.fields[name]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{row.place}: field {name!r} is empty")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(
            f"{row.place}: field {name!r} is a {type(value).__name__}; give text or a number"
        )
    return str(value).strip()


def for_judging(name: str, split: str, read: Iterable[Row], part: str = "") -> list[Problem]:
    """The problems of a set that is for evaluation alone.

    Fields problem | question, answer | final_answer (of several, the first). `part` of the set: in
    the ids, which two parts must not share.

    Raises UserError for its train split: nothing may be learned from it.
    """
    check_split(name, split)
    if split == "train":
        raise UserError(f"data.{name}: a set to judge by (eval.data), not to learn from")
    problems = []
    for i, row in enumerate(read):
        given = row.fields.get("answer", row.fields.get("final_answer"))
        row = Row(
            row.place,
            row.fields | {"answer": given[0] if isinstance(given, list) and given else given},
        )
        solution = row.fields.get("solution")
        meta = {
            key: row.fields[key]
            for key in ("subject", "level", "unit", "tolerance", "year")
            if row.fields.get(key) is not None
        }
        problems.append(
            Problem(
                id=f"{name}/{part}{i}",
                question=text(row, "problem", "question"),
                answer=text(row, "answer"),
                source=name,
                solution=solution if isinstance(solution, str) else None,
                meta=meta,
            )
        )
    return unique(problems)


def unique(problems: Iterable[Problem]) -> list[Problem]:
    """The problems as a list.

    Raises UserError when two have one id: samples and seeds are keyed by it.
    """
    by_id: dict[str, Problem] = {}
    for problem in problems:
        if problem.id in by_id:
            raise UserError(
                f"data: id {problem.id!r} appears twice; make ids unique or leave them out"
            )
        by_id[problem.id] = problem
    return list(by_id.values())


def _from_json(file: Path) -> list[Row]:
    # Line by line and not through `datasets`: its reader turns date-like text into timestamps,
    # refuses columns of mixed types, fills every row with the other rows' fields, and names no
    # line.
    content = file.read_bytes()
    try:
        if file.suffix == ".json" and content.lstrip()[:1] == b"[":
            return [
                _row(f"{file}: row {number}", fields)
                for number, fields in enumerate(json.loads(content), start=1)
            ]
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    read = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                read.append(_row(f"{file}: line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise (
                    error
                    if isinstance(error, UserError)
                    else UserError(f"{file}: line {number}: {error}")
                ) from error
    return read


def _row(place: str, fields: object) -> Row:
    if not isinstance(fields, dict):
        raise UserError(f"{place}: got a {type(fields).__name__}, expected an object with fields")
    return Row(place, fields)


def _from_parquet(file: Path) -> list[Row]:
    datasets = _datasets()
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as cache:  # a cache of its own: never an older version of the file
        try:
            table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True, cache_dir=cache)
            return [
                Row(f"{file}: row {number}", fields) for number, fields in enumerate(table, start=1)
            ]
        except Exception as error:  # of many libraries; all mean that the file cannot be read
            raise UserError(
                f"{file}: not a readable parquet file: {_one_line(error.__cause__ or error)}"
            ) from error


def _from_hub(hub: Hub) -> list[Row]:
    datasets = _datasets()
    try:
        table = datasets.load_dataset(hub.id, hub.config, split=hub.split)
    # network, authorisation, cache: of many libraries, and all with one way out
    except Exception as error:
        raise Unreachable(
            f"{hub.id} could not be fetched from the hub: give data.path=FILE_OR_FOLDER "
            f"({_one_line(error)})"
        ) from error
    return [
        Row(f"{hub.id} {hub.split}: row {number}", dict(fields))
        for number, fields in enumerate(table, start=1)
    ]


def _datasets() -> Any:
    import logging

    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]
