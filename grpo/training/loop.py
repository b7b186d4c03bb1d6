"""The GRPO training loop.

A step is one rollout and its updates: sample and score groups, compute advantages, update the
policy, send the new weights to the engine, verify them, evaluate, record. `Loop.step` shows it.

`Loop` keeps only the progress of the run. All other state is in the learner, the selection and the
journal. With several ranks, every rank runs this loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.config import TrainConfig
from grpo.engines import Engine, EngineError
from grpo.experience.group_metrics import sample_rows
from grpo.experience.hints import OtherVocabulary, TeacherSettings, teacher_texts
from grpo.learning.advantages import (
    completion_lengths,
    normalized_rewards,
    recipe_advantages,
    to_samples,
    unflatten,
)
from grpo.metrics import roofline
from grpo.run import ranks
from grpo.run.directory import RunDirectory
from grpo.run.display import Display, Timer
from grpo.run.signals import Signals
from grpo.training.journal import Journal
from grpo.training.rollouts import RolloutGroups, Rollouts
from grpo.training.step_metrics import MachineReport, StepReport, start_row, step_row
from grpo.training.updates import Updater, UpdateReport
from grpo.training.weight_sync import FirstGap, WeightCheck, sync_weights
from grpo.types import Sample, ScoredGroup, TeacherText, TrainingStoppedError

# Both hold one value per token: [group][completion][token].
KlPenalties = list[list[list[float]]]
Advantages = list[list[tuple[float, ...]]]
TeacherTexts = list[list[TeacherText | None]]  # [group][completion]


@dataclass(kw_only=True)
class Progress:
    """The progress of a run. A checkpoint contains `rollout`, `num_idle` and `selection`.

    Attributes:
        rollout: Number of completed rollouts, including their updates.
        saved_rollout: `rollout` of the last checkpoint, -1 without one.
        num_idle: Number of consecutive rollouts without an update.
        selection: State of the selection after the last completed rollout.
        is_savable: Whether the learner's weights may be saved after an error. False from the start
            of a rollout's updates until the probe has verified the new weights.
            RunInterruptedError and TrainingStoppedError do not depend on it: they are raised only
            while no update is partly applied.
    """

    rollout: int = 0
    saved_rollout: int = -1
    num_idle: int = 0
    selection: dict[str, Any] = field(default_factory=dict)
    is_savable: bool = True


@dataclass(kw_only=True)
class Loop:
    """A training run. grpo/stages/train.py creates its parts.

    Attributes:
        config: The config of the run.
        run: The run directory.
        engine: Samples completions.
        rollouts: Samples, scores and selects groups.
        updater: Runs the optimizer updates.
        weight_check: Compares engine and learner.
        journal: Records metrics and collects alarms.
        display: Shows progress.
        signals: Ctrl-C and SIGTERM.
        limits: The measured rates of the machine and the shape of the model.
        vocabularies: The teachers whose vocabulary is not the policy's, by name.
        progress: The progress of the run.
    """

    config: TrainConfig
    run: RunDirectory
    engine: Engine
    rollouts: Rollouts
    updater: Updater
    weight_check: WeightCheck
    journal: Journal
    display: Display
    signals: Signals
    limits: roofline.Roofline
    vocabularies: Mapping[str, OtherVocabulary] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def start(self, fresh: bool) -> None:
        """Verifies the weight sync and sends the learner's weights to the engine.

        Call it before `train`. A fresh run is evaluated before its first step. A resumed run is
        evaluated if it was interrupted before an evaluation that was due. In both cases a row of
        metrics is recorded.

        Args:
            fresh: Whether the run is new, not resumed.

        Raises:
            WeightMismatchError: The canary or the probe failed.
        """
        progress = self.progress
        learner = self.updater.learner
        self.display.phase(progress.rollout, "canary")
        if self.config.probe.canary:
            gap = self.weight_check.canary(0, self.signals)
            self.display.say(f"canary: perturbed weights arrived in the engine (gap {gap:.1e})")
        sync_weights(self.engine, learner, self._next_version(), self.signals)
        probe = self.weight_check.probe(full_batch=True)
        row = start_row(progress.rollout, learner.num_updates, self.limits.machine, probe)
        if fresh or self._is_evaluation_missing():
            row.update(self._evaluate() or {})
            self.journal.record(row)

    def train(self) -> None:
        """Runs all remaining steps, with checkpoints and alarms.

        If it raises RunInterruptedError, the state of the run is that of the last completed
        rollout.
        """
        self.display.begin(self.progress.rollout)
        while self.progress.rollout < self.config.train.rollouts:
            self.step()
            self._handle_alarms()
            if self._is_due(self.config.checkpoint.every):
                self.save()

    def step(self) -> None:
        """Runs one rollout and its updates, verifies the new weights, and records the step.

        On a GPU that learner and engine share, the engine sleeps during the updates, so that they
        can use its memory. Before it wakes, the learner returns memory that PyTorch has cached, if
        the engine needs it (`VllmEngine.wake`). The sync follows, because sleep discards the
        engine's weights.

        If the sync, the probe or the evaluation fails on all ranks, the step is recorded before the
        error is raised.
        """
        timer = Timer()
        groups = self._next_groups(timer)  # sampled, scored and selected
        ranks.all_gather_or_raise("engine sleep", self.engine.sleep)
        self.display.phase(self.progress.rollout, "update")
        texts_PG = self._teacher_texts(groups.used)
        kl_penalties = self._kl_penalties(groups.used, texts_PG, timer)
        self.progress.is_savable = False  # until the probe has verified the new weights
        token_advantages = self._advantages(groups.used, kl_penalties)
        samples = self._make_samples(groups, token_advantages, texts_PG)
        update = self._update(samples, timer)
        report = StepReport(
            rollout=self.progress.rollout,
            updates=self.updater.learner.num_updates,
            groups=groups,
            samples=samples,
            kl_penalty=_mean_kl(kl_penalties, self.updater.penalty_coefficient),
            update=update,
        )
        try:
            report = self._sync_and_verify(report, timer)
            report = self._evaluate_if_due(report, timer)
        except Exception as error:
            self._record_failed_step(report, error, timer)
            raise
        self._record(report, timer)
        self._stop_if_idle()

    def _next_groups(self, timer: Timer) -> RolloutGroups:
        try:
            groups = self.rollouts.next_groups(self.progress.rollout, timer)
        except TrainingStoppedError:
            self._write_samples(sample_rows(self.rollouts.sampled_so_far))
            raise
        if self.config.algorithm.advantage != "teacher":
            return groups
        # The advantages come from the teacher and the rewards are only metrics, so a completion
        # without a reward takes part in the update.
        return replace(groups, used=[_with_decided_rewards(scored) for scored in groups.used])

    def _teacher_texts(self, groups: list[ScoredGroup]) -> TeacherTexts:
        """Returns what a teacher reads in place of each completion; None if it reads the same."""
        settings = TeacherSettings(
            hint=self.config.algorithm.teacher_hint,
            max_hint_tokens=self.config.algorithm.teacher_hint_tokens,
            names=self.config.model.teachers,
            vocabularies=self.vocabularies,
        )
        return teacher_texts(groups, self.rollouts.prompts, settings)

    def _kl_penalties(
        self, groups: list[ScoredGroup], texts_PG: TeacherTexts, timer: Timer
    ) -> KlPenalties | None:
        """Returns the KL penalties of all tokens.

        Returns None if the recipe has no penalty, or without groups.
        """
        with timer("update"):
            if self.updater.penalty_estimator is None:
                return None
            no_advantages = []
            for group_lengths in completion_lengths(groups):
                no_advantages.append([(0.0,) * length for length in group_lengths])
            # `to_samples` skips completions without a reward. With rewards of 0 for all of them,
            # there is one sample, and one list of penalties, per completion.
            rewarded = [replace(scored, rewards=(0.0,) * len(scored.rewards)) for scored in groups]
            samples = to_samples(
                rewarded,
                no_advantages,
                teacher_texts_PG=texts_PG,
                teachers=self.config.model.teachers,
            )
            penalties = self.updater.kl_penalties(samples)
            if penalties is None:
                return None
            return unflatten(penalties, [len(scored.rewards) for scored in groups])

    def _advantages(
        self, groups: list[ScoredGroup], kl_penalties: KlPenalties | None
    ) -> Advantages:
        algorithm = self.config.algorithm
        rewards: Sequence[Sequence[float | None]] = [scored.rewards for scored in groups]
        if algorithm.advantage == "per_reward":
            weights = {name: weight for name, (_, weight) in self.rollouts.rewards.items()}
            parts = [scored.parts for scored in groups]
            rewards = normalized_rewards(rewards, parts, weights)
        return recipe_advantages(algorithm, rewards, completion_lengths(groups), kl_penalties)

    def _make_samples(
        self,
        groups: RolloutGroups,
        token_advantages: Advantages,
        texts_PG: TeacherTexts,
    ) -> list[Sample]:
        """Returns one sample per completion to learn from, and writes the files in samples/."""
        self._write_samples(sample_rows(groups.sampled, groups.used, token_advantages))
        mask_truncated = self.config.algorithm.truncated == "mask"
        samples = to_samples(
            groups.used,
            token_advantages,
            mask_truncated=mask_truncated,
            teacher_texts_PG=texts_PG,
            teachers=self.config.model.teachers,
        )
        self.run.write_update_samples(
            self.progress.rollout + 1, samples, self.config.logging.replay
        )
        return samples

    def _update(self, samples: list[Sample], timer: Timer) -> UpdateReport:
        """Runs the optimizer updates of the rollout and counts the rollout as completed."""
        progress = self.progress
        with timer("update"):
            report = self.updater.update(samples, progress.rollout, self._show_update)
        progress.num_idle = 0 if report.num_updates else progress.num_idle + 1
        progress.rollout += 1
        progress.selection = self.rollouts.selection.state()
        return report

    def _sync_and_verify(self, report: StepReport, timer: Timer) -> StepReport:
        """Sends the new weights to the engine and verifies them with the probe."""
        learner = self.updater.learner
        with timer("sync"):
            self.display.phase(self.progress.rollout - 1, "sync")
            merged_share = learner.merged_share()  # before the engine takes its memory again
            ranks.all_gather_or_raise("engine wake-up", self.engine.wake)
            sync_report = sync_weights(self.engine, learner, self._next_version(), self.signals)
        with timer("probe"):
            full_batch = self._is_due(self.config.probe.full_batch_every)
            probe_report = self.weight_check.probe(full_batch=full_batch)
        self.progress.is_savable = True
        return replace(report, sync=sync_report, probe=probe_report, merged_share=merged_share)

    def _next_version(self) -> int:
        """Returns the version of the weights that sample the next rollout: 1 for the first."""
        return self.progress.rollout + 1

    def _evaluate_if_due(self, report: StepReport, timer: Timer) -> StepReport:
        if not self._is_due(self.config.eval.every):
            return report
        with timer("eval"):
            return replace(report, evaluation=self._evaluate())

    def _record(self, report: StepReport, timer: Timer) -> None:
        self.journal.record(step_row(report, self._machine_report(), self.config, timer))

    def _record_failed_step(self, report: StepReport, error: Exception, timer: Timer) -> None:
        """Records a step whose sync, probe or evaluation raised `error`.

        Recording exchanges values between ranks, so it is possible only if all ranks raise.
        """
        if isinstance(error, EngineError):
            self.progress.is_savable = True  # The engine failed, not the learner.
        if ranks.is_raised_on_all_ranks(error):
            self._record(report, timer)

    def _machine_report(self) -> MachineReport:
        stream = self.rollouts.selection.stream
        return MachineReport(
            limits=self.limits,
            engine_counts=getattr(self.engine, "counts", {}),
            engine_idle_s=stream.engine_idle_s() if stream is not None else None,
        )

    def _stop_if_idle(self) -> None:
        """Stops the training after `algorithm.max_idle` consecutive rollouts without an update.

        Raises:
            TrainingStoppedError: The number of such rollouts is a multiple of `max_idle`.
        """
        num_idle = self.progress.num_idle
        max_idle = self.config.algorithm.max_idle
        if num_idle and max_idle and num_idle % max_idle == 0:
            raise TrainingStoppedError(
                f"algorithm.max_idle={max_idle}: {num_idle} consecutive rollouts without an "
                "update, because the completions of every group have equal rewards (mean reward "
                f"{self.journal.latest_metrics['reward/mean']:.3g}). The problems are too hard or "
                "too easy for this model, or a reward cannot parse its answers: see samples/."
            )

    def _evaluate(self) -> dict[str, float] | None:
        """Evaluates on the held-out problems and writes the completions to samples/.

        Returns the `eval/` metrics, None without held-out problems.
        """
        if not self.rollouts.held_out:
            return None
        rollout = self.progress.rollout
        evaluation = self.rollouts.evaluate(rollout)
        self.run.write_samples(f"eval-{rollout:06d}", evaluation.rows)
        accuracy = evaluation.metrics.get("eval/accuracy")
        if accuracy is not None:
            self.display.say(
                f"evaluation after {rollout} rollouts: accuracy {accuracy:.1%} on "
                f"{len(self.rollouts.held_out)} held-out problems"
            )
        return evaluation.metrics

    def _is_evaluation_missing(self) -> bool:
        """Returns whether an evaluation is due and the last row of metrics has none."""
        if not self._is_due(self.config.eval.every):
            return False
        return not any(key.startswith("eval/") for key in self.journal.latest_metrics)

    def _handle_alarms(self) -> None:
        """Writes a checkpoint for each alarm and protects it from pruning.

        Raises:
            TrainingStoppedError: The action of the alarm in `logging.alarms` is `stop`.
        """
        for finding in self.journal.take_alarms():
            self.save()
            checkpoint = self.run.checkpoints / f"step-{self.progress.rollout:06d}"
            self.run.keep_checkpoint(checkpoint, f"alarm-{finding.rule}")
            if self.config.logging.alarms[finding.rule] == "stop":
                raise TrainingStoppedError(f"logging.alarms.{finding.rule}: {finding.text}")

    def save(self) -> None:
        """Writes a checkpoint of the last completed rollout, unless it exists."""
        progress = self.progress
        if progress.saved_rollout == progress.rollout:
            return
        self.display.phase(progress.rollout, "checkpoint")
        state: dict[str, Any] = {
            "updates": self.updater.learner.num_updates,
            "seed": self.config.seed,
            "metrics": self.journal.latest_metrics,
            "selection": progress.selection,
            "idle": progress.num_idle,
            "first_gap": self.weight_check.first_gap,
        }
        self.run.save_checkpoint(progress.rollout, state, self.updater.learner.save)
        self.run.prune_checkpoints(
            self.config.checkpoint.keep_last, self.config.checkpoint.keep_best
        )
        progress.saved_rollout = progress.rollout

    def resume(self, state: dict[str, Any]) -> None:
        """Restores progress, metrics and selection from a checkpoint's state.

        The learner is restored separately, with `Learner.load`.
        """
        self.progress.rollout = state["step"]
        self.progress.saved_rollout = state["step"]
        self.progress.num_idle = state["idle"]
        self.journal.latest_metrics = state["metrics"]
        self.rollouts.selection.load(state["selection"])
        if state.get("first_gap") is not None:  # checkpoints of earlier versions do not have it
            self.weight_check.first_gap = FirstGap(*state["first_gap"])

    def _is_due(self, every: int) -> bool:
        """Returns whether the last completed rollout is a multiple of `every` or the final one."""
        rollout = self.progress.rollout
        return every > 0 and (rollout % every == 0 or rollout == self.config.train.rollouts)

    def _write_samples(self, rows: list[dict[str, Any]]) -> None:
        self.run.write_samples(f"step-{self.progress.rollout + 1:06d}", rows)

    def _show_update(self, done: int, total: int) -> None:
        self.display.phase(self.progress.rollout, "update", f"{done}/{total}")


def _with_decided_rewards(scored: ScoredGroup) -> ScoredGroup:
    """Returns a group with reward 0 for each completion without a reward."""
    return replace(scored, rewards=tuple(reward or 0.0 for reward in scored.rewards))


def _mean_kl(kl_penalties: KlPenalties | None, coefficient: float) -> float | None:
    """Returns the mean KL per token: the mean penalty divided by its coefficient."""
    if kl_penalties is None:
        return None
    tokens: list[float] = []
    for group_penalties in kl_penalties:
        for completion_penalties in group_penalties:
            tokens += completion_penalties
    return sum(tokens) / len(tokens) / coefficient
