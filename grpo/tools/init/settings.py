"""The settings from which `grpo init` builds a config, each with the reason for its value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo import config as configs
from grpo.config import Section
from grpo.stages.registry import find_stage
from grpo.types import UserError

GIVEN = "given on the command line"
NO_LIMIT = 2**40  # tokens per micro-batch, before a plan sets them


class Setting(NamedTuple):
    """A key of the config with its value and a comment.

    Example: `Setting("prompt.max_tokens", 288, "the longest of 2,000 prompts has 231 tokens")`.
    """

    key: str
    value: Any
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """The assignments of the command line. They replace every decision of `grpo init`.

    Attributes:
        words: The assignments, e.g. `("train.rollouts=5",)`.
        tree: The same as nested dicts, e.g. `{"train": {"rollouts": 5}}`.
    """

    words: tuple[str, ...]
    tree: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key such as "prompt.template", or the default."""
        value: Any = self.tree
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def has(self, key: str) -> bool:
        """Returns whether the command line sets a key, or a key below it."""
        return self.get(key) is not None


def read_overrides(command: str, words: Sequence[str]) -> Overrides:
    """Returns the assignments of the command line.

    Args:
        command: The command of the config, `train` or `sft`.
        words: The assignments.

    Raises:
        UserError: An assignment is malformed, names an unknown key, or has an invalid value.
    """
    overrides = Overrides(words=tuple(words), tree=configs.apply_overrides({}, words))
    _check_keys(command, overrides)
    required = [
        Setting("run_dir", "runs/example"),
        Setting("model.path", "example"),
        Setting("learner.micro_batch_tokens", NO_LIMIT),
    ]
    if not overrides.has("data.name"):
        required.append(Setting("data.name", "example"))
    if command == "train":
        required.append(Setting("train.rollouts", 1))
    else:
        required.append(Setting("sft.updates", 1))
    make_config(command, required, overrides)
    return overrides


def _check_keys(command: str, overrides: Overrides) -> None:
    """Raises UserError if an assignment sets a whole section, or what an option sets."""
    config_class: type[Section] = find_stage(command).config_class
    for word in overrides.words:
        key = word.partition("=")[0]
        if key == "data.mixture" or key.startswith("data.mixture."):
            raise UserError(f"{key}: grpo init knows the data of --data only: edit the config then")
        field = config_class.model_fields.get(key)
        annotation = field.annotation if field is not None else None
        if isinstance(annotation, type) and issubclass(annotation, Section):
            raise UserError(
                f"{key}: grpo init decides the other keys of this section: set single keys, such "
                f"as {key}.{next(iter(annotation.model_fields))}=VALUE"
            )


def make_tree(settings: Iterable[Setting], overrides: Overrides) -> dict[str, Any]:
    """Returns the config as nested dicts. Of several settings of a key, the last one counts."""
    tree: dict[str, Any] = {}
    for setting in settings:
        section_name, _, key = setting.key.partition(".")
        if key:
            tree.setdefault(section_name, {})[key] = setting.value
        else:
            tree[section_name] = setting.value
    return configs.apply_overrides(tree, overrides.words)


def make_comments(settings: Iterable[Setting], overrides: Overrides) -> dict[str, str]:
    """Returns the comments by key. A key of the command line has the comment `GIVEN`."""
    comments = {setting.key: setting.comment for setting in settings if setting.comment}
    for word in overrides.words:
        key = word.partition("=")[0]
        comments = {
            name: comment for name, comment in comments.items() if not name.startswith(f"{key}.")
        }
        section_key = ".".join(key.split(".")[:2])  # the file has one line per key of a section
        comments[section_key] = GIVEN
    return comments


def make_config(command: str, settings: Iterable[Setting], overrides: Overrides) -> Any:
    """Returns the validated config of `grpo train` or `grpo sft`.

    Raises:
        UserError: The config is invalid.
    """
    config_class: type[Section] = find_stage(command).config_class
    return configs.parse(make_tree(settings, overrides), kind=config_class)
