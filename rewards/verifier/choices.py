"""Reads the letter of a choice from an answer such as `(b) 42`."""

from __future__ import annotations

import re

from grpo.rewards.verifier.words import MEANINGFUL_WORDS

# A letter with an optional introduction and, after punctuation, an optional text, such as
# `the answer is (b) 42`. It is matched against the result of `as_words`, which is in lower case.
LETTER = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|choice|option)(?: is)?:? ?)?"
    r"\(?(?P<letter>[a-z])(?:[).:,]+|$)\s*(?P<text>.*)"
)


def chosen_letter_of(words: str) -> str | None:
    """Returns the letter in upper case, None if the words choose none or several.

    Example: `chosen_letter_of("(b) 42")` is "B".
    """
    match = LETTER.fullmatch(words)
    if match is None:
        return None
    following = set(re.findall(r"[a-z']+", match["text"]))
    # "a" can be an article: (b) a circle
    is_other_letter = re.search(r"(?<![a-z'])(?:[b-h](?![a-z'])|a(?! [a-z]))", match["text"])
    if is_other_letter or following & MEANINGFUL_WORDS or "," in match.group()[:3]:
        return None
    return match["letter"].upper()
