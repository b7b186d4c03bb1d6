"""The problem sets: reading files, generating problems, and error messages."""

import json
import re

import datasets
import pytest

from grpo.data import aime, amc, arithmetic, countdown, gsm8k, jsonl, math, minerva, olympiadbench
from grpo.data.arithmetic import Exercise, work_by_columns, work_by_places
from grpo.rewards import countdown as countdown_reward
from grpo.rewards.format import check
from grpo.types import Completion, Problem, UserError

GSM8K_ROWS = [
    {"id": "x0", "problem": "1 and 1?", "answer": "2", "solution": "1+1=2"},
    {"id": "x1", "problem": "Half of 4,000?", "answer": 2000, "solution": None},
]
MATH_ROWS = [
    {
        "problem": "Double 1?",
        "answer": "2",
        "level": 1,
        "subject": "Algebra",
        "solution": "It is $\\boxed{2}$.",
    },
    {
        "problem": "Half?",
        "solution": "So $\\boxed{\\frac{1}{2}}$.",
        "level": "Level 5",
        "type": "Geometry",
    },
    {"problem": "None?", "solution": "So $\\boxed{}$.", "level": "Level ?", "type": "Geometry"},
]


def write_jsonl(path, rows):
    """Writes the rows to a file and returns its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    """Writes the rows to a file and returns its path as text."""
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def completion(text: str) -> Completion:
    return Completion(
        token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
    )


def test_gsm8k_reads_problem_answer_and_solution_from_a_file_in_a_folder(tmp_path):
    write_jsonl(tmp_path / "gsm8k_test.jsonl", GSM8K_ROWS)
    assert gsm8k.load("test", seed=0, path=str(tmp_path)) == [
        Problem(
            id="gsm8k/test/0", question="1 and 1?", answer="2", source="gsm8k", solution="1+1=2"
        ),
        Problem(id="gsm8k/test/1", question="Half of 4,000?", answer="2000", source="gsm8k"),
    ]


def test_evaluation_sets_accept_problem_or_question_and_have_no_train_split(tmp_path):
    write_jsonl(
        tmp_path / "aime25.jsonl",
        [{"id": "a", "problem": "P?", "answer": "70", "source": "AIME 2025", "level": None}],
    )
    write_jsonl(tmp_path / "amc23.jsonl", [{"question": "Q?", "answer": 27.5}])
    write_jsonl(
        tmp_path / "olympiad.jsonl",
        [
            {
                "question": "R?",
                "final_answer": ["$2$", "$3$"],
                "unit": "m",
                "solution": ["one", "two"],
            }
        ],
    )
    write_jsonl(
        tmp_path / "minerva.jsonl",
        [{"problem": "S?", "answer": "1.6", "solution": "So 1.6.", "subject": "Astronomy"}],
    )
    folder = str(tmp_path)
    assert aime.load("test", seed=0, path=folder, year=2025) == [
        Problem(id="aime/2025/0", question="P?", answer="70", source="aime")
    ]
    assert amc.load("test", seed=0, path=folder)[0].answer == "27.5"
    (problem,) = olympiadbench.load("test", seed=0, path=folder)
    assert problem.answer == "$2$"
    assert problem.meta == {"unit": "m"}
    assert problem.solution is None
    assert minerva.load("test", seed=0, path=folder)[0].solution == "So 1.6."
    for module in (aime, amc, minerva, olympiadbench):
        with pytest.raises(UserError, match="for evaluation only"):
            module.load("train", seed=0, path=str(tmp_path / "amc23.jsonl"))
    with pytest.raises(UserError, match=r"unknown year 1999\. Available: 2024, 2025"):
        aime.load("test", seed=0, path=folder, year=1999)


def test_prompts_without_answers_are_all_in_the_train_split(tmp_path):
    rows = [{"prompt": f"Write about {number}."} for number in range(50)]
    path = write_jsonl(tmp_path / "general.jsonl", rows)
    with pytest.raises(UserError, match="no field 'answer'"):
        jsonl.load("train", seed=0, path=path)
    problems = jsonl.load("train", seed=0, path=path, answers=False)
    assert len(problems) == 50
    assert {problem.answer for problem in problems} == {""}
    with pytest.raises(UserError, match="has no test problems"):
        jsonl.load("test", seed=0, path=path, answers=False)


def test_gsm8k_reads_the_answer_and_solution_from_the_format_of_the_hub(tmp_path):
    path = write_jsonl(
        tmp_path / "any.jsonl",
        [{"question": "Q?", "answer": "She has 2*600=<<2*600=1200>>1200.\n#### 1,200"}],
    )
    assert gsm8k.load("train", seed=0, path=path) == [
        Problem(
            id="gsm8k/train/0",
            question="Q?",
            answer="1200",
            source="gsm8k",
            solution="She has 2*600=1200.",
        )
    ]


def test_parquet_gives_the_same_problems_as_jsonl(tmp_path):
    rows = [{**row, "answer": str(row["answer"])} for row in GSM8K_ROWS]
    write_parquet(tmp_path / "gsm8k_train.parquet", rows)
    jsonl_path = write_jsonl(tmp_path / "other.jsonl", rows)
    from_folder_with_parquet = gsm8k.load("train", seed=0, path=str(tmp_path))
    from_jsonl = gsm8k.load("train", seed=0, path=jsonl_path)
    assert from_folder_with_parquet == from_jsonl


def test_a_changed_file_is_read_again(tmp_path):
    for answer in ("1", "2"):
        path = write_parquet(tmp_path / "mine.parquet", [{"question": "Q?", "answer": answer}])
        (problem,) = jsonl.load("train", seed=0, path=path, test_fraction=0.0)
        assert problem.answer == answer


def test_math_keeps_level_and_subject_and_reads_a_missing_answer_from_the_box(tmp_path):
    path = write_jsonl(tmp_path / "math_train.jsonl", MATH_ROWS)
    problems = math.load("train", seed=0, path=path)
    assert [(problem.id, problem.answer, problem.meta) for problem in problems] == [
        ("math/train/0", "2", {"level": 1, "subject": "Algebra"}),
        ("math/train/1", "\\frac{1}{2}", {"level": 5, "subject": "Geometry"}),
    ]


def test_math_filters_by_level_and_keeps_the_ids(tmp_path):
    path = write_jsonl(tmp_path / "math500.jsonl", MATH_ROWS[:2])
    (problem,) = math.load("test", seed=0, path=path, levels=[4, 5])
    assert problem.id == "math/test/1"
    with pytest.raises(UserError, match="levels"):
        math.load("test", seed=0, path=path, levels=[6])


def test_a_custom_file_accepts_prompt_or_question_and_keeps_other_fields_as_meta(tmp_path):
    rows = [
        {
            "prompt": "Q?",
            "answer": 4.5,
            "id": 7,
            "source": "mine",
            "when": "2024-01-01",
            "numbers": [1],
        },
        {"question": "R?", "answer": "a"},
    ]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    problems = jsonl.load("train", seed=0, path=path, test_fraction=0.0)
    assert problems == [
        Problem(
            id="7",
            question="Q?",
            answer="4.5",
            source="mine",
            meta={"when": "2024-01-01", "numbers": [1]},
        ),
        Problem(id="jsonl/train/1", question="R?", answer="a", source="jsonl"),
    ]


def test_a_tenth_of_a_custom_file_is_held_out_by_default(tmp_path):
    rows = [{"question": f"{i}?", "answer": "1"} for i in range(1000)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    train = {problem.question for problem in jsonl.load("train", seed=0, path=path)}
    test = {problem.question for problem in jsonl.load("test", seed=0, path=path)}
    assert len(train) + len(test) == 1000
    assert not train & test
    assert 70 < len(test) < 130


def test_no_problem_of_the_train_file_is_held_out_if_there_is_a_test_file(tmp_path):
    rows = [{"question": f"{i}?", "answer": "1"} for i in range(50)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    test_path = write_jsonl(tmp_path / "held.jsonl", [{"question": "held?", "answer": "2"}])
    assert len(jsonl.load("train", seed=0, path=path, test_path=test_path)) == 50
    (held_out,) = jsonl.load("test", seed=0, path=path, test_path=test_path)
    assert held_out.answer == "2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"question": "Q?", "answer": "1"}\n{"question": "R?", answer}\n',
            "line 2: not JSON: Expecting property name",
        ),
        ('{"question": "Q?", "answer": "1"}\n\n{"question": "R?"}\n', "line 3: no field 'answer'"),
        ('{"question": "Q?", "answer": null}\n', "line 1: field 'answer' is empty"),
        ('{"question": " ", "answer": "1"}\n', "line 1: field 'question' is empty"),
        ('{"question": "Q?", "answer": [1]}\n', "line 1: field 'answer' is a list"),
        (
            '{"ask": "Q?", "answer": "1"}\n',
            "line 1: no field 'problem' or 'question' or 'prompt'. "
            "The row has the fields ask, answer.",
        ),
        ('["Q?", "1"]\n', "line 1: got a list"),
        (
            '{"question": "Q?", "answer": "1", "id": "a"}\n'
            '{"question": "R?", "answer": "1", "id": "a"}\n',
            "id 'a' appears twice",
        ),
        (
            '{"question": "Q \\ud83d\\ude00?", "answer": "1"}\n'
            '{"question": "R \\ud83d?", "answer": "1"}\n',
            "line 2: contains the lone surrogate U+D83D",
        ),
        ("", "no rows"),
    ],
)
def test_an_invalid_file_raises_a_one_line_error_that_names_the_line_or_id(
    tmp_path, content, message
):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error_info:
        jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)
    assert "\n" not in str(error_info.value)


def test_a_missing_or_unreadable_file_raises_a_user_error(tmp_path):
    message = r"none of gsm8k_train\.jsonl, gsm8k_train\.json, gsm8k_train\.parquet"
    with pytest.raises(UserError, match=message):
        gsm8k.load("train", seed=0, path=str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        gsm8k.load("train", seed=0, path=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        gsm8k.load("train", seed=0, path=str(tmp_path / "broken.parquet"))


def test_an_unreachable_hub_raises_a_one_line_error_with_a_way_out(monkeypatch):
    def raise_connection_error(*arguments, **options):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", raise_connection_error)
    message = r"openai/gsm8k cannot be fetched from the hub. Set data\.path .*Couldn't reach\)"
    with pytest.raises(UserError, match=message) as error_info:
        gsm8k.load("train", seed=0)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize(
    "load", [gsm8k.load, math.load, jsonl.load, arithmetic.load, countdown.load]
)
def test_an_unknown_split_raises_a_user_error(load):
    with pytest.raises(UserError, match=r"unknown split 'valid'\. Available: train, test"):
        load("valid", seed=0)


def test_terse_solutions_are_guesses_and_all_others_are_correct():
    options = {"digits": 2, "terse": 0.6, "slip": 9, "working": "places"}
    errors_of_terse_solutions = []
    errors_of_worked_solutions = []
    for problem in arithmetic.load("train", seed=0, **options)[:500]:
        content = problem.solution.removeprefix("<think>").removesuffix("</answer>")
        thoughts, answer = content.split("</think><answer>")
        error = int(answer) - int(problem.answer)
        is_worked = "=" in thoughts
        if is_worked:
            errors_of_worked_solutions.append(error)
        else:
            errors_of_terse_solutions.append(error)
    assert 0.5 < len(errors_of_terse_solutions) / 500 < 0.7
    assert {abs(error) for error in errors_of_terse_solutions} == set(range(10))
    assert not any(errors_of_worked_solutions)


def test_an_invalid_working_raises_a_user_error():
    with pytest.raises(UserError, match="places works for sums only"):
        arithmetic.load("train", seed=0, working="places", operations=["+", "-"])
    with pytest.raises(UserError, match="got 'rows', expected columns or places"):
        arithmetic.load("train", seed=0, working="rows")


@pytest.mark.parametrize(
    ("exercise", "expected"),
    [
        (Exercise(47, "+", 85), "40+80=120 7+5=12 120+12=132"),
        (Exercise(347, "+", 85), "300+0=300 40+80=120 7+5=12 300+120=420 420+12=432"),
    ],
)
def test_workings_by_places_equal_hand_calculations(exercise, expected):
    assert work_by_places(exercise) == expected


@pytest.mark.parametrize(
    ("exercise", "expected"),
    [
        (Exercise(347, "+", 85), "7+5+0=12 4+8+1=13 3+0+1=04"),
        (Exercise(347, "-", 85), "7-5-0=02 4-8-0=16 3-0-1=02"),
        (Exercise(100, "-", 1), "0-1-0=19 0-0-1=19 1-0-1=00"),
        (Exercise(34, "*", 12), "34*2=68 34*10=340 68+340=408"),
    ],
)
def test_workings_by_columns_equal_hand_calculations(exercise, expected):
    assert work_by_columns(exercise) == expected


def test_generated_solutions_of_arithmetic_are_correct():
    for problem in arithmetic.load("train", seed=0, operations=("+", "-", "*"))[:2000]:
        assert problem.question.endswith("=")
        operation, result = evaluate(problem.question.removesuffix("="))
        assert int(problem.answer) == result
        assert result >= 0
        assert check(problem.solution)
        solution = re.fullmatch(r"<think>(.+)</think><answer>(\d+)</answer>", problem.solution)
        assert solution[2] == problem.answer
        steps = [step.split("=") for step in solution[1].split()]
        if operation == "*":
            check_partial_products(steps, result)
        else:
            check_columns(steps, operation, result)


def evaluate(expression):
    """Returns the operation and the value of an expression: `34*2` -> ("*", 68)."""
    match = re.fullmatch(r"(\d+)([-+*])(\d+)", expression)
    first = int(match[1])
    operation = match[2]
    second = int(match[3])
    if operation == "+":
        return operation, first + second
    if operation == "-":
        return operation, first - second
    return operation, first * second


def check_partial_products(steps, result):
    """Checks steps such as `34*2=68 34*10=340 68+340=408`, split at the equals signs."""
    for expression, value in steps:
        operation, expected = evaluate(expression)
        assert operation in ("*", "+")
        assert int(value) == expected
    _, last_value = steps[-1]
    assert int(last_value) == result


def check_columns(steps, operation, result):
    """Checks steps such as `7+5+0=12 4+8+1=13 3+0+1=04`, split at the equals signs.

    The third number of a step is the carry of the previous step. The value of a step consists of
    its carry and a digit of the result.
    """
    previous_carry = 0
    digits_from_the_right = []
    for expression, value in steps:
        first, second, added_carry = map(int, expression.split(operation))
        assert added_carry == previous_carry
        carry, digit = map(int, value)
        if operation == "+":
            assert first + second + added_carry == 10 * carry + digit
        else:
            assert first - second - added_carry == digit - 10 * carry
        digits_from_the_right.append(str(digit))
        previous_carry = carry
    if operation == "+":
        digits_from_the_right.append(str(previous_carry))
    assert int("".join(reversed(digits_from_the_right))) == result


@pytest.mark.parametrize("load", [arithmetic.load, countdown.load])
def test_a_generated_problem_depends_only_on_seed_and_index(load):
    large = load("train", seed=5)
    small = load("train", seed=5, size=30)
    for index in (29, 3, 0):
        assert large[index] == small[index]
    assert large[:30] == list(small)
    assert large[-1] == large[len(large) - 1]
    assert large[:30] != load("train", seed=6)[:30]
    with pytest.raises(IndexError):
        small[30]


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (arithmetic.load, {"digits": 1, "operations": ("+", "*", "-")}),
        (arithmetic.load, {"digits": 2}),
        (countdown.load, {"min_numbers": 2, "max_numbers": 2, "max_number": 9}),
    ],
)
def test_train_and_test_share_no_content_for_any_seeds(load, options):
    def contents(split, seed):
        problems = load(split, seed=seed, size=1500, **options)
        return {content_without_order(problem) for problem in problems}

    train = contents("train", 0) | contents("train", 1)
    test = contents("test", 2)
    assert train
    assert test
    assert not train & test


def content_without_order(problem):
    """Returns the sorted numbers, the target and the operation of a problem.

    The target of an arithmetic problem is None. The operation of a countdown problem is always "+",
    the first one that the question names.
    """
    numbers = problem.meta.get("numbers")
    if numbers is None:
        numbers = [int(digits) for digits in re.findall(r"\d+", problem.question)]
    operation = re.findall(r"[-+*]", problem.question)[0]
    return tuple(sorted(numbers)), problem.meta.get("target"), operation


def test_the_first_digits_of_arithmetic_problems_cover_the_full_range():
    problems = arithmetic.load("train", seed=0, digits=1, size=2000)
    assert {problem.question[0] for problem in problems} == set("0123456789")


def test_the_solution_of_every_countdown_problem_is_correct():
    for split in ("train", "test"):
        for problem in countdown.load(split, seed=0, min_numbers=2, max_numbers=5, size=300):
            verdict = countdown_reward.reward(completion(problem.solution), problem)
            assert verdict.value == "correct"
            assert check(problem.solution)
            assert 1 <= problem.meta["target"] <= 100
            assert 2 <= len(problem.meta["numbers"]) <= 5


def test_countdown_has_the_wording_of_tinyzero():
    problem = countdown.load("train", seed=0)[0]
    numbers = problem.meta["numbers"]
    target = problem.meta["target"]
    assert problem.question == (
        f"Using the numbers {numbers}, create an equation that equals {target}. "
        "You can use basic arithmetic operations (+, -, *, /) and each number can only be used "
        "once."
    )


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (arithmetic.load, {"operations": ("+", "%")}, "operations"),
        (arithmetic.load, {"terms": 3}, "terms"),
        (arithmetic.load, {"digits": 0}, "digits"),
        (arithmetic.load, {"path": "a.jsonl"}, "Remove data.path"),
        (countdown.load, {"min_numbers": 5}, "min_numbers: got 5, expected an integer from 2 to 4"),
        (jsonl.load, {}, r"data\.path"),
    ],
)
def test_invalid_options_raise_a_user_error(load, options, message):
    with pytest.raises(UserError, match=message):
        load("train", seed=0, **options)


def test_countdown_raises_a_user_error_if_a_split_has_no_problems():
    # The only problem has the numbers 1 and 1 and the target 1. It belongs to one of the splits.
    options = {"min_numbers": 2, "max_numbers": 2, "max_number": 1, "max_target": 1}
    with pytest.raises(UserError, match=r"no (train|test) problem in 10000 draws"):
        for split in ("train", "test"):
            countdown.load(split, seed=0, **options)[0]
