"""Loads the problems of a stage, mixes data sets, and selects held-out problems for evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo import config as configs
from grpo.experience import plugins
from grpo.experience.prompts import ChatPrompts, Prompts
from grpo.types import DownloadError, Problem, UserError

if TYPE_CHECKING:
    from grpo.data.common.mixture import Mixture

# Key of a data section -> the parameter of `load` that receives it.
LOAD_PARAMETERS = {"split": "stored_split", "columns": "columns"}
# Parameter of `load` that is no option -> the key that sets it.
KEYS_OF_PARAMETERS = {
    "split": "data.split",
    "seed": "seed",
    "path": "data.path",
    "malformed": "data.malformed",
}
MAX_REFUSED_SHOWN = 5  # problems per message
MAX_SETS_SHOWN = 3  # messages about evaluation sets
MIN_SEEN = 200  # problems, see check_dropped
HELD_OUT_SEED = 0  # the same for all runs, so that their evaluations have the same problems


def load_problems(
    data: configs.DataSettings,
    split: str,
    seed: int,
    rewards: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Sequence[Problem]]:
    """Returns the problems of a data section by data set: `{"gsm8k": [Problem(...), ...]}`.

    Args:
        data: The data section.
        split: "train" or "test".
        seed: The run's seed, for data sets that are generated.
        rewards: The names of the rewards that will score the problems. Those with a function
            `read_problem` read each problem of a list, and can refuse it.
        say: Receives a line if rows were dropped.

    Raises:
        UserError: A data set, its options, a file or a line is wrong, or a reward refuses a
            problem. The message names it.
    """
    problems = {}
    for name, source in data.data_sets.items():
        load = plugins.find_function("grpo.data", source.name or name, "load", "data")
        arguments = _load_arguments(data, name, source, load)
        malformed: list[str] = []
        if data.malformed == "drop":
            arguments["malformed"] = malformed
        problems[name] = load(split, seed=seed, **arguments)
        if malformed:
            num_rows = len(problems[name]) + len(malformed)
            # The malformed rows of both splits are compared with the problems of this split.
            max_dropped = data.max_dropped if split == "train" else 1.0
            check_dropped(f"data.{name}", malformed, num_rows, max_dropped, say)
        for reward in rewards:
            problems[name] = _read_by_reward(problems[name], name, reward)
        is_renamed = source.name != name
        problems[name] = _with_data_set(problems[name], name, in_ids=is_renamed)
    return problems


def _with_data_set(
    problems: Sequence[Problem], data_set: str, *, in_ids: bool
) -> Sequence[Problem]:
    """Returns the problems with the name of their data set in the config.

    With `in_ids`, their ids start with it, too. Two entries of a mixture with the same data set can
    have problems with the same ids. Pass rates, seeds and the selection of held-out problems depend
    on the ids.
    """
    from grpo.data.common.procedural import GeneratedProblems

    prefix = f"{data_set}/" if in_ids else ""

    def named(index: int) -> Problem:
        problem = problems[index]
        return replace(problem, id=prefix + problem.id, data_set=data_set)

    if isinstance(problems, list):
        return [named(index) for index in range(len(problems))]
    return GeneratedProblems(len(problems), named)


def _load_arguments(
    data: configs.DataSettings,
    name: str,
    source: configs.DataSetSettings,
    load: Callable[..., Sequence[Problem]],
) -> dict[str, Any]:
    """Returns the keyword arguments of a data set's `load`, except seed and malformed.

    Raises:
        UserError: `load` does not take one of the options, or one of the keys of the section.
    """
    signature = inspect.signature(load)
    for option in source.options:
        if option in KEYS_OF_PARAMETERS:
            key = KEYS_OF_PARAMETERS[option]
            raise UserError(f"data.{name}.options.{option}: no option: set the key {key}")
    try:
        signature.bind("train", seed=0, path=source.path, **source.options)
    except TypeError as error:
        raise UserError(
            f"data.{name}.options: {error}. Options: {_options_of(signature)}"
        ) from None
    arguments = {"path": source.path, **source.options}
    section = f"data.mixture.{name}" if data.mixture else "data"
    for key, parameter in LOAD_PARAMETERS.items():
        if parameter in source.options:
            raise UserError(f"{section}.options.{parameter}: set {section}.{key}")
        value = getattr(source, key)
        if not value:
            continue
        if parameter not in signature.parameters:
            raise UserError(
                f"{section}.{key}: the data set {source.name} cannot use it; "
                f"{_sets_with(parameter)} can. Remove it."
            )
        arguments[parameter] = value
    if data.malformed == "drop" and "malformed" not in signature.parameters:
        raise UserError(
            f"data.malformed=drop: the data set {source.name} cannot drop rows; "
            f"{_sets_with('malformed')} can"
        )
    return arguments


def _options_of(signature: inspect.Signature) -> str:
    """Returns the names of the options of a `load`: "digits, operations", or "none"."""
    set_elsewhere = {*KEYS_OF_PARAMETERS, *LOAD_PARAMETERS.values()}
    names = [name for name in signature.parameters if name not in set_elsewhere]
    return ", ".join(names) or "none"


def _sets_with(parameter: str) -> str:
    """Returns the data sets whose `load` has a parameter: "hub, jsonl and traces"."""
    names = []
    for name in plugins.plugin_names("grpo.data"):
        load = plugins.find_function("grpo.data", name, "load", "data")
        if parameter in inspect.signature(load).parameters:
            names.append(name)
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def load_evaluation_sets(
    set_configs: Mapping[str, configs.EvalConfig], say: Callable[[str], None] = print
) -> dict[str, dict[str, Sequence[Problem]]]:
    """Returns the problems of each evaluation set by name, as `load_problems` does.

    All sets are tried, so that the message names every set that has no problems.

    Args:
        set_configs: The config of each set, as `EvalConfig.set_configs` returns them.
        say: Receives a line if rows were dropped.

    Raises:
        UserError: The problems of a set cannot be had. DownloadError if all failures are ones.
    """
    for config in set_configs.values():
        _check_folder(config)
    problems = {}
    errors: dict[str, UserError] = {}
    for name, config in set_configs.items():
        data = config.evaluation_sets[name]
        try:
            problems[name] = load_problems(data, "test", config.seed, config.rewards, say)
        except UserError as error:
            errors[name] = error
    if "" in errors:  # the only set
        raise errors[""]
    if not errors:
        return problems
    raise _error_of_sets(errors)


def _error_of_sets(errors: Mapping[str, UserError]) -> UserError:
    """Returns one error for the errors of several sets, by name of the set."""
    messages = [f"sets.{name}: {error}" for name, error in errors.items()]
    shown = "; ".join(message.removesuffix(".") for message in messages[:MAX_SETS_SHOWN])
    num_others = len(messages) - MAX_SETS_SHOWN
    others = f"; and {num_others} more" if num_others > 0 else ""
    removals = " ".join(f"sets.{name}=" for name in errors)
    text = f"{shown}{others}. To evaluate without these sets: {removals}"
    if all(isinstance(error, DownloadError) for error in errors.values()):
        return DownloadError(text)
    return UserError(text)


def _check_folder(config: configs.EvalConfig) -> None:
    """Raises UserError if `data.path`, without a problem set of its own, is a single file."""
    path = config.data.path
    if not config.sets or config.data.has_problems or path is None:
        return
    if Path(path).expanduser().is_file():
        raise UserError(
            f"data.path={path}: a file, expected the folder with the files of all sets. For one "
            "set, set sets.NAME.path"
        )


def check_dropped(
    where: str,
    reasons: Sequence[str],
    num_seen: int,
    max_dropped: float,
    say: Callable[[str], None],
) -> None:
    """Reports how many problems were dropped. Raises UserError if they are too many.

    Args:
        where: The data set or the stage.
        reasons: The reason for each problem.
        num_seen: Number of problems, with those that were dropped.
        max_dropped: The largest share that may be dropped, of at least MIN_SEEN problems.
        say: Receives the report.
    """
    message = (
        f"{where}: dropped {len(reasons):,} of {num_seen:,} problems, for example: {reasons[0]}"
    )
    # A few problems are not enough to tell a share.
    if len(reasons) > max_dropped * max(num_seen, MIN_SEEN):
        raise UserError(
            f"{message}. These are more than data.max_dropped={max_dropped}: correct the data, or "
            "raise the limit"
        )
    say(message)


def _read_by_reward(problems: Sequence[Problem], data_set: str, reward: str) -> Sequence[Problem]:
    """Returns problems as a reward reads them. Problems that are generated are not read.

    Raises:
        UserError: The reward refuses a problem.
    """
    read_problem = plugins.companion("grpo.rewards", reward, "reward", "read_problem")
    if read_problem is None or not isinstance(problems, list):
        return problems
    read = []
    refused = []
    for problem in problems:
        try:
            read.append(read_problem(problem))
        except ValueError as error:
            refused.append(f"{problem.id} ({error})")
    if refused:
        shown = "; ".join(refused[:MAX_REFUSED_SHOWN])
        raise UserError(
            f"data.{data_set}: the reward {reward} cannot judge {len(refused):,} of "
            f"{len(problems):,} problems: {shown}. Correct or remove them."
        )
    return read


def make_mixture(
    data: configs.DataSettings,
    problems: Mapping[str, Sequence[Problem]],
    prompts: Prompts | ChatPrompts,
    seed: int,
) -> Mixture:
    """Returns the endless mixture of the problems whose prompts fit, in the order of the run.

    Args:
        data: The data section: weights and curriculum.
        problems: The problems by data set, as `load_problems` returns them.
        prompts: Determines which prompts fit.
        seed: Determines the order.
    """
    from grpo.data.common.mixture import Mixture

    weights = {name: source.weight for name, source in data.data_sets.items()}
    fitting = {name: prompts.without_overlong(rows) for name, rows in problems.items()}
    return Mixture(fitting, weights, seed, data.curriculum)


def select_held_out(
    data: configs.DataSettings,
    problems: Mapping[str, Sequence[Problem]],
    prompts: Prompts | ChatPrompts,
    count: int,
) -> list[Problem]:
    """Returns at most `count` different problems for an evaluation.

    The selection does not depend on the run's seed or curriculum.
    """
    without_curriculum = data.model_copy(update={"curriculum": None})
    mixture = make_mixture(without_curriculum, problems, prompts, HELD_OUT_SEED)
    return without_repeats(mixture.take(0, count))


def without_repeats(problems: Sequence[Problem]) -> list[Problem]:
    """Returns the problems in order, each id once."""
    problem_by_id = {problem.id: problem for problem in problems}
    return list(problem_by_id.values())
