r"""Decides whether two answers are equal in value and kind.

The verdict is a pure function of the two texts: no clock, no randomness, no state. The rules are
applied in this order, and the first one that decides gives the verdict:

1. Size. A prediction that is too long is wrong. So is one that is nested too deep, unless it is the
   same text as the gold answer.
2. Spelling. The same text after normalization (latex.py) is correct.
3. Words. If the gold answer is words or the letter of a choice, the prediction must be the same
   words or letter (choices.py).
4. Sets of real numbers, if one of the answers is a relation or a set operation (real_sets.py).
5. Numbers in a base, such as `664_7`: digits and base must be the same. Numbers modulo another one.
6. Exact numbers, with or without a unit (units.py). There is no tolerance.
7. Collections: lists, sets, tuples, intervals, unions and matrices (collection.py). They are
   compared element by element.
8. Everything else is compared as a formula, by its values at many points (expressions.py).

A prediction is untrusted text. It is parsed, never evaluated as code. A prediction that exceeds a
bound on its size or on the size of its values is wrong. `undecided` means that the gold answer is
empty, too large or cannot be read; its reason begins with "gold answer".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from grpo.types import Verdict
from rewards.verifier.brackets import nesting_depth, split_relations
from rewards.verifier.choices import chosen_letter_of
from rewards.verifier.collection import UNORDERED_KINDS, Collection, read_collection
from rewards.verifier.evaluate import TooLargeError, limited_cost
from rewards.verifier.expressions import compare_expressions, exact_value, is_rounding
from rewards.verifier.latex import as_words, normalize, without_outer_braces
from rewards.verifier.real_sets import EMPTY, NAMED_SETS, read_real_set, same_set
from rewards.verifier.syntax import FUNCTIONS
from rewards.verifier.units import number_of_words, split_unit
from rewards.verifier.words import MEANINGFUL_WORDS

MAX_CHARS = 1000
MAX_DEPTH = 30  # of brackets
MAX_SIDES = 6  # of a chain of equations
MAX_REPEATED = 20  # largest size of a set in which elements may be repeated

CORRECT = Verdict(value="correct")
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
ASSIGNMENT = re.compile(rf"(?P<name>{NAME}) ?(?P<sign>=|\\in(?![a-z])|\\approx)(?P<value>[^=<>]+)")
EQUALS = re.compile(r"(=|\\approx(?![a-z]))")
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in)(?![a-z])")
# Notations of sets of real numbers, other than a tuple that may be an interval.
SET_NOTATION = re.compile(
    r"[<>]|\\(?:le|ge|ne|in|notin|cup|cap|setminus|backslash|mathbb|mid|emptyset|varnothing)(?![a-z])"
    r"|^\]|\[$"
)
MODULO = re.compile(
    r"(?:(?P<name>[A-Za-z]) ?(?:\\equiv|=) ?)?(?P<value>-?[\d\\ a-z{}^+*/.!-]+?) ?"
    r"\(?\\?[pb]?mod(?![a-z]) ?\{?(?P<modulus>\d{1,50})\}?\)?"
)
# 2 and 1/3
MIXED_NUMBER_IN_WORDS = re.compile(
    r"(?P<integer>\d+) ?\\land ?(?P<fraction>\d+/\d+|\\frac\{\d+\}\{\d+\})"
)
NUMBER_IN_BASE = re.compile(r"\(?(?P<digits>-?[0-9A-Za-z.]+)\)?_(?P<base>\d{1,2}|\w|\{\d+\})")


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
    reason = _why_unreadable(gold)
    if reason:
        return Verdict(value="undecided", reason=f"gold answer: {reason}")
    try:
        with limited_cost():
            verdict = _compare_normalized(normalize(prediction), normalize(gold))
    except TooLargeError as error:
        return _wrong(f"too large: {error}")
    except Exception as error:  # a mistake of this program must not end a run
        verdict = Verdict(value="undecided", reason=f"gold answer: {type(error).__name__}: {error}")
    if verdict.value == "undecided" and _is_readable(gold):
        return _wrong("cannot be compared with the gold answer")
    return verdict


def _why_unreadable(gold: str) -> str:
    """Returns why the size of a gold answer is beyond the bounds, "" if it is within them."""
    if not gold.strip():
        return "empty"
    if len(gold) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if nesting_depth(gold) > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    return ""


def _is_readable(gold: str) -> bool:
    """Returns whether a gold answer can be compared with the simplest prediction."""
    try:
        with limited_cost():
            return _compare_normalized("0", normalize(gold)).value != "undecided"
    except TooLargeError:
        return True
    except Exception:
        return False


def _compare_normalized(prediction: str, gold: str) -> Verdict:
    if not prediction:
        return _wrong("empty answer")
    if not gold:
        return Verdict(value="undecided", reason="gold answer: empty")
    return _compare(prediction, gold)


def _wrong(reason: str) -> Verdict:
    return Verdict(value="wrong", reason=reason)


def _compare(prediction: str, gold: str) -> Verdict:
    """Applies rules 2 to 8 to normalized answers, and to the elements of collections.

    Raises:
        TooLargeError: The prediction exceeds a bound.
    """
    if _same_spelling(prediction, gold):
        return CORRECT
    prediction, gold = _without_names(prediction), _without_names(gold)
    if _is_words(gold):
        return _compare_words(prediction, gold)
    verdict = _compare_real_sets(prediction, gold)
    if verdict is not None:
        return verdict
    verdict = _compare_modulo(prediction, gold)
    if verdict is not None:
        return verdict
    prediction, gold = _without_assignments(prediction, gold)
    sides = split_relations(prediction, EQUALS)[::2]
    if gold.startswith(r"\begin{pmatrix}") and len(sides) == 2:  # A^{-1} = ...
        prediction = sides[1].strip()
    if len(sides) > 1 and not RELATION.search(gold) and read_collection(prediction).kind == "":
        return _compare_chain(sides, gold)
    for rule in (_compare_in_base, _compare_numbers, _compare_collections):
        verdict = rule(prediction, gold)
        if verdict is not None:
            return verdict
    return compare_expressions(prediction, gold)


def _compare_chain(sides: Sequence[str], gold: str) -> Verdict:
    r"""Compares a chain such as `c = 2+3 = 5`, `\frac{10}{6} = \frac{5}{3}` or `\sqrt{2} \approx 1.41`.

    All sides must equal the answer, except a name on the left and a decimal behind an approximate
    sign, which must be close to it.
    """
    if len(sides) > MAX_SIDES:
        return _wrong("a long chain")
    has_name = _is_name(sides[0].strip())
    sides = [side.strip() for side in sides[1 if has_name else 0 :]]
    if len(sides) == 2 and is_rounding(sides[1], sides[0]):
        sides = sides[:1]
    for side in sides:
        verdict = _compare(side, gold)
        if verdict.value != "correct":
            return verdict
    return CORRECT


def _same_spelling(prediction: str, gold: str) -> bool:
    r"""Returns whether two answers are the same text.

    Spaces are ignored, unless there is one between two digits: `3 1/2` is not `31/2`. `\text` is
    ignored. If the gold answer is words, so is case.
    """
    if prediction == gold:
        return True
    has_spaced_digits = re.search(r"\d \d", prediction + "|" + gold) is not None
    if not has_spaced_digits and prediction.replace(" ", "") == gold.replace(" ", ""):
        return True
    if r"\text" not in prediction + gold:
        return False
    if _is_words(gold):
        return as_words(prediction) == as_words(gold)
    without_text = [re.sub(r"\\text\{([^{}]*)\}", r"\1", text) for text in (prediction, gold)]
    return without_text[0].replace(" ", "") == without_text[1].replace(" ", "")


def _is_words(text: str) -> bool:
    r"""Returns whether a gold answer is words or the letter of a choice, not a formula.

    These count as words, if they have no digit: text that is completely inside `\text{}`; a letter
    from A to H, with or without brackets; yes and no; three lower-case letters like `odd`; four or
    more characters that are letters, spaces, apostrophes and hyphens, with three letters in a row.
    """
    is_text = re.fullmatch(r"\s*\\text\{[^{}]*\}\s*", text)
    is_plain_words = re.fullmatch(
        r"\(?[A-H]\)?|(?i:yes|no|odd)|[b-df-hj-np-tv-z][aeiou][b-df-hj-np-tv-z]|(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z' -]{3,}",
        text,
    )
    has_digit = re.search(r"\d", text)
    return bool(is_text or is_plain_words) and not has_digit


def _without_thousands(text: str) -> str:
    """Returns text without the commas that separate thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _without_names(text: str) -> str:
    """Returns the number or the set that words name, other text unchanged."""
    words = as_words(text)
    return NAMED_SETS.get(words) or number_of_words(words) or text


