"""Tests of config loading: error messages, overrides, the configs in configs/, and the descriptions
of all keys.
"""

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from grpo import cli
from grpo import config as configs
from grpo.config import DistillConfig, SftConfig, TrainConfig
from grpo.config.other_names import OTHER_NAMES
from grpo.config.reading import _has_key
from grpo.stages.registry import SUMMARIES, find_stage, stage_for_config
from grpo.types import UserError

ROOT = Path(__file__).parents[3]
# Overrides for configs whose model or data comes from an earlier stage, by the name of the config.
REPLACED_INPUTS = {
    "tiny_collect": ["model.path=tiny-qwen2"],
    "tiny_quantize": ["model.path=tiny-qwen2"],
    "tiny_distill": ["data={name: arithmetic}"],
}
MINIMAL = {
    "run_dir": "runs/x",
    "model": {"path": "tiny-qwen2"},
    "data": {"name": "arithmetic"},
    "train": {"rollouts": 3},
}


def minimal_tree(**overrides):
    """Returns the minimal config tree with overrides: `learner__lr="1e-5"` sets `learner.lr`."""
    arguments = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return configs.apply_overrides(MINIMAL, arguments)


def test_every_name_of_another_library_stands_for_a_key():
    for name, keys in OTHER_NAMES.items():
        for key in keys.split():
            kinds = (TrainConfig, SftConfig, DistillConfig)
            assert any(_has_key(kind, key) for kind in kinds), (name, key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__dtyp": "float32"},
            r"model.dtyp: unknown key \(did you mean dtype\?\)\. Available: path, ",
        ),
        ({"rewars": "{}"}, r"rewars: unknown key \(did you mean rewards\?\)"),
        (
            {"data__mixture": "{gsm8k: {wieght: 1}}", "data__name": ""},
            r"data.mixture.gsm8k.wieght: unknown key \(did you mean weight\?\)",
        ),
        # Names of TRL and verl, and a key of another section.
        ({"learner__learning_rate": "1e-6"}, r"rate: unknown key \(its name is learner\.lr\)"),
        ({"rewards": "{format: {wieght: 1}}"}, r"wieght: unknown key \(did you mean weight\?\)"),
        ({"train__num_generations": "8"}, r"unknown key \(its name is train\.group_size\)"),
        ({"report_to": "wandb"}, r"report_to: unknown key \(its name is logging\.trackers\)"),
        ({"lora_r": "8"}, r"lora_r: unknown key \(its name is model\.lora\.rank\)"),
        ({"actor_rollout_ref": "{}"}, r"its keys are in model, learner, engine, sampling and"),
        ({"train__lr": "1e-6"}, r"train\.lr: unknown key \(did you mean learner\.lr\?\)"),
        ({"data__mixture": "{gsm8k: {}}"}, "data: set either name"),
        (
            {"train__group_size": "1"},
            "train.group_size: input should be greater than or equal to 2, got 1",
        ),
        (
            {"train__updates_per_rollout": "5", "train__problems": "4"},
            "4 problems x 8 completions = 32 .* Nearest valid values: 4, 8",
        ),
        ({"learner__zero_stage": "0"}, "zero_stage=0 keeps no float32 master weights"),
        ({"learner__micro_batch_tokens": "100"}, "a sequence can have .* = 1536 tokens"),
        (
            {"learner__sequence_parallel": "2", "model__attention": "sdpa"},
            "sequence_parallel=2 requires model.attention=packed",
        ),
        (
            {"sampling__temperature": "hot"},
            "sampling.temperature: input should be a valid number.*got 'hot'",
        ),
        ({"rewards": "{}"}, "rewards is empty"),
        (
            {"reward_pool__max_failed": "0"},
            "reward_pool.max_failed: input should be greater than 0, got 0",
        ),
    ],
)
def test_the_error_of_an_invalid_config_names_the_key_and_the_fix(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.parse(minimal_tree(**overrides))


def test_the_error_of_a_missing_section_names_the_section():
    tree = dict(MINIMAL)
    del tree["train"]
    with pytest.raises(UserError, match="train: missing"):
        configs.parse(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "invalid YAML"),
        ("- 1", "a config must be a mapping"),
        ("seed: 1\nseed: 2", "duplicate key 'seed' in line 2"),
    ],
)
def test_invalid_yaml_is_a_user_error(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        configs.load(str(tmp_path / "c.yaml"))


def test_the_error_of_a_missing_file_suggests_the_file_with_the_nearest_name(tmp_path):
    (tmp_path / "tiny.yaml").write_text("")
    with pytest.raises(UserError, match=r"config file not found \(did you mean tiny.yaml\?\)"):
        configs.load(str(tmp_path / "tinny.yaml"))


def test_overrides_are_yaml_and_scientific_notation_is_a_number():
    tree = configs.apply_overrides(
        MINIMAL, ["learner.lr=3e-5", "rewards={accuracy: 1.0}", "model.warm_start="]
    )
    config = configs.parse(tree)
    assert config.learner.lr == 3e-5
    assert config.rewards == {"accuracy": configs.RewardSettings(weight=1.0)}
    assert config.model.warm_start is None
    assert "learner" not in MINIMAL  # the tree is not modified


@pytest.mark.parametrize("override", ["learner.lr", "=3", "run_dir.x=3"])
def test_an_invalid_override_is_an_error(override):
    with pytest.raises(UserError):
        configs.apply_overrides(MINIMAL, [override])


def test_parsing_a_dumped_config_gives_the_same_config():
    config = configs.parse(minimal_tree(learner__lr="1e-5", data__path="/d"))
    assert configs.parse(yaml.safe_load(configs.dump(config))) == config


def test_the_problem_sets_of_a_mixture_inherit_the_path_of_section_data():
    tree = minimal_tree(
        data__name="", data__path="/d", data__mixture="{gsm8k: {weight: 3}, math: {path: /m}}"
    )
    sources = configs.parse(tree).data.data_sets
    paths = {name: source.path for name, source in sources.items()}
    assert paths == {"gsm8k": "/d", "math": "/m"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: p.stem)
def test_every_config_in_the_repository_is_valid_and_short(path, capsys, monkeypatch):
    text = path.read_text()
    stage = stage_for_config(yaml.safe_load(text))
    configs.load(str(path), kind=stage.config_class)
    monkeypatch.chdir(ROOT)
    overrides = REPLACED_INPUTS.get(path.stem, [])
    assert cli.main([stage.command, str(path), *overrides, "--dry-run"]) == 0
    expected = "grpo train" if stage.command == "pipeline" else "run_dir"
    assert expected in capsys.readouterr().out
    assert len(text.splitlines()) <= 45


def test_the_dry_run_of_supervised_training_needs_solutions(tiny, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"problem": f"{number}?", "answer": "1"} for number in range(20)]
    rows[3]["solution"] = "It is one."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft", str(ROOT / "configs/tiny_sft.yaml"), "--dry-run", f"model={{path: {tiny()}}}"]
    words += [f"data={{name: jsonl, path: {file}, options: {{test_fraction: 0}}}}"]
    assert cli.main(words) == 0
    assert "<think>It is one.</think> <answer>1</answer>" in capsys.readouterr().out
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert cli.main(words) == 2
    assert "no problem has a worked solution" in capsys.readouterr().err


