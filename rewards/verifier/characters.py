r"""Replaces Unicode characters by LaTeX: `x²` -> `x^{2}`, `≤` -> `\le`."""

from __future__ import annotations

import re
import unicodedata

UNICODE: dict[str, str | int | None] = {
    # operators and signs
    "−": "-",
    "–": "-",
    "—": "-",
    "‐": "-",
    "‑": "-",
    "‒": "-",
    "―": "-",
    "﹣": "-",
    "∕": "/",
    "⁄": "/",
    "∗": "*",
    "∙": r"\cdot ",
    "•": r"\cdot ",
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
    "℃": r"^\circ\text{C}",
    "℉": r"^\circ\text{F}",
    "⟨": "(",
    "⟩": ")",
    "∥": "|",
    "‖": "|",
    "º": r"^\circ ",
    "˚": r"^\circ ",
    "∠": r"\angle ",
    "ħ": r"\hbar ",
    "ℏ": r"\hbar ",
    "…": r"\ldots ",
    "∣": "|",
    "′": "'",
    "’": "'",
    "‘": "'",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    # relations and sets
    "≡": r"\equiv ",
    "≈": r"\approx ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≦": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≧": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "∅": r"\emptyset ",
    "∖": r"\setminus ",
    "∶": ":",
    "ℝ": r"\mathbb{R}",
    "∨": r"\lor ",
    "∧": r"\land ",
    # spaces
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
    "\u2007": " ",
    "\u2002": " ",
    "\u2003": " ",
    "\u3000": " ",
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
    "⅜": r"\frac{3}{8}",
    "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}",
    "⅕": r"\frac{1}{5}",
    "⅖": r"\frac{2}{5}",
    "⅗": r"\frac{3}{5}",
    "⅘": r"\frac{4}{5}",
    "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}",
}
# characters that are not visible: zero-width and soft hyphens, joiners, marks of direction
UNICODE |= dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2064\ufeff\ufe0f")
# superscripts: ² -> ^{2}
UNICODE |= {
    char: f"^{{{plain}}}" for plain, char in zip("0123456789-+n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", strict=True)
}
# subscripts: ₂ -> _{2}
UNICODE |= {char: f"_{{{digit}}}" for digit, char in enumerate("₀₁₂₃₄₅₆₇₈₉")}
# full-width forms of ASCII
UNICODE |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
# Greek letters
GREEK_CHARACTERS = "αβγδεζηκλμνξρστφχψωΓΔΘΛΣΦΨΩ"
GREEK_NAMES = """
    alpha beta gamma delta epsilon zeta eta kappa lambda mu nu xi rho sigma tau phi chi psi omega
    Gamma Delta Theta Lambda Sigma Phi Psi Omega
"""
UNICODE |= {
    char: rf"\{name} " for char, name in zip(GREEK_CHARACTERS, GREEK_NAMES.split(), strict=True)
}
UNICODE_TABLE = str.maketrans(UNICODE)
# letters and digits in the styles of mathematical typesetting: 𝑥, 𝟓
STYLED = re.compile("[\U0001d400-\U0001d7ff\u2460-\u2473]")
SMALL_FRACTION = re.compile(r"\^\{(\d+)\}/_\{(\d+)\}")  # ¹¹⁄₂₀
SCRIPTS_IN_A_ROW = re.compile(r"(?P<sign>[\^_])\{[\dn+-]\}(?:(?P=sign)\{[\dn+-]\})+")


def to_latex(text: str) -> str:
    r"""Returns the text with LaTeX in place of Unicode characters: `x¹⁰ ≤ ½` -> `x^{10} \le ...`.

    Characters that are not visible are removed.
    """
    text = STYLED.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text)
    text = text.translate(UNICODE_TABLE)
    text = SCRIPTS_IN_A_ROW.sub(_joined, text)
    return SMALL_FRACTION.sub(r"\\frac{\1}{\2}", text)


def _joined(match: re.Match[str]) -> str:
    """Returns one exponent or subscript: `^{1}^{0}`, from ¹⁰, becomes `^{10}`."""
    return f"{match['sign']}{{{re.sub(r'[{}^_]', '', match.group())}}}"
