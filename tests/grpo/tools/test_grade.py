"""`grpo grade`: a file's verdicts, one case in detail, an old run under today's rules."""

import json

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


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def test_a_file_of_answers(tmp_path, capsys):
    assert (
        main(["grade", write(tmp_path / "a.jsonl", ROWS), "--output", str(tmp_path / "out.jsonl")])
        == 0
    )
    told = capsys.readouterr().out
    assert "3 answers: 2 wrong, 1 correct" in told and "2  wrong: another number" in told
    assert (
        "compared with 3 labels: 66.7% agree, 0 false positives, 1 false negatives, 0 undecided"
        in told
    )
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in graded] == ["correct", "wrong", "wrong"] and graded[1][
        "id"
    ] == "kept"


def test_one_line_in_detail(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert main(["grade", path, "--explain", "2"]) == 0
    told = capsys.readouterr().out
    assert "in the completion" in told and "'3'" in told and "wrong: another number" in told
    assert main(["grade", path, "--explain", "9"]) == 2
    assert "has no line 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: needs text in prediction or completion"),
        ('{"gold": "1"}', "line 2: needs text in prediction or completion"),
        ('{"prediction": "1", "gold": 1}', "line 2: needs text in gold or answer"),
        ("", "line 2: not JSON"),
    ],
)
def test_a_broken_line_is_named_and_ends_with_2(tmp_path, capsys, line, message):
    assert main(["grade", write(tmp_path / "a.jsonl", [ROWS[0], line, ROWS[1]])]) == 2
    assert message in capsys.readouterr().err


def test_what_is_not_there_is_told(tmp_path, capsys):
    assert main(["grade", str(tmp_path / "nothing.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["grade", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_an_old_run_under_todays_rules(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    config = {
        "run_dir": "x",
        "model": {"path": "m"},
        "data": {"name": "countdown"},
        "train": {"rollouts": 1},
    }
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(config | {"rewards": {"countdown": 1.0, "format": 0.1}})
    )
    texts = [
        "<think>a</think><answer>(7-3)*5</answer>",
        "<think>a</think><answer>7*3</answer> so",
        "<think>a</think><answer>7</answer>",
    ]
    common = {
        "problem": "p",
        "question": "Make 20.",
        "answer": "(7-3)*5",
        "meta": {"numbers": [3, 5, 7], "target": 20},
        "tokens": 9,
    }
    then = [
        {"countdown": 1.0, "format": 1.0},
        {"countdown": 0.0, "format": 1.0},
        {"countdown": 1.0, "format": 1.0},
    ]
    rows = [
        common | {"completion": text, "finish_reason": "stop", "reward": 1.1, "parts": parts}
        for text, parts in zip(texts, then, strict=True)
    ]
    write(tmp_path / "samples" / "step-000001.jsonl", rows)
    assert main(["grade", str(tmp_path), "--output", str(tmp_path / "out.jsonl")]) == 0
    told = capsys.readouterr().out
    assert "3 completions of 1 groups" in told
    assert (
        "countdown    0.6667 then, 0.3333 now, 1 changed" in told
        and "format       1.0000 then, 0.6667 now, 1 changed" in told
    )
    assert "step-000001 p: 1.0 -> 0.0 (uses [7])" in told
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in graded] == [1.1, 0.0, 0.1] and graded[2]["parts_then"] == then[
        2
    ]
    evaluation = {**config, "sets": {}, "rewards": {"countdown": 1.0, "format": 0.1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["grade", str(tmp_path)]) == 0
    assert "3 completions of 1 groups" in capsys.readouterr().out
