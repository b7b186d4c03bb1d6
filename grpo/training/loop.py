"""The training loop: sample, select, compute advantages, update, sync, verify, record.

It holds the run's counters; all other state over time is in the learner, the selection and the
journal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from grpo.config import Config
from grpo.engines import Engine, EngineError
from grpo.experience.describing import sample_rows
from grpo.learning.advantages import advantages, lengths, to_samples, unflatten
from grpo.metrics import roofline
from grpo.run import ranks
from grpo.run.directory import RunDirectory
from grpo.run.display import Display, Timer
from grpo.run.signals import Signals
from grpo.training.journal import Journal
from grpo.training.rollouts import RolloutGroups, Rollouts
from grpo.training.step_metrics import MachineReport, StepReport, start_row, step_row
from grpo.training.updates import Updater
from grpo.training.weight_sync import WeightCheck, sync
from grpo.types import Exhausted, ScoredGroup


@dataclass(kw_only=True)
class Progress:
    """How far a run is. `rollout`, `idle` and `selection` are part of every checkpoint."""

    rollout: int = 0  # whole rollouts, with their updates
    saved: int = -1  # rollouts of the last checkpoint
    idle: int = 0  # rollouts in a row without an update
    selection: dict[str, Any] = field(default_factory=dict)  # after the last whole rollout
    # False while the learner is in the middle of a rollout's updates, or its weights are in doubt:
    # after an error such a state is not saved. Interrupted and Exhausted are raised only where the
    # learner is whole.
    savable: bool = True


@dataclass(kw_only=True)
class Loop:
    """A run, put together by grpo/stages/train.py."""

    config: Config
    run: RunDirectory
    engine: Engine
    rollouts: Rollouts
    updater: Updater
    weight_check: WeightCheck
    journal: Journal
    display: Display
    signals: Signals
    machine: roofline.Machine
    shape: roofline.Shape
    progress: Progress = field(default_factory=Progress)

    def start(self, fresh: bool) -> None:
        """Verifies the way from learner to engine and puts the true weights there.

        A fresh run is evaluated before it learns.
        """
        progress = self.progress
        learner = self.updater.learner
        self.display.phase(progress.rollout, "canary")
        if self.config.probe.canary:
            gap = self.weight_check.canary(0, self.signals)
            self.display.say(f"canary: perturbed weights arrived in the engine (gap {gap:.1e})")
        # weights n sample rollout n
        sync(self.engine, learner, progress.rollout + 1, self.signals)
        probe = self.weight_check.probe()
        row = start_row(progress.rollout, learner.updates, self.machine, probe)
        if fresh or self._evaluation_is_missing():
            row.update(self.evaluate() or {})
            self.journal.record(row)

    def train(self) -> None:
        """Runs to the last rollout.

        On `Interrupted` the state is that of the last whole rollout.
        """
        self.display.begin(self.progress.rollout)
        while self.progress.rollout < self.config.train.rollouts:
            self.step()
            self.handle_alarms()
            if self._is_due(self.config.checkpoint.every):
                self.save()

    def step(self) -> None:
        """Makes one rollout and its updates, verifies the new weights in the engine, and records.

        What was measured is recorded before an error of the sync, the probe or the evaluation is
        raised, if all ranks raise it.
        """
        timer = Timer()
        groups = self._next_groups(timer)
        ranks.all_gather_or_raise("the engines' sleep", self.engine.sleep)
        report = self._update(groups, timer)
        error: Exception | None = None
        try:
            report = self._sync_and_verify(report, timer)
            if self._is_due(self.config.eval.every):
                with timer("eval"):
                    report = replace(report, evaluation=self.evaluate())
        except Exception as failure:
            error = failure
            if isinstance(failure, EngineError):
                self.progress.savable = True  # nothing speaks against the learner's weights
            if not ranks.known_to_all(failure):
                raise
        self.journal.record(step_row(report, self._machine_report(), self.config, timer))
        if error is not None:
            raise error
        self._stop_if_idle()

    def _next_groups(self, timer: Timer) -> RolloutGroups:
        try:
            groups = self.rollouts.next_groups(self.progress.rollout, timer)
        except Exhausted:
            self._write_samples(sample_rows(self.rollouts.sampled_so_far))
            raise
        if self.config.algorithm.advantage == "teacher":
            # rewards are only measured: an undecided one leaves no completion out
            return replace(groups, used=[_with_decided_rewards(each) for each in groups.used])
        return groups

    def _update(self, groups: RolloutGroups, timer: Timer) -> StepReport:
        """Computes advantages, makes the rollout's updates and counts the rollout."""
        algorithm = self.config.algorithm
        progress = self.progress
        with timer("update"):
            penalties = self._kl_penalties(groups.used)
        progress.savable = False
        values = advantages(
            [scored.rewards for scored in groups.used],
            lengths(groups.used),
            algorithm.advantage,
            penalties,
        )
        self._write_samples(sample_rows(groups.sampled, groups.used, values))
        samples = to_samples(groups.used, values, mask_truncated=algorithm.truncated == "mask")
        self.run.write_update(progress.rollout + 1, samples, self.config.logging.replay)
        with timer("update"):
            update = self.updater.update(samples, progress.rollout, self._show_update)
        progress.idle = 0 if update.num_made else progress.idle + 1
        progress.rollout += 1
        progress.selection = self.rollouts.selection.state()
        return StepReport(
            rollout=progress.rollout,
            updates=self.updater.learner.updates,
            groups=groups,
            samples=samples,
            kl_penalty=_mean_kl(penalties, self.updater.penalty_coefficient),
            update=update,
        )

    def _kl_penalties(self, groups: list[ScoredGroup]) -> list[list[list[float]]] | None:
        """Returns what each token is charged, by group and completion; None without penalties."""
        if self.updater.penalty_estimator is None:
            return None
        zeros = [[(0.0,) * length for length in row] for row in lengths(groups)]
        # undecided completions too, so that penalties and completions have the same places
        decided = [replace(scored, rewards=(0.0,) * len(scored.rewards)) for scored in groups]
        penalties = self.updater.kl_penalties(to_samples(decided, zeros))
        if penalties is None:
            return None
        return unflatten(penalties, [len(scored.rewards) for scored in groups])

    def _sync_and_verify(self, report: StepReport, timer: Timer) -> StepReport:
        """Sends the new weights to the engine and probes them."""
        progress = self.progress
        with timer("sync"):
            self.display.phase(progress.rollout - 1, "sync")
            ranks.all_gather_or_raise("the engines' waking", self.engine.wake)
            learner = self.updater.learner
            sync_report = sync(self.engine, learner, progress.rollout + 1, self.signals)
        with timer("probe"):
            probe_report = self.weight_check.probe()
        progress.savable = True
        return replace(report, sync=sync_report, probe=probe_report)

    def _machine_report(self) -> MachineReport:
        stream = self.rollouts.selection.stream
        return MachineReport(
            machine=self.machine,
            shape=self.shape,
            engine_counts=getattr(self.engine, "counts", {}),
            engine_idle_s=stream.idle() if stream is not None else None,
        )

    def _stop_if_idle(self) -> None:
        """Raises Exhausted after `algorithm.max_idle` rollouts in a row without an update."""
        idle = self.progress.idle
        max_idle = self.config.algorithm.max_idle
        if idle and max_idle and idle % max_idle == 0:
            raise Exhausted(
                f"{idle} rollouts in a row taught nothing: the completions of every group have "
                f"equal rewards ({self.journal.latest['reward/mean']:.3g} in the mean). The "
                "problems are too hard or too easy for this model, or a reward cannot read its "
                "answers: see samples/"
            )

    def evaluate(self) -> dict[str, float] | None:
        """Returns accuracy and other metrics on held-out problems, and keeps the completions.

        Without held-out problems it returns None.
        """
        if not self.rollouts.held_out:
            return None
        rollout = self.progress.rollout
        metrics, rows = self.rollouts.evaluate(rollout)
        self.run.write_samples(f"eval-{rollout:06d}", rows)
        accuracy = metrics.get("eval/accuracy")
        if accuracy is not None:
            self.display.say(
                f"held-out accuracy after {rollout} rollouts: {accuracy:.1%} of "
                f"{len(self.rollouts.held_out)} problems"
            )
        return metrics

    def handle_alarms(self) -> None:
        """Does what `logging.alarms` asks for.

        Keeps a checkpoint beside the others, or stops the run (Exhausted: it is saved).
        """
        for finding in self.journal.take_alarms():
            self.save()
            checkpoint = self.run.checkpoints / f"step-{self.progress.rollout:06d}"
            self.run.keep(checkpoint, f"alarm-{finding.rule}")
            if self.config.logging.alarms[finding.rule] == "stop":
                raise Exhausted(f"logging.alarms.{finding.rule}: {finding.text}")

    def save(self) -> None:
        """Writes a checkpoint of the last whole rollout, unless there is one."""
        progress = self.progress
        if progress.saved == progress.rollout:
            return
        self.display.phase(progress.rollout, "checkpoint")
        state: dict[str, Any] = {
            "updates": self.updater.learner.updates,
            "seed": self.config.seed,
            "metrics": self.journal.latest,
            "selection": progress.selection,
            "idle": progress.idle,
        }
        self.run.save(progress.rollout, state, self.updater.learner.save)
        self.run.prune(self.config.checkpoint.keep_last, self.config.checkpoint.keep_best)
        progress.saved = progress.rollout

    def resume(self, state: dict[str, Any]) -> None:
        """Takes up the counters and the selection of a checkpoint's state."""
        self.progress.rollout = state["step"]
        self.progress.saved = state["step"]
        self.progress.idle = state["idle"]
        self.journal.latest = state["metrics"]
        self.rollouts.selection.load(state["selection"])

    def _evaluation_is_missing(self) -> bool:
        """Returns whether a run was interrupted before an evaluation that was due."""
        if not self._is_due(self.config.eval.every):
            return False
        return not any(key.startswith("eval/") for key in self.journal.latest)

    def _is_due(self, every: int) -> bool:
        rollout = self.progress.rollout
        return every > 0 and (rollout % every == 0 or rollout == self.config.train.rollouts)

    def _write_samples(self, rows: list[dict[str, Any]]) -> None:
        self.run.write_samples(f"step-{self.progress.rollout + 1:06d}", rows)

    def _show_update(self, done: int, total: int) -> None:
        self.display.phase(self.progress.rollout, "update", f"{done}/{total}")


def _with_decided_rewards(scored: ScoredGroup) -> ScoredGroup:
    return replace(scored, rewards=tuple(reward or 0.0 for reward in scored.rewards))


def _mean_kl(penalties: list[list[list[float]]] | None, coefficient: float) -> float | None:
    """Returns the mean KL per token, before its coefficient."""
    if penalties is None:
        return None
    tokens = [penalty for group in penalties for completion in group for penalty in completion]
    return sum(tokens) / len(tokens) / coefficient
