"""Draws the problems of a rollout and selects the groups to learn from.

`Selection` implements dynamic sampling and the filters by pass rate. Its state is part of every
checkpoint: the position in the data, the groups carried to the next rollout, and the pass rate of
each problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.config.algorithm import AlgorithmSettings
from grpo.experience.undecided import is_undecided, require_few_undecided
from grpo.learning.advantages import rewards_differ
from grpo.types import (
    Completion,
    Group,
    Problem,
    ScoredGroup,
    TrainingStoppedError,
    UserError,
    Verdict,
)

if TYPE_CHECKING:
    from grpo.experience.stream import Stream

MAX_EXCLUDED = 10_000  # consecutive problems that the filters may exclude before the run stops
# A weighted sum of rewards may be less than `algorithm.max_reward` by rounding: 0.7 + 0.1 < 0.8.
REWARD_TOLERANCE = 1e-6
# Lower bound of the expected share of groups with a training signal: a round of dynamic sampling
# draws at most 8 problems per missing group.
MIN_SIGNAL_SHARE = 1 / 8

# Samples and scores one group per problem. The number counts the rounds of a rollout from 0.
SampleRound = Callable[[list[Problem], int], list[ScoredGroup]]


class SelectedGroups(NamedTuple):
    """The groups of one rollout: those that it sampled, and those to learn from."""

    sampled: list[ScoredGroup]
    used: list[ScoredGroup]


@dataclass(kw_only=True)
class Selection:
    """Draws the problems of a rollout and selects the groups to learn from.

    Attributes:
        algorithm: The config section `algorithm`.
        num_groups: Number of groups that a rollout learns from.
        take_problems: `take_problems(position, count)` returns the training problems from
            `position` on.
        position: Position of the next problem in the training data.
        carried: Groups that are kept for the next rollout.
        pass_rates: The last known `pass_rate` of a problem, by problem id. Recorded only if a
            filter is set.
        max_undecided: Share of undecided completions in a rollout that stops the run.
        sampled: Groups that the current rollout has sampled so far.
        stream: Asynchronous rollouts, on rank 0 only: samples groups ahead of the learner.
        take_from_stream: Asynchronous rollouts, on every rank: returns the stream's next groups.
    """

    algorithm: AlgorithmSettings
    num_groups: int
    take_problems: Callable[[int, int], list[Problem]]
    position: int = 0
    carried: list[ScoredGroup] = field(default_factory=list)
    pass_rates: dict[str, float] = field(default_factory=dict)
    max_undecided: float = 1.0
    sampled: list[ScoredGroup] = field(default_factory=list)
    stream: Stream | None = None
    take_from_stream: Callable[[int], list[ScoredGroup]] | None = None

    def collect(self, sample_round: SampleRound) -> SelectedGroups:
        """Samples the groups of a rollout and selects those to learn from.

        `algorithm.no_signal` determines the selection: `keep` uses all groups, `drop` drops groups
        whose rewards are equal, and `resample` samples until enough groups have a training signal
        (`has_training_signal`).

        Args:
            sample_round: Samples and scores groups. Not called with asynchronous rollouts.

        Raises:
            TrainingStoppedError: Too few problems or groups are left to learn from, or too many
                completions are undecided.
            UserError: A problem's `meta.pass_rate` is invalid.
            EngineError: The engine failed.
        """
        self.sampled = []
        no_signal = self.algorithm.no_signal
        if no_signal == "resample":
            return self._collect_until_full(sample_round)
        self._sample(sample_round, self.num_groups, 0)
        require_few_undecided(self.sampled, self.max_undecided)
        if no_signal == "keep":
            return SelectedGroups(self.sampled, list(self.sampled))
        used = [scored for scored in self.sampled if rewards_differ(scored.rewards)]
        return SelectedGroups(self.sampled, used)

    def _collect_until_full(self, sample_round: SampleRound) -> SelectedGroups:
        """Samples until `num_groups` groups have a training signal and carries the surplus over.

        Raises TrainingStoppedError if `algorithm.max_rounds` rounds are not enough, or if too many
        completions are undecided.

        Source: dynamic sampling is DAPO 2503.14476 Eq. 11.
        """
        used = list(self.carried)
        for round_number in range(self.algorithm.max_rounds):
            num_missing = self.num_groups - len(used)
            if num_missing <= 0:
                break
            count = min(self.num_groups, math.ceil(num_missing / self._signal_share()))
            groups = self._sample(sample_round, count, round_number)
            used += [scored for scored in groups if has_training_signal(scored)]
        require_few_undecided(self.sampled, self.max_undecided)
        if len(used) < self.num_groups:
            raise self._too_few_groups_error(len(used))
        self.carried = used[self.num_groups :]
        return SelectedGroups(self.sampled, used[: self.num_groups])

    def _signal_share(self) -> float:
        """Returns the share of this rollout's groups with a training signal.

        It is at least MIN_SIGNAL_SHARE, and 1 before the first round.
        """
        if not self.sampled:
            return 1.0
        num_with_signal = sum(has_training_signal(scored) for scored in self.sampled)
        return max(MIN_SIGNAL_SHARE, num_with_signal / len(self.sampled))

    def _too_few_groups_error(self, num_used: int) -> TrainingStoppedError:
        num_without_positive_reward = 0
        for scored in self.sampled:
            rewards = [reward for reward in scored.rewards if reward is not None]
            if max(rewards, default=0) <= 0:
                num_without_positive_reward += 1
        return TrainingStoppedError(
            f"algorithm.no_signal=resample: {len(self.sampled)} groups in "
            f"{self.algorithm.max_rounds} rounds gave only {num_used} of {self.num_groups} groups "
            f"with right and wrong completions ({num_without_positive_reward} have no reward above "
            "0). The problems are too hard or too easy for this model, or a reward cannot parse "
            "its answers (see samples/). Change the data, raise algorithm.max_rounds, or set "
            "algorithm.no_signal=keep."
        )

    def _sample(
        self, sample_round: SampleRound, count: int, round_number: int
    ) -> list[ScoredGroup]:
        """Returns `count` new groups, from the stream if there is one, and adds them to `sampled`.

        Records their pass rates, where known, if a filter is set.
        """
        if self.take_from_stream is not None:
            groups = self.take_from_stream(count)
        else:
            groups = sample_round(self.draw(count), round_number)
        self.sampled += groups
        if self.algorithm.has_pass_rate_filter:
            for scored in groups:
                rate = pass_rate(scored, self.algorithm.max_reward)
                if rate is not None:
                    self.pass_rates[scored.group.problem.id] = rate
        return groups

    def draw(self, count: int) -> list[Problem]:
        """Returns the next `count` problems that pass the filters.

        Raises:
            TrainingStoppedError: The filters exclude MAX_EXCLUDED problems in a row.
            UserError: A problem's `meta.pass_rate` is not a number in [0, 1].
        """
        problems: list[Problem] = []
        num_excluded = 0  # in a row
        while len(problems) < count:
            (problem,) = self.take_problems(self.position, 1)
            self.position += 1
            if self._passes_filters(problem):
                problems.append(problem)
                num_excluded = 0
                continue
            num_excluded += 1
            if num_excluded == MAX_EXCLUDED:
                raise TrainingStoppedError(
                    f"algorithm.drop_solved and algorithm.pass_rate excluded {num_excluded} "
                    "problems in a row. Either the model has learned this data, or the bounds are "
                    "too narrow: widen them, or use other data."
                )
        return problems

    def _passes_filters(self, problem: Problem) -> bool:
        """Returns whether the problem's pass rate is unknown or within the filters' bounds.

        A rate that this run has recorded takes precedence over `meta.pass_rate`.
        """
        if not self.algorithm.has_pass_rate_filter:
            return True
        rate = self.pass_rates.get(problem.id, problem.meta.get("pass_rate"))
        if rate is None:
            return True
        if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise UserError(
                f"problem {problem.id}: meta.pass_rate is {rate!r}, expected a number in [0, 1]"
            )
        min_rate, max_rate = self.algorithm.pass_rate or (0.0, 1.0)
        is_solved = self.algorithm.drop_solved is not None and rate >= self.algorithm.drop_solved
        return min_rate <= rate <= max_rate and not is_solved

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, including the stream's if there is one.

        Its values are written as JSON; `load` takes the parsed JSON.
        """
        state = {
            "position": self.position,
            "carried": self.carried,
            "rates": dict(self.pass_rates),
        }
        if self.stream is not None:
            state["stream"] = self.stream.state()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Restores a checkpoint's state. `Stream.load` restores that of the stream."""
        self.position = state["position"]
        self.pass_rates = dict(state["rates"])
        self.carried = [parse_scored_group(tree) for tree in state["carried"]]


