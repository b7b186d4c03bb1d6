"""Are two answers equal in value and kind?

Pure and without a clock: text in, verdict out, the same each time.

The order: spelling, size bounds (too large is wrong by rule), words, exact numbers, collections,
and sympy last, through latex2sympy and math_verify. The prediction is hostile text: it is parsed,
never evaluated as code.
"""

from __future__ import annotations

import itertools
import logging
import re
from typing import Any

from grpo.types import Verdict
from rewards.verifier.exact_values import TooLarge, exact
from rewards.verifier.latex import closing, normalise, split, words

MAX_CHARS = 1000
MAX_DEPTH = 30
MAX_DEPTH_IN_SYMPY = 10  # its parser's time doubles with the depth
MAX_BRACKETS = 8  # more than in the gold answer: a product of n brackets has 2^n terms
MAX_BARS = 8  # |a||b|: which one opens is a search
MAX_TERMS = 40
MAX_EXPONENT = 400
MAX_POWERED = 30  # product of the exponents on brackets: ((x+1)^5)^6
HEAVY = re.compile(
    r"\\binom\{\d{4}|\\(?:sum|prod|i{1,3}nt|oint|lim|binom|det|begin|operatorname)(?![A-Za-z])"
    r"|\d{3,}!|[)}!]!|\d{300}"
)
LIGHT_FACTORIAL = re.compile(r"\((?:\d?[a-z](?: ?[+-] ?(?:\d|\d?[a-z]))?)\)!(?!!)")  # (2n)!, (d-k)!
DIGITS = 100  # behind the point: a difference below is none
# 97ths, where expressions are compared
POINTS = ((131, 211, 83, 59), (-113, 41, -167, 229), (307, -53, 71, -197), (23, 17, 29, 37))
CORRECT = Verdict(value="correct")
NAME = (
    r"(?:\\(?:text|vec|overrightarrow)\{[A-Za-z]+\}|\\?[A-Za-z]+)"
    r"(?:_\w|_\{\w+\})?(?:\([^()=,]{1,10}\))?"
    r"|\\angle ?[A-Z]+|\([A-Za-z](?:, ?[A-Za-z])*\)"
)
VARIABLE = re.compile(rf"({NAME}) ?(=|\\in(?![a-z]))([^=<>]+)")
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in)(?![a-z])")
BASE = re.compile(r"\(?([0-9A-Za-z]+)\)?_(\w|\{\d+\})")
NO_UNIT = "pi|sqrt|sin|cos|tan|cot|sec|log|ln|exp|mod"
SYMBOL = r"(?<=[\d}]) ?(?:cm|mm|km|kg|ft|in|mph|m|g|s|h|L)(?![A-Za-z(])"
UNIT = re.compile(
    rf"(.+?) ?(\\text\{{[^{{}}]*\}}|\\?%|(?<=[\d}})!]) (?!(?:{NO_UNIT})\b)[a-z]{{2}}|{SYMBOL})([ "
    rf".^/{{}}23a-z]|\\text\{{[^{{}}]*\}})*"
)
UNIT_NAMES = {
    "$": "dollar",
    "percent": "%",
    "deg": "degree",
    "centimeter": "cm",
    "centimetre": "cm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "feet": "foot",
    "ft": "foot",
    "inche": "inch",
    "in": "inch",
    "hr": "hour",
    "h": "hour",
    "min": "minute",
    "sec": "second",
    "mi": "mile",
}
FACTORS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def wrong(reason: str) -> Verdict:
    """A wrong verdict and why."""
    return Verdict(value="wrong", reason=reason)


def equal(prediction: str, gold: str) -> Verdict:
    r"""The verdict on an answer without tags and box: `equal("50/100", r"\frac12")` is correct."""
    if len(prediction) > MAX_CHARS:
        return wrong(f"longer than {MAX_CHARS} characters")
    if prediction.strip() == gold.strip() != "":
        return CORRECT
    if _depth(prediction) > MAX_DEPTH:
        return wrong(f"nested deeper than {MAX_DEPTH}")
    predicted, expected = normalise(prediction), normalise(gold)
    if not predicted:
        return wrong("empty answer")
    if not expected:
        return Verdict(value="undecided", reason="empty gold answer")
    try:
        return _same(predicted, expected)
    except TooLarge as error:
        return wrong(f"too large: {error}")