def _compare_words(prediction: str, gold: str) -> Verdict:
    """Compares words. The letter of a choice may be followed by its text: `C) 12`."""
    words, gold_words = as_words(prediction), as_words(gold)
    is_letter = len(gold_words) == 1
    if words == gold_words or (is_letter and chosen_letter_of(words) == gold_words.upper()):
        return CORRECT
    return _wrong("other words")


def _compare_real_sets(prediction: str, gold: str) -> Verdict | None:
    """Compares sets of real numbers. Returns None if one of the answers is none.

    A relation of degree 2 or with an absolute value describes a set, but is not solved. It equals
    only another one that is not solved.
    """
    has_notation = SET_NOTATION.search(prediction) or SET_NOTATION.search(gold)
    if not has_notation and prediction not in EMPTY and gold not in EMPTY:
        return None
    expected = read_real_set(gold)
    if expected is None:
        return None
    predicted = read_real_set(prediction) or read_real_set(rf"\{{{prediction}\}}")
    if predicted is None:
        return None
    if expected.is_solved and not predicted.is_solved:
        return _wrong("a relation that is not solved")
    return CORRECT if same_set(predicted, expected) else _wrong("another set")


def _without_assignments(prediction: str, gold: str) -> tuple[str, str]:
    r"""Returns both answers without `x =` or `x \in`.

    - If both have one, it is removed from both, but only if the variable is the same.
    - If one has `x \in`, it is removed.
    - If one has `x =`, it is removed, unless the other answer is a relation such as `2x+y=3`.
    """
    in_prediction = _read_assignment(prediction)
    in_gold = _read_assignment(gold)
    if in_prediction and in_gold:
        if in_prediction.name != in_gold.name:
            return prediction, gold
        return in_prediction.value, in_gold.value
    if in_prediction and (in_prediction.is_membership or not RELATION.search(gold)):
        return in_prediction.value, gold
    if in_gold and (in_gold.is_membership or not RELATION.search(prediction)):
        return prediction, in_gold.value
    return prediction, gold


