"""The countdown reward: exact fractions, each number used exactly once, no evaluation of text."""

import dataclasses

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.countdown import check_expression, read_problem, reward
from grpo.types import Completion, Problem

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
        ("(７-３)*５", "other characters"),
        ("(7-3)*⑤", "other characters"),
        ("(7-3)*5²", "other characters"),
        ("(7\u200b-3)*5", "other characters"),
        ("(7-3)*5 # = 20", "other characters"),
        ("(7-3)*5; 20", "other characters"),
        ("(7-3)*5, 20", "other characters"),
        ("[7-3]*5", "other characters"),
        ("0x14", "other characters"),
        ("2e1", "other characters"),
        ("(7-3)*5 == 20", "the stated result is not the target"),
        ("20 = (7-3)*5", "the stated result is not the target"),
        ("= 20", "SyntaxError"),
        ("(7-3)*5 =", "the stated result is not the target"),
        ("(7-3)*5 = 20.0", "the stated result is not the target"),
        ("(07-03)*05", "SyntaxError"),
        ("(7 - 3) 5", "SyntaxError"),
        ("1 0 + 1 0", "SyntaxError"),
        ("5 + 1 5", "SyntaxError"),
        ("73 - 53", "uses [53, 73]"),
        ("(7-3)*5 + 0", "uses [0, 3, 5, 7]"),
        ("(7-3)*5 * 1", "uses [1, 3, 5, 7]"),
        ("(7-3)*-5", "makes -20"),
        (r"(7-3)\cdots5", "other characters"),
        (r"\frac{7-3}{5}", "other characters"),
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


@pytest.mark.parametrize(
    "numbers",
    [
        [3, 5, 7],
        (3, 5, 7),
        ["3", " 5 ", "7.0"],
        [3.0, 5.0, 7],
        "[3, 5, 7]",
        "3 5 7",
        " 3,5 ,7 ",
        numpy.array([3, 5, 7]),
        numpy.array([3.0, 5.0, 7.0]),
        [numpy.int64(3), numpy.float32(5), 7],
    ],
    ids=repr,
)
@pytest.mark.parametrize("target", [20, "20", "20.0", 20.0, numpy.int32(20)], ids=repr)
def test_numbers_in_other_types_are_converted(numbers, target):
    problem = dataclasses.replace(PROBLEM, meta={"numbers": numbers, "target": target, "level": 2})
    meta = read_problem(problem).meta
    assert meta == {"numbers": [3, 5, 7], "target": 20, "level": 2}
    assert {type(number) for number in [*meta["numbers"], meta["target"]]} == {int}
    assert reward(completion("<answer>(7-3)*5 = 20</answer>"), problem).value == "correct"


@pytest.mark.parametrize(
    ("numbers", "target", "message"),
    [
        ([True, 5, 7], 20, "numbers: got True"),
        ([3.5, 5, 7], 20, "numbers: got 3.5"),
        ([None, 5, 7], 20, "numbers: got None"),
        ([[3], 5, 7], 20, r"numbers: got \[3\]"),
        ([float("nan"), 5], 20, "numbers: got nan"),
        ([float("inf"), 5], 20, "numbers: got inf"),
        (["3/2", 5], 20, "numbers: got '3/2'"),
        (["٣", 5], 20, "numbers: got '٣'"),
        (["1_0", 5], 20, "numbers: got '1_0'"),
        (["1e1", 5], 20, "numbers: got '1e1'"),
        (["9" * 5000, 5], 20, "numbers: got '999"),
        ([-3, 5, 7], 20, "expected no negative number"),
        ([], 20, "expected a list of integers"),
        ("", 20, "expected a list of integers"),
        ("[]", 20, "expected a list of integers"),
        ("3, 5,", 20, "numbers: got ''"),
        ("three", 20, "numbers: got 'three'"),
        ({3: 5}, 20, "expected a list of integers"),
        (None, 20, "expected a list of integers"),
        (7, 20, "expected a list of integers"),
        (numpy.array([[3, 5], [7, 9]]), 20, "numbers: got"),
        (numpy.array(7), 20, "expected a list of integers"),
        ([3, 5, 7], None, "target: got None"),
        ([3, 5, 7], False, "target: got False"),
        ([3, 5, 7], 20.5, "target: got 20.5"),
        ([3, 5, 7], "twenty", "target: got 'twenty'"),
        ([3, 5, 7], "", "target: got ''"),
        ([3, 5, 7], [20], r"target: got \[20\]"),
    ],
)
def test_other_numbers_raise_an_error_at_load_and_leave_the_reward_undecided(
    numbers, target, message
):
    problem = dataclasses.replace(PROBLEM, meta={"numbers": numbers, "target": target})
    with pytest.raises(ValueError, match=message):
        read_problem(problem)
    verdict = reward(completion("<answer>(7-3)*5</answer>"), problem)
    assert verdict.value == "undecided"
    assert "gold answer" in verdict.reason


def test_a_problem_without_numbers_or_target_is_not_changed():
    for meta in ({}, {"numbers": "?"}, {"target": "?"}):
        problem = dataclasses.replace(PROBLEM, meta=meta)
        assert read_problem(problem) is problem
