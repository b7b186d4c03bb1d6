"""Language reward: the share of the thoughts that is in the language of the question.

DeepSeek-R1's second RL stage uses it against chains of thought that mix languages (2501.12948
section 2.3.2). The paper does not say how it identifies the language of a word. Here no model is
used:

- A script other than Latin identifies a language by itself, such as Hangul for Korean.
- Languages in Latin script are identified by function words ("the", "und", "est").

Formulas, code, links and single letters belong to no language.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from grpo.types import Completion, Problem, UserError

# Character ranges of each script.
SCRIPTS = {
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
SCRIPTS_WITHOUT_SPACES = ("han", "kana")  # each character counts as a word


def _word_pattern() -> re.Pattern[str]:
    """Returns a pattern that matches a word in any script. The group name is the script."""
    alternatives = []
    for script, characters in SCRIPTS.items():
        repeat = "" if script in SCRIPTS_WITHOUT_SPACES else "+"
        alternatives.append(f"(?P<{script}>[{characters}]{repeat})")
    return re.compile("|".join(alternatives))


WORD = _word_pattern()
# Frequent function words of the languages in Latin script. A word that is in several lists does not
# identify a language.
FUNCTION_WORDS = {
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
# The scripts in which each language is written.
LANGUAGES: dict[str, set[str]] = {
    "zh": {"han"},
    "ja": {"han", "kana"},
    "ko": {"hangul"},
    "ru": {"cyrillic"},
    "ar": {"arabic"},
    "hi": {"devanagari"},
    "el": {"greek"},
    "th": {"thai"},
    "he": {"hebrew"},
}
LANGUAGES |= {language: {"latin"} for language in FUNCTION_WORDS}


def _identifying_words() -> dict[str, str]:
    """Returns the language of each function word that occurs in only one language."""
    languages_of: dict[str, list[str]] = {}
    for language, words in FUNCTION_WORDS.items():
        for word in set(words.split()):
            languages_of.setdefault(word, []).append(language)
    return {word: languages[0] for word, languages in languages_of.items() if len(languages) == 1}


LANGUAGE_OF_WORD = _identifying_words()
# Text without a language: formulas, code, LaTeX commands, links, single letters.
NO_LANGUAGE = re.compile(
    r"\$[^$]*\$|\\\([^()]*\\\)|\\\[[^\[\]]*\\\]|```[^`]*```|`[^`]*`|\\[A-Za-z]+|https?:\S+"
    r"|(?<![A-Za-z])[A-Za-z\u0370-\u03ff](?![A-Za-z\u0370-\u03ff])"
)


def prepare(language: str | None = None) -> None:
    """Raises UserError for an unknown language."""
    if language is not None and language not in LANGUAGES:
        raise UserError(
            f"rewards.language.options.language: unknown language {language!r}. Available: "
            f"{', '.join(sorted(LANGUAGES))}."
        )


def reward(completion: Completion, problem: Problem, *, language: str | None = None) -> float:
    """Returns the share of the thoughts that is in a language, from 0 to 1.

    The thoughts are the text before `</think>`, or the whole text if it has no such tag. Thoughts
    without words have the reward 1.

    Args:
        completion: The completion to score.
        problem: Its problem.
        language: A key of LANGUAGES. None: the language of the question.

    Source: DeepSeek-R1 2501.12948 section 2.3.2; see the module for what the paper leaves open.
    """
    thoughts = completion.text.partition("</think>")[0].replace("<think>", "")
    return share_in_language(thoughts, language or detect_language(problem.question))


def share_in_language(text: str, language: str) -> float:
    """Returns the share of a text's words that are in a language, 1 if it has no words.

    For a language in Latin script, its share of the words in Latin script is estimated: it is its
    share of the function words that identify a language, or 1 if there are none.

    Example: `share_in_language("So x 是 the answer", "en")` is 3/4: a Han character counts as a
    word, a single letter does not.
    """
    counts = _count_words(text)
    num_words = counts.by_script.total()
    if num_words == 0:
        return 1.0
    num_in_scripts = sum(counts.by_script[script] for script in LANGUAGES[language])
    if language not in FUNCTION_WORDS:
        return num_in_scripts / num_words
    num_identified = counts.by_language.total()
    if num_identified == 0:
        return num_in_scripts / num_words
    num_foreign = num_identified - counts.by_language[language]
    return num_in_scripts * (1 - num_foreign / num_identified) / num_words


def detect_language(text: str) -> str:
    """Returns the language of a text: the language of most of its words.

    A text with kana is Japanese. Otherwise the most frequent script decides, and for Latin script
    the language with the most function words; in a tie with English, it is English. A text without
    words is English.
    """
    counts = _count_words(text)
    if not counts.by_script:
        return "en"
    if counts.by_script["kana"]:
        return "ja"
    main_script = max(counts.by_script, key=counts.by_script.__getitem__)
    if main_script == "latin":
        max_words = max(counts.by_language.values(), default=0)
        candidates = [name for name in FUNCTION_WORDS if counts.by_language[name] == max_words]
        return "en" if "en" in candidates else candidates[0]
    return next(language for language, scripts in LANGUAGES.items() if main_script in scripts)


class _WordCounts(NamedTuple):
    by_script: Counter[str]
    by_language: Counter[str]  # only the words of LANGUAGE_OF_WORD


def _count_words(text: str) -> _WordCounts:
    counts = _WordCounts(Counter(), Counter())
    for match in WORD.finditer(NO_LANGUAGE.sub(" ", text)):
        if match.lastgroup is not None:
            counts.by_script[match.lastgroup] += 1
        language = LANGUAGE_OF_WORD.get(match.group().lower())
        if language is not None:
            counts.by_language[language] += 1
    return counts
