"""From samples to optimizer updates: what the recipe needs before them, and the updates themselves.

It knows the learner and the recipe; nothing of problems, rewards or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.config import Config
from grpo.experience.sampling import seed_of
from grpo.learning.advantages import unflatten
from grpo.learning.batch import epoch_order, micro_batches, minibatches, token_weights
from grpo.learning.learner import Learner
from grpo.learning.objective import kl_estimate
from grpo.run import ranks
from grpo.types import Batch, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What the updates of one rollout were.

    `UpdateReport(num_made=16, num_skipped=0, metrics={"loss": 0.01, "policy/grad_norm": 0.4})`.
    `metrics` are means over the updates, empty without one.
    """

    num_made: int
    num_skipped: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Updater:
    """Makes a rollout's updates.

    `check_signals` is called before the first update and after its micro-batches; it may raise:
    nothing of the rollout's updates has been applied then.
    """

    config: Config
    learner: Learner
    check_signals: Callable[[], None] = lambda: None

    def kl_penalties(self, samples: list[Sample]) -> list[list[float]] | None:
        """Returns what each completion token of each sample is charged for leaving the reference.

        That is the recipe's KL in the reward, or log pi / pi_teacher with a teacher as critic. A
        recipe without either has none.
        """
        estimator = self.penalty_estimator
        if estimator is None or not samples:
            return None
        batches = self._micro_batches(samples)
        policy = self.learner.score(batches)
        reference = self.learner.score(batches, reference=True)
        local_penalties: dict[int, list[float]] = {}
        for batch, policy_scores, reference_scores in zip(batches, policy, reference, strict=True):
            if batch.idle:
                continue
            kl = kl_estimate(policy_scores.logprobs, reference_scores.logprobs, estimator)
            penalties = self.penalty_coefficient * kl  # [B, T]
            for row, i in enumerate(batch.index):
                local_penalties[i] = penalties[row][batch.token_mask[row]].tolist()
        all_penalties: dict[int, list[float]] = {}
        for part in ranks.all_gather("the penalties", local_penalties):
            all_penalties.update(part)
        return [all_penalties[i] for i in range(len(samples))]

    @property
    def penalty_estimator(self) -> str | None:
        """The KL estimator of `kl_penalties`; None if the recipe charges nothing."""
        algorithm = self.config.algorithm
        if algorithm.advantage == "teacher":
            return "k1"
        if algorithm.kl_coef and algorithm.kl_in == "reward":
            return algorithm.kl_estimator
        return None

    @property
    def penalty_coefficient(self) -> float:
        """What the KL is multiplied by in `kl_penalties`."""
        algorithm = self.config.algorithm
        return 1.0 if algorithm.advantage == "teacher" else algorithm.kl_coef

    def update(
        self,
        samples: list[Sample],
        rollout: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> UpdateReport:
        """Makes the updates of a rollout, one per random mini-batch of its samples and epoch.

        Args:
            samples: of all ranks, the same on all.
            rollout: rollouts done before this one.
            on_progress: called as `on_progress(done, total)` after each micro-batch.
        """
        train = self.config.train
        seed = seed_of(self.config.seed, rollout, "mini-batches")
        parts = minibatches(samples, train.updates_per_rollout, seed) if samples else []
        # Without a signal KL, entropy bonus and momentum must not act alone: they would move a
        # policy that learns nothing.
        parts = [part for part in parts if any(any(sample.advantages) for sample in part)]
        ranks.all_gather_or_raise("the update", self.check_signals)
        batches = self.prepare(parts, rollout) if parts else []
        updates_before = self.learner.updates
        reports: list[dict[str, float]] = []
        for epoch in range(train.epochs):
            for place in epoch_order(len(batches), seed, epoch):
                on_batch = on_progress if reports else self._interruptible(on_progress)
                reports.append(self.learner.update(batches[place], on_batch))
        self._reset_reference_if_due(updates_before)
        return UpdateReport(
            num_made=len(reports),
            num_skipped=train.epochs * train.updates_per_rollout - len(reports),
            metrics=_mean_metrics(reports),
        )

    def _interruptible(self, on_progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Returns `on_progress` for the first update: nothing is applied yet, it can be given up.

        With several ranks it cannot: one of them must not leave the others.
        """
        if ranks.world_size() > 1:
            return on_progress

        def check_and_show(done: int, total: int) -> None:
            self.check_signals()
            on_progress(done, total)

        return check_and_show

    def _reset_reference_if_due(self, updates_before: int) -> None:
        algorithm = self.config.algorithm
        every = algorithm.reference_reset
        if not every or not algorithm.kl_coef:
            return
        if updates_before // every != self.learner.updates // every:
            self.learner.reset_reference(optimizer=algorithm.reset_optimizer)

    def prepare(self, parts: Sequence[list[Sample]], rollout: int) -> list[list[Batch]]:
        """Returns each mini-batch's micro-batches with what the recipe needs before updates.

        These are old and reference logprobs, and advantages of 0 where the entropy is not among the
        top. All are of the policy before the rollout's first update.
        """
        micro_batches_of = [self._micro_batches(part) for part in parts]
        batches = [batch for part in micro_batches_of for batch in part]
        samples = [sample for part in parts for sample in part]
        num_updates = len(parts) * self.config.train.epochs
        batches = self._with_old_logprobs(batches, samples, rollout, num_updates)
        batches = self._with_reference_logprobs(batches)
        return unflatten(batches, [len(part) for part in micro_batches_of])

    def _micro_batches(self, samples: list[Sample]) -> list[Batch]:
        config = self.config
        weights = token_weights(samples, config.algorithm.reduction, config.sampling.max_tokens)
        return micro_batches(
            samples,
            weights,
            max_tokens=config.learner.micro_batch_tokens,
            packed=config.model.packed,
            share=self.learner.share,
        )

    def _with_old_logprobs(
        self, batches: list[Batch], samples: list[Sample], rollout: int, num_updates: int
    ) -> list[Batch]:
        """Returns the batches with old logprobs where the ratio needs them.

        A single update of the current policy's own samples needs none: pi_old is pi.

        Where other weights sampled a token, those weights are gone. Its ratio is then to what
        sampled it, unless a mismatch correction bridges the two (AReaL 2505.24298).
        """
        algorithm = self.config.algorithm
        version = rollout + 1
        per_token = algorithm.mismatch == "none"  # which weights sampled a token decides
        versions = _versions(samples) if per_token else {version}
        needs_old = algorithm.old_logprobs == "learner" and (
            num_updates > 1 or versions != {version}
        )
        if algorithm.top_entropy < 1 or (needs_old and version in versions):
            scores = self.learner.score(batches)
            if algorithm.top_entropy < 1:
                entropies = [score.entropies for score in scores]
                batches = _with_top_entropy_only(batches, entropies, algorithm.top_entropy)
            batches = [
                replace(
                    batch,
                    old_logprobs=score.logprobs.where(
                        batch.versions == version, batch.sampler_logprobs
                    )
                    if per_token
                    else score.logprobs,
                )
                for batch, score in zip(batches, scores, strict=True)
            ]
        if algorithm.old_logprobs == "sampler" or (needs_old and version not in versions):
            batches = [replace(batch, old_logprobs=batch.sampler_logprobs) for batch in batches]
        return batches

    def _with_reference_logprobs(self, batches: list[Batch]) -> list[Batch]:
        algorithm = self.config.algorithm
        if not algorithm.kl_coef or algorithm.kl_in != "loss":
            return batches
        scores = self.learner.score(batches, reference=True)
        return [
            replace(batch, ref_logprobs=score.logprobs)
            for batch, score in zip(batches, scores, strict=True)
        ]


def _versions(samples: Iterable[Sample]) -> set[int]:
    """Returns the versions of all weights that sampled a token."""
    versions: set[int] = set()
    for sample in samples:
        versions.update(sample.versions or ())
    return versions


def _with_top_entropy_only(
    batches: list[Batch], entropies: list[Tensor], share: float
) -> list[Batch]:
    """Returns the batches with an advantage only at the `share` of tokens of highest entropy.

    Args:
        batches: of this rank.
        entropies: [B, T] per batch.
        share: of the completion tokens of all ranks.

    Source: "Beyond the 80/20 rule" 2506.01939 section 5 (0.2 there).
    """
    local = [
        values[batch.token_mask]
        for batch, values in zip(batches, entropies, strict=True)
        if not batch.idle
    ]
    gathered = ranks.all_gather("the entropies", local)
    all_entropies = torch.cat([values for part in gathered for values in part])
    num_kept = round(share * len(all_entropies))
    threshold = all_entropies.sort(descending=True).values[max(0, num_kept - 1)]
    return [
        replace(batch, advantages=batch.advantages * (values >= threshold))
        for batch, values in zip(batches, entropies, strict=True)
    ]


def _mean_metrics(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the means over updates; of the largest weight the maximum."""
    if not reports:
        return {}
    means = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
    means["mismatch/max_weight"] = max(report["mismatch/max_weight"] for report in reports)
    return means
