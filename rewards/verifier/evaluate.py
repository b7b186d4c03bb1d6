"""Evaluates a tree of syntax.py at a point: rational numbers exactly, others to 150 digits.

The time is bounded by counts, not by a clock: the cost of all operations of one verdict
(`limited_cost`), and the size of the numbers of each operation.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from grpo.rewards.verifier.syntax import (
    INFINITE,
    MINUS_INFINITE,
    Call,
    Cases,
    Condition,
    Name,
    Node,
    Number,
    Series,
)

DIGITS = 150
# Bound of all evaluations of one verdict. An operation costs 1, a function such as sin 20.
MAX_COST = 120_000
FUNCTION_COST = 20
GAMMA_COST = 100  # of the factorial of a number that is not an integer
SERIES_COST = 10  # of one term of a sum, in addition to its operations
MAX_BITS = 20_000  # of an exact numerator or denominator; larger values are rounded
MAX_LOG2 = 10**6  # largest |log2| of a value
MAX_ANGLE = 2**400  # largest argument of a trigonometric function
MAX_FACTORIAL = 2_200  # largest n in n!
MAX_GAMMA = 10**5  # largest |x| of the factorial of a number that is not an integer

CONTEXT = mpmath.mp.clone()
CONTEXT.dps = DIGITS
# Relation -> the signs of its left side minus its right side for which it holds.
SIGNS_OF_DIFFERENCE = {
    **{"<": {-1}, ">": {1}, "=": {0}},
    **{"le": {-1, 0}, "ge": {0, 1}, "ne": {-1, 1}},
}
# Values: Fraction, mpf, mpc, and tuples of three numbers for vectors. mpmath has no types.
Value = Any


class TooLargeError(ValueError):
    """A formula exceeds a bound of the verifier. A prediction that does is wrong."""


class UndefinedError(ArithmeticError):
    """The value does not exist, or is beyond the bounds of this module."""


class OutOfBoundsError(UndefinedError):
    """The value may exist, but an operation exceeds a bound of this module."""


class _Budget:
    """The cost of the evaluations of one verdict."""

    def __init__(self) -> None:
        self._cost = 0

    def spend(self, cost: int) -> None:
        self._cost += cost
        if self._cost > MAX_COST:
            raise TooLargeError("too many operations")


_BUDGET: contextvars.ContextVar[_Budget | None] = contextvars.ContextVar("budget", default=None)


@contextlib.contextmanager
def limited_cost() -> Iterator[None]:
    """Limits the cost of all evaluations in this context to MAX_COST."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


