"""The problems that a stage works on: loaded, mixed, held out for evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grpo import config as configs
from grpo.experience import plugins
from grpo.experience.prompts import Chat, Prompts
from grpo.types import Problem, UserError

if TYPE_CHECKING:
    from data.common.mixture import Mixture


def load_problems(data: configs.Data, split: str, seed: int) -> dict[str, Sequence[Problem]]:
    """Returns the problems of every set of a data section, by the set's name.

    Args:
        data: The data section.
        split: `train` or `test`.
        seed: The run's seed, for sets that are generated.

    Raises:
        UserError: A set, a file or a line of one is wrong; the message names it.
    """
    problems = {}
    for name, source in data.sources.items():
        load = plugins.find("data", name, "load", "data")
        try:
            inspect.signature(load).bind(split, seed=seed, path=source.path, **source.options)
        except TypeError as error:
            raise UserError(f"data.{name}.options: {error}") from None
        problems[name] = load(split, seed=seed, path=source.path, **source.options)
    return problems


def mixture(
    data: configs.Data,
    problems: Mapping[str, Sequence[Problem]],
    prompts: Prompts | Chat,
    seed: int,
) -> Mixture:
    """Returns the stream of all problems whose prompts fit, in the order of the run."""
    from data.common.mixture import Mixture

    weights = {name: source.weight for name, source in data.sources.items()}
    fitting = {name: prompts.fitting(rows) for name, rows in problems.items()}
    return Mixture(fitting, weights, seed, data.curriculum)


def held_out(
    data: configs.Data,
    problems: Mapping[str, Sequence[Problem]],
    prompts: Prompts | Chat,
    count: int,
) -> list[Problem]:
    """Returns at most `count` different problems for an evaluation.

    They are the same for every seed and do not follow a curriculum.
    """
    without_curriculum = data.model_copy(update={"curriculum": None})
    stream = mixture(without_curriculum, problems, prompts, 0)
    return without_repeats(stream.take(0, count))


def without_repeats(problems: Sequence[Problem]) -> list[Problem]:
    """Returns the problems in order, each id once."""
    return list({problem.id: problem for problem in problems}.values())
