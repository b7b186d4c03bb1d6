"""The doctor's check of gold answers: each of them is read once, as the rewards will read it.

A reward takes part if its file defines `check_problem(problem) -> str | None`, which returns why
the gold answer cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from grpo.config import DataSettings
from grpo.experience import plugins
from grpo.experience.undecided import MAX_ANSWER_CHARS, MAX_REASON_CHARS, shorten
from grpo.rewards.workers.pool import Failure, WorkerPool
from grpo.stages.stage import Check, StageNeeds
from grpo.types import Problem

MAX_GENERATED = 1000  # problems that are checked of a data set that is no list
MAX_SHOWN = 5  # gold answers per data set
TIMEOUT_S = 10.0  # per call, for a reward whose file defines no TIMEOUT_S
REMEDY = "correct these answers or remove the problems: their completions are undecided"

Problems = Mapping[str, Sequence[Problem]]  # by name of the data set


class _Reader(NamedTuple):
    """The `check_problem` of a reward.

    Example: `_Reader("accuracy", "grpo.rewards.accuracy:check_problem", 5)`.
    `function` is the name under which a worker imports it.
    """

    reward: str
    function: str
    timeout_s: float


class _Unreadable(NamedTuple):
    """A problem whose gold answer cannot be read, and the reason of each reward."""

    problem: Problem
    reasons: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _DataSetResult:
    """The gold answers of one data set. The check covers its first `num_checked` problems."""

    name: str
    num_problems: int
    num_checked: int
    unreadable: list[_Unreadable]

    @property
    def unreadable_share(self) -> float:
        return len(self.unreadable) / max(1, self.num_checked)


def gold_answers(
    needs: StageNeeds, training: Problems, held_out: Sequence[Problems]
) -> Iterator[Check]:
    """Yields a finding per data set, none if no reward of the stage can check gold answers.

    Unreadable gold answers are a warning. They are a failure if so many training problems have one
    that the run would stop.

    Args:
        needs: The needs of the stage, with its config.
        training: The training problems.
        held_out: The problems of each held-out section.
    """
    config = needs.config
    readers = _find_readers(needs.rewards)
    if not readers:
        return
    pool_settings = config.reward_pool
    with WorkerPool(pool_settings.workers, memory_gb=pool_settings.memory_gb) as pool:
        training_results = _read(training, readers, pool)
        level: Literal["warn", "fail"] = "warn"
        if needs.memory.syncs_weights:  # a training loop
            share = _share_of_mixture(training_results, needs.problems.training)
            level = "fail" if share > config.max_undecided else "warn"
        for result in training_results:
            yield _finding(result, "train", readers, level)
        for problems in held_out:
            for result in _read(problems, readers, pool):
                yield _finding(result, "test", readers, "warn")


def _find_readers(rewards: Collection[str]) -> list[_Reader]:
    readers = []
    for name in rewards:
        check_problem = plugins.companion("grpo.rewards", name, "reward", "check_problem")
        if check_problem is not None:
            module = sys.modules[check_problem.__module__]
            timeout_s = getattr(module, "TIMEOUT_S", TIMEOUT_S)
            readers.append(_Reader(name, f"{module.__name__}:check_problem", timeout_s))
    return readers


def _read(problems: Problems, readers: Sequence[_Reader], pool: WorkerPool) -> list[_DataSetResult]:
    """Reads the gold answers of each data set.

    A data set that is no list may generate its problems, and may be endless. Only its first
    MAX_GENERATED problems are checked.
    """
    results = []
    for name, problems_of_set in problems.items():
        checked = problems_of_set
        if not isinstance(problems_of_set, list):
            num_checked = min(MAX_GENERATED, len(problems_of_set))
            checked = [problems_of_set[index] for index in range(num_checked)]
        results.append(
            _DataSetResult(
                name=name,
                num_problems=len(problems_of_set),
                num_checked=len(checked),
                unreadable=_unreadable(checked, readers, pool),
            )
        )
    return results


def _unreadable(
    problems: Sequence[Problem], readers: Sequence[_Reader], pool: WorkerPool
) -> list[_Unreadable]:
    """Returns the problems whose gold answer a reward cannot read, in order."""
    reasons: dict[int, list[str]] = {}  # by index of the problem
    calls = [(problem,) for problem in problems]
    for reader in readers:
        answers = pool.map(reader.function, calls, timeout_s=reader.timeout_s)
        for index, answer in enumerate(answers):
            reason = answer.reason if isinstance(answer, Failure) else answer
            if reason is not None:
                shortened = shorten(" ".join(reason.split()), MAX_REASON_CHARS)
                reasons.setdefault(index, []).append(f"{reader.reward}: {shortened}")
    return [_Unreadable(problems[index], "; ".join(reasons[index])) for index in sorted(reasons)]


def _share_of_mixture(results: Sequence[_DataSetResult], data: DataSettings | None) -> float:
    """Returns the expected share of drawn problems whose gold answer cannot be read."""
    if data is None:
        return 0.0
    weights = {name: source.weight for name, source in data.data_sets.items()}
    share = sum(weights[result.name] * result.unreadable_share for result in results)
    return share / sum(weights.values())


def _finding(
    result: _DataSetResult,
    split: str,
    readers: Sequence[_Reader],
    level: Literal["warn", "fail"],
) -> Check:
    count = f"{result.num_checked:,}"
    if result.num_checked < result.num_problems:
        count = f"the first {count} of {result.num_problems:,} generated"
    rewards = ", ".join(reader.reward for reader in readers)
    num_unreadable = len(result.unreadable)
    if num_unreadable == 0:
        message = f"{result.name}, {split}: {count} gold answers can be read by {rewards}"
        return Check("ok", "gold_answers", message)
    lines = [
        f"{result.name}, {split}: {num_unreadable:,} of {count} gold answers cannot be read "
        f"({result.unreadable_share:.2%})"
    ]
    for problem, reasons in result.unreadable[:MAX_SHOWN]:
        lines.append(f"{problem.id}: {shorten(problem.answer, MAX_ANSWER_CHARS)!r} ({reasons})")
    if num_unreadable > MAX_SHOWN:
        lines.append(f"and {num_unreadable - MAX_SHOWN:,} more")
    remedy = REMEDY
    if level == "fail":
        remedy = f"{REMEDY}, and the run would stop (reward_pool.max_failed)"
    return Check(level, "gold_answers", "\n".join(lines), remedy)
