"""A name in a config is a file in a folder (`rewards/accuracy.py`), or `package.module:function` from outside."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo.types import Group, Problem, UserError, Verdict

KINDS = {"reward": "reward", "load": "data set", "loss": "loss"}  # what a file's function is for
Prompt = str | list[dict[str, str]]  # text, or the messages of a chat, as in TRL
RewardFunction = Callable[[Group, Prompt], Sequence[float | Verdict | None]]


def names(package: str) -> list[str]:
    """Returns the names that a package's folder offers: its files that do not begin with an underscore."""
    folder = Path(importlib.import_module(package).__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find(package: str, name: str, function: str, key: str) -> Callable[..., Any]:
    """Returns `function` of the file `name` in a package's folder, or the function that `module:function` names.

    Raises UserError that begins with the config's `key` and lists what there is.
    """
    if ":" in name:
        return _outside(name, key)
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{key}.{name}: no such {KINDS[function]}; have {', '.join(known)}, or module:function{hint}")
    return getattr(importlib.import_module(f"{package}.{name}"), function)


def _outside(name: str, key: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that a user's own data/ or rewards/ does not shadow ours
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}.{name}: {error} (looked in the installed packages, then in {here})") from None
    except Exception as error:
        raise UserError(f"{key}.{name}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{key}.{name}: {module.__file__} has no function {function!r}")
    return getattr(module, function)


def reward(name: str) -> RewardFunction:
    """Returns a reward for whole groups from either of two kinds of function, told apart by their parameters:

    ours `f(completion, problem) -> float | Verdict | None`, or TRL's `f(prompts, completions, **columns) -> list[float | None]`.
    """
    function = find("rewards", name, "reward", "rewards")
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return lambda group, prompt: _call_trl(function, name, group, prompt)
    if len(parameters) < 2:
        takes = ", ".join(parameters)
        raise UserError(f"rewards.{name}: takes ({takes}); expected f(completion, problem) or f(prompts, completions, **columns)")
    return lambda group, prompt: [_call(function, name, group, i) for i in range(len(group.completions))]


def _call(function: Callable[..., Any], name: str, group: Group, i: int) -> Any:
    try:
        return function(group.completions[i], group.problem)
    except Exception as error:
        where = f"completion {i} of problem {group.problem.id}"
        raise RuntimeError(f"reward {name} failed on {where}: {error!r}; its text: {group.completions[i].text[:300]!r}") from error


def _call_trl(function: Callable[..., Any], name: str, group: Group, prompt: Prompt) -> list[float | None]:
    size, problem = len(group.completions), group.problem
    texts = [completion.text for completion in group.completions]
    columns: dict[str, Any] = {
        "prompts": [prompt] * size,
        "completions": texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(completion.token_ids) for completion in group.completions],
    } | {key: [value] * size for key, value in (problem.meta | _columns(problem)).items()}
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        columns = {key: value for key, value in columns.items() if key in parameters}
    try:
        values = list(function(**columns))
    except Exception as error:
        raise RuntimeError(f"reward {name} failed on the completions of problem {problem.id}: {error!r}") from error
    if len(values) != size:
        raise RuntimeError(f"reward {name} returned {len(values)} values for the {size} completions of problem {problem.id}")
    return values


def _columns(problem: Problem) -> dict[str, Any]:
    return {"question": problem.question, "answer": problem.answer, "solution": problem.solution, "source": problem.source}
