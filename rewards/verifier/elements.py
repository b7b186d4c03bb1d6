"""Compares lists, sets, tuples, intervals, unions, matrices and ratios by their elements."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from grpo.rewards.verifier.collection import UNORDERED_KINDS, Collection, read_collection
from grpo.rewards.verifier.expressions import exact_value
from grpo.rewards.verifier.names import read_assignment
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.types import Verdict

MAX_REPEATED = 20  # largest size of a set in which elements may be repeated
INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])")
Compare = Callable[[str, str], Verdict]  # of a predicted and an expected element


def compare_collections(prediction: str, gold: str, compare: Compare) -> Verdict | None:
    """Compares lists, sets, tuples, intervals, unions and matrices, element by element.

    - The kinds must be the same. A list counts as a set; if an answer has inequalities (`x<1 or
      x>3`), a list counts as a union instead. A tuple counts as a matrix of one column.
    - The number of elements must be the same, except in sets.
    - The order of elements matters in tuples, intervals and matrices, but not in lists, sets and
      unions.

    Args:
        prediction: A normalized answer.
        gold: The normalized gold answer.
        compare: Compares two elements.

    Returns:
        None if the gold answer is one value and the prediction is no list, set or union.
    """
    expected = read_collection(gold)
    predicted = read_collection(prediction)
    if expected.kind == "":
        is_collection = predicted.kind in UNORDERED_KINDS
        return wrong("a collection, not one value") if is_collection else None
    if expected.kind == "()" and re.match(r"[A-Z]\(", prediction):  # a point: P(1,2)
        predicted = read_collection(prediction[1:])
    verdict = _compare_named_values(predicted, expected, compare)
    if verdict is None:
        has_inequality = INEQUALITY.search(prediction + gold) is not None
        verdict = _compare_kinds(predicted, expected, has_inequality=has_inequality)
    if verdict is None:
        verdict = _compare_elements(predicted, expected, compare)
    return verdict


def _compare_kinds(
    predicted: Collection, expected: Collection, *, has_inequality: bool
) -> Verdict | None:
    """Returns the verdict if the kinds are not equivalent, None if they are."""
    if has_inequality and predicted.connector != expected.connector:
        return wrong("`and` in place of `or`, or the reverse")
    column = f"matrix {[1] * len(expected.elements)}"
    equivalent_kinds = (
        {"list", "union"} if has_inequality else {"list", "set"},
        {"()", column},
    )
    kinds = {predicted.kind, expected.kind}
    if len(kinds) == 1 or kinds in equivalent_kinds:
        return None
    return wrong(f"{predicted.kind or 'one value'}, not {expected.kind}")


def _compare_elements(predicted: Collection, expected: Collection, compare: Compare) -> Verdict:
    if expected.kind == predicted.kind == "set":
        return _compare_sets(predicted.elements, expected.elements, compare)
    if expected.kind == "ratio":
        return _compare_ratios(predicted.elements, expected.elements)
    if len(predicted.elements) != len(expected.elements):
        return wrong(f"{len(predicted.elements)} elements, not {len(expected.elements)}")
    if expected.kind in UNORDERED_KINDS:
        return _compare_in_any_order(predicted.elements, expected.elements, compare)
    return _compare_in_order(predicted.elements, expected.elements, compare)


def _compare_sets(predicted: Sequence[str], expected: Sequence[str], compare: Compare) -> Verdict:
    """Compares two sets. Elements may be repeated in small sets."""
    if len(predicted) == len(expected):
        verdict = _compare_in_any_order(predicted, expected, compare)
        if verdict.value != "wrong":
            return verdict
    if max(len(predicted), len(expected)) > MAX_REPEATED:
        return wrong(f"{len(predicted)} elements, not the same {len(expected)}")
    matched: set[str] = set()  # predicted elements that equal an expected one
    for element in expected:
        verdicts = {candidate: compare(candidate, element) for candidate in predicted}
        equal = {candidate for candidate in predicted if verdicts[candidate].value == "correct"}
        if not equal:
            return wrong(f"no element equals {element}")
        matched |= equal
    return CORRECT if matched == set(predicted) else wrong("another element")


def _compare_named_values(
    predicted: Collection, expected: Collection, compare: Compare
) -> Verdict | None:
    """Compares values that have names, such as `x=5, y=2`, by name.

    A tuple, or a predicted list without names, must be in the order of the names. The names of a
    prediction do not matter if the gold answer is a list without names. Returns None if neither has
    names.
    """
    predicted_values, expected_values = _named_values(predicted), _named_values(expected)
    if predicted_values is None and expected_values is None:
        return None
    if predicted_values is not None and expected_values is not None:
        same_names = predicted_values.keys() == expected_values.keys()
        if not same_names or predicted.connector != expected.connector:
            return wrong("other names, or `and` in place of `or`")
        return _compare_in_order(
            [predicted_values[name] for name in expected_values],
            list(expected_values.values()),
            compare,
        )
    if predicted_values is not None and expected.kind == "list":
        return _compare_in_any_order(list(predicted_values.values()), expected.elements, compare)
    if predicted_values is not None:
        predicted = Collection("()", _in_order_of_names(predicted_values))
    if expected_values is not None:
        expected = Collection("()", _in_order_of_names(expected_values))
    if predicted.kind not in ("()", "list") or expected.kind != "()":
        return wrong(f"values with names, not {expected.kind}")
    return _compare_elements(predicted, expected, compare)


def _in_order_of_names(values: dict[str, str]) -> list[str]:
    names = sorted(values, key=lambda name: name.removeprefix("\\"))
    return [values[name] for name in names]


def _named_values(collection: Collection) -> dict[str, str] | None:
    """Returns the values of a list or tuple of assignments by name, None if it is another one."""
    if collection.kind not in ("list", "()"):
        return None
    assignments = [read_assignment(element) for element in collection.elements]
    values = {each.name: each.value for each in assignments if each and not each.is_membership}
    return values if len(values) == len(collection.elements) else None


def _compare_ratios(predicted: Sequence[str], expected: Sequence[str]) -> Verdict:
    """Compares ratios: 2:4 equals 1:2. A gold answer such as 3:05 or 3:20 is a time of day."""
    is_time = all(re.fullmatch(r"\d\d", element) for element in expected[1:])
    numbers = [exact_value(element) for element in (*predicted, *expected)]
    if is_time or len(predicted) != len(expected) or not all(numbers):
        # the leading zero of the hour may be missing
        texts = [":".join(elements).removeprefix("0") for elements in (predicted, expected)]
        return CORRECT if texts[0] == texts[1] else wrong("another ratio")
    half = len(predicted)
    quotients = set()
    for one, other in zip(numbers[:half], numbers[half:], strict=True):
        if one is not None and other is not None:
            quotients.add(one / other)
    is_equal = len(quotients) == 1 and quotients.pop() > 0
    return CORRECT if is_equal else wrong("another ratio")


def _compare_in_order(
    predicted: Sequence[str], expected: Sequence[str], compare: Compare
) -> Verdict:
    for predicted_element, expected_element in zip(predicted, expected, strict=True):
        verdict = compare(predicted_element, expected_element)
        if verdict.value != "correct":
            return verdict
    return CORRECT


def _compare_in_any_order(
    predicted: Sequence[str], expected: Sequence[str], compare: Compare
) -> Verdict:
    candidates = list(predicted)
    for element in expected:
        verdicts = [compare(candidate, element) for candidate in candidates]
        values = [verdict.value for verdict in verdicts]
        if "correct" in values:
            del candidates[values.index("correct")]
        elif "undecided" in values:
            return verdicts[values.index("undecided")]
        else:
            return wrong(f"no element equals {element}")
    return CORRECT
