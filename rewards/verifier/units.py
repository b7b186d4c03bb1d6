"""Splits an answer into a value and a unit."""

from __future__ import annotations

import re
from typing import NamedTuple

# The beginning of a unit: `\text{...}`, a percent sign, a symbol, or two letters of a word. A word
# is a unit if it is lower-case, follows a number and a space, and does not begin a formula.
TEXT = r"\\text\{[^{}]*\}"
PERCENT = r"\\?%"
SYMBOL = r"(?<=[\d}]) ?(?:cm|mm|km|kg|ft|in|mph|m|g|s|h|L)(?![A-Za-z(])"
FUNCTION_NAMES = "pi|sqrt|sin|cos|tan|cot|sec|log|ln|exp|mod"
WORD_START = rf"(?<=[\d}})!]) (?!(?:{FUNCTION_NAMES})\b)[a-z]{{2}}"
REST_OF_UNIT = rf"(?:[ .^/{{}}23a-z]|{TEXT})*"
# A value and its unit, such as `5 cm`, `5\text{ cm}`, `25\%` and `3 m/s`.
VALUE_WITH_UNIT = re.compile(
    rf"(?P<value>.+?) ?(?:{TEXT}|{PERCENT}|{WORD_START}|{SYMBOL}){REST_OF_UNIT}"
)
# Canonical names of units, after the plural "s" has been removed (so "inches" is "inche").
UNIT_NAMES = {
    "$": "dollar",
    "percent": "%",
    "deg": "degree",
    "centimeter": "cm",
    "centimetre": "cm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "feet": "foot",
    "ft": "foot",
    "inche": "inch",
    "in": "inch",
    "hr": "hour",
    "h": "hour",
    "min": "minute",
    "sec": "second",
    "mi": "mile",
}
FACTORS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


class Quantity(NamedTuple):
    """A value and its unit, "" without one: `Quantity("5.4", "cent")`."""

    value: str
    unit: str


def split_unit(text: str) -> Quantity:
    r"""Splits an answer into value and unit.

    A word such as `million` before the unit becomes a factor of the value. A dollar sign in front
    of the value is the unit, unless another unit follows the value.

    Examples: `5.4 \text{ cents}` -> ("5.4", "cent"), `\$36` -> ("36", "dollar"), `3 million` ->
    ("(3)*1000000", "").
    """
    currency = ""
    dollar_sign = re.match(r"(?P<minus>-?)\s*\\?\$\s*(?=[\d.-])", text)
    if dollar_sign:
        currency = "dollar"
        text = dollar_sign["minus"] + text[dollar_sign.end() :]
    match = VALUE_WITH_UNIT.fullmatch(text)
    if match is None or match["value"].count("{") != match["value"].count("}"):
        return Quantity(text, currency)
    value = match["value"]
    unit = re.sub(r"\\text|[\\{} .]", "", text[match.end("value") :]).lower()
    for word, factor in FACTORS.items():
        if unit.startswith(word):
            value = f"({value})*{factor}"
            unit = unit.removeprefix(word)
            break
    return Quantity(value, _unit_name(unit) or currency)


def _unit_name(unit: str) -> str:
    """Returns the canonical name of a unit, such as `foot^2` for `squarefeet`."""
    unit = re.sub(r"s(?=\^|$)", "", unit)  # the plural ending
    unit = re.sub(r"^(?:square|sq)(\w+)$", r"\1^2", unit)
    unit = re.sub(r"^cubic(\w+)$", r"\1^3", unit)
    name, caret, power = unit.partition("^")
    return UNIT_NAMES.get(name, name) + caret + power