class Evaluator:
    """Evaluates trees at one point."""

    def __init__(self, point: Mapping[str, Value], *, is_complex: bool = False) -> None:
        """Sets the point.

        Args:
            point: The value of each name that is not a constant.
            is_complex: True: `i` is the imaginary unit, and roots and logarithms of negative
                numbers have their principal values. False: these are undefined, except odd roots,
                which are real.
        """
        self._point = dict(point)
        self._is_complex = is_complex
        self._budget = _BUDGET.get() or _Budget()

    def __call__(self, tree: Node) -> Value:
        """Returns the value of a tree.

        Raises:
            UndefinedError: The tree has no value at this point.
            TooLargeError: The tree needs too many operations.
        """
        if tree == INFINITE:  # Infinity has a value only by itself.
            return CONTEXT.inf
        if tree == MINUS_INFINITE:
            return -CONTEXT.inf
        try:
            return self._value(tree)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            if isinstance(error, TooLargeError):
                raise
            raise UndefinedError(str(error)) from None

    def _value(self, tree: Node) -> Value:
        self._budget.spend(1)
        if isinstance(tree, Number):
            return tree.value
        if isinstance(tree, Name):
            return self._value_of_name(tree.text)
        if isinstance(tree, Series):
            return self._value_of_series(tree)
        if isinstance(tree, Cases):
            return self._value_of_cases(tree)
        arguments = [self._value(argument) for argument in tree.arguments]
        return self._call(tree, arguments)

    def _value_of_name(self, name: str) -> Value:
        if name in self._point:
            return self._point[name]
        if name == "pi":
            return +CONTEXT.pi
        if name == "e":
            return +CONTEXT.e
        if name == "i" and self._is_complex:
            return CONTEXT.mpc(0, 1)
        raise UndefinedError(name)

    def _value_of_series(self, series: Series) -> Value:
        start = _integer(self._value(series.start))
        end = _integer(self._value(series.end))
        value: Value = Fraction(0 if series.function == "sum" else 1)
        combine = add if series.function == "sum" else multiply
        outside = self._point.get(series.variable)
        if end < start - 1:
            raise UndefinedError("a sum without terms")
        for index in range(start, end + 1):
            self._budget.spend(SERIES_COST)
            self._point[series.variable] = Fraction(index)
            value = combine(value, self._value(series.body))
        if outside is None:
            self._point.pop(series.variable, None)
        else:
            self._point[series.variable] = outside
        return value

    def _value_of_cases(self, cases: Cases) -> Value:
        for value, conditions in cases.rows:
            if all(map(self._holds, conditions)):
                return self._value(value)
        raise UndefinedError("no case applies")

    def _holds(self, condition: Condition) -> bool:
        difference = _subtract(self._value(condition.left), self._value(condition.right))
        return _sign(difference) in SIGNS_OF_DIFFERENCE[condition.sign]

    def _call(self, tree: Call, arguments: list[Value]) -> Value:
        function = tree.function
        if function in OPERATORS:
            has_gamma = function in ("!", "binom") and not all(map(is_integer, arguments))
            self._budget.spend(GAMMA_COST if has_gamma else len(arguments))
            return OPERATORS[function](*arguments)
        is_integer_power = function == "^" and is_integer(arguments[1])
        self._budget.spend(1 if is_integer_power else FUNCTION_COST)
        if function in ("^", "root"):
            return self._power_or_root(tree, arguments)
        if function == "log":
            return self._log(*arguments)
        if function in ELEMENTARY:
            return self._elementary(function, *arguments)
        if function.endswith("("):
            return _unknown_function(function, arguments)
        raise UndefinedError(function)

    def _power_or_root(self, tree: Call, arguments: list[Value]) -> Value:
        base, exponent = arguments
        if tree.function == "root":
            exponent = divide(Fraction(1), exponent)
        if isinstance(base, tuple) or isinstance(exponent, tuple):
            if exponent != 2:
                raise UndefinedError("the power of a vector")
            return dot(base, base)
        return power(base, exponent, is_complex=self._is_complex)

    def _log(self, argument: Value, base: Value) -> Value:
        if not self._is_complex and not (_real(argument) > 0 and _real(base) > 0):
            raise UndefinedError("the logarithm of a number that is not positive")
        return divide(CONTEXT.log(number(argument)), CONTEXT.log(number(base)))

    def _elementary(self, function: str, argument: Value) -> Value:
        if not abs(number(argument)) < MAX_ANGLE:
            raise OutOfBoundsError("a large angle")
        value = ELEMENTARY[function](number(argument))
        if isinstance(value, CONTEXT.mpc) and not self._is_complex:
            raise UndefinedError(f"{function} outside its domain")
        return value


def number(value: Value) -> Value:
    """Returns a value as a number of mpmath."""
    if isinstance(value, Fraction):
        return CONTEXT.mpf(value.numerator) / value.denominator
    if isinstance(value, tuple):
        raise UndefinedError("a vector")
    return value


def _real(value: Value) -> Value:
    """Returns a value that can be ordered."""
    if not is_real(value):
        raise UndefinedError("a vector or complex number has no order")
    return value


def is_real(value: Value) -> bool:
    """Returns whether a value is a real number, not a complex number or a vector."""
    return not isinstance(value, (tuple, CONTEXT.mpc))


def is_integer(value: Value) -> bool:
    """Returns whether a value is an exact integer."""
    return isinstance(value, Fraction) and value.denominator == 1


def _integer(value: Value) -> int:
    if not is_integer(value):
        raise UndefinedError("not an integer")
    return int(value)


def _bounded(value: Value) -> Value:
    """Returns the value, rounded if it is an exact number with too many digits."""
    if isinstance(value, Fraction):
        return value if _num_bits(value) <= MAX_BITS else number(value)
    if isinstance(value, tuple):
        return tuple(_bounded(part) for part in value)
    if not CONTEXT.isfinite(value):
        raise UndefinedError("not a finite number")
    return value


def _num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def add(first: Value, second: Value) -> Value:
    """Returns the sum of two numbers or two vectors."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return tuple(add(one, other) for one, other in zip(first, second, strict=True))
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return _bounded(first + second)
    return _bounded(number(first) + number(second))


def multiply(first: Value, second: Value) -> Value:
    """Returns the product of two numbers, of a number and a vector, or the dot product."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return dot(first, second)
    if isinstance(second, tuple):
        first, second = second, first
    if isinstance(first, tuple):
        return tuple(multiply(part, second) for part in first)
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return _bounded(first * second)
    return _bounded(number(first) * number(second))


