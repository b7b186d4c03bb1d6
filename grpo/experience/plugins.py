"""Finds the functions that a config names: rewards, problem sets and losses.

A name is a file in a folder (`accuracy` is `rewards/accuracy.py`). A function outside this
repository is named `package.module:function` or `path/to/file.py:function`. `load_reward` adapts
the three supported kinds of reward function to one interface, `RewardFunction`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.config import RewardSettings
from grpo.config.reading import did_you_mean
from grpo.learning.advantages import unflatten
from grpo.rewards.workers.modules import add_to_search_path, import_module
from grpo.rewards.workers.pool import Failure, WorkerPool
from grpo.types import Completion, Group, GrpoError, Score, UserError, Verdict

# The function that a plugin file defines -> the kind of plugin, for messages.
_KINDS = {"reward": "reward", "load": "data set", "loss": "loss"}
Prompt = str | list[dict[str, str]]  # text, or the messages of a chat, as in TRL
RewardValue = float | Score | Verdict | None  # None: the reward does not apply to the completion
# Takes groups and their prompts, returns one value per group and completion.
RewardFunction = Callable[[Sequence[Group], Sequence[Prompt]], Sequence[Sequence[RewardValue]]]


def plugin_names(package: str) -> list[str]:
    """Returns the plugins in a package's folder: its files without a leading underscore."""
    folder = Path(importlib.import_module(package).__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find_function(package: str, name: str, function: str, key: str) -> Callable[..., Any]:
    """Returns the function that a config names.

    Args:
        package: The package with the plugin files, for example `grpo.rewards`.
        name: A file in that package, `module:function` or `path/to/file.py:function`.
        function: The function that a plugin file defines: `reward`, `load` or `loss`.
        key: The config key, for error messages.

    Raises:
        UserError: The name is unknown, its module cannot be imported, or `module` has no
            `function`.
    """
    if ":" in name:
        return _import_function(name, key)
    available = plugin_names(package)
    if name not in available:
        raise UserError(
            f"{key}.{name}: unknown {_KINDS[function]}{did_you_mean(name, available)}. Available: "
            f"{', '.join(available)}. Or name your own function as module:function or "
            "path/to/file.py:function."
        )
    module = importlib.import_module(f"{package}.{name}")
    plugin: Callable[..., Any] = getattr(module, function)
    return plugin


def companion(
    package: str, name: str, function: str, companion_name: str
) -> Callable[..., Any] | None:
    """Returns another function of the file with a plugin's function, None if it has none.

    `companion("grpo.rewards", "accuracy", "reward", "check_problem")` is the function
    `check_problem` of rewards/accuracy.py. The arguments are those of `find_function`.
    """
    key = package.removeprefix("grpo.")
    module = sys.modules[find_function(package, name, function, key).__module__]
    other_function: Callable[..., Any] | None = getattr(module, companion_name, None)
    return other_function


def _import_function(name: str, key: str) -> Callable[..., Any]:
    """Imports `module:function` from the installed packages or the working directory, or a file."""
    module_name, _, function = name.rpartition(":")
    working_dir = Path.cwd()
    add_to_search_path(working_dir)
    try:
        module = import_module(module_name)
    except FileNotFoundError as error:
        raise UserError(f"{key}.{name}: {error}") from None
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{key}.{name}: {module_name} imports a module that is missing: {error}"
            ) from None
        raise UserError(
            f"{key}.{name}: {error} (searched the installed packages, then {working_dir}; a file "
            "elsewhere is named path/to/file.py:function)"
        ) from None
    except Exception as error:
        raise UserError(
            f"{key}.{name}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{key}.{name}: {module.__file__} has no function {function!r}")
    plugin: Callable[..., Any] = getattr(module, function)
    return plugin


def rewards(
    section: Mapping[str, RewardSettings], pool: WorkerPool
) -> dict[str, tuple[RewardFunction, float]]:
    """Returns function and weight of each reward in the config section `rewards`.

    Raises:
        UserError: A reward is unknown, or its options are wrong.
    """
    functions_and_weights = {}
    for name, settings in section.items():
        function = load_reward(name, settings.options, pool)
        functions_and_weights[name] = (function, settings.weight)
    return functions_and_weights


