"""The config reference and the JSON schemas agree with the config classes and shipped configs."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

from grpo import config as configs
from grpo.config.reading import apply_overrides, read_yaml, section_class_of
from grpo.stages.registry import SUMMARIES, find_stage, stage_for_config
from grpo.tools import config_reference

ROOT = Path(__file__).parents[3]
SCHEMAS = ROOT / "configs" / "schema"
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMA_LINE = re.compile(r"# yaml-language-server: \$schema=(\S+)")
WRITE_AGAIN = "run python -m grpo.tools.config_reference"


def schema_of(command):
    return json.loads((SCHEMAS / f"{command}.json").read_text())


def errors_of(tree, command):
    """Returns the messages of the errors that an editor would show for a config."""
    validator = jsonschema.Draft202012Validator(schema_of(command))
    # An editor reads YAML as JSON: a date or a tuple would not survive this.
    return [error.message for error in validator.iter_errors(json.loads(json.dumps(tree)))]


def tiny(*overrides):
    return apply_overrides(read_yaml(str(ROOT / "configs" / "tiny.yaml")), overrides)


def test_the_page_and_the_schemas_are_those_of_the_classes(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").mkdir()
    written = config_reference.write(tmp_path)
    assert len(written) == 1 + len(SUMMARIES)
    for file in written:
        committed = ROOT / file.relative_to(tmp_path)
        assert committed.read_text() == file.read_text(), f"{committed}: {WRITE_AGAIN}"
    assert {file.stem for file in SCHEMAS.glob("*.json")} == set(SUMMARIES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_names_its_schema_and_is_valid(path):
    tree = read_yaml(str(path))
    command = stage_for_config(tree).command
    named = SCHEMA_LINE.match(path.read_text())
    assert named
    assert (path.parent / named[1]).resolve() == SCHEMAS / f"{command}.json"
    assert errors_of(tree, command) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.rl=1e-5", "'rl' was unexpected"),
        ("learner.lr=-1", "less than or equal to the minimum of 0"),
        ("algorithm.preset=dapoo", "'dapoo' is not one of"),
        ("rewards={accuracy: high}", "not valid under any of the given schemas"),
        ("train.rollouts=many", "'many' is not of type 'integer'"),
    ],
)
def test_a_mistake_is_an_error_of_the_schema(override, message):
    assert any(message in error for error in errors_of(tiny(override), "train"))


@pytest.mark.parametrize(
    "override",
    [
        "rewards={accuracy: 1, my_rewards:brevity: {weight: 0.2, options: {max_tokens: 9}}}",
        "data={name: my_data:load}",
        "data={mixture: {gsm8k: {weight: 2}, my_data:load: {}}}",
        "algorithm.loss=my_loss:loss",
        "algorithm.mismatch={mask: geometric, bounds: [0.999, 1.001]}",
        "algorithm.mismatch=icepop",
        "model.warm_start=",
    ],
)
def test_every_form_that_a_config_may_use_is_valid(override):
    tree = tiny(override)
    configs.parse(tree)
    assert errors_of(tree, "train") == []


def test_an_editor_suggests_the_built_in_names():
    schema = schema_of("train")
    suggested = schema["$defs"]["DataSettings"]["properties"]["name"]["anyOf"][0]["enum"]
    assert {"gsm8k", "math", "jsonl"} <= set(suggested)
    rewards = schema["properties"]["rewards"]["properties"]
    assert rewards["accuracy"]["description"]
    assert {"code", "format", "length"} <= rewards.keys()


def test_the_schema_of_an_evaluation_suggests_names_in_each_set():
    schema = schema_of("eval")
    set_keys = schema["$defs"]["EvalSetSettings"]["properties"]
    assert {"gpqa", "math"} <= set(set_keys["name"]["anyOf"][0]["enum"])
    assert "choice" in set_keys["rewards"]["anyOf"][0]["properties"]


def test_an_empty_set_of_an_evaluation_is_valid():
    tree = read_yaml(str(ROOT / "configs" / "eval_reasoning.yaml"))
    tree["sets"]["gpqa"] = None
    assert errors_of(tree, "eval") == []


def fields_of(section: type[BaseModel], path: str = "") -> dict[str, object]:
    """Returns the fields of a config class and its sections by their path."""
    fields: dict[str, object] = {}
    for key, field in section.model_fields.items():
        fields[f"{path}{key}"] = field
        nested = section_class_of(field.annotation)
        if nested is not None:
            fields.update(fields_of(nested, f"{path}{key}."))
    return fields


@pytest.mark.parametrize("command", SUMMARIES)
def test_every_key_is_described_and_is_in_the_reference(command):
    page = (ROOT / "docs" / "config_reference.md").read_text()
    for path, field in fields_of(find_stage(command).config_class).items():
        key = path.rpartition(".")[2]
        assert field.description.endswith("."), path
        nested = section_class_of(field.annotation)
        assert f"- **`{key}`**" in page or nested is not None, path
