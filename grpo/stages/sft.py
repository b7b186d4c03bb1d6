"""`grpo sft`: supervised fine-tuning on worked solutions, which is R1's cold start.

It runs TRL's SFTTrainer with DeepSpeed under it.

The trainer's own are the loss (cross-entropy over the solution's tokens alone, one mean over an
update) and the loop. Ours are the prompts (those that GRPO will use), the order of the data, the
learning rate, the run directory, checkpoints and metrics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo.config import SftConfig
from grpo.experience.prompts import Prompts
from grpo.learning import models
from grpo.run import ranks
from grpo.run.display import quiet
from grpo.run.signals import Interrupted
from grpo.stages.final_model import write_final
from grpo.stages.problems import load_problems, mixture
from grpo.stages.run_context import RunContext, open_stage
from grpo.stages.solutions import check_solutions, tokenize_solutions
from grpo.stages.stage import (
    Check,
    DiskNeeds,
    MemoryNeeds,
    Part,
    ProblemNeeds,
    Stage,
    StageNeeds,
    num_checkpoints,
)
from grpo.stages.start_model import find_model, require_same_start
from grpo.types import Problem, UserError

STOP_WINDOW = 10  # updates whose mean token accuracy is compared with sft.stop_at


def sft(config: SftConfig, *, resume: bool) -> None:
    """Trains on `sft.updates x sft.batch_size` solutions and writes `final/`.

    Raises UserError, RunError, Interrupted (saved).
    """
    if config.sft.batch_size % ranks.world_size():
        raise UserError(
            f"sft.batch_size={config.sft.batch_size} cannot be split evenly over "
            f"{ranks.world_size()} ranks"
        )
    problems = load_problems(config.data, "train", config.seed)
    total = config.sft.updates
    with open_stage(config, "sft", total=total, unit="update", resume=resume) as context:
        _run(config, context, problems, resume=resume)


def _run(config: SftConfig, context: RunContext, problems: Any, *, resume: bool) -> None:
    run, display = context.run, context.display
    display.phase(0, "loading the model")
    model_dir, tokenizer, prompts = find_model(config, run)
    models.check_context(model_dir, config.sft.max_tokens)
    stream = mixture(config.data, problems, prompts, config.seed)
    require_same_start(tokenizer, stream)
    drawn = stream.take(0, config.sft.updates * config.sft.batch_size)
    checkpoint, state = run.last_state() if resume else (None, {})
    done = state["step"] if checkpoint else 0
    if resume:
        context.continue_after(done if checkpoint else None, "update")
    with quiet(run.log_file("learner")):
        from grpo.learning.supervised import SupervisedInputs, SupervisedTrainer

        callbacks = Callbacks(config, context)
        inputs = SupervisedInputs(
            model_dir=model_dir,
            tokenizer=tokenizer,
            rows=rows(drawn, prompts, config.sft.max_tokens),
        )
        trainer = SupervisedTrainer(config, inputs, callbacks, output_dir=run.checkpoints)
        display.begin(done)
        trainer.train(
            resume_from_checkpoint=str(checkpoint / f"checkpoint-{done}") if checkpoint else None
        )
        if callbacks.signal is not None:
            display.say(
                f"stopped after update {trainer.state.global_step}, saved; go on with --resume"
            )
            raise Interrupted(callbacks.signal)
    write_final(context, config, model_dir, tokenizer, trainer)


class Callbacks:
    """What TRL's trainer calls: metrics after an update, checkpoints, and whether to stop."""

    def __init__(self, config: SftConfig, context: RunContext) -> None:
        """Starts from the metrics of the updates before a resume, if there are any."""
        self.signal: str | None = None  # that stops the run, whichever rank has got it
        self._config = config
        self._context = context
        self._latest: dict[str, Any] = {}
        rows = ranks.all_gather("the metrics so far", context.run.read_metrics())[0]
        accuracies = [row["policy/token_accuracy"] for row in rows]
        self._accuracies: deque[float] = deque(accuracies, maxlen=STOP_WINDOW)

    def on_update(self, row: dict[str, Any]) -> None:
        """Records and shows an update's metrics."""
        self._latest.update(row)
        self._accuracies.append(row["policy/token_accuracy"])
        self._context.record(row)
        self._context.display.row(row)
        self._context.display.phase(row["step"], "update")

    def save(self, update: int, write: Callable[[Path], None]) -> None:
        """Writes a checkpoint; `write(directory)` puts the trainer's state there."""
        run, settings = self._context.run, self._config.checkpoint
        self._context.display.phase(update, "checkpoint")
        state = {"updates": update, "seed": self._config.seed, "metrics": self._latest}
        run.save(update, state, write)
        run.prune(settings.keep_last, settings.keep_best)

    def stop(self) -> bool:
        """Returns whether to stop: the model is good enough, or a rank has got a signal."""
        signals = ranks.all_gather("the update", self._context.signals.got)
        self.signal = next((signal for signal in signals if signal), None)
        return self.signal is not None or self._is_good_enough()

    def _is_good_enough(self) -> bool:
        stop_at = self._config.sft.stop_at
        if stop_at is None or len(self._accuracies) < STOP_WINDOW:
            return False
        return bool(sum(self._accuracies) / STOP_WINDOW >= stop_at)


def rows(
    problems: list[Problem], prompts: Prompts, max_tokens: int
) -> Iterator[dict[str, list[int]]]:
    """Yields `input_ids` and `labels` (-100 on the prompt).

    Raises UserError naming a problem without a solution or too long.
    """
    for prompt, target in tokenize_solutions(problems, prompts, max_tokens, "sft"):
        yield {"input_ids": [*prompt, *target], "labels": [-100] * len(prompt) + list(target)}


class _SftStage:
    command = "sft"
    config_class = SftConfig
    sections = ("sft",)

    def run(self, config: SftConfig, *, resume: bool) -> None:
        sft(config, resume=resume)

    def arithmetic(self, config: SftConfig) -> str:
        batch_size = config.sft.batch_size
        return (
            f"an update   {batch_size} solutions in {batch_size // config.micro_batch} "
            f"micro-batches of {config.micro_batch}\n"
            f"the run     {config.sft.updates} updates, {config.sft.updates * batch_size:,} "
            "solutions drawn"
        )

    def needs(self, config: SftConfig) -> StageNeeds:
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                training=config.data, num_training=config.sft.updates * config.sft.batch_size
            ),
            memory=MemoryNeeds(learner=True),
            disk=DiskNeeds(checkpoints=num_checkpoints(config), models=1),
            shows_solution=True,
        )

    def parts(self, config: SftConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def preview(self, config: SftConfig) -> list[str]:
        return []

    def checks(
        self, config: SftConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return check_solutions(config.max_sequence_tokens, problems, prompts)


STAGE: Stage[SftConfig] = _SftStage()
