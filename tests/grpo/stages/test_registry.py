"""Kinds of stages: each answers for itself, and a new one is a file and a line in the registry."""

import sys
from types import SimpleNamespace

import pytest
import yaml
from pydantic import Field

from grpo import cli
from grpo import config as configs
from grpo.config import RunConfig, Section
from grpo.stages.registry import find_stage, stage_of
from grpo.stages.resume import shared_values
from grpo.stages.stage import (
    Check,
    DiskNeeds,
    MemoryNeeds,
    Part,
    ProblemNeeds,
    StageNeeds,
)

MODEL = {"path": "tiny-qwen2", "dtype": "float32"}
TREE = {
    "run_dir": "runs/x",
    "model": MODEL,
    "data": {"name": "arithmetic"},
    "prompt": {"template": "plain", "max_tokens": 48},
}
SAMPLED = {"sampling": {"max_tokens": 16}}
TRAIN = {"train": {"rollouts": 3, "problems": 4, "group_size": 8}, "probe": {"tokens": 4}}
TAUGHT = {"model": MODEL | {"teacher": "tiny-llama"}}
SOFT = {"way": "soft", "soft": {"updates": 5, "batch_size": 2, "max_tokens": 64}}


def needs_of(*sections):
    tree = dict(TREE)
    for section in sections:
        tree |= section
    stage = stage_of(tree)
    return stage.needs(configs.parse(tree, kind=stage.config_class))


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        (("train",), "train"),
        (("sft",), "sft"),
        (("collect",), "collect"),
        (("way", "collect", "sft"), "distill"),
        (("quantize", "eval"), "quantize"),
        (("sets", "train"), "eval"),
        (("endpoint",), "eval"),
        (("stages",), "pipeline"),
    ],
)
def test_a_config_belongs_to_the_stage_whose_sections_it_has(keys, command):
    assert stage_of({key: {} for key in keys}).command == command


def test_only_train_has_a_learner_and_an_engine_that_exchange_weights():
    assert needs_of(SAMPLED, TRAIN).memory == MemoryNeeds(
        learner=True, engine=True, max_sequences=4 * 8
    )
    assert needs_of(SAMPLED, TRAIN).memory.syncs_weights
    assert needs_of({"sft": {"updates": 2}}).memory == MemoryNeeds(learner=True)
    collect = {"collect": {"problems": 100, "chunk": 6, "samples": 3}}
    assert needs_of(SAMPLED, collect).memory == MemoryNeeds(engine=True, max_sequences=6 * 3)
    assert needs_of(SAMPLED, {"quantize": {}}).memory == MemoryNeeds()
    assert needs_of(SAMPLED, {"quantize": {}, "eval": {}}).memory == MemoryNeeds(engine=True)


def test_a_teacher_on_an_engine_is_closed_before_the_student_learns():
    assert needs_of(TAUGHT, SOFT).memory == MemoryNeeds(learner=True, reference=True)
    top = {"soft": SOFT["soft"] | {"teacher_topk": 4}}
    assert needs_of(TAUGHT, SOFT, top).memory == MemoryNeeds(learner=True, reference=False)


def test_what_is_written_is_counted():
    keep = {"checkpoint": {"keep_last": 3, "keep_best": "reward/mean"}}
    assert needs_of(SAMPLED, TRAIN, keep).disk == DiskNeeds(
        checkpoints=3 + 1 + 1, models=1, sampled_tokens=3 * 4 * 8 * 16
    )
    schemes = {"quantize": {"schemes": ["int8", "int8_tensor", "int4"]}}
    assert needs_of(SAMPLED, schemes).disk == DiskNeeds(models=3)
    sets = {"sets": {"a": {"name": "arithmetic"}, "b": {"name": "arithmetic"}}}
    evaluated = {"eval": {"problems": 7, "samples": 2, "temperature": 1.0}}
    assert needs_of(SAMPLED, sets, evaluated).disk == DiskNeeds(sampled_tokens=7 * 2 * 2 * 16)


def test_distill_consists_of_the_stages_of_its_way():
    tree = TREE | TAUGHT | SAMPLED | {"collect": {"problems": 4}, "sft": {"updates": 1}}
    stage = find_stage("distill")
    config = configs.parse(tree | {"way": "sequence"}, kind=stage.config_class)
    sampled, learned = stage.parts(config)
    assert (sampled.stage.command, sampled.config.model.path) == ("collect", "tiny-llama")
    assert (learned.stage.command, learned.config.model.path) == ("sft", "tiny-qwen2")
    assert learned.traces_to_come and not sampled.traces_to_come
    on_policy = TREE | TAUGHT | SAMPLED | {"way": "on_policy", "train": TRAIN["train"]}
    (part,) = stage.parts(configs.parse(on_policy, kind=stage.config_class))
    assert part.stage.command == "train"


class Count(Section):
    to: int = Field(ge=1)


class CountConfig(RunConfig):
    count: Count


class CountStage:
    """A kind that is in no file of the package."""

    command = "count"
    config_class = CountConfig
    sections = ("count",)

    def __init__(self):
        self.counted = []

    def run(self, config, *, resume):
        self.counted += range(config.count.to)

    def arithmetic(self, config):
        return f"count       to {config.count.to}"

    def needs(self, config):
        return StageNeeds(
            config=config,
            max_sequence_tokens=64,
            problems=ProblemNeeds(training=config.data, num_training=config.count.to),
        )

    def parts(self, config):
        return [Part(stage=self, config=config)]

    def preview(self, config):
        return ["nothing is loaded"]

    def checks(self, config, problems, prompts):
        yield Check("warn", "problems", f"{len(problems)} to count", "count them")


def test_a_new_kind_has_its_command_its_dry_run_and_its_doctor(tiny, tmp_path, monkeypatch, capsys):
    from grpo.stages import registry

    stage = CountStage()
    monkeypatch.setitem(registry.SUMMARIES, "count", "count")
    monkeypatch.setitem(sys.modules, "grpo.stages.count", SimpleNamespace(STAGE=stage))
    tree = TREE | {"model": MODEL | {"path": str(tiny())}, "count": {"to": 3}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree | {"run_dir": str(tmp_path / "run")}))
    assert cli.main(["count", str(tmp_path / "c.yaml")]) == 0 and stage.counted == [0, 1, 2]
    assert cli.main(["count", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "count       to 3\nnothing is loaded\nprompt (" in out
    assert cli.main(["doctor", str(tmp_path / "c.yaml")]) == 0
    out = capsys.readouterr().out
    assert "warn  problems       8 to count" in out and "-> count them" in out


def test_ranks_compare_all_keys_but_those_of_a_machine():
    config = configs.parse(TREE | SAMPLED | TRAIN)
    values = shared_values(config)
    assert values["train.rollouts"] == "3" and values["learner.lr"] == "1e-06"
    assert (
        "eval.every" in values
        and "engine.timeout_s" in values
        and "rewards.format.weight" in values
    )
    assert not {"run_dir", "model.path", "data.path", "learner.threads"} & values.keys()
