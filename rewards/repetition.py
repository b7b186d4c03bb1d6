"""Repetition penalty: 0 if no n-gram of a completion repeats, close to -1 if almost all do."""

from __future__ import annotations

import re

from grpo.types import Completion, Problem

# A Han character, a word or number, or a punctuation mark.
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+|[^\w\s]")


def reward(completion: Completion, problem: Problem, *, n: int = 20) -> float:
    """Returns minus the share of repeated `n`-grams of words in the completion.

    Source: the n-gram penalty of 2502.03373 section 4.2. The paper counts n-grams of tokens (n =
    40) and penalizes each token; this reward counts words and is one number per completion.
    """
    return -repeated_share(completion.text, n)


def repeated_share(text: str, n: int) -> float:
    """Returns the share of n-grams that occur earlier in the text, in time linear in its length.

    A text with fewer than `n` words has the share 0.

    Example: `repeated_share("a b a b a b", 2)` is 3/5.
    """
    words = WORD.findall(text)
    num_ngrams = len(words) - n + 1
    if num_ngrams <= 0:
        return 0.0
    distinct = {tuple(words[start : start + n]) for start in range(num_ngrams)}
    return 1 - len(distinct) / num_ngrams
