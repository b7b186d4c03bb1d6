"""Kinds of stages: the registry, their needs and parts, and a new kind that the tests define."""

import sys
from types import SimpleNamespace

import pytest
import yaml
from pydantic import Field

from grpo import cli
from grpo import config as configs
from grpo.config import EvalConfig, RunConfig, Section
from grpo.stages.registry import find_stage, stage_for_config
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
WITH_TEACHER = {"model": MODEL | {"teacher": "tiny-llama"}}
SOFT = {"way": "soft", "soft": {"updates": 5, "batch_size": 2, "max_tokens": 64}}


def stage_needs(*sections):
    """Returns the needs of the stage that TREE, updated with the sections, identifies."""
    tree = dict(TREE)
    for section in sections:
        tree.update(section)
    stage = stage_for_config(tree)
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
def test_sections_of_a_config_identify_its_stage(keys, command):
    assert stage_for_config({key: {} for key in keys}).command == command


def test_the_config_in_the_run_directory_of_an_evaluation_identifies_its_stage():
    config = configs.parse({**TREE, "sets": {"a": {"name": "math"}}}, kind=EvalConfig)
    tree = yaml.safe_load(configs.dump(config))
    assert tree["sft"] is None
    assert stage_for_config(tree).command == "eval"


def test_only_train_syncs_weights_between_a_learner_and_an_engine():
    train = stage_needs(SAMPLED, TRAIN).memory
    assert train == MemoryNeeds(learner=True, engine=True, max_sequences=4 * 8)
    assert train.syncs_weights

    sft = {"sft": {"updates": 2}}
    assert stage_needs(sft).memory == MemoryNeeds(learner=True)

    collect = {"collect": {"problems": 100, "chunk": 6, "samples": 3}}
    assert stage_needs(SAMPLED, collect).memory == MemoryNeeds(engine=True, max_sequences=6 * 3)

    assert stage_needs(SAMPLED, {"quantize": {}}).memory == MemoryNeeds()
    quantize_and_evaluate = {"quantize": {}, "eval": {}}
    assert stage_needs(SAMPLED, quantize_and_evaluate).memory == MemoryNeeds(engine=True)


def test_soft_distillation_with_stored_teacher_logprobs_has_no_teacher_in_the_learner():
    full_distribution = stage_needs(WITH_TEACHER, SOFT)
    assert full_distribution.memory == MemoryNeeds(learner=True, reference=True)
    # An engine computes the top-k logprobs. It is closed before the student is trained.
    top_k = {"soft": SOFT["soft"] | {"teacher_topk": 4}}
    stored_logprobs = stage_needs(WITH_TEACHER, SOFT, top_k)
    assert stored_logprobs.memory == MemoryNeeds(learner=True, reference=False)


def test_disk_needs_count_checkpoints_models_and_samples():
    checkpoint = {"checkpoint": {"keep_last": 3, "keep_best": "reward/mean"}}
    # 3 rollouts x 4 problems x 8 completions of up to 16 tokens. Three checkpoints are kept, one
    # more is kept as the best, and one more is on disk while it is written.
    assert stage_needs(SAMPLED, TRAIN, checkpoint).disk == DiskNeeds(
        checkpoints=3 + 1 + 1, models=1, sampled_tokens=3 * 4 * 8 * 16
    )

    schemes = {"quantize": {"schemes": ["int8", "int8_tensor", "int4"]}}
    assert stage_needs(SAMPLED, schemes).disk == DiskNeeds(models=3)

    # 2 sets x 7 problems x 3 completions (2 samples, 1 greedy) of up to 16 tokens.
    sets = {"sets": {"a": {"name": "arithmetic"}, "b": {"name": "arithmetic"}}}
    evaluation = {"eval": {"problems": 7, "samples": 2, "temperature": 1.0}}
    disk = stage_needs(SAMPLED, sets, evaluation).disk
    assert disk == DiskNeeds(sampled_tokens=2 * 7 * 3 * 16)


def test_parts_of_distill_depend_on_its_method():
    stage = find_stage("distill")
    base = TREE | WITH_TEACHER | SAMPLED

    sequence = {"way": "sequence", "collect": {"problems": 4}, "sft": {"updates": 1}}
    config = configs.parse(base | sequence, kind=stage.config_class)
    collect_part, sft_part = stage.parts(config)
    assert collect_part.stage.command == "collect"
    assert collect_part.config.model.path == "tiny-llama"
    assert not collect_part.traces_pending
    assert sft_part.stage.command == "sft"
    assert sft_part.config.model.path == "tiny-qwen2"
    assert sft_part.traces_pending

    on_policy = {"way": "on_policy", "train": TRAIN["train"]}
    config = configs.parse(base | on_policy, kind=stage.config_class)
    (train_part,) = stage.parts(config)
    assert train_part.stage.command == "train"


class Count(Section):
    to: int = Field(ge=1)


class CountConfig(RunConfig):
    count: Count


class CountStage:
    """A kind of stage that the package does not contain."""

    command = "count"
    config_class = CountConfig
    sections = ("count",)

    def __init__(self):
        self.counted = []

    def run(self, config, *, resume):
        self.counted += range(config.count.to)

    def batch_arithmetic(self, config):
        return f"count       to {config.count.to}"

    def needs(self, config):
        return StageNeeds(
            config=config,
            max_sequence_tokens=64,
            problems=ProblemNeeds(training=config.data, num_training=config.count.to),
        )

    def parts(self, config):
        return [Part(stage=self, config=config)]

    def dry_run_lines(self, config):
        return ["nothing is loaded"]

    def checks(self, config, problems, prompts):
        yield Check("warn", "problems", f"{len(problems)} to count", "count them")


def test_cli_dry_run_and_doctor_work_with_a_new_kind(tiny, tmp_path, monkeypatch, capsys):
    from grpo.stages import registry

    stage = CountStage()
    monkeypatch.setitem(registry.SUMMARIES, "count", "count")
    monkeypatch.setitem(sys.modules, "grpo.stages.count", SimpleNamespace(STAGE=stage))
    tree = TREE | {
        "run_dir": str(tmp_path / "run"),
        "model": MODEL | {"path": str(tiny())},
        "count": {"to": 3},
    }
    config_file = tmp_path / "c.yaml"
    config_file.write_text(yaml.safe_dump(tree))

    assert cli.main(["count", str(config_file)]) == 0
    assert stage.counted == [0, 1, 2]

    assert cli.main(["count", str(config_file), "--dry-run"]) == 0
    assert "count       to 3\nnothing is loaded\nprompt (" in capsys.readouterr().out

    assert cli.main(["doctor", str(config_file)]) == 0
    output = capsys.readouterr().out
    assert "warn  problems       8 to count" in output
    assert "-> count them" in output


def test_shared_values_contain_all_keys_except_those_of_one_machine():
    config = configs.parse(TREE | SAMPLED | TRAIN)
    values = shared_values(config)
    assert values["train.rollouts"] == "3"
    assert values["learner.lr"] == "1e-06"
    assert "eval.every" in values
    assert "engine.timeout_s" in values
    assert "rewards.format.weight" in values
    assert not {"run_dir", "model.path", "data.path", "learner.threads"} & values.keys()
