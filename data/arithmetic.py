"""Sums, differences and products of two numbers, with a worked solution.

A character model of a few million weights can learn the solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from data.common.files import check_split
from data.common.mixture import seeded
from data.common.procedural import Procedural, check_range, draw
from grpo.types import Problem, UserError

VALUE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def load(
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
    """`size` problems like `347+85=`, both operands of exactly `digits` digits.

    Differences are never negative.

    `working`: `columns`, right to left with a carry, which a model made from nothing can learn;
    `places`, as a pretrained one would do it. For a cold start of two habits: `terse` is the share
    of solutions that only repeat the sum in their thoughts and guess, and such a guess is off by up
    to `slip`, as the guesses of somebody who does not work it out are. Problem i depends on (seed,
    i, options) alone. a+b and b+a are one content, which is in train or in test for every seed.
    """
    check_split("arithmetic", split)
    if path is not None:
        raise UserError("data.arithmetic: problems are drawn; leave data.path out")
    if not operations or not set(operations) <= VALUE.keys():
        raise UserError(f"data.arithmetic.operations: got {list(operations)}; give some of +, -, *")
    check_range("arithmetic", "terms", terms, 2, 2)
    check_range("arithmetic", "digits", digits, 1, 12)
    check_range("arithmetic", "size", size, 1, 10**9)
    if not 0 <= terse <= 1:
        raise UserError(f"data.arithmetic.terse: got {terse!r}; give a share in 0..1")
    check_range("arithmetic", "slip", slip, 0, 10**12)
    if working not in WORKINGS or (working == "places" and list(operations) != ["+"]):
        raise UserError(
            f"data.arithmetic.working: got {working!r}; give columns, or places for sums alone"
        )

    def one(random: Random) -> tuple[str, tuple[int, str, int]]:
        operation = random.choice(operations)
        low = 10 ** (digits - 1) if digits > 1 else 0
        a, b = random.randrange(low, 10**digits), random.randrange(low, 10**digits)
        small, large = sorted((a, b))
        return f"{small}{operation}{large}", (large, operation, small) if operation == "-" else (
            a,
            operation,
            b,
        )

    def make(i: int) -> Problem:
        a, operation, b = draw(one, "arithmetic", split, seed, i, digits, *operations)
        answer = str(VALUE[operation](a, b))
        habit = seeded("arithmetic", "terse", split, seed, i)
        if terse > 0 and habit.random() < terse:
            guess = max(int(answer) + habit.randint(-slip, slip), 0)
            solution = f"<think>{a}{operation}{b}</think><answer>{guess}</answer>"
        else:
            solution = (
                f"<think>{WORKINGS[working](a, operation, b)}</think><answer>{answer}</answer>"
            )
        question = f"{a}{operation}{b}="
        return Problem(
            id=f"arithmetic/{split}/{i}",
            question=question,
            answer=answer,
            source="arithmetic",
            solution=solution,
        )

    return Procedural(size, make)


def scratchpad(a: int, operation: str, b: int) -> str:
    """The working, right to left.

    `347+85` -> "7+5+0=12 4+8+1=13 3+0+1=04": digit, digit, carry = new carry and digit.

    `347-85` -> "7-5-0=02 4-8-0=16 3-0-1=02" with borrows for carries; `34*12` -> "34*2=68 34*10=340
    68+340=408", the total kept.
    """
    if operation == "*":
        return _partial_products(a, b)
    width = max(len(str(a)), len(str(b)))
    sign = 1 if operation == "+" else -1
    carry = 0
    columns = []
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        value = int(x) + sign * (int(y) + carry)
        column = f"{x}{operation}{y}{operation}{carry}"
        carry = abs(value // 10)
        columns.append(f"{column}={carry}{value % 10}")
    return " ".join(columns)


def _partial_products(a: int, b: int) -> str:
    steps = []
    total = 0
    for power, digit in enumerate(reversed(str(b))):
        factor = int(digit) * 10**power
        steps.append(f"{a}*{factor}={a * factor}")
        if power > 0:
            steps.append(f"{total}+{a * factor}={total + a * factor}")
        total += a * factor
    return " ".join(steps)


def by_places(a: int, _: str, b: int) -> str:
    """A sum place by place, from the left, then put together.

    `47+85` -> "40+80=120 7+5=12 120+12=132".
    """
    width = max(len(str(a)), len(str(b)))
    pairs = [
        (int(x) * 10**p, int(y) * 10**p)
        for p, x, y in zip(range(width - 1, -1, -1), f"{a:0{width}}", f"{b:0{width}}", strict=True)
    ]
    steps = [f"{x}+{y}={x + y}" for x, y in pairs]
    total = sum(pairs[0])
    for x, y in pairs[1:]:
        steps.append(f"{total}+{x + y}={total + x + y}")
        total += x + y
    return " ".join(steps)


WORKINGS: dict[str, Callable[[int, str, int], str]] = {"columns": scratchpad, "places": by_places}