class _Assignment(NamedTuple):
    """The parts of `x = 5`, or of `x \\in (1,2)`, which is a membership."""

    name: str
    value: str
    is_membership: bool


def _read_assignment(text: str) -> _Assignment | None:
    """Returns the parts of an assignment, None for other text.

    The letters of a tuple must be in ascending order: `(y,x) = (1,2)` says something else than
    (1,2).
    """
    match = ASSIGNMENT.fullmatch(text)
    if match is None:
        return None
    if not _is_name(match["name"]):
        return None
    value = without_outer_braces(match["value"].strip())
    return _Assignment(match["name"], value, is_membership=match["sign"] == r"\in")


def _is_name(text: str) -> bool:
    """Returns whether text names a value, and is no function or word that changes the value."""
    word = re.sub(r"\\text|[{}\\ ]", "", text).lower()
    letters = re.findall(r"[A-Za-z]+(?:_\w+)?", text) if text.startswith("(") else []
    is_in_order = letters == sorted(letters) or "\\" in text  # (\rho, \theta, \phi)
    is_meaningful = word in MEANINGFUL_WORDS or word in FUNCTIONS or not is_in_order
    return re.fullmatch(NAME, text) is not None and not is_meaningful


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


def _compare_modulo(prediction: str, gold: str) -> Verdict | None:
    r"""Compares numbers modulo another one, such as `3 \pmod{7}`. Returns None if neither is.

    Both have the same modulus and the same remainder, or one of them is the remainder alone.
    """
    in_prediction, in_gold = MODULO.fullmatch(prediction), MODULO.fullmatch(gold)
    if in_prediction is None and in_gold is None:
        return None
    matches = (in_prediction, in_gold)
    moduli = {int(match["modulus"]) for match in matches if match is not None}
    values = []
    for match, text in zip(matches, (prediction, gold), strict=True):
        values.append(exact_value(match["value"] if match else text))
    names = {match["name"] for match in matches if match is not None and match["name"]}
    if len(names) > 1 or len(moduli) != 1 or 0 in moduli or None in values:
        return _wrong("another modulus, or not a number")
    (modulus,) = moduli
    remainders = []
    for match, value in zip(matches, values, strict=True):
        remainders.append(value % modulus if match and value is not None else value)
    return CORRECT if remainders[0] == remainders[1] else _wrong("another remainder")


