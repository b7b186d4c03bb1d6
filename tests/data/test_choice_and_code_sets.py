"""GPQA, HumanEval and MBPP: what the rewards `choice` and `code` need, and CSV files."""

import csv
import json
import re
from collections import Counter

import datasets
import pytest

from grpo.data import gpqa, humaneval, jsonl, mbpp
from grpo.rewards import choice, code
from grpo.types import Completion, DownloadError, Problem, UserError

GPQA_FIELDS = (
    "Record ID",
    "Question",
    "Correct Answer",
    "Incorrect Answer 1",
    "Incorrect Answer 2",
    "Incorrect Answer 3",
    "High-level domain",
)


def gpqa_row(number, **changes):
    return {
        "Record ID": f"rec{number}",
        "Question": f"What is the charge of ion number {number}?\n",
        "Correct Answer": f"+{number}",
        "Incorrect Answer 1": f"-{number}\n",
        "Incorrect Answer 2": "0",
        "Incorrect Answer 3": 'none, it is a "radical"',
        "High-level domain": "Chemistry",
        **changes,
    }


def write_csv(path, rows, fields=GPQA_FIELDS):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def completion(text):
    return Completion(token_ids=(1,), logprobs=(), text=text, finish_reason="stop", versions=())


def test_a_gpqa_question_has_its_options_and_the_letter_of_the_correct_one(tmp_path):
    path = write_csv(tmp_path / "gpqa_diamond.csv", [gpqa_row(3), gpqa_row(4)])
    problem, _ = gpqa.load("test", seed=0, path=str(tmp_path))
    assert problem.id == "gpqa/diamond/0"
    question, *options = re.split(r"\n+\([A-D]\) ", problem.question)
    assert question == "What is the charge of ion number 3?"
    assert sorted(options) == sorted(["+3", "-3", "0", 'none, it is a "radical"'])
    assert problem.meta == {"choices": options, "subject": "Chemistry"}
    assert problem.answer == "ABCD"[options.index("+3")]
    # The reward reads the gold answer, and accepts the letter and the text of the option only.
    assert choice.check_problem(problem) is None
    letters = ["A", "B", "C", "D"]
    verdicts = {
        letter: choice.reward(completion(rf"\boxed{{{letter}}}"), problem).value
        for letter in letters
    }
    assert Counter(verdicts.values()) == {"correct": 1, "wrong": 3}
    assert verdicts[problem.answer] == "correct"
    assert choice.reward(completion(r"\boxed{+3}"), problem).value == "correct"
    assert gpqa.load("test", seed=0, path=path)[0] == problem


def test_the_order_of_the_options_depends_on_the_problem_only(tmp_path):
    rows = [gpqa_row(number) for number in range(6)]
    problems = gpqa.load("test", seed=0, path=write_csv(tmp_path / "a.csv", rows))
    reversed_path = write_csv(tmp_path / "b.csv", rows[::-1])
    reversed_problems = gpqa.load("test", seed=7, path=reversed_path)[::-1]
    parquet = tmp_path / "c.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    from_parquet = gpqa.load("test", seed=1, path=str(parquet))
    for others in (reversed_problems, from_parquet):
        assert [problem.question for problem in others] == [each.question for each in problems]
        assert [problem.answer for problem in others] == [each.answer for each in problems]
    # Known orders: they must not change between versions.
    assert "".join(problem.answer for problem in problems) == "CCDACC"


def test_the_correct_letters_are_balanced(tmp_path):
    rows = [gpqa_row(number) for number in range(2000)]
    problems = gpqa.load("test", seed=0, path=write_csv(tmp_path / "a.csv", rows))
    counts = Counter(problem.answer for problem in problems)
    # A share of 1/4 of 2,000 has a standard deviation of 19.4.
    assert all(abs(counts[letter] - 500) < 4 * 19.4 for letter in "ABCD"), counts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (gpqa_row(1, **{"Correct Answer": " "}), "row 1: field 'Correct Answer' is empty"),
        (gpqa_row(1, **{"Question": ""}), "row 1: field 'Question' is empty"),
    ],
)
def test_an_incomplete_gpqa_row_is_an_error_that_names_it(tmp_path, row, message):
    path = write_csv(tmp_path / "gpqa_diamond.csv", [row])
    with pytest.raises(UserError, match=message):
        gpqa.load("test", seed=0, path=path)


def test_gpqa_errors_name_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"subset 'dimond'. Available: diamond, main, extended"):
        gpqa.load("test", seed=0, path=str(tmp_path), subset="dimond")
    with pytest.raises(UserError, match="for evaluation only"):
        gpqa.load("train", seed=0, path=str(tmp_path))
    with pytest.raises(UserError, match=r"none of gpqa_main.jsonl, .*, gpqa_main.csv"):
        gpqa.load("test", seed=0, path=str(tmp_path), subset="main")
    path = write_csv(tmp_path / "renamed.csv", [{"Question": "?"}], fields=("Question",))
    with pytest.raises(UserError, match=r"no field 'Correct Answer'. The row has the fields Quest"):
        gpqa.load("test", seed=0, path=path)
    with pytest.raises(DownloadError, match=r"gated: accept its terms .* `hf auth login`"):
        gpqa.load("test", seed=0)


