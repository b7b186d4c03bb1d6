"""Repetition penalty: 0 if no n-gram of a completion repeats, close to -1 if almost all do."""

from __future__ import annotations

import re

from grpo.rewards.verifier.invisible import INVISIBLE
from grpo.types import Completion, Problem

MAX_WORD = 20  # a longer series of letters and digits counts by characters
MAX_WHITE_SPACE = 100  # a longer series of white space, which is no indentation, does so, too
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han.
NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# Marks between the letters of a word, among them the vowel signs of Indian scripts.
MARKS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0903\u093a-\u094f\u0980-\u0dff"
# A word or number, white space, or any other character.
TOKEN = re.compile(rf"(?:[^\W_{NO_SPACES}]|[{MARKS}])+|\s+|.", re.DOTALL)


def reward(completion: Completion, problem: Problem, *, n: int = 20) -> float:
    """Returns minus the share of repeated `n`-grams of words in the completion.

    Source: the n-gram penalty of 2502.03373 section 4.2. The paper counts n-grams of tokens (n =
    40) and penalizes each token; this reward counts words and is one number per completion.
    """
    return -repeated_share(completion.text, n)


def repeated_share(text: str, n: int) -> float:
    """Returns the share of n-grams that occur earlier in the text, in time linear in its length.

    These count as a word: a word or number; a punctuation mark or symbol; each character of a
    script without spaces; each character of a series of more than MAX_WORD letters and digits, or
    of more than MAX_WHITE_SPACE characters of white space. Other white space, invisible characters
    and upper case make no difference, but each invisible character behind another one counts as a
    repeated n-gram.

    A text with fewer than `n` words and without invisible characters has the share 0.

    Example: `repeated_share("a b a b a b", 2)` is 3/5.
    """
    words, num_invisible = _words(text)
    num_ngrams = max(len(words) - n + 1, 0)
    if num_ngrams + num_invisible == 0:
        return 0.0
    # Hashes, because the n-grams of a long text would take gigabytes.
    distinct = {hash(tuple(words[start : start + n])) for start in range(num_ngrams)}
    return 1 - len(distinct) / (num_ngrams + num_invisible)


def _words(text: str) -> tuple[list[str], int]:
    """Returns the words of a text and its number of invisible characters behind another one."""
    words: list[str] = []
    num_invisible = 0
    visible_parts = []
    start = 0
    for invisible in INVISIBLE.finditer(text):
        visible_parts.append(text[start : invisible.start()])
        num_invisible += len(invisible.group()) - 1
        start = invisible.end()
    visible_parts.append(text[start:])
    for token in TOKEN.finditer("".join(visible_parts).lower()):
        word = token.group()
        max_length = MAX_WHITE_SPACE if word.isspace() else MAX_WORD
        if len(word) > max_length:
            words.extend(word)
        elif not word.isspace():
            words.append(word)
    return words, num_invisible
