"""Rewards for the form of a completion: language, length, repetition; and multiple choice."""

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


# --- language: golden shares counted by hand


@pytest.mark.parametrize(
    ("text", "expected_language", "share"),
    [
        ("So the answer is three", "en", 1.0),
        ("So 这 is 三", "en", 2 / 4),  # so, is; two Han characters
        ("这是答案", "zh", 1.0),
        ("答案 is 三", "zh", 3 / 4),
        # formulas and single letters belong to no language
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
def test_the_share_of_words_in_a_language(text, expected_language, share):
    assert language.share(text, expected_language) == pytest.approx(share)


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
def test_the_language_of_a_question(text, expected):
    assert language.of(text) == expected


def test_the_language_reward_reads_only_the_thoughts():
    mixed = completion("<think>So the sum is 三</think><answer>答案</answer>")
    assert language.reward(mixed, QUESTION) == pytest.approx(4 / 5)
    assert language.reward(mixed, QUESTION, language="zh") == pytest.approx(1 / 5)
    # cut off before the end of its thoughts
    assert language.reward(completion("the sum is"), QUESTION) == 1.0


@given(st.text(max_size=200), st.sampled_from(sorted(language.LANGUAGES)))
def test_a_share_is_between_0_and_1(text, expected_language):
    assert 0 <= language.share(text, expected_language) <= 1
    assert language.of(text) in language.LANGUAGES


# --- length: DAPO Eq. 13 with L_max = 100, L_cache = 20


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (500, -1.0)],
)
def test_the_soft_overlong_punishment(num_tokens, value):
    assert length.reward(
        completion("", num_tokens), QUESTION, max_tokens=100, buffer=20
    ) == pytest.approx(value)


# --- repetition


def test_repeated_ngrams_are_counted():
    # ab ba ab ba ab: 2 of 5 are new
    assert repetition.repeated("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repetition.repeated("one two three four", 2) == 0.0
    assert repetition.repeated("short", 2) == 0.0
    assert repetition.repeated("答案答案", 2) == pytest.approx(1 / 3)
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
def test_a_letter_may_be_written_in_many_ways(answer):
    assert choice.chosen_letter(answer, {}) == "B"
    assert (
        choice.reward(completion(f"<think>x</think><answer>{answer}</answer>"), QUESTION).value
        == "correct"
    )


@pytest.mark.parametrize(
    "answer", ["A", "A, B", "A or B", "B and C", "Bob", "the best", "", "42", "B" * 5000, "A B C D"]
)
def test_an_answer_that_is_no_single_letter_is_wrong(answer):
    assert (
        choice.reward(completion(f"<think>B</think><answer>{answer}</answer>"), QUESTION).value
        == "wrong"
    )


def test_the_text_of_a_choice_counts_as_its_letter():
    problem = Problem(
        id="t/1",
        question="?",
        answer="B",
        source="t",
        meta={"choices": ["Paris", "Berlin", "Rome"]},
    )
    for answer, value in {
        "Berlin": "correct",
        "berlin.": "correct",
        "Rome": "wrong",
        "B) Berlin": "correct",
        "B) Rome": "wrong",
        "D": "wrong",
    }.items():
        assert (
            choice.reward(completion(f"<think>x</think><answer>{answer}</answer>"), problem).value
            == value
        )
    by_text = Problem(
        id="t/2",
        question="?",
        answer="Berlin",
        source="t",
        meta={"choices": {"A": "Paris", "B": "Berlin"}},
    )
    assert choice.reward(completion(r"\boxed{B}"), by_text).value == "correct"
    letters = Problem(
        id="t/4", question="?", answer="A", source="t", meta={"choices": ["C", "D", "A", "K"]}
    )
    assert choice.reward(completion(r"\boxed{A}"), letters).value == "correct"
    unknown = Problem(
        id="t/3", question="?", answer="E", source="t", meta={"choices": ["Paris", "Berlin"]}
    )
    assert choice.reward(completion(r"\boxed{B}"), unknown).value == "undecided"