def _same(predicted: str, expected: str) -> Verdict:
    """`equal` on normalised text; calls itself on the elements of collections."""
    glued = re.search(r"\d \d", predicted + "|" + expected) is not None  # 3 1/2 is not 31/2
    if predicted == expected or (
        not glued and predicted.replace(" ", "") == expected.replace(" ", "")
    ):
        return CORRECT
    if (
        r"\text" in predicted + expected
        and words(predicted) == words(expected)
        and not re.search(r"[\\^_]", words(expected))
    ):
        return CORRECT
    predicted, expected = _ascending(predicted), _ascending(expected)
    if _is_words(expected):
        return CORRECT if words(predicted) == words(expected) else wrong("other words")
    predicted, expected = _without_variable(predicted, expected)
    if (bases := (BASE.fullmatch(predicted), BASE.fullmatch(expected))) != (None, None):
        values = [match and (match[1].lstrip("0"), match[2].strip("{}")) for match in bases]
        return CORRECT if values[0] == values[1] else wrong("another number or base")
    number = _same_number(predicted, expected)
    if number is not None:
        return number
    return _same_collection(predicted, expected) or _same_in_sympy(predicted, expected)


def _same_number(predicted: str, expected: str) -> Verdict | None:
    """The verdict when gold is a plain number, perhaps with a unit.

    None when it is not, or when only sympy can read the other.
    """
    (want, want_unit), (have, have_unit) = _with_unit(expected), _with_unit(predicted)
    if want_unit and have_unit and want_unit != have_unit:
        return wrong(f"unit {have_unit}, not {want_unit}")
    try:
        want_value = None if re.match(r"[(\[].*,", want) else exact(want)
    except TooLarge as error:
        return Verdict(value="undecided", reason=f"gold answer: {error}")
    have_value = exact(have)
    if want_value is None or have_value is None:
        return _same(have, want) if (have, want) != (predicted, expected) else None
    if have_unit == "%" and not want_unit and have_value / 100 == want_value:
        return CORRECT
    return CORRECT if have_value == want_value else wrong("another number")


def _with_unit(text: str) -> tuple[str, str]:
    r"""Returns a value and its unit.

    `5.4 \text{ cents}` -> ("5.4", "cent"), `\$36` -> ("36", "dollar"), `3 million` ->
    ("(3)*1000000", "").
    """
    money = re.match(r"(-?)\s*\\?\$\s*(?=[\d.-])", text)
    text = money[1] + text[money.end() :] if money else text
    match = UNIT.fullmatch(text)
    if match is None or match[1].count("{") != match[1].count("}"):
        return text, "dollar" if money else ""
    unit = re.sub(r"\\text|[\\{} .]", "", text[match.end(1) :]).lower()
    factor = next((word for word in FACTORS if unit.startswith(word)), "")
    unit = re.sub(r"s(?=\^|$)", "", unit.removeprefix(factor))
    unit = re.sub(r"^(?:square|sq)(\w+)$", r"\1^2", unit)
    unit = re.sub(r"^cubic(\w+)$", r"\1^3", unit)
    unit = re.sub(r"s(?=\^|$)", "", unit)
    name, caret, power = unit.partition("^")
    number = f"({match[1]})*{FACTORS[factor]}" if factor else match[1]
    return number, UNIT_NAMES.get(name, name) + caret + power or ("dollar" if money else "")


def _without_variable(predicted: str, expected: str) -> tuple[str, str]:
    r"""Both without `x =` or `x \in`, unless one is another relation or the variables differ."""
    have, want = VARIABLE.fullmatch(predicted), VARIABLE.fullmatch(expected)
    if have and want and have[1] != want[1]:
        return predicted, expected
    if have and (want or have[2] != "=" or not RELATION.search(expected)):
        predicted = have[3].strip()
    if want and (have or want[2] != "=" or not RELATION.search(predicted)):
        expected = want[3].strip()
    return predicted, expected


def _ascending(text: str) -> str:
    """A chain of relations from its small end.

    `f(4)>f(1)>=2` -> `2<=f(1)<f(4)`; other text as it is.
    """
    pieces = re.split(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))", text)
    if len(pieces) < 5 or {"<", r"\le"} & set(pieces):
        return text
    return " ".join(
        {">": "<", r"\ge": r"\le"}.get(piece, piece.strip()) for piece in reversed(pieces)
    )


