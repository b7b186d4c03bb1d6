"""Compares two answers as mathematical expressions, with sympy.

latex2sympy2_extended converts LaTeX to sympy objects. It never evaluates text as code. Before the
conversion, `_check_bounds` rejects a prediction that sympy could take long to evaluate.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from grpo.types import Verdict
from rewards.verifier.exact_values import TooLargeError
from rewards.verifier.latex import find_closing, nesting_depth

# Bounds of a prediction. (+): the bound is added to the number in the gold answer.
MAX_DEPTH = 10  # (+) the time of sympy's parser doubles with each level
MAX_BRACKETS = 8  # (+) a product of n brackets has 2^n terms
MAX_BARS = 8  # (+) in |a||b| the parser searches for the opening bars
MAX_TERMS = 40  # (+)
MAX_EXPONENT = 400
MAX_POWER_PRODUCT = 30  # product of the exponents of brackets: it is 30 in ((x+1)^5)^6
# Text that sympy can take long to evaluate: binomials, sums, products, integrals, limits,
# determinants, environments, operators, factorials of large numbers or of expressions, and long
# numbers. Only text that is also in the gold answer is accepted. For a large binomial this includes
# its first four digits.
EXPENSIVE = re.compile(
    r"\\binom\{\d{4}|\\(?:sum|prod|i{1,3}nt|oint|lim|binom|det|begin|operatorname)(?![A-Za-z])"
    r"|\d{3,}!|[)}!]!|\d{300}"
)
# Factorials of short expressions, such as (2n)! and (d-k)!, are cheap.
CHEAP_FACTORIAL = re.compile(r"\((?:\d?[a-z](?: ?[+-] ?(?:\d|\d?[a-z]))?)\)!(?!!)")

# Values that differ by less than 10^-DIGITS are equal.
DIGITS = 100
# Points at which expressions are compared: the value of each symbol, in units of 1/97.
POINTS = ((131, 211, 83, 59), (-113, 41, -167, 229), (307, -53, 71, -197), (23, 17, 29, 37))


def compare_expressions(prediction: str, gold: str) -> Verdict:
    """Returns the verdict on a normalized answer, given the normalized gold answer.

    Raises:
        TooLargeError: The prediction exceeds a bound.
    """
    _check_bounds(prediction, gold)
    from math_verify import grader

    grader.logger.setLevel(logging.ERROR)  # no warnings that it runs without a time limit
    is_complex = _has_imaginary_unit(prediction) or _has_imaginary_unit(gold)
    # antlr, sympy and math_verify raise exceptions of many types.
    try:
        expected = _parse(gold, is_complex)
    except Exception as error:
        reason = f"cannot read the gold answer: {type(error).__name__}"
        return Verdict(value="undecided", reason=reason)
    try:
        return _compare_parsed(_parse(prediction, is_complex), expected)
    except Exception as error:
        return _wrong(f"cannot read the answer: {type(error).__name__}")


def _wrong(reason: str) -> Verdict:
    return Verdict(value="wrong", reason=reason)


def _has_imaginary_unit(text: str) -> bool:
    return re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text) is not None


def _compare_parsed(predicted: Any, expected: Any) -> Verdict:
    """Compares two sympy objects.

    - Two equations are equal if one is a multiple of the other, after all terms have been moved to
      one side.
    - A predicted equation does not equal an expected value.
    - Two expressions are equal if they have the same value (`_same_value`).
    - Everything else is compared by math_verify: sets, relations, and expressions for which
      `_same_value` has no result.

    Raises:
        Exception: sympy or math_verify fails, with any type of exception.
    """
    import sympy
    from math_verify import verify as math_verify

    is_equal: bool | None
    if isinstance(expected, sympy.Eq) and isinstance(predicted, sympy.Eq):
        ratio = sympy.simplify((predicted.lhs - predicted.rhs) / (expected.lhs - expected.rhs))
        is_equal = bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)
    elif isinstance(predicted, sympy.Eq) and not isinstance(expected, sympy.logic.boolalg.Boolean):
        return _wrong("an equation, not a value")
    else:
        is_equal = _same_value(predicted, expected)
    if is_equal is None:
        is_equal = math_verify(
            expected,
            predicted,
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    return Verdict(value="correct") if is_equal else _wrong("another value")


def _check_bounds(prediction: str, gold: str) -> None:
    """Raises TooLargeError for a prediction that sympy could take long to evaluate.

    The decision depends only on the texts, not on the clock, so it is the same on every machine.
    """
    for match in EXPENSIVE.finditer(CHEAP_FACTORIAL.sub("k", prediction)):
        if match.group() not in gold:
            raise TooLargeError(match.group()[:20])
    if nesting_depth(prediction) > MAX_DEPTH + nesting_depth(gold):
        raise TooLargeError("nested too deep")
    if prediction.count("|") > MAX_BARS + gold.count("|"):
        raise TooLargeError("too many bars")
    if prediction.count("(") > MAX_BRACKETS + gold.count("("):
        raise TooLargeError("too many brackets")
    if _num_signs(prediction) > MAX_TERMS + _num_signs(gold):
        raise TooLargeError("too many terms")
    _check_powers(prediction)


def _num_signs(text: str) -> int:
    return text.count("+") + text.count("-")


def _check_powers(text: str) -> None:
    """Checks the powers of a prediction.

    Raises:
        TooLargeError: A power in an exponent, an exponent above MAX_EXPONENT, or powers of brackets
            whose exponents have a product above MAX_POWER_PRODUCT.
    """
    power_product = 1
    for match in re.finditer(r"(?P<base_end>.)\s*\^\s*(?P<exponent>[{(]|-?\d+)?", text):
        exponent = match["exponent"] or ""
        if exponent in ("{", "("):
            start = match.end()
            exponent = text[start : find_closing(text, start - 1)]
        if re.search(r"[\d)}]\s*\^|\^.*\^", exponent):
            raise TooLargeError("a tower of powers")
        numbers = [int(digits) for digits in re.findall(r"\d{1,9}", exponent)]
        max_number = max(numbers, default=1)
        if match["base_end"] in ")}]":  # the base is a bracket
            power_product *= max(max_number, 1)
        if max_number > MAX_EXPONENT or power_product > MAX_POWER_PRODUCT:
            raise TooLargeError("a power")


def _parse(text: str, is_complex: bool) -> Any:
    """Converts LaTeX to a sympy object, with decimals as exact fractions.

    Args:
        text: A normalized answer.
        is_complex: True: `i` is the imaginary unit. False: all symbols are real.

    Raises:
        Exception: The text cannot be read. antlr and sympy raise exceptions of many types.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    # A prime is part of the name: f' becomes the symbol f_{p}.
    text = re.sub(r"(?<=[A-Za-z])(?:'|\^\{ ?\\prime ?\}|\^ ?\\prime)", "_{p}", text)
    # The remaining commas are thousands separators: collections have been split before.
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    value = latex2sympy(
        text,
        is_real=None if is_complex else True,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    fractions = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    value = value.xreplace(fractions)
    if is_complex:
        value = value.subs(sympy.Symbol("i"), sympy.I)
    return value


def _same_value(first: Any, second: Any) -> bool | None:
    """Returns whether two expressions have the same value, to 100 digits.

    Expressions with symbols are evaluated at four points. A point at which one of them is undefined
    is skipped, so (x^2-1)/(x-1) equals x+1.

    Returns None for sets and relations, and for expressions that are defined at too few points: at
    none, or at only one if they have symbols.
    """
    import sympy

    if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
        return None
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    num_agreeing = 0
    points: Sequence[Sequence[int]] = POINTS if symbols else [()]
    for point in points:
        values = _values_at(point, symbols)
        first_value = first.subs(values)
        second_value = second.subs(values)
        if not (_is_finite_number(first_value) and _is_finite_number(second_value)):
            continue
        if not _is_zero(first_value - second_value):
            return False
        num_agreeing += 1
    if num_agreeing < min(2, len(symbols) + 1):
        return None
    return True


def _values_at(point: Sequence[int], symbols: Sequence[Any]) -> dict[Any, Any]:
    """Returns the value of each symbol at a point.

    The numbers of the point are for the first four symbols. The next four symbols get twice these
    numbers, the next four three times, and so on.
    """
    import sympy

    values = {}
    for index, symbol in enumerate(symbols):
        number = point[index % len(point)] * (index // len(point) + 1)
        values[symbol] = sympy.Rational(number, 97)
    return values


def _is_finite_number(value: Any) -> bool:
    import sympy

    approximation = sympy.N(value, 5)
    return bool(approximation.is_number and approximation.is_finite)


def _is_zero(difference: Any) -> bool:
    """Returns whether |difference| is less than 10^-DIGITS. Rational numbers must be exactly 0."""
    import sympy

    if difference == 0:
        return True
    if difference.is_Rational:
        return False
    approximation = sympy.N(difference, 5, maxn=DIGITS + 20)
    return bool(abs(approximation) < sympy.Float(f"1e-{DIGITS}"))
