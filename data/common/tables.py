"""Reads the rows of one split of a stored set, one by one.

A set is a local file, a local folder, or a set on the Hugging Face hub. This module knows layouts
and file formats. It contains nothing about problems.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from grpo.data.common.files import SUFFIXES, Row, csv_rows, import_datasets, json_rows, one_line
from grpo.data.common.published_sets import PUBLISHED_SETS
from grpo.types import DownloadError, UserError

# Files that `datasets.Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
# Types of columns that have no text. They are not read: decoding them needs further packages.
MEDIA_FEATURES = ("Image", "Audio", "Video", "Pdf")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILE_SPLIT = "train"  # the split of a single file
logger = logging.getLogger(__name__)


class StoredSet(NamedTuple):
    """Where a set is stored, and which part of it is read.

    Example: `StoredSet("openai/gsm8k", subset="main")`.

    Attributes:
        path: a local file or folder, or the id of a set on the hub. What exists locally is read.
        subset: the set's configuration; None for the default.
        usual_subset: the configuration that is the default if the set has it; None for that of
            the set itself.
        revision: branch, tag or commit on the hub; None for the latest.
        max_rows: only the first rows of the split are read; from the hub, they are streamed. None:
            all rows.
        ignored: columns that are not read.
    """

    path: str
    subset: str | None = None
    usual_subset: str | None = None
    revision: str | None = None
    max_rows: int | None = None
    ignored: tuple[str, ...] = ()


def near(name: str, candidates: Iterable[str]) -> str:
    """Returns a hint for an error message, such as " (did you mean answer?)", or ""."""
    matches = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def is_file(path: str) -> bool:
    """Returns whether a path is that of a file. Raises UserError if it cannot be read."""
    try:
        return Path(path).expanduser().is_file()
    except OSError as error:  # a name that is too long, a folder without permission
        raise UserError(f"data.path: {path[:200]} cannot be read: {one_line(error)}") from None


def table_rows(stored: StoredSet, split: str, malformed: list[str] | None = None) -> Iterator[Row]:
    """Yields the rows of one split, in the order in which they are stored.

    Args:
        stored: The set.
        split: Name of the split, as the set calls it. A single file is the split `FILE_SPLIT`.
        malformed: A list that receives the reason for each row of a JSON or CSV file that cannot be
            read, which is then skipped. None: such a row is an error.

    Raises:
        UserError: The set, its subset or its split does not exist, or a file cannot be read.
        DownloadError: The hub cannot be reached.
    """
    local = Path(stored.path).expanduser()
    if is_file(stored.path):
        _check_split(stored, split, [FILE_SPLIT])
        _require_no_subset(stored)
        rows = _file_rows(local, stored, malformed)
    elif any(is_file(f"{stored.path}/{name}") for name in SAVED_DATASET_FILES):
        _require_no_subset(stored)
        rows = _dataset_rows(_saved_dataset(local, stored, split), stored, str(local), split)
    elif local.is_dir():
        rows = _folder_rows(local, stored, split, malformed)
    else:
        rows = _hub_rows(stored, split)
    if stored.max_rows is None:
        return rows
    return _first_rows(rows, stored.max_rows)


def _first_rows(rows: Iterator[Row], count: int) -> Iterator[Row]:
    """Yields the first rows of a set, then ends its stream.

    Otherwise pyarrow's threads, which read ahead, can abort the process when Python exits
    (https://github.com/huggingface/datasets/issues/7566).
    """
    yield from islice(rows, count)
    if isinstance(rows, Generator):
        rows.close()
    gc.collect()


def _check_split(stored: StoredSet, split: str, available: list[str]) -> None:
    if split not in available:
        raise UserError(
            f"data.split: {stored.path} has no split {split!r}{near(split, available)}. Available: "
            f"{', '.join(available)}"
        )


def _require_no_subset(stored: StoredSet) -> None:
    if stored.subset is not None or stored.revision is not None:
        raise UserError(
            f"data.options: {stored.path} is a file or was written by save_to_disk, so it has no "
            "subset and no revision. Remove them."
        )


def _file_rows(file: Path, stored: StoredSet, malformed: list[str] | None) -> Iterator[Row]:
    if file.suffix == ".parquet":
        return _parquet_rows(file, stored)
    if file.suffix == ".csv":
        return csv_rows(file, malformed)
    if file.suffix in SUFFIXES:
        return json_rows(file, malformed, allow_lists=True)
    raise UserError(
        f"data.path: {file} has an unsupported format. Supported: {', '.join(SUFFIXES)}, folders "
        "of such files, and folders written by save_to_disk."
    )


def _parquet_rows(file: Path, stored: StoredSet) -> Iterator[Row]:
    import pyarrow.parquet as pq

    datasets = import_datasets()
    try:
        if pq.ParquetFile(file).metadata.num_rows == 0:  # an error for datasets
            return
        # Not downloaded, copied or cached: the rows are read from the file.
        table = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", streaming=True
        )
        for number, fields in enumerate(_plain_rows(table, stored), start=1):
            yield Row(f"{file}: row {number}", fields)
    # Several libraries raise here, each with its own exceptions.
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{file}: not a readable parquet file: {one_line(cause)}") from error


def _saved_dataset(folder: Path, stored: StoredSet, split: str) -> Any:
    """Returns a split of a folder that `save_to_disk` has written."""
    datasets = import_datasets()
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"data.path: {folder} cannot be read: {one_line(error)}") from error
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}
    _check_split(stored, split, list(saved))
    return saved[split]


def _folder_rows(
    folder: Path, stored: StoredSet, split: str, malformed: list[str] | None
) -> Iterator[Row]:
    """Yields the rows of a folder's files, file by file.

    `datasets` finds the files of a split, by its rules for names and by the folder's README.md.
    """
    if "::" in str(folder) or any(character in "*?[]" for character in str(folder)):
        raise UserError(
            f"data.path: {folder}: `datasets` reads the characters * ? [ ] and :: in the name of a "
            "folder as a pattern. Rename it, or name a single file."
        )
    files_by_split = _builder(str(folder), stored).config.data_files
    _warn_of_unread_files(folder, files_by_split)
    _check_split(stored, split, [str(name) for name in files_by_split])
    for file in files_by_split[split]:
        yield from _file_rows(Path(file), stored, malformed)


def _warn_of_unread_files(folder: Path, files_by_split: Mapping[Any, Sequence[str]]) -> None:
    """Logs a warning about files of the folder itself that belong to no split."""
    read_files = {Path(file).name for file in chain.from_iterable(files_by_split.values())}
    unread = []
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES and file.name not in read_files:
            unread.append(file.name)
    if unread:
        logger.warning(
            "%s: not read, by the rules of `datasets`: %s", folder, ", ".join(unread[:5])
        )


def _builder(path: str, stored: StoredSet) -> Any:
    """Returns the builder of a folder or of a set on the hub.

    Raises:
        UserError: There is no data, or no such subset.
        DatasetNotFoundError, ConnectionError: The set is on the hub, which has no such set or
            cannot be reached.
    """
    datasets = import_datasets()
    from datasets.exceptions import DatasetNotFoundError

    try:
        subset = stored.subset
        if subset is None and stored.usual_subset is not None:
            names = datasets.get_dataset_config_names(path, revision=stored.revision)
            subset = stored.usual_subset if stored.usual_subset in names else None
        return datasets.load_dataset_builder(path, subset, revision=stored.revision)
    except (DatasetNotFoundError, ConnectionError):
        raise
    # Errors of several libraries about subsets, files and formats.
    except Exception as error:
        _check_subset(stored, _subset_names(path, stored))
        raise UserError(f"data.path: {path} cannot be read: {one_line(error)}") from error


def _subset_names(path: str, stored: StoredSet) -> list[str]:
    """Returns the names of a set's subsets, an empty list if they cannot be found."""
    try:
        names = import_datasets().get_dataset_config_names(path, revision=stored.revision)
    except Exception:
        return []
    return [str(name) for name in names]


def _check_subset(stored: StoredSet, subsets: list[str]) -> None:
    if not subsets:
        return
    available = ", ".join(subsets)
    if stored.subset is None and len(subsets) > 1:
        raise UserError(
            f"data.options.subset: {stored.path} has several subsets. Set one of {available}"
        )
    if stored.subset is not None and stored.subset not in subsets:
        raise UserError(
            f"data.options.subset: {stored.path} has no subset {stored.subset!r}"
            f"{near(stored.subset, subsets)}. Available: {available}"
        )


def _hub_rows(stored: StoredSet, split: str) -> Iterator[Row]:
    if not HUB_ID.fullmatch(stored.path):
        raise UserError(
            f"data.path: no such file or folder: {stored.path}. A set on the hub is named "
            "OWNER/NAME."
        )
    table = _hub_table(stored, split)
    return _dataset_rows(table, stored, stored.path, split)


def _hub_table(stored: StoredSet, split: str) -> Any:
    """Returns a split of a set on the hub, as a dataset or, with `max_rows`, as a stream."""
    import_datasets()
    from datasets.exceptions import DatasetNotFoundError

    try:
        builder = _builder(stored.path, stored)
        _check_split(stored, split, _splits(builder))
        if stored.max_rows is not None:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except DatasetNotFoundError as error:
        raise UserError(
            f"data.path: {stored.path} is no local file or folder, and the hub has no data set of "
            f"this name{near(stored.path, PUBLISHED_SETS)}, or it is private or gated: accept its "
            f"terms at https://huggingface.co/datasets/{stored.path}, and run `hf auth login` or "
            "set HF_TOKEN."
        ) from error
    except UserError:
        raise
    # Network and cache errors of several libraries.
    except Exception as error:
        raise DownloadError(
            f"data.path: {stored.path} is no local file or folder, and cannot be fetched from the "
            f"hub. Set data.path to a local copy. ({one_line(error)})"
        ) from error


def _splits(builder: Any) -> list[str]:
    """Returns the names of a set's splits. A set in the cache has no list of files."""
    return [str(name) for name in builder.config.data_files or builder.info.splits or ()]


def _dataset_rows(table: Any, stored: StoredSet, name: str, split: str) -> Iterator[Row]:
    for number, fields in enumerate(_plain_rows(table, stored), start=1):
        yield Row(f"{name} {split}: row {number}", fields)


def _plain_rows(table: Any, stored: StoredSet) -> Iterator[dict[str, Any]]:
    """Yields the rows of a dataset, with names in place of the numbers of labels.

    The ignored columns and those of images, audio and video are left out.
    """
    unread = []
    labels = {}
    for name, feature in (table.features or {}).items():
        if name in stored.ignored or type(feature).__name__ in MEDIA_FEATURES:
            unread.append(name)
        elif type(feature).__name__ == "ClassLabel":
            labels[name] = feature
    for fields in table.remove_columns(unread) if unread else table:
        names = {}
        for column, label in labels.items():
            if fields[column] is not None and fields[column] >= 0:
                names[column] = label.int2str(fields[column])
        yield {**fields, **names}
