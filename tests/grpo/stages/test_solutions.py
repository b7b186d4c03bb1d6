"""Supervised stages: which problems are dropped, how they are counted, and when it is too much."""

import json

import pytest
from stage_configs import sft_config

from grpo import config as configs
from grpo.config import DataSettings
from grpo.data.common.mixture import Mixture
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.stages.problems import load_problems
from grpo.stages.sft import sft
from grpo.stages.solutions import TrainingLimits, check_solutions, take_trainable
from grpo.types import Problem, UserError

MAX_TOKENS = 60


def problem(number, length=5, solution=True):
    text = f"<think>{'x' * length}</think> y" if solution else None
    return Problem(id=f"p{number}", question="q", answer="", source="s", solution=text)


# 40 problems: p3 has no solution, p7 is too long.
PROBLEMS = [problem(i, length=80 if i == 7 else 5, solution=i != 3) for i in range(40)]


@pytest.fixture
def prompts():
    settings = configs.PromptSettings(template="plain")
    return Prompts(settings, models.character_tokenizer())


def take(prompts, count, problems=PROBLEMS, **data):
    """Returns the problems and the reports of `take_trainable`."""
    mixture = Mixture({"s": problems}, {"s": 1.0}, seed=0)
    limits = TrainingLimits("sft", MAX_TOKENS, DataSettings(name="traces", **data))
    lines = []
    return take_trainable(mixture, count, prompts, limits, lines.append), lines


def test_without_drop_the_first_problems_are_returned(prompts):
    problems, lines = take(prompts, 40)
    assert {each.id for each in problems} == {each.id for each in PROBLEMS}
    assert lines == []


def test_problems_without_solution_and_overlong_ones_are_replaced_by_the_next_and_reported(prompts):
    problems, (line,) = take(prompts, 76, malformed="drop", overlong="drop")
    ids = [each.id for each in problems]
    assert "p3" not in ids
    assert "p7" not in ids
    assert sorted(ids) == sorted(2 * [f"p{i}" for i in range(40) if i not in (3, 7)])
    assert line.startswith("sft: dropped 2 of 40 problems, for example: ")
    # A resumed run draws the same problems.
    assert take(prompts, 76, malformed="drop", overlong="drop")[0] == problems


def test_each_policy_drops_only_its_own_problems(prompts):
    problems, _ = take(prompts, 78, malformed="drop")
    assert {each.id for each in problems} >= {"p7"}
    problems, (line,) = take(prompts, 78, overlong="drop")
    assert {each.id for each in problems} >= {"p3"}
    assert "p7 (87 tokens, more than 60)" in line


def test_more_than_the_allowed_share_is_an_error(prompts):
    message = r"sft: dropped 2 of 40 .* more than data\.max_dropped=0\.008"
    with pytest.raises(UserError, match=message):  # 2 > 0.008 * 200
        take(prompts, 76, malformed="drop", overlong="drop", max_dropped=0.008)
    many = [problem(i, length=80 if i % 10 == 0 else 5) for i in range(400)]
    with pytest.raises(UserError, match=r"more than data\.max_dropped=0\.05"):
        take(prompts, 360, many, overlong="drop")
    too_long = [problem(i, length=80) for i in range(4)]
    with pytest.raises(UserError, match="almost no problem can be trained on"):
        take(prompts, 4, too_long, overlong="drop")


def test_the_doctor_accepts_what_the_config_drops(prompts):
    def level(**data):
        limits = TrainingLimits("sft", MAX_TOKENS, DataSettings(name="traces", **data))
        return next(iter(check_solutions(limits, PROBLEMS, prompts))).level

    assert level() == "fail"
    assert level(malformed="drop") == "fail"
    assert level(malformed="drop", overlong="drop") == "ok"
    assert level(malformed="drop", overlong="drop", max_dropped=0.008) == "fail"


def write_traces(path, num_malformed):
    rows = [{"problem": f"{i}?", "solution": f"<think>{i}</think> {i}"} for i in range(40)]
    for i in range(num_malformed):
        rows[3 * i] = {"problem": "?", "solution": "no thoughts"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_malformed_rows_of_traces_are_dropped_counted_and_limited(tmp_path):
    lines = []
    path = write_traces(tmp_path / "traces.jsonl", num_malformed=2)
    data = DataSettings(name="traces", path=path, malformed="drop")
    problems = load_problems(data, "train", 0, say=lines.append)["traces"]
    assert len(problems) == 38
    (line,) = lines
    assert line.startswith("data.traces: dropped 2 of 40 problems, for example: ")
    assert "line 1: no thoughts" in line

    path = write_traces(tmp_path / "traces.jsonl", num_malformed=11)
    with pytest.raises(UserError, match=r"dropped 11 of 40 .* more than data\.max_dropped=0\.05"):
        load_problems(data, "train", 0)  # 11 > 0.05 * 200
    with pytest.raises(UserError, match="line 1: no thoughts"):
        load_problems(DataSettings(name="traces", path=path), "train", 0)


@pytest.mark.parametrize(
    "row", ['{"messages": 5}', "[1]", '{"problem": "\\ud800", "solution": "<think>a</think> b"}']
)
def test_every_kind_of_malformed_row_is_dropped(tmp_path, row):
    path = tmp_path / "traces.jsonl"
    path.write_text(row + '\n{"problem": "1?", "solution": "<think>a</think> b"}\n')
    data = DataSettings(name="traces", path=str(path), malformed="drop")
    assert len(load_problems(data, "train", 0)["traces"]) == 1


def test_a_solution_that_is_no_text_is_malformed(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"problem": "1?", "answer": "1", "solution": 42}\n')
    data = DataSettings(name="jsonl", path=str(path))
    with pytest.raises(UserError, match="line 1: field 'solution' is a int, expected text"):
        load_problems(data, "train", 0)


def test_a_data_set_that_cannot_drop_rows_is_an_error():
    data = DataSettings(name="arithmetic", malformed="drop")
    with pytest.raises(UserError, match="the data set arithmetic cannot drop rows"):
        load_problems(data, "train", 0)


def test_a_run_trains_on_what_is_left(tiny, tmp_path, capfd):
    path = write_traces(tmp_path / "traces.jsonl", num_malformed=2)
    config = sft_config(
        tmp_path / "run",
        tiny(),
        data={"name": "traces", "path": path, "options": {}, "malformed": "drop"},
        logging={"progress": "line"},
    )
    sft(config, resume=False)
    assert "data.traces: dropped 2 of 40 problems" in capfd.readouterr().err
    assert (tmp_path / "run" / "final" / "README.md").exists()
