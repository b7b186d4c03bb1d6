"""Columns of a row: names, dotted paths into nested values, and values as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, time
from typing import Any

from grpo.data.common.files import Row
from grpo.data.common.tables import near
from grpo.types import UserError

PLAIN_TYPES = (str, int, float, bool, type(None))


def has_column(row: Row, column: str) -> bool:
    """Returns whether a row has a column such as `answer` or `reward_model.ground_truth`."""
    name, _, key = column.partition(".")
    value = row.fields.get(name)
    return name in row.fields and (not key or (isinstance(value, dict) and key in value))


def value_at(row: Row, field: str, column: str) -> Any:
    """Returns the value at a dotted path such as `prompt.0.content`.

    Args:
        row: The row.
        field: The field that has this column, for error messages.
        column: Name of a column, or the path to a nested value. A part of a null value is None.

    Raises:
        UserError: There is no such value. The message names those there are.
    """
    if column in row.fields:
        return row.fields[column]
    name, *keys = column.split(".")
    where = f"{row.location}: data.columns.{field}={column}"
    if name not in row.fields:
        raise UserError(
            f"{where}: no column {name!r}{near(name, row.fields)}. The row has the columns "
            f"{', '.join(row.fields)}."
        )
    value = row.fields[name]
    for key in keys:
        if value is None:
            return None
        elements = _elements(value)
        if key not in elements:
            available = ", ".join(elements) or f"nothing, it is a {type(value).__name__}"
            raise UserError(
                f"{where}: {name} has no {key!r}{near(key, elements)}. It has {available}."
            )
        value = elements[key]
        name = f"{name}.{key}"
    return value


def _elements(value: Any) -> dict[str, Any]:
    """Returns the elements of an object, or of a list by their position."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {str(index): element for index, element in enumerate(value)}
    return {}


def json_value(value: Any) -> Any:
    """Returns a value of a table as JSON can store it. Bytes become None."""
    if isinstance(value, PLAIN_TYPES):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(element) for element in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return None
    return str(value)
