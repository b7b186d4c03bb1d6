"""Compares two answers as formulas, equations and inequalities (syntax.py, identity.py)."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from grpo.rewards.verifier.brackets import split_relations
from grpo.rewards.verifier.evaluate import (
    CONTEXT,
    Evaluator,
    TooLargeError,
    UndefinedError,
    is_integer,
    is_real,
    number,
)
from grpo.rewards.verifier.identity import (
    constant_value,
    proportional,
    same_function,
    same_value,
    variables_of,
)
from grpo.rewards.verifier.sympy_values import constant_of_sympy
from grpo.rewards.verifier.syntax import (
    INFINITE,
    Call,
    FormulaError,
    Node,
    Number,
    difference_of,
    parse_formula,
)
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.types import Verdict

RELATION_SIGN = re.compile(r"(<|>|=|\\(?:le|ge|ne|equiv|approx|sim|cong)(?![a-z]))")
REVERSED = {">": "<", r"\ge": r"\le"}
# A decimal with this many digits may stand for an irrational value.
MIN_DIGITS = 9
DECIMAL = re.compile(r"-?(?P<digits>\d+\.(?P<places>\d+))")
# Behind a decimal whose last digits are missing.
DOTS = re.compile(r"(?<=\d) ?(?:\\l?dots|\.{2,})$")
RATIONAL_OPERATORS = {"+", "*", "/", "neg", "!", "!!", "binom"}


class _Relations(NamedTuple):
    """A chain of relations such as `1 < x <= 2`; no signs for a formula."""

    sides: list[Node]
    signs: list[str]


def exact_value(text: str) -> Fraction | None:
    r"""Returns the exact value of arithmetic in rational numbers, None for any other text.

    Examples: `3\frac{1}{2}`, `1,000`, `3.2\times10^5`, `2^{-3}`, `5!`.

    Raises:
        TooLargeError: The value is too large to be exact.
    """
    if re.fullmatch(r"-?\d{1,400}", text):
        return Fraction(int(text))
    if re.search(r"[a-zA-Z]", re.sub(r"\\(?:frac|times|cdot|div|binom)", "", text)):
        return None
    try:
        tree = parse_formula(text)
        value = Evaluator({})(tree)
    except (FormulaError, UndefinedError):
        return None
    if isinstance(value, Fraction):
        return value
    if _is_rational(tree):
        raise TooLargeError("a number with too many digits")
    return None


def _is_rational(tree: Node) -> bool:
    """Returns whether a tree has only operations whose results are rational."""
    if isinstance(tree, Number):
        return True
    if not isinstance(tree, Call):
        return False
    if tree.function == "^" and isinstance(tree.arguments[1], (Number, Call)):
        exponent = constant_value(tree.arguments[1])
        return is_integer(exponent) and _is_rational(tree.arguments[0])
    is_known = tree.function in RATIONAL_OPERATORS
    return is_known and all(_is_rational(argument) for argument in tree.arguments)


def compare_expressions(prediction: str, gold: str) -> Verdict:
    """Returns the verdict on a normalized answer, given the normalized gold answer.

    Raises:
        TooLargeError: The prediction exceeds a bound.
    """
    try:
        expected = _read(gold)
        _require_known_value(expected)
    except FormulaError as error:
        return _compare_with_sympy(prediction, gold, error)
    try:
        predicted = _read(DOTS.sub("", prediction))
    except FormulaError as error:
        return wrong(f"cannot read the answer: {error}")
    return _compare_relations(predicted, expected, prediction, gold)


def _compare_with_sympy(prediction: str, gold: str, error: FormulaError) -> Verdict:
    """Compares a prediction with a gold answer that has a value only in sympy."""
    expected = constant_of_sympy(gold)
    if expected is None:
        return Verdict(value="undecided", reason=f"gold answer: {error}")
    try:
        predicted = constant_value(parse_formula(prediction))
    except FormulaError as prediction_error:
        return wrong(f"cannot read the answer: {prediction_error}")
    is_equal = predicted is not None and same_value(predicted, expected)
    return CORRECT if is_equal else wrong("another value")


def _require_known_value(relations: _Relations) -> None:
    """Raises TooLargeError if a constant has no value within the bounds."""
    for side in relations.sides:
        if side == INFINITE:
            continue
        if not relations.signs and constant_value(side) is None and not variables_of(side):
            raise TooLargeError("no value within the bounds")


def _read(text: str) -> _Relations:
    pieces = split_relations(text, RELATION_SIGN)
    return _Relations([parse_formula(piece) for piece in pieces[::2]], pieces[1::2])


def _compare_relations(
    predicted: _Relations, expected: _Relations, prediction: str, gold: str
) -> Verdict:
    if not predicted.signs and not expected.signs:
        return _compare_values(predicted.sides[0], expected.sides[0], prediction, gold)
    predicted, expected = _ascending(predicted), _ascending(expected)
    if predicted.signs != expected.signs:
        return wrong("another relation")
    if len(expected.signs) == 1 and variables_of(*expected.sides):
        is_equal = proportional(
            difference_of(*predicted.sides),
            difference_of(*expected.sides),
            positive=expected.signs[0] in ("<", r"\le"),
        )
        if is_equal is None:
            return wrong("cannot be compared")
        return CORRECT if is_equal else wrong("another relation")
    for one, other in zip(predicted.sides, expected.sides, strict=True):
        if not same_function(one, other):
            return wrong("another relation")
    return CORRECT


def _ascending(relations: _Relations) -> _Relations:
    """Returns the relations with `<` in place of `>`."""
    if not any(sign in REVERSED for sign in relations.signs):
        return relations
    signs = [REVERSED.get(sign, sign) for sign in reversed(relations.signs)]
    return _Relations(relations.sides[::-1], signs)


def _compare_values(predicted: Node, expected: Node, prediction: str, gold: str) -> Verdict:
    if DOTS.search(prediction):
        is_decimal = _is_decimal_of(DOTS.sub("", prediction), expected)
        return CORRECT if is_decimal else wrong("another value")
    is_equal = same_function(predicted, expected)
    if is_equal is None:
        return wrong("undefined, or defined at too few points")
    if is_equal or _is_decimal_of(prediction, expected) or _is_decimal_of(gold, predicted):
        return CORRECT
    return wrong("another value")


def _is_decimal_of(text: str, tree: Node) -> bool:
    """Returns whether a decimal with MIN_DIGITS right digits stands for an irrational value.

    The last digit may be rounded or cut off.
    """
    match = DECIMAL.fullmatch(text)
    if match is None or len(match["digits"].replace(".", "").lstrip("0")) < MIN_DIGITS:
        return False
    value = constant_value(tree)
    if value is None or not is_real(value) or _is_nearly_rational(value):
        return False
    scale = 10 ** len(match["places"])
    scaled = value * scale
    cut_off = int(CONTEXT.floor(abs(scaled))) * (1 if scaled > 0 else -1)
    return Fraction(text) * scale in (cut_off, int(CONTEXT.nint(scaled)))


def is_rounding(decimal: str, formula: str) -> bool:
    """Returns whether a decimal number is close to a formula: within 5 % of it."""
    if DECIMAL.fullmatch(decimal) is None:
        return False
    try:
        value = constant_value(parse_formula(formula))
    except FormulaError:
        return False
    if value is None or not is_real(value):
        return False
    return bool(abs(number(Fraction(decimal)) - number(value)) < abs(number(value)) / 20)


def _is_nearly_rational(value: Any) -> bool:
    """Returns whether a value is rational with a small denominator, but for rounding."""
    if isinstance(value, Fraction):
        return True
    if not abs(value) < 10**30:
        return True
    scaled = Fraction(int(CONTEXT.nint(value * 10**80)), 10**80)
    nearest = scaled.limit_denominator(10**12)
    return abs(scaled - nearest) < Fraction(1, 10**60)
