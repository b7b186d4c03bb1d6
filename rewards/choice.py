"""Multiple-choice reward: is the final answer the gold letter?

`B`, `(B)`, `B. 42` and the text of the choice are the same answer. An answer that names a second
letter, denies its own one or takes it back chooses none: `(B) is wrong, (A) is right` is not B.
"""

from __future__ import annotations

import re

from grpo.types import Completion, Problem, Verdict
from rewards.verifier.choices import LETTER
from rewards.verifier.latex import as_words, normalize
from rewards.verifier.parse import final_answer
from rewards.verifier.verdicts import CORRECT, wrong

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
CONTEXT = 20  # characters around a letter that show what it is
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
UNREADABLE_GOLD = "the gold answer is none of the choices"


def reward(completion: Completion, problem: Problem) -> Verdict:
    """Returns the verdict on the chosen letter.

    `problem.meta["choices"]` is optional: the texts of the choices, as a list or as a dict from
    letter to text. With it, the text of a choice is accepted for its letter.
    """
    choices = _choices(problem)
    gold = chosen_letter(problem.answer, choices)
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
    gold = chosen_letter(problem.answer, _choices(problem))
    return UNREADABLE_GOLD if gold is None else None


def _choices(problem: Problem) -> dict[str, str]:
    """Returns the texts of the choices by letter, empty if they are unknown."""
    choices = problem.meta.get("choices") or {}
    if isinstance(choices, dict):
        return choices
    return {chr(ord("A") + index): text for index, text in enumerate(choices)}


def chosen_letter(answer: str, choices: dict[str, str]) -> str | None:
    """Returns the letter that an answer chooses, in upper case, or None.

    `choices` maps letters to texts; it is empty if the texts are unknown. The rules, in this order:

    - An answer that is the letter of one of `choices` chooses this letter.
    - An answer that is the text of exactly one choice chooses its letter.
    - A letter, alone or followed by punctuation and a text (`(b) 42`, `B. 42`), chooses this
      letter. `the answer is` may precede it. It chooses none if `choices` is not empty and has no
      such letter, or if the text shows another choice, see `_chooses_another`.

    An answer of more than MAX_CHARS characters chooses none.

    Example: `chosen_letter("(b) 42", {})` is "B".
    """
    if len(answer) > MAX_CHARS:
        return None
    words = as_words(normalize(answer))
    texts = {letter.upper(): as_words(normalize(str(text))) for letter, text in choices.items()}
    if words.upper() in texts:
        return words.upper()
    matching_letters = [letter for letter, text in texts.items() if text == words]
    if len(matching_letters) == 1:
        return matching_letters[0]
    match = LETTER.fullmatch(words)
    if match is None:
        return None
    letter = match["letter"].upper()
    if texts and letter not in texts:
        return None
    text = match["text"].strip(" .,")
    if not text or text == texts.get(letter) or CONFIRMATION.fullmatch(text):
        return letter
    return None if _chooses_another(text, letter, texts) else letter


def _chooses_another(text: str, letter: str, texts: dict[str, str]) -> bool:
    """Returns whether the text behind a letter may choose another letter, or none.

    - It contains the text of another choice.
    - It begins with a connection or a denial: `or C`, `-> A`, `is not right`.
    - It takes the answer back, or leaves it open: `wait`, `wrong`, `maybe`.
    - It names another letter, in brackets or alone. The article `a`, and letters in formulas, such
      as `c = 5`, are no names.

    Args:
        text: What follows the letter, in the form of `as_words`.
        letter: The letter, in upper case.
        texts: The texts of the choices by letter, in the form of `as_words`; empty if unknown.
    """
    own_text = texts.get(letter, "")
    rest = text.replace(own_text, " ") if own_text else text
    for other_letter, other_text in texts.items():
        if other_letter != letter and _contains_words(rest, other_text):
            return True
    rest = rest.strip()
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
