"""Generates the reference of all config keys and JSON schemas for editors from the classes.

`python -m grpo.tools.config_reference` writes docs/config_reference.md and configs/schema/*.json of
a checkout. A test fails if they differ from the classes.
"""

from __future__ import annotations

import importlib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo.config.presets import PRESETS
from grpo.config.reading import section_class_of
from grpo.experience.plugins import plugin_names
from grpo.stages.registry import SUMMARIES, find_stage

WIDTH = 100  # columns of the page
# `grpo train` first: a section is described in full where it occurs first.
COMMANDS = ("train", *(command for command in SUMMARIES if command != "train"))
# The unit of a number, by the last word of its key. Other numbers count what their description
# says, or have no unit.
UNITS = {
    "s": "seconds",
    "gb": "GB",
    "tokens": "tokens",
    "updates": "updates",
    "rollouts": "rollouts",
}
NAMES_OF_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
LIMITS = {"gt": "above", "ge": "at least", "le": "at most", "lt": "below"}
# The section classes whose key `name` is that of a data set.
SECTIONS_WITH_DATA = ("DataSettings", "DataSetSettings", "EvalDataSettings", "EvalSetSettings")
INTRODUCTION = """\
# Config reference

Every key of every config, generated from the classes in `grpo/config/`. [configs.md](configs.md)
lists the configs that come with grpo.

A key is written as a path of sections, `learner.lr`. In a YAML file that is `learner: {lr: 1e-5}`,
on the command line `learner.lr=1e-5`. `null`, or an empty value on the command line, means "not
set". Lengths are in tokens, times in seconds, sizes of memory in GB.

`configs/schema/` has a JSON schema per command. An editor with a YAML language server completes and
checks keys if this is the first line of a config (the path is relative to the config):

```yaml
# yaml-language-server: $schema=schema/train.json
```

This is the line of a config in `configs/`. Next to a `grpo files --copy .` it is
`configs/schema/train.json`; `grpo files` prints the folder of an installation.
"""


@dataclass(frozen=True, slots=True)
class _Place:
    """A section at a path in the configs of some commands.

    `_Place("learner", LearnerSettings, ["train", "eval"])`.
    """

    path: str
    section: type[BaseModel]
    commands: list[str]


def write(root: Path) -> list[Path]:
    """Writes the page and the schemas into a checkout, and returns the files."""
    contents = {root / "docs" / "config_reference.md": page()}
    for command in COMMANDS:
        schema = json.dumps(json_schema(command), indent=1)
        contents[root / "configs" / "schema" / f"{command}.json"] = schema + "\n"
    for file, text in contents.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return list(contents)


def page() -> str:
    """Returns the reference as Markdown."""
    blocks = [INTRODUCTION, _table_of_sections()]
    for path in _paths():
        blocks.append(_section_block(path))
    return "\n".join(blocks)


def json_schema(command: str) -> dict[str, Any]:
    """Returns the JSON schema of a command's configs.

    Names of built-in rewards, data sets, losses and presets are suggested; other names are valid.
    """
    schema: dict[str, Any] = find_stage(command).config_class.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"grpo {command}"
    definitions = schema["$defs"]
    for section in SECTIONS_WITH_DATA:
        if section in definitions:
            _suggest(definitions[section]["properties"]["name"], plugin_names("grpo.data"))
    if "AlgorithmSettings" in definitions:
        keys = definitions["AlgorithmSettings"]["properties"]
        _suggest(keys["loss"], plugin_names("grpo.losses"))
        keys["preset"]["enum"] = list(PRESETS)
    if "rewards" in schema["properties"]:
        _suggest_rewards(schema["properties"]["rewards"])
    if "sets" in schema["properties"]:
        sets = schema["properties"]["sets"]
        # An empty value removes a set.
        sets["additionalProperties"] = {"anyOf": [sets["additionalProperties"], {"type": "null"}]}
    if "EvalSetSettings" in definitions:
        rewards, _ = definitions["EvalSetSettings"]["properties"]["rewards"]["anyOf"]
        _suggest_rewards(rewards)
    return schema


