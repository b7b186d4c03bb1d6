"""The problem sets: files, generated problems, and error messages."""

import json
import re

import datasets
import pytest

from data import aime, amc, arithmetic, countdown, gsm8k, jsonl, math, minerva, olympiadbench
from data.arithmetic import Exercise, work_by_columns, work_by_places
from grpo.types import Completion, Problem, UserError
from rewards import countdown as countdown_reward
from rewards.format import check

GSM8K = [
    {"id": "x0", "problem": "1 and 1?", "answer": "2", "solution": "1+1=2"},
    {"id": "x1", "problem": "Half of 4,000?", "answer": 2000, "solution": None},
]
MATH = [
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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def completion(text: str) -> Completion:
    return Completion(
        token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", versions=((0, 0, 1),)
    )


def test_gsm8k_reads_the_local_schema_from_its_folder(tmp_path):
    write(tmp_path / "gsm8k_test.jsonl", GSM8K)
    assert gsm8k.load("test", seed=0, path=str(tmp_path)) == [
        Problem(
            id="gsm8k/test/0", question="1 and 1?", answer="2", source="gsm8k", solution="1+1=2"
        ),
        Problem(id="gsm8k/test/1", question="Half of 4,000?", answer="2000", source="gsm8k"),
    ]


def test_evaluation_sets_are_read_in_both_forms_and_have_no_train_split(tmp_path):
    write(
        tmp_path / "aime25.jsonl",
        [{"id": "a", "problem": "P?", "answer": "70", "source": "AIME 2025", "level": None}],
    )
    write(tmp_path / "amc23.jsonl", [{"question": "Q?", "answer": 27.5}])
    write(
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
    write(
        tmp_path / "minerva.jsonl",
        [{"problem": "S?", "answer": "1.6", "solution": "So 1.6.", "subject": "Astronomy"}],
    )
    folder = str(tmp_path)
    assert aime.load("test", seed=0, path=folder, year=2025) == [
        Problem(id="aime/2025/0", question="P?", answer="70", source="aime")
    ]
    assert amc.load("test", seed=0, path=folder)[0].answer == "27.5"
    (problem,) = olympiadbench.load("test", seed=0, path=folder)
    assert problem.answer == "$2$" and problem.meta == {"unit": "m"} and problem.solution is None
    assert minerva.load("test", seed=0, path=folder)[0].solution == "So 1.6."
    for module in (aime, amc, minerva, olympiadbench):
        with pytest.raises(UserError, match="for evaluation only"):
            module.load("train", seed=0, path=str(tmp_path / "amc23.jsonl"))
    with pytest.raises(UserError, match=r"unknown year 1999\. Available: 2024, 2025"):
        aime.load("test", seed=0, path=folder, year=1999)


def test_general_prompts_need_no_answers_and_are_all_in_the_train_split(tmp_path):
    path = write(tmp_path / "general.jsonl", [{"prompt": f"Write about {n}."} for n in range(50)])
    with pytest.raises(UserError, match="no field 'answer'"):
        jsonl.load("train", seed=0, path=path)
    problems = jsonl.load("train", seed=0, path=path, answers=False)
    assert len(problems) == 50 and {problem.answer for problem in problems} == {""}
    with pytest.raises(UserError, match="has no test problems"):
        jsonl.load("test", seed=0, path=path, answers=False)


def test_gsm8k_reads_the_schema_of_the_hub(tmp_path):
    path = write(
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
    rows = [{**row, "answer": str(row["answer"])} for row in GSM8K]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "gsm8k_train.parquet")
    from_parquet = gsm8k.load("train", seed=0, path=str(tmp_path))
    assert from_parquet == gsm8k.load("train", seed=0, path=write(tmp_path / "other.jsonl", rows))


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "mine.parquet"
    for answer in ("1", "2"):
        datasets.Dataset.from_list([{"question": "Q?", "answer": answer}]).to_parquet(path)
        (problem,) = jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)
        assert problem.answer == answer


def test_math_keeps_level_and_subject_and_reads_a_missing_answer_from_the_box(tmp_path):
    problems = math.load("train", seed=0, path=write(tmp_path / "math_train.jsonl", MATH))
    assert [(problem.id, problem.answer, problem.meta) for problem in problems] == [
        ("math/train/0", "2", {"level": 1, "subject": "Algebra"}),
        ("math/train/1", "\\frac{1}{2}", {"level": 5, "subject": "Geometry"}),
    ]


def test_math_filters_by_level_and_keeps_the_ids(tmp_path):
    path = write(tmp_path / "math500.jsonl", MATH[:2])
    assert [problem.id for problem in math.load("test", seed=0, path=path, levels=[4, 5])] == [
        "math/test/1"
    ]
    with pytest.raises(UserError, match="levels"):
        math.load("test", seed=0, path=path, levels=[6])


def test_a_users_file_may_name_the_question_differently_and_keeps_other_fields(tmp_path):
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
    problems = jsonl.load(
        "train", seed=0, path=write(tmp_path / "mine.jsonl", rows), test_fraction=0.0
    )
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


def test_a_share_of_a_users_file_is_held_out(tmp_path):
    path = write(
        tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(1000)]
    )
    train = {problem.question for problem in jsonl.load("train", seed=0, path=path)}
    test = {problem.question for problem in jsonl.load("test", seed=0, path=path)}
    assert len(train) + len(test) == 1000
    assert not train & test
    assert 70 < len(test) < 130


