r"""Repeating decimals: replaces `0.1\overline{6}` and other notations by fractions."""

from __future__ import annotations

import re

# 0.1\overline{6}, 0.1\bar{6}, 0.\dot{3}, 0.\dot{1}4\dot{2}, 0.1(6), 0.333\ldots
REPEATING_DECIMAL = re.compile(
    r"(?<![\d.])(?P<integer>\d{0,20})\.(?P<fixed>\d{0,20})"
    r"(?:\\(?:overline|bar|dot)\s*\{?(?P<repeating>(?<=\{)\d{1,20}(?=\})|\d)\}?"
    r"(?P<dotted>\d{0,20}\\dot\s*\{?\d\}?)?|\((?P<bracketed>\d{1,20})\))"
)
CONTINUED_DECIMAL = re.compile(
    r"(?<![\d.])(?P<integer>\d{0,20})\.(?P<digits>\d{3,40})"
    r"\s*(?:\\[lc]?dots(?![A-Za-z])|\.{2,})(?![\d.])"
)


def with_fractions(text: str) -> str:
    r"""Returns the text with a fraction for each repeating decimal.

    Examples: `0.1\overline{6}` and `0.1666\ldots` -> `\frac{15}{90}`.
    """
    text = CONTINUED_DECIMAL.sub(_fraction_of_continued_decimal, text)
    return REPEATING_DECIMAL.sub(_fraction_of_repeating_decimal, text)


def _fraction_of_repeating_decimal(match: re.Match[str]) -> str:
    r"""Returns a repeating decimal as a fraction: `0.1\overline{6}` -> `\frac{15}{90}`."""
    repeating = match["bracketed"] or match["repeating"]
    if match["dotted"]:
        repeating += re.sub(r"\D", "", match["dotted"])
    return _repeating_fraction(match["integer"], match["fixed"], repeating)


def _fraction_of_continued_decimal(match: re.Match[str]) -> str:
    r"""Returns a decimal with dots as a fraction, if its digits end with a repetition.

    A block of digits must occur three times at the end: `0.1666\ldots`. Twice are enough if the
    digits are nothing else: `0.1212\ldots`. Other decimals are returned unchanged.
    """
    digits = match["digits"]
    for length in range(1, len(digits) // 2 + 1):
        block = digits[-length:]
        repetitions = 2 if digits == block * (len(digits) // length) else 3
        if digits.endswith(block * repetitions):
            fixed = digits
            while fixed.endswith(block):
                fixed = fixed[:-length]
            return _repeating_fraction(match["integer"], fixed, block)
    return match.group()


def _repeating_fraction(integer: str, fixed: str, repeating: str) -> str:
    not_repeating = integer + fixed
    numerator = int(not_repeating + repeating) - int(not_repeating or "0")
    denominator = 10 ** len(fixed) * (10 ** len(repeating) - 1)
    return rf"\frac{{{numerator}}}{{{denominator}}}"
