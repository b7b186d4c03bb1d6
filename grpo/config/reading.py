"""Reading a config: YAML, `key=value` overrides, and errors that name the nearest right key.

Knows no key itself.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from grpo.types import UserError


class Section(BaseModel):
    """Base of the config's sections: fields cannot be changed, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: str) -> dict[str, Any]:
    """Returns the mapping in a YAML file; raises UserError if there is none that can be read."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name,
            [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else [],
            n=1,
        )
        raise UserError(
            f"{path}: no such config file"
            + (f" (did you mean {file.parent / near[0]}?)" if near else "")
        )
    try:
        tree = yaml.load(file.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a config is a mapping of keys to values, got {type(tree).__name__}"
        )
    return tree


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 reads 1e-5 as text, and off and no as false; this reads what everyone means.

    A key given twice is an error.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.YAMLError(
                    f"key {key!r} is given twice, line {node.value[i][0].start_mark.line + 1}"
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != BOOL]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Returns the tree with each `a.b=value` set.

    Values are read as YAML: `train.rollouts=5 rewards={accuracy: 1.0}`.
    """
    tree = _copy(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override}: an override is key=value, e.g. train.rollouts=20")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{override}: {parent} is a value, not a section")
        try:
            node[leaf] = yaml.load(value, Loader=_Loader) if value else None
        except yaml.YAMLError as error:
            raise UserError(
                f"{override}: the value is not YAML: {' '.join(str(error).split())}"
            ) from None
    return tree


def explain(error: Any, kind: type[BaseModel]) -> str:
    """Returns one of pydantic's errors in our words.

    It names the key, what is wrong, and the nearest right key.
    """
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, leaf = error["loc"]
        fields = list(_section(kind, parents).model_fields)
        near = difflib.get_close_matches(str(leaf), fields, n=1, cutoff=0.5)
        return f"{key}: no such key; have {', '.join(fields)}" + (
            f" (did you mean {near[0]}?)" if near else ""
        )
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        return f"{key}: {'missing' if error['type'] == 'missing' else message}" if key else message
    return f"{key}: {message[0].lower() + message[1:]}, got {error['input']!r}"


def _section(kind: type[BaseModel], loc: list[Any]) -> type[BaseModel]:
    """Returns the section class that a path of keys leads to."""
    current: Any = kind
    for part in loc:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue  # a key of a mapping: the value type was already taken
        annotation = (
            current.model_fields[part].annotation if part in current.model_fields else current
        )
        current = next(
            (
                a
                for a in (annotation, *get_args(annotation))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ),
            current,
        )
    section: type[BaseModel] = current
    return section


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
