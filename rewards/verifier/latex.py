r"""Normalizes the spelling of answers.

Unicode characters, LaTeX variants and other notations get one spelling. Values are not interpreted:
`1/2` and `0.5` stay different.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rewards.verifier.brackets import find_closing, with_braces
from rewards.verifier.characters import to_latex
from rewards.verifier.decimals import with_fractions

BASES = {
    **{"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"},
    **{"nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"},
}


def _derivative(match: re.Match[str]) -> str:
    over, under = (re.sub(r"[\s{}]", "", part) for part in match.groups())
    return rf"\text{{{over}/{under}}}"


def _in_base(match: re.Match[str]) -> str:
    digits, base = match.groups()
    return f"{digits}_{{{BASES.get(base, base)}}}"


def _base_in_words(match: re.Match[str]) -> str:
    base = BASES.get(match[1])
    return f"_{{{base}}}" if base else match.group()


# Regular expressions and their replacements, applied in this order.
REPLACEMENTS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # Markdown's code: `5` -> 5
    (r"^\s*(`+)([^`]+)\1\s*$", r"\2"),
    # Markdown's bold: **5** -> 5
    (r"^\s*(\*\*|__)(?=[^\s*_])(.*[^\s*_])\1\s*$", r"\2"),
    # thousands separators: 10,\!080 and 10{,}080 -> 10080
    (r"(?<=\d),\s*\\!\s*(?=\d{3})|(?<=\d)\{,\}\s*(?=\d{3})", ""),
    # roots: √2 -> \sqrt{2}, ∛2 -> \sqrt[3]{2}
    (r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}"),
    (r"∛\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt[3]{\1}"),
    (r"∜\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt[4]{\1}"),
    # primes: f^{\prime\prime} -> f''
    (r"\^\s*\{?\s*\\prime\s*\\prime\s*\}?", "''"),
    (r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime(?![A-Za-z])", "'"),
    # vectors: \mathbf{i}, \hat{\imath} -> \vec{i}. Other text in bold is unchanged text.
    (r"^\s*\\(?:mathbf|boldsymbol|bm|pmb)\s*\{([A-Za-z])\}\s*$", r"\1"),
    (r"\\(?:hat|widehat)\s*\{?\s*\\?([ijk])(?:math)?\s*\}?(?![A-Za-z])", r"\\vec{\1}"),
    (r"\\(?:mathbf|boldsymbol|bm|pmb|overrightarrow|vec)\s*\{\s*([A-Za-z])\s*\}", r"\\vec{\1}"),
    (r"\\(?:mathbf|boldsymbol|bm|pmb)(?=\s*\{(?![A-Za-z]*\}))", ""),
    # angles and pointed brackets: \ang{45}, \langle 1,2\rangle
    (r"\\ang\s*\{([^{}]*)\}", r"\1^\\circ "),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\\||\\[lr]?Vert(?![A-Za-z])", "|"),
    # labels below, boxes with options, the end of a proof
    (r"\\(?:under|over)brace\s*\{([^{}]*)\}(?:\s*[_^]\s*\{[^{}]*(?:\{[^{}]*\})?\})?", r"\1"),
    (r"\\bbox\s*(?:\[[^\[\]]*\])?", ""),
    (r"\s*\\(?:blacksquare|qed|square|Box)\s*$", ""),
    # derivatives are names: \frac{dy}{dx}
    (
        r"\\[dt]?frac\s*\{\s*(d(?:\^\{?\d\}?)?\s*[A-Za-z]?)\s*\}\s*\{\s*(d\s*[A-Za-z](?:\^\{?\d\}?)?)\s*\}",
        _derivative,
    ),
    # numbers in a base: 735 \text{ base } 8 -> 735_8
    (
        r"(?<![\w.])([0-9A-Za-z.]+?)\s*(?:\\text\s*\{\s*)?\(?(?:in )?base[ -]?\s*\}?\s*"
        r"(\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)\)?\}?$",
        _in_base,
    ),
    (r"(?<=\w)_\s*\{\s*\\text\{\s*([a-z]+)\s*\}\s*\}$", _base_in_words),
    # an introduction is removed: The answer is 5 -> 5
    (
        r"^\s*(?:\\text\{)?\s*(?i:(?:so|thus|hence|therefore),? )?(?i:the )?(?i:final |correct )?"
        r"(?i:answer)(?i: is|:|=)\s*:?\s*\}?(?=\s*\S)",
        "",
    ),
    # colours: \color{red} and \textcolor{red} are removed
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\color(?![A-Za-z])\s*[a-z]+", ""),
    # sizes of brackets, styles, negative spaces and \limits are removed: \left( -> (
    (
        r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?"
        r"|\\(?:display|text|script)style(?![A-Za-z])|\\!\s*|\\(?:no)?limits(?![A-Za-z])",
        "",
    ),
    # horizontal spaces: \, \; ~ \quad
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    # fractions: \dfrac -> \frac
    (r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac"),
    # binomial coefficients: \dbinom -> \binom, {n \choose k} -> \binom{n}{k}
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\{\s*([^{}]*?)\s*\\choose(?![A-Za-z])\s*([^{}]*?)\s*\}", r"\\binom{\1}{\2}"),
    (r"\{\s*([^{}]*?)\s*\\over(?![A-Za-z])\s*([^{}]*?)\s*\}", r"\\frac{\1}{\2}"),
    # Euler's number and the imaginary unit in an upright font: \mathrm{e} -> e
    (r"\\(?:mathrm|text|textrm)\s*\{\s*([ei])\s*\}", r"\1"),
    # functions in an upright font: \mathrm{lcm} -> \lcm, but not the unit of 9\text{ min}
    (
        r"\\(?:mathrm|text|textrm|operatorname)\*?\{\s*"
        r"(arc(?:sin|cos|tan)h?|ar(?:sin|cos|tan)h|sin|cos|tan|log|ln|lg|exp|max|min|gcd|lcm|floor"
        r"|ceil|sgn|Re|Im)\s*\}(?=\s*(?:[({\[|_^]|\\\{|\\left|[A-Za-z]))",
        r"\\\1 ",
    ),
    # commands for text: \mbox{ -> \text{
    (
        r"\\(?:mbox|textbf|textit|textrm|textnormal|texttt|mathrm|mathit|mathsf|emph|bf|rm)\s*\{",
        r"\\text{",
    ),
    # relations: \leq and <= -> \le
    (r"\\le(?:q|qslant)(?![A-Za-z])", r"\\le "),
    (r"\\ge(?:q|qslant)(?![A-Za-z])", r"\\ge "),
    (r"(?<![\\<>])<=", r"\\le "),
    (r"(?<![\\<>])>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|(?<![\\!])!=", r"\\ne "),
    # bars: \lvert -> |
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    # logical signs: \vee -> \lor
    (r"\\vee(?![A-Za-z])", r"\\lor "),
    (r"\\wedge(?![A-Za-z])", r"\\land "),
    # the real numbers: \mathbb R -> \mathbb{R}
    (r"\\mathbb\s+R|\\R(?![A-Za-z])|\\mathbf\{R\}", r"\\mathbb{R}"),
    # braces of sets: \lbrace -> \{
    (r"\\(?:lbrace|\{)", r"\\{"),
    (r"\\(?:rbrace|\})", r"\\}"),
    # degrees: 90^{\circ} -> 90\text{degree}
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", r"\\text{degree}"),
    # lists: 1 or 2, 1 \text{ and } 2 -> 1\lor 2, 1\land 2
    (r",?\s*\\text\{\s*or\s*\}|,?\s+or\s+", r"\\lor "),
    (r",?\s*\\text\{\s*and\s*\}|,?\s+and\s+", r"\\land "),
    # subscripts of one character: x_{1} -> x_1
    (r"_\{(\w)\}", r"_\1"),
    # a comma or sign in braces: {-}8 -> -8
    (r"\{\s*([,+-])\s*\}", r"\1"),
    # "approximately" in front of the answer is removed: \approx 8.24 -> 8.24
    (r"^(\s*\$?)\s*\\approx(?![A-Za-z])", r"\1"),
    # invisible text and labels are removed: \phantom{0}, \hspace{1cm}, \tag{1}
    (r"\\[hv]?phantom(?:\{[^{}]*\}|\s*.)", ""),
    (r"\\(?:[hv]space|tag)\*?\s*\{[^{}]*\}|\\(?:smallskip|hfill|nobreak)(?![A-Za-z])", ""),
    # Python's power: x**2 -> x^2
    (r"\*\*", "^"),
    # longer subscripts: x_{ \max } -> x_{max}
    (r"_\{\s*\\?(\w+)\s*\}", r"_{\1}"),
    # extra space between the rows of a matrix: \\[2pt] -> \\
    (r"\\\\\[[^\[\]]{1,8}\]", r"\\\\"),
    # matrices in brackets: (\begin{smallmatrix} -> \begin{pmatrix}
    (
        r"[(\[]\s*\\begin\{(?:small)?matrix\}(.*)\\end\{(?:small)?matrix\}\s*[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
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
DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degree\}")
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
MATH_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
FULL_STOP = re.compile(r"(?<!\.)[.。]\s*$")
MAX_FRAMES = 10


# Commands whose argument is shown unchanged except for a line or frame.
WRAPPER = re.compile(r"\\(?:underline|fbox|boxed|framebox|bm)(?![A-Za-z])\s*")


def normalize(text: str) -> str:
    r"""Returns the normalized spelling of an answer.

    In this order: Unicode becomes LaTeX; frames and REPLACEMENTS are applied; a full stop at the
    end, quotation marks, dollar signs (if their number is even), and `\(`, `\)`, `\[` and `\]` are
    removed; repeating decimals become fractions; degrees become radians if
    the answer has a trigonometric function; white space becomes single spaces; the arguments of
    `\frac` and `\sqrt` get braces.

    Examples: `$\dfrac12$.` -> `\frac{1}{2}`, `10,\!080` -> `10,080`, `90°` -> `90\text{degree}`.
    """
    text = _without_frames(to_latex(text))
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"^[\"“”„«»\s]+|[\"“”»«\s]+$", "", text)
    text = FULL_STOP.sub("", text).strip()
    num_dollars = len(re.findall(r"(?<!\\)\$", text))
    if num_dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = MATH_DELIMITER.sub("", text)
    text = _without_outer_braces(text.strip())
    text = with_fractions(text)
    text = re.sub(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.])", _without_spaces, text)  # 1 000 000
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


def _without_outer_braces(text: str) -> str:
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
    text = " ".join(text.split()).strip(" .")
    if re.fullmatch(r"\(\s*\w\s*\)", text):
        return text[1:-1].strip()
    return text
