"""Language reward: the share of the thoughts that is in the language of the question.

DeepSeek-R1's second RL stage uses it against chains of thought that mix languages (2501.12948
section 2.3.2). The paper does not say how it identifies a language. Here py3langid does, offline,
for segments of about one sentence. Letters are counted, and each script is judged by itself.
py3langid does not know languages in a foreign script, such as Chinese in Latin letters.

Formulas, code and links belong to no language. Thoughts that hide too much text in them have the
reward 0.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

from grpo.rewards.verifier.invisible import without_invisible
from grpo.types import Completion, Problem, RunError, UserError

# Thoughts beyond one of these shares have the reward 0. All but 2 of 4,652 chains of thought of
# gpt-oss-120b for MATH are below both. Their largest shares are 0.44 and 0.88, the 99th percentiles
# 0.10 and 0.79.
MAX_HIDDEN_LETTERS = 1 / 3  # share of the letters of all words that is in hidden words
MAX_HIDDEN_CHARACTERS = 0.9  # share of the characters that is in formulas, code and links
MIN_LETTERS = 40  # of a segment; the language of a shorter text is often not identified
MAX_LETTERS = 120  # of a segment
# A text with fewer than MIN_LETTERS letters has the expected language if py3langid gives this
# language at least this share of the probability of the most likely one.
MIN_RELATIVE_PROBABILITY = 0.1
MAX_WORD_LETTERS = 40  # longer words are no words of any language, such as text in base64
MIN_HIDDEN_WORD = 4  # shorter words in formulas are names and products, such as the triangle ABC

# The languages that are compared, beside the expected one. Others are so close to one of these
# that a sentence does not tell them apart, such as Cantonese, Bosnian or Nigerian Pidgin.
COMMON_LANGUAGES = """
    ar bg bn ca cs da de el en es et fa fi fr gu he hi hr hu hy id it ja ka kk km kn ko lo lt lv mk
    ml mn mr my ne nl no pa pl pt ro ru si sk sl sq sr sv sw ta te th tl tr uk ur uz vi zh
"""
ENGLISH = "en"
MODEL_MB = 70  # of the temporary file into which py3langid unpacks its model, once per process

# Delimiters of text without a language: start -> end. The dollar sign is not among them, because it
# is also a currency.
DELIMITERS = {"```": "```", "`": "`", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
ENVIRONMENTS = """
    align align* aligned alignat alignat* array bmatrix cases eqnarray eqnarray* equation equation*
    gather gather* gathered matrix multline multline* pmatrix split tabular vmatrix
"""
DELIMITERS |= {rf"\begin{{{name}}}": rf"\end{{{name}}}" for name in ENVIRONMENTS.split()}


def _start_pattern() -> re.Pattern[str]:
    """Returns a pattern for the start of a formula or of code, and for whole links."""
    longest_first = sorted(DELIMITERS, key=len, reverse=True)
    delimiters = "|".join(re.escape(start) for start in longest_first)
    return re.compile(rf"{delimiters}|(?<!\\)\$|(?P<link>https?:\S+)")


HIDDEN_START = _start_pattern()
# The rest of `$...$`, as in Pandoc: no white space inside at the ends, no digit behind. The dollar
# signs of `$5 or $6` delimit no formula.
FORMULA_REST = re.compile(r"(?=\S)(?P<formula>[^$]*+)(?<=\S)\$(?!\d)")
COMMAND = re.compile(r"\\(?:(?:begin|end)\{[a-z]+\*?\}|(?P<name>[A-Za-z]+))")
# The commands of LaTeX in MATH and in chains of thought. The name of any other command is a word.
COMMAND_NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi
    rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi
    Omega ell hbar nabla partial infty prime aleph
    arccos arcsin arctan arg cos cosh cot csc deg det dim exp gcd inf lcm lim ln log max min mod
    bmod pmod Pr sec sin sinh sup tan tanh Re Im
    approx ast bullet cap cdot circ cong cup div equiv exists forall ge geq geqslant gg in le leq
    leqslant ll mid mp ne neq neg nmid not notin odot oplus otimes parallel perp pm propto sim
    simeq setminus star subset subseteq supset supseteq times to gets vee wedge land lor emptyset
    varnothing Rightarrow rightarrow Leftarrow leftarrow Leftrightarrow leftrightarrow
    Longrightarrow longrightarrow Longleftrightarrow implies impliedby iff mapsto because therefore
    angle measuredangle triangle square degree cdots dots dotsb dotsc dotsm ldots vdots ddots
    frac dfrac tfrac cfrac sqrt root binom dbinom tbinom choose over stackrel underset overset sum
    prod int iint oint bigcup bigcap
    left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr middle lfloor rfloor lceil rceil
    langle rangle lvert rvert vert Vert lbrace rbrace backslash
    bar hat vec dot ddot tilde widehat widetilde overline underline overbrace underbrace
    overrightarrow overleftarrow cancel cancelto boxed fbox phantom hphantom
    mathbf mathbb mathcal mathrm mathit mathsf mathfrak mathop operatorname boldsymbol bold bm bf
    rm it cal text textbf textit textrm textsf texttt textnormal emph mbox
    displaystyle textstyle scriptstyle limits nonumber tag label quad qquad hspace vspace hline
    spadesuit heartsuit diamondsuit clubsuit Diamond Box hfill smallskip
    cline multicolumn arraystretch renewcommand color textcolor newline
"""
COMMANDS = frozenset(COMMAND_NAMES.split())
SENTENCE = re.compile(r"[^.!?:;\n。！？；।]+")
# Characters between words: white space, digits, and the punctuation of ASCII and Latin-1.
SEPARATORS = re.compile(r"[\s\x00-@\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf×÷]+")
LONG_WORD = re.compile(rf"[\w+/=-]{{{MAX_WORD_LETTERS + 1},}}", re.ASCII)
# `w o r d`: at least six single letters, without operators between them.
SPACED_WORD = re.compile(r"(?<![^\W_])[^\W\d_](?:[\s.,;:_*|·•-]{1,3}[^\W\d_](?![^\W_])){5,}")
SPACES = re.compile(r"[\W_]+")
# Sentences are normalized in pieces of this many characters, because the normalization of a series
# of combining marks takes quadratic time.
MAX_PIECE = 400
MAX_QUESTION = 10_000  # characters that are read to detect its language
LATIN = "LATIN"
MARK = "MARK"
HAN = "CJK"
SCRIPTS_MIXED_WITH_HAN = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "IDEOGRAPHIC")
SCRIPTS_OF_FORMULAS = (LATIN, "GREEK")


