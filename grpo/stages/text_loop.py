"""The training of a learner on given texts, without an engine.

Soft distillation uses it, and supervised fine-tuning with sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grpo.config import RunConfig, SftSettings, SoftTargetSettings
from grpo.run import ranks
from grpo.run.display import Timer, redirect_output
from grpo.run.signals import RunInterruptedError
from grpo.stages.run_context import RunContext
from grpo.stages.teacher_texts import Texts
from grpo.types import Batch


def _unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(kw_only=True)
class TextLoop:
    """The training loop.

    Attributes:
        config: The config of the run.
        context: The run.
        settings: The section of the config with `updates`, `batch_size` and `max_tokens`.
        learner: The learner.
        texts: The texts in the order of the updates, `batch_size` per update.
        prepare_batch: Returns a micro-batch with further targets.
        last_saved: Number of updates in the last checkpoint, -1 without one.
        last_row: Metrics of the last update.
    """

    config: RunConfig
    context: RunContext
    settings: SftSettings | SoftTargetSettings
    learner: Any
    texts: Texts
    prepare_batch: Callable[[Batch], Batch] = _unchanged
    last_saved: int = -1
    last_row: dict[str, Any] = field(default_factory=dict)

    def resume(self) -> None:
        """Loads the last checkpoint and removes the records that are newer."""
        run = self.context.run
        checkpoint, _ = run.read_last_checkpoint()
        if checkpoint is None:
            self.context.resume_after(None, "update")
            return
        with redirect_output(run.log_file("learner")):
            self.learner.load(checkpoint)
        self.last_saved = self.learner.num_updates
        self.context.resume_after(self.learner.num_updates, "update")

    def train(self) -> None:
        """Runs all remaining updates and saves the last one.

        Raises:
            RunInterruptedError: A signal stopped the run. The last complete update is saved.
        """
        every = self.config.checkpoint.every
        self.context.display.begin(self.learner.num_updates)
        while self.learner.num_updates < self.settings.updates:
            self.step()
            if every and self.learner.num_updates % every == 0:
                self.save()
        self.save()

    def step(self) -> None:
        """Runs one update and records its metrics."""
        context, learner = self.context, self.learner
        timer = Timer()
        batches = self.batches()
        try:
            with timer("update"):
                ranks.all_gather_or_raise("the update", context.signals.raise_if_received)
                metrics = learner.update(batches, self._check_signals)
        except RunInterruptedError:
            self.save()
            context.display.say(
                f"stopped after update {learner.num_updates}: saved; continue with --resume"
            )
            raise
        # Nothing is sampled, so the metrics that compare an engine with the learner do not apply.
        row = {key: value for key, value in metrics.items() if not key.startswith("mismatch/")}
        row["step"] = learner.num_updates
        row["update"] = learner.num_updates
        row.update(timer.metrics())
        self.last_row = row
        context.record(row)
        context.display.row(row)
        context.display.phase(learner.num_updates, "update")

    def _check_signals(self, num_done: int, total: int) -> None:
        """Raises RunInterruptedError after a micro-batch if a signal arrived."""
        # With several ranks, the others would wait in a collective for the rank that stops.
        if ranks.world_size() == 1:
            self.context.signals.raise_if_received()

    def batches(self) -> list[Batch]:
        """Returns the micro-batches of the next update."""
        from grpo.learning.batch import micro_batches, token_weights

        batch_size = self.settings.batch_size
        start = self.learner.num_updates * batch_size
        texts = self.texts[start : start + batch_size]
        batches = micro_batches(
            texts,
            token_weights(texts, "token", self.settings.max_tokens),
            max_tokens=self.config.learner.micro_batch_tokens,
            packed=self.config.model.is_packed,
            share=self.learner.micro_batch_share,
        )
        return [self.prepare_batch(batch) for batch in batches]

    def save(self) -> None:
        """Writes a checkpoint, unless the last one is of the same update."""
        num_updates = self.learner.num_updates
        if self.last_saved == num_updates:
            return
        self.last_saved = num_updates
        run, settings = self.context.run, self.config.checkpoint
        state = {"updates": num_updates, "seed": self.config.seed, "metrics": self.last_row}
        run.save_checkpoint(num_updates, state, self.learner.save)
        run.prune_checkpoints(settings.keep_last, settings.keep_best)
