"""Characters that show nothing, such as the zero-width space and the Hangul filler.

A policy can write them where a rule expects text, or between letters to hide a word from a rule.
"""

from __future__ import annotations

import re
import unicodedata

# Ranges for a pattern in brackets. White space is not part of them.
CONTROLS = r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"
FORMATS = (  # category Cf without the visible signs of Arabic, Syriac and Kaithi
    r"\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U00013430-\U00013438\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
FILLERS = r"\u115f\u1160\u2800\u3164\uffa0"  # by their category letters and a symbol
MARKS = r"\u034f\u17b4\u17b5\u180b-\u180d\u180f\ufe00-\ufe0f"  # among them variation selectors
INVISIBLE = re.compile(f"[{CONTROLS}{FORMATS}{FILLERS}{MARKS}]+")
# Unicode categories that show nothing by themselves: marks, controls, formats, surrogates,
# private use, unassigned, separators.
EMPTY_CATEGORIES = frozenset({"M", "C", "Z"})


def without_invisible(text: str) -> str:
    r"""Returns the text without characters that show nothing, except white space.

    Example: `without_invisible("a\u200bb c")` is "ab c".
    """
    return INVISIBLE.sub("", text)


def is_blank(text: str) -> bool:
    r"""Returns whether a text shows nothing.

    It has only white space, invisible characters, and marks without a letter to stand on.

    Examples: `is_blank(" \u200b\u3164")` is true, `is_blank(".")` is false.
    """
    visible = without_invisible(text)
    return all(unicodedata.category(char)[0] in EMPTY_CATEGORIES for char in visible)
