"""Loading problems: the rewards of a run read them, and can refuse them."""

import json

import pytest

from grpo.config import DataSettings
from grpo.stages.problems import load_problems
from grpo.types import UserError


def data_with(tmp_path, rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(name="jsonl", path=str(path), options={"test_fraction": 0})


def test_a_reward_reads_the_problems_when_they_are_loaded(tmp_path):
    row = {"problem": "?", "answer": "3+5", "numbers": ["3", "5"], "target": "8"}
    data = data_with(tmp_path, [row])
    (unread,) = load_problems(data, "train", 0)["jsonl"]
    assert unread.meta["numbers"] == ["3", "5"]
    (read,) = load_problems(data, "train", 0, ["format", "countdown"])["jsonl"]
    assert read.meta == {"numbers": [3, 5], "target": 8}


def test_problems_that_a_reward_refuses_are_named(tmp_path):
    rows = [{"problem": "a", "answer": "-", "id": "right", "test_list": ["assert f(1) == 1"]}]
    for number in range(7):
        test = f"import torch\nassert f({number}) == 1"
        rows.append(
            {"problem": f"p{number}", "answer": "-", "id": f"t{number}", "test_list": [test]}
        )
    data = data_with(tmp_path, rows)
    assert len(load_problems(data, "train", 0, ["accuracy"])["jsonl"]) == 8
    message = (
        r"data.jsonl: the reward code cannot judge 7 of 8 problems: t0 \(the tests import torch, "
        r"which is not in the standard library \(line 1\)\); t1 .*; t4 .*\. Correct or remove them"
    )
    with pytest.raises(UserError, match=message) as error:
        load_problems(data, "train", 0, ["accuracy", "code"])
    assert "t5" not in str(error.value)


def test_generated_problems_are_not_read():
    data = DataSettings(name="countdown")
    problems = load_problems(data, "train", 0, ["countdown"])["countdown"]
    assert len(problems) == 100_000