def has_training_signal(scored: ScoredGroup) -> bool:
    """Returns whether a group has both correct and wrong completions.

    If no verdict is correct or wrong, it returns whether the rewards differ.
    """
    verdicts = {verdict.value for verdict in scored.verdicts if verdict is not None}
    if verdicts <= {"undecided"}:
        return rewards_differ(scored.rewards)
    return "correct" in verdicts and "wrong" in verdicts


def pass_rate(scored: ScoredGroup, max_reward: float | None) -> float | None:
    """Returns the share of correct completions among the decided ones, None if it is unknown.

    It is unknown if no completion is decided. Without verdicts, a completion is correct if its
    reward is at least `max_reward`; if that is None, the rate is unknown.
    """
    is_correct = [
        verdict.value == "correct"
        for verdict in scored.verdicts
        if verdict is not None and not is_undecided(verdict)
    ]
    if not is_correct and max_reward is not None:
        threshold = max_reward - REWARD_TOLERANCE
        is_correct = [reward >= threshold for reward in scored.rewards if reward is not None]
    if not is_correct:
        return None
    return sum(is_correct) / len(is_correct)


def parse_scored_group(tree: dict[str, Any]) -> ScoredGroup:
    """Parses a scored group from the JSON of a checkpoint, which grpo/run/directory.py writes."""
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
    """Parses a completion; JSON has lists where a completion has tuples."""
    fields = dict(row)
    fields["token_ids"] = tuple(row["token_ids"])
    fields["logprobs"] = tuple(row["logprobs"])
    fields["versions"] = tuple(tuple(span) for span in row["versions"])
    return Completion(**fields)