def test_with_a_test_file_nothing_of_the_train_file_is_held_out(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(50)])
    test_path = write(tmp_path / "held.jsonl", [{"question": "held?", "answer": "2"}])
    assert len(jsonl.load("train", seed=0, path=path, test_path=test_path)) == 50
    (held_out,) = jsonl.load("test", seed=0, path=path, test_path=test_path)
    assert held_out.answer == "2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"question": "Q?", "answer": "1"}\n{"question": "R?", answer}\n',
            "line 2: Expecting property name",
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
            '{"question": "Q?", "answer": "1", "id": "a"}\n{"question": "R?", "answer": "1", '
            '"id": "a"}\n',
            "id 'a' appears twice",
        ),
        ("", "no rows"),
    ],
)
def test_an_error_in_a_file_names_its_line(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported_with_the_expected_names(tmp_path):
    with pytest.raises(
        UserError, match=r"none of gsm8k_train\.jsonl, gsm8k_train\.json, gsm8k_train\.parquet"
    ):
        gsm8k.load("train", seed=0, path=str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        gsm8k.load("train", seed=0, path=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        gsm8k.load("train", seed=0, path=str(tmp_path / "broken.parquet"))


def test_an_unreachable_hub_is_reported_in_one_line_with_a_fix(monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError,
        match=r"openai/gsm8k cannot be fetched from the hub. Set data\.path .*Couldn't reach\)",
    ) as caught:
        gsm8k.load("train", seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "load", [gsm8k.load, math.load, jsonl.load, arithmetic.load, countdown.load]
)
def test_only_train_and_test_are_splits(load):
    with pytest.raises(UserError, match=r"unknown split 'valid'\. Available: train, test"):
        load("valid", seed=0)


def test_terse_solutions_guess_and_the_others_are_right():
    options = {"digits": 2, "terse": 0.6, "slip": 9, "working": "places"}
    errors_of_guesses = []
    errors_of_workings = []
    for problem in arithmetic.load("train", seed=0, **options)[:500]:
        content = problem.solution.removeprefix("<think>").removesuffix("</answer>")
        thoughts, answer = content.split("</think><answer>")
        error = int(answer) - int(problem.answer)
        if "=" in thoughts:
            errors_of_workings.append(error)
        else:
            errors_of_guesses.append(error)
    assert 0.5 < len(errors_of_guesses) / 500 < 0.7
    assert {abs(error) for error in errors_of_guesses} == set(range(10))
    assert not any(errors_of_workings)


def test_an_invalid_working_raises_a_user_error():
    with pytest.raises(UserError, match="places works for sums only"):
        arithmetic.load("train", seed=0, working="places", operations=["+", "-"])
    with pytest.raises(UserError, match="got 'rows', expected columns or places"):
        arithmetic.load("train", seed=0, working="rows")


@pytest.mark.parametrize(
    ("exercise", "working"),
    [
        (Exercise(47, "+", 85), "40+80=120 7+5=12 120+12=132"),
        (Exercise(347, "+", 85), "300+0=300 40+80=120 7+5=12 300+120=420 420+12=432"),
    ],
)
def test_sums_by_places_worked_by_hand(exercise, working):
    assert work_by_places(exercise) == working


@pytest.mark.parametrize(
    ("exercise", "working"),
    [
        (Exercise(347, "+", 85), "7+5+0=12 4+8+1=13 3+0+1=04"),
        (Exercise(347, "-", 85), "7-5-0=02 4-8-0=16 3-0-1=02"),
        (Exercise(100, "-", 1), "0-1-0=19 0-0-1=19 1-0-1=00"),
        (Exercise(34, "*", 12), "34*2=68 34*10=340 68+340=408"),
    ],
)
def test_exercises_by_columns_worked_by_hand(exercise, working):
    assert work_by_columns(exercise) == working


def test_generated_solutions_of_arithmetic_are_right():
    for problem in arithmetic.load("train", seed=0, operations=("+", "-", "*"))[:2000]:
        match = re.fullmatch(r"(\d+)([-+*])(\d+)=", problem.question)
        first, second = int(match[1]), int(match[3])
        operation = match[2]
        result = {"+": first + second, "-": first - second, "*": first * second}[operation]
        assert int(problem.answer) == result >= 0
        assert check(problem.solution)
        solution = re.fullmatch(r"<think>(.+)</think><answer>(\d+)</answer>", problem.solution)
        assert solution[2] == problem.answer
        steps = [step.split("=") for step in solution[1].split()]
        if operation == "*":
            check_partial_products(steps, result)
        else:
            check_columns(steps, operation, result)


def check_partial_products(steps, result):
    for expression, value in steps:
        first, operation, second = re.fullmatch(r"(\d+)([*+])(\d+)", expression).groups()
        if operation == "*":
            assert int(value) == int(first) * int(second)
        else:
            assert int(value) == int(first) + int(second)
    assert int(steps[-1][1]) == result


def check_columns(steps, operation, result):
    carry = 0
    digits = []  # of the result, from the right
    for expression, value in steps:
        first, second, carry_used = map(int, expression.split(operation))
        assert carry_used == carry
        carry, digit = map(int, value)
        if operation == "+":
            assert first + second + carry_used == 10 * carry + digit
        else:
            assert first - second - carry_used == digit - 10 * carry
        digits.append(str(digit))
    if operation == "+":
        digits.append(str(carry))
    assert int("".join(reversed(digits))) == result


@pytest.mark.parametrize("load", [arithmetic.load, countdown.load])
def test_a_generated_problem_depends_only_on_seed_and_index(load):
    large = load("train", seed=5)
    small = load("train", seed=5, size=30)
    assert [large[i] for i in (29, 3, 0)] == [small[i] for i in (29, 3, 0)]
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
    def content(problem):
        numbers = problem.meta.get("numbers") or map(int, re.findall(r"\d+", problem.question))
        return (
            tuple(sorted(numbers)),
            problem.meta.get("target"),
            re.findall(r"[-+*]", problem.question)[0],
        )

    def contents(split, seed):
        return {content(problem) for problem in load(split, seed=seed, size=1500, **options)}

    train = contents("train", 0) | contents("train", 1)
    test = contents("test", 2)
    assert train and test
    assert not train & test


def test_operands_of_arithmetic_cover_their_range():
    problems = arithmetic.load("train", seed=0, digits=1, size=2000)
    assert {problem.question[0] for problem in problems} == set("0123456789")


def test_every_countdown_problem_is_solved_by_its_solution():
    for split in ("train", "test"):
        for problem in countdown.load(split, seed=0, min_numbers=2, max_numbers=5, size=300):
            assert countdown_reward.reward(completion(problem.solution), problem).value == "correct"
            assert check(problem.solution)
            assert 1 <= problem.meta["target"] <= 100
            assert 2 <= len(problem.meta["numbers"]) <= 5


def test_countdown_has_the_wording_of_tinyzero():
    problem = countdown.load("train", seed=0)[0]
    assert problem.question == (
        f"Using the numbers {problem.meta['numbers']}, create an equation that equals "
        f"{problem.meta['target']}. "
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


def test_countdown_reports_that_a_split_has_no_problems():
    # 1 and 1 can only make 1 and 2: too few contents for both splits.
    options = {"min_numbers": 2, "max_numbers": 2, "max_number": 1, "max_target": 1}
    with pytest.raises(UserError, match=r"no (train|test) problem in 10000 draws"):
        for split in ("train", "test"):
            countdown.load(split, seed=0, **options)[0]