def test_the_dry_run_of_an_evaluation_prints_its_protocol_and_a_prompt(tiny, tmp_path, capsys):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny()), "dtype": "float32"},
        "data": {"name": "arithmetic"},
        "prompt": {"template": "plain", "max_tokens": 48},
        "sampling": {"max_tokens": 16},
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert cli.main(["eval", str(file), "eval={protocol: greedy, problems: 7}", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "1 completions of at most 16 tokens at temperature 0" in output
    assert "at most 7 problems" in output
    assert "prompt (" in output


def nested_sections(section):
    """Yields a section class and all section classes below it."""
    yield section
    for field in section.model_fields.values():
        for annotation in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, configs.Section):
                yield from nested_sections(annotation)


def test_the_description_of_every_key_ends_with_a_full_stop():
    sections = {configs.RewardSettings}
    for command in SUMMARIES:
        sections.update(nested_sections(find_stage(command).config_class))
    assert configs.LoraSettings in sections
    assert configs.PipelineEvalSettings in sections
    for section in sections:
        for key, field in section.model_fields.items():
            description = field.description or ""
            assert description.endswith("."), f"{section.__name__}.{key}: {description!r}"


LIST_HEAVY_MODULES = """
import sys
import grpo, grpo.types, grpo.config, grpo.cli
heavy = ("torch", "vllm", "transformers", "deepspeed", "datasets")
print(*[name for name in heavy if name in sys.modules])
"""


def test_importing_the_package_its_config_and_its_cli_imports_no_heavy_library():
    process = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY_MODULES], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == ""
