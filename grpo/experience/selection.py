"""Which problems are drawn, and which groups are learned from.

Dynamic sampling with carried groups, pass rates, filters.

State over time, all of it in the checkpoint: the position in the data, groups sampled and not yet
used, and each problem's pass rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.config.algorithm import Algorithm
from grpo.learning.advantages import has_signal
from grpo.types import Completion, Exhausted, Group, Problem, ScoredGroup, UserError, Verdict

if TYPE_CHECKING:
    from grpo.experience.stream import Stream

MAX_SKIPPED = 10_000  # problems in a row that a filter may refuse


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
    # with asynchronous rollouts, on rank 0: where groups come from, of problems that it draws
    # itself
    stream: Stream | None = None
    # the next groups of it, on every rank
    streamed: Callable[[int], list[ScoredGroup]] | None = None

    def collect(
        self, sample: Callable[[list[Problem], int], list[ScoredGroup]]
    ) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """Returns `(fresh, used)`: the groups sampled now, and those to learn from.

        `sample(problems, round)` samples and scores.

        `resample` (DAPO 2503.14476 Eq. 11) goes on until `size` groups have right and wrong
        completions. What is left over is not thrown away: it is carried to the next rollout. Raises
        Exhausted after `max_rounds`.
        """
        fresh = self.fresh = []
        if self.algorithm.no_signal != "resample":
            fresh += self._scored(sample, self.size, 0)
            return fresh, [
                scored
                for scored in fresh
                if self.algorithm.no_signal == "keep" or has_signal(scored.rewards)
            ]
        used = self.carried
        for number in range(self.algorithm.max_rounds):
            missing = self.size - len(used)
            if missing <= 0:
                break
            share = max(1 / 8, sum(map(teaches, fresh)) / len(fresh)) if fresh else 1.0
            found = self._scored(sample, min(self.size, math.ceil(missing / share)), number)
            fresh += found
            used = used + [scored for scored in found if teaches(scored)]
        if len(used) < self.size:
            known = [
                [reward for reward in scored.rewards if reward is not None] for scored in fresh
            ]
            low = sum(max(rewards, default=0) <= 0 for rewards in known)
            raise Exhausted(
                f"algorithm.no_signal=resample: {len(fresh)} groups in "
                f"{self.algorithm.max_rounds} samplings gave {len(used)} of "
                f"{self.size} that are neither all right nor all wrong ({low} have no reward "
                "above 0): the problems are too hard or "
                "too easy for this model, or a reward cannot read its answers (see samples/); "
                "change the data, raise "
                "max_rounds, or set no_signal=keep"
            )
        self.carried = used[self.size :]
        return fresh, used[: self.size]

    def _scored(
        self, sample: Callable[[list[Problem], int], list[ScoredGroup]], count: int, number: int
    ) -> list[ScoredGroup]:
        scored = self.streamed(count) if self.streamed else sample(self.draw(count), number)
        if self.algorithm.drop_solved is not None or self.algorithm.pass_rate is not None:
            self.rates |= {each.group.problem.id: pass_rate(each) for each in scored}
        return scored

    def draw(self, count: int) -> list[Problem]:
        """Returns the next problems that no filter refuses.

        Raises Exhausted when there seem to be none.
        """
        drawn: list[Problem] = []
        refused = 0
        while len(drawn) < count:
            (problem,) = self.take(self.position, 1)
            self.position += 1
            if self._wanted(problem):
                drawn.append(problem)
                refused = 0
            elif (refused := refused + 1) == MAX_SKIPPED:
                raise Exhausted(
                    f"algorithm.drop_solved and pass_rate refuse the last {refused} problems: the "
                    "model has learned what this data can "
                    "teach, or the bounds are too narrow"
                )
        return drawn

    def _wanted(self, problem: Problem) -> bool:
        if self.algorithm.drop_solved is None and self.algorithm.pass_rate is None:
            return True
        rate = self.rates.get(problem.id, problem.meta.get("pass_rate"))
        if rate is None:
            return True
        if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise UserError(
                f"problem {problem.id}: meta.pass_rate is {rate!r}; give a share in [0, 1]"
            )
        low, high = self.algorithm.pass_rate or (0.0, 1.0)
        return low <= rate <= high and (
            self.algorithm.drop_solved is None or rate < self.algorithm.drop_solved
        )

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: position, carried groups, pass rates, and the stream."""
        streamed = {"stream": self.stream.state()} if self.stream else {}
        return {
            "position": self.position,
            "carried": self.carried,
            "rates": dict(self.rates),
        } | streamed

    def load(self, state: dict[str, Any]) -> None:
        """Restores position, carried groups and pass rates from a checkpoint's state."""
        self.position, self.rates = state["position"], dict(state["rates"])
        self.carried = [scored_group(tree) for tree in state["carried"]]


def teaches(scored: ScoredGroup) -> bool:
    """Returns whether a group has right and wrong completions.

    Without verdicts it returns whether the rewards differ.
    """
    values = {verdict.value for verdict in scored.verdicts if verdict is not None}
    return {"correct", "wrong"} <= values if values else has_signal(scored.rewards)


def pass_rate(scored: ScoredGroup) -> float:
    """Returns the share of a group that was right.

    Without verdicts it is the share with the highest reward if rewards differ, else 0.
    """
    verdicts = [
        verdict.value == "correct"
        for verdict in scored.verdicts
        if verdict is not None and verdict.value != "undecided"
    ]
    known = [reward for reward in scored.rewards if reward is not None]
    right: Sequence[bool] = verdicts or [
        has_signal(known) and reward == max(known) for reward in known
    ]
    return sum(right) / len(right) if right else 0.0


def scored_group(tree: dict[str, Any]) -> ScoredGroup:
    """Returns what a checkpoint made a tree of."""
    group = tree["group"]
    completions = tuple(
        Completion(
            **row
            | {key: tuple(row[key]) for key in ("token_ids", "logprobs")}
            | {"versions": tuple(map(tuple, row["versions"]))}
        )
        for row in group["completions"]
    )
    return ScoredGroup(
        group=Group(
            problem=Problem(**group["problem"]),
            prompt_ids=tuple(group["prompt_ids"]),
            completions=completions,
        ),
        rewards=tuple(tree["rewards"]),
        parts=tuple(tree["parts"]),
        faults=tuple(tree["faults"]),
        verdicts=tuple(verdict and Verdict(**verdict) for verdict in tree["verdicts"]),
    )
