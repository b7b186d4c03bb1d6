"""A rollout: problems are drawn, sampled and scored on all ranks, and groups to learn from chosen.

Every rank samples and scores its share and then has the whole, so all ranks choose alike.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.config import Config
from grpo.engines import Engine, SamplingOptions
from grpo.experience.describing import describe, sample_rows
from grpo.experience.plugins import RewardFunction
from grpo.experience.prompts import Prompts
from grpo.experience.sampling import sample, sampling_options
from grpo.experience.scoring import score
from grpo.experience.selection import Selection
from grpo.run import ranks
from grpo.run.display import Display, Timer
from grpo.types import Problem, ScoredGroup
from rewards.workers.pool import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroups:
    """The groups of one rollout.

    `sampled` were sampled now, `used` are learned from: some of them, or of earlier rollouts.
    `verifier_counts` are of all ranks: calls of reward workers by how they ended.
    """

    sampled: list[ScoredGroup]
    used: list[ScoredGroup]
    num_carried: int  # groups that are kept for the next rollout
    verifier_counts: dict[str, float] = field(default_factory=dict)
    # asynchronous rollouts: groups that were ready, and in flight, once these had been taken
    queue: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Rollouts:
    """Samples, scores and selects groups, and evaluates on held-out problems."""

    config: Config
    engine: Engine
    prompts: Prompts
    rewards: dict[str, tuple[RewardFunction, float]]  # function and weight by name
    selection: Selection
    workers: Pool  # run the rewards that have a time limit
    display: Display
    held_out: list[Problem] = field(default_factory=list)

    def next_groups(self, rollout: int, timer: Timer) -> RolloutGroups:
        """Returns the groups of the next rollout; `rollout` rollouts are done.

        Raises Exhausted when no groups to learn from are left; `sampled_so_far` then has what was
        sampled.
        """
        self.workers.counts.clear()  # an evaluation's are not this rollout's
        stream = self.selection.stream
        if stream is not None:
            stream.idle()  # starts its clock anew
        waiting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.selection.streamed is not None:
            waiting = timer("rollout")  # groups are sampled elsewhere and waited for here
        with waiting:
            sampled, used = self.selection.collect(
                lambda problems, number: self.sample(problems, rollout, number, timer)
            )
        return RolloutGroups(
            sampled=sampled,
            used=used,
            num_carried=len(self.selection.carried),
            verifier_counts=self._verifier_counts(),
            queue=stream.depths() if stream is not None else {},
        )

    @property
    def sampled_so_far(self) -> list[ScoredGroup]:
        """The groups that the current rollout has sampled."""
        return self.selection.fresh

    def sample(
        self, problems: list[Problem], rollout: int, number: int, timer: Timer
    ) -> list[ScoredGroup]:
        """Returns scored groups of problems.

        `number` counts the samplings of a rollout: dynamic sampling needs several.
        """
        name = f"{rollout}+{number}" if number else rollout
        temperature = self.config.sampling.temperature
        options = sampling_options(self.config, self.prompts, temperature)

        def sample_share(share: slice) -> list[ScoredGroup]:
            with timer("rollout"):
                groups = sample(
                    self.engine,
                    self.prompts,
                    problems,
                    options,
                    group_size=self.config.train.group_size,
                    run_seed=self.config.seed,
                    rollout=name,
                    on_progress=self._show_progress(rollout, "rollout"),
                    share=share,
                )
            with timer("rewards"):
                self.display.phase(rollout, "rewards")
                return score(groups, self.rewards, self.prompts.for_rewards)

        return ranks.split_across_ranks("the rollout of the other ranks", sample_share)

    def evaluate(self, rollout: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Returns `eval/` metrics on the held-out problems, and the rows of `sample_rows`.

        The metrics are means over `eval.samples` completions per problem. Above temperature 0 one
        greedy completion per problem is scored too, as `eval/greedy/`. The seeds are the same at
        every call.
        """
        settings = self.config.eval
        options = sampling_options(self.config, self.prompts, settings.temperature)
        on_progress = self._show_progress(rollout, "evaluation")
        scored = self._score_held_out(options, settings.samples, on_progress)
        metrics = _evaluation_metrics(scored, "eval/")
        rows = [{**row, "greedy": False} for row in sample_rows(scored)]
        if settings.temperature > 0:
            scored = self._score_held_out(replace(options, temperature=0.0), 1, on_progress)
            metrics.update(_evaluation_metrics(scored, "eval/greedy/"))
            rows += [{**row, "greedy": True} for row in sample_rows(scored)]
        return metrics, rows

    def _score_held_out(
        self,
        options: SamplingOptions,
        group_size: int,
        on_progress: Callable[[int, int], None],
    ) -> list[ScoredGroup]:
        def score_share(share: slice) -> list[ScoredGroup]:
            groups = sample(
                self.engine,
                self.prompts,
                self.held_out,
                options,
                group_size=group_size,
                run_seed=self.config.seed,
                rollout=0,
                on_progress=on_progress,
                share=share,
            )
            return score(groups, self.rewards, self.prompts.for_rewards)

        return ranks.split_across_ranks("the evaluation of the other ranks", score_share)

    def _verifier_counts(self) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for counts in ranks.all_gather("the verifiers' counts", dict(self.workers.counts)):
            totals.update(counts)
        return {name: float(count) for name, count in totals.items()}

    def _show_progress(self, rollout: int, phase: str) -> Callable[[int, int], None]:
        self.display.phase(rollout, phase)
        return lambda done, total: self.display.phase(rollout, phase, f"{done}/{total}")


def _evaluation_metrics(scored: list[ScoredGroup], prefix: str) -> dict[str, float]:
    """Returns the metrics of rewards and completions, as `eval/accuracy`, `eval/completion/...`."""
    metrics = {}
    for name, value in describe(scored).items():
        if name.startswith(("reward/", "completion/")):
            metrics[prefix + name.removeprefix("reward/")] = value
    return metrics
