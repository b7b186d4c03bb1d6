"""Countdown: reach a target from given numbers, each used exactly once, with + - * /.

Every problem is solvable, because its target is the value of a random expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import NamedTuple

from grpo.data.common.files import check_split
from grpo.data.common.procedural import Drawn, GeneratedProblems, check_range, draw_for_split
from grpo.types import Problem, UserError


# The keyword parameters are the options of the data set in a config.
def load(  # noqa: PLR0913
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
    """Returns problems with the wording of TinyZero.

    Problem i is a function of (split, seed, i) and the options. The same numbers and target belong
    to the same split for every seed.

    Args:
        split: `train` or `test`.
        seed: Seed of all random draws.
        path: Must be None: the problems are generated.
        min_numbers: Fewest numbers of a problem, at least 2.
        max_numbers: Most numbers of a problem, at most 8.
        max_number: Largest number; the smallest is 1.
        max_target: Largest target; the smallest is 1.
        size: Number of problems.

    Raises:
        UserError: An option is invalid.
    """
    check_split("countdown", split)
    if path is not None:
        raise UserError("data.countdown: the problems are generated. Remove data.path.")
    check_range("countdown.max_numbers", max_numbers, 2, 8)
    check_range("countdown.min_numbers", min_numbers, 2, max_numbers)
    check_range("countdown.max_number", max_number, 1, 10**6)
    check_range("countdown.max_target", max_target, 1, 10**9)
    check_range("countdown.size", size, 1, 10**9)
    generator = _Generator(
        split=split,
        seed=seed,
        min_numbers=min_numbers,
        max_numbers=max_numbers,
        max_number=max_number,
        max_target=max_target,
    )
    return GeneratedProblems(size, generator.problem)


class _Puzzle(NamedTuple):
    """Numbers and target, with a solution.

    `steps` are the intermediate results of the expression, one per operation.

    Example: `_Puzzle([3, 5, 7], 22, "(3 * 5) + 7", "3*5=15 15+7=22")`.
    """

    numbers: list[int]
    target: int
    expression: str
    steps: str


@dataclass(frozen=True, kw_only=True)
class _Generator:
    """Generates the problems of one split from the options of `load`."""

    split: str
    seed: int
    min_numbers: int
    max_numbers: int
    max_number: int
    max_target: int

    def problem(self, index: int) -> Problem:
        puzzle = draw_for_split(
            self._draw_puzzle,
            "countdown",
            self.split,
            self.seed,
            index,
            self.min_numbers,
            self.max_numbers,
            self.max_number,
            self.max_target,
        )
        return Problem(
            id=f"countdown/{self.split}/{index}",
            question=f"Using the numbers {puzzle.numbers}, create an equation that "
            f"equals {puzzle.target}. You can use basic arithmetic operations "
            "(+, -, *, /) and each number can only be used once.",
            answer=puzzle.expression,
            source="countdown",
            solution=f"<think>{puzzle.steps}</think><answer>{puzzle.expression}</answer>",
            meta={"numbers": puzzle.numbers, "target": puzzle.target},
        )

    def _draw_puzzle(self, random: Random) -> Drawn[_Puzzle] | None:
        count = random.randint(self.min_numbers, self.max_numbers)
        numbers = [random.randint(1, self.max_number) for _ in range(count)]
        puzzle = _random_puzzle(random, numbers)
        if puzzle is None or not 1 <= puzzle.target <= self.max_target:
            return None
        return Drawn(f"{sorted(puzzle.numbers)} {puzzle.target}", puzzle)


class _Term(NamedTuple):
    value: Fraction
    expression: str


def _random_puzzle(random: Random, numbers: list[int]) -> _Puzzle | None:
    """Combines random pairs of terms until one term remains.

    Returns None if a divisor is zero or the result is not an integer.
    """
    terms = [_Term(Fraction(number), str(number)) for number in numbers]
    steps = []
    while len(terms) > 1:
        first = terms.pop(random.randrange(len(terms)))
        second = terms.pop(random.randrange(len(terms)))
        operation = random.choice("+-*/")
        if operation == "/" and second.value == 0:
            return None
        value = _apply(operation, first.value, second.value)
        steps.append(f"{_format(first.value)}{operation}{_format(second.value)}={value}")
        terms.append(_Term(value, f"({first.expression} {operation} {second.expression})"))
    result = terms[0]
    if result.value.denominator != 1:
        return None
    expression = result.expression[1:-1]  # without the outer brackets
    return _Puzzle(numbers, int(result.value), expression, " ".join(steps))


def _apply(operation: str, first: Fraction, second: Fraction) -> Fraction:
    if operation == "+":
        return first + second
    if operation == "-":
        return first - second
    if operation == "*":
        return first * second
    return first / second


def _format(value: Fraction) -> str:
    """Returns the value, in brackets if it is negative or a fraction: `5`, `(-3)`, `(2/3)`.

    Without brackets, a step such as `(-3)-(2/3)=-11/3` would be ambiguous.
    """
    if value >= 0 and value.denominator == 1:
        return str(value)
    return f"({value})"
