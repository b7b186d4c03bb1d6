"""The problem sets: what they read, what they draw, and how they say that something is amiss."""

import json
import re

import datasets
import pytest

from data import aime, amc, arithmetic, countdown, gsm8k, jsonl, math, minerva, olympiadbench
from data.arithmetic import by_places, scratchpad
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


def test_sets_to_judge_by_are_read_in_both_forms_and_refused_for_training(tmp_path):
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
        with pytest.raises(UserError, match="a set to judge by"):
            module.load("train", seed=0, path=str(tmp_path / "amc23.jsonl"))
    with pytest.raises(UserError, match="got 1999; have 2024, 2025"):
        aime.load("test", seed=0, path=folder, year=1999)


def test_general_prompts_need_no_answers_and_are_all_for_training(tmp_path):
    path = write(tmp_path / "general.jsonl", [{"prompt": f"Write about {n}."} for n in range(50)])
    with pytest.raises(UserError, match="no field 'answer'"):
        jsonl.load("train", seed=0, path=path)
    problems = jsonl.load("train", seed=0, path=path, answers=False)
    assert len(problems) == 50 and {problem.answer for problem in problems} == {""}
    with pytest.raises(UserError, match="gives no test problems"):
        jsonl.load("test", seed=0, path=path, answers=False)


def test_gsm8k_reads_the_hubs_schema(tmp_path):
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


def test_a_file_that_changed_is_read_anew(tmp_path):
    for answer in ("1", "2"):
        datasets.Dataset.from_list([{"question": "Q?", "answer": answer}]).to_parquet(
            tmp_path / "mine.parquet"
        )
        assert (
            jsonl.load("train", seed=0, path=str(tmp_path / "mine.parquet"), test_fraction=0.0)[
                0
            ].answer
            == answer
        )


def test_math_keeps_level_and_subject_and_opens_the_box_where_there_is_no_answer(tmp_path):
    problems = math.load("train", seed=0, path=write(tmp_path / "math_train.jsonl", MATH))
    assert [(problem.id, problem.answer, problem.meta) for problem in problems] == [
        ("math/train/0", "2", {"level": 1, "subject": "Algebra"}),
        ("math/train/1", "\\frac{1}{2}", {"level": 5, "subject": "Geometry"}),
    ]


def test_math_levels_select_and_ids_stay(tmp_path):
    path = write(tmp_path / "math500.jsonl", MATH[:2])
    assert [problem.id for problem in math.load("test", seed=0, path=path, levels=[4, 5])] == [
        "math/test/1"
    ]
    with pytest.raises(UserError, match="levels"):
        math.load("test", seed=0, path=path, levels=[6])


def test_own_file_takes_any_question_name_and_keeps_further_fields(tmp_path):
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


def test_own_file_holds_a_share_of_its_questions_out(tmp_path):
    path = write(
        tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(1000)]
    )
    train, test = (
        {problem.question for problem in jsonl.load(split, seed=0, path=path)}
        for split in ("train", "test")
    )
    assert len(train) + len(test) == 1000
    assert not train & test
    assert 70 < len(test) < 130


def test_own_test_file_leaves_the_train_file_whole(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(50)])
    test_path = write(tmp_path / "held.jsonl", [{"question": "held?", "answer": "2"}])
    assert len(jsonl.load("train", seed=0, path=path, test_path=test_path)) == 50
    assert [
        problem.answer for problem in jsonl.load("test", seed=0, path=path, test_path=test_path)
    ] == ["2"]


