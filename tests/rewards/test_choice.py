"""The multiple-choice reward: notations of a letter, texts of choices, hedged answers."""

import pytest

from grpo.rewards import choice
from grpo.types import Completion, Problem

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


@pytest.mark.parametrize(
    "answer",
    [
        "(B) is wrong, (A) is right",
        "(B) is incorrect",
        "(B) is not the answer",
        "(B) isn't right",
        "(B) is false",
        "(B) cannot be right",
        "(B) can't be right",
        "(B) does not work",
        "(B) doesn't work",
        "(B) could be right",
        "(B) seems right",
        "(B) is ruled out",
        "(B) must be excluded",
        "(B) fails",
        "B is incorrect",
        "B, which is wrong",
        "not B",
        "Not (B)",
        "\\not B",
        "The answer is not B",
        "The answer is not (B).",
        "(B)? No, A",
        "(B)? No, (A)",
        "B? Maybe.",
        "A and B",
        "B and A",
        "(B) and (A)",
        "(B) & (A)",
        "B & A",
        "B or maybe C",
        "(B) or (C)",
        "(B) or C",
        "B/C",
        "(B)/(C)",
        "B -> A",
        "(B) -> A",
        "(B) → (A)",
        "(B) => A",
        "(B) \\to (A)",
        "(B) \\rightarrow A",
        "B, because A is wrong",
        "B, A",
        "B. A",
        "B; A",
        "B.A.",
        "(B)(A)",
        "(B) (A)",
        "[B] [A]",
        "B: (A)",
        "B: A is right",
        "B. Wait, it is A",
        "B. Wait, no.",
        "(B). Actually, none of these.",
        "(B), sorry, (A)",
        "(B), no: C",
        "B) C) D)",
        "neither A nor B",
        "either B or C",
        "(B) maybe",
        "(B), perhaps",
        "(B) I guess",
        "(B), not sure",
        "(B) unless (A)",
        "(B) but also (C)",
        "(B) as well as (C)",
        "(B) 42, (C) 43",
        "(B) 42 or (C) 43",
        "B. 42, C. 43",
        "B) 42 C) 43",
        "B. x = 5, or D",
        "B. The answer is C",
        "(B) - (A)",
        "(B) - A",
        "(B) + (A)",
        "(B) = (A)",
        "(B) < (A)",
        "(B) \\lor (A)",
        "(B) \\text{ or } (A)",
        "(B) \\text{is wrong}",
        "(B) is \\textbf{wrong}",
        "(B)\u200b is wrong",
        "(Ｂ) is wrong, (Ａ) is right",
        "(B) IS WRONG",
        "B. All of A, B, C",
        "B. 42 [A]",
        "B. Rather a",
    ],
)
def test_a_letter_that_is_denied_hedged_or_one_of_several_is_not_chosen(answer):
    assert choice.chosen_letter(answer, {}) is None
    text = f"<think>x</think><answer>{answer}</answer>"
    assert choice_verdict(text, QUESTION) == "wrong"
    boxed = rf"\boxed{{{answer}}}"
    assert choice_verdict(boxed, QUESTION) == "wrong"


@pytest.mark.parametrize(
    "answer",
    [
        "(B) is correct",
        "(B) is the correct answer.",
        "(B) is right",
        "B. A triangle has three sides",
        "(B) a circle and a square",
        "B. None of the above",
        "B. Not enough information",
        "B. No",
        "B. False",
        "B. Neither of them",
        "B. Salt and pepper",
        "B. Both",
        "B. Is always positive",
        "B. Because light is faster than sound",
        "B. x is not prime",
        "B. If x is even, then x can be divided by 2",
        "B. Must be zero",
        "B. Notes",
        "B. Island",
        "B. Hepatitis B",
        "B. I and II",
        "B. -5",
        "(B) -\\frac{1}{2}",
        "(B) \\frac{a}{b}",
        "(B) c = 5",
        "(B) 2 + d",
        "(B) a^2 + b^2",
        "(B) f(x) = x + 1",
        "(B) \\sqrt{2}",
        "(B) 5 m/s",
        "(B) (1, 2)",
        "(B) x < 5",
        "(B) $x^2 - 1$",
        "B. It is the sum of the numbers",
    ],
)
def test_a_letter_with_its_text_is_chosen(answer):
    assert choice.chosen_letter(answer, {}) == "B"


@pytest.mark.parametrize(
    ("gold", "letter"),
    [
        ("D. Both A and B", "D"),
        ("B. It is wrong to lie", "B"),
        ("(B) maybe", "B"),
        ("A, B", None),
        ("A or B", None),
        ("(A) or (B)", None),
    ],
)
def test_a_gold_answer_may_have_any_text_behind_its_letter(gold, letter):
    assert choice.gold_letter(gold, {}) == letter


def test_the_text_behind_the_letter_must_not_show_another_choice():
    numbers = {"A": "5", "B": "15 and 5", "C": "no", "D": "all of A, B and C"}
    assert choice.chosen_letter("(B) 15 and 5", numbers) == "B"
    assert choice.chosen_letter("(B) 15 and 5 cm", numbers) == "B"
    assert choice.chosen_letter("(B) 5", numbers) is None
    assert choice.chosen_letter("(B) 5 cm", numbers) is None
    assert choice.chosen_letter("(B) no, 5", numbers) is None
    assert choice.chosen_letter("(D) all of A, B and C", numbers) == "D"
    assert choice.chosen_letter("(C) no", numbers) == "C"
    cities = {"A": "Paris", "B": "Berlin"}
    assert choice.chosen_letter("B) Berlin, the capital of Germany", cities) == "B"
    assert choice.chosen_letter("B) Berlin, not Paris", cities) is None
    assert choice.chosen_letter("B) the answer is Paris", cities) is None
    assert choice.chosen_letter("(B) is wrong", cities) is None
