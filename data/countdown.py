"""Countdown: make a target from given numbers, each used exactly once, with + - * /.

Solvable by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import NamedTuple

from data.common.files import check_split
from data.common.procedural import Procedural, check_range, draw
from grpo.types import Problem, UserError


class Drawn(NamedTuple):
    """`Drawn([3, 5, 7], 22, "3 * 5 + 7", "3*5=15 15+7=22")`."""

    numbers: list[int]
    target: int
    expression: str
    steps: str


def load(
    split: str,
    *,
    seed: int,
    path: str | None = None,
    min_numbers: int = 3,
    max_numbers: int = 4,
    max_number: int = 99,
    max_target: int = 100,
    size: int = 100_000,
) -> Sequence[Problem]:
    """Returns `size` problems in TinyZero's words.

    A problem has min_numbers..max_numbers numbers in 1..max_number and a target in 1..max_target.

    Problem i depends on (seed, i, options) alone. The same numbers and target are in train or in
    test for every seed.
    """
    check_split("countdown", split)
    if path is not None:
        raise UserError("data.countdown: problems are drawn; leave data.path out")
    check_range("countdown", "max_numbers", max_numbers, 2, 8)
    check_range("countdown", "min_numbers", min_numbers, 2, max_numbers)
    check_range("countdown", "max_number", max_number, 1, 10**6)
    check_range("countdown", "max_target", max_target, 1, 10**9)
    check_range("countdown", "size", size, 1, 10**9)

    def one(random: Random) -> tuple[str, Drawn] | None:
        drawn = _draw(
            random,
            [
                random.randint(1, max_number)
                for _ in range(random.randint(min_numbers, max_numbers))
            ],
        )
        if drawn is None or not 1 <= drawn.target <= max_target:
            return None
        return f"{sorted(drawn.numbers)} {drawn.target}", drawn

    def make(i: int) -> Problem:
        numbers, target, expression, steps = draw(
            one, "countdown", split, seed, i, min_numbers, max_numbers, max_number, max_target
        )
        return Problem(
            id=f"countdown/{split}/{i}",
            question=f"Using the numbers {numbers}, create an equation that "
            f"equals {target}. You can use basic arithmetic operations "
            "(+, -, *, /) and each number can only be used once.",
            answer=expression,
            source="countdown",
            solution=f"<think>{steps}</think><answer>{expression}</answer>",
            meta={"numbers": numbers, "target": target},
        )

    return Procedural(size, make)


def _draw(random: Random, numbers: list[int]) -> Drawn | None:
    """A random expression over all the numbers; None if it divides by zero or is no integer."""
    terms = [(Fraction(n), str(n)) for n in numbers]
    steps = []
    while len(terms) > 1:
        (a, left), (b, right) = (
            terms.pop(random.randrange(len(terms))),
            terms.pop(random.randrange(len(terms))),
        )
        operation = random.choice("+-*/")
        if operation == "/" and b == 0:
            return None
        value = {"+": a + b, "-": a - b, "*": a * b}[operation] if operation != "/" else a / b
        steps.append(f"{_show(a)}{operation}{_show(b)}={value}")
        terms.append((value, f"({left} {operation} {right})"))
    value, expression = terms[0]
    return (
        Drawn(numbers, int(value), expression[1:-1], " ".join(steps))
        if value.denominator == 1
        else None
    )


def _show(value: Fraction) -> str:
    """`-3` and `2/3` in brackets, so that a step reads only one way."""
    return str(value) if value >= 0 and value.denominator == 1 else f"({value})"
