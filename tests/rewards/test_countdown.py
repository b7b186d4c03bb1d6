"""The countdown reward: exact fractions, each number used exactly once, no evaluation of text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.types import Completion, Problem
from rewards.countdown import check_expression, reward

PROBLEM = Problem(
    id="c/0",
    question="?",
    answer="(7 - 3) * 5",
    source="countdown",
    meta={"numbers": [3, 5, 7], "target": 20},
)


def completion(text: str) -> Completion:
    return Completion(
        token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
    )


@pytest.mark.parametrize(
    "answer",
    [
        "(7 - 3) * 5",
        "5*(7-3)",
        "5*(7-3) = 20",
        "(7−3)×5",
        r"$(7-3) \times 5$",
        "-5*(3-7)",
        "+5*(7-3)",
        " ( 7-3 )*5 ",
        r"5\cdot(7-3)",
    ],
)
def test_a_solution_is_correct(answer):
    assert check_expression(answer, [3, 5, 7], 20).value == "correct"


@pytest.mark.parametrize(
    ("answer", "numbers", "target"),
    [
        ("8/(3-8/3)", [3, 3, 8, 8], 24),
        ("1/3*3", [1, 3, 3], 1),
        ("6 ÷ 4 * 2", [2, 4, 6], 3),
        ("5+5", [5, 5], 10),
    ],
)
def test_intermediate_fractions_are_exact(answer, numbers, target):
    assert check_expression(answer, numbers, target).value == "correct"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("7 + 5 + 3", "makes 15"),
        ("5 * 4", "uses [4, 5]"),
        ("20", "uses [20]"),
        ("(7-3)*5 + 7 - 7", "uses [3, 5, 7, 7, 7]"),
        ("(7-3)*5 = 21", "the stated result is not the target"),
        ("(7-3)*5 = 20 = 20", "the stated result is not the target"),
        ("7/(5-5)*3", "ZeroDivisionError"),
        ("", "SyntaxError"),
        ("(7-3)*", "SyntaxError"),
        ("()", "Tuple is not allowed"),
        ("5(7-3)", "Call is not allowed"),
        ("5**(7-3)", "Pow is not allowed"),
        ("7//3*5", "FloorDiv is not allowed"),
        ("99**88**77", "Pow is not allowed"),
        ("7.0-3*5", "other characters"),
        ("1.5", "other characters"),
        ("__import__('os').system('true')", "other characters"),
        ("True", "other characters"),
        ("5_7", "other characters"),
        ("٣+٥", "other characters"),
        ("7-3\n*5", "other characters"),
        ("9" * 150, "uses [999"),
        ("(" * 199, "SyntaxError"),
        ("(" * 90 + "5" + ")" * 90, "uses [5]"),
        ("-" * 199 + "5", "uses [5]"),
        ("1" * 10**6, "longer than 200 characters"),
    ],
)
def test_any_other_answer_is_wrong_with_a_reason(answer, reason):
    verdict = check_expression(answer, [3, 5, 7], 20)
    assert verdict.value == "wrong"
    assert reason in verdict.reason


def test_the_digits_of_a_decimal_number_do_not_count_as_numbers():
    assert check_expression("1.5*2", [1, 5, 2], 3).value == "wrong"


def test_the_reward_scores_only_the_final_answer():
    in_tags = completion("<think>x</think><answer>(7-3)*5</answer>")
    assert reward(in_tags, PROBLEM).value == "correct"
    in_thoughts = completion("<think>(7-3)*5</think>")
    assert reward(in_thoughts, PROBLEM).value == "wrong"
    without_tags = completion("(7-3)*5")
    assert reward(without_tags, PROBLEM).value == "wrong"
    in_last_tags = completion("<think>x</think><answer>1</answer><answer>(7-3)*5</answer>")
    assert reward(in_last_tags, PROBLEM).value == "correct"


def test_the_reward_does_not_apply_to_other_problems():
    problem = Problem(id="t/0", question="?", answer="2", source="t")
    assert reward(completion("<answer>2</answer>"), problem) is None


@given(st.text("0123456789+-*/()= .×÷x", max_size=60))
def test_python_confirms_the_value_of_every_correct_expression(answer):
    verdict = check_expression(answer, [3, 5, 7], 20)
    if verdict.value == "correct":
        expression = answer.replace("×", "*").replace("÷", "/").split("=")[0].strip()
        # A correct expression consists of digits, operators and brackets, so eval is safe.
        assert abs(eval(expression) - 20) < 1e-9
    else:
        assert verdict.value == "wrong"
