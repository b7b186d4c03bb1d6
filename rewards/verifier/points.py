"""The points at which formulas are compared.

They have both signs and small and large sizes, and lie on both sides of every breakpoint:

- where the argument of an absolute value or a root changes its sign,
- where the argument of a floor passes an integer,
- where two arguments of a maximum or minimum, or the two sides of a condition, are equal.

All are shifted by a number that depends on the formulas, so that no formula can be written that
vanishes at all of them without knowing the other one.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from grpo.rewards.verifier.evaluate import CONTEXT, Evaluator, UndefinedError, is_real, number
from grpo.rewards.verifier.syntax import (
    Call,
    Condition,
    Node,
    calls_of,
    conditions_of,
    difference_of,
    has_series,
    names_of,
)

# None of these values has a simple relation to another one. Numerators are odd and even, because
# (-1)^n depends on it.
VALUES = tuple(
    Fraction(numerator, denominator)
    for numerator, denominator in (
        (131, 97),
        (-113, 89),
        (24, 97),
        (-29, 83),
        (307, 53),
        (-212, 47),
        (1, 1009),
        (-2, 997),
        (7919, 71),
        (-6008, 67),
        (10_000_019, 13),
        (-10_000_080, 17),
        (60, 101),
        (-67, 103),
        (178, 61),
        (-199, 73),
    )
)
INTEGERS = tuple(Fraction(value) for value in (2, 3, 5, 8, 12, 1, 7, -4, 0, -1))
NUM_POINTS = 24  # for formulas with several variables
# From -10 to 10 in steps of 1/7, and from -120 to 120 in steps of 3/2.
FINE_VALUES = tuple(Fraction(step, 7) for step in range(-70, 71))
COARSE_VALUES = tuple(Fraction(3 * step, 2) for step in range(-80, 81))
NUM_SHIFTS = 89
MAX_BREAKPOINTS = 40
DISTANCES = (Fraction(1, 1009), Fraction(3, 19))  # from a breakpoint
INTEGER_FUNCTIONS = {"!", "!!", "binom", "floor", "ceil", "mod", "gcd", "lcm"}
COMPLEX_FUNCTIONS = {"conj", "Re", "Im", "arg"}  # of complex variables
COMPLEX_NAMES = {"z", "w"}  # in an absolute value, usually complex

Point = dict[str, Any]


def uses_complex_numbers(*trees: Node) -> bool:
    """Returns whether `i` is the imaginary unit in the trees, or a variable is complex."""
    return any("i" in names_of(tree) for tree in trees) or has_complex_variables(*trees)


def has_complex_variables(*trees: Node) -> bool:
    """Returns whether the trees have functions of complex numbers."""
    for tree in trees:
        for call in calls_of(tree):
            is_modulus = call.function == "abs" and COMPLEX_NAMES & names_of(call.arguments[0])
            if call.function in COMPLEX_FUNCTIONS or is_modulus:
                return True
    return False


def general_points(names: Sequence[str], trees: Sequence[Node]) -> Iterator[Point]:
    """Yields points that do not depend on the breakpoints of the trees.

    Args:
        names: The variables.
        trees: The formulas that are compared.
    """
    values = [value + _shift(trees) for value in VALUES]
    num_points = len(values) if len(names) == 1 else NUM_POINTS
    is_complex = has_complex_variables(*trees)
    for index in range(num_points):
        chosen = _cycled(values, index, len(names))
        if is_complex:
            imaginary_parts = _cycled(values, index + 5, len(names))
            yield _point(names, map(_complex_number, chosen, imaginary_parts))
        else:
            yield _point(names, chosen)
    if not is_complex and _needs_integers(trees):
        for index in range(len(INTEGERS)):
            yield _point(names, _cycled(INTEGERS, index, len(names)))


def fine_points(names: Sequence[str], trees: Sequence[Node]) -> Iterator[Point]:
    """Yields many points near 0, for formulas that are defined at few others."""
    values = [value + _shift(trees) for value in (*FINE_VALUES, *COARSE_VALUES)]
    for index, value in enumerate(values):
        yield _point(names, [value, *_cycled(VALUES, index, len(names) - 1)])


def breakpoints(names: Sequence[str], trees: Sequence[Node]) -> Iterator[Point]:
    """Yields points at and around the breakpoints of the trees."""
    calls: list[Call] = []
    conditions: list[Condition] = []
    for tree in trees:
        calls += calls_of(tree)
        conditions += conditions_of(tree)
    yielded: set[tuple[str, Fraction]] = set()
    has_nonlinear_formula = False
    for formula, targets, has_branches in _branching_formulas(calls, conditions):
        for name in names:
            if name not in names_of(formula):
                continue
            others = _point(names, _cycled(VALUES, 4, len(names)))
            for target in targets:
                value = _solve_linear(formula, target, name, others)
                has_nonlinear_formula |= has_branches and value is None
                if value is None or (name, value) in yielded:
                    continue
                yielded.add((name, value))
                if len(yielded) > MAX_BREAKPOINTS:
                    return
                for distance in DISTANCES:
                    yield others | {name: value - distance}
                    yield others | {name: value + distance}
                yield others | {name: value}
    if has_nonlinear_formula:
        yield from fine_points(names, trees)


def _shift(trees: Sequence[Node]) -> Fraction:
    checksums = sum(zlib.crc32(repr(tree).encode()) for tree in trees)
    return Fraction(checksums % NUM_SHIFTS + 1, 1013)


def _needs_integers(trees: Sequence[Node]) -> bool:
    """Returns whether some functions of the trees depend on the integers."""
    for tree in trees:
        if has_series(tree):
            return True
        for call in calls_of(tree):
            has_variable_exponent = call.function == "^" and names_of(call.arguments[1])
            if call.function in INTEGER_FUNCTIONS or has_variable_exponent:
                return True
    return False


def _cycled(values: Sequence[Fraction], index: int, count: int) -> list[Fraction]:
    """Returns `count` of the values, which differ from those of every other index."""
    step = 1 + index // len(values)
    chosen = []
    for place in range(count):
        round_number = place // len(values)
        position = (index + 3 * step * place + round_number) % len(values)
        chosen.append(values[position] * (1 + round_number))
    return chosen


def _complex_number(real: Fraction, imaginary: Fraction) -> Any:
    return CONTEXT.mpc(number(real), number(imaginary))


def _point(names: Sequence[str], values: Iterable[Any]) -> Point:
    """Returns the point with the given values; a vector gets three numbers."""
    point: Point = {}
    for name, value in zip(names, values, strict=True):
        if name.endswith(">"):
            offset = zlib.crc32(name.encode())
            point[name] = (value, value + Fraction(offset % 7 + 1, 3), Fraction(offset % 11, 5))
        else:
            point[name] = value
    return point


def _branching_formulas(
    calls: Sequence[Call], conditions: Sequence[Condition]
) -> Iterator[tuple[Node, Sequence[Fraction], bool]]:
    """Yields formulas, the targets at which a function of them changes, and how it changes.

    The last value is True if the function has another branch there, and False if its domain ends.
    """
    zero = (Fraction(0),)
    for condition in conditions:
        yield difference_of(condition.left, condition.right), zero, True
    integers = tuple(Fraction(value) for value in (0, 1, -1, 2))
    for call in calls:
        if call.function in ("root", "log"):
            yield call.arguments[0], zero, False
        elif call.function in ("abs", "sgn"):
            yield call.arguments[0], zero, True
        elif call.function in ("floor", "ceil"):
            yield call.arguments[0], integers, True
        elif call.function == "mod":
            yield Call("/", call.arguments), integers, True
        elif call.function in ("max", "min"):
            for first, second in itertools.combinations(call.arguments, 2):
                yield difference_of(first, second), zero, True


def _solve_linear(formula: Node, target: Fraction, name: str, others: Point) -> Fraction | None:
    """Returns where a formula has a value along one variable, if it is linear in it near 0."""
    if name.endswith(">"):
        return None
    values = []
    for position in (0, 1, 2):
        try:
            value = Evaluator(others | {name: Fraction(position)})(formula)
        except UndefinedError:
            return None
        if not is_real(value):
            return None
        values.append(value)
    at_zero, at_one, at_two = values
    slope = number(at_one) - number(at_zero)
    is_linear = abs(number(at_two) - number(at_zero) - 2 * slope) < abs(slope) * 10**-30
    if slope == 0 or not is_linear:
        return None
    if all(isinstance(value, Fraction) for value in values):
        solution: Fraction = (target - at_zero) / (at_one - at_zero)
        return solution
    return _nearest_fraction((number(target) - number(at_zero)) / slope)


def _nearest_fraction(value: Any) -> Fraction | None:
    if not abs(value) < 10**12:
        return None
    return Fraction(int(CONTEXT.nint(value * 10**9)), 10**9)
