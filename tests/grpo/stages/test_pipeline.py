"""The chain of stages.

Its plan, its mistakes before anything starts, and a whole chain that is killed in a stage and goes
on.
"""

import pytest

from grpo import config as configs
from grpo.config import PipelineConfig
from grpo.config.reading import apply_overrides
from grpo.stages.pipeline import _format_overrides, checked_plan, markdown_table, plan
from grpo.types import UserError


def chain(**sections):
    return configs.parse({"run_dir": "runs/x", "seed": 3, **sections}, kind=PipelineConfig)


def checked_steps(stages):
    """Returns the planned commands by name, with one evaluation set."""
    config = chain(stages=stages, eval={"s": {"config": "configs/tiny.yaml"}})
    return {command.name: command for command in checked_plan(config)}


def test_a_plan_hands_on_models_and_traces_and_evaluates_every_model():
    stages = {
        "cold": {"command": "sft", "config": "configs/tiny_sft.yaml"},
        "rl": {
            "command": "train",
            "config": "configs/tiny.yaml",
            "model": "cold",
            "set": {"train.rollouts": 2},
        },
        "traces": {"command": "collect", "config": "configs/tiny_collect.yaml", "model": "rl"},
        "again": {"command": "sft", "config": "configs/tiny_sft.yaml", "traces": "traces"},
    }
    steps = checked_steps(stages)
    assert list(steps) == ["start-s", "cold", "cold-s", "rl", "rl-s", "traces", "again", "again-s"]
    assert steps["rl"].arguments == [
        "train",
        "configs/tiny.yaml",
        "run_dir=runs/x/rl",
        "seed=3",
        "model.path=runs/x/cold/final",
        "model.warm_start=",
        "train.rollouts=2",
    ]
    assert "data={name: traces, path: runs/x/traces}" in steps["again"].overrides
    assert steps["start-s"].overrides[2] == "model.path=tiny-qwen2"
    assert steps["rl-s"].overrides[2] == "model.path=runs/x/rl/final"


def test_a_distill_stage_may_get_its_teacher_and_its_data_from_the_chain(tmp_path):
    (tmp_path / "d.yaml").write_text(
        "way: soft\nmodel: {path: tiny-qwen2}\nsoft: {updates: 1}\nprompt: {template: plain}\n"
    )
    stages = {
        "rl": {"command": "train", "config": "configs/tiny.yaml"},
        "traces": {"command": "collect", "config": "configs/tiny_collect.yaml", "model": "rl"},
        "small": {
            "command": "distill",
            "config": str(tmp_path / "d.yaml"),
            "teacher": "rl",
            "traces": "traces",
        },
    }
    steps = checked_steps(stages)
    assert "model.teacher=runs/x/rl/final" in steps["small"].overrides
    assert "model.path=runs/x/small/final" in steps["small-s"].overrides


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"a-b": {"command": "sft", "config": "configs/tiny_sft.yaml"}},
            "stages.a-b: invalid name. The name becomes a folder",
        ),
        (
            {
                "a": {"command": "train", "config": "configs/tiny.yaml"},
                "b": {"command": "sft", "config": "configs/tiny_sft.yaml", "teacher": "a"},
            },
            "stages.b.teacher: `grpo sft` has no teacher",
        ),
        (
            {"a": {"command": "train", "config": "configs/tiny.yaml", "model": "b"}},
            r"stages.a.model=b: not an earlier stage. Available: none",
        ),
        (
            {
                "a": {"command": "sft", "config": "configs/tiny_sft.yaml"},
                "b": {"command": "sft", "config": "configs/tiny_sft.yaml", "traces": "a"},
            },
            "stages.b.traces=a: that stage is a `grpo sft`",
        ),
        (
            {"a": {"command": "sft", "config": "configs/tiny_sft.yaml", "set": {"sft.update": 1}}},
            "stage a: .*sft.update",
        ),
        (
            {"a": {"command": "sft", "config": "configs/none.yaml"}},
            "configs/none.yaml: config file not found",
        ),
    ],
)
def test_a_mistake_in_any_stage_is_told_before_the_first_one_starts(stages, message):
    with pytest.raises(UserError, match=message):
        checked_plan(chain(stages=stages))


def test_what_a_stage_sets_arrives_as_it_was_written():
    given = {
        "a": "Think: then answer",
        "b": "off",
        "c": "1",
        "d": 1e-5,
        "e": True,
        "f": [1, "x"],
        "g": {"h": "no"},
        "i": None,
        "j": "a\nb",
    }
    assert apply_overrides({}, _format_overrides(given)) == given


def test_the_table_has_a_row_a_model():
    rows = [
        {"stage": "start", "a": {"accuracy": 0.5}, "b": {"accuracy": 0.25}},
        {"stage": "rl", "a": {"accuracy": 1.0}},
    ]
    assert markdown_table(rows).splitlines() == [
        "| stage | a | b |",
        "|---|---|---|",
        "| start | 50.0% | 25.0% |",
        "| rl | 100.0% |  |",
    ]
    stages = {"a": {"command": "sft", "config": "configs/tiny_sft.yaml"}}
    assert next(plan(chain(stages=stages))).name == "a"
