"""One spelling for each answer: what unicode, LaTeX and habit write differently.

Text in, text out; knows nothing of values.
"""

from __future__ import annotations

import re

UNICODE: dict[str, str | int | None] = {
    **{
        "−": "-",
        "–": "-",
        "—": "-",
        "‑": "-",
        "×": r"\times ",
        "÷": r"\div ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
    },
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "°": r"^\circ ",
        "θ": r"\theta ",
    },
    **{
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
        "∅": r"\emptyset ",
        "％": "%",
        "€": r"\text{euro}",
        "£": r"\text{pound}",
    },
    **{
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅛": r"\frac{1}{8}",
    },
    **{char: f"^{{{digit}}}" for digit, char in zip("0123456789-+n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", strict=True)},
    **{char: f"_{{{digit}}}" for digit, char in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width
}
TABLE = str.maketrans(UNICODE)
SAME = [  # (what it is, what it becomes), in this order
    (r"^\s*(\*\*|__)(?=[^\s*_])(.*[^\s*_])\1\s*$", r"\2"),  # markdown's bold
    (r",\s*\\!\s*(?=\d{3})", ","),
    (r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}"),
    (r"∛\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt[3]{\1}"),
    (
        r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?"
        r"|\\(?:display|text)style(?![A-Za-z])|\\!\s*|\\limits",
        "",
    ),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:mbox|textbf|textit|textrm|mathrm|mathbf|emph)\s*\{", r"\\text{"),
    (r"\\le(?:q|qslant)(?![A-Za-z])", r"\\le "),
    (r"\\ge(?:q|qslant)(?![A-Za-z])", r"\\ge "),
    (r"(?<![\\<>])<=", r"\\le "),
    (r"(?<![\\<>])>=", r"\\ge "),
    (r"\\(?:lbrace|\{)", r"\\{"),
    (r"\\(?:rbrace|\})", r"\\}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", r"\\text{degree}"),
    (r",?\s*\\text\{\s*(?:or|and)\s*\}|,?\s+(?:or|and)\s+", ","),
    (r"_\{(\w)\}", r"_\1"),
    (r"\{,\}", ","),
    (r"^(\s*\$?)\s*\\approx(?![A-Za-z])", r"\1"),
    (r"\\phantom(?:\{[^{}]*\}|\s*.)", ""),
    (r"\*\*", "^"),
    (r"_\{\s*\\?(\w+)\s*\}", r"_{\1}"),
    (r"\\\\\[[^\[\]]{1,8}\]", r"\\\\"),  # a row's extra space
    (
        r"([(\[]?)\s*\\begin\{array\}\s*\{[lcr| ]*\}([^()]*)\\end\{array\}\s*[)\]]?",
        r"\\begin{pmatrix}\2\\end{pmatrix}",
    ),
    (r"^\\text\{\s*([A-Z](?:\s*,\s*[A-Z])+)\s*\}$", r"\1"),
    (r"\\text\{(\w+)\}_", r"\1_"),
    (r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})$", r"\1\\times 10^{\2}"),
]
DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degree\}")
REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}")
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")


def normalise(text: str) -> str:
    r"""One spelling of an answer.

    `$\dfrac12$.` -> `\frac{1}{2}`, `10,\!080` -> `10,080`, `90°` -> `90\text{degree}`.
    """
    text = text.translate(TABLE)
    # ¹⁰ is one exponent
    text = (
        re.sub(r"\}\^\{(?=[\dn]\})", "", text)
        if re.search(r"\^\{[\d+-]\}\^\{[\dn]\}", text)
        else text
    )
    for pattern, plain in SAME:
        text = re.sub(pattern, plain, text)
    text = text.strip().rstrip(".。").strip()
    if len(dollars := re.findall(r"(?<!\\)\$", text)) % 2 == 0 and dollars:
        text = re.sub(r"(?<!\\)\$", "", text)
    if text[:2] in (r"\(", r"\[") and text[-2:] in (r"\)", r"\]"):
        text = text[2:-2]
    text = REPEATING.sub(_repeating, text)
    if TRIGONOMETRIC.search(text):
        text = DEGREES.sub(r"(\1\\pi/180)", text)
    return braced(re.sub(r"\s+", " ", text.strip().rstrip("."))).strip()


def braced(text: str) -> str:
    r"""Returns the text with the arguments of `\frac` and `\sqrt` in braces.

    `\frac12` -> `\frac{1}{2}`, `\frac{270}7`, `\sqrt2`, `\sqrt[3]5` likewise.
    """
    out: list[str] = []
    i = 0
    pending = 0  # arguments that the command before still takes
    while i < len(text):
        command = re.compile(r"\\[A-Za-z]+|\\.").match(text, i)
        token = command.group() if command else text[i]
        i += len(token)
        if token == " " and pending:
            continue
        if pending and token == "[" and out[-1] == r"\sqrt" and "]" in text[i:]:
            end = text.index("]", i) + 1
            token, i = token + text[i:end], end
        elif pending and token == "{":
            end = closing(text, i - 1)
            if end < 0:
                return "".join(out) + text[i - 1 :]
            token, i, pending = "{" + braced(text[i:end]) + "}", end + 1, pending - 1
        elif pending and not command:
            token, pending = "{" + token + "}", pending - 1
        # `\frac\pi2`: the command is the argument; a command with arguments of its own is left as
        # it is
        elif pending:
            token, pending = (
                ("{" + token + "}", pending - 1)
                if token not in (r"\frac", r"\sqrt")
                else (token, 0)
            )
        if token in (r"\frac", r"\sqrt"):
            pending = 2 if token == r"\frac" else 1
        out.append(token)
    return "".join(out)


def closing(text: str, start: int) -> int:
    """Returns where the bracket at `start` is closed, -1 if nowhere.

    Brackets of all kinds count alike: any of ), ] and } closes one.
    """
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return -1


def split(text: str, separators: tuple[str, ...] = (",", ";")) -> list[str]:
    """The pieces between separators outside all brackets: `"(1,2),3"` -> `["(1,2)", "3"]`."""
    pieces, start, depth, i = [], 0, 0, 0
    while i < len(text):
        found = next((s for s in separators if depth == 0 and text.startswith(s, i)), "")
        if found:
            pieces.append(text[start:i].strip())
            start = i + len(found)
        depth += (text[i] in "([{") - (text[i] in ")]}")
        i += len(found) or 1
    return [*pieces, text[start:].strip()]


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` -> `\frac{15}{90}`."""
    whole, once, again = match.groups()
    numerator = int(whole + once + again) - int(whole + once or 0)
    denominator = 10 ** len(once) * (10 ** len(again) - 1)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def words(text: str) -> str:
    r"""`\text{ (C) }`, `C.` and `c` -> "c"."""
    text = " ".join(re.sub(r"\\text|[{}$]", "", text).casefold().split()).strip(" .")
    return text[1:-1].strip() if re.fullmatch(r"\(\s*\w\s*\)", text) else text
