"""Language reward.

The share of the thoughts that is in the prompt's language, by script and small words.
Deterministic; no model.

R1's second stage pays for it so that chains of thought do not mix languages (DeepSeek-R1 2501.12948
section 2.3.2).
"""

from __future__ import annotations

import re
from collections import Counter

from grpo.types import Completion, Problem, UserError

SCRIPTS = {  # script -> its characters
    "latin": r"A-Za-z\u00c0-\u024f",
    "han": r"\u3400-\u4dbf\u4e00-\u9fff",
    "kana": r"\u3040-\u30ff",
    "hangul": r"\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": r"\u0400-\u04ff",
    "arabic": r"\u0600-\u06ff",
    "devanagari": r"\u0900-\u097f",
    "greek": r"\u0370-\u03ff",
    "thai": r"\u0e00-\u0e7f",
    "hebrew": r"\u0590-\u05ff",
}
PATTERN = re.compile(
    "|".join(
        f"(?P<{name}>[{chars}]{'' if name in ('han', 'kana') else '+'})"
        for name, chars in SCRIPTS.items()
    )
)
SMALL = {  # words that only one of these languages writes so, and writes all the time
    "en": "the of and to is that it for as with was are be this have "
    "from or but not by what all we when can there an which if then so",
    "de": "der die das und ist nicht ein eine mit für auf den dem wir "
    "auch sich von zu wenn dann also daher gilt sind wird haben",
    "fr": "le la les et est une des du que dans pour qui sur avec "
    "pas nous donc alors ce cette sont au par plus ou mais on",
    "es": "el los las y es una que para con por del se como más "
    "pero su entonces si lo esto está son al porque cuando hay",
    "it": "il gli e è una che di per con non del della sono "
    "anche come più quindi allora questo se ma dei abbiamo",
    "pt": "o os e é uma que para com não do da dos das "
    "em por mais como mas então se isso são ao temos",
}
LANGUAGES: dict[str, set[str]] = {  # language -> the scripts it is written in
    "zh": {"han"},
    "ja": {"han", "kana"},
    "ko": {"hangul"},
    "ru": {"cyrillic"},
    "ar": {"arabic"},
    "hi": {"devanagari"},
    "el": {"greek"},
    "th": {"thai"},
    "he": {"hebrew"},
    **{name: {"latin"} for name in SMALL},
}
OWNERS = {
    word: [name for name, words in SMALL.items() if word in words.split()]
    for words in SMALL.values()
    for word in words.split()
}
FORMULA = re.compile(
    r"\$[^$]*\$|\\\([^()]*\\\)|\\\[[^\[\]]*\\\]|```[^`]*```|`[^`]*`|\\[A-Za-z]+|https?:\S+"
    r"|(?<![A-Za-z])[A-Za-z\u0370-\u03ff](?![A-Za-z\u0370-\u03ff])"
)


def prepare(language: str | None = None) -> None:
    """Raises UserError for a language that is not known."""
    if language is not None and language not in LANGUAGES:
        raise UserError(
            f"rewards.language.options.language: got {language!r}; have "
            f"{', '.join(sorted(LANGUAGES))}"
        )


def reward(completion: Completion, problem: Problem, *, language: str | None = None) -> float:
    """0 to 1: the share of the thoughts' words in `language` (default: the question's).

    1 without words: formulas are of no language.

    Source: DeepSeek-R1 2501.12948 section 2.3.2, which does not say how languages are told apart.
    """
    thoughts = completion.text.partition("</think>")[0].replace("<think>", "")
    return share(thoughts, language or of(problem.question))


def share(text: str, language: str) -> float:
    """The share of a text's words in a language: `share("So x 是 the answer", "en")` is 3/4.

    A Han character counts as a word.

    Of words in Latin letters, as many are foreign as there are foreign words among the small ones
    ("the", "und", "est").
    """
    counts, small = _counts(text)
    total = sum(counts.values())
    if not total:
        return 1.0
    ours = sum(counts[script] for script in LANGUAGES[language])
    if language not in SMALL:
        return ours / total
    known = small[language] + (foreign := sum(n for name, n in small.items() if name != language))
    return ours * (1 - foreign / known if known else 1.0) / total


def of(text: str) -> str:
    """The language of a text: the one that holds most of its words, English when nothing tells."""
    counts, small = _counts(text)
    if not counts:
        return "en"
    if counts["kana"]:
        return "ja"
    script = max(counts, key=lambda name: counts[name])
    if script == "latin":
        return max(SMALL, key=lambda name: (small[name], name == "en"))
    return next(name for name, scripts in LANGUAGES.items() if script in scripts)


def _counts(text: str) -> tuple[Counter[str], Counter[str]]:
    """Words by script, and small words by language.

    Formulas, code, links and single letters left out.
    """
    counts: Counter[str] = Counter()
    small: Counter[str] = Counter()
    for match in PATTERN.finditer(FORMULA.sub(" ", text)):
        counts[match.lastgroup or ""] += 1
        owners = OWNERS.get(match.group().lower(), ())
        if len(owners) == 1:
            small[owners[0]] += 1
    return counts, small
