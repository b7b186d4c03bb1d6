"""Multiple-choice reward: is the final answer the gold letter?

`B`, `(B)`, `B. 42` and the words of the choice are one answer.
"""

from __future__ import annotations

import re

from grpo.types import Completion, Problem, Verdict
from rewards.verifier.latex import normalise, words
from rewards.verifier.parse import final_answer

LETTER = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|choice|option)(?: is)?:? ?)?\(?([a-z])(?:[).:,]+|$)\s*(.*)"
)
MAX_CHARS = 2000


def reward(completion: Completion, problem: Problem) -> Verdict:
    """The verdict on the chosen letter.

    `problem.meta["choices"]`, a list of texts or letter -> text, allows the text for the letter.
    """
    choices = problem.meta.get("choices") or {}
    if not isinstance(choices, dict):
        choices = {chr(ord("A") + i): text for i, text in enumerate(choices)}
    gold = letter(problem.answer, choices)
    if gold is None:
        return Verdict(value="undecided", reason="the gold answer is none of the choices")
    answer = final_answer(completion.text)
    if answer is None:
        return Verdict(value="wrong", reason="no final answer")
    chosen = letter(answer, choices)
    return (
        Verdict(value="correct")
        if chosen == gold
        else Verdict(value="wrong", reason=f"chose {chosen or 'nothing readable'}")
    )


def letter(answer: str, choices: dict[str, str]) -> str | None:
    """The letter that an answer names.

    `letter("(b) 42", {})` is "B"; None for none, or for a letter with another choice's text.
    """
    if len(answer) > MAX_CHARS:
        return None
    said = words(normalise(answer))
    texts = {name.upper(): words(normalise(str(text))) for name, text in choices.items()}
    if said.upper() in texts:
        return said.upper()
    named = [name for name, text in texts.items() if text == said]
    if len(named) == 1:
        return named[0]
    match = LETTER.fullmatch(said)
    if match is None or (texts and match[1].upper() not in texts):
        return None
    chosen, rest = match[1].upper(), match[2].strip(" .")
    if rest and rest in texts.values() and rest != texts[chosen]:
        return None
    return (
        None
        if re.match(r"(?:(?:and|or) )?\(?[a-z]\)?(?:$|[).,:;]| (?:and|or) )", rest)
        and rest != texts.get(chosen)
        else chosen
    )  # `A, B`
