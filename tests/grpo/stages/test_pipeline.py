"""`grpo pipeline`: the plan of a chain of stages, config errors, and the table of accuracies.

Complete chains run in tests/slow/test_stages.py and tests/slow/test_chain.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from grpo import config as configs
from grpo.config import PipelineConfig
from grpo.config.reading import apply_overrides
from grpo.metrics import cpu
from grpo.run.directory import RunDirectory
from grpo.stages import pipeline as pipeline_module
from grpo.stages.pipeline import (
    STAGE,
    _format_overrides,
    _run_unfinished,
    checked_plan,
    markdown_table,
    plan,
)
from grpo.types import UserError


def pipeline_config(**sections):
    return configs.parse({"run_dir": "runs/x", "seed": 3, **sections}, kind=PipelineConfig)


def planned_commands(stages):
    """Returns the commands by name. The pipeline evaluates its models on one set, `s`."""
    config = pipeline_config(stages=stages, eval={"s": {"config": "configs/tiny.yaml"}})
    return {command.name: command for command in checked_plan(config)}


def test_plan_passes_models_and_traces_on_and_evaluates_every_model():
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
    commands = planned_commands(stages)
    expected_names = ["start-s", "cold", "cold-s", "rl", "rl-s", "traces", "again", "again-s"]
    assert list(commands) == expected_names
    assert commands["rl"].arguments == [
        "train",
        "configs/tiny.yaml",
        "run_dir=runs/x/rl",
        "seed=3",
        "model.path=runs/x/cold/final",
        "model.warm_start=",
        "train.rollouts=2",
    ]
    assert "data={name: traces, path: runs/x/traces}" in commands["again"].overrides
    assert commands["start-s"].overrides[2] == "model.path=tiny-qwen2"
    assert commands["rl-s"].overrides[2] == "model.path=runs/x/rl/final"


def test_distill_stage_uses_the_teacher_and_the_traces_of_earlier_stages(tmp_path):
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
    commands = planned_commands(stages)
    assert "model.teacher=runs/x/rl/final" in commands["small"].overrides
    assert "model.path=runs/x/small/final" in commands["small-s"].overrides


def test_the_teachers_of_a_stage_are_earlier_stages(tmp_path):
    (tmp_path / "d.yaml").write_text(
        "model: {path: tiny-qwen2}\nprompt: {template: plain}\n"
        "data: {mixture: {two: {name: arithmetic}, three: {name: arithmetic}}}\n"
        "algorithm: {preset: on_policy_distill}\ntrain: {rollouts: 1}\n"
    )
    stages = {
        "rl_two": {"command": "train", "config": "configs/tiny.yaml"},
        "rl_three": {"command": "train", "config": "configs/tiny.yaml"},
        "both": {
            "command": "train",
            "config": str(tmp_path / "d.yaml"),
            "teachers": {"two": "rl_two", "three": "rl_three"},
        },
    }
    overrides = planned_commands(stages)["both"].overrides
    assert "model.teachers.two=runs/x/rl_two/final" in overrides
    assert "model.teachers.three=runs/x/rl_three/final" in overrides


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
            {
                "a": {"command": "train", "config": "configs/tiny.yaml", "teachers": {"x": "rl"}},
            },
            "stages.a.teachers.x=rl: not an earlier stage",
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
def test_invalid_stage_raises_before_the_first_stage_starts(stages, message):
    with pytest.raises(UserError, match=message):
        checked_plan(pipeline_config(stages=stages))


@pytest.mark.parametrize("way", ["on_policy", "soft", "sequence"])
def test_a_finished_distillation_is_not_repeated(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    Path("d.yaml").write_text(
        "model: {path: tiny-qwen2, teacher: tiny-qwen2}\ndata: {name: arithmetic}\n"
        "soft: {updates: 1}\ntrain: {rollouts: 1}\ncollect: {problems: 1}\nsft: {updates: 1}\n"
        "prompt: {template: plain}\n"
    )
    [command] = checked_plan(
        pipeline_config(
            run_dir="run",
            stages={"d": {"command": "distill", "config": "d.yaml", "set": {"way": way}}},
        )
    )
    run = RunDirectory("run", resume=False)
    # The files of a finished stage. Way on_policy runs `grpo train` in this directory.
    config = command.load_config()
    if way == "on_policy":
        config = config.stage_configs()[""]
    folder = Path("run/d")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.dump(config))
    (folder / "manifest.json").write_text('{"status": "finished"}')
    _run_unfinished(command, run, num_ranks=1)
    changed = replace(command, overrides=(*command.overrides, "seed=4"))
    with pytest.raises(UserError, match="seed was 3, is 4"):
        _run_unfinished(changed, run, num_ranks=1)


def test_values_of_set_keep_their_types_as_overrides():
    values = {
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
    assert apply_overrides({}, _format_overrides(values)) == values


def test_markdown_table_has_one_row_per_model():
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


def test_plan_without_evaluation_sets_starts_with_the_first_stage():
    stages = {"a": {"command": "sft", "config": "configs/tiny_sft.yaml"}}
    first_command = next(plan(pipeline_config(stages=stages)))
    assert first_command.name == "a"


def test_int4_models_are_not_evaluated_where_vllm_has_no_kernel(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(cpu, "int4_obstacle", lambda: "no kernel")
    monkeypatch.setattr(
        pipeline_module, "_run_unfinished", lambda command, *_, **__: commands.append(command.name)
    )
    stages = {
        "small": {
            "command": "quantize",
            "config": "configs/tiny_quantize.yaml",
            "set": {"eval": None, "model.path": "tiny-qwen2"},
        }
    }
    config = pipeline_config(
        run_dir=str(tmp_path / "run"), stages=stages, eval={"s": {"config": "configs/tiny.yaml"}}
    )
    pipeline_module.pipeline(config, resume=False)
    assert commands == ["start-s", "small", "small-int8-s", "small-int8_tensor-s"]
    assert "small-int4-s: not evaluated: no kernel" in capsys.readouterr().out


def context_lines(stages, evaluation):
    config = pipeline_config(stages=stages, eval={"s": evaluation})
    return STAGE.dry_run_lines(config)


COLD_START = {"command": "sft", "config": "configs/tiny_sft.yaml"}
LONG_RL = {
    "command": "train",
    "config": "configs/tiny.yaml",
    "model": "cold",
    "set": {"sampling.max_tokens": 3000, "learner.micro_batch_tokens": 8192},
}


def test_sequences_that_are_longer_than_the_context_of_a_model_are_an_error_of_the_dry_run():
    """A tiny model has a context of 2,048 tokens."""
    evaluation = {"config": "configs/tiny.yaml", "set": {"sampling.max_tokens": 2040}}
    with pytest.raises(UserError, match=r"stage start-s: .* 2,056 tokens, .* tiny-qwen2 is 2,048"):
        context_lines({"cold": COLD_START}, evaluation)
    evaluation["start"] = False
    with pytest.raises(UserError, match=r"stage cold-s: .* context of runs/x/cold/final is 2,048"):
        context_lines({"cold": COLD_START}, evaluation)


def test_a_model_keeps_the_longer_context_that_an_earlier_stage_has_given_it():
    evaluation = {"config": "configs/tiny.yaml", "start": False}
    with pytest.raises(UserError, match=r"stage rl: sequences of up to 3,016 tokens"):
        context_lines({"cold": COLD_START, "rl": LONG_RL}, evaluation)
    extended = {**COLD_START, "set": {"model.rope": {"type": "yarn", "factor": 2.0}}}
    assert context_lines({"cold": extended, "rl": LONG_RL}, evaluation) == []


def test_the_lengths_of_a_model_that_cannot_be_downloaded_are_reported_as_unchecked():
    config = configs.load("configs/r1_7b.yaml", kind=PipelineConfig)
    lines = STAGE.dry_run_lines(config)
    assert any(line.startswith("lengths of cold_start: not checked: ") for line in lines)
