"""Reads a config: YAML files, `key=value` overrides and readable validation errors.

This module does not depend on any particular config key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from grpo import files
from grpo.config.other_names import OTHER_NAMES, OTHER_SECTIONS
from grpo.types import UserError


class Section(BaseModel):
    """Base class of all config sections. Fields are read-only, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns a hint for an error message, e.g. " (did you mean dtype?)".

    Args:
        name: The unknown name.
        candidates: The valid names.
        cutoff: The lowest similarity, from 0 to 1, that counts as a match.

    Returns:
        The hint with the most similar candidate, "" if no candidate is similar enough.
    """
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    if not matches:
        return ""
    return f" (did you mean {matches[0]}?)"


def read_yaml(path: str) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Args:
        path: The file. `configs/...` is a shipped config if the working directory has no such file.

    Raises:
        UserError: The file does not exist, cannot be read, is not valid YAML, or does not hold a
            mapping.
    """
    file = files.find_file(path)
    if (file / "config.yaml").is_file():
        raise UserError(
            f"{path}: the directory of a run, expected a config. Its config is {path}/config.yaml; "
            "to use its model with a config, add model.path="
            f"{path} and a new run_dir"
        )
    if not file.is_file():
        raise UserError(f"{path}: config file not found{_near_configs(file)}")
    try:
        tree = yaml.load(file.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: invalid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a config must be a mapping of keys to values, got {type(tree).__name__}"
        )
    return tree


def _near_configs(file: Path) -> str:
    """Returns a hint for an error message: files of the same folder, or shipped configs."""
    neighbors = [config.name for config in file.parent.glob("*.yaml")]
    hint = did_you_mean(file.name, neighbors)
    if hint:
        return hint
    shipped = {Path(config).stem: config for config in files.shipped_configs()}
    near = difflib.get_close_matches(file.stem, shipped, n=3)
    if not near:
        return ". `grpo files` prints the folder with the shipped configs"
    return f" (did you mean {' or '.join(shipped[name] for name in near)}?)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that rejects duplicate keys and avoids the surprises of YAML 1.1.

    In YAML 1.1, `1e-5` is a string, and `on`, `off`, `yes` and `no` are booleans. Here `1e-5` is a
    number, and only `true` and `false` are booleans.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in keys:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"duplicate key {key!r} in line {line}")
            keys.append(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_BOOL_TAG = "tag:yaml.org,2002:bool"
_FLOAT_TAG = "tag:yaml.org,2002:float"


def _without_booleans(resolvers: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns PyYAML's resolvers `first character -> [(tag, pattern)]` without those for booleans.

    The result shares no list with the argument, which all loaders of PyYAML use.
    """
    kept = {}
    for first_character, entries in resolvers.items():
        kept[first_character] = [(tag, pattern) for tag, pattern in entries if tag != _BOOL_TAG]
    return kept


_Loader.yaml_implicit_resolvers = _without_booleans(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    _BOOL_TAG, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _FLOAT_TAG,
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of a config tree with overrides applied.

    Args:
        tree: A config as nested dicts. It is not modified.
        overrides: Assignments such as `train.rollouts=5` and `rewards={accuracy: 1.0}`. A value is
            parsed as YAML; an empty value (`model.warm_start=`) is None.

    Raises:
        UserError: An override is not an assignment, its value is not valid YAML, or one of its
            parent keys is not a section.
    """
    tree = _copy(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override}: an override must have the form key=value, e.g. train.rollouts=20"
            )
        _replace_value(tree, key, _parse_value(override, text), override)
    return tree


def replace_values(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a config tree with other values.

    Args:
        tree: A config as nested dicts. It is not modified.
        values: The values by dotted key: `{"train.rollouts": 5, "model.warm_start": None}`.

    Raises:
        UserError: `values` is not a mapping, or one of a key's parents is not a section.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"overrides: expected a dict of dotted keys, e.g. {{'train.rollouts': 5}}, got "
            f"{values!r}"
        )
    tree = _copy(tree)
    for key, value in values.items():
        _replace_value(tree, key, value, f"{key}={value!r}")
    return tree


def _replace_value(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Sets a value of a tree by its dotted key. `override` is for the error message."""
    *parents, leaf = key.split(".")
    section = tree
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(
                f"{override}: {parent} has a value without keys. Set it as a whole, "
                f"{parent}={{{leaf}: ...}}"
            )
    section[leaf] = value


def _parse_value(override: str, text: str) -> Any:
    if not text:
        return None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override}: the value is not valid YAML: {_one_line(error)}") from None


def explain(error: Any, config_class: type[BaseModel]) -> str:
    """Returns one of pydantic's errors as a message that names the key and the problem.

    Args:
        error: An entry of `ValidationError.errors()`.
        config_class: The class of the config that was validated. For an unknown key, the message
            lists the valid keys of its section.
    """
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, leaf = error["loc"]
        fields = list(_section_class(config_class, parents).model_fields)
        hint = _other_place(str(leaf), config_class) or did_you_mean(str(leaf), fields, cutoff=0.5)
        return f"{key}: unknown key{hint}. Available: {', '.join(fields)}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        return f"{key}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
    if not key:  # a check of the whole config: its message names the keys
        return str(message)
    return f"{key}: {message}"


def _other_place(name: str, config_class: type[BaseModel]) -> str:
    """Returns a hint if another library, or another section, has a key of this name; else ""."""
    if name in OTHER_SECTIONS:
        return f" (its keys are in {OTHER_SECTIONS[name]})"
    for key in OTHER_NAMES.get(name, "").split():
        if _has_key(config_class, key):
            return f" (its name is {key})"
    for section in config_class.model_fields:
        if _has_key(config_class, f"{section}.{name}"):
            return f" (did you mean {section}.{name}?)"
    return ""


def _has_key(config_class: type[BaseModel], key: str) -> bool:
    """Returns whether a config has a key such as "learner.lr"."""
    current: type[BaseModel] | None = config_class
    for part in key.split("."):
        if current is None or part not in current.model_fields:
            return False
        current = section_class_of(current.model_fields[part].annotation)
    return True


def _section_class(config_class: type[BaseModel], path: list[Any]) -> type[BaseModel]:
    """Returns the section class at a path of keys, e.g. `["learner"]` or `["data", "mixture"]`."""
    current = config_class
    for key in path:
        # A name inside a mapping such as data.mixture.NAME is not a field: the class of the
        # mapping's values is already current.
        if key in current.model_fields:
            current = section_class_of(current.model_fields[key].annotation) or current
    return current


def section_class_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class in an annotation such as `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        section = section_class_of(argument)
        if section is not None:
            return section
    return None


def _copy(tree: Any) -> Any:
    """Returns a copy of nested dicts. Lists and other values are shared."""
    if not isinstance(tree, dict):
        return tree
    return {key: _copy(value) for key, value in tree.items()}
