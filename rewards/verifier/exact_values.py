r"""Evaluates numbers and arithmetic in LaTeX exactly, as fractions.

Examples: `\frac{1}{2^{99}}`, `3\frac{1}{2}`, `1,000`, `3.2\times10^5`.

The input must be normalized (see `normalize` in latex.py). Variables and functions are not
supported. The size of all values is bounded.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import factorial

MAX_BITS = 20_000  # of a numerator or a denominator
MAX_FACTORIAL = 2_200  # largest n in n!
# A number with thousands separators, a decimal number, a LaTeX command, or any other character.
TOKEN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+|\\[a-z]+|\S)")
MULTIPLICATIONS = ("*", r"\times", r"\cdot")
DIVISIONS = ("/", r"\div")
CLOSING_BRACKET = {"(": ")", "{": "}"}


class TooLargeError(ValueError):
    """A prediction or its value exceeds a bound of the verifier. Such a prediction is wrong."""


def exact_value(text: str) -> Fraction | None:
    """Returns the exact value of an arithmetic expression in numbers, None for any other text.

    Two forms may have spaces between digits: mixed numbers (`3 1/2`) and thousands (`1 000`).

    Raises:
        TooLargeError: The value or an intermediate value exceeds MAX_BITS or MAX_FACTORIAL.
    """
    if re.fullmatch(r"-?\d+ \d+/\d+", text):  # 3 1/2
        text = re.sub(r" (\d+)/(\d+)", r"\\frac{\1}{\2}", text)
    elif re.fullmatch(r"-?\d{1,3}( \d{3})+", text):  # 1 000 000
        text = text.replace(" ", "")
    elif re.search(r"\d\s+[\d.]", text):
        return None
    parser = _Parser(TOKEN.findall(text))
    try:
        value = parser.parse_sum()
    except (SyntaxError, ZeroDivisionError):
        return None
    except RecursionError as error:
        raise TooLargeError("nested too deep") from error
    if parser.peek() != "":  # text after the expression
        return None
    return value


def _num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _within_bounds(value: Fraction) -> Fraction:
    """Returns `value`. Raises TooLargeError if it exceeds MAX_BITS."""
    if _num_bits(value) > MAX_BITS:
        raise TooLargeError(f"a number beyond {MAX_BITS} bits")
    return value


class _Parser:
    r"""A recursive descent parser that evaluates while it parses.

    The grammar, with one method per rule:

        sum     = product (("+" | "-") product)*
        product = signed (operator signed | factor)*
        signed  = ("+" | "-")* power
        power   = atom "!"* ("^" exponent)?
        atom    = number | integer "\frac" atom atom | "\frac" atom atom
                | "(" sum ")" | "{" sum "}"

    A factor is a power that begins with "(". An exponent is an atom, or a signed that begins with
    "-". All methods raise SyntaxError if the tokens do not match the grammar, ZeroDivisionError if
    a divisor is zero, and TooLargeError if a value exceeds the bounds.
    """

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0

    def peek(self) -> str:
        """Returns the next token without consuming it, "" at the end."""
        if self._position >= len(self._tokens):
            return ""
        return self._tokens[self._position]

    def _next(self) -> str:
        token = self.peek()
        self._position += 1
        return token

    def parse_sum(self) -> Fraction:
        value = self._parse_product()
        while self.peek() in ("+", "-"):
            if self._next() == "+":
                value = _within_bounds(value + self._parse_product())
            else:
                value = _within_bounds(value - self._parse_product())
        return value

    def _parse_product(self) -> Fraction:
        value = self._parse_signed()
        while True:
            token = self.peek()
            if token in DIVISIONS:
                self._next()
                value = _within_bounds(value / self._parse_signed())
            elif token in MULTIPLICATIONS:
                self._next()
                value = _within_bounds(value * self._parse_signed())
            elif token == "(":  # 2(3+4)
                value = _within_bounds(value * self._parse_power())
            else:
                return value

    def _parse_signed(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            if self._next() == "-":
                sign = -sign
        return sign * self._parse_power()

    def _parse_power(self) -> Fraction:
        base = self._parse_atom()
        while self.peek() == "!":
            self._next()
            base = _factorial(base)
        if self.peek() != "^":
            return base
        self._next()
        exponent = self._parse_signed() if self.peek() == "-" else self._parse_atom()
        if exponent.denominator != 1:
            raise SyntaxError("a root")
        if abs(exponent) * _num_bits(base) > MAX_BITS:
            raise TooLargeError(f"a power beyond {MAX_BITS} bits")
        return base ** int(exponent)

    def _parse_atom(self) -> Fraction:
        token = self._next()
        if token[:1].isdecimal() or (token[:1] == "." and len(token) > 1):
            value = Fraction(token.replace(",", ""))
            if self.peek() == r"\frac" and value.denominator == 1:  # a mixed number
                return value + self._parse_atom()
            return value
        if token == r"\frac":
            numerator = self._parse_atom()
            return numerator / self._parse_atom()
        if token in CLOSING_BRACKET:
            value = self.parse_sum()
            if self._next() == CLOSING_BRACKET[token]:
                return value
        raise SyntaxError(f"not a number: {token}")


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise SyntaxError("a factorial of a number that is not natural")
    if value > MAX_FACTORIAL:
        raise TooLargeError(f"factorial beyond {MAX_FACTORIAL}")
    return Fraction(factorial(int(value)))