def prepare(language: str | None = None) -> None:
    """Raises UserError for an unknown language."""
    if language is None or language in known_languages():
        return
    similar = get_close_matches(str(language), known_languages(), n=3, cutoff=0.5)
    suggestion = f" (did you mean {' or '.join(similar)}?)" if similar else ""
    raise UserError(
        f"rewards.language.options.language: unknown language {language!r}{suggestion}. Expected "
        f"an ISO 639 code. Available: {', '.join(known_languages())}."
    )


def reward(completion: Completion, problem: Problem, *, language: str | None = None) -> float:
    """Returns the share of the thoughts that is in a language, from 0 to 1.

    Only the thoughts are scored, see `thoughts_of`; an answer may have to be in another language.

    Args:
        completion: The completion to score.
        problem: Its problem.
        language: The code of a language that py3langid knows, such as "en". None: the language of
            the question.

    Source: DeepSeek-R1 2501.12948 section 2.3.2; see the module for what the paper leaves open.
    """
    expected = language or detect_language(problem.question)
    return share_in_language(thoughts_of(completion.text), expected)


def thoughts_of(text: str) -> str:
    """Returns the part of a completion that `verifier.parse.visible` leaves out.

    It is the text up to the last `</think>`, and the text behind a later `<think>` that is never
    closed. A text without `</think>` consists of thoughts.
    """
    before_end, end, after_end = text.rpartition("</think>")
    if not end:
        return text.replace("<think>", "\n")
    thoughts = before_end + "\n" + after_end.partition("<think>")[2]
    return thoughts.replace("<think>", "\n").replace("</think>", "\n")


def share_in_language(text: str, language: str) -> float:
    """Returns the share of a text's letters that are in a language, from 0 to 1.

    It is 0 in these cases:

    - The text has no words.
    - More than MAX_HIDDEN_LETTERS of the letters are in hidden words. Those are words of at least
      MIN_HIDDEN_WORD letters in formulas, code and links, and all words of more than
      MAX_WORD_LETTERS letters and digits.
    - More than MAX_HIDDEN_CHARACTERS of the characters are in formulas, code and links.

    Words in other scripts than Latin and Greek are never hidden. Single Latin and Greek letters and
    the names of LaTeX commands are no words, but `w o r d s` with spaces are.

    All other words are divided by script, and then into segments: sentences, joined or cut to have
    MIN_LETTERS to MAX_LETTERS letters. The language of a segment is the one that py3langid finds.

    The time is linear in the length of the text.

    Example: `share_in_language("So the answer 是 three", "en")` is 16/17.
    """
    words = _read(text)
    num_letters = sum(map(_num_letters, words.sentences.values()))
    if num_letters == 0 or _hides_text(words, num_letters):
        return 0.0
    num_in_language = 0
    for sentences in words.sentences.values():
        for segment in _segments(sentences):
            if _is_in_language(segment, language):
                num_in_language += len("".join(segment))
    return num_in_language / num_letters


