r"""Names of values on the left of `x = 5` or `x \in (1,2)`."""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo.rewards.verifier.latex import without_outer_braces
from grpo.rewards.verifier.syntax import FUNCTIONS
from grpo.rewards.verifier.words import MEANINGFUL_WORDS

# The left side of `x = 5` or `x \in (1,2)`: a letter, vector or word with an optional subscript, an
# unknown function (`f(x)`, `P(A)`), an angle (`\angle ABC`), a segment (`AB`), a quotient or sum of
# letters, an absolute value, a function of an angle (`\tan\theta`), or a tuple of letters.
LETTER = r"(?:[A-Za-z]|\\(?!not|neg|pm|ln|lg)[a-zA-Z]{2,7}|\\(?:text|vec|overline)\{[A-Za-z ]+\})"
SUBSCRIPT = r"(?:_\w|_\{\w+\})?'*"
NAME = (
    rf"{LETTER}{SUBSCRIPT}|[A-Z]{{2,4}}|m?\\angle ?[A-Z]+|[A-Za-z]{{3,}}"
    rf"|(?:\\?[A-Za-z]){SUBSCRIPT}(?:\^\{{-1\}})?\([^()=]{{1,20}}(?:\([^()=]{{1,20}}\))?\)"
    rf"|\\frac\{{{LETTER}\}}\{{{LETTER}\}}|{LETTER}/{LETTER}|{LETTER}(?: ?\+ ?{LETTER})+"
    rf"|\|[^|=\d]{{1,12}}\||\\(?:sin|cos|tan) ?\(?(?:\\angle ?)?(?:\\[a-z]+|[A-Z]+)\)?"
    rf"|\({LETTER}{SUBSCRIPT}(?: ?, ?{LETTER}{SUBSCRIPT})* ?\)"
)
ASSIGNMENT = re.compile(
    rf"(?P<name>{NAME}) ?(?P<sign>=|\\in(?![a-z])|\\approx)(?P<value>[^=<>]+|\\begin\{{cases\}}.*)"
)


class Assignment(NamedTuple):
    r"""The parts of `x = 5`, or of `x \in (1,2)`, which is a membership."""

    name: str
    value: str
    is_membership: bool


def read_assignment(text: str) -> Assignment | None:
    """Returns the parts of an assignment, None for other text.

    The letters of a tuple must be in ascending order: `(y,x) = (1,2)` says something else than
    (1,2).
    """
    match = ASSIGNMENT.fullmatch(text)
    if match is None:
        return None
    if not is_name(match["name"]):
        return None
    value = without_outer_braces(match["value"].strip())
    return Assignment(match["name"], value, is_membership=match["sign"] == r"\in")


def is_name(text: str) -> bool:
    """Returns whether text names a value, and is no function or word that changes the value."""
    word = re.sub(r"\\text|[{}\\ ]", "", text).lower()
    letters = re.findall(r"[A-Za-z]+(?:_\w+)?", text) if text.startswith("(") else []
    is_in_order = letters == sorted(letters) or "\\" in text  # (\rho, \theta, \phi)
    is_meaningful = word in MEANINGFUL_WORDS or word in FUNCTIONS or not is_in_order
    return re.fullmatch(NAME, text) is not None and not is_meaningful
