"""Runs rollouts and evaluations: samples and scores groups on all ranks.

Every rank samples and scores a share of the groups and then receives all of them. With
asynchronous rollouts, rank 0 samples all groups and sends them to the other ranks. In both cases
all ranks select the same groups to learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from grpo.config import TrainConfig
from grpo.engines import Engine, SamplingOptions
from grpo.experience.group_metrics import group_metrics, sample_rows
from grpo.experience.plugins import RewardFunction
from grpo.experience.prompts import Prompts
from grpo.experience.sampling import make_group_requests, sample, sampling_options
from grpo.experience.scoring import score
from grpo.experience.selection import Selection
from grpo.rewards.workers.pool import WorkerPool
from grpo.run import ranks
from grpo.run.display import Display, Timer
from grpo.types import Problem, ScoredGroup

ProgressCallback = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroups:
    """The groups of one rollout.

    Attributes:
        sampled: The groups that this rollout sampled.
        used: The groups to learn from, of this rollout or carried from earlier ones.
        num_carried: Number of groups that are kept for the next rollout.
        verifier_counts: Calls of the reward workers on all ranks: `{"calls": 64, "timeout": 1}`.
        queue_depths: Asynchronous rollouts: `Stream.depths()` after the groups were taken.
    """

    sampled: list[ScoredGroup]
    used: list[ScoredGroup]
    num_carried: int
    verifier_counts: dict[str, float] = field(default_factory=dict)
    queue_depths: dict[str, float] = field(default_factory=dict)


class HeldOutEvaluation(NamedTuple):
    """The metrics of an evaluation by name, and one row per completion for samples/."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@dataclass(kw_only=True)
class Rollouts:
    """Samples, scores and selects groups, and evaluates on held-out problems.

    Attributes:
        config: The config of the run.
        engine: Samples completions.
        prompts: Renders problems.
        rewards: Function and weight per reward name.
        selection: Draws problems and selects groups.
        workers: Runs the rewards that have a time limit.
        display: Shows progress.
        held_out: The problems of an evaluation.
    """

    config: TrainConfig
    engine: Engine
    prompts: Prompts
    rewards: dict[str, tuple[RewardFunction, float]]
    selection: Selection
    workers: WorkerPool
    display: Display
    held_out: list[Problem] = field(default_factory=list)

    def next_groups(self, rollout: int, timer: Timer) -> RolloutGroups:
        """Returns the groups of the next rollout.

        Args:
            rollout: Number of completed rollouts.
            timer: Measures the phases `rollout` and `rewards`.

        Raises:
            TrainingStoppedError: Too few groups have a training signal. `sampled_so_far` contains
                the sampled groups.
        """
        self.workers.counts.clear()  # discards the calls of an evaluation
        stream = self.selection.stream
        if stream is not None:
            stream.engine_idle_s()  # discards the idle time before this step

        def sample_round(problems: list[Problem], round_number: int) -> list[ScoredGroup]:
            return self.sample(problems, rollout, round_number, timer)

        if self.selection.take_from_stream is None:
            selected = self.selection.collect(sample_round)  # `sample` measures its phases
        else:
            with timer("rollout"):  # the wait for groups that are sampled in the background
                selected = self.selection.collect(sample_round)
        return RolloutGroups(
            sampled=selected.sampled,
            used=selected.used,
            num_carried=len(self.selection.carried),
            verifier_counts=self._verifier_counts(),
            queue_depths=stream.depths() if stream is not None else {},
        )

    @property
    def sampled_so_far(self) -> list[ScoredGroup]:
        """The groups that the current rollout has sampled."""
        return self.selection.sampled

    def sample(
        self, problems: list[Problem], rollout: int, round_number: int, timer: Timer
    ) -> list[ScoredGroup]:
        """Returns one scored group per problem.

        Args:
            problems: The problems, the same on all ranks.
            rollout: Number of completed rollouts.
            round_number: Round of dynamic sampling within the rollout, from 0.
            timer: Measures the phases `rollout` and `rewards`.
        """
        # The seeds of the first round do not depend on dynamic sampling.
        seed_key: int | str = rollout
        if round_number:
            seed_key = f"{rollout}+{round_number}"
        temperature = self.config.sampling.temperature
        options = sampling_options(self.config, self.prompts, temperature)

        def sample_and_score(share: slice) -> list[ScoredGroup]:
            with timer("rollout"):
                on_progress = self._begin_phase(rollout, "rollout")
                requests = make_group_requests(
                    self.prompts,
                    problems,
                    group_size=self.config.train.group_size,
                    run_seed=self.config.seed,
                    rollout=seed_key,
                )
                groups = sample(self.engine, self.prompts, requests[share], options, on_progress)
            with timer("rewards"):
                self.display.phase(rollout, "rewards")
                return score(groups, self.rewards, self.prompts.reward_prompt)

        return ranks.split_across_ranks("the groups of the rollout", sample_and_score)

    def evaluate(self, rollout: int) -> HeldOutEvaluation:
        """Evaluates the policy on the held-out problems. All evaluations use the same seeds.

        `eval/` metrics are means over `eval.samples` completions per problem. If `eval.temperature`
        is above 0, one greedy completion per problem is evaluated too, as `eval/greedy/`. The rows
        are those of `sample_rows` with the additional key `greedy`.

        Args:
            rollout: Number of completed rollouts, which the display shows.
        """
        settings = self.config.eval
        options = sampling_options(self.config, self.prompts, settings.temperature)
        on_progress = self._begin_phase(rollout, "evaluation")
        scored = self._score_held_out(options, settings.samples, on_progress)
        metrics = _evaluation_metrics(scored, "eval/")
        rows = [{**row, "greedy": False} for row in sample_rows(scored)]
        if settings.temperature > 0:
            scored = self._score_held_out(replace(options, temperature=0.0), 1, on_progress)
            metrics.update(_evaluation_metrics(scored, "eval/greedy/"))
            rows += [{**row, "greedy": True} for row in sample_rows(scored)]
        return HeldOutEvaluation(metrics, rows)

    def _score_held_out(
        self, options: SamplingOptions, group_size: int, on_progress: ProgressCallback
    ) -> list[ScoredGroup]:
        def sample_and_score(share: slice) -> list[ScoredGroup]:
            requests = make_group_requests(
                self.prompts,
                self.held_out,
                group_size=group_size,
                run_seed=self.config.seed,
                rollout=0,
            )
            groups = sample(self.engine, self.prompts, requests[share], options, on_progress)
            return score(groups, self.rewards, self.prompts.reward_prompt)

        return ranks.split_across_ranks("the groups of the evaluation", sample_and_score)

    def _verifier_counts(self) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for counts in ranks.all_gather("the verifier counts", dict(self.workers.counts)):
            totals.update(counts)
        return {name: float(count) for name, count in totals.items()}

    def _begin_phase(self, rollout: int, phase: str) -> ProgressCallback:
        """Shows that a phase begins and returns the callback that shows its progress."""
        self.display.phase(rollout, phase)

        def show_progress(done: int, total: int) -> None:
            self.display.phase(rollout, phase, f"{done}/{total}")

        return show_progress


def _evaluation_metrics(scored: list[ScoredGroup], prefix: str) -> dict[str, float]:
    """Returns the reward and completion metrics: `eval/accuracy`, `eval/completion/length`."""
    metrics = {}
    for name, value in group_metrics(scored).items():
        if name.startswith(("reward/", "completion/")):
            metrics[prefix + name.removeprefix("reward/")] = value
    return metrics