def load_reward(name: str, options: Mapping[str, Any], pool: WorkerPool) -> RewardFunction:
    """Returns a reward as a function of groups and their prompts.

    Three kinds of reward function are supported. The kind is determined by the parameter names.

    - `f(completion, problem, **options) -> float | Score | Verdict | None` scores one completion.
      If its module defines `TIMEOUT_S`, each call runs in `pool` under this limit, in seconds.
    - `f(prompts, completions, **columns) -> list` has TRL's interface and scores one group per
      call. `columns` are the problem's fields and the options.
    - `f(groups, prompts, **options) -> list of lists` scores all groups in one call, for example
      with concurrent requests to a server.

    If the module of `f` defines `prepare(**options)`, this function calls it to check the options
    before any completion is sampled.

    An exception in the user's own function is raised. One in a function of the first kind in
    `rewards/` makes the completion undecided instead, so that a bug there does not end a long run.

    Raises:
        UserError: The reward is unknown, its parameters are of no supported kind, the options do
            not match them, or `prepare` rejects the options.
    """
    function = find_function("grpo.rewards", name, "reward", "rewards")
    parameters = inspect.signature(function).parameters
    if len(parameters) < 2:
        raise UserError(
            f"rewards.{name}: unsupported parameters ({', '.join(parameters)}). Expected "
            "f(completion, problem), f(prompts, completions, **columns) or f(groups, prompts)."
        )
    is_trl = "completions" in parameters
    _check_options(function, name, options, is_trl)
    module = sys.modules[function.__module__]
    if hasattr(module, "prepare"):
        module.prepare(**options)
    if "groups" in parameters:
        return functools.partial(function, **options)
    if is_trl:
        return _TrlReward(name=name, function=function, options=options)
    timeout_s = getattr(module, "TIMEOUT_S", None)
    if timeout_s:
        return _PooledReward(
            name=name, function=function, options=options, timeout_s=timeout_s, pool=pool
        )
    return _CompletionReward(name=name, function=function, options=options)


def _is_built_in(function: Callable[..., Any]) -> bool:
    """Returns whether a reward function is in `rewards/`."""
    return function.__module__.startswith("grpo.rewards.")