def _same_collection(predicted: str, expected: str) -> Verdict | None:
    """The verdict when gold is a list, set, tuple, interval, union or matrix.

    None when it is not or when sympy must decide.
    """
    (want_kind, want), (have_kind, have) = _elements(expected), _elements(predicted)
    if want_kind == "" or (have_kind == "" and RELATION.search(predicted)):
        return (
            wrong("a collection, not one value")
            if want_kind == "" and have_kind in ("list", "set", "union")
            else None
        )
    # x<1 or x>3
    unordered = {"list", "set"} if not RELATION.search(predicted + expected) else {"list", "union"}
    if have_kind != want_kind and {have_kind, want_kind} != unordered:
        return wrong(f"{have_kind or 'one value'}, not {want_kind}")
    if len(have) != len(want):
        return wrong(f"{len(have)} elements, not {len(want)}")
    if want_kind not in ("list", "set", "union"):
        return next((v for v in map(_same, have, want) if v.value != "correct"), CORRECT)
    for element in want:  # in any order
        verdicts = [_same(candidate, element) for candidate in have]
        found = next((i for i, verdict in enumerate(verdicts) if verdict.value == "correct"), None)
        if found is None:
            return next(
                (v for v in verdicts if v.value == "undecided"),
                wrong(f"no element equals {element}"),
            )
        del have[found]
    return CORRECT


def _elements(text: str) -> tuple[str, list[str]]:
    r"""Returns the kind of a collection and its elements.

    `\{1,2\}` -> ("set", ["1", "2"]), `(3,4]` -> ("(]", ["3", "4"]), `5` -> ("", ["5"]); `a \pm b`
    is two elements.
    """
    matrix = re.fullmatch(r"([^&]*?)\\begin\{([pb]?)matrix\}(.*)\\end\{\2matrix\}", text)
    if matrix and "matrix}" not in matrix[3]:
        rows = [split(row, ("&",)) for row in matrix[3].split(r"\\") if row.strip()]
        factor = f"({matrix[1]}1)*" if matrix[1] in ("", "-") else f"({matrix[1]})*"
        cells = [f"{factor}({cell})" if matrix[1] else cell for row in rows for cell in row]
        return f"matrix {[len(row) for row in rows]}", cells
    if (
        without := re.fullmatch(r"\\mathbb\{R\} ?(?:\\setminus|\\backslash|-) ?\\\{(.*)\\\}", text)
    ) and len(without[1]) < 100:
        gaps = sorted(split(without[1]), key=lambda gap: exact(gap) or 0)
        return "union", [
            f"({a},{b})" for a, b in itertools.pairwise([r"-\infty", *gaps, r"\infty"])
        ]
    if len(pieces := split(text, (r"\cup",))) > 1:
        return "union", pieces
    if text.startswith(r"\{") and closing(text, 1) == len(text) - 1:
        return "set", [each for piece in split(text[2:-1].rstrip("\\")) for each in _signs(piece)]
    pieces = split(text[1:-1])
    if text.startswith(("(", "[")) and closing(text, 0) == len(text) - 1 and len(pieces) > 1:
        return text[0] + text[-1], pieces
    pieces = [each for piece in split(text) for each in _signs(piece)]
    return "list" if len(pieces) > 1 else "", pieces


