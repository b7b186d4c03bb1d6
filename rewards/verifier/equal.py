r"""Decides whether two answers are equal in value and kind.

The verdict is a pure function of the two texts: no clock, no randomness, no state. The rules are
applied in this order, and the first one that decides gives the verdict:

1. Size. A prediction that is too long is wrong. So is one that is nested too deep, unless it is the
   same text as the gold answer.
2. Spelling. The same text after normalization (latex.py) is correct.
3. Words. If the gold answer is words or the letter of a choice, the prediction must be the same
   words.
4. Numbers in a base, such as `664_7`. Digits and base must be the same.
5. Exact numbers, with or without a unit (exact_values.py, units.py). There is no tolerance.
6. Collections: lists, sets, tuples, intervals, unions and matrices (collection.py). They are
   compared element by element.
7. Everything else is compared as an expression in sympy (expressions.py).

A prediction is untrusted text. It is parsed, never evaluated as code. A prediction that exceeds a
bound on its size or on the size of its values is wrong. `undecided` means that the gold answer is
empty, too large or cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.types import Verdict
from rewards.verifier.collection import UNORDERED_KINDS, read_collection
from rewards.verifier.exact_values import TooLargeError, exact_value
from rewards.verifier.expressions import compare_expressions
from rewards.verifier.latex import as_words, nesting_depth, normalize
from rewards.verifier.units import split_unit

MAX_CHARS = 1000
MAX_DEPTH = 30  # of brackets

CORRECT = Verdict(value="correct")
# The left side of `x = 5` or `x \in (1,2)`: a letter, word or vector with an optional subscript and
# arguments (`f(x)`), an angle (`\angle ABC`), or a tuple of letters (`(x, y)`).
NAME = (
    r"(?:\\(?:text|vec|overrightarrow)\{[A-Za-z]+\}|\\?[A-Za-z]+)"
    r"(?:_\w|_\{\w+\})?(?:\([^()=,]{1,10}\))?"
    r"|\\angle ?[A-Z]+|\([A-Za-z](?:, ?[A-Za-z])*\)"
)
ASSIGNMENT = re.compile(rf"(?P<name>{NAME}) ?(?P<sign>=|\\in(?![a-z]))(?P<value>[^=<>]+)")
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in)(?![a-z])")
NUMBER_IN_BASE = re.compile(r"\(?(?P<digits>[0-9A-Za-z]+)\)?_(?P<base>\w|\{\d+\})")


def compare_answers(prediction: str, gold: str) -> Verdict:
    r"""Returns the verdict on a predicted answer. Never raises an exception.

    Args:
        prediction: The answer of a completion, without tags and box.
        gold: The gold answer.

    Example: `compare_answers("50/100", r"\frac12")` is correct.
    """
    if len(prediction) > MAX_CHARS:
        return _wrong(f"longer than {MAX_CHARS} characters")
    if gold.strip() and prediction.strip() == gold.strip():
        return CORRECT
    if nesting_depth(prediction) > MAX_DEPTH:
        return _wrong(f"nested deeper than {MAX_DEPTH}")
    prediction = normalize(prediction)
    gold = normalize(gold)
    if not prediction:
        return _wrong("empty answer")
    if not gold:
        return Verdict(value="undecided", reason="empty gold answer")
    try:
        return _compare(prediction, gold)
    except TooLargeError as error:
        return _wrong(f"too large: {error}")


def _wrong(reason: str) -> Verdict:
    return Verdict(value="wrong", reason=reason)


def _compare(prediction: str, gold: str) -> Verdict:
    """Applies rules 2 to 7 to normalized answers, and to the elements of collections.

    Raises:
        TooLargeError: The prediction exceeds a bound.
    """
    if _same_spelling(prediction, gold):
        return CORRECT
    prediction = _in_ascending_order(prediction)
    gold = _in_ascending_order(gold)
    if _is_words(gold):
        return CORRECT if as_words(prediction) == as_words(gold) else _wrong("other words")
    prediction, gold = _without_assignments(prediction, gold)
    verdict = _compare_in_base(prediction, gold)
    if verdict is None:
        verdict = _compare_numbers(prediction, gold)
    if verdict is None:
        verdict = _compare_collections(prediction, gold)
    if verdict is None:
        verdict = compare_expressions(prediction, gold)
    return verdict


def _same_spelling(prediction: str, gold: str) -> bool:
    r"""Returns whether two answers are the same text.

    Spaces are ignored, unless there is one between two digits: `3 1/2` is not `31/2`. If one of the
    answers has a `\text` and the gold answer has no other command, power or subscript, the answers
    are compared as words: `as_words` ignores case and `\text`.
    """
    if prediction == gold:
        return True
    has_spaced_digits = re.search(r"\d \d", prediction + "|" + gold) is not None
    if not has_spaced_digits and prediction.replace(" ", "") == gold.replace(" ", ""):
        return True
    if r"\text" not in prediction + gold:
        return False
    gold_words = as_words(gold)
    has_formula = re.search(r"[\\^_]", gold_words) is not None
    return as_words(prediction) == gold_words and not has_formula


def _in_ascending_order(text: str) -> str:
    r"""Returns a descending chain of relations in ascending order.

    Other text is returned unchanged.

    Example: `f(4)>f(1)\ge 2` -> `2 \le f(1) < f(4)`.
    """
    pieces = re.split(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))", text)
    if len(pieces) < 5 or "<" in pieces or r"\le" in pieces:
        return text
    reversed_relations = {">": "<", r"\ge": r"\le"}
    return " ".join(reversed_relations.get(piece, piece.strip()) for piece in reversed(pieces))


def _is_words(text: str) -> bool:
    r"""Returns whether a gold answer is words or the letter of a choice, not a formula.

    These count as words, if they have no digit: text that is completely inside `\text{}`; a letter
    from A to H, with or without brackets; yes, no and odd; four or more characters that are
    letters, spaces, apostrophes and hyphens, with three letters in a row.
    """
    is_text = re.fullmatch(r"\s*\\text\{[^{}]*\}\s*", text)
    is_plain_words = re.fullmatch(
        r"\(?[A-H]\)?|(?i:yes|no|odd)|(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z' -]{3,}", text
    )
    has_digit = re.search(r"\d", text)
    return bool(is_text or is_plain_words) and not has_digit


def _without_assignments(prediction: str, gold: str) -> tuple[str, str]:
    r"""Returns both answers without `x =` or `x \in`.

    - If both have one, it is removed from both, but only if the variable is the same.
    - If one has `x \in`, it is removed.
    - If one has `x =`, it is removed, unless the other answer is a relation such as `2x+y=3`.
    """
    in_prediction = ASSIGNMENT.fullmatch(prediction)
    in_gold = ASSIGNMENT.fullmatch(gold)
    if in_prediction and in_gold:
        if in_prediction["name"] != in_gold["name"]:
            return prediction, gold
        return in_prediction["value"].strip(), in_gold["value"].strip()
    if in_prediction and (in_prediction["sign"] != "=" or not RELATION.search(gold)):
        return in_prediction["value"].strip(), gold
    if in_gold and (in_gold["sign"] != "=" or not RELATION.search(prediction)):
        return prediction, in_gold["value"].strip()
    return prediction, gold


def _compare_in_base(prediction: str, gold: str) -> Verdict | None:
    """Compares numbers in a base, such as 4210_5. Returns None if neither answer has a base."""
    in_prediction = NUMBER_IN_BASE.fullmatch(prediction)
    in_gold = NUMBER_IN_BASE.fullmatch(gold)
    if in_prediction is None and in_gold is None:
        return None
    if in_prediction is None or in_gold is None:
        return _wrong("another number or base")
    same_digits = in_prediction["digits"].lstrip("0") == in_gold["digits"].lstrip("0")
    same_base = in_prediction["base"].strip("{}") == in_gold["base"].strip("{}")
    return CORRECT if same_digits and same_base else _wrong("another number or base")


def _compare_numbers(prediction: str, gold: str) -> Verdict | None:
    """Compares exact numbers, with or without a unit.

    - Two units must be the same. A unit of only one answer is ignored.
    - A prediction in percent equals a gold answer without a unit as a number or as a share: `25%`
      equals 25 and 0.25.
    - If one of the values is not a number, the values are compared without their units by all
      rules.

    Returns None if one of the answers is not a number and neither has a unit.

    Raises:
        TooLargeError: The prediction exceeds a bound.
    """
    expected = split_unit(gold)
    predicted = split_unit(prediction)
    if expected.unit and predicted.unit and expected.unit != predicted.unit:
        return _wrong(f"unit {predicted.unit}, not {expected.unit}")
    # In `(1,000)` the comma separates elements, not thousands.
    is_tuple = re.match(r"[(\[].*,", expected.value)
    try:
        expected_number = None if is_tuple else exact_value(expected.value)
    except TooLargeError as error:
        return Verdict(value="undecided", reason=f"gold answer: {error}")
    predicted_number = exact_value(predicted.value)
    if expected_number is None or predicted_number is None:
        if predicted.value == prediction and expected.value == gold:
            return None
        return _compare(predicted.value, expected.value)
    if predicted_number == expected_number:
        return CORRECT
    is_percentage = predicted.unit == "%" and not expected.unit
    if is_percentage and predicted_number / 100 == expected_number:
        return CORRECT
    return _wrong("another number")


def _compare_collections(prediction: str, gold: str) -> Verdict | None:
    """Compares lists, sets, tuples, intervals, unions and matrices, element by element.

    - The kinds must be the same. A list counts as a set; if an answer is a relation (`x<1 or x>3`),
      a list counts as a union instead.
    - The number of elements must be the same.
    - The order of elements matters in tuples, intervals and matrices, but not in lists, sets and
      unions.

    Returns None if the gold answer is one value and the prediction is no list, set or union, or if
    the prediction is a relation that may describe the gold collection.
    """
    expected = read_collection(gold)
    predicted = read_collection(prediction)
    if expected.kind == "":
        if predicted.kind in UNORDERED_KINDS:
            return _wrong("a collection, not one value")
        return None
    if predicted.kind == "" and RELATION.search(prediction):
        return None
    has_relation = RELATION.search(prediction + gold) is not None
    equivalent_kinds = {"list", "union"} if has_relation else {"list", "set"}
    same_kind = predicted.kind == expected.kind
    if not same_kind and {predicted.kind, expected.kind} != equivalent_kinds:
        return _wrong(f"{predicted.kind or 'one value'}, not {expected.kind}")
    if len(predicted.elements) != len(expected.elements):
        return _wrong(f"{len(predicted.elements)} elements, not {len(expected.elements)}")
    if expected.kind in UNORDERED_KINDS:
        return _compare_in_any_order(predicted.elements, expected.elements)
    return _compare_in_order(predicted.elements, expected.elements)


def _compare_in_order(predicted: Sequence[str], expected: Sequence[str]) -> Verdict:
    for predicted_element, expected_element in zip(predicted, expected, strict=True):
        verdict = _compare(predicted_element, expected_element)
        if verdict.value != "correct":
            return verdict
    return CORRECT


def _compare_in_any_order(predicted: Sequence[str], expected: Sequence[str]) -> Verdict:
    candidates = list(predicted)
    for element in expected:
        verdicts = [_compare(candidate, element) for candidate in candidates]
        values = [verdict.value for verdict in verdicts]
        if "correct" in values:
            del candidates[values.index("correct")]
        elif "undecided" in values:
            return verdicts[values.index("undecided")]
        else:
            return _wrong(f"no element equals {element}")
    return CORRECT
