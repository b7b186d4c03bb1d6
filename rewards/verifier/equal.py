r"""Decides whether two answers are equal in value and kind.

The verdict is a pure function of the two texts: no clock, no randomness, no state. The rules are
applied in this order, and the first one that decides gives the verdict:

1. Size. A prediction that is too long is wrong. So is one that is nested too deep, unless it is the
   same text as the gold answer.
2. Spelling. The same text after normalization (latex.py) is correct.
3. Words. Number words and names of sets become numbers and sets. If the gold answer is words or the
   letter of a choice, the prediction must be the same words or letter (choices.py).
4. Sets of real numbers, if one of the answers is a relation or a set operation (real_sets.py).
5. Numbers modulo another one.
6. Names on the left of `=` are removed (names.py). All sides of a chain `c = 2+3 = 5` are compared.
7. Numbers in a base, such as `664_7`: digits and base must be the same.
8. Exact numbers, with or without a unit (units.py). There is no tolerance.
9. Collections: lists, sets, tuples, intervals, unions, matrices and ratios (collection.py). They
   are compared element by element (elements.py).
10. Everything else is compared as a formula, by its values at many points (expressions.py).

A prediction is untrusted text. It is parsed, never evaluated as code. A prediction that exceeds a
bound on its size or on the size of its values is wrong. `undecided` means that the gold answer is
empty, too large or cannot be read; its reason begins with "gold answer".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.rewards.verifier.brackets import nesting_depth, split_relations
from grpo.rewards.verifier.choices import chosen_letter_of
from grpo.rewards.verifier.collection import read_collection
from grpo.rewards.verifier.elements import compare_collections
from grpo.rewards.verifier.evaluate import TooLargeError, limited_cost
from grpo.rewards.verifier.expressions import compare_expressions, exact_value, is_rounding
from grpo.rewards.verifier.latex import as_words, normalize
from grpo.rewards.verifier.names import is_name, read_assignment
from grpo.rewards.verifier.real_sets import EMPTY, NAMED_SETS, read_real_set, same_set
from grpo.rewards.verifier.syntax import FUNCTIONS
from grpo.rewards.verifier.units import number_of_words, split_unit
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.types import Verdict

MAX_CHARS = 1000
MAX_DEPTH = 30  # of brackets
MAX_SIDES = 6  # of a chain of equations

EQUALS = re.compile(r"(=|\\approx(?![a-z]))")
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in)(?![a-z])")
# Notations of sets of real numbers, other than a tuple that may be an interval.
SET_NOTATION = re.compile(
    r"[<>]|^\]|\[$"
    r"|\\(?:le|ge|ne|in|notin|cup|cap|setminus|backslash|mathbb|mid|emptyset|varnothing)(?![a-z])"
)
MODULO = re.compile(
    r"(?:(?P<name>[A-Za-z]) ?(?:\\equiv|=) ?)?(?P<value>-?[\d\\ a-z{}^+*/.!-]+?) ?"
    r"\(?\\?[pb]?mod(?![a-z]) ?\{?(?P<modulus>\d{1,50})\}?\)?"
)
# 2 and 1/3
MIXED_NUMBER_IN_WORDS = re.compile(
    r"(?P<integer>\d+) ?\\land ?(?P<fraction>\d+/\d+|\\frac\{\d+\}\{\d+\})"
)
WORDS = re.compile(
    r"\s*\\text\{[^{}]*\}\s*|\(?[A-H]\)?|(?i:yes|no|odd)"
    r"|[b-df-hj-np-tv-z][aeiou][b-df-hj-np-tv-z]|(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z' -]{3,}"
)
NUMBER_IN_BASE = re.compile(
    r"\(?(?P<digits>-?(?:\d[0-9A-Za-z.]*|\.\d+|[A-Z][0-9A-Z]+))\)?_(?P<base>\d{1,2}|\{\d+\})"
)


def compare_answers(prediction: str, gold: str) -> Verdict:
    r"""Returns the verdict on a predicted answer. Never raises an exception.

    Args:
        prediction: The answer of a completion, without tags and box.
        gold: The gold answer.

    Example: `compare_answers("50/100", r"\frac12")` is correct.
    """
    if len(prediction) > MAX_CHARS:
        return wrong(f"longer than {MAX_CHARS} characters")
    if gold.strip() and prediction.strip() == gold.strip():
        return CORRECT
    if nesting_depth(prediction) > MAX_DEPTH:
        return wrong(f"nested deeper than {MAX_DEPTH}")
    reason = _why_too_large(gold)
    if reason:
        return Verdict(value="undecided", reason=f"gold answer: {reason}")
    verdict = _compare_within_bounds(prediction, gold)
    # A prediction must not have a better verdict than wrong because it is hard to compare.
    if verdict.value == "undecided" and not why_unreadable(gold):
        return wrong(verdict.reason.removeprefix("gold answer: "))
    return verdict


def why_unreadable(gold: str) -> str:
    """Returns why a gold answer cannot be read, "" if it can."""
    reason = _why_too_large(gold)
    if reason:
        return f"gold answer: {reason}"
    verdict = _compare_within_bounds("0", gold)  # the simplest prediction
    if verdict.value == "undecided":
        return verdict.reason
    collection = read_collection(normalize(gold))
    if collection.kind:
        for element in collection.elements:
            reason = why_unreadable(element)
            if reason:
                return reason
    return ""


def _compare_within_bounds(prediction: str, gold: str) -> Verdict:
    try:
        with limited_cost():
            return _compare_normalized(normalize(prediction), normalize(gold))
    except TooLargeError as error:
        return Verdict(value="undecided", reason=f"gold answer: too large: {error}")
    except Exception as error:  # a mistake of this program must not end a run
        reason = f"reward failed: {type(error).__name__}: {error}"
        return Verdict(value="undecided", reason=reason)


def _why_too_large(gold: str) -> str:
    """Returns why the size of a gold answer is beyond the bounds, "" if it is within them."""
    if not gold.strip():
        return "empty"
    if len(gold) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if nesting_depth(gold) > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    return ""


def _compare_normalized(prediction: str, gold: str) -> Verdict:
    if not prediction:
        return wrong("empty answer")
    if not gold:
        return Verdict(value="undecided", reason="gold answer: empty")
    return _compare(prediction, gold)


def _compare(prediction: str, gold: str) -> Verdict:
    """Applies rules 2 to 10 to normalized answers, and to the elements of collections.

    Raises:
        TooLargeError: An answer exceeds a bound.
    """
    if _same_spelling(prediction, gold):
        return CORRECT
    prediction, gold = _without_names(prediction), _without_names(gold)
    choice = re.match(r"\(?([A-H])\) ?\S", gold)  # B) 12
    if choice:
        gold = choice[1]
    if _is_words(gold):
        return _compare_words(prediction, gold)
    verdict = _compare_real_sets(prediction, gold)
    if verdict is None:
        verdict = _compare_modulo(prediction, gold)
    if verdict is None:
        verdict = _compare_values(*_without_assignments(prediction, gold))
    return verdict


def _compare_values(prediction: str, gold: str) -> Verdict:
    """Applies rules 6 (chains) to 10."""
    pieces = split_relations(prediction, EQUALS)
    if gold.startswith(r"\begin{pmatrix}") and len(pieces) == 3:  # A^{-1} = \begin{pmatrix}...
        prediction = pieces[2].strip()
    elif len(pieces) > 1 and not RELATION.search(gold) and not read_collection(prediction).kind:
        return _compare_chain(pieces, gold)
    verdict = _compare_in_base(prediction, gold)
    if verdict is None:
        verdict = _compare_numbers(prediction, gold)
    if verdict is None:
        verdict = compare_collections(prediction, gold, _compare)
    if verdict is None:
        verdict = compare_expressions(prediction, gold)
    return verdict


def _compare_chain(pieces: Sequence[str], gold: str) -> Verdict:
    r"""Compares a chain such as `c = 2+3 = 5`, `10/6 = 5/3` or `\sqrt{2} \approx 1.41`.

    All sides must equal the answer, except a name on the left and a decimal behind an approximate
    sign, which must be close to the side in front of it.

    Args:
        pieces: The sides, and the signs between them.
        gold: The normalized gold answer.
    """
    sides = [piece.strip() for piece in pieces[::2]]
    if len(sides) > MAX_SIDES:
        return wrong("a long chain")
    if pieces[-2] == r"\approx" and is_rounding(sides[-1], sides[-2]):
        sides.pop()
    if len(sides) > 1 and is_name(sides[0]):
        sides.pop(0)
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
    from A to H, with or without brackets; yes, no and odd; three lower-case letters like `red`;
    four or more characters that are letters, spaces, apostrophes and hyphens, with three letters in
    a row. Names of functions are formulas.
    """
    has_function = FUNCTIONS.intersection(text.split())
    is_words = WORDS.fullmatch(text) is not None and not re.search(r"\d", text)
    return is_words and not has_function


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
    return wrong("other words")


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
        return wrong("a relation that is not solved")
    return CORRECT if same_set(predicted, expected) else wrong("another set")