def _suggest_rewards(rewards: dict[str, Any]) -> None:
    """Adds the names of the built-in rewards to the schema of a mapping of rewards."""
    value = rewards["additionalProperties"]
    rewards["properties"] = {
        name: {**value, "description": _summary(f"grpo.rewards.{name}")}
        for name in plugin_names("grpo.rewards")
    }


def _suggest(key: dict[str, Any], names: Sequence[str]) -> None:
    """Adds names that an editor suggests to the schema of a text."""
    choices = key.pop("anyOf", None) or [{"type": key.pop("type")}]
    key["anyOf"] = [{"enum": list(names)}, *choices]


def _summary(module: str) -> str:
    """Returns the first line of a module's docstring."""
    docstring = importlib.import_module(module).__doc__ or ""
    return docstring.partition("\n")[0]


def _table_of_sections() -> str:
    """Returns a table with a row per top-level key and a column per command."""
    keys: dict[str, list[str]] = {}
    for command in COMMANDS:
        for key in find_stage(command).config_class.model_fields:
            keys.setdefault(key, []).append(command)
    lines = [
        "## Sections of each command",
        "",
        "`x`: the config of the command may have the key.",
        "",
        "| key | " + " | ".join(COMMANDS) + " |",
        "|---|" + "---|" * len(COMMANDS),
    ]
    for key, commands in keys.items():
        cells = ["x" if command in commands else "" for command in COMMANDS]
        lines.append(f"| `{key}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _paths() -> list[str]:
    """Returns the paths of all sections in the order of the page; "" is the top level."""
    paths = [""]
    for command in COMMANDS:
        for place in _places_of(command):
            if place.path not in paths:
                paths.append(place.path)
    return paths


def _places_of(command: str) -> Iterator[_Place]:
    """Yields the sections of a command's configs, each followed by its own sections."""
    yield from _nested_places("", find_stage(command).config_class, command)


def _nested_places(parent_path: str, parent: type[BaseModel], command: str) -> Iterator[_Place]:
    for key, field in parent.model_fields.items():
        section = section_class_of(field.annotation)
        if section is None:
            continue
        path = f"{parent_path}.{key}" if parent_path else key
        if _is_mapping(field.annotation):
            path += ".NAME"
        yield _Place(path, section, [command])
        yield from _nested_places(path, section, command)


def _section_block(path: str) -> str:
    """Returns the part of the page about the section at a path."""
    if not path:
        return _top_level_block()
    places = _merged_places(path)
    first = places[0]
    earlier = _path_with_same_section(path, first.section)
    parents = [
        place for place in _places_of(first.commands[0]) if path.startswith(f"{place.path}.")
    ]
    level = 2 + len(parents)
    lines = [f"{'#' * level} `{path}`", ""]
    if earlier is not None:
        lines += _wrapped(f"The keys of [`{earlier}`](#{_anchor(earlier)}).")
        return "\n".join(lines) + "\n"
    lines += _wrapped(_first_paragraph(first.section))
    lines.append("")
    for key, field in first.section.model_fields.items():
        lines += _key_lines(key, field)
    for place in places[1:]:
        lines += _differences(first, place)
    return "\n".join(lines) + "\n"


def _top_level_block() -> str:
    """Returns the part about keys that are not sections."""
    lines = ["## Top level", ""]
    fields: dict[str, FieldInfo] = {}
    for command in COMMANDS:
        for key, field in find_stage(command).config_class.model_fields.items():
            if section_class_of(field.annotation) is None:
                fields.setdefault(key, field)
    for key, field in fields.items():
        lines += _key_lines(key, field)
    return "\n".join(lines) + "\n"


def _merged_places(path: str) -> list[_Place]:
    """Returns the section classes at a path, each with all commands that have it there."""
    places: dict[type[BaseModel], _Place] = {}
    for command in COMMANDS:
        for place in _places_of(command):
            if place.path != path:
                continue
            if place.section in places:
                places[place.section].commands.append(command)
            else:
                places[place.section] = place
    return list(places.values())


def _path_with_same_section(path: str, section: type[BaseModel]) -> str | None:
    """Returns the first path of the page that has the same section class, None if it is `path`."""
    for earlier in _paths()[1:]:
        if earlier == path:
            return None
        if any(place.section is section for place in _merged_places(earlier)):
            return earlier
    return None


def _differences(first: _Place, other: _Place) -> list[str]:
    """Returns the keys of a section class that differ from those of the first class at its path."""
    lines = []
    for key, field in other.section.model_fields.items():
        if _key_lines(key, field) != _key_lines(key, first.section.model_fields[key]):
            lines += _key_lines(key, field)
    if not lines:
        return []
    commands = _enumeration([f"`grpo {command}`" for command in other.commands], "and")
    return ["", f"In the configs of {commands}:", "", *lines]


def _key_lines(key: str, field: FieldInfo) -> list[str]:
    """Returns the lines about a key: type, range, unit, default and meaning."""
    properties = [_type_text(key, field)]
    default = _default_text(field)
    if default is not None:
        properties.append(default)
    text = f"- **`{key}`** ({'; '.join(properties)}): {field.description}"
    return _wrapped(text, indent="  ")


def _type_text(key: str, field: FieldInfo) -> str:
    """Returns the type of a field with its unit and range: "number of seconds, above 0"."""
    text = _name_of_type(field.annotation)
    unit = UNITS.get(key.rpartition("_")[2])
    if unit is not None and text in ("number", "whole number"):
        text += f" of {unit}"
    limits = []
    for constraint in field.metadata:
        for attribute, words in LIMITS.items():
            limit = getattr(constraint, attribute, None)
            if limit is not None:
                limits.append(f"{words} {limit:g}")
    return ", ".join([text, *limits])


def _name_of_type(annotation: Any) -> str:
    """Returns a type in words: "`k1` or `k3`" for `Literal["k1", "k3"] | None`."""
    if annotation in NAMES_OF_TYPES:
        return NAMES_OF_TYPES[annotation]
    if section_class_of(annotation) is not None:
        return "mapping of names to sections" if _is_mapping(annotation) else "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name_of_type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_name_of_type(each) for each in arguments if each is not NoneType)
    if origin is Literal:
        return _enumeration([f"`{value}`" for value in arguments], "or")
    if origin is list:
        return f"list of {_name_of_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} numbers"
    if origin is dict:
        return "mapping"
    return "any value"


def _enumeration(words: Sequence[str], conjunction: str) -> str:
    """Returns words as text: "a, b or c"."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def _default_text(field: FieldInfo) -> str | None:
    """Returns the default of a field in words: "default `1e-6`".

    It is None if the description states the default.
    """
    default = field.default
    if field.is_required():
        return "required"
    if default is None:
        return None if "Default: " in (field.description or "") else "not set by default"
    if isinstance(default, BaseModel):
        return None
    if isinstance(default, bool):
        return f"default `{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"default `{list(default)}`"
    if isinstance(default, dict) and default:
        return f"default `{_yaml_mapping(default)}`"
    if isinstance(default, float):
        return f"default `{_number(default)}`"
    return f"default `{default}`"


def _number(value: float) -> str:
    """Returns a number as one writes it: "1e-6", where Python prints 1e-06."""
    return re.sub(r"e-0(\d)$", r"e-\1", f"{value:g}")


def _yaml_mapping(values: dict[str, Any]) -> str:
    """Returns the default rewards as YAML: "{accuracy: 1, format: 0.1}"."""
    return "{" + ", ".join(f"{name}: {value.weight:g}" for name, value in values.items()) + "}"


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _first_paragraph(section: type[BaseModel]) -> str:
    docstring = textwrap.dedent(section.__doc__ or "")
    return " ".join(docstring.partition("\n\n")[0].split())


def _anchor(path: str) -> str:
    """Returns the anchor of a heading, as GitHub and Sphinx make it."""
    return path.replace(".", "").lower()


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    for written_file in write(Path(__file__).parents[2]):
        print(written_file)
