"""Repetition penalty.

0 for a text whose n-grams are all different, towards -1 the more of them come again.
"""

from __future__ import annotations

import re

from grpo.types import Completion, Problem

WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+|[^\w\s]")  # a Han character, a word or number, a mark


def reward(completion: Completion, problem: Problem, *, n: int = 20) -> float:
    """Minus the share of the completion's `n`-grams of words that it said before.

    Source: the n-gram penalty of 2502.03373 section 4.2, there a token (n = 40); ours: one number a
    completion, -1 to 0.
    """
    return -repeated(completion.text, n)


def repeated(text: str, n: int) -> float:
    """The share of n-grams that came before: `repeated("a b a b a b", 2)` is 3/5.

    Linear in the text.
    """
    words = WORD.findall(text)
    total = len(words) - n + 1
    return 1 - len({tuple(words[i : i + n]) for i in range(total)}) / total if total > 0 else 0.0
