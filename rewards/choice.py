"""Multiple-choice reward: is the final answer the gold letter?

`B`, `(B)`, `B. 42` and the text of the choice are the same answer. An answer that names a second
letter, denies its own one or takes it back chooses none: `(B) is wrong, (A) is right` is not B.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo.rewards.verifier.choices import LETTER
from grpo.rewards.verifier.latex import as_words, normalize
from grpo.rewards.verifier.parse import final_answer
from grpo.rewards.verifier.verdicts import CORRECT, wrong
from grpo.types import Completion, Problem, Verdict

MAX_CHARS = 2000
# Texts behind a letter, in lower case. They are compared with the result of `as_words`.
CONFIRMATION = re.compile(r"is (?:the )?(?:correct|right|true|best)(?: (?:answer|choice|option))?")
# A text that continues an expression or a list with the letter in it: `(B) + C`, `(B) or C`.
CONNECTION = re.compile(
    r"(?:and|or|nor|but|unless)(?![a-z'’])"
    r"|[=/+*^&|<>~!?→⇒]|-(?: |\(?[a-z]\)?$|>)|\\(?:to|not|neg|ne|rightarrow|l?or|l?and|pm)(?![a-z])"
)
# A text that denies or doubts the letter: `(B) is wrong`, `(B) cannot be right`, `(B), not sure`.
DENIAL = re.compile(
    r"(?:is|was|are|can|could|do|does|did|will|would|should|has)(?:n['’]?t|not| not)(?![a-z])"
    r"|can['’]t|(?:could|may|might|seems?|looks)(?![a-z])|not sure|no, |fails"
    r"|(?:is|was|are|can|must)(?: be)? (?:false|invalid|impossible|eliminated|excluded|ruled|out)"
)
# Words that take an answer back or leave it open.
RETRACTION = re.compile(
    r"(?<![a-z'’])(?:wait|actually|sorry|oops|correction|scratch|instead|rather|alternatively"
    r"|otherwise|maybe|perhaps|possibly|probably|unsure|guess|wrong|incorrect|mistaken?"
    r"|second thoughts?)(?![a-z'’])"
)
# A letter of a choice that stands alone or in brackets, as the name of another choice.
BRACKETED_LETTER = re.compile(r"(?<![a-z])[(\[]\s*(?P<letter>[a-z])\s*[)\]]")
SINGLE_LETTER = re.compile(r"(?<![a-z0-9'’_^\\])(?P<letter>[a-j])(?![a-z0-9'’_^(])")
CONTEXT = 20  # characters around a letter that show its meaning
# Letters in formulas: `c = 5`, `2 + d`.
FORMULA_BEFORE = re.compile(r"[0-9a-z)=+*/^-]\s*[=+*/^<-]\s*$|[=+*/^<]\s*$")
FORMULA_AFTER = re.compile(r"\s*[=+*/^<>]|\s*-\s*[0-9a-z(]")
# The article before a noun: `a triangle`, not `a is right`.
NOT_A_NOUN = (
    r"is|isn|was|are|can|cannot|could|may|must|does|has|and|or|nor|but|not|too|as|because|if"
)
ARTICLE = re.compile(
    rf"\s+(?!(?:{NOT_A_NOUN}|instead|would|seems?|also|only|then)(?![a-z]))[a-z0-9]"
)
# A second letter at the beginning of the text behind a letter: `b` in `A, B`.
SECOND_LETTER = re.compile(r"(?:(?:and|or|\\l(?:and|or)) ?)?\(?[a-z]\)?(?:$|[).,:;]| (?:and|or) )")
UNREADABLE_GOLD = "the gold answer is none of the choices"


def reward(completion: Completion, problem: Problem) -> Verdict:
    """Returns the verdict on the chosen letter.

    `problem.meta["choices"]` is optional: the texts of the choices, as a list or as a dict from
    letter to text. With it, the text of a choice is accepted for its letter.
    """
    choices = _choices(problem)
    gold = gold_letter(problem.answer, choices)
    if gold is None:
        return Verdict(value="undecided", reason=UNREADABLE_GOLD)
    answer = final_answer(completion.text)
    if answer is None:
        return wrong("no final answer")
    letter = chosen_letter(answer, choices)
    if letter != gold:
        return wrong(f"chose {letter or 'nothing readable'}")
    return CORRECT


def check_problem(problem: Problem) -> str | None:
    """Returns why the gold answer of a problem cannot be read, None if it can be read."""
    gold = gold_letter(problem.answer, _choices(problem))
    return UNREADABLE_GOLD if gold is None else None


def _choices(problem: Problem) -> dict[str, str]:
    """Returns the texts of the choices by letter, empty if they are unknown."""
    choices = problem.meta.get("choices") or {}
    if isinstance(choices, dict):
        return choices
    return {chr(ord("A") + index): text for index, text in enumerate(choices)}


def chosen_letter(answer: str, choices: dict[str, str]) -> str | None:
    """Returns the letter that a policy's answer chooses, in upper case, or None.

    `choices` maps letters to texts; it is empty if the texts are unknown. The rules, in this order:

    - An answer that is the letter of one of `choices` chooses this letter.
    - An answer that is the text of exactly one choice chooses its letter.
    - A letter, alone or followed by punctuation and a text (`(b) 42`, `B. 42`), chooses this
      letter. `the answer is` may precede it. It chooses none if `choices` is not empty and has no
      such letter, or if the text shows another choice, see `_chooses_another`.

    An answer of more than MAX_CHARS characters chooses none.

    Example: `chosen_letter("(b) 42", {})` is "B".
    """
    reading = _read(answer, choices)
    if reading is None or _chooses_another(reading):
        return None
    return reading.letter


def gold_letter(answer: str, choices: dict[str, str]) -> str | None:
    """Returns the letter of a gold answer, in upper case, or None if it cannot be read.

    A gold answer does not deny or hedge its letter, so the text behind it may have any words:
    `D. Both A and B` is D. It must not belong to another choice or begin with a second letter.
    """
    reading = _read(answer, choices)
    if reading is None:
        return None
    if not reading.text or reading.text == reading.texts.get(reading.letter):
        return reading.letter
    is_text_of_other_choice = reading.text in reading.texts.values()
    if is_text_of_other_choice or SECOND_LETTER.match(reading.text):
        return None
    return reading.letter


class _Reading(NamedTuple):
    letter: str  # in upper case
    text: str  # what follows the letter, in the form of `as_words`
    texts: dict[str, str]  # of the choices by letter, in the form of `as_words`; empty if unknown


def _read(answer: str, choices: dict[str, str]) -> _Reading | None:
    if len(answer) > MAX_CHARS:
        return None
    words = as_words(normalize(answer))
    texts = {letter.upper(): as_words(normalize(str(text))) for letter, text in choices.items()}
    if words.upper() in texts:
        return _Reading(words.upper(), "", texts)
    matching_letters = [letter for letter, text in texts.items() if text == words]
    if len(matching_letters) == 1:
        return _Reading(matching_letters[0], "", texts)
    match = LETTER.fullmatch(words)
    if match is None:
        return None
    letter = match["letter"].upper()
    if texts and letter not in texts:
        return None
    return _Reading(letter, match["text"].strip(" .,"), texts)


def _chooses_another(reading: _Reading) -> bool:
    """Returns whether the text behind a letter may choose another letter, or none.

    - It contains the text of another choice.
    - It begins with a connection or a denial: `or C`, `-> A`, `is not right`.
    - It takes the answer back, or leaves it open: `wait`, `wrong`, `maybe`.
    - It names another letter, in brackets or alone. The article `a`, and letters in formulas, such
      as `c = 5`, are no names.
    """
    letter, text, texts = reading
    text_of_letter = texts.get(letter, "")
    if not text or text == text_of_letter or CONFIRMATION.fullmatch(text):
        return False
    rest = text.replace(text_of_letter, " ").strip() if text_of_letter else text
    for other_letter, other_text in texts.items():
        if other_letter != letter and _contains_words(rest, other_text):
            return True
    if CONNECTION.match(rest) or DENIAL.match(rest) or RETRACTION.search(rest):
        return True
    return any(name != letter for name in _named_letters(rest))


def _contains_words(text: str, words: str) -> bool:
    """Returns whether words are in a text, not as a part of longer words. Letters do not count."""
    if len(words) < 2 and not words.isdigit():
        return False
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text))


def _named_letters(text: str) -> list[str]:
    """Returns the letters of choices that a text names, in upper case."""
    letters = [match["letter"].upper() for match in BRACKETED_LETTER.finditer(text)]
    for match in SINGLE_LETTER.finditer(text):
        before = text[max(match.start() - CONTEXT, 0) : match.start()]
        after = text[match.end() : match.end() + CONTEXT]
        is_article = match["letter"] == "a" and ARTICLE.match(after)
        is_pronoun = match["letter"] == "i"
        in_formula = FORMULA_BEFORE.search(before) or FORMULA_AFTER.match(after)
        if not (is_article or is_pronoun or in_formula):
            letters.append(match["letter"].upper())
    return letters
