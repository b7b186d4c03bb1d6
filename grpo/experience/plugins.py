"""Finds the functions that a config names.

A name is a file in a folder (`rewards/accuracy.py`), or `package.module:function` from outside.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.config import Reward
from grpo.learning.advantages import unflatten
from grpo.types import Group, Problem, Score, UserError, Verdict
from rewards.workers.pool import Failure, Pool

KINDS = {"reward": "reward", "load": "data set", "loss": "loss"}  # what a file's function is for
Prompt = str | list[dict[str, str]]  # text, or the messages of a chat, as in TRL
RewardValue = float | Score | Verdict | None  # what a reward gives for a completion
RewardFunction = Callable[[Sequence[Group], Sequence[Prompt]], Sequence[Sequence[RewardValue]]]


def names(package: str) -> list[str]:
    """Returns the names that a package's folder offers.

    They are its files that do not begin with an underscore.
    """
    folder = Path(importlib.import_module(package).__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find(package: str, name: str, function: str, key: str) -> Callable[..., Any]:
    """Returns `function` of the file `name` in a package's folder.

    If the name is `module:function`, it returns the function that this names.

    Raises UserError that begins with the config's `key` and lists what there is.
    """
    if ":" in name:
        return _outside(name, key)
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"{key}.{name}: no such {KINDS[function]}; have {', '.join(known)}, or "
            f"module:function{hint}"
        )
    module = importlib.import_module(f"{package}.{name}")
    plugin: Callable[..., Any] = getattr(module, function)
    return plugin


def _outside(name: str, key: str) -> Callable[..., Any]:
    module_name, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that a user's own data/ or rewards/ does not shadow ours
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}.{name}: {error} (looked in the installed packages, then in {here})"
        ) from None
    except Exception as error:
        raise UserError(
            f"{key}.{name}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{key}.{name}: {module.__file__} has no function {function!r}")
    plugin: Callable[..., Any] = getattr(module, function)
    return plugin


def rewards(chosen: Mapping[str, Reward], pool: Pool) -> dict[str, tuple[RewardFunction, float]]:
    """Returns each reward's function for whole rollouts, and its weight.

    Raises UserError before anything is judged.
    """
    return {name: (reward(name, spec.options, pool), spec.weight) for name, spec in chosen.items()}


def reward(name: str, options: Mapping[str, Any], pool: Pool) -> RewardFunction:
    """Returns a reward for whole groups from any of three kinds of function.

    They are told apart by their parameters. Ours is `f(completion, problem, **options) -> float |
    Score | Verdict | None`. TRL's is `f(prompts, completions, **columns) -> list`. The third,
    `f(groups, prompts, **options)`, sees a whole rollout: for rewards that ask a server.

    A function of ours whose file has a `TIMEOUT_S` runs in the pool. A `prepare(**options)` beside
    a function is called here, once, and may refuse.
    """
    function = find("rewards", name, "reward", "rewards")
    parameters = inspect.signature(function).parameters
    if len(parameters) < 2:
        takes = ", ".join(parameters)
        raise UserError(
            f"rewards.{name}: takes ({takes}); expected f(completion, problem) or f(prompts, "
            "completions, **columns)"
        )
    trl = "completions" in parameters
    try:
        inspect.signature(function).bind_partial(**options) if trl else inspect.signature(
            function
        ).bind(None, None, **options)
    except TypeError as error:
        raise UserError(f"rewards.{name}.options: {error}") from None
    file = sys.modules[function.__module__]
    getattr(file, "prepare", lambda **_: None)(**options)
    if "groups" in parameters:
        return functools.partial(function, **options)
    if trl:
        bound = functools.partial(function, **options)
        return lambda groups, prompts: [
            _call_trl(bound, name, group, prompt)
            for group, prompt in zip(groups, prompts, strict=True)
        ]
    if limit := getattr(file, "TIMEOUT_S", None):
        where = f"{function.__module__}:{function.__name__}"
        return lambda groups, _: _call_in_pool(
            functools.partial(pool.map, where, timeout_s=limit, options=options), name, groups
        )
    return lambda groups, _: [
        [_call(function, name, group, i, options) for i in range(len(group.completions))]
        for group in groups
    ]


def _call(
    function: Callable[..., Any], name: str, group: Group, i: int, options: Mapping[str, Any]
) -> Any:
    try:
        return function(group.completions[i], group.problem, **options)
    except Exception as error:
        raise failed(name, group, i, repr(error)) from error


def _call_in_pool(
    map_calls: Callable[[list[Any]], list[Any]], name: str, groups: Sequence[Group]
) -> list[list[Any]]:
    """Returns what `_call` would for every completion."""
    places = [(group, i) for group in groups for i in range(len(group.completions))]
    light = [replace(group.completions[i], logprobs=(), versions=()) for group, i in places]
    answers = map_calls(
        [(completion, group.problem) for completion, (group, _) in zip(light, places, strict=True)]
    )
    for n, ((group, i), answer) in enumerate(zip(places, answers, strict=True)):
        if isinstance(answer, Failure):
            if answer.kind == "error":
                raise failed(name, group, i, answer.reason)
            answers[n] = verdict_of(answer)
    return unflatten(answers, [len(group.completions) for group in groups])


def verdict_of(failure: Failure) -> Verdict:
    """Returns what a call that was killed is worth.

    It is undecided when we lost the call, and wrong when the call took too much.
    """
    return Verdict(
        value="undecided" if failure.kind in ("lost", "error") else "wrong", reason=failure.reason
    )


def failed(name: str, group: Group, i: int, error: str) -> RuntimeError:
    """Returns the error that names a reward and the completion on which it failed."""
    where = f"completion {i} of problem {group.problem.id}"
    return RuntimeError(
        f"reward {name} failed on {where}: {error}; its text: {group.completions[i].text[:300]!r}"
    )


def _call_trl(
    function: functools.partial[Any], name: str, group: Group, prompt: Prompt
) -> list[float | None]:
    size, problem = len(group.completions), group.problem
    texts = [completion.text for completion in group.completions]
    columns: dict[str, Any] = {
        "prompts": [prompt] * size,
        "completions": texts
        if isinstance(prompt, str)
        else [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(completion.token_ids) for completion in group.completions],
    } | {key: [value] * size for key, value in (problem.meta | _columns(problem)).items()}
    parameters = inspect.signature(function.func).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        columns = {key: value for key, value in columns.items() if key in parameters}
    # an option wins
    columns = {key: value for key, value in columns.items() if key not in function.keywords}
    try:
        values = list(function(**columns))
    except Exception as error:
        raise RuntimeError(
            f"reward {name} failed on the completions of problem {problem.id}: {error!r}"
        ) from error
    if len(values) != size:
        raise RuntimeError(
            f"reward {name} returned {len(values)} values for the {size} completions of problem "
            f"{problem.id}"
        )
    return values


def _columns(problem: Problem) -> dict[str, Any]:
    return {
        "question": problem.question,
        "answer": problem.answer,
        "solution": problem.solution,
        "source": problem.source,
    }
