"""The rewards for language, length, repetition and multiple choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.types import Completion, Problem
from rewards import choice, language, length, repetition

QUESTION = Problem(id="t/0", question="What is the sum of 1 and 2?", answer="B", source="t")


def completion(text, num_tokens=1):
    return Completion(
        token_ids=(0,) * num_tokens, logprobs=(), text=text, finish_reason="stop", versions=()
    )


def choice_problem(answer, choices):
    return Problem(id="t/1", question="?", answer=answer, source="t", meta={"choices": choices})


def choice_verdict(text, problem):
    return choice.reward(completion(text), problem).value


# --- language


@pytest.mark.parametrize(
    ("text", "expected_language", "share"),
    [
        ("So the answer is three", "en", 1.0),
        # Each Han character counts as a word: 2 of 4 words are English.
        ("So 这 is 三", "en", 2 / 4),
        ("这是答案", "zh", 1.0),
        ("答案 is 三", "zh", 3 / 4),
        # Formulas and single letters belong to no language.
        ("答案是 x = 3, $\\frac{1}{2}$ \\boxed{3}", "zh", 1.0),
        ("", "en", 1.0),
        ("1 + 2 = 3", "en", 1.0),
        ("also gilt dann die Summe der Zahlen", "de", 1.0),
        ("also gilt dann die Summe der Zahlen", "en", 0.0),
        ("答えは三です", "ja", 1.0),
        ("ответ три", "ru", 1.0),
        ("ответ is три", "ru", 2 / 3),
    ],
)
def test_share_is_the_proportion_of_words_in_the_language(text, expected_language, share):
    assert language.share_in_language(text, expected_language) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the sum of 1 and 2?", "en"),
        ("求 1 和 2 的和。", "zh"),
        ("1 と 2 の和は何ですか", "ja"),
        ("Сколько будет 1 и 2?", "ru"),
        ("Was ist die Summe von 1 und 2?", "de"),
        ("Quelle est la somme de ces nombres et pourquoi?", "fr"),
        ("¿Cuál es la suma de los números?", "es"),
        ("1+2=", "en"),
        ("", "en"),
        ("Compute x", "en"),
        ("1 더하기 2는?", "ko"),
    ],
)
def test_the_language_of_a_question_is_detected(text, expected):
    assert language.detect_language(text) == expected


def test_the_language_reward_scores_only_the_thoughts():
    # The thoughts have 4 English words and 1 Han character.
    mixed = completion("<think>So the sum is 三</think><answer>答案</answer>")
    assert language.reward(mixed, QUESTION) == pytest.approx(4 / 5)
    assert language.reward(mixed, QUESTION, language="zh") == pytest.approx(1 / 5)
    truncated_in_thoughts = completion("the sum is")
    assert language.reward(truncated_in_thoughts, QUESTION) == 1.0


@given(st.text(max_size=200), st.sampled_from(sorted(language.LANGUAGES)))
def test_any_text_has_a_language_and_a_share_between_0_and_1(text, expected_language):
    assert 0 <= language.share_in_language(text, expected_language) <= 1
    assert language.detect_language(text) in language.LANGUAGES


# --- length


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (500, -1.0)],
)
def test_the_length_reward_falls_from_0_to_minus_1_within_the_buffer(num_tokens, expected):
    """DAPO Eq. 13 with L_max = 100 and L_cache = 20: (80 - num_tokens) / 20, clipped to [-1, 0]."""
    reward = length.reward(completion("", num_tokens), QUESTION, max_tokens=100, buffer=20)
    assert reward == pytest.approx(expected)


# --- repetition


def test_repetition_is_the_share_of_ngrams_that_occur_earlier():
    # The 5 bigrams are ab, ba, ab, ba, ab: 3 of them occur earlier in the text.
    assert repetition.repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repetition.repeated_share("one two three four", 2) == 0.0
    assert repetition.repeated_share("short", 2) == 0.0
    # The 3 bigrams are 答案, 案答, 答案: 1 of them occurs earlier in the text.
    assert repetition.repeated_share("答案答案", 2) == pytest.approx(1 / 3)
    assert repetition.reward(completion("wait, " * 200), QUESTION, n=3) < -0.9
    assert repetition.reward(completion("wait, no"), QUESTION) == 0.0


# --- choice


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
