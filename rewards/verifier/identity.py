"""Decides whether two formulas are the same function, by their values at many points.

A point where one of them is undefined does not count. The points have both signs and small and
large sizes, and lie on both sides of every breakpoint: where the argument of an absolute value, a
floor, an even root, a maximum or a minimum changes its sign or passes an integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from rewards.verifier.evaluate import (
    CONTEXT,
    Budget,
    Evaluator,
    UndefinedError,
    divide,
    number,
)
from rewards.verifier.syntax import Call, Node, calls_of, has_series, names_of

CONSTANTS = {"pi", "e", "inf"}
# Values at which formulas are compared. None has a simple relation to another one.
VALUES = tuple(
    Fraction(numerator, denominator)
    for numerator, denominator in (
        (131, 97),
        (-113, 89),
        (23, 97),
        (-29, 83),
        (307, 53),
        (-211, 47),
        (1, 1009),
        (-1, 997),
        (7919, 71),
        (-6007, 67),
        (10_000_019, 13),
        (-10_000_079, 17),
        (59, 101),
        (-67, 103),
        (179, 61),
        (-199, 73),
    )
)
INTEGERS = tuple(Fraction(value) for value in (2, 3, 5, 8, 12, 1, 7, -4, 0, -1))
NUM_POINTS = 24  # for formulas with several variables
# If too few points are defined, these are tried: -10 to 10 in steps of 1/7, and a little more.
FINE_VALUES = tuple(Fraction(step, 7) + Fraction(1, 1009) for step in range(-70, 71))
MIN_DEFINED = 4
MAX_BREAKPOINTS = 40
DISTANCES = (Fraction(1, 1009), Fraction(3, 19))  # from a breakpoint
# Values are equal if they differ by less than this share of the larger one.
TOLERANCE = CONTEXT.mpf(10) ** -60
# A value below this, computed with 110 digits, is 0 but for rounding.
ZERO = CONTEXT.mpf(10) ** -95
STEP_FUNCTIONS = {"floor", "ceil", "mod", "gcd", "lcm"}
COMPLEX_FUNCTIONS = {"conj", "Re", "Im", "arg"}  # of complex variables
INTEGER_FUNCTIONS = {"!", "!!", "binom", *STEP_FUNCTIONS}

Point = dict[str, Any]


def is_complex(*trees: Node) -> bool:
    """Returns whether `i` is the imaginary unit in the trees."""
    for tree in trees:
        has_function = any(call.function in COMPLEX_FUNCTIONS for call in calls_of(tree))
        if "i" in names_of(tree) or has_function:
            return True
    return False


def variables_of(*trees: Node) -> list[str]:
    """Returns the variables of the trees, sorted."""
    names = set().union(*(names_of(tree) for tree in trees)) - CONSTANTS - {"i"}
    return sorted(names)


def same_function(first: Node, second: Node) -> bool | None:
    """Returns whether two formulas have the same values, None if too few points are defined.

    Raises:
        TooLargeError: A formula needs too many operations.
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
        TooLargeError: A formula needs too many operations.
    """
    ratio: Any = None

    def agrees(values: Sequence[Any]) -> bool:
        nonlocal ratio
        numerator, denominator = values
        if is_zero(denominator) or is_zero(numerator):
            return is_zero(denominator) and is_zero(numerator)
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
        return Evaluator({}, is_complex=is_complex(tree))(tree)
    except UndefinedError:
        return None


def same_value(first: Any, second: Any) -> bool:
    """Returns whether two values are equal: exactly if both are rational, else to 60 digits."""
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
    size = max(abs(one), abs(other))
    return bool(size < ZERO or abs(one - other) < TOLERANCE * size)


def is_zero(value: Any) -> bool:
    """Returns whether a value is 0, but for rounding."""
    if isinstance(value, tuple):
        return all(is_zero(part) for part in value)
    if isinstance(value, Fraction):
        return value == 0
    return bool(abs(value) < ZERO)


def _hold_at_points(
    agrees: Callable[[Sequence[Any]], bool], first: Node, second: Node
) -> bool | None:
    """Returns whether the values of two formulas agree at all points where both are defined."""
    names = variables_of(first, second)
    budget = Budget()
    if not names:
        values = _values((first, second), {}, budget)
        return None if values is None else agrees(values)
    num_defined = 0
    for points in (_points(names, (first, second)), _fine_points(names)):
        for point in points:
            values = _values((first, second), point, budget)
            if values is None:
                continue
            if not agrees(values):
                return False
            num_defined += 1
        if num_defined >= MIN_DEFINED:
            return True
    return None


def _values(trees: Sequence[Node], point: Point, budget: Budget | None = None) -> list[Any] | None:
    """Returns the values of the trees at a point, None if one is undefined."""
    evaluate = Evaluator(point, is_complex=is_complex(*trees), budget=budget)
    try:
        return [evaluate(tree) for tree in trees]
    except UndefinedError:
        return None


def _points(names: Sequence[str], trees: Sequence[Node]) -> Iterator[Point]:
    calls = [call for tree in trees for call in calls_of(tree)]
    functions = {call.function for call in calls}
    if functions & COMPLEX_FUNCTIONS:
        for index in range(NUM_POINTS):
            parts = _cycled(VALUES, index, len(names)), _cycled(VALUES, index + 5, len(names))
            values = [
                CONTEXT.mpc(number(one), number(other)) for one, other in zip(*parts, strict=True)
            ]
            yield _point(names, values)
        return
    if len(names) == 1:
        for value in VALUES:
            yield _point(names, (value,))
    else:
        for index in range(NUM_POINTS):
            yield _point(names, _cycled(VALUES, index, len(names)))
    if functions & INTEGER_FUNCTIONS or any(has_series(tree) for tree in trees):
        for index in range(len(INTEGERS)):
            yield _point(names, _cycled(INTEGERS, index, len(names)))
    yield from _points_around_breakpoints(names, calls)


def _complex_number(real: Fraction, imaginary: Fraction) -> Any:
    return CONTEXT.mpc(number(real), number(imaginary))


def _cycled(values: Sequence[Fraction], index: int, count: int) -> list[Fraction]:
    """Returns `count` of the values, which differ from those of every other index."""
    step = 1 + index // len(values)
    return [
        values[(index + 3 * step * place + place // len(values)) % len(values)]
        * (1 + place // len(values))
        for place in range(count)
    ]


def _fine_points(names: Sequence[str]) -> Iterator[Point]:
    for index, value in enumerate(FINE_VALUES):
        others = _cycled(VALUES, index % len(VALUES), len(names) - 1) if len(names) > 1 else []
        yield _point(names, [value, *others])


def _point(names: Sequence[str], values: Iterable[Any]) -> Point:
    """Returns the point with the given values; a vector gets three numbers."""
    point: Point = {}
    for name, value in zip(names, values, strict=True):
        if name.endswith(">"):
            offset = sum(ord(char) for char in name)
            point[name] = (value, value + Fraction(offset % 7 + 1, 3), Fraction(offset % 11, 5))
        else:
            point[name] = value
    return point


def _points_around_breakpoints(names: Sequence[str], calls: Sequence[Call]) -> Iterator[Point]:
    num_breakpoints = 0
    for formula, targets in _branching_formulas(calls):
        for name in names:
            if name not in names_of(formula):
                continue
            others = _point(names, _cycled(VALUES, 4, len(names)))
            for target in targets:
                value = _solve_linear(formula, target, name, others)
                if value is None:
                    continue
                num_breakpoints += 1
                if num_breakpoints > MAX_BREAKPOINTS:
                    return
                for distance in DISTANCES:
                    yield others | {name: value - distance}
                    yield others | {name: value + distance}
                yield others | {name: value}


def _branching_formulas(calls: Sequence[Call]) -> Iterator[tuple[Node, Sequence[Fraction]]]:
    """Yields the formulas at whose targets a function changes its branch."""
    zero = (Fraction(0),)
    integers = tuple(Fraction(value) for value in (0, 1, -1, 2))
    for call in calls:
        if call.function in ("abs", "sgn", "root", "^", "log"):
            yield call.arguments[0], zero
        elif call.function in ("floor", "ceil"):
            yield call.arguments[0], integers
        elif call.function == "mod":
            yield Call("/", call.arguments), integers
        elif call.function in ("max", "min"):
            for index, first in enumerate(call.arguments):
                for second in call.arguments[index + 1 :]:
                    yield Call("+", (first, Call("neg", (second,)))), zero


def _solve_linear(formula: Node, target: Fraction, name: str, others: Point) -> Fraction | None:
    """Returns where a formula has a value along one variable, if it is linear in it near 0."""
    if name.endswith(">"):
        return None
    values = []
    for position in (0, 1, 2):
        result = _values((formula,), others | {name: Fraction(position)})
        if result is None or isinstance(result[0], (tuple, CONTEXT.mpc)):
            return None
        values.append(result[0])
    slope = number(values[1]) - number(values[0])
    if slope == 0 or not same_value(2 * slope, number(values[2]) - number(values[0])):
        return None
    if all(isinstance(value, Fraction) for value in values):
        at_zero, at_one, _ = values
        solution: Fraction = (target - at_zero) / (at_one - at_zero)
        return solution
    return _nearest_fraction((number(target) - number(values[0])) / slope)


def _nearest_fraction(value: Any) -> Fraction | None:
    if not abs(value) < 10**12:
        return None
    return Fraction(int(CONTEXT.nint(value * 10**9)), 10**9)
