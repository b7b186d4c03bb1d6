"""Sums, differences and products of two numbers, with a worked solution.

A character-level model with a few million parameters can learn to write the solutions. The options
`terse` and `slip` make some solutions imperfect, for a cold start that reinforcement learning
improves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from grpo.data.common.files import check_split
from grpo.data.common.mixture import seeded_random
from grpo.data.common.procedural import Drawn, GeneratedProblems, check_range, draw_for_split
from grpo.types import Problem, UserError

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


# The keyword parameters are the options of the data set in a config.
def load(  # noqa: PLR0913
    split: str,
    *,
    seed: int,
    path: str | None = None,
    digits: int = 3,
    operations: Sequence[str] = ("+",),
    terms: int = 2,
    terse: float = 0.0,
    slip: int = 0,
    working: str = "columns",
    size: int = 100_000,
) -> Sequence[Problem]:
    """Returns problems such as `347+85=`. Differences are never negative.

    Problem i is a function of (split, seed, i) and the options. a+b and b+a count as the same
    content, which belongs to the same split for every seed.

    Args:
        split: `train` or `test`.
        seed: Seed of all random draws.
        path: Must be None: the problems are generated.
        digits: Number of digits of both operands, from 1 to 12.
        operations: One or more of `+`, `-` and `*`.
        terms: Number of operands. Only 2 is supported.
        terse: Probability of a solution whose thoughts only repeat the problem and whose answer is
            a guess.
        slip: Largest error of a guess; the error is uniform in [-slip, slip]. A guess is never
            negative.
        working: Notation of the thoughts. `columns`: digit by digit from the right with a carry,
            for models that are trained from scratch. `places`: by decimal places, as a pretrained
            model works; sums only.
        size: Number of problems.

    Raises:
        UserError: An option is invalid.
    """
    check_split("arithmetic", split)
    if path is not None:
        raise UserError("data.arithmetic: the problems are generated. Remove data.path.")
    _check_operations(operations)
    check_range("arithmetic.terms", terms, 2, 2)
    check_range("arithmetic.digits", digits, 1, 12)
    check_range("arithmetic.size", size, 1, 10**9)
    if not 0 <= terse <= 1:
        raise UserError(f"data.arithmetic.terse: got {terse!r}, expected a share from 0 to 1")
    check_range("arithmetic.slip", slip, 0, 10**12)
    _check_working(working, operations)
    generator = _Generator(
        split=split,
        seed=seed,
        digits=digits,
        operations=operations,
        terse=terse,
        slip=slip,
        working=working,
    )
    return GeneratedProblems(size, generator.problem)


def _check_operations(operations: Sequence[str]) -> None:
    if not operations or not set(operations) <= OPERATIONS.keys():
        raise UserError(
            f"data.arithmetic.operations: got {list(operations)}, expected one or more of +, -, *"
        )


def _check_working(working: str, operations: Sequence[str]) -> None:
    if working not in ("columns", "places"):
        raise UserError(f"data.arithmetic.working: got {working!r}, expected columns or places")
    if working == "places" and list(operations) != ["+"]:
        raise UserError(
            "data.arithmetic.working: places works for sums only. Set operations to ['+'], or "
            "working to columns."
        )


class Exercise(NamedTuple):
    """Two operands and an operation: `Exercise(347, "+", 85)`."""

    first: int
    operation: str
    second: int

    def __str__(self) -> str:
        """Returns the exercise as text, such as `347+85`."""
        return f"{self.first}{self.operation}{self.second}"

    def result(self) -> int:
        """Returns the value of the exercise."""
        return OPERATIONS[self.operation](self.first, self.second)


@dataclass(frozen=True, kw_only=True)
class _Generator:
    """Generates the problems of one split from the options of `load`."""

    split: str
    seed: int
    digits: int
    operations: Sequence[str]
    terse: float
    slip: int
    working: str

    def problem(self, index: int) -> Problem:
        exercise = draw_for_split(
            self._draw_exercise,
            "arithmetic",
            self.split,
            self.seed,
            index,
            self.digits,
            *self.operations,
        )
        return Problem(
            id=f"arithmetic/{self.split}/{index}",
            question=f"{exercise}=",
            answer=str(exercise.result()),
            source="arithmetic",
            solution=self._solution(exercise, index),
        )

    def _draw_exercise(self, random: Random) -> Drawn[Exercise]:
        operation = random.choice(self.operations)
        low = 10 ** (self.digits - 1) if self.digits > 1 else 0
        high = 10**self.digits
        first = random.randrange(low, high)
        second = random.randrange(low, high)
        smaller, larger = sorted((first, second))
        content = f"{smaller}{operation}{larger}"
        if operation == "-":  # never negative
            return Drawn(content, Exercise(larger, operation, smaller))
        return Drawn(content, Exercise(first, operation, second))

    def _solution(self, exercise: Exercise, index: int) -> str:
        random = seeded_random("arithmetic", "terse", self.split, self.seed, index)
        if self.terse > 0 and random.random() < self.terse:
            error = random.randint(-self.slip, self.slip)
            guess = max(exercise.result() + error, 0)
            return f"<think>{exercise}</think><answer>{guess}</answer>"
        if self.working == "places":
            thoughts = work_by_places(exercise)
        else:
            thoughts = work_by_columns(exercise)
        return f"<think>{thoughts}</think><answer>{exercise.result()}</answer>"


def work_by_columns(exercise: Exercise) -> str:
    """Returns the working of an exercise, from the rightmost digit to the leftmost.

    A step of a sum adds two digits and the carry; its result is the new carry and a digit of the
    sum: `347+85` -> "7+5+0=12 4+8+1=13 3+0+1=04".

    A difference borrows instead: `347-85` -> "7-5-0=02 4-8-0=16 3-0-1=02".

    A product adds up the partial products: `34*12` -> "34*2=68 34*10=340 68+340=408".
    """
    if exercise.operation == "*":
        return _partial_products(exercise.first, exercise.second)
    operation = exercise.operation
    sign = 1 if operation == "+" else -1
    first_digits, second_digits = _padded_digits(exercise)
    carry = 0
    steps = []
    for first, second in zip(reversed(first_digits), reversed(second_digits), strict=True):
        value = int(first) + sign * (int(second) + carry)
        new_carry = abs(value // 10)
        steps.append(f"{first}{operation}{second}{operation}{carry}={new_carry}{value % 10}")
        carry = new_carry
    return " ".join(steps)


def _partial_products(first: int, second: int) -> str:
    steps = []
    total = 0
    for power, digit in enumerate(reversed(str(second))):
        factor = int(digit) * 10**power
        product = first * factor
        steps.append(f"{first}*{factor}={product}")
        if power > 0:
            steps.append(f"{total}+{product}={total + product}")
        total += product
    return " ".join(steps)


def work_by_places(exercise: Exercise) -> str:
    """Returns the working of a sum by decimal places, from the leftmost place to the rightmost.

    The sums of the places are added up at the end: `47+85` -> "40+80=120 7+5=12 120+12=132".
    """
    first_digits, second_digits = _padded_digits(exercise)
    width = len(first_digits)
    steps = []
    place_sums = []
    for index in range(width):
        place = 10 ** (width - 1 - index)
        first = int(first_digits[index]) * place
        second = int(second_digits[index]) * place
        steps.append(f"{first}+{second}={first + second}")
        place_sums.append(first + second)
    total = place_sums[0]
    for place_sum in place_sums[1:]:
        steps.append(f"{total}+{place_sum}={total + place_sum}")
        total += place_sum
    return " ".join(steps)


def _padded_digits(exercise: Exercise) -> tuple[str, str]:
    """Returns the digits of both operands, the shorter one padded with zeros on the left."""
    width = max(len(str(exercise.first)), len(str(exercise.second)))
    return f"{exercise.first:0{width}}", f"{exercise.second:0{width}}"
