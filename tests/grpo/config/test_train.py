"""Configs: every mistake is one line that names the key and the way out, before anything heavy is
imported.
"""

import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from grpo import cli
from grpo import config as configs
from grpo.stages.registry import SUMMARIES, find_stage, stage_of
from grpo.types import UserError

ROOT = Path(__file__).parents[3]
OF_OTHER_STAGES = {  # what they leave, in place of which here something else must do
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


def with_(**overrides):
    return configs.apply_overrides(
        MINIMAL, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    )


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
    ],
)
def test_mistakes_are_named_with_the_way_out(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.parse(with_(**overrides))


def test_a_missing_section_is_named():
    with pytest.raises(UserError, match="train: missing"):
        configs.parse({key: value for key, value in MINIMAL.items() if key != "train"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "invalid YAML"),
        ("- 1", "a config must be a mapping"),
        ("seed: 1\nseed: 2", "duplicate key 'seed' in line 2"),
    ],
)
def test_broken_yaml_is_told(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        configs.load(str(tmp_path / "c.yaml"))


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "tiny.yaml").write_text("")
    with pytest.raises(UserError, match=r"config file not found \(did you mean tiny.yaml\?\)"):
        configs.load(str(tmp_path / "tinny.yaml"))


def test_overrides_are_yaml_and_scientific_notation_is_a_number():
    tree = configs.apply_overrides(
        MINIMAL, ["learner.lr=3e-5", "rewards={accuracy: 1.0}", "model.warm_start="]
    )
    config = configs.parse(tree)
    assert (
        config.learner.lr == 3e-5
        and config.rewards == {"accuracy": configs.Reward(weight=1.0)}
        and config.model.warm_start is None
    )
    assert "learner" not in MINIMAL


@pytest.mark.parametrize("override", ["learner.lr", "=3", "run_dir.x=3"])
def test_an_override_that_is_none_is_an_error(override):
    with pytest.raises(UserError):
        configs.apply_overrides(MINIMAL, [override])


def test_a_dumped_config_is_the_same_config():
    config = configs.parse(with_(learner__lr="1e-5", data__path="/d"))
    import yaml

    assert configs.parse(yaml.safe_load(configs.dump(config))) == config


def test_a_mixtures_sets_inherit_the_path():
    config = configs.parse(
        with_(
            data__name="", data__path="/d", data__mixture="{gsm8k: {weight: 3}, math: {path: /m}}"
        )
    )
    assert {name: source.path for name, source in config.data.sources.items()} == {
        "gsm8k": "/d",
        "math": "/m",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_right_and_short(path, capsys, monkeypatch):
    keys = yaml.safe_load(path.read_text())
    stage = stage_of(keys)
    configs.load(str(path), kind=stage.config_class)
    monkeypatch.chdir(ROOT)
    assert (
        cli.main([stage.command, str(path), *OF_OTHER_STAGES.get(path.stem, []), "--dry-run"]) == 0
    )
    told = capsys.readouterr().out
    assert ("grpo train" if stage.command == "pipeline" else "run_dir") in told
    assert len(path.read_text().splitlines()) <= 45


def test_an_evaluation_shows_what_it_would_do(tiny, tmp_path, capsys):
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny()), "dtype": "float32"},
        "data": {"name": "arithmetic"},
    }
    config |= {"prompt": {"template": "plain", "max_tokens": 48}, "sampling": {"max_tokens": 16}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert (
        cli.main(
            ["eval", str(tmp_path / "c.yaml"), "eval={protocol: greedy, problems: 7}", "--dry-run"]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert (
        "1 completions of at most 16 tokens at temperature 0" in told
        and "at most 7 problems" in told
        and "prompt (" in told
    )


def sections_of(section):
    """Yields a section class and all section classes below it."""
    yield section
    for field in section.model_fields.values():
        for annotation in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, configs.Section):
                yield from sections_of(annotation)


def test_every_key_has_a_description_of_full_sentences():
    sections = {configs.Reward}
    for command in SUMMARIES:
        sections.update(sections_of(find_stage(command).config_class))
    assert configs.Lora in sections and configs.Judged in sections
    for section in sections:
        for key, field in section.model_fields.items():
            description = field.description or ""
            assert description.endswith("."), f"{section.__name__}.{key}: {description!r}"


def test_importing_the_package_and_its_config_imports_nothing_heavy():
    program = "import sys, grpo, grpo.types, grpo.config, grpo.cli; "
    program += (
        "print(*[m for m in ('torch', 'vllm', 'transformers', 'deepspeed', 'datasets') if m in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