@pytest.mark.parametrize(
    ("content", "words"),
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
            "line 1: no field 'problem' or 'question' or 'prompt'; have ask, answer",
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
def test_a_fault_in_a_file_names_its_line(tmp_path, content, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)
    assert "\n" not in str(caught.value)


def test_a_missing_path_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        UserError, match=r"none of gsm8k_train\.jsonl, gsm8k_train\.json, gsm8k_train\.parquet"
    ):
        gsm8k.load("train", seed=0, path=str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        gsm8k.load("train", seed=0, path=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable parquet file"):
        gsm8k.load("train", seed=0, path=str(tmp_path / "broken.parquet"))


def test_an_unreachable_hub_gives_the_way_out(monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError,
        match=r"openai/gsm8k could not be fetched from the hub: give data\.path=.*Couldn't reach\)",
    ) as caught:
        gsm8k.load("train", seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "load", [gsm8k.load, math.load, jsonl.load, arithmetic.load, countdown.load]
)
def test_only_train_and_test_are_splits(load):
    with pytest.raises(UserError, match="no split 'valid'; have train, test"):
        load("valid", seed=0)


def test_a_careless_start_guesses_wrong_and_works_right():
    options = {"digits": 2, "terse": 0.6, "slip": 9, "working": "places"}
    rows = arithmetic.load("train", seed=0, **options)
    guessed, worked = [], []
    for row in (rows[i] for i in range(500)):
        thoughts, answer = (
            row.solution.removeprefix("<think>").removesuffix("</answer>").split("</think><answer>")
        )
        (worked if "=" in thoughts else guessed).append(int(answer) - int(row.answer))
    assert 0.5 < len(guessed) / 500 < 0.7 and not any(worked)
    assert {abs(slip) for slip in guessed} == set(range(10))
    with pytest.raises(UserError, match="places for sums alone"):
        arithmetic.load("train", seed=0, working="places", operations=["+", "-"])


def test_scratchpads_worked_by_hand():
    assert by_places(47, "+", 85) == "40+80=120 7+5=12 120+12=132"
    assert by_places(347, "+", 85) == "300+0=300 40+80=120 7+5=12 300+120=420 420+12=432"
    assert scratchpad(347, "+", 85) == "7+5+0=12 4+8+1=13 3+0+1=04"
    assert scratchpad(347, "-", 85) == "7-5-0=02 4-8-0=16 3-0-1=02"
    assert scratchpad(100, "-", 1) == "0-1-0=19 0-0-1=19 1-0-1=00"
    assert scratchpad(34, "*", 12) == "34*2=68 34*10=340 68+340=408"


def test_worked_solutions_of_arithmetic_are_right():
    for problem in arithmetic.load("train", seed=0, operations=("+", "-", "*"))[:2000]:
        a, operation, b = re.fullmatch(r"(\d+)([-+*])(\d+)=", problem.question).groups()
        assert (
            int(problem.answer)
            == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation]
            >= 0
        )
        thoughts, answer = re.fullmatch(
            r"<think>(.+)</think><answer>(\d+)</answer>", problem.solution
        ).groups()
        assert answer == problem.answer
        assert check(problem.solution)
        steps = [step.split("=") for step in thoughts.split()]
        if operation == "*":
            for left, right in steps:
                x, sign, y = re.fullmatch(r"(\d+)([*+])(\d+)", left).groups()
                assert int(right) == (int(x) * int(y) if sign == "*" else int(x) + int(y))
            assert steps[-1][1] == answer
        else:
            carry = 0
            for left, right in steps:
                x, y, c = map(int, left.split(operation))
                assert c == carry
                carry, digit = map(int, right)
                assert (
                    x + y + c == 10 * carry + digit
                    if operation == "+"
                    else x - y - c == digit - 10 * carry
                )
            assert int(
                str(carry if operation == "+" else 0)
                + "".join(right[1] for _, right in reversed(steps))
            ) == int(answer)


@pytest.mark.parametrize("load", [arithmetic.load, countdown.load])
def test_a_drawn_problem_depends_on_seed_and_index_alone(load):
    first, second = load("train", seed=5), load("train", seed=5, size=30)
    assert [first[i] for i in (29, 3, 0)] == [second[i] for i in (29, 3, 0)]
    assert first[:30] == list(second)
    assert first[-1] == first[len(first) - 1]
    assert first[:30] != load("train", seed=6)[:30]
    with pytest.raises(IndexError):
        second[30]


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (arithmetic.load, {"digits": 1, "operations": ("+", "*", "-")}),
        (arithmetic.load, {"digits": 2}),
        (countdown.load, {"min_numbers": 2, "max_numbers": 2, "max_number": 9}),
    ],
)
def test_train_and_test_share_no_content_whatever_the_seed(load, options):
    def content(problem):
        numbers = problem.meta.get("numbers") or map(int, re.findall(r"\d+", problem.question))
        return (
            tuple(sorted(numbers)),
            problem.meta.get("target"),
            re.findall(r"[-+*]", problem.question)[0],
        )

    def contents(split, seed):
        return {content(problem) for problem in load(split, seed=seed, size=1500, **options)}

    train, test = contents("train", 0) | contents("train", 1), contents("test", 2)
    assert train and test
    assert not train & test


def test_operands_of_arithmetic_cover_their_range():
    problems = arithmetic.load("train", seed=0, digits=1, size=2000)
    assert {problem.question[0] for problem in problems} == set("0123456789")


def test_every_countdown_problem_is_solved_by_its_own_answer():
    for split in ("train", "test"):
        for problem in countdown.load(split, seed=0, min_numbers=2, max_numbers=5, size=300):
            assert countdown_reward.reward(completion(problem.solution), problem).value == "correct"
            assert check(problem.solution)
            assert 1 <= problem.meta["target"] <= 100
            assert 2 <= len(problem.meta["numbers"]) <= 5


def test_countdown_speaks_in_tinyzeros_words():
    problem = countdown.load("train", seed=0)[0]
    assert problem.question == (
        f"Using the numbers {problem.meta['numbers']}, create an equation that equals "
        f"{problem.meta['target']}. "
        "You can use basic arithmetic operations (+, -, *, /) and each number can only be used "
        "once."
    )


@pytest.mark.parametrize(
    ("load", "options", "words"),
    [
        (arithmetic.load, {"operations": ("+", "%")}, "operations"),
        (arithmetic.load, {"terms": 3}, "terms"),
        (arithmetic.load, {"digits": 0}, "digits"),
        (arithmetic.load, {"path": "a.jsonl"}, "leave data.path out"),
        (countdown.load, {"min_numbers": 5}, r"min_numbers: got 5; give an integer in 2\.\.4"),
        (jsonl.load, {}, r"data\.path"),
    ],
)
def test_options_that_cannot_be_are_the_users_error(load, options, words):
    with pytest.raises(UserError, match=words):
        load("train", seed=0, **options)


def test_countdown_without_any_problem_of_a_split_says_so():
    with pytest.raises(UserError, match=r"no (train|test) problem in 10000 draws"):
        # 1 and 1 only make 2 or 1: too few contents for both splits
        for split in ("train", "test"):
            countdown.load(split, seed=0, min_numbers=2, max_numbers=2, max_number=1, max_target=1)[
                0
            ]