def _compare_numbers(prediction: str, gold: str) -> Verdict | None:
    """Compares exact numbers, with or without a unit or words behind them.

    - Two units must be the same. A unit of only one answer is ignored.
    - A prediction in percent equals a gold answer without a unit as a share: `25%` equals 0.25. A
      gold answer in percent is met with and without the sign.
    - If one of the values is not a number, the values are compared without their units by all
      rules.

    Returns None if one of the answers is not a number and neither has a unit.

    Raises:
        TooLargeError: The prediction exceeds a bound.
    """
    expected = split_unit(gold)
    predicted = split_unit(prediction, glued=expected.unit)
    if predicted.contradicts(expected):
        return _wrong(f"{predicted.unit or predicted.words}, not {expected.unit or expected.words}")
    # In `(1,000)` the comma separates elements, not thousands.
    is_tuple = re.match(r"[(\[].*,", expected.value)
    try:
        expected_number = None if is_tuple else exact_value(expected.value)
    except TooLargeError as error:
        return Verdict(value="undecided", reason=f"gold answer: {error}")
    predicted_number = exact_value(predicted.value)
    is_percentage = predicted.unit == "%" and not expected.unit
    if is_percentage and predicted_number is None:
        return _wrong("a percentage")
    if expected_number is not None and predicted_number is None:
        return _compare_with_number(predicted.value, expected.value)
    if expected_number is None or predicted_number is None:
        if predicted.value == prediction and expected.value == gold:
            return None
        return _compare(predicted.value, expected.value)
    if is_percentage:
        predicted_number /= 100
    return CORRECT if predicted_number == expected_number else _wrong("another number")


def _compare_with_number(prediction: str, gold: str) -> Verdict:
    """Compares a prediction that is no number with a number, whose comma separates thousands."""
    gold_number = _without_thousands(gold)
    mixed = MIXED_NUMBER_IN_WORDS.fullmatch(prediction)
    if mixed:
        return compare_expressions(rf"{mixed['integer']}+{mixed['fraction']}", gold_number)
    kind = read_collection(prediction).kind
    if kind:
        return _wrong(f"{kind}, not one value")
    return compare_expressions(prediction, gold_number)


def _compare_collections(prediction: str, gold: str) -> Verdict | None:
    """Compares lists, sets, tuples, intervals, unions and matrices, element by element.

    - The kinds must be the same. A list counts as a set; if an answer is a relation (`x<1 or x>3`),
      a list counts as a union instead.
    - The number of elements must be the same.
    - The order of elements matters in tuples, intervals and matrices, but not in lists, sets and
      unions.

    Returns None if the gold answer is one value and the prediction is no list, set or union.
    """
    expected = read_collection(gold)
    predicted = read_collection(prediction)
    if expected.kind == predicted.kind == "set":
        return _compare_sets(predicted.elements, expected.elements)
    if expected.kind == "":
        if predicted.kind in UNORDERED_KINDS:
            return _wrong("a collection, not one value")
        return None
    verdict = _compare_named_values(predicted, expected)
    if verdict is not None:
        return verdict
    if expected.kind == "()" and re.match(r"[A-Z]\(", prediction):  # a point: P(1,2)
        predicted = read_collection(prediction[1:])
    if {predicted.kind, expected.kind} == {"()", f"matrix {[1] * len(expected.elements)}"}:
        return _compare_elements_in_order(predicted, expected)  # a column vector
    has_relation = RELATION.search(prediction + gold) is not None
    equivalent_kinds = {"list", "union"} if has_relation else {"list", "set"}
    has_inequality = re.search(r"[<>]|\\[lg]e(?![a-z])", prediction + gold) is not None
    if has_inequality and predicted.connector != expected.connector:
        return _wrong("`and` in place of `or`, or the reverse")
    same_kind = predicted.kind == expected.kind
    if not same_kind and {predicted.kind, expected.kind} != equivalent_kinds:
        return _wrong(f"{predicted.kind or 'one value'}, not {expected.kind}")
    if expected.kind == "ratio":
        return _compare_ratios(predicted.elements, expected.elements)
    if len(predicted.elements) != len(expected.elements):
        return _wrong(f"{len(predicted.elements)} elements, not {len(expected.elements)}")
    if expected.kind in UNORDERED_KINDS:
        return _compare_in_any_order(predicted.elements, expected.elements)
    return _compare_in_order(predicted.elements, expected.elements)


