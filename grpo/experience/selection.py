"""Which problems are drawn, and which groups are learned from: dynamic sampling and filters.

State over time, all of it in the checkpoint: the position in the data, groups sampled and not yet
used, and each problem's pass rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.config.algorithm import Algorithm
from grpo.learning.advantages import has_signal
from grpo.types import Completion, Exhausted, Group, Problem, ScoredGroup, UserError, Verdict

if TYPE_CHECKING:
    from grpo.experience.stream import Stream

MAX_REFUSED = 10_000  # problems in a row that the filters may refuse
MIN_SHARE_THAT_TEACHES = 1 / 8  # a sampling takes at most 8 problems per missing group


@dataclass(kw_only=True)
class Selection:
    """Draws the problems of a rollout and chooses the groups to learn from."""

    algorithm: Algorithm
    size: int  # groups a rollout learns from
    take: Callable[[int, int], list[Problem]]  # (position, n) -> training problems
    position: int = 0
    carried: list[ScoredGroup] = field(default_factory=list)
    # problem id -> share of its last group that was right
    rates: dict[str, float] = field(default_factory=dict)
    fresh: list[ScoredGroup] = field(default_factory=list)  # what this rollout has sampled so far
    # asynchronous rollouts, on rank 0: samples groups ahead, of problems that it draws itself
    stream: Stream | None = None
    # asynchronous rollouts, on every rank: returns the stream's next groups
    streamed: Callable[[int], list[ScoredGroup]] | None = None

    def collect(
        self, sample: Callable[[list[Problem], int], list[ScoredGroup]]
    ) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """Returns `(fresh, used)`: the groups sampled now, and those to learn from.

        `sample(problems, number)` samples and scores; `number` counts its calls from 0. Raises
        Exhausted.
        """
        self.fresh = []
        no_signal = self.algorithm.no_signal
        if no_signal == "resample":
            return self._collect_until_full(sample)
        self.fresh = self._sample(sample, self.size, 0)
        if no_signal == "keep":
            return self.fresh, list(self.fresh)
        return self.fresh, [scored for scored in self.fresh if has_signal(scored.rewards)]

    def _collect_until_full(
        self, sample: Callable[[list[Problem], int], list[ScoredGroup]]
    ) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """Samples until `size` groups have right and wrong completions.

        What is left over is carried to the next rollout. Raises Exhausted after `max_rounds`.

        Source: DAPO 2503.14476 Eq. 11.
        """
        used = list(self.carried)
        for number in range(self.algorithm.max_rounds):
            num_missing = self.size - len(used)
            if num_missing <= 0:
                break
            count = min(self.size, math.ceil(num_missing / self._share_that_teaches()))
            groups = self._sample(sample, count, number)
            self.fresh += groups
            used += [scored for scored in groups if teaches(scored)]
        if len(used) < self.size:
            raise self._too_few(len(used))
        self.carried = used[self.size :]
        return self.fresh, used[: self.size]

    def _share_that_teaches(self) -> float:
        """Returns the share of this rollout's groups that teach, 1 before the first."""
        if not self.fresh:
            return 1.0
        num_teaching = sum(teaches(scored) for scored in self.fresh)
        return max(MIN_SHARE_THAT_TEACHES, num_teaching / len(self.fresh))

    def _too_few(self, num_used: int) -> Exhausted:
        num_without_reward = 0
        for scored in self.fresh:
            decided = [reward for reward in scored.rewards if reward is not None]
            if max(decided, default=0) <= 0:
                num_without_reward += 1
        return Exhausted(
            f"algorithm.no_signal=resample: {len(self.fresh)} groups in "
            f"{self.algorithm.max_rounds} samplings gave {num_used} of {self.size} that are "
            f"neither all right nor all wrong ({num_without_reward} have no reward above 0): the "
            "problems are too hard or too easy for this model, or a reward cannot read its "
            "answers (see samples/); change the data, raise max_rounds, or set no_signal=keep"
        )

    def _sample(
        self, sample: Callable[[list[Problem], int], list[ScoredGroup]], count: int, number: int
    ) -> list[ScoredGroup]:
        """Returns `count` new groups, of the stream if there is one, and notes their pass rates."""
        if self.streamed is not None:
            groups = self.streamed(count)
        else:
            groups = sample(self.draw(count), number)
        if self._has_filters:
            for scored in groups:
                self.rates[scored.group.problem.id] = pass_rate(scored)
        return groups

    @property
    def _has_filters(self) -> bool:
        return self.algorithm.drop_solved is not None or self.algorithm.pass_rate is not None

    def draw(self, count: int) -> list[Problem]:
        """Returns the next problems that no filter refuses.

        Raises Exhausted when there seem to be none.
        """
        problems: list[Problem] = []
        num_refused = 0  # in a row
        while len(problems) < count:
            (problem,) = self.take(self.position, 1)
            self.position += 1
            if self._passes_filters(problem):
                problems.append(problem)
                num_refused = 0
                continue
            num_refused += 1
            if num_refused == MAX_REFUSED:
                raise Exhausted(
                    f"algorithm.drop_solved and pass_rate refuse the last {num_refused} problems: "
                    "the model has learned what this data can teach, or the bounds are too narrow"
                )
        return problems

    def _passes_filters(self, problem: Problem) -> bool:
        """Returns whether the problem's pass rate, if it is known, is within the filters."""
        if not self._has_filters:
            return True
        rate = self.rates.get(problem.id, problem.meta.get("pass_rate"))
        if rate is None:
            return True
        if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise UserError(
                f"problem {problem.id}: meta.pass_rate is {rate!r}; give a share in [0, 1]"
            )
        low, high = self.algorithm.pass_rate or (0.0, 1.0)
        is_solved = self.algorithm.drop_solved is not None and rate >= self.algorithm.drop_solved
        return low <= rate <= high and not is_solved

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: position, carried groups, pass rates, and the stream."""
        state = {
            "position": self.position,
            "carried": self.carried,
            "rates": dict(self.rates),
        }
        if self.stream is not None:
            state["stream"] = self.stream.state()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Restores position, carried groups and pass rates from a checkpoint's state."""
        self.position = state["position"]
        self.rates = dict(state["rates"])
        self.carried = [scored_group(tree) for tree in state["carried"]]


