"""Decides whether two formulas are the same function, by their values at many points (points.py).

A point where one of them is undefined does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo.rewards.verifier.evaluate import (
    CONTEXT,
    DIGITS,
    Evaluator,
    OutOfBoundsError,
    TooLargeError,
    UndefinedError,
    divide,
    number,
)
from grpo.rewards.verifier.points import (
    Point,
    breakpoints,
    fine_points,
    general_points,
    uses_complex_numbers,
)
from grpo.rewards.verifier.syntax import Node, names_of

CONSTANTS = {"pi", "e", "inf", "i"}
MIN_DEFINED = 4  # points at which both formulas are defined, not counting breakpoints
# Values are equal if they differ by less than this share of the larger one.
TOLERANCE = CONTEXT.mpf(10) ** -100
# A smaller value is computed again with more digits: it may be 0, but for rounding.
SMALL = CONTEXT.mpf(10) ** -40


def variables_of(*trees: Node) -> list[str]:
    """Returns the variables of the trees, sorted."""
    return sorted(set().union(*(names_of(tree) for tree in trees)) - CONSTANTS)


def same_function(first: Node, second: Node) -> bool | None:
    """Returns whether two formulas have the same values, None if too few points are defined.

    Raises:
        TooLargeError: A formula needs too many operations, or exceeds a bound at most points.
    """

    def agrees(values: Sequence[Any]) -> bool:
        return same_value(values[0], values[1])

    return _hold_at_points(agrees, first, second)


def proportional(first: Node, second: Node, *, positive: bool = False) -> bool | None:
    """Returns whether one formula is a multiple of the other, so that they have the same zeros.

    Args:
        first: Left side minus right side of an equation or inequality.
        second: The same of another one.
        positive: Whether the factor must be positive.

    Returns:
        None if too few points are defined.

    Raises:
        TooLargeError: A formula needs too many operations, or exceeds a bound at most points.
    """
    ratio: Any = None

    def agrees(values: Sequence[Any]) -> bool:
        nonlocal ratio
        numerator, denominator = values
        if denominator == 0 or numerator == 0:
            return bool(denominator == numerator)
        quotient = divide(numerator, denominator)
        if ratio is None:
            ratio = quotient
        if positive and not number(quotient).real > 0:
            return False
        return same_value(quotient, ratio)

    result = _hold_at_points(agrees, first, second)
    return result if ratio is not None or result is None else False


def constant_value(tree: Node) -> Any | None:
    """Returns the value of a formula without variables, None if it has variables or no value."""
    if variables_of(tree):
        return None
    try:
        return _value(tree, Evaluator({}, is_complex=uses_complex_numbers(tree)))
    except UndefinedError:
        return None


def same_value(first: Any, second: Any) -> bool:
    """Returns whether two values are equal: exactly if both are rational, else to 100 digits."""
    if isinstance(first, tuple) or isinstance(second, tuple):
        if not (isinstance(first, tuple) and isinstance(second, tuple)):
            return False
        return all(same_value(one, other) for one, other in zip(first, second, strict=True))
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    one, other = number(first), number(second)
    if one == other:
        return True
    if CONTEXT.isinf(one) or CONTEXT.isinf(other):
        return False
    return bool(abs(one - other) < TOLERANCE * max(abs(one), abs(other)))


def _hold_at_points(
    agrees: Callable[[Sequence[Any]], bool], first: Node, second: Node
) -> bool | None:
    """Returns whether the values of two formulas agree at all points where both are defined."""
    trees = (first, second)
    names = variables_of(*trees)
    is_complex = uses_complex_numbers(*trees)
    if not names:
        values = _values_at({}, trees, is_complex)
        return None if values is None else agrees(values)
    num_defined = 0
    for points in (general_points(names, trees), fine_points(names, trees)):
        num_points = 0
        num_out_of_bounds = 0
        for point in points:
            num_points += 1
            try:
                values = _values_at(point, trees, is_complex)
            except OutOfBoundsError:
                num_out_of_bounds += 1
                continue
            if values is None:
                continue
            if not agrees(values):
                return False
            num_defined += 1
        if num_out_of_bounds > num_points / 2:
            raise TooLargeError("beyond the bounds at most points")
        if num_defined >= MIN_DEFINED:
            break
    if num_defined < MIN_DEFINED:
        return None
    return _agree_at_breakpoints(agrees, names, trees, is_complex)


def _agree_at_breakpoints(
    agrees: Callable[[Sequence[Any]], bool],
    names: Sequence[str],
    trees: Sequence[Node],
    is_complex: bool,
) -> bool:
    for point in breakpoints(names, trees):
        try:
            values = _values_at(point, trees, is_complex)
        except OutOfBoundsError:
            continue
        if values is not None and not agrees(values):
            return False
    return True


def _values_at(point: Point, trees: Sequence[Node], is_complex: bool) -> list[Any] | None:
    """Returns the values of the trees at a point, None if one is undefined.

    Raises:
        OutOfBoundsError: A value exceeds a bound.
    """
    evaluate = Evaluator(point, is_complex=is_complex)
    try:
        return [_value(tree, evaluate) for tree in trees]
    except OutOfBoundsError:
        raise
    except UndefinedError:
        return None


def _value(tree: Node, evaluate: Evaluator) -> Any:
    """Returns the value of a tree, 0 if it differs from 0 only by rounding."""
    value = evaluate(tree)
    if isinstance(value, (Fraction, tuple)) or not 0 < abs(value) < SMALL:
        return value
    with CONTEXT.workdps(2 * DIGITS):
        precise = evaluate(tree)
    is_rounding = abs(precise) < abs(value) * CONTEXT.mpf(10) ** -20
    return Fraction(0) if is_rounding else value
