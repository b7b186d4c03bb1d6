"""`grpo grade`: grades a file of answers, explains one line, and grades the samples of a run again
with the current rules.
"""

import json
import re

import pytest
import yaml

from grpo.cli import main

ROWS = [
    {"prediction": "1/2", "gold": "0.5", "label": "correct"},
    {
        "completion": "<think>x</think><answer>3</answer>",
        "answer": "4",
        "label": "wrong",
        "id": "kept",
    },
    {"prediction": "7", "gold": "8", "label": "correct"},
]


def write_rows(path, rows):
    return write_lines(path, [json.dumps(row) for row in rows])


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_answers_is_graded_and_compared_with_its_labels(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    assert main(["grade", path, "--output", str(tmp_path / "out.jsonl")]) == 0
    output = capsys.readouterr().out
    assert "3 answers: 2 wrong, 1 correct" in output
    assert "2  wrong: another number" in output
    agreement = "66.7% agree, 0 false positives, 1 false negatives, 0 undecided"
    assert f"compared with 3 labels: {agreement}" in output
    graded = read_rows(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in graded] == ["correct", "wrong", "wrong"]
    assert graded[1]["id"] == "kept"


def test_explain_shows_how_one_line_is_graded(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    assert main(["grade", path, "--explain", "2"]) == 0
    output = capsys.readouterr().out
    assert "in the completion" in output
    assert "'3'" in output
    assert "wrong: another number" in output
    assert main(["grade", path, "--explain", "9"]) == 2
    assert "has no line 9" in capsys.readouterr().err


def test_a_blank_line_counts_as_a_line(tmp_path, capsys):
    lines = [json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]
    path = write_lines(tmp_path / "a.jsonl", lines)
    assert main(["grade", path, "--explain", "3"]) == 0
    assert "wrong: another number" in capsys.readouterr().out
    assert main(["grade", path, "--explain", "2"]) == 2
    assert "has no line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: needs text in prediction or completion"),
        ('{"gold": "1"}', "line 2: needs text in prediction or completion"),
        ('{"prediction": "1", "gold": 1}', "line 2: needs text in gold or answer"),
    ],
)
def test_an_invalid_line_is_an_error_that_names_the_line(tmp_path, capsys, line, message):
    lines = [json.dumps(ROWS[0]), line, json.dumps(ROWS[1])]
    assert main(["grade", write_lines(tmp_path / "a.jsonl", lines)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_and_a_directory_that_is_not_a_run_are_errors(tmp_path, capsys):
    assert main(["grade", str(tmp_path / "nothing.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["grade", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


@pytest.fixture
def countdown_run(tmp_path):
    """Returns a run directory with three completions, two of which score lower with current rules.

    The second completion has text after the answer, so `format` is now 0. The third does not use
    all numbers, so `countdown` is now 0.
    """
    config = {
        "run_dir": "x",
        "model": {"path": "m"},
        "data": {"name": "countdown"},
        "train": {"rollouts": 1},
        "rewards": {"countdown": 1.0, "format": 0.1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    sample = {
        "problem": "p",
        "question": "Make 20.",
        "answer": "(7-3)*5",
        "meta": {"numbers": [3, 5, 7], "target": 20},
        "tokens": 9,
        "finish_reason": "stop",
        "reward": 1.1,
    }
    rows = [
        {
            **sample,
            "completion": "<think>a</think><answer>(7-3)*5</answer>",
            "parts": {"countdown": 1.0, "format": 1.0},
        },
        {
            **sample,
            "completion": "<think>a</think><answer>7*3</answer> so",
            "parts": {"countdown": 0.0, "format": 1.0},
        },
        {
            **sample,
            "completion": "<think>a</think><answer>7</answer>",
            "parts": {"countdown": 1.0, "format": 1.0},
        },
    ]
    (tmp_path / "samples").mkdir()
    write_rows(tmp_path / "samples" / "step-000001.jsonl", rows)
    return tmp_path


def test_the_samples_of_an_old_run_are_graded_with_the_current_rules(countdown_run, capsys):
    graded_path = countdown_run / "out.jsonl"
    assert main(["grade", str(countdown_run), "--output", str(graded_path)]) == 0
    output = capsys.readouterr().out
    assert "3 completions of 1 groups" in output
    assert "countdown    0.6667 then, 0.3333 now, 1 changed" in output
    assert "format       1.0000 then, 0.6667 now, 1 changed" in output
    assert "step-000001 p: 1.0 -> 0.0 (uses [7])" in output
    graded = read_rows(graded_path)
    # reward = countdown + 0.1 * format: 1 + 0.1 * 1, 0 + 0.1 * 0, 0 + 0.1 * 1
    assert [row["reward"] for row in graded] == [1.1, 0.0, 0.1]
    assert graded[2]["parts_then"] == {"countdown": 1.0, "format": 1.0}

    # The samples of an evaluation are graded in the same way.
    config = yaml.safe_load((countdown_run / "config.yaml").read_text())
    evaluation = {**config, "sets": {}}
    (countdown_run / "config.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["grade", str(countdown_run)]) == 0
    assert "3 completions of 1 groups" in capsys.readouterr().out


def test_a_new_reward_scores_the_samples_of_an_earlier_run(countdown_run, capsys):
    (countdown_run / "mine.py").write_text(
        "def words(completion, problem): return len(completion.text.split())"
    )
    reward = f"{countdown_run}/mine.py:words"
    arguments = ["grade", str(countdown_run), f'rewards={{countdown: 1.0, "{reward}": 1.0}}']
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "countdown    0.6667 then, 0.3333 now, 1 changed" in output
    assert re.search(rf"{re.escape(reward)} \d+\.\d+ now, not a reward of the run", output)


def test_overrides_of_a_file_are_an_error(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    assert main(["grade", path, "rewards={accuracy: 1.0}"]) == 2
    assert "a.jsonl is not a run" in capsys.readouterr().err