def _without_assignments(prediction: str, gold: str) -> tuple[str, str]:
    r"""Returns both answers without `x =` or `x \in`.

    - If both have one, it is removed from both, but only if the variable is the same.
    - If one has `x \in`, it is removed.
    - If one has `x =`, it is removed, unless the other answer is a relation such as `2x+y=3`.
    """
    in_prediction = read_assignment(prediction)
    in_gold = read_assignment(gold)
    if in_prediction and in_gold:
        if in_prediction.name != in_gold.name:
            return prediction, gold
        return in_prediction.value, in_gold.value
    if in_prediction and (in_prediction.is_membership or not RELATION.search(gold)):
        return in_prediction.value, gold
    if in_gold and (in_gold.is_membership or not RELATION.search(prediction)):
        return prediction, in_gold.value
    return prediction, gold


def _compare_in_base(prediction: str, gold: str) -> Verdict | None:
    """Compares numbers in a base, such as 4210_5. Returns None if neither answer has a base."""
    in_prediction = NUMBER_IN_BASE.fullmatch(prediction)
    in_gold = NUMBER_IN_BASE.fullmatch(gold)
    if in_prediction is None and in_gold is None:
        return None
    if in_prediction is None or in_gold is None:
        return wrong("another number or base")
    digits = [match["digits"].lstrip("0").upper() for match in (in_prediction, in_gold)]
    same_digits = digits[0] == digits[1]
    same_base = in_prediction["base"].strip("{}") == in_gold["base"].strip("{}")
    return CORRECT if same_digits and same_base else wrong("another number or base")


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
        return wrong("another modulus, or not a number")
    (modulus,) = moduli
    remainders = []
    for match, value in zip(matches, values, strict=True):
        remainders.append(value % modulus if match and value is not None else value)
    return CORRECT if remainders[0] == remainders[1] else wrong("another remainder")


