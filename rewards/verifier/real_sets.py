r"""Reads sets of real numbers, however they are written, as unions of intervals.

`x>5`, `2x>10`, `(5,\infty)` and `\mathbb{R}\setminus(-\infty,5]` are the same set. Sets are written
as intervals, finite sets, `\mathbb{R}`, the empty set, relations in one variable of degree 1 or 2
(also in an absolute value), and combinations with `\cup`, `\cap`, `\setminus`, "and" and "or".
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from grpo.rewards.verifier.brackets import find_closing, split_at_top_level, split_relations
from grpo.rewards.verifier.evaluate import (
    CONTEXT,
    SIGNS_OF_DIFFERENCE,
    Evaluator,
    UndefinedError,
    add,
    divide,
    is_real,
    multiply,
    negate,
    number,
    power,
)
from grpo.rewards.verifier.identity import constant_value, same_value, variables_of
from grpo.rewards.verifier.syntax import (
    INFINITE,
    MINUS_INFINITE,
    Call,
    FormulaError,
    Name,
    Node,
    Number,
    difference_of,
    names_of,
    parse_formula,
)

RELATION = re.compile(r"<|>|=|\\(?:le|ge|ne|in|notin)(?![a-z])")
RELATION_SIGN = re.compile(r"(<|>|=|\\(?:le|ge|ne)(?![a-z]))")
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
ALL_NUMBERS = r"\mathbb{R}"
EMPTY = {r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}", "{}"}
# Words in lower case -> the set that they name.
NAMED_SETS = {
    "all real numbers": ALL_NUMBERS,
    "all real values": ALL_NUMBERS,
    "all real x": ALL_NUMBERS,
    "all reals": ALL_NUMBERS,
    "real numbers": ALL_NUMBERS,
    "the real numbers": ALL_NUMBERS,
    "the set of real numbers": ALL_NUMBERS,
    "empty set": r"\emptyset",
    "no solution": r"\emptyset",
    "no solutions": r"\emptyset",
    "null set": r"\emptyset",
    "the empty set": r"\emptyset",
    "the null set": r"\emptyset",
}
# x \in [1,2], x \notin \{3\}
MEMBERSHIP = re.compile(r"(?P<variable>[A-Za-z]) ?\\(?P<sign>in|notin)(?![a-z])(?P<set>.*)")
SET_BUILDER = re.compile(
    r"(?P<variable>[A-Za-z])(?: ?\\in ?\\mathbb\{R\})? ?"
    r"(?:\||:|\\mid(?![a-z])|\\colon) ?(?P<set>.+)"
)
NOISE = CONTEXT.mpf(10) ** -100
# The largest and smallest bounds. They are open.
INFINITY = CONTEXT.inf


class Interval(NamedTuple):
    """An interval. A single point has equal bounds and is closed on both sides."""

    low: Any
    has_low: bool
    high: Any
    has_high: bool


class RealSet(NamedTuple):
    """Disjoint intervals in ascending order.

    Attributes:
        intervals: The intervals.
        variable: The variable of the relations, "" without one.
        is_solved: Whether no relation has degree 2 or an absolute value, other than `|x|`.
    """

    intervals: tuple[Interval, ...]
    variable: str = ""
    is_solved: bool = True


class NotASetError(ValueError):
    """The text does not describe a set of real numbers in a form that this module knows."""


LINE = Interval(-INFINITY, False, INFINITY, False)


def read_real_set(text: str) -> RealSet | None:
    """Returns the set that a normalized answer describes, None if it describes none."""
    try:
        return _read(text)
    except (NotASetError, FormulaError, UndefinedError):
        return None


def same_set(first: RealSet, second: RealSet) -> bool:
    """Returns whether two sets have the same elements; variables must not differ."""
    if first.variable and second.variable and first.variable != second.variable:
        return False
    if len(first.intervals) != len(second.intervals):
        return False
    for one, other in zip(first.intervals, second.intervals, strict=True):
        if (one.has_low, one.has_high) != (other.has_low, other.has_high):
            return False
        if not (same_value(one.low, other.low) and same_value(one.high, other.high)):
            return False
    return True


# Reading


def _read(text: str) -> RealSet:
    text = text.strip()
    if text.startswith(r"\{") and find_closing(text, 1) == len(text) - 1:
        return _read_simple_set(text)
    has_relation = RELATION.search(text) is not None
    for separator, combine in ((r"\lor", _union), (r"\land", _intersection)):
        parts = split_at_top_level(text, (separator,))
        if len(parts) > 1:
            return functools.reduce(combine, [_read(part) for part in parts])
    if has_relation and not re.match(r"[^<>=]*\\(?:not)?in(?![a-z])", text):
        parts = split_at_top_level(text)
        if len(parts) > 1:
            return _combine_listed(parts)
        return _read_relations(text)
    membership = MEMBERSHIP.fullmatch(text)
    if membership:
        result = _read(membership["set"])
        if membership["sign"] == "notin":
            result = _complement(result)
        return result._replace(variable=membership["variable"])
    return _read_set(text)


def _combine_listed(parts: list[str]) -> RealSet:
    r"""Combines relations between which there is only a comma.

    `x\ne 0, x\ne 1` excludes both. `x<1, x>3` is a union, unless that would be every number.
    """
    sets = [_read(part) for part in parts]
    if any(r"\ne" in part for part in parts):
        return functools.reduce(_intersection, sets)
    union = functools.reduce(_union, sets)
    if union.intervals == (LINE,):
        return functools.reduce(_intersection, sets)
    return union


def _read_set(text: str) -> RealSet:
    r"""Reads set operations, from left to right: `\mathbb{R} \setminus \{1\} \cup [5,6]`."""
    pieces = re.split(r"(\\cup|\\cap|\\setminus|\\backslash)(?![a-z])", text)
    if len(pieces) == 1:
        minus = re.fullmatch(r"(\\mathbb\{R\}) ?(-) ?(\\\{.*\\\})", text)
        pieces = list(minus.groups()) if minus else pieces
    operations: dict[str, Callable[[RealSet, RealSet], RealSet]] = {
        r"\cup": _union,
        r"\cap": _intersection,
    }
    result = _read_simple_set(pieces[0].strip())
    for operator, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        operation = operations.get(operator, _difference)
        result = operation(result, _read_simple_set(piece.strip()))
    return result


def _read_simple_set(text: str) -> RealSet:
    text = re.sub(r"^\((\\\{.*\\\}|[\[(].*[\])])\)$", r"\1", text)
    if text == ALL_NUMBERS:
        return RealSet((LINE,))
    if text in EMPTY:
        return RealSet(())
    braces = re.fullmatch(r"\\\{(?P<content>.*)\\\}|\{(?P<plain>.*)\}", text)
    if braces:
        return _read_braces((braces["content"] or braces["plain"] or "").strip())
    return _read_interval(text)


def _read_braces(content: str) -> RealSet:
    """Reads a finite set, or a set like `x : x > 3`."""
    builder = SET_BUILDER.fullmatch(content)
    if builder is None:
        return RealSet(_canonical([_point(element) for element in _listed(content)]))
    result = _read(builder["set"])
    if result.variable not in ("", builder["variable"]):
        raise NotASetError(content)
    return result._replace(variable="")  # its name does not matter


def _read_interval(text: str) -> RealSet:
    interval = re.fullmatch(r"(?P<left>[\[(\]])(?P<bounds>.*)(?P<right>[\])\[])", text)
    bounds = split_at_top_level(interval["bounds"]) if interval else []
    if interval is None or len(bounds) != 2:
        raise NotASetError(text)
    low, high = _constant(bounds[0]), _constant(bounds[1])
    has_closed_infinity = CONTEXT.isinf(number(low)) and interval["left"] == "["
    if has_closed_infinity or (CONTEXT.isinf(number(high)) and interval["right"] == "]"):
        raise NotASetError(text)
    piece = _interval(low, interval["left"] == "[", high, interval["right"] == "]")
    if piece is None:
        raise NotASetError(text)
    return RealSet((piece,))


def _listed(text: str) -> list[str]:
    r"""Returns the elements of a list; one with `\pm` counts as two."""
    elements = []
    for element in split_at_top_level(text):
        if r"\pm" in element:
            elements += [element.replace(r"\pm", "+"), element.replace(r"\pm", "-")]
        else:
            elements.append(element)
    return elements


def _point(text: str) -> Interval:
    value = _constant(text)
    if CONTEXT.isinf(number(value)):
        raise NotASetError(text)
    return Interval(value, True, value, True)


def _constant(text: str) -> Any:
    """Returns the value of a real constant."""
    value = constant_value(parse_formula(text))
    if value is None or not is_real(value):
        raise NotASetError(text)
    return value


def _interval(low: Any, has_low: bool, high: Any, has_high: bool) -> Interval | None:
    """Returns an interval with open infinite bounds, None if it is empty."""
    if CONTEXT.isinf(number(low)):
        has_low = False
    if CONTEXT.isinf(number(high)):
        has_high = False
    order = _compare(low, high)
    if order > 0 or (order == 0 and not (has_low and has_high)):
        return None
    return Interval(low, has_low, high, has_high)


# Relations


def _read_relations(text: str) -> RealSet:
    r"""Reads a chain of relations such as `1 < 2x \le 5`."""
    if text.count(r"\pm") == 1:  # x\ne\pm 1
        both = [_read_relations(text.replace(r"\pm", sign)) for sign in "+-"]
        return _intersection(*both) if r"\ne" in text else _union(*both)
    pieces = split_relations(text, RELATION_SIGN)
    if len(pieces) == 1:
        raise NotASetError(text)
    sides = [parse_formula(piece) for piece in pieces[::2]]
    variables = variables_of(*sides)
    if len(variables) != 1 or variables[0].endswith(">"):
        raise NotASetError(text)
    result = RealSet((LINE,), variables[0])
    for index, sign in enumerate(pieces[1::2]):
        if sign in ("<", r"\le") and _is_infinite(sides[index], sides[index + 1]):
            continue
        solution = _solve(sides[index], sign, sides[index + 1], variables[0])
        result = _intersection(result, solution)
    return result


def _is_infinite(left: Node, right: Node) -> bool:
    r"""Returns whether `left < right` says nothing: `-\infty < x` or `x < \infty`."""
    return left == MINUS_INFINITE or right == INFINITE


def _is_absolute_value(tree: Node) -> bool:
    return isinstance(tree, Call) and tree.function == "abs"


def _solve(left: Node, sign: str, right: Node, variable: str) -> RealSet:
    """Returns the numbers for which a relation holds."""
    if _is_absolute_value(right) and not _is_absolute_value(left):
        return _solve(right, FLIPPED.get(sign, sign), left, variable)
    if isinstance(left, Call) and left.function == "abs":
        (inner,) = left.arguments
        is_solved = isinstance(inner, Name)  # |x|<3
        minus = Call("neg", (right,))
        if constant_value(right) is None:
            raise NotASetError("an absolute value and a variable")
        combine = _union if sign in (">", r"\ge", "=") else _intersection
        opposite = FLIPPED.get(sign, sign)
        solutions = _solve(inner, sign, right, variable), _solve(inner, opposite, minus, variable)
        if sign == "=" and _compare(constant_value(right), Fraction(0)) < 0:
            return RealSet((), variable, is_solved=is_solved)
        return combine(*solutions)._replace(is_solved=is_solved)
    return _solve_quadratic(difference_of(left, right), sign, variable)


def _solve_quadratic(polynomial: Node, sign: str, variable: str) -> RealSet:
    """Solves `polynomial SIGN 0` for a polynomial of degree 0, 1 or 2."""
    if _degree(polynomial, variable) > 2:
        raise NotASetError("not a polynomial of degree 2")

    def value_at(position: Any) -> Any:
        return Evaluator({variable: position})(polynomial)

    constant = value_at(Fraction(0))
    at_one = value_at(Fraction(1))
    at_minus_one = value_at(Fraction(-1))
    half = Fraction(1, 2)
    square = _rounded(add(multiply(half, add(at_one, at_minus_one)), negate(constant)))
    linear = _rounded(multiply(half, add(at_one, negate(at_minus_one))))
    roots = _roots(square, linear, constant)
    bounds = [-INFINITY, *roots, INFINITY]
    pieces = []
    for low, high in itertools.pairwise(bounds):
        value = value_at(_between(low, high))
        if _holds(_compare(value, Fraction(0)), sign):
            pieces.append(Interval(low, False, high, False))
    if _holds(0, sign):
        pieces += [Interval(root, True, root, True) for root in roots]
    return RealSet(_canonical(pieces), variable, is_solved=square == 0)


def _degree(tree: Node, variable: str) -> float:
    """Returns the degree of a polynomial, infinity for a formula that is none."""
    if variable not in names_of(tree):
        return 0
    if isinstance(tree, Name):
        return 1
    if not isinstance(tree, Call):
        return math.inf
    degrees = [_degree(argument, variable) for argument in tree.arguments]
    if tree.function in ("+", "neg"):
        return max(degrees)
    if tree.function in ("*", "cross"):
        return sum(degrees)
    if tree.function == "/" and degrees[1] == 0:
        return degrees[0]
    exponent = tree.arguments[-1]
    if tree.function == "^" and isinstance(exponent, Number) and exponent.value.denominator == 1:
        return degrees[0] * float(exponent.value)
    return math.inf


def _rounded(coefficient: Any) -> Any:
    """Returns a coefficient, 0 if it differs from 0 only by rounding."""
    return Fraction(0) if abs(number(coefficient)) < NOISE else coefficient


def _roots(square: Any, linear: Any, constant: Any) -> list[Any]:
    """Returns the real roots of a quadratic polynomial in ascending order."""
    if square == 0:
        return [] if linear == 0 else [divide(negate(constant), linear)]
    minus_half = divide(multiply(Fraction(-1, 2), linear), square)
    discriminant = _rounded(add(multiply(minus_half, minus_half), negate(divide(constant, square))))
    if discriminant == 0:
        return [minus_half]
    if number(discriminant) < 0:
        return []
    root = power(discriminant, Fraction(1, 2), is_complex=False)
    return [add(minus_half, negate(root)), add(minus_half, root)]


def _between(low: Any, high: Any) -> Any:
    if CONTEXT.isinf(number(low)) and CONTEXT.isinf(number(high)):
        return Fraction(0)
    if CONTEXT.isinf(number(low)):
        return add(high, Fraction(-1))
    if CONTEXT.isinf(number(high)):
        return add(low, Fraction(1))
    return multiply(Fraction(1, 2), add(low, high))


def _holds(order: int, sign: str) -> bool:
    """Returns whether a value that compares with 0 as `order` does satisfies `value SIGN 0`."""
    return order in SIGNS_OF_DIFFERENCE[sign.removeprefix("\\")]


# Set operations


def _compare(first: Any, second: Any) -> int:
    """Returns -1, 0 or 1 for the order of two real values."""
    if same_value(first, second):
        return 0
    return -1 if number(first) < number(second) else 1


def _is_before(one: Interval, other: Interval) -> bool:
    """Returns whether there is a gap between the end of `one` and the start of `other`."""
    order = _compare(one.high, other.low)
    return order < 0 or (order == 0 and not (one.has_high or other.has_low))


def _canonical(intervals: list[Interval]) -> tuple[Interval, ...]:
    """Returns disjoint intervals in ascending order with the same union."""

    def order(one: Interval, other: Interval) -> int:
        return _compare(one.low, other.low) or other.has_low - one.has_low

    merged: list[Interval] = []
    for interval in sorted(intervals, key=functools.cmp_to_key(order)):
        if not merged or _is_before(merged[-1], interval):
            merged.append(interval)
            continue
        last = merged[-1]
        ends = _compare(last.high, interval.high)
        if ends < 0:
            merged[-1] = last._replace(high=interval.high, has_high=interval.has_high)
        elif ends == 0:
            merged[-1] = last._replace(has_high=last.has_high or interval.has_high)
    return tuple(merged)


def _variable(first: RealSet, second: RealSet) -> str:
    if first.variable and second.variable and first.variable != second.variable:
        raise NotASetError("two variables")
    return first.variable or second.variable


def _union(first: RealSet, second: RealSet) -> RealSet:
    intervals = _canonical([*first.intervals, *second.intervals])
    is_solved = first.is_solved and second.is_solved
    return RealSet(intervals, _variable(first, second), is_solved)


def _complement(real_set: RealSet) -> RealSet:
    pieces = []
    low, has_low = -INFINITY, False
    for interval in real_set.intervals:
        piece = _interval(low, has_low, interval.low, not interval.has_low)
        if piece is not None and not CONTEXT.isinf(number(interval.low)):
            pieces.append(piece)
        low, has_low = interval.high, not interval.has_high
    if not (real_set.intervals and CONTEXT.isinf(number(low))):
        pieces.append(Interval(low, has_low, INFINITY, False))
    return RealSet(tuple(pieces), real_set.variable, real_set.is_solved)


def _intersection(first: RealSet, second: RealSet) -> RealSet:
    variable = _variable(first, second)
    union = _union(_complement(first), _complement(second))
    return _complement(union)._replace(variable=variable)


def _difference(first: RealSet, second: RealSet) -> RealSet:
    return _intersection(first, _complement(second))
