"""JSON lines: text files with one JSON value per line. Every such file is written and read here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grpo.types import UserError

# A completion may contain these, and JSON does not require escapes for them. U+0085, U+2028 and
# U+2029 separate lines for str.splitlines and for some editors; a lone surrogate cannot be encoded.
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def to_line(value: Any) -> str:
    r"""Returns a JSON value as a line, in readable Unicode: `{"completion": "é\u2028"}\n`."""
    text = json.dumps(value, ensure_ascii=False)
    return _ESCAPED.sub(_escape, text) + "\n"


def to_lines(values: Iterable[Any]) -> str:
    """Returns JSON values as the text of a file."""
    return "".join(to_line(value) for value in values)


def read(path: Path, *, skip_incomplete: bool = False) -> Iterator[tuple[int, Any]]:
    """Yields the number, from 1, and the value of each line. Blank lines are skipped.

    Args:
        path: The file, in UTF-8.
        skip_incomplete: Whether to skip a last line without its line end, which a killed process
            may have left.

    Raises:
        UserError: The file cannot be read, or a line is not JSON. The error names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if skip_incomplete:
        lines.pop()  # what follows the last line end
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: not JSON: {error}") from None


def read_objects(path: Path, *, skip_incomplete: bool = False) -> list[dict[str, Any]]:
    """Returns the values of all lines of a file that grpo has written, which are objects."""
    return [value for _, value in read(path, skip_incomplete=skip_incomplete)]


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"