def _signs(text: str) -> list[str]:
    return (
        [text.replace(r"\pm", sign).replace(r"\mp", "-+"[sign == "-"]) for sign in "+-"]
        if text.count(r"\pm") == 1
        else [text]
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _is_words(text: str) -> bool:
    r"""Words, or the letter of a choice: in `\text{}` wholly, or four plain letters and more."""
    in_text = re.fullmatch(r"\s*\\text\{[^{}]*\}\s*", text)
    return bool(
        in_text
        or re.fullmatch(
            r"\(?[A-H]\)?|(?i:yes|no|odd)|(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z' -]{3,}", text
        )
    ) and not re.search(r"\d", text)


def _same_in_sympy(predicted: str, expected: str) -> Verdict:
    _check_bounds(predicted, expected)
    import sympy
    from math_verify import verify as math_verify

    # it warns that we set no time limit
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    try:
        imaginary = any(
            re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", text) for text in (predicted, expected)
        )
        want = _parse(expected, imaginary)
    except Exception as error:  # of antlr and sympy: gold answers come in every form
        return Verdict(
            value="undecided", reason=f"cannot read the gold answer: {type(error).__name__}"
        )
    try:
        have = _parse(predicted, imaginary)
        # equal up to moving terms and a factor
        if isinstance(want, sympy.Eq) and isinstance(have, sympy.Eq):
            ratio = sympy.simplify((have.lhs - have.rhs) / (want.lhs - want.rhs))
            same = bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)
        elif isinstance(have, sympy.Eq) and not isinstance(want, sympy.logic.boolalg.Boolean):
            return wrong("an equation, not a value")
        elif (identical := _identical(have, want)) is not None:
            same = identical
        else:
            same = math_verify(
                want, have, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
            )
    # whatever the prediction makes sympy raise is the prediction's fault
    except Exception as error:
        return wrong(f"cannot read the answer: {type(error).__name__}")
    return CORRECT if same else wrong("another value")


def _check_bounds(predicted: str, expected: str) -> None:
    """Raises TooLarge for a prediction that sympy could take long over.

    It decides by rule and not by the clock.
    """
    heavy = next(
        (
            match
            for match in HEAVY.finditer(LIGHT_FACTORIAL.sub("k", predicted))
            if match.group() not in expected
        ),
        None,
    )
    if heavy:
        raise TooLarge(heavy.group()[:20])
    if _depth(predicted) > MAX_DEPTH_IN_SYMPY + _depth(expected):
        raise TooLarge("nested too deep")
    if predicted.count("|") > MAX_BARS + expected.count("|"):
        raise TooLarge("too many bars")
    if predicted.count("(") > MAX_BRACKETS + expected.count("("):
        raise TooLarge("too many brackets")
    if predicted.count("+") + predicted.count("-") > MAX_TERMS + expected.count(
        "+"
    ) + expected.count("-"):
        raise TooLarge("too many terms")
    powered = 1
    for match in re.finditer(r"(.)\s*\^\s*([{(]|-?\d+)?", predicted):
        exponent = match[2] or ""
        if exponent in ("{", "("):
            exponent = predicted[match.end() : closing(predicted, match.end() - 1)]
        if re.search(r"[\d)}]\s*\^|\^.*\^", exponent):
            raise TooLarge("a tower of powers")
        largest = max((int(digits) for digits in re.findall(r"\d{1,9}", exponent)), default=1)
        powered *= max(largest, 1) if match[1] in ")}]" else 1
        if largest > MAX_EXPONENT or powered > MAX_POWERED:
            raise TooLarge("a power")


def _parse(text: str, imaginary: bool) -> Any:
    """The sympy value of LaTeX, decimals exact; `imaginary`: i is the unit, no symbol is real.

    Raises what antlr and sympy raise.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text = re.sub(r"(?<=[A-Za-z])(?:'|\^\{ ?\\prime ?\}|\^ ?\\prime)", "_{p}", text)
    # thousands; the commas of collections are split by now
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    config = ConversionConfig(lowercase_symbols=False)
    value = latex2sympy(
        text,
        is_real=None if imaginary else True,
        normalization_config=None,
        conversion_config=config,
    )
    floats = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    value = value.xreplace(floats)
    return value.subs(sympy.Symbol("i"), sympy.I) if imaginary else value


def _identical(a: Any, b: Any) -> bool | None:
    """Whether two expressions have one value, to 100 digits and at four points.

    None for sets, relations, and where too few points tell.

    A point at which one of them is not defined makes no difference: (x^2-1)/(x-1) is x+1.
    """
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    agreed = 0
    for point in POINTS if symbols else [()]:
        at = {
            symbol: sympy.Rational(point[i % len(point)] * (i // len(point) + 1), 97)
            for i, symbol in enumerate(symbols)
        }
        x, y = a.subs(at), b.subs(at)
        if not all((value := sympy.N(side, 5)).is_number and value.is_finite for side in (x, y)):
            continue
        difference = x - y
        if difference != 0 and (
            difference.is_Rational
            or not abs(sympy.N(difference, 5, maxn=DIGITS + 20)) < sympy.Float(f"1e-{DIGITS}")
        ):
            return False
        agreed += 1
    return True if agreed >= min(2, len(symbols) + 1) else None