@functools.lru_cache(maxsize=4096)
def detect_language(text: str) -> str:
    """Returns the language of a question.

    The script with most letters decides; py3langid identifies its language. A short text in Latin
    script that can be English is English. A text without words is English.
    """
    sentences_by_script = _read(text[:MAX_QUESTION]).sentences
    if not sentences_by_script:
        return ENGLISH
    script = max(sentences_by_script, key=lambda name: _num_letters(sentences_by_script[name]))
    words = list(itertools.chain.from_iterable(sentences_by_script[script]))
    if script == LATIN and _is_in_language(words, ENGLISH):
        return ENGLISH
    return _identify(words, ENGLISH)


def _hides_text(words: _Words, num_letters: int) -> bool:
    """Returns whether a text with `num_letters` letters in other words hides too much."""
    max_hidden_letters = MAX_HIDDEN_LETTERS * (num_letters + words.num_hidden_letters)
    return (
        words.num_hidden_letters > max_hidden_letters
        or words.share_of_hidden_characters > MAX_HIDDEN_CHARACTERS
    )


def _num_letters(sentences: Iterable[list[str]]) -> int:
    return sum(len("".join(words)) for words in sentences)


def _is_in_language(words: list[str], language: str) -> bool:
    if len("".join(words)) >= MIN_LETTERS:
        return _identify(words, language) == language
    probabilities = dict(_identifier(language).rank(" ".join(words)))
    threshold = MIN_RELATIVE_PROBABILITY * max(probabilities.values())
    return bool(probabilities[language] >= threshold)


def _identify(words: list[str], expected: str) -> str:
    """Returns the language of a text: one of COMMON_LANGUAGES or the expected language."""
    language: str = _identifier(expected).classify(" ".join(words))[0]
    return language


@functools.lru_cache(maxsize=16)
def _identifier(expected: str) -> Any:
    """Returns py3langid's model, restricted to COMMON_LANGUAGES and the expected language."""
    identifier = copy.copy(_full_identifier())
    identifier.set_languages({*COMMON_LANGUAGES.split(), expected})
    return identifier


@functools.cache
def _full_identifier() -> Any:
    """Returns py3langid's model of all languages. Raises RunError if it cannot be unpacked."""
    from py3langid import langid

    try:
        return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    except OSError as error:
        raise RunError(
            f"py3langid cannot unpack its model into a temporary file of {MODEL_MB} MB: {error}; "
            "set TMPDIR to a folder with free space"
        ) from error


@functools.cache
def known_languages() -> tuple[str, ...]:
    """Returns the codes of the languages that py3langid knows, sorted."""
    return tuple(sorted(set(_full_identifier().labels) - {"zxx"}))  # zxx: no language


def _segments(sentences: Iterable[list[str]]) -> list[list[str]]:
    """Returns the words of sentences in segments of MIN_LETTERS to MAX_LETTERS letters.

    Sentences with fewer letters are one segment. The last segment may be longer.
    """
    segments: list[list[str]] = []
    segment: list[str] = []
    num_letters = 0
    for words in sentences:
        for word in words:
            segment.append(word)
            num_letters += len(word)
            if num_letters >= MAX_LETTERS:
                segments.append(segment)
                segment, num_letters = [], 0
        if num_letters >= MIN_LETTERS:
            segments.append(segment)
            segment, num_letters = [], 0
    if segment and segments:
        segments[-1].extend(segment)
    elif segment:
        segments.append(segment)
    return segments


class _Words(NamedTuple):
    """The words of a text."""

    sentences: dict[str, list[list[str]]]  # the words of each sentence, by script
    num_hidden_letters: int  # in hidden words
    share_of_hidden_characters: float  # in formulas, code and links


def _read(text: str) -> _Words:
    sentences: dict[str, list[list[str]]] = {}
    open_text, hidden_text = _split_hidden(without_invisible(text))
    num_hidden = 0
    for is_hidden, part in ((False, open_text), (True, hidden_text)):
        for long_word in LONG_WORD.finditer(part):
            num_hidden += _num_letters_and_digits(long_word.group())
        part_without_long_words = SPACED_WORD.sub(_joined, LONG_WORD.sub(" ", part))
        for sentence in SENTENCE.finditer(part_without_long_words):
            num_hidden += _read_sentence(sentence.group(), is_hidden, sentences)
    num_open_characters = _num_characters(open_text)
    num_hidden_characters = _num_characters(hidden_text)
    num_characters = num_open_characters + num_hidden_characters
    return _Words(sentences, num_hidden, num_hidden_characters / max(num_characters, 1))


