r"""Normalizes the spelling of answers, and splits them outside of brackets.

Unicode characters, LaTeX variants and other notations get one spelling. Values are not interpreted:
`1/2` and `0.5` stay different.
"""

from __future__ import annotations

import re

UNICODE: dict[str, str | int | None] = {
    # operators and signs
    "−": "-",
    "–": "-",
    "—": "-",
    "‑": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "±": r"\pm ",
    # symbols
    "π": r"\pi ",
    "θ": r"\theta ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    # relations and sets
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    # spaces
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
    # units
    "％": "%",
    "€": r"\text{euro}",
    "£": r"\text{pound}",
    # fractions
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅛": r"\frac{1}{8}",
}
# superscripts: ² -> ^{2}
UNICODE |= {
    char: f"^{{{plain}}}" for plain, char in zip("0123456789-+n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", strict=True)
}
# subscripts: ₂ -> _{2}
UNICODE |= {char: f"_{{{digit}}}" for digit, char in enumerate("₀₁₂₃₄₅₆₇₈₉")}
# full-width forms of ASCII
UNICODE |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
UNICODE_TABLE = str.maketrans(UNICODE)

# Regular expressions and their replacements, applied in this order.
REPLACEMENTS = [
    # Markdown's bold: **5** -> 5
    (r"^\s*(\*\*|__)(?=[^\s*_])(.*[^\s*_])\1\s*$", r"\2"),
    # thousands separators: 10,\!080 -> 10,080
    (r",\s*\\!\s*(?=\d{3})", ","),
    # roots: √2 -> \sqrt{2}, ∛2 -> \sqrt[3]{2}
    (r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}"),
    (r"∛\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt[3]{\1}"),
    # sizes of brackets, styles, negative spaces and \limits are removed: \left( -> (
    (
        r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?"
        r"|\\(?:display|text)style(?![A-Za-z])|\\!\s*|\\limits",
        "",
    ),
    # horizontal spaces: \, \; ~ \quad
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    # fractions: \dfrac -> \frac
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    # commands for text: \mbox{ -> \text{
    (r"\\(?:mbox|textbf|textit|textrm|mathrm|mathbf|emph)\s*\{", r"\\text{"),
    # relations: \leq and <= -> \le
    (r"\\le(?:q|qslant)(?![A-Za-z])", r"\\le "),
    (r"\\ge(?:q|qslant)(?![A-Za-z])", r"\\ge "),
    (r"(?<![\\<>])<=", r"\\le "),
    (r"(?<![\\<>])>=", r"\\ge "),
    # braces of sets: \lbrace -> \{
    (r"\\(?:lbrace|\{)", r"\\{"),
    (r"\\(?:rbrace|\})", r"\\}"),
    # degrees: 90^{\circ} -> 90\text{degree}
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", r"\\text{degree}"),
    # lists: 1 or 2, 1 \text{ and } 2 -> 1,2
    (r",?\s*\\text\{\s*(?:or|and)\s*\}|,?\s+(?:or|and)\s+", ","),
    # subscripts of one character: x_{1} -> x_1
    (r"_\{(\w)\}", r"_\1"),
    # thousands separators: 10{,}080 -> 10,080
    (r"\{,\}", ","),
    # "approximately" in front of the answer is removed: \approx 8.24 -> 8.24
    (r"^(\s*\$?)\s*\\approx(?![A-Za-z])", r"\1"),
    # invisible text is removed: \phantom{0}
    (r"\\phantom(?:\{[^{}]*\}|\s*.)", ""),
    # Python's power: x**2 -> x^2
    (r"\*\*", "^"),
    # longer subscripts: x_{ \max } -> x_{max}
    (r"_\{\s*\\?(\w+)\s*\}", r"_{\1}"),
    # extra space between the rows of a matrix: \\[2pt] -> \\
    (r"\\\\\[[^\[\]]{1,8}\]", r"\\\\"),
    # arrays in brackets are matrices: (\begin{array}{c} ... \end{array}) -> \begin{pmatrix} ...
    (
        r"([(\[]?)\s*\\begin\{array\}\s*\{[lcr| ]*\}([^()]*)\\end\{array\}\s*[)\]]?",
        r"\\begin{pmatrix}\2\\end{pmatrix}",
    ),
    # several choices: \text{A, B} -> A, B
    (r"^\\text\{\s*([A-Z](?:\s*,\s*[A-Z])+)\s*\}$", r"\1"),
    # names with a subscript: \text{x}_1 -> x_1
    (r"\\text\{(\w+)\}_", r"\1_"),
    # scientific notation: 3.2e5 -> 3.2\times 10^{5}
    (r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})$", r"\1\\times 10^{\2}"),
]
SUPERSCRIPTS_IN_A_ROW = re.compile(r"\^\{[\d+-]\}\^\{[\dn]\}")
DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degree\}")
REPEATING_DECIMAL = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}")
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
NUM_ARGUMENTS = {r"\frac": 2, r"\sqrt": 1}


