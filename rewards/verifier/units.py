r"""Splits an answer into a value and the unit or the words behind it.

Words after a number are ignored if they say nothing about its value: at most three, and none that
is a number, a connective, a negation or an operation. `5 apples` is 5; `5 or 6`, `5 plus 1` and `5
is not the answer` are not. Number words have their value: `5 hundred` is 500, `3 quarters` is 3/4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from grpo.rewards.verifier.syntax import FUNCTIONS, GREEK
from grpo.rewards.verifier.words import (
    INTRODUCTION_WORDS,
    LARGE_NUMBERS,
    MEANINGFUL_WORDS,
    NUMBER_ENDINGS,
    NUMBER_WORDS,
    SHORT_WORDS,
    SMALL_NUMBERS,
    TENS,
)

# The beginning of a unit: `\text{...}`, a percent sign, a symbol, or two letters of a word. A word
# is lower-case, follows a number and a space, and does not begin a formula. A symbol of one letter
# follows a space, too.
TEXT = r"\\text ?\{[^{}]*\}"
PERCENT = r"\\?%"
SYMBOL = (
    r"(?:(?<=[\d}]) ?(?:cm|mm|km|kg|mg|mL|ml|ft|in|yd|mi|lb|oz|hr|min|sec|mph|USD|EUR)"
    r"|(?<=[\d}]) (?:m|g|s|h|L))(?![A-Za-z(_])"
)
FUNCTION_NAMES = "pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod|floor|ceil|abs|max|min"
WORD_START = rf"(?<=[\d}})!i]) (?!(?:{FUNCTION_NAMES})\b)[a-z]{{2}}"
REST_OF_UNIT = rf"(?:[ .^/{{}}123a-z'-]|{TEXT}|\\cdot ?)*"
# A value and its unit, such as `5 cm`, `5\text{ cm}`, `25\%` and `3 m/s`.
VALUE_WITH_UNIT = re.compile(
    rf"(?P<value>.+?) ?(?P<unit>(?:{TEXT}|{PERCENT}|{WORD_START}|{SYMBOL}){REST_OF_UNIT})"
)
# A letter directly behind a number is a variable: 2m is 2 times m.
GLUED_LETTER = re.compile(r"(?P<value>.*\d)(?P<unit>[mgshL])")
CURRENCY = re.compile(
    r"(?P<minus>-?)\s*(?P<sign>\\?\$|\\text\{(?:euro|pound|yen)\}|(?:USD|EUR)(?= ?\d))\s*(?=[\d.-])"
)
CURRENCY_NAMES = {"$": "dollar", "USD": "dollar", "EUR": "euro"}
MAX_WORDS = 3
# Names of units in lower case and in the singular -> canonical names.
UNIT_NAMES = {
    **{"%": "%", "percent": "%", "percentage": "%", "deg": "degree", "degree": "degree"},
    **{"mm": "mm", "millimeter": "mm", "millimetre": "mm"},
    **{"cm": "cm", "centimeter": "cm", "centimetre": "cm"},
    **{"m": "m", "meter": "m", "metre": "m", "km": "km", "kilometer": "km", "kilometre": "km"},
    **{"in": "inch", "inch": "inch", "ft": "foot", "foot": "foot", "feet": "foot"},
    **{"yd": "yard", "yard": "yard", "mi": "mile", "mile": "mile"},
    **{"g": "g", "gram": "g", "kg": "kg", "kilogram": "kg", "mg": "mg", "milligram": "mg"},
    **{"lb": "lb", "oz": "ounce", "ounce": "ounce", "ton": "ton", "pound": "pound"},
    **{"l": "L", "liter": "L", "litre": "L", "ml": "mL", "milliliter": "mL", "millilitre": "mL"},
    **{"s": "second", "sec": "second", "second": "second"},
    **{"min": "minute", "minute": "minute", "h": "hour", "hr": "hour", "hour": "hour"},
    **{"day": "day", "week": "week", "month": "month", "year": "year", "yr": "year"},
    **{"dollar": "dollar", "usd": "dollar", "cent": "cent", "euro": "euro", "eur": "euro"},
    **{"yen": "yen", "radian": "radian", "rad": "radian", "unit": "unit", "mph": "mile/hour"},
    **{"nanometer": "nm", "nanometre": "nm", "hertz": "Hz", "mole": "mol", "joule": "J"},
    **{"am": "am", "pm": "pm", "hz": "Hz", "khz": "kHz", "mhz": "MHz", "nm": "nm", "mol": "mol"},
    **{"kpa": "kPa", "kj": "kJ", "kw": "kW", "ev": "eV", "kev": "keV", "mev": "MeV", "rpm": "rpm"},
    **{"inche": "inch"},
}
POWER_NAMES = {"square": "2", "sq": "2", "cubic": "3", "squared": "2", "cubed": "3"}
# Kinds of number words -> the kinds that can precede them. "start" is the beginning.
PREDECESSORS = {
    "small": ("start", "hundred", "large", "and"),
    "tens": ("start", "hundred", "large", "and"),
    "hundred": ("small",),
    "large": ("small", "tens", "hundred"),
    "and": ("hundred", "large"),
}
UNIT_TOKEN = re.compile(r"[a-z']+|%|\^|/|\d|\S")


class Quantity(NamedTuple):
    """A value and what follows it: a known unit or other words, "" without one.

    Examples: `Quantity("5.4", "cent", "")`, `Quantity("14", "", "right triangle")`.
    """

    value: str
    unit: str = ""
    words: str = ""

    def contradicts(self, other: Quantity) -> bool:
        """Returns whether both have a unit or words, and they are not the same.

        Words agree if one side has all words of the other: `triangles` and `right triangles`.
        """
        if self.unit or other.unit:
            has_both = bool(self.unit or self.words) and bool(other.unit or other.words)
            return has_both and self.unit != other.unit
        words, other_words = set(self.words.split()), set(other.words.split())
        return bool(words and other_words) and not (words <= other_words or other_words <= words)


def split_unit(text: str, *, glued: str = "") -> Quantity:
    r"""Splits a normalized answer into value and unit.

    A currency sign in front of the value is the unit, unless another unit follows the value. Text
    that is not a value with words that can be ignored is returned unchanged as the value.

    Args:
        text: The answer.
        glued: A canonical unit. A letter directly behind a number is a variable unless it is this
            unit: `2m` is 2 metres if the gold answer is in metres.

    Examples: `5.4 \text{ cents}` -> ("5.4", "cent"), `\$36` -> ("36", "dollar"), `3 million` ->
    ("(3)*1000000", "").
    """
    text, currency = _split_currency(text)
    text = text if currency else _without_introduction(text)
    without_unit = Quantity(text, currency)
    letter = GLUED_LETTER.fullmatch(text)
    if letter:
        unit = UNIT_NAMES[letter["unit"].lower()]
        return Quantity(letter["value"], unit) if unit == glued else without_unit
    match = VALUE_WITH_UNIT.fullmatch(text)
    if match is None or not _is_value(match["value"]):
        return without_unit
    read = _read_words(match["unit"]) if _has_only_words(match["unit"]) else None
    if read is None:
        return without_unit
    factors, unit, words = read
    is_letter = re.fullmatch(r" ?[a-zA-Z](?:\^.*)?", match["unit"]) is not None
    if (words or is_letter) and not _is_number(match["value"]):
        return without_unit
    value = match["value"]
    for factor in factors:
        value = f"({value})*{factor}"
    return Quantity(value, unit or currency, words)


def _is_value(text: str) -> bool:
    """Returns whether text in front of a unit can be a value: it has a digit or a formula."""
    has_value = re.search(r"\d|\\(?!text)[a-zA-Z]|^[a-zA-Z]$", text) is not None
    is_list = text.rstrip().endswith((",", ";")) or text.startswith(r"\text")
    return has_value and not is_list and text.count("{") == text.count("}")


def _is_number(text: str) -> bool:
    r"""Returns whether text is a number or a constant formula: no names, commas or relations."""
    without_commands = re.sub(r"\\(?:frac|sqrt|pi|cdot|times|div|binom)(?![A-Za-z])", "", text)
    return re.search(r"[A-Za-z\\\[\]=<>;:|&]|,(?!\d{3})", without_commands) is None


def number_of_words(words: str) -> str | None:
    r"""Returns the number that words in lower case stand for, None for other words.

    Examples: `twenty-one` -> "21", `one hundred and five` -> "105", `two thirds` ->
    r"2*\frac{1}{3}".
    """
    first, *rest = words.replace("-", " ").replace(r"\land", " and ").split() or [""]
    if first in ("negative", "minus") and rest:
        number = number_of_words(" ".join(rest))
        return None if number is None or number.startswith("-") else f"-{number}"
    denominator = NUMBER_WORDS.get(_singular(rest[-1])) if rest else None
    if denominator is not None and rest[-1] not in LARGE_NUMBERS and rest[-1] != "hundred":
        numerator = _integer_of_words([first, *rest[:-1]])
        return None if numerator is None else f"{numerator}*{denominator}"
    integer = _integer_of_words([first, *rest])
    return None if integer is None else str(integer)


def _integer_of_words(words: Sequence[str]) -> int | None:
    """Returns the integer that words such as `two thousand one hundred and five` stand for."""
    total = 0
    current = 0  # below the next `thousand`, `million`, ...
    previous = "start"
    for word in words:
        kind = _kind_of_number_word(word)
        is_unit = kind == "small" and 1 <= SMALL_NUMBERS.index(word) <= 9
        follows_tens = is_unit and previous == "tens"
        if previous not in PREDECESSORS.get(kind, ()) and not follows_tens:
            return None
        if kind == "small":
            current += SMALL_NUMBERS.index(word)
        elif kind == "tens":
            current += 10 * TENS.index(word) + 20
        elif kind == "hundred":
            current *= 100
        elif kind == "large":
            total += current * LARGE_NUMBERS[word]
            current = 0
        previous = kind
    return None if previous in ("start", "and") else total + current


def _kind_of_number_word(word: str) -> str:
    if word in SMALL_NUMBERS:
        return "small"
    if word in TENS:
        return "tens"
    if word in LARGE_NUMBERS:
        return "large"
    return word if word in ("hundred", "and") else "other"


def _without_introduction(text: str) -> str:
    r"""Returns the text without words in front of a number: `\text{There are } 13` -> `13`."""
    match = re.match(r"\\text ?\{(?P<words>[A-Za-z ]{1,40})\} ?(?=-?[\d\\(.])", text)
    if match is None or not INTRODUCTION_WORDS.issuperset(match["words"].lower().split()):
        return text
    return text[match.end() :]


def _split_currency(text: str) -> tuple[str, str]:
    """Returns the text without a currency sign in front of it, and the currency."""
    match = CURRENCY.match(text)
    if match is None:
        return text, ""
    sign = re.sub(r"\\text|[\\{}]", "", match["sign"])
    return match["minus"] + text[match.end() :], CURRENCY_NAMES.get(sign, sign)


def _has_only_words(text: str) -> bool:
    r"""Returns whether the letters outside of `\text{}` are words or symbols of units."""
    plain = re.sub(rf"{TEXT}|\\cdot", " ", text)
    for word in re.findall(r"[A-Za-z]+", plain):
        singular = _singular(word.lower())
        is_known = singular in SHORT_WORDS or singular in UNIT_NAMES or singular in NUMBER_WORDS
        if not is_known and not re.fullmatch(r"[a-z]{4,}", word):
            return False
    return True


def _read_words(text: str) -> tuple[list[str], str, str] | None:
    """Reads the words behind a value.

    Returns:
        `(factors, unit, words)`: the values of number words, a known unit, and other words in the
        singular; None if the words make the answer another one.
    """
    plain = re.sub(r"\\text|\\cdot|[{}\\]", " ", text).strip(" .").lower()
    plain = plain.replace("per cent", "percent").replace(".", " ")
    plain = re.sub(r"(?<![\^ ])-|-(?!\d)", " ", plain)
    words = UNIT_TOKEN.findall(plain)
    if MEANINGFUL_WORDS.difference(POWER_NAMES).intersection(words):
        return None
    tokens = [_singular(word) for word in words]
    factors = []
    while tokens and tokens[0] in NUMBER_WORDS:
        factors.append(NUMBER_WORDS[tokens.pop(0)])
    if tokens[:1] == ["of"] and len(tokens) > 1:
        tokens.pop(0)
    unit = _read_unit(tokens)
    if unit is not None:
        return factors, unit, ""
    num_units = sum(token in UNIT_NAMES for token in tokens)
    if len(tokens) > MAX_WORDS or num_units > 1 or not all(map(_can_be_ignored, tokens)):
        return None
    return factors, "", " ".join(tokens)


def _can_be_ignored(word: str) -> bool:
    """Returns whether a word in the singular says nothing about the number in front of it."""
    if word in POWER_NAMES or word in NUMBER_WORDS or NUMBER_ENDINGS.fullmatch(word):
        return False
    if word in FUNCTIONS or word in GREEK:
        return False
    return word in SHORT_WORDS or word in UNIT_NAMES or (len(word) >= 3 and word.isalpha())


def _singular(word: str) -> str:
    if word in ("s", "is", "has", "this", "ss") or word.endswith("ss") or not word.endswith("s"):
        return word
    return word[:-1]


def _read_unit(tokens: list[str]) -> str | None:
    """Returns the canonical name of a known unit such as `foot^2` or `m/second^2`, None if unknown.

    No tokens are the unit "".
    """
    factors: list[str] = []
    divisors: list[str] = []
    rest = list(tokens)
    is_divisor = False
    while rest:
        token = rest.pop(0)
        if token in ("per", "/"):
            is_divisor = True
            continue
        power = ""
        if token in POWER_NAMES and rest and rest[0] in UNIT_NAMES:
            power = POWER_NAMES[token]
            token = rest.pop(0)
        if token not in UNIT_NAMES:
            return None
        if rest and rest[0] in ("squared", "cubed"):
            power = POWER_NAMES[rest.pop(0)]
        elif rest[:1] == ["^"]:
            is_divisor |= rest[1:2] == ["-"]
            digits = [part for part in rest[1:3] if part.isdigit()]
            if not digits:
                return None
            power = "" if digits[0] == "1" else digits[0]
            del rest[: 3 if rest[1] == "-" else 2]
        names = divisors if is_divisor else factors
        names.append(UNIT_NAMES[token] + (f"^{power}" if power else ""))
        is_divisor = False
    if len(factors) + len(divisors) > 1 and not divisors:
        return None  # two units in a row
    return "/".join([" ".join(factors), *divisors]) if divisors else " ".join(factors)
