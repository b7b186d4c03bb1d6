"""Countdown reward: does the answer reach the target, with each given number used exactly once?

The answer is parsed into a syntax tree and computed in exact fractions. It is never evaluated as
code. The numbers and the target of a problem are integers; other spellings, such as text, are
converted by `read_problem` when the problems are loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from grpo.rewards.verifier.parse import final_answer
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.types import Completion, Problem, Verdict

MAX_CHARS = 200
ALLOWED_CHARS = frozenset("0123456789+-*/() ")
# Other spellings of the operators. Dollar signs are removed.
REPLACEMENTS = {
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    "$": "",
}
INTEGER = re.compile(r"[+-]?[0-9]{1,18}(?:\.0{1,9})?")  # 3, -3, 22.0


def reward(completion: Completion, problem: Problem) -> Verdict | None:
    """Returns the verdict on the completion's final answer.

    Returns None if the problem is no countdown problem: `problem.meta` must have `numbers` and
    `target`. The verdict is undecided if `read_problem` cannot read them.
    """
    if not _is_countdown(problem):
        return None
    try:
        meta = read_problem(problem).meta
    except ValueError as error:
        return Verdict(value="undecided", reason=f"gold answer: {error}")
    answer = final_answer(completion.text)
    if answer is None:
        return wrong("no final answer")
    return check_expression(answer, meta["numbers"], meta["target"])


def read_problem(problem: Problem) -> Problem:
    """Returns a problem with `meta["numbers"]` as a list of int and `meta["target"]` as an int.

    An integer may also be text (`"22"`), an integral float or a number of numpy. The numbers may be
    a list, a tuple or an array of them, or one text such as `"[3, 5, 7]"`, `"3, 5, 7"` or
    `"3 5 7"`. A problem without both fields is returned unchanged.

    Raises:
        ValueError: A field has another value. A number is negative: expressions have no negative
            numbers, so that no answer can use it.
    """
    if not _is_countdown(problem):
        return problem
    numbers = _read_numbers(problem.meta["numbers"])
    target = _read_integer(problem.meta["target"], "target")
    return dataclasses.replace(problem, meta={**problem.meta, "numbers": numbers, "target": target})


def _is_countdown(problem: Problem) -> bool:
    return "numbers" in problem.meta and "target" in problem.meta


def _read_numbers(value: object) -> list[int]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1].strip()
        values: object = re.split(r"\s*,\s*|\s+", text) if text else []
    elif hasattr(value, "tolist"):
        values = value.tolist()  # an array of numpy
    else:
        values = value
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"numbers: got {value!r}, expected a list of integers")
    numbers = [_read_integer(item, "numbers") for item in values]
    if min(numbers) < 0:
        raise ValueError(f"numbers: got {min(numbers)}, expected no negative number")
    return numbers


def _read_integer(value: object, field: str) -> int:
    number = value.item() if hasattr(value, "item") else value  # a number of numpy
    if isinstance(number, str) and INTEGER.fullmatch(number.strip()):
        return int(number.strip().partition(".")[0])
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    raise ValueError(f"{field}: got {value!r}, expected an integer")


def check_expression(answer: str, numbers: Sequence[int], target: int) -> Verdict:
    """Returns the verdict on an expression.

    The expression may consist of integers, + - * / and brackets. It must have the value `target`
    and use each of `numbers` exactly once. The result may follow it (`= 20`) and must then be the
    target.

    Example: `check_expression("(7 - 3) * 5 = 20", [3, 5, 7], 20)` is correct.
    """
    if len(answer) > MAX_CHARS:
        return wrong(f"longer than {MAX_CHARS} characters")
    for symbol, replacement in REPLACEMENTS.items():
        answer = answer.replace(symbol, replacement)
    expression, equals_sign, result = answer.partition("=")
    expression = expression.strip()
    if equals_sign and result.strip() != str(target):
        return wrong("the stated result is not the target")
    if not set(expression) <= ALLOWED_CHARS:
        return wrong("other characters than numbers, + - * / and brackets")
    used: list[int] = []
    try:
        value = _evaluate(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError) as error:
        return wrong(f"{type(error).__name__}: {error}")
    if Counter(used) != Counter(numbers):
        return wrong(f"uses {sorted(used)}")
    if value != target:
        return wrong(f"makes {value}")
    return CORRECT


def _evaluate(node: ast.expr, used: list[int]) -> Fraction:
    """Returns the exact value of a syntax tree and appends its numbers to `used`.

    Raises:
        ValueError: The tree has anything but integers, + - * / and signs.
        ZeroDivisionError: A divisor is zero.
    """
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, used)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand, used)
        case ast.BinOp(
            left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as operation, right=right
        ):
            return _apply(operation, _evaluate(left, used), _evaluate(right, used))
    raise ValueError(f"{type(getattr(node, 'op', node)).__name__} is not allowed")


def _apply(operation: ast.operator, first: Fraction, second: Fraction) -> Fraction:
    if isinstance(operation, ast.Add):
        return first + second
    if isinstance(operation, ast.Sub):
        return first - second
    if isinstance(operation, ast.Mult):
        return first * second
    return first / second
