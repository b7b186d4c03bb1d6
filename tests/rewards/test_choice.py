"""The multiple-choice reward: notations of a letter, texts of choices, hedged answers."""

import pytest

from grpo.types import Completion, Problem
from rewards import choice

QUESTION = Problem(id="t/0", question="Which one?", answer="B", source="t")


def completion(text: str) -> Completion:
    return Completion(token_ids=(0,), logprobs=(), text=text, finish_reason="stop", versions=())


def choice_problem(answer, choices):
    return Problem(id="t/1", question="?", answer=answer, source="t", meta={"choices": choices})


def choice_verdict(text, problem):
    return choice.reward(completion(text), problem).value


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "\\text{B}",
        "B.",
        "(B) 42",
        "B: 42",
        "\\textbf{(B)}",
        "option B",
        "The answer is (B).",
        "$B$",
        "(B) x = 5",
        "B. A triangle",
    ],
)
def test_the_chosen_letter_is_recognized_in_many_notations(answer):
    assert choice.chosen_letter(answer, {}) == "B"
    text = f"<think>x</think><answer>{answer}</answer>"
    assert choice_verdict(text, QUESTION) == "correct"


@pytest.mark.parametrize(
    "answer", ["A", "A, B", "A or B", "B and C", "Bob", "the best", "", "42", "B" * 5000, "A B C D"]
)
def test_an_answer_other_than_the_single_gold_letter_is_wrong(answer):
    text = f"<think>B</think><answer>{answer}</answer>"
    assert choice_verdict(text, QUESTION) == "wrong"


def test_the_text_of_a_choice_counts_as_its_letter():
    cities = choice_problem("B", ["Paris", "Berlin", "Rome"])
    expected_verdicts = {
        "Berlin": "correct",
        "berlin.": "correct",
        "Rome": "wrong",
        "B) Berlin": "correct",
        "B) Rome": "wrong",
        "D": "wrong",
    }
    for answer, expected in expected_verdicts.items():
        text = f"<think>x</think><answer>{answer}</answer>"
        assert choice_verdict(text, cities) == expected, answer

    text_as_gold_answer = choice_problem("Berlin", {"A": "Paris", "B": "Berlin"})
    assert choice_verdict(r"\boxed{B}", text_as_gold_answer) == "correct"

    # The gold answer A means choice A, although A is also the text of choice C.
    letters_as_texts = choice_problem("A", ["C", "D", "A", "K"])
    assert choice_verdict(r"\boxed{A}", letters_as_texts) == "correct"

    gold_answer_is_no_choice = choice_problem("E", ["Paris", "Berlin"])
    assert choice_verdict(r"\boxed{B}", gold_answer_is_no_choice) == "undecided"
    assert choice.check_problem(gold_answer_is_no_choice)
    assert choice.check_problem(cities) is None