def _num_characters(text: str) -> int:
    return len("".join(text.split()))


def _num_letters_and_digits(long_word: str) -> int:
    """Returns 0 for a word without a letter, such as a long number."""
    if not any(map(str.isalpha, long_word)):
        return 0
    return sum(map(str.isalnum, long_word))


def _joined(spaced_word: re.Match[str]) -> str:
    return SPACES.sub("", spaced_word.group())


def _split_hidden(text: str) -> tuple[str, str]:
    """Returns the text outside of formulas, code and links, and the text within them.

    A delimiter that is never closed hides nothing. The time is linear: no end is searched for again
    after it was missing once.
    """
    open_parts = []
    hidden_parts = []
    missing_ends: set[str] = set()
    position = 0
    while (start := HIDDEN_START.search(text, position)) is not None:
        open_parts.append(text[position : start.start()])
        hidden = _hidden_after(text, start, missing_ends)
        if hidden is None:
            position = start.end()
        else:
            hidden_parts.append(hidden.text)
            position = hidden.end
    open_parts.append(text[position:])
    return "\n".join(open_parts), "\n".join(hidden_parts)


class _Hidden(NamedTuple):
    text: str
    end: int  # position in the whole text, behind the closing delimiter


def _hidden_after(text: str, start: re.Match[str], missing_ends: set[str]) -> _Hidden | None:
    """Returns the hidden text behind a start delimiter, None if it is never closed."""
    if start["link"]:
        return _Hidden(start["link"], start.end())
    if start.group() == "$":
        rest = FORMULA_REST.match(text, start.end())
        if rest is None or "\n\n" in rest["formula"]:
            return None
        return _Hidden(rest["formula"], rest.end())
    end_delimiter = DELIMITERS[start.group()]
    if end_delimiter in missing_ends:
        return None
    end = text.find(end_delimiter, start.end())
    if end < 0:
        missing_ends.add(end_delimiter)
        return None
    return _Hidden(text[start.end() : end], end + len(end_delimiter))


def _read_sentence(sentence: str, is_hidden: bool, sentences: dict[str, list[list[str]]]) -> int:
    """Adds the words of a sentence to `sentences`. Returns its number of hidden letters."""
    num_hidden = 0
    words_by_script: dict[str, list[str]] = {}
    for script, word in _words(sentence):
        if script in SCRIPTS_OF_FORMULAS and is_hidden:
            if len(word) >= MIN_HIDDEN_WORD:
                num_hidden += len(word)
        elif script not in SCRIPTS_OF_FORMULAS or len(word) > 1:
            words_by_script.setdefault(script, []).append(word)
    for script, words in words_by_script.items():
        sentences.setdefault(script, []).append(words)
    return num_hidden


def _words(sentence: str) -> Iterator[tuple[str, str]]:
    """Yields the words of a sentence with their scripts, without names of LaTeX commands."""
    for start in range(0, len(sentence), MAX_PIECE):
        piece = sentence[start : start + MAX_PIECE]
        if not piece.isascii():
            piece = unicodedata.normalize("NFKC", piece)
        if "\\" in piece:
            piece = COMMAND.sub(_name_if_unknown, piece)
        for word in SEPARATORS.split(piece):
            if word.isascii():
                if word:
                    yield LATIN, word
            else:
                yield from _split_by_script(word)


def _name_if_unknown(command: re.Match[str]) -> str:
    name = command["name"]
    return " " if name is None or name in COMMANDS else f" {name} "


def _split_by_script(word: str) -> Iterator[tuple[str, str]]:
    """Yields the scripts and parts of a word, each of at most MAX_LETTERS characters.

    A mark belongs to the letter before it. Other characters separate parts.
    """
    part_script = ""
    part: list[str] = []
    for char in word:
        script = _script(char)
        if script == MARK:
            script = part_script
        if part and (script != part_script or len(part) == MAX_LETTERS):
            yield part_script, "".join(part)
            part = []
        part_script = script
        if script:
            part.append(char)
    if part:
        yield part_script, "".join(part)


@functools.lru_cache(maxsize=100_000)
def _script(char: str) -> str:
    """Returns the script of a letter, MARK for a mark, "" for other characters.

    It is the first word of the letter's Unicode name. Han characters and kana, which Japanese
    mixes, are one script.
    """
    if unicodedata.category(char)[0] == "M":
        return MARK
    if not char.isalpha():
        return ""
    script = unicodedata.name(char, "").partition(" ")[0]
    return HAN if script in SCRIPTS_MIXED_WITH_HAN else script
