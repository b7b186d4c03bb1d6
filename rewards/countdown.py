"""Countdown reward: does the answer make the target from the given numbers, each used exactly once?

Parsed, never evaluated.
"""

from __future__ import annotations

import ast
from collections import Counter
from fractions import Fraction

from grpo.types import Completion, Problem, Verdict
from rewards.verifier.parse import final_answer

MAX_CHARS = 200
SYMBOLS = {
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
    """The verdict on the final answer, or None for a problem that is no countdown.

    Needs `meta` with `numbers` and `target`.
    """
    if "numbers" not in problem.meta or "target" not in problem.meta:
        return None
    answer = final_answer(completion.text)
    if answer is None:
        return Verdict(value="wrong", reason="no final answer")
    return check(answer, problem.meta["numbers"], problem.meta["target"])


def check(answer: str, numbers: list[int], target: int) -> Verdict:
    """The verdict on an expression: `check("(7 - 3) * 5 = 20", [3, 5, 7], 20)` is correct.

    Exact fractions, + - * / only.
    """
    if len(answer) > MAX_CHARS:
        return Verdict(value="wrong", reason=f"longer than {MAX_CHARS} characters")
    for symbol, plain in SYMBOLS.items():
        answer = answer.replace(symbol, plain)
    expression, equals, tail = (part.strip() for part in answer.partition("="))
    if equals and tail != str(target):
        return Verdict(value="wrong", reason="the stated result is not the target")
    if not set(expression) <= set("0123456789+-*/() "):
        return Verdict(value="wrong", reason="other characters than numbers, + - * / and brackets")
    used: list[int] = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError) as error:
        return Verdict(value="wrong", reason=f"{type(error).__name__}: {error}")
    if Counter(used) != Counter(numbers):
        return Verdict(value="wrong", reason=f"uses {sorted(used)}")
    return (
        Verdict(value="correct")
        if value == target
        else Verdict(value="wrong", reason=f"makes {value}")
    )


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The exact value; collects the numbers on the way.

    Raises ValueError for anything but the four operations on integers.
    """
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, used)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, used)
        case ast.BinOp(
            left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as operation, right=right
        ):
            a, b = _value(left, used), _value(right, used)
            match operation:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
            return a / b
    raise ValueError(f"{type(getattr(node, 'op', node)).__name__} is not allowed")