def normalize(text: str) -> str:
    r"""Returns the normalized spelling of an answer.

    In this order: Unicode becomes LaTeX; REPLACEMENTS are applied; a full stop at the end, dollar
    signs (if their number is even), and `\(...\)` or `\[...\]` around the answer are removed;
    repeating decimals become fractions; degrees become radians if the answer has a trigonometric
    function; white space becomes single spaces; the arguments of `\frac` and `\sqrt` get braces.

    Examples: `$\dfrac12$.` -> `\frac{1}{2}`, `10,\!080` -> `10,080`, `90°` -> `90\text{degree}`.
    """
    text = text.translate(UNICODE_TABLE)
    if SUPERSCRIPTS_IN_A_ROW.search(text):  # ¹⁰ is one exponent: ^{1}^{0} -> ^{10}
        text = re.sub(r"\}\^\{(?=[\dn]\})", "", text)
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = text.strip().rstrip(".。").strip()
    num_dollars = len(re.findall(r"(?<!\\)\$", text))
    if num_dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    if text[:2] in (r"\(", r"\[") and text[-2:] in (r"\)", r"\]"):
        text = text[2:-2]
    text = REPEATING_DECIMAL.sub(_fraction_of_repeating_decimal, text)
    if TRIGONOMETRIC.search(text):
        text = DEGREES.sub(r"(\1\\pi/180)", text)
    text = re.sub(r"\s+", " ", text.strip().rstrip("."))
    return with_braces(text).strip()


def with_braces(text: str) -> str:
    r"""Returns the text with braces around the arguments of `\frac` and `\sqrt`.

    Examples: `\frac12` -> `\frac{1}{2}`, `\frac{270}7` -> `\frac{270}{7}`, `\sqrt[3]5` ->
    `\sqrt[3]{5}`.
    """
    pieces: list[str] = []
    num_missing = 0  # arguments that the last \frac or \sqrt still needs
    index = 0
    while index < len(text):
        command = COMMAND.match(text, index)
        token = command.group() if command else text[index]
        index += len(token)
        if token in NUM_ARGUMENTS:
            # As an argument it gets no braces, because its own arguments follow: \frac\sqrt23.
            pieces.append(token)
            num_missing = NUM_ARGUMENTS[token]
        elif num_missing == 0:
            pieces.append(token)
        elif token == " ":
            continue
        elif token == "[" and pieces[-1] == r"\sqrt" and "]" in text[index:]:
            end = text.index("]", index) + 1
            pieces.append(text[index - 1 : end])
            index = end
        elif token == "{":
            end = find_closing(text, index - 1)
            if end < 0:
                pieces.append(text[index - 1 :])
                break
            pieces.append("{" + with_braces(text[index:end]) + "}")
            num_missing -= 1
            index = end + 1
        else:  # a character, or a command without arguments: \frac\pi2
            pieces.append("{" + token + "}")
            num_missing -= 1
    return "".join(pieces)


def _depth_change(char: str) -> int:
    """Returns 1 for an opening bracket of any kind, -1 for a closing one, 0 otherwise."""
    if char in "([{":
        return 1
    if char in ")]}":
        return -1
    return 0


def nesting_depth(text: str) -> int:
    """Returns the depth of the most deeply nested brackets: 2 for `((x)+1)`."""
    depth = 0
    max_depth = 0
    for char in text:
        depth += _depth_change(char)
        max_depth = max(max_depth, depth)
    return max_depth


def find_closing(text: str, start: int) -> int:
    """Returns the index at which the bracket at `start` is closed, -1 if it is never closed.

    All kinds of brackets are equivalent: an interval such as (3,4] is closed by its `]`.
    """
    depth = 0
    for index in range(start, len(text)):
        depth += _depth_change(text[index])
        if depth == 0:
            return index
    return -1


def split_at_top_level(text: str, separators: tuple[str, ...] = (",", ";")) -> list[str]:
    """Splits text at separators outside all brackets: `"(1,2),3"` -> `["(1,2)", "3"]`."""
    pieces = []
    piece_start = 0
    depth = 0
    index = 0
    while index < len(text):
        separator = _separator_at(text, index, separators) if depth == 0 else ""
        if separator:
            pieces.append(text[piece_start:index].strip())
            index += len(separator)
            piece_start = index
        else:
            depth += _depth_change(text[index])
            index += 1
    pieces.append(text[piece_start:].strip())
    return pieces


def _separator_at(text: str, index: int, separators: tuple[str, ...]) -> str:
    """Returns the separator that begins at `index`, "" if none does."""
    for separator in separators:
        if text.startswith(separator, index):
            return separator
    return ""


def _fraction_of_repeating_decimal(match: re.Match[str]) -> str:
    r"""Returns a repeating decimal as a fraction: `0.1\overline{6}` -> `\frac{15}{90}`."""
    integer, fixed, repeating = match.groups()
    not_repeating = integer + fixed
    numerator = int(not_repeating + repeating) - int(not_repeating or "0")
    denominator = 10 ** len(fixed) * (10 ** len(repeating) - 1)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def as_words(text: str) -> str:
    r"""Returns text in lower case with single spaces, to compare words.

    `\text`, braces, dollar signs, full stops at the ends, and brackets around a single letter are
    removed.

    Examples: `\text{ (C) }`, `C.` and `c` -> "c"; `\text{Two  Points}` -> "two points".
    """
    text = re.sub(r"\\text|[{}$]", "", text).casefold()
    text = " ".join(text.split()).strip(" .")
    if re.fullmatch(r"\(\s*\w\s*\)", text):
        return text[1:-1].strip()
    return text
