"""Countdown reward: does the answer reach the target, with each given number used exactly once?

The answer is parsed into a syntax tree and computed in exact fractions. It is never evaluated as
code.
"""

from __future__ import annotations

import ast
from collections import Counter
from fractions import Fraction

from grpo.types import Completion, Problem, Verdict
from rewards.verifier.parse import final_answer
from rewards.verifier.verdicts import CORRECT, wrong

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


def reward(completion: Completion, problem: Problem) -> Verdict | None:
    """Returns the verdict on the completion's final answer.

    Returns None if the problem is no countdown problem: `problem.meta` must have `numbers` and
    `target`.
    """
    if "numbers" not in problem.meta or "target" not in problem.meta:
        return None
    answer = final_answer(completion.text)
    if answer is None:
        return wrong("no final answer")
    return check_expression(answer, problem.meta["numbers"], problem.meta["target"])


def check_expression(answer: str, numbers: list[int], target: int) -> Verdict:
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
