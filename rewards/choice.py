"""Multiple-choice reward: is the final answer the gold letter?

`B`, `(B)`, `B. 42` and the text of the choice are the same answer.
"""

from __future__ import annotations

import re

from grpo.types import Completion, Problem, Verdict
from rewards.verifier.choices import LETTER
from rewards.verifier.latex import as_words, normalize
from rewards.verifier.parse import final_answer
from rewards.verifier.verdicts import CORRECT, wrong

MAX_CHARS = 2000
# A second letter at the beginning of the text behind a letter: `b` in `A, B` and in `A or B`.
SECOND_LETTER = re.compile(r"(?:(?:and|or|\\l(?:and|or)) ?)?\(?[a-z]\)?(?:$|[).,:;]| (?:and|or) )")
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
      letter. `the answer is` may precede it. It chooses none if the text belongs to another
      choice, if the text begins with a second letter (`A, B`), or if `choices` is not empty and
      has no such letter.

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
    text_after_letter = match["text"].strip(" .")
    if text_after_letter == texts.get(letter):
        return letter
    if text_after_letter and text_after_letter in texts.values():
        return None
    if SECOND_LETTER.match(text_after_letter):
        return None
    return letter