def _compare_numbers(prediction: str, gold: str) -> Verdict | None:
    """Compares exact numbers, with or without a unit or words behind them.

    - Two units must be the same. A unit of only one answer is ignored.
    - A prediction in percent equals a gold answer without a unit as a share: `25%` equals 0.25. A
      gold answer in percent is met with and without the sign.
    - If one of the values is not a number, the values are compared without their units by all
      rules.

    Returns None if one of the answers is not a number and neither has a unit.

    Raises:
        TooLargeError: An answer exceeds a bound.
    """
    expected = split_unit(gold)
    predicted = split_unit(prediction, glued=expected.unit)
    if predicted.contradicts(expected):
        return wrong(f"{predicted.unit or predicted.words}, not {expected.unit or expected.words}")
    # In `(1,000)` the comma separates elements, not thousands.
    is_tuple = re.match(r"[(\[].*,", expected.value)
    expected_number = None if is_tuple else exact_value(expected.value)
    predicted_number = exact_value(predicted.value)
    is_percentage = predicted.unit == "%" and not expected.unit
    if is_percentage and predicted_number is None:
        return wrong("a percentage")
    if expected_number is not None and predicted_number is None:
        return _compare_with_number(predicted.value, expected.value)
    if expected_number is None or predicted_number is None:
        if predicted.value == prediction and expected.value == gold:
            return None
        return _compare(predicted.value, expected.value)
    if is_percentage:
        predicted_number /= 100
    return CORRECT if predicted_number == expected_number else wrong("another number")


def _compare_with_number(prediction: str, gold: str) -> Verdict:
    """Compares a prediction that is no number with a number, whose comma separates thousands."""
    gold_number = _without_thousands(gold)
    mixed = MIXED_NUMBER_IN_WORDS.fullmatch(prediction)
    if mixed:
        return compare_expressions(rf"{mixed['integer']}+{mixed['fraction']}", gold_number)
    kind = read_collection(prediction).kind
    if kind:
        return wrong(f"{kind}, not one value")
    return compare_expressions(prediction, gold_number)