def test_csv_files_have_text_in_all_cells_and_errors_with_a_line(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(b'\xef\xbb\xbfproblem,answer\r\n"two\r\nlines, quoted",007\r\n')
    (problem,) = jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)
    assert (problem.question, problem.answer) == ("two\r\nlines, quoted", "007")
    for content, message in [
        ("problem,answer\na,1,2\n", "row 1: 3 cells, expected 2: problem, answer"),
        ("problem,answer\na\n", "row 1: 1 cells, expected 2: problem, answer"),
        ("problem,answer\na,\n", "row 1: field 'answer' is empty"),
        ('problem,answer\n"a,1\n', "not a readable CSV file: Error: unexpected end"),
        ("problem,answer\n", "no rows"),
        ("", "no rows"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message) as error:
            jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)
        assert "\n" not in str(error.value)
    path.write_bytes(b"problem,answer\n\xff,1\n")
    with pytest.raises(UserError, match="not a readable CSV file: UnicodeDecodeError"):
        jsonl.load("train", seed=0, path=str(path), test_fraction=0.0)


HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": '\nimport math\n\n\ndef root(x: float) -> float:\n    """ The root. """\n',
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(9.0) == 3.0\n",
    "entry_point": "root",
}


def test_humaneval_has_the_head_of_the_function_and_its_tests(tmp_path):
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(HUMANEVAL_ROW) + "\n")
    (problem,) = humaneval.load("test", seed=0, path=str(tmp_path))
    assert problem == Problem(
        id="humaneval/0",
        question=HUMANEVAL_ROW["prompt"].strip(),
        answer="    return math.sqrt(x)\n",
        source="humaneval",
        meta={"test": HUMANEVAL_ROW["test"].strip(), "entry_point": "root"},
    )
    assert code.read_problem(problem) == problem
    with pytest.raises(UserError, match="for evaluation only"):
        humaneval.load("train", seed=0, path=str(tmp_path))
    # The normalized form with `problem` and `answer` gives the same problem.
    row = dict(HUMANEVAL_ROW)
    row["problem"], row["answer"] = row.pop("prompt"), row.pop("canonical_solution")
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(row) + "\n")
    assert humaneval.load("test", seed=0, path=str(tmp_path)) == [problem]


MBPP_ROWS = [
    {
        "task_id": task_id,
        "text": "Write a function to double a number.",
        "code": "def double(x):\r\n  return 2 * x",
        "test_list": ["assert double(1) == 2", "assert double(2) == 4"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for task_id in (10, 11, 510, 511, 601)
]


def test_mbpp_splits_by_task_id_and_shows_the_tests(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MBPP_ROWS))
    first, last = mbpp.load("test", seed=0, path=str(tmp_path))
    assert (first.id, last.id) == ("mbpp/11", "mbpp/510")
    assert first.question == (
        "Write a function to double a number.\nYour code should pass these tests:\n\n"
        "assert double(1) == 2\nassert double(2) == 4"
    )
    assert first.meta == {"test_list": MBPP_ROWS[0]["test_list"], "test_setup_code": ""}
    assert code.read_problem(first) == first
    (train,) = mbpp.load("train", seed=0, path=str(path), shown_tests=1)
    assert train.id == "mbpp/601"
    assert train.question.endswith("\n\nassert double(1) == 2")
    assert len(train.meta["test_list"]) == 2


def test_the_sanitized_mbpp_has_imports_in_a_list(tmp_path):
    row = {
        "source_file": "x",
        "task_id": 12,
        "prompt": "Write a function for the hypotenuse.",
        "code": "def hypotenuse(a, b): ...",
        "test_imports": ["import math", "import random"],
        "test_list": ["assert math.isclose(hypotenuse(3, 4), 5)"],
    }
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row]))
    (problem,) = mbpp.load("test", seed=0, path=str(tmp_path), subset="sanitized")
    assert problem.meta["test_setup_code"] == "import math\nimport random"
    assert code.read_problem(problem) == problem


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"subset": "mini"}, "unknown subset 'mini'. Available: full, sanitized"),
        ({}, {"shown_tests": 0}, "shown_tests: got 0, expected an integer from 1"),
        ({"task_id": "x1"}, {}, "line 1: field 'task_id' is 'x1', expected a number"),
        ({"task_id": 601}, {}, "has no test problems, which have the task ids 11 to 510"),
        ({"test_list": "assert f()"}, {}, "line 1: field 'test_list' is no list of texts"),
        ({"test_list": []}, {}, "line 1: field 'test_list' is missing or empty"),
    ],
)
def test_mbpp_errors_name_the_row_or_the_option(tmp_path, changes, options, message):
    path = tmp_path / "mbpp.jsonl"
    path.write_text(json.dumps({**MBPP_ROWS[1], **changes}) + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        mbpp.load("test", seed=0, path=str(path), **options)
