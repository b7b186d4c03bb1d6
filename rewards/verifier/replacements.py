r"""Regular expressions that give LaTeX and plain text one spelling, in groups by purpose.

The groups are applied in the order of REPLACEMENTS, and each replacement to the whole text. None
of them interprets a value: `1/2` and `0.5` stay different.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from grpo.rewards.verifier.words import MEANINGFUL_WORDS

Replacement = tuple[str, str | Callable[[re.Match[str]], str]]

BASES = {
    **{"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"},
    **{"nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"},
}
END = r"(?![A-Za-z])"  # the end of a command
NUMBER_OR_LETTER = r"(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})"
FUNCTION_NAMES = (
    "arc(?:sin|cos|tan)h?|ar(?:sin|cos|tan)h|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|cis|log|ln|lg"
    "|exp|max|min|gcd|lcm|floor|ceil|sgn|Re|Im"
)


def _derivative(match: re.Match[str]) -> str:
    over = re.sub(r"[\s{}]", "", match[1])
    under = re.sub(r"[\s{}]", "", match[2])
    return rf"\text{{{over}/{under}}}"


def _in_base(match: re.Match[str]) -> str:
    digits, base = match.groups()
    return f"{digits}_{{{BASES.get(base, base)}}}"


def _base_in_words(match: re.Match[str]) -> str:
    base = BASES.get(match[1])
    return f"_{{{base}}}" if base else match.group()


def _lines_as_list(match: re.Match[str]) -> str:
    lines = [re.sub(r"^\s*[-*]\s+", "", line).strip(" ,;") for line in match.group().split("\n")]
    return ", ".join(line for line in lines if line)


def _introduction(match: re.Match[str]) -> str:
    """Returns "" for words that say nothing about the answer behind them."""
    words = match[1].lower().split()
    return match.group() if MEANINGFUL_WORDS.intersection(words) else ""


def _equations(match: re.Match[str]) -> str:
    """Returns the equations of an environment as a list."""
    rows = [row.strip() for row in match["rows"].split(r"\\")]
    return ", ".join(row for row in rows if row)


def _time_of_day(match: re.Match[str]) -> str:
    return rf"\text{{{match[1].lower()}m}}"


# What surrounds an answer and does not belong to it.
DECORATION: list[Replacement] = [
    # Markdown's code, bold and italics: `5`, **5**, *5* -> 5
    (r"^\s*(`+)([^`]+)\1\s*$", r"\2"),
    (r"^\s*(\*\*|__|\*)(?=[^\s*_])(.*[^\s*_])\1\s*$", r"\2"),
    (r"\*\*([A-Za-z ]+:?)\*\*", r"\1"),
    # environments of displayed formulas: \begin{align*} x &= 5 \end{align*} -> x = 5
    (
        r"^\s*\\begin\{(align|aligned|equation|gather|gathered|split)(\*?)\}([^&]*)&?([^&]*)"
        r"\\end\{\1\2\}\s*$",
        r"\3\4",
    ),
    # several lines are a list
    (r"^[^\\&]*(?:\\(?!begin|\\)[^\\&]*)*\n[^\\&]*(?:\\(?!begin|\\)[^\\&]*)*$", _lines_as_list),
    # colours: \color{red} and \textcolor{red} are removed
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\color" + END + r"\s*[a-z]+", ""),
    # invisible text and labels: \phantom{0}, \hspace{1cm}, \tag{1}
    (r"\\[hv]?phantom(?:\{[^{}]*\}|\s*.)", ""),
    (r"\\(?:[hv]space|tag)\*?\s*\{[^{}]*\}|\\(?:smallskip|hfill|nobreak)" + END, ""),
    # labels below, boxes with options, the end of a proof
    (r"\\(?:under|over)brace\s*\{([^{}]*)\}(?:\s*[_^]\s*\{[^{}]*(?:\{[^{}]*\})?\})?", r"\1"),
    (r"\\bbox\s*(?:\[[^\[\]]*\])?", ""),
    (r"\s*\\(?:blacksquare|qed|square|Box)\s*$", ""),
    # sizes and styles: \left, \displaystyle, \large
    (
        r"\\(?:left|right|[bB]igg?[lr]?)"
        + END
        + r"(?:\.(?!\d))?|\\(?:display|text|script)style"
        + END
        + r"|"
        r"\\(?:no)?limits" + END + r"|\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)" + END,
        "",
    ),
    # horizontal spaces: \, \; ~ \quad
    (r"(?<=\d),\s*\\!\s*(?=\d{3})|(?<=\d)\{,\}\s*(?=\d{3}(?!\d))", ""),  # 10,\!080 -> 10080
    (r"\\!\s*", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad" + END, " "),
    # empty braces, spaces behind \text
    (r"\{\s*\}(?=\^)", ""),
    (r"\\text\s+\{", r"\\text{"),
    # signs in front and behind: = 5, \therefore 5, #### 5, 5 \checkmark
    (
        r"^\s*(?:=|#{2,4} |\\(?:therefore|Rightarrow|implies)" + END + r"|→"
        r"|(?i:therefore|thus|hence|so),?(?= ))\s*(?=\S)",
        "",
    ),
    (r"\s*(?:\\checkmark|[\u2600-\u27bf\U0001f300-\U0001faff])+\s*$", ""),
    # HTML: <b>5</b>
    (r"</?(?:b|i|em|strong|p|span|br)\s*/?>", ""),
    # an introduction: The answer is 5
    (
        r"^\s*(?:\\text\{)?\s*(?i:(?:so|thus|hence|therefore),? )?(?i:the )?(?i:final |correct )?"
        r"(?i:answer)(?i: is|:|=)\s*:?\s*\}?(?=\s*\S)",
        "",
    ),
    # The range is [1,2], The solutions are 1 and 2, Roots: 1, 2
    (r"^\s*(?:\\text\{)?\s*[Tt]he ([a-z ]{2,30}) (?:is|are)\s*:?\}?\s+(?=\S)", _introduction),
    (r"^\s*(?:\\text\{)?\s*([A-Za-z][a-z]{2,15}):\s?\}?\s*(?=\D)", _introduction),
    (r"^\s*([A-Za-z]) is (?=\S)", r"\1 = "),
]
# Fonts, and commands with several spellings.
COMMANDS: list[Replacement] = [
    # roots: √2 -> \sqrt{2}, ∛2 -> \sqrt[3]{2}
    (r"√\s*" + NUMBER_OR_LETTER, r"\\sqrt{\1}"),
    (r"∛\s*" + NUMBER_OR_LETTER, r"\\sqrt[3]{\1}"),
    (r"∜\s*" + NUMBER_OR_LETTER, r"\\sqrt[4]{\1}"),
    # primes: f^{\prime\prime} -> f''
    (r"\^\s*\{?\s*\\prime\s*\\prime\s*\}?", "''"),
    (r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime" + END, "'"),
    # vectors: \mathbf{i}, \hat{\imath} -> \vec{i}. Other text in bold is unchanged text.
    (r"^\s*\\(?:mathbf|boldsymbol|bm|pmb)\s*\{([A-Za-z])\}\s*$", r"\1"),
    (r"\\(?:hat|widehat)\s*\{?\s*\\?([ijk])(?:math)?\s*\}?" + END, r"\\vec{\1}"),
    (r"\\(?:mathbf|boldsymbol|bm|pmb|overrightarrow|vec)\s*\{\s*([A-Za-z])\s*\}", r"\\vec{\1}"),
    (r"\\(?:mathbf|boldsymbol|bm|pmb)(?=\s*\{(?![A-Za-z]*\}))", ""),
    # angles and brackets: \ang{45}, \langle 1,2\rangle, \lbrack 1,2\rbrack
    (r"\\ang\s*\{([^{}]*)\}", r"\1^\\circ "),
    (r"\\langle" + END, "("),
    (r"\\rangle" + END, ")"),
    (r"\\lbrack" + END, "["),
    (r"\\rbrack" + END, "]"),
    (r"^\s*<([^<>=]*,[^<>=]*)>\s*$", r"(\1)"),
    # bars: \lvert, \| -> |
    (r"\\\||\\[lr]?[vV]ert" + END, "|"),
    # fractions and binomial coefficients: \dfrac -> \frac, {n \choose k} -> \binom{n}{k}
    (r"\\(?:[dtc]|nice|s)frac" + END, r"\\frac"),
    (r"\\[dt]binom" + END, r"\\binom"),
    (r"\{\s*([^{}]*?)\s*\\choose" + END + r"\s*([^{}]*?)\s*\}", r"\\binom{\1}{\2}"),
    (r"^\s*(\w+)\s*\\choose" + END + r"\s*(\w+)\s*$", r"\\binom{\1}{\2}"),
    (r"\{\s*([^{}]*?)\s*\\over" + END + r"\s*([^{}]*?)\s*\}", r"\\frac{\1}{\2}"),
    # derivatives are names: \frac{dy}{dx}
    (r"\\mathrm\{d\}(?=\s*[A-Za-z^])", "d"),
    (
        r"\\frac\s*\{\s*(d(?:\^\{?\d\}?)?\s*[A-Za-z]?)\s*\}\s*"
        r"\{\s*(d\s*[A-Za-z](?:\^\{?\d\}?)?)\s*\}",
        _derivative,
    ),
    # Euler's number and the imaginary unit in an upright font: \mathrm{e} -> e
    (r"\\(?:mathrm|text|textrm)\s*\{\s*([ei])\s*\}", r"\1"),
    # functions in an upright font: \mathrm{lcm} -> \lcm, but not the unit of 9\text{ min}
    (
        r"\\(?:mathrm|text|textrm|operatorname)\*?\{\s*(" + FUNCTION_NAMES + r")\s*\}"
        r"(?=\s*(?:[({\[|_^]|\\\{|\\frac|\\left|[A-Za-z]|\d*[a-z]))",
        r"\\\1 ",
    ),
    # commands for text: \mbox{ -> \text{
    (
        r"\\(?:mbox|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mathit|mathsf|emph"
        r"|operatorname)\*?\s*\{",
        r"\\text{",
    ),
    (r"\{\s*\\(?:bf|rm|it|sf|tt)" + END + r"\s*([^{}]*)\}", r"\\text{\1}"),
]
# Relations, logic, sets and currencies.
SIGNS: list[Replacement] = [
    (r"\\le(?:q|qq|qslant)" + END, r"\\le "),
    (r"\\ge(?:q|qq|qslant)" + END, r"\\ge "),
    (r"\\lt" + END, "<"),
    (r"\\gt" + END, ">"),
    (r"(?<![\\<>])<=", r"\\le "),
    (r"(?<![\\<>])>=", r"\\ge "),
    (r"\\not\s*>|\\ngtr" + END, r"\\le "),
    (r"\\not\s*<|\\nless" + END, r"\\ge "),
    (r"\\not\s*=", r"\\ne "),
    (r"\\neq" + END + r"|(?<![\\!])!=", r"\\ne "),
    (r"\\vee" + END, r"\\lor "),
    (r"\\wedge" + END, r"\\land "),
    (r"\\bigcup" + END, r"\\cup "),
    (r"\\bigcap" + END, r"\\cap "),
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),
    (r"\\colon" + END, ":"),
    (r"\+/-|\+-", r"\\pm "),
    # the real numbers: \mathbb R -> \mathbb{R}
    (r"\\mathbb\s+R|\\R" + END + r"|\\mathbf\{R\}", r"\\mathbb{R}"),
    # braces of sets: \lbrace -> \{
    (r"\\(?:lbrace|\{)", r"\\{"),
    (r"\\(?:rbrace|\})", r"\\}"),
    # degrees: 90^{\circ}, 90^o, 90 degrees -> 90\text{degree}
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ" + END + r")|\\degree" + END, r"\\text{degree}"),
    (r"(?<=\d)(?:\^\{?o\}?|\s*deg(?:ree)?s?)(?=\s*$)", r"\\text{degree}"),
    (r"(?<=\d) ?degrees?(?=\))", r"\\text{degree}"),
    # dollars: \text{\$}5, US\$5, 5\$ -> \$5
    (r"\\text\{\s*\\?\$\s*\}|\\textdollar" + END, r"\\$"),
    (r"US(?:D ?)?(?=\\?\$)", ""),
    (r"^\s*(\d[\d,]*(?:\.\d+)?)\s*\\\$$", r"\\$\1"),
    # "approximately" in front of the answer: \approx 8.24 -> 8.24
    (r"^(\s*\$?)\s*\\approx" + END, r"\1"),
    # lists: 1 or 2, 1 \text{ and } 2 -> 1\lor 2, 1\land 2
    (r",?\s*\\text\{\s*,?\s*or\s*\}|,?\s+or\s+", r"\\lor "),
    (r",?\s*\\text\{\s*,?\s*and\s*\}|,?\s+and\s+", r"\\land "),
]
# Words around values.
WORDS: list[Replacement] = [
    # a value inside of text: \text{5 percent} -> 5 percent
    (r"^\s*\\text\{\s*(-?\d[^{}]*)\}\s*$", r"\1"),
    # powers of units: \text{m s^{-2}} -> \text{m s^-2}
    (r"\\text\{([^{}]*)\^\{(-?\d)\}([^{}]*)\}", r"\\text{\1^\2\3}"),
    # quantities of siunitx: \SI{9}{kg} -> 9\text{ kg}
    (r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1\\text{ \2}"),
    # times of day: 4:30 p.m. -> 4:30\text{pm}
    (
        r"(?<=\d)\s*(?:\\text\{\s*)?([aApP])(?:\.\s?|)[mM]\.?\s*\}?$",
        _time_of_day,
    ),
    # points: The point (5,2) -> (5,2)
    (
        r"^\s*(?:\\text\{)?\s*(?i:the )?(?i:ordered )?(?i:pair|triple|point|vertex|center)"
        r"(?i: is)?:?\s*\}?\s*(?=\$?\()",
        "",
    ),
]
# Numbers, powers, subscripts and bases.
NUMBERS: list[Replacement] = [
    # numbers in a base: 735 \text{ base } 8 -> 735_{8}
    (
        r"(?<![\w.])([0-9A-Za-z.]+?)\s*(?:\\text\s*\{\s*)?\(?(?:in )?base[ -]?\s*\}?\s*"
        rf"(\d+|{'|'.join(BASES)})\)?\}}?$",
        _in_base,
    ),
    (r"(?<=\w)_\s*\{\s*(?:\\text\{\s*)?([a-z]+)\s*\}?\s*\}$", _base_in_words),
    # subscripts: x_{1} -> x_1, x_{ \max } and x_{\text{max}} -> x_{max}
    (r"_\s*\{\s*\\text\{\s*(\w+)\s*\}\s*\}", r"_{\1}"),
    (r"_\{\s*\\?(\w+)\s*\}", r"_{\1}"),
    (r"_\{(\w)\}", r"_\1"),
    (r"\\text\{(\w+)\}_", r"\1_"),
    # a comma or sign in braces, words for a sign: {-}8, minus 8 -> -8
    (r"\{\s*([,:+-])\s*\}", r"\1"),
    (r"^\s*(?:negative|minus)\s+(?=[\d\\(])", "-"),
    # Python's power: x**2 -> x^2
    (r"\*\*", "^"),
    # scientific notation: 3.2 x 10^5 -> 3.2\times 10^5
    (r"(?<=\d)\s*[xX]\s*(?=10\^)", r"\\times "),
]
MATRICES: list[Replacement] = [
    # equations below each other: \begin{cases} x=1 \\ y=2 \end{cases} -> x=1, y=2
    (
        r"^\s*\\begin\{(?P<kind>cases|gathered|aligned)\}(?P<rows>[^&]*=[^&]*)"
        r"\\end\{(?P=kind)\}\s*$",
        _equations,
    ),
    (r"^(?P<rows>[^&]*=[^&]*\\\\[^&]*=[^&]*)$", _equations),
    # extra space between the rows: \\[2pt] -> \\
    (r"\\\\\[[^\[\]]{1,8}\]|\\cr" + END, r"\\\\"),
    # matrices and arrays in brackets: (\begin{smallmatrix} -> \begin{pmatrix}
    (
        r"[(\[]\s*\\begin\{(?:small)?matrix\}(.*)\\end\{(?:small)?matrix\}\s*[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (
        r"([(\[]?)\s*\\begin\{array\}\s*\{[lcr| ]*\}([^()]*)\\end\{array\}\s*[)\]]?",
        r"\\begin{pmatrix}\2\\end{pmatrix}",
    ),
    # several choices: \text{A, B} -> A, B
    (r"^\\text\{\s*([A-Z](?:\s*(?:,|\\lor|\\land)\s*[A-Z])+)\s*\}$", r"\1"),
]
REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [*DECORATION, *COMMANDS, *SIGNS, *WORDS, *NUMBERS, *MATRICES]
]