def divide(first: Value, second: Value) -> Value:
    """Returns the quotient."""
    if isinstance(first, tuple):
        return tuple(divide(part, second) for part in first)
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return _bounded(first / second)
    return _bounded(number(first) / number(second))


def dot(first: Value, second: Value) -> Value:
    """Returns the dot product of two vectors."""
    value: Value = Fraction(0)
    for one, other in zip(first, second, strict=True):
        value = add(value, multiply(one, other))
    return value


def _cross(first: Value, second: Value) -> Value:
    r"""Returns the value of `\times`: the cross product of two vectors, or a product."""
    if not (isinstance(first, tuple) and isinstance(second, tuple)):
        return multiply(first, second)
    minors = []
    for row in range(3):
        one, other = (row + 1) % 3, (row + 2) % 3
        minors.append(
            _subtract(multiply(first[one], second[other]), multiply(first[other], second[one]))
        )
    return tuple(minors)


def negate(value: Value) -> Value:
    """Returns the negative."""
    return multiply(Fraction(-1), value)


def _subtract(first: Value, second: Value) -> Value:
    return add(first, negate(second))


def power(base: Value, exponent: Value, *, is_complex: bool) -> Value:
    """Returns a power. Of the roots of a negative number, only the odd ones are real.

    Raises:
        UndefinedError: The power does not exist, or |log2| of it is above MAX_LOG2.
    """
    if is_integer(exponent):
        return _integer_power(base, int(exponent))
    if isinstance(exponent, Fraction) and isinstance(base, Fraction) and base >= 0:
        root = _exact_root(base, exponent.denominator)
        if root is not None:
            return _integer_power(root, exponent.numerator)
    base_number, exponent_number = number(base), number(exponent)
    if not is_complex and base_number < 0:
        return _real_power_of_negative(base_number, exponent)
    if base_number == 0:
        if not exponent_number > 0:
            raise UndefinedError("a power of 0")
        return Fraction(0)
    _check_magnitude(base_number, exponent_number)
    return _bounded(CONTEXT.power(base_number, exponent_number))


def _integer_power(base: Value, exponent: int) -> Value:
    if base == 0 and exponent < 0:
        raise UndefinedError("division by 0")
    if isinstance(base, Fraction):
        if _num_bits(base) * abs(exponent) <= MAX_BITS:
            return base**exponent
        if abs(base) == 1:
            return base ** (exponent % 2)
    base = number(base)
    if base != 0:
        _check_magnitude(base, exponent)
    return _bounded(base**exponent)


def _check_magnitude(base: Value, exponent: Value) -> None:
    log2 = abs(CONTEXT.mag(base)) + 1
    if not log2 * abs(exponent) < MAX_LOG2:
        raise OutOfBoundsError("a power beyond the bounds")