def _compare_sets(predicted: Sequence[str], expected: Sequence[str]) -> Verdict:
    """Compares two sets. Elements may be repeated in small sets."""
    if len(predicted) == len(expected):
        verdict = _compare_in_any_order(predicted, expected)
        if verdict.value != "wrong":
            return verdict
    if max(len(predicted), len(expected)) > MAX_REPEATED:
        return _wrong(f"{len(predicted)} elements, not the same {len(expected)}")
    predicted, expected = _distinct(predicted), _distinct(expected)
    if len(predicted) != len(expected):
        return _wrong(f"{len(predicted)} elements, not {len(expected)}")
    return _compare_in_any_order(predicted, expected)


def _distinct(elements: Sequence[str]) -> list[str]:
    distinct: list[str] = []
    for element in elements:
        if all(_compare(element, other).value != "correct" for other in distinct):
            distinct.append(element)
    return distinct


def _compare_elements_in_order(predicted: Collection, expected: Collection) -> Verdict:
    if len(predicted.elements) != len(expected.elements):
        return _wrong(f"{len(predicted.elements)} elements, not {len(expected.elements)}")
    return _compare_in_order(predicted.elements, expected.elements)


def _compare_named_values(predicted: Collection, expected: Collection) -> Verdict | None:
    """Compares values that have names, such as `x=5, y=2`, by name.

    A tuple, or a list that is compared with names, must be in the order of the names. Returns None
    if neither has names.
    """
    predicted_values, expected_values = _named_values(predicted), _named_values(expected)
    if predicted_values is None and expected_values is None:
        return None
    if predicted_values is not None and expected_values is not None:
        same_names = predicted_values.keys() == expected_values.keys()
        if not same_names or predicted.connector != expected.connector:
            return _wrong("other names, or `and` in place of `or`")
        return _compare_in_order(
            [predicted_values[name] for name in expected_values], list(expected_values.values())
        )
    if predicted_values is not None and expected.kind == "list":
        return _compare_in_any_order(list(predicted_values.values()), expected.elements)
    if predicted_values is not None:
        predicted = Collection("()", _in_order_of_names(predicted_values))
    if expected_values is not None:
        expected = Collection("()", _in_order_of_names(expected_values))
    if predicted.kind not in ("()", "list") or expected.kind != "()":
        return _wrong(f"values with names, not {expected.kind}")
    return _compare_elements_in_order(predicted, expected)


def _in_order_of_names(values: dict[str, str]) -> list[str]:
    names = sorted(values, key=lambda name: name.removeprefix("\\"))
    return [values[name] for name in names]


def _named_values(collection: Collection) -> dict[str, str] | None:
    """Returns the values of a list or tuple of assignments by name, None if it is another one."""
    if collection.kind not in ("list", "()"):
        return None
    assignments = [_read_assignment(element) for element in collection.elements]
    values = {each.name: each.value for each in assignments if each and not each.is_membership}
    return values if len(values) == len(collection.elements) else None


def _compare_ratios(predicted: Sequence[str], expected: Sequence[str]) -> Verdict:
    """Compares ratios: 1:2 equals 2:4. Times of day such as 3:05 must have the same digits."""
    is_time = all(re.fullmatch(r"\d\d", element) for element in expected[1:])
    numbers = [exact_value(element) for element in (*predicted, *expected)]
    if is_time or len(predicted) != len(expected) or not all(numbers):
        # the leading zero of the hour may be missing
        texts = [":".join(elements).removeprefix("0") for elements in (predicted, expected)]
        return CORRECT if texts[0] == texts[1] else _wrong("another ratio")
    half = len(predicted)
    quotients = set()
    for one, other in zip(numbers[:half], numbers[half:], strict=True):
        if one is not None and other is not None:
            quotients.add(one / other)
    is_equal = len(quotients) == 1 and quotients.pop() > 0
    return CORRECT if is_equal else _wrong("another ratio")


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
