r"""Exact values of plain numbers and arithmetic in LaTeX, as fractions.

Examples: `\frac{1}{2^{99}}`, `3\frac{1}{2}`, `1,000`, `3.2\times10^5`.

Reads normalised text only (see `normalise` in latex.py). Recursive descent with bounds on size;
knows no variables and no functions.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import factorial

MAX_BITS = 20_000  # of any numerator or denominator
MAX_FACTORIAL = 2_200
TOKEN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+|\\[a-z]+|\S)")
PRODUCTS = {"*": False, r"\times": False, r"\cdot": False, "/": True, r"\div": True}
CLOSING = {"(": ")", "{": "}"}


class TooLarge(ValueError):
    """A value beyond the bounds: wrong by rule."""


def exact(text: str) -> Fraction | None:
    """The value of an arithmetic expression in numbers alone, or None for anything else.

    Raises TooLarge.
    """
    if re.fullmatch(r"-?\d+ \d+/\d+", text):  # a mixed number, 3 1/2
        text = re.sub(r" (\d+)/(\d+)", r"\\frac{\1}{\2}", text)
    elif re.fullmatch(r"-?\d{1,3}( \d{3})+", text):  # 1 000 000
        text = text.replace(" ", "")
    elif re.search(r"\d\s+[\d.]", text):
        return None
    reader = _Reader(TOKEN.findall(text))
    try:
        value = reader.total()
    except (SyntaxError, ZeroDivisionError):
        return None
    except RecursionError as error:
        raise TooLarge("nested too deep") from error
    return value if reader.peek() == "" else None


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise TooLarge(f"a number beyond {MAX_BITS} bits")
    return value


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def total(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = _bounded(
                value + self.product() if self.next() == "+" else value - self.product()
            )
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while (token := self.peek()) in PRODUCTS or token == "(":
            divides = token != "(" and PRODUCTS[self.next()]
            factor = self.power() if token == "(" else self.signed()
            value = _bounded(value / factor if divides else value * factor)
        return value

    def signed(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.next() == "-" else sign
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while self.peek() == "!":
            self.next()
            if base.denominator != 1 or base < 0:
                raise SyntaxError("factorial of no natural number")
            if base > MAX_FACTORIAL:
                raise TooLarge(f"factorial beyond {MAX_FACTORIAL}")
            base = Fraction(factorial(int(base)))
        if self.peek() != "^":
            return base
        self.next()
        exponent = self.signed() if self.peek() == "-" else self.atom()
        if exponent.denominator != 1:
            raise SyntaxError("a root")
        if abs(exponent) * _bits(base) > MAX_BITS:
            raise TooLarge(f"a power beyond {MAX_BITS} bits")
        return base ** int(exponent)

    def atom(self) -> Fraction:
        token = self.next()
        if token[:1].isdecimal() or (token[:1] == "." and len(token) > 1):
            value = Fraction(token.replace(",", ""))
            # mixed
            return (
                value + self.atom() if self.peek() == r"\frac" and value.denominator == 1 else value
            )
        if token == r"\frac":
            return self.atom() / self.atom()
        if token in CLOSING:
            value = self.total()
            if self.next() == CLOSING[token]:
                return value
        raise SyntaxError(f"not a number: {token}")