def _real_power_of_negative(base: Value, exponent: Value) -> Value:
    if not isinstance(exponent, Fraction) or exponent.denominator % 2 == 0:
        raise UndefinedError("an even root of a negative number")
    value = power(-base, exponent, is_complex=False)
    return value if exponent.numerator % 2 == 0 else negate(value)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Returns the root of a number if it is rational and the degree is small."""
    if degree > 64:
        return None
    numerator = _integer_root(value.numerator, degree)
    denominator = _integer_root(value.denominator, degree)
    if numerator is None or denominator is None:
        return None
    return Fraction(numerator, denominator)


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    else:
        root = int(CONTEXT.nint(CONTEXT.root(CONTEXT.mpf(value), degree)))
    return root if root**degree == value else None


def _factorial(value: Value) -> Value:
    if is_integer(value):
        if value > MAX_FACTORIAL:
            raise OutOfBoundsError("the factorial of a large number")
        if value < 0:
            raise UndefinedError("the factorial of a negative number")
        return Fraction(math.factorial(int(value)))
    if not abs(number(value)) < MAX_GAMMA:
        raise OutOfBoundsError("the factorial of a large number")
    return CONTEXT.factorial(number(value))


def _double_factorial(value: Value) -> Value:
    n = _integer(value)
    if not 0 <= n <= MAX_FACTORIAL:
        raise UndefinedError("the double factorial of a large or negative number")
    return Fraction(math.prod(range(n, 0, -2)))


def _binomial(n: Value, k: Value) -> Value:
    if is_integer(k) and k >= 0:
        if is_integer(n) and n >= 0:
            if min(k, n - k) > MAX_FACTORIAL or n > 2**64:
                raise OutOfBoundsError("a large binomial coefficient")
            return Fraction(math.comb(int(n), int(k)))
        if k > 64:
            raise OutOfBoundsError("a large binomial coefficient")
        value: Value = Fraction(1)
        for index in range(int(k)):
            value = multiply(value, divide(_subtract(n, Fraction(index)), Fraction(index + 1)))
        return value
    quotient = divide(_factorial(n), _factorial(k))
    return divide(quotient, _factorial(_subtract(n, k)))


def _floor(value: Value) -> Value:
    value = _real(value)
    if isinstance(value, Fraction):
        return Fraction(math.floor(value))
    if not abs(value) < 2**200:
        raise OutOfBoundsError("floor of a large number")
    nearest = CONTEXT.nint(value)
    if abs(value - nearest) < CONTEXT.mpf(10) ** (-DIGITS // 2):  # an integer, but for rounding
        return Fraction(int(nearest))
    return Fraction(int(CONTEXT.floor(value)))


def _modulo(value: Value, modulus: Value) -> Value:
    quotient = _floor(divide(_real(value), _real(modulus)))
    return _subtract(value, multiply(modulus, quotient))


def _absolute(value: Value) -> Value:
    if isinstance(value, tuple):
        return power(dot(value, value), Fraction(1, 2), is_complex=False)
    return abs(value)


def _extremum(choose: Callable[..., Value], values: tuple[Value, ...]) -> Value:
    """Returns the largest or smallest value; the key avoids comparing Fraction with mpf."""
    return choose(values, key=lambda value: number(_real(value)))


def _sign(value: Value) -> Value:
    value = _real(value)
    return Fraction((value > 0) - (value < 0))


def _unknown_function(name: str, arguments: list[Value]) -> Value:
    """Returns the value of an unknown function such as f(x), a fixed nonlinear function."""
    weight = zlib.crc32(name.encode()) % 10_007
    total: Value = Fraction(weight, 11)
    for index, argument in enumerate(arguments):
        scaled = number(argument) * (weight % 13 + 2 * index + 3) / 7
        if not abs(scaled) < MAX_ANGLE:
            raise UndefinedError("a large argument")
        total = total + CONTEXT.sin(scaled) + scaled / (index + 3)
    return total


OPERATORS: dict[str, Callable[..., Value]] = {
    "+": lambda *terms: functools.reduce(add, terms),
    "*": lambda *factors: functools.reduce(multiply, factors),
    "cross": _cross,
    "/": divide,
    "neg": negate,
    "!": _factorial,
    "!!": _double_factorial,
    "binom": _binomial,
    "mod": _modulo,
    "abs": _absolute,
    "floor": _floor,
    "ceil": lambda value: negate(_floor(negate(value))),
    "sgn": _sign,
    "max": lambda *values: _extremum(max, values),
    "min": lambda *values: _extremum(min, values),
    "gcd": lambda *values: Fraction(math.gcd(*(_integer(value) for value in values))),
    "lcm": lambda *values: Fraction(math.lcm(*(_integer(value) for value in values))),
    "conj": lambda value: CONTEXT.conj(number(value)),
    "Re": lambda value: CONTEXT.re(number(value)),
    "Im": lambda value: CONTEXT.im(number(value)),
    "arg": lambda value: CONTEXT.arg(number(value)),
}
ELEMENTARY: dict[str, Callable[[Value], Value]] = {
    "sin": CONTEXT.sin,
    "cos": CONTEXT.cos,
    "tan": CONTEXT.tan,
    "cot": CONTEXT.cot,
    "sec": CONTEXT.sec,
    "csc": CONTEXT.csc,
    "sinh": CONTEXT.sinh,
    "cosh": CONTEXT.cosh,
    "tanh": CONTEXT.tanh,
    "coth": CONTEXT.coth,
    "sech": CONTEXT.sech,
    "csch": CONTEXT.csch,
    "arcsin": CONTEXT.asin,
    "arccos": CONTEXT.acos,
    "arctan": CONTEXT.atan,
    "arccot": lambda value: CONTEXT.pi / 2 - CONTEXT.atan(value),
    "arcsec": CONTEXT.asec,
    "arccsc": CONTEXT.acsc,
    "arcsinh": CONTEXT.asinh,
    "arccosh": CONTEXT.acosh,
    "arctanh": CONTEXT.atanh,
}