def teaches(scored: ScoredGroup) -> bool:
    """Returns whether a group has right and wrong completions.

    Without verdicts it returns whether the rewards differ.
    """
    values = {verdict.value for verdict in scored.verdicts if verdict is not None}
    if not values:
        return has_signal(scored.rewards)
    return "correct" in values and "wrong" in values


def pass_rate(scored: ScoredGroup) -> float:
    """Returns the share of a group that was right, 0 if nothing of it was decided.

    Without verdicts it is the share with the highest reward if rewards differ, else 0.
    """
    is_right = [
        verdict.value == "correct"
        for verdict in scored.verdicts
        if verdict is not None and verdict.value != "undecided"
    ]
    if not is_right and has_signal(scored.rewards):
        decided = [reward for reward in scored.rewards if reward is not None]
        is_right = [reward == max(decided) for reward in decided]
    if not is_right:
        return 0.0
    return sum(is_right) / len(is_right)


def scored_group(tree: dict[str, Any]) -> ScoredGroup:
    """Returns a scored group from its tree in a checkpoint (grpo/run/directory.py)."""
    group = tree["group"]
    return ScoredGroup(
        group=Group(
            problem=Problem(**group["problem"]),
            prompt_ids=tuple(group["prompt_ids"]),
            completions=tuple(_completion(row) for row in group["completions"]),
        ),
        rewards=tuple(tree["rewards"]),
        parts=tuple(tree["parts"]),
        faults=tuple(tree["faults"]),
        verdicts=tuple(
            None if verdict is None else Verdict(**verdict) for verdict in tree["verdicts"]
        ),
    )


def _completion(row: dict[str, Any]) -> Completion:
    """Returns a completion; JSON has lists where it has tuples."""
    fields = dict(row)
    fields["token_ids"] = tuple(row["token_ids"])
    fields["logprobs"] = tuple(row["logprobs"])
    fields["versions"] = tuple(tuple(span) for span in row["versions"])
    return Completion(**fields)
