"""Turns the samples of a rollout into optimizer updates.

`Updater` splits the samples into mini-batches, adds the logprobs and penalties that the recipe
needs, and runs the updates. It depends on the learner and the config, not on problems, rewards or
engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from grpo.config import TrainConfig
from grpo.experience.sampling import derive_seed
from grpo.learning.advantages import unflatten
from grpo.learning.batch import (
    align_with_policy,
    micro_batches,
    mini_batch_order,
    mini_batches,
    token_weights,
)
from grpo.learning.learner import Learner
from grpo.learning.objective import kl_estimate
from grpo.run import ranks
from grpo.types import Batch, Sample

OldLogprobsSource = Literal["none", "learner", "sampler"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The optimizer updates of one rollout.

    For example `UpdateReport(num_updates=16, num_skipped=0, metrics={"loss": 0.01, ...})`.

    Attributes:
        num_updates: Number of updates that were applied.
        num_skipped: Number of updates that were not made because their mini-batch is empty or no
            sample in it has an advantage.
        metrics: Means over the updates, and the maximum of `mismatch/max_weight`; empty without
            updates.
    """

    num_updates: int
    num_skipped: int
    metrics: dict[str, float]


def _do_nothing() -> None: ...


def _ignore_progress(done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Updater:
    """Runs the optimizer updates of a rollout.

    Attributes:
        config: The config of the run.
        learner: Computes logprobs and applies updates.
        check_signals: Raises an exception to interrupt the run. Called only while no update of the
            rollout has been applied: before the first update and, with one rank, after each of its
            micro-batches.
    """

    config: TrainConfig
    learner: Learner
    check_signals: Callable[[], None] = _do_nothing

    def update(
        self,
        samples: list[Sample],
        rollout: int,
        on_progress: Callable[[int, int], None] = _ignore_progress,
    ) -> UpdateReport:
        """Runs the updates of a rollout: per epoch, one update for each random mini-batch.

        A mini-batch is skipped if none of its samples has an advantage, unless a teacher's
        divergence is part of the loss.

        Args:
            samples: The samples of all ranks, the same on every rank.
            rollout: Number of completed rollouts, without this one.
            on_progress: Called as `on_progress(done, total)` after each micro-batch of an update.
        """
        train = self.config.train
        seed = derive_seed(self.config.seed, rollout, "mini-batches")
        trained_mini_batches: list[list[Sample]] = []
        if samples:
            # Without a signal, the KL term, the entropy bonus and the momentum would move the
            # policy although it learns nothing.
            trained_mini_batches = [
                mini_batch
                for mini_batch in mini_batches(samples, train.updates_per_rollout, seed)
                if self.config.algorithm.has_teacher_loss or _has_advantage(mini_batch)
            ]
        ranks.all_gather_or_raise("the update", self.check_signals)
        batches_per_mini_batch: list[list[Batch]] = []
        if trained_mini_batches:
            batches_per_mini_batch = self.prepare(trained_mini_batches, rollout)
        updates_before = self.learner.num_updates
        reports: list[dict[str, float]] = []
        for epoch in range(train.epochs):
            for index in mini_batch_order(len(batches_per_mini_batch), seed, epoch):
                on_batch = on_progress if reports else self._interruptible(on_progress)
                reports.append(self.learner.update(batches_per_mini_batch[index], on_batch))
        self._reset_reference_if_due(updates_before)
        return UpdateReport(
            num_updates=len(reports),
            num_skipped=train.epochs * train.updates_per_rollout - len(reports),
            metrics=_mean_metrics(reports),
        )

    def _interruptible(self, on_progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Returns `on_progress` with a check for signals, for the first update of a rollout.

        The first update can be abandoned, because nothing has been applied yet. With several ranks
        it cannot: a rank that raises would leave the others waiting in a collective.
        """
        if ranks.world_size() > 1:
            return on_progress

        def check_and_show(done: int, total: int) -> None:
            self.check_signals()
            on_progress(done, total)

        return check_and_show

    def _reset_reference_if_due(self, updates_before: int) -> None:
        """Resets the reference if a multiple of `algorithm.reference_reset` updates was reached."""
        algorithm = self.config.algorithm
        every = algorithm.reference_reset
        if not every or not algorithm.kl_coef:
            return
        if updates_before // every != self.learner.num_updates // every:
            self.learner.reset_reference(optimizer=algorithm.reset_optimizer)

    def prepare(self, mini_batches: Sequence[list[Sample]], rollout: int) -> list[list[Batch]]:
        """Returns this rank's micro-batches of each mini-batch, ready for `Learner.update`.

        As the recipe requires, adds old and reference logprobs, and sets all advantages to 0 except
        those of the tokens of highest entropy. Call it before the rollout's first update.

        Args:
            mini_batches: The mini-batches of one epoch, the same on every rank.
            rollout: Number of completed rollouts, without this one.
        """
        batches_per_mini_batch = [self._micro_batches(mini_batch) for mini_batch in mini_batches]
        batches = list(itertools.chain.from_iterable(batches_per_mini_batch))
        samples = list(itertools.chain.from_iterable(mini_batches))
        num_updates = len(mini_batches) * self.config.train.epochs
        old_source = self._old_logprobs_source(samples, rollout + 1, num_updates)
        batches = self._with_policy_scores(batches, old_source, rollout + 1)
        batches = self._with_reference_logprobs(batches)
        return unflatten(batches, [len(part) for part in batches_per_mini_batch])

    def _micro_batches(self, samples: list[Sample]) -> list[Batch]:
        """Returns this rank's micro-batches of one mini-batch."""
        config = self.config
        weights = token_weights(samples, config.algorithm.reduction, config.sampling.max_tokens)
        return micro_batches(
            samples,
            weights,
            max_tokens=config.learner.micro_batch_tokens,
            packed=config.model.is_packed,
            share=self.learner.micro_batch_share,
        )

    def _old_logprobs_source(
        self, samples: list[Sample], version: int, num_updates: int
    ) -> OldLogprobsSource:
        """Returns where the old logprobs of the updates come from.

        - none: The objective uses the policy's current logprobs, because pi_old is pi: there is a
          single update, and the current weights sampled all tokens or a mismatch correction is set.
        - learner: The policy scores the samples before the updates.
        - sampler: The logprobs that the engine returned with the samples, if the config requests
          them, or if there is no mismatch correction and older weights sampled all tokens.

        Args:
            samples: The samples of the updates.
            version: The version of the current weights.
            num_updates: Number of updates with these samples.
        """
        algorithm = self.config.algorithm
        if algorithm.old_logprobs == "sampler":
            return "sampler"
        # A mismatch correction accounts for tokens of older versions.
        has_correction = not algorithm.mismatch.is_none
        versions = {version} if has_correction else _sampler_versions(samples)
        if num_updates <= 1 and versions == {version}:
            return "none"
        return "learner" if version in versions else "sampler"

    def _with_policy_scores(
        self, batches: list[Batch], old_source: OldLogprobsSource, version: int
    ) -> list[Batch]:
        """Adds the old logprobs, and restricts the advantages to the tokens of highest entropy.

        One scoring pass of the policy serves both. It is skipped if the recipe needs neither.
        """
        has_entropy_limit = self.config.algorithm.top_entropy < 1
        if has_entropy_limit or old_source == "learner":
            scores = self.learner.score(batches)
            if has_entropy_limit:
                entropies = [score.entropies for score in scores]
                share = self.config.algorithm.top_entropy
                batches = _with_top_entropy_only(batches, entropies, share)
            batches = [
                replace(batch, old_logprobs=self._old_logprobs(batch, score.logprobs, version))
                for batch, score in zip(batches, scores, strict=True)
            ]
        if old_source == "sampler":
            batches = [replace(batch, old_logprobs=batch.sampler_logprobs) for batch in batches]
        return batches

    def _old_logprobs(self, batch: Batch, policy_logprobs: Tensor, version: int) -> Tensor:
        """Returns the old logprobs [B, T] of a batch that the policy has scored.

        Weights of other versions, which sampled some of the tokens, no longer exist. The ratio of
        these tokens is computed against the sampler's logprobs, unless a mismatch correction
        accounts for the difference between pi_old and the sampler (AReaL 2505.24298).
        """
        if not self.config.algorithm.mismatch.is_none:
            return policy_logprobs
        return policy_logprobs.where(batch.versions == version, batch.sampler_logprobs)

    def _with_reference_logprobs(self, batches: list[Batch]) -> list[Batch]:
        """Returns the batches with reference logprobs if the loss has a KL term."""
        algorithm = self.config.algorithm
        if not algorithm.kl_coef or algorithm.kl_in != "loss":
            return batches
        scores = self.learner.score(batches, reference=True)
        return [
            replace(batch, ref_logprobs=score.logprobs)
            for batch, score in zip(batches, scores, strict=True)
        ]

    def kl_penalties(self, samples: list[Sample]) -> list[list[float]] | None:
        """Returns the KL penalty of each completion token of each sample.

        The penalty is the KL term in the reward, or log(pi / pi_teacher) if the teacher's signal is
        part of the advantages. Returns None if the recipe has no penalty, or without samples.
        """
        estimator = self.penalty_estimator
        if estimator is None or not samples:
            return None
        batches = self._micro_batches(samples)
        policy_scores = self.learner.score(batches)
        reference_logprobs = self._penalty_logprobs(batches)
        local_penalties: dict[int, list[float]] = {}  # by index of the sample
        for batch, policy, reference in zip(
            batches, policy_scores, reference_logprobs, strict=True
        ):
            if batch.is_filler:
                continue
            kl = kl_estimate(policy.logprobs, reference, estimator)
            penalties = self.penalty_coefficient * kl  # [B, T]
            for row, index in enumerate(batch.sample_indices):
                local_penalties[index] = penalties[row][batch.token_mask[row]].tolist()
        all_penalties: dict[int, list[float]] = {}
        for penalties_of_rank in ranks.all_gather("the KL penalties", local_penalties):
            all_penalties.update(penalties_of_rank)
        return [all_penalties[index] for index in range(len(samples))]

    def _penalty_logprobs(self, batches: list[Batch]) -> list[Tensor]:
        """Returns the logprobs [B, T] of the teacher or reference for each batch.

        Without a model of its own, the teacher is the policy, which reads the teacher's prompts.
        """
        if not self.config.algorithm.has_teacher_advantage:
            return [score.logprobs for score in self.learner.score(batches, reference=True)]
        teacher_batches = [
            batch if batch.teacher_batch is None else batch.teacher_batch for batch in batches
        ]
        has_teacher_model = bool(self.config.model.all_teachers)
        scores = self.learner.score(teacher_batches, reference=has_teacher_model)
        return [
            align_with_policy(score.logprobs, batch)
            for batch, score in zip(batches, scores, strict=True)
        ]

    @property
    def penalty_estimator(self) -> str | None:
        """The KL estimator of `kl_penalties`; None if the recipe has no penalty."""
        algorithm = self.config.algorithm
        if algorithm.has_teacher_advantage:
            return "k1"
        if algorithm.kl_coef and algorithm.kl_in == "reward":
            return algorithm.kl_estimator
        return None

    @property
    def penalty_coefficient(self) -> float:
        """The factor of the KL in `kl_penalties`."""
        algorithm = self.config.algorithm
        return 1.0 if algorithm.has_teacher_advantage else algorithm.kl_coef


def _has_advantage(samples: Iterable[Sample]) -> bool:
    """Returns whether any token has an advantage other than 0."""
    return any(any(sample.advantages) for sample in samples)


def _sampler_versions(samples: Iterable[Sample]) -> set[int]:
    """Returns the versions of all weights that sampled a token."""
    versions: set[int] = set()
    for sample in samples:
        versions.update(sample.versions or ())
    return versions


def _with_top_entropy_only(
    batches: list[Batch], entropies: list[Tensor], share: float
) -> list[Batch]:
    """Returns the batches with advantages of 0 except for the tokens of highest entropy.

    Args:
        batches: The micro-batches of this rank.
        entropies: The policy's entropies [B, T] for each batch.
        share: Share of the completion tokens of all ranks that keep their advantage.

    Source: "Beyond the 80/20 rule" 2506.01939 section 5 (0.2 there).
    """
    local_entropies = [
        batch_entropies[batch.token_mask]
        for batch, batch_entropies in zip(batches, entropies, strict=True)
        if not batch.is_filler
    ]
    flat_entropies: list[Tensor] = []
    for entropies_of_rank in ranks.all_gather("the entropies", local_entropies):
        flat_entropies += entropies_of_rank
    all_entropies = torch.cat(flat_entropies)  # [completion tokens of all ranks]
    num_kept = round(share * len(all_entropies))
    threshold = all_entropies.sort(descending=True).values[max(0, num_kept - 1)]
    return [
        replace(batch, advantages=batch.advantages * (batch_entropies >= threshold))
        for batch, batch_entropies in zip(batches, entropies, strict=True)
    ]


def _mean_metrics(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the means over updates, and the maximum of `mismatch/max_weight`."""
    if not reports:
        return {}
    means = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
    means["mismatch/max_weight"] = max(report["mismatch/max_weight"] for report in reports)
    return means