def _check_options(
    function: Callable[..., Any], name: str, options: Mapping[str, Any], is_trl: bool
) -> None:
    """Raises UserError if a reward function cannot be called with the options."""
    signature = inspect.signature(function)
    try:
        if is_trl:
            signature.bind_partial(**options)
        else:
            signature.bind(None, None, **options)
    except TypeError as error:
        raise UserError(f"rewards.{name}.options: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _CompletionReward:
    """A reward function of one completion, called in this process."""

    name: str
    function: Callable[..., RewardValue]
    options: Mapping[str, Any]

    def __call__(
        self, groups: Sequence[Group], prompts: Sequence[Prompt]
    ) -> list[list[RewardValue]]:
        return [self._values_of_group(group) for group in groups]

    def _values_of_group(self, group: Group) -> list[RewardValue]:
        values: list[RewardValue] = []
        for index, completion in enumerate(group.completions):
            try:
                value = self.function(completion, group.problem, **self.options)
            except Exception as error:
                # A GrpoError is not a bug: the reward rejects the config or the data.
                if isinstance(error, GrpoError) or not _is_built_in(self.function):
                    raise reward_error(self.name, group, index, repr(error)) from error
                reason = f"{type(error).__name__}: {error}"
                value = verdict_for_failure(Failure(kind="error", reason=reason))
            values.append(value)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class _PooledReward:
    """A reward function of one completion, called in the worker pool under a time limit."""

    name: str
    function: Callable[..., RewardValue]
    options: Mapping[str, Any]
    timeout_s: float
    pool: WorkerPool

    def __call__(
        self, groups: Sequence[Group], prompts: Sequence[Prompt]
    ) -> list[list[RewardValue]]:
        calls = []
        for group in groups:
            for completion in group.completions:
                calls.append((_without_token_data(completion), group.problem))
        results = self.pool.map(
            f"{self.function.__module__}:{self.function.__name__}",
            calls,
            timeout_s=self.timeout_s,
            options=self.options,
        )
        results_by_group = unflatten(results, [len(group.completions) for group in groups])
        return [
            self._values_of_group(group, group_results)
            for group, group_results in zip(groups, results_by_group, strict=True)
        ]

    def _values_of_group(
        self, group: Group, results: Sequence[RewardValue | Failure]
    ) -> list[RewardValue]:
        values: list[RewardValue] = []
        for index, result in enumerate(results):
            if not isinstance(result, Failure):
                values.append(result)
            elif result.kind == "error" and not _is_built_in(self.function):
                raise reward_error(self.name, group, index, result.reason)
            else:
                values.append(verdict_for_failure(result))
        return values


def _without_token_data(completion: Completion) -> Completion:
    """Returns a completion without logprobs and versions, which workers do not need."""
    return replace(completion, logprobs=(), versions=())


def verdict_for_failure(failure: Failure) -> Verdict:
    """Converts a failed call of a reward worker to a verdict.

    It is `undecided` if the worker was lost or the function raised an exception, and `wrong` if the
    call exceeded its time or memory limit or crashed the worker.
    """
    if failure.kind == "lost":
        return Verdict(value="undecided", reason=f"worker lost: {failure.reason}")
    if failure.kind == "error":
        return Verdict(value="undecided", reason=f"reward failed: {failure.reason}")
    return Verdict(value="wrong", reason=failure.reason)


def reward_error(name: str, group: Group, index: int, error: str) -> RuntimeError:
    """Returns the error for a reward that failed on completion `index` of a group."""
    return RuntimeError(
        f"reward {name} failed on completion {index} of problem {group.problem.id}: {error}; "
        f"completion text: {group.completions[index].text[:300]!r}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrlReward:
    """A reward function with TRL's interface, called once per group."""

    name: str
    function: Callable[..., Sequence[float | None]]
    options: Mapping[str, Any]

    def __call__(
        self, groups: Sequence[Group], prompts: Sequence[Prompt]
    ) -> list[list[float | None]]:
        return [
            self._values_of_group(group, prompt)
            for group, prompt in zip(groups, prompts, strict=True)
        ]

    def _values_of_group(self, group: Group, prompt: Prompt) -> list[float | None]:
        columns = self._accepted(_trl_columns(group, prompt))
        try:
            return list(self.function(**self.options, **columns))
        except Exception as error:
            raise RuntimeError(
                f"reward {self.name} failed on the completions of problem {group.problem.id}: "
                f"{error!r}"
            ) from error

    def _accepted(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns that the function accepts, except those that are options."""
        parameters = inspect.signature(self.function).parameters
        accepts_all = any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )
        accepted = {}
        for key, column in columns.items():
            if key not in self.options and (accepts_all or key in parameters):
                accepted[key] = column
        return accepted


def _trl_columns(group: Group, prompt: Prompt) -> dict[str, Any]:
    """Returns the keyword arguments of a TRL reward function, lists of one value per completion.

    They are `prompts`, `completions` and `completion_ids`, as in TRL. The fields of the problem and
    of its `meta` stand for the columns of TRL's dataset.
    """
    size = len(group.completions)
    problem = group.problem
    completions: list[Any] = [completion.text for completion in group.completions]
    if not isinstance(prompt, str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    columns: dict[str, Any] = {
        "prompts": [prompt] * size,
        "completions": completions,
        "completion_ids": [list(completion.token_ids) for completion in group.completions],
    }
    fields = {
        **problem.meta,
        "question": problem.question,
        "answer": problem.answer,
        "solution": problem.solution,
        "source": problem.source,
    }
    for key, value in fields.items():
        columns[key] = [value] * size
    return columns
