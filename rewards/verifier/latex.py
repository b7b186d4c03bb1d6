r"""Normalizes the spelling of answers.

Unicode characters, LaTeX variants and other notations get one spelling. Values are not interpreted:
`1/2` and `0.5` stay different.
"""

from __future__ import annotations

import re

from grpo.rewards.verifier.brackets import find_closing, with_braces
from grpo.rewards.verifier.characters import to_latex
from grpo.rewards.verifier.decimals import with_fractions
from grpo.rewards.verifier.replacements import REPLACEMENTS

DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degree\}")
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
MATH_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
FULL_STOP = re.compile(r"(?<!\.)[.。]\s*$")
# quotation marks, and a separator or line break at the end
ENDS = re.compile(r"^[\"“”„«»\s]+|(?:[\"“”»«\s,;]|(?<!\\)\\\\)+$")
SPACED_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d./])")  # 1 000 000
# 3.2e5 -> 3.2\times 10^{5}
SCIENTIFIC = re.compile(r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})$")
LONG_SPACE = re.compile(r"[ \t\r\f\v]{2,}")
MAX_FRAMES = 10
# Commands whose argument is shown unchanged except for a line or frame.
WRAPPER = re.compile(r"\\(?:underline|fbox|boxed|framebox|bm)(?![A-Za-z])\s*")


def normalize(text: str) -> str:
    r"""Returns the normalized spelling of an answer.

    In this order: Unicode becomes LaTeX; frames and REPLACEMENTS are applied; a full stop at the
    end, quotation marks, dollar signs (if their number is even), and `\(`, `\)`, `\[` and `\]` are
    removed; repeating decimals become fractions; degrees become radians if the answer has a
    trigonometric function; white space becomes single spaces; the arguments of `\frac` and `\sqrt`
    get braces.

    Examples: `$\dfrac12$.` -> `\frac{1}{2}`, `10,\!080` -> `10080`, `90°` -> `90\text{degree}`.
    """
    text = _without_frames(to_latex(LONG_SPACE.sub(" ", text)))
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = ENDS.sub("", text)
    text = FULL_STOP.sub("", text).strip()
    num_dollars = len(re.findall(r"(?<!\\)\$", text))
    if num_dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = MATH_DELIMITER.sub("", text)
    text = without_outer_braces(text.strip())
    text = SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = with_fractions(text)
    text = SPACED_THOUSANDS.sub(_without_spaces, text)
    if TRIGONOMETRIC.search(text):
        text = DEGREES.sub(r"(\1\\pi/180)", text)
    text = re.sub(r"\s+", " ", FULL_STOP.sub("", text.strip()))
    return with_braces(text).strip()


def _without_spaces(match: re.Match[str]) -> str:
    return match.group().replace(" ", "")


def _without_frames(text: str) -> str:
    r"""Removes WRAPPER commands and the braces of their arguments: `\fbox{5}` -> `5`."""
    for _ in range(MAX_FRAMES):
        match = WRAPPER.search(text)
        if match is None:
            break
        start = match.end()
        if text[start : start + 1] == "{":
            end = find_closing(text, start)
            if end < 0:
                break
            text = text[: match.start()] + text[start + 1 : end] + text[end + 1 :]
        else:
            text = text[: match.start()] + text[start:]
    return text


def without_outer_braces(text: str) -> str:
    """Removes braces around the whole text, which show nothing: `{5}` -> `5`."""
    while text.startswith("{") and len(text) > 2 and find_closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def as_words(text: str) -> str:
    r"""Returns text in lower case with single spaces, to compare words.

    `\text`, braces, dollar signs, full stops at the ends, and brackets around a single letter are
    removed.

    Examples: `\text{ (C) }`, `C.` and `c` -> "c"; `\text{Two  Points}` -> "two points".
    """
    text = re.sub(r"\\text|[{}$]", "", text).casefold()
    text = " ".join(text.split()).rstrip(" .")
    if re.fullmatch(r"\(\s*\w\s*\)", text):
        return text[1:-1].strip()
    return text
