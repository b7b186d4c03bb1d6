"""The text of a new config: a header, the sections with their comments, and suggestions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import yaml

WIDTH = 100
INDENT = "  "
SECTIONS = (
    "run_dir",
    "seed",
    "model",
    "data",
    "prompt",
    "sampling",
    "rewards",
    "train",
    "sft",
    "learner",
    "engine",
    "eval",
    "checkpoint",
    "algorithm",
)


def render(
    header: Sequence[str],
    tree: Mapping[str, Any],
    comments: Mapping[str, str],
    suggestions: Mapping[str, Sequence[str]],
) -> str:
    """Returns the text of the file.

    Args:
        header: The first lines, without their "# ".
        tree: The config as nested dicts.
        comments: Comments by key, e.g. `{"prompt.max_tokens": "the longest prompt has 231"}`.
        suggestions: Lines that are commented out, by section. Those of section "" end the file.
    """
    # A quoted override can contain line breaks.
    lines = [f"# {line}" for line in "\n".join(header).splitlines()]
    names = sorted(tree, key=lambda name: SECTIONS.index(name) if name in SECTIONS else 99)
    for name in names:
        lines += _section(name, tree[name], comments, suggestions.get(name, ()))
    lines += [f"# {line}" for line in suggestions.get("", ())]
    return "\n".join(lines) + "\n"


def wrap_command(parts: Sequence[str], width: int = WIDTH - 2) -> list[str]:
    """Returns a command of the shell in lines that can be copied.

    A line is at most `width` long, or it has a single part.
    """
    lines: list[str] = []
    line = ""
    for part in parts:
        if line and len(line) + len(part) + 3 > width:
            lines.append(f"{line} \\")
            line = f"{INDENT * 2}{part}"
        else:
            line = f"{line} {part}" if line else part
    return [*lines, line]


def _section(
    name: str, value: Any, comments: Mapping[str, str], suggestions: Sequence[str]
) -> list[str]:
    """Returns the lines of a section: one line if it fits and has no comments, else one per key."""
    comment = comments.get(name, "")
    line = f"{name}: {flow(value)}"
    has_comments = any(key.startswith(f"{name}.") for key in comments)
    needs_block = has_comments or len(suggestions) > 0 or len(line) > WIDTH
    if not isinstance(value, dict) or not needs_block:
        return _with_comment(line, comment, "")
    lines = _with_comment(f"{name}:", comment, "")
    for key, nested_value in value.items():
        line = f"{INDENT}{flow(key)}: {flow(nested_value)}"
        lines += _with_comment(line, comments.get(f"{name}.{key}", ""), INDENT)
    return [*lines, *(f"{INDENT}# {suggestion}" for suggestion in suggestions)]


def _with_comment(line: str, comment: str, indent: str) -> list[str]:
    """Returns a line with its comment behind it, or above it if the line would be too long."""
    if not comment:
        return [line]
    if len(line) + len(comment) + 3 <= WIDTH:
        return [f"{line} # {comment}"]
    return [*_comment_lines(comment, indent), line]


def _comment_lines(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix)


def flow(value: Any) -> str:
    """Returns a value as YAML on one line, e.g. `{accuracy: 1.0, format: 0.1}` or `1.0e-6`."""
    if isinstance(value, dict):
        pairs = [f"{flow(key)}: {flow(nested)}" for key, nested in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(nested) for nested in value) + "]"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return _scientific(value)
    # In a list, YAML quotes whatever is special within { } and [ ].
    text: str = yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip()[1:-1]


def _scientific(value: float) -> str:
    """Returns a number with an exponent and its shortest exact mantissa: `1.0e-6`, `1.25e-5`."""
    mantissa, _, exponent = f"{Decimal(repr(value)):e}".partition("e")
    if "." not in mantissa:
        mantissa += ".0"  # otherwise YAML reads the number as text
    return f"{mantissa}e{int(exponent)}"
