"""`grpo sft`: supervised fine-tuning on worked solutions, for example R1's cold start.

TRL's SFTTrainer on DeepSpeed provides the training loop and the loss: the cross-entropy of the
solution tokens, averaged over all of them in an update. grpo provides the prompts (the same as in
GRPO), the data order, the learning rate, the run directory, checkpoints and metrics.

With `learner.sequence_parallel`, the learner of GRPO makes the same updates instead, because it can
share a sequence across ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo.config import SftConfig
from grpo.experience import plugins
from grpo.experience.prompts import Prompts
from grpo.learning import lora, models
from grpo.run import ranks
from grpo.run.display import redirect_output
from grpo.run.signals import RunInterruptedError
from grpo.stages.final_model import write_final
from grpo.stages.problems import load_problems, make_mixture
from grpo.stages.run_context import RunContext, open_stage
from grpo.stages.solutions import (
    SolutionTexts,
    TrainingLimits,
    check_solutions,
    take_trainable,
    tokenize_solutions,
)
from grpo.stages.stage import (
    Check,
    DiskNeeds,
    MemoryNeeds,
    Part,
    ProblemNeeds,
    Stage,
    StageNeeds,
    max_checkpoints_on_disk,
)
from grpo.stages.start_model import StartModel, find_start_model, require_same_start
from grpo.stages.text_loop import TextLoop
from grpo.types import Problem, UserError

STOP_WINDOW = 10  # updates whose mean token accuracy is compared with sft.stop_at


def sft(config: SftConfig, *, resume: bool) -> None:
    """Trains on `sft.updates * sft.batch_size` solutions, or until `sft.stop_at`; writes `final/`.

    Raises:
        UserError: The config, the data or the model is wrong.
        RunError: The run cannot continue.
        RunInterruptedError: A signal stopped the run after it had saved a checkpoint.
    """
    _check_ranks(config)
    total = config.sft.updates
    with open_stage(config, "sft", total=total, unit="update", resume=resume) as context:
        with context.loading_problems():
            problems = load_problems(config.data, "train", config.seed, say=context.display.say)
        _run(config, context, problems, resume=resume)


def _check_ranks(config: SftConfig) -> None:
    """Raises UserError if the config does not fit the number of ranks."""
    num_ranks = ranks.world_size()
    size = config.learner.sequence_parallel
    if num_ranks % size:
        raise UserError(
            f"learner.sequence_parallel={size} does not divide the number of ranks, {num_ranks}"
        )
    if size == 1 and config.sft.batch_size % num_ranks:
        raise UserError(
            f"sft.batch_size={config.sft.batch_size} must be a multiple of the number of ranks, "
            f"{num_ranks}"
        )


def _run(
    config: SftConfig,
    context: RunContext,
    problems: Mapping[str, Sequence[Problem]],
    *,
    resume: bool,
) -> None:
    context.display.phase(0, "loading the model")
    start = find_start_model(config, context)
    models.check_context(start.model_dir, config.sft.max_tokens, config.length_keys)
    mixture = make_mixture(config.data, problems, start.prompts, config.seed)
    require_same_start(start.tokenizer, mixture)
    count = config.sft.updates * config.sft.batch_size
    training_problems = take_trainable(
        mixture, count, start.prompts, _limits(config), context.display.say
    )
    is_shared = config.learner.sequence_parallel > 1
    train = _train_across_ranks if is_shared else _train_with_trl
    trained = train(config, context, start, training_problems, resume=resume)
    write_final(context, config, start.model_dir, start.tokenizer, trained)


def _limits(config: SftConfig) -> TrainingLimits:
    return TrainingLimits("sft", config.sft.max_tokens, config.data)


def _train_with_trl(
    config: SftConfig,
    context: RunContext,
    start: StartModel,
    problems: Sequence[Problem],
    *,
    resume: bool,
) -> Any:
    """Trains with TRL and returns the trainer, which has the final weights."""
    run, display = context.run, context.display
    resume_point = ResumePoint()
    if resume:
        resume_point = _find_resume_point(context)
    with redirect_output(run.log_file("learner")):
        from grpo.learning.supervised import SupervisedInputs, SupervisedTrainer

        callbacks = TrainerCallbacks(config, context)
        inputs = SupervisedInputs(
            model_dir=start.model_dir,
            tokenizer=start.tokenizer,
            rows=training_rows(problems, start.prompts, config.sft.max_tokens),
        )
        trainer = SupervisedTrainer(config, inputs, callbacks, output_dir=run.checkpoints)
        context.stack.callback(trainer.close)
        display.say(f"attention: {trainer.attention}")
        display.say(
            f"micro-batches: {trainer.micro_batches.num_per_update} per update and rank, each of "
            f"at most {config.learner.micro_batch_tokens:,} tokens"
        )
        display.begin(resume_point.num_updates)
        trainer.train(resume_from_checkpoint=resume_point.trainer_checkpoint)
        if callbacks.stop_request is not None:
            display.say(
                f"stopped after update {trainer.state.global_step}: saved; continue with --resume"
            )
            raise callbacks.stop_request
    return trainer


def _train_across_ranks(
    config: SftConfig,
    context: RunContext,
    start: StartModel,
    problems: Sequence[Problem],
    *,
    resume: bool,
) -> Any:
    """Trains with ranks that share each sequence, and returns the learner."""
    from grpo.learning.learner import Learner

    texts = SolutionTexts(
        problems, start.prompts, max_tokens=config.sft.max_tokens, section="sft", weight=1.0
    )
    loss = plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    with redirect_output(context.run.log_file("learner")):
        policy = lora.load_policy(config, start.model_dir, config.model.attention)
        learner = Learner(policy, config, loss)
        context.stack.callback(learner.close)
    context.display.say(f"attention: {learner.attention}")
    loop = TextLoop(
        config=config, context=context, settings=config.sft, learner=learner, texts=texts
    )
    if resume:
        loop.resume()
    loop.train()
    return learner


class ResumePoint(NamedTuple):
    """The checkpoint from which the training continues."""

    num_updates: int = 0
    trainer_checkpoint: str | None = None  # directory in the format of transformers' Trainer


def _find_resume_point(context: RunContext) -> ResumePoint:
    """Returns the last checkpoint and removes the records that are newer.

    Raises:
        UserError: A different number of ranks has written the checkpoint.
    """
    from grpo.learning import learner_checkpoint

    checkpoint, state = context.run.read_last_checkpoint()
    if checkpoint is None:
        context.resume_after(None, "update")
        return ResumePoint()
    num_updates = state["step"]
    trainer_checkpoint = checkpoint / f"checkpoint-{num_updates}"
    num_saved_ranks = learner_checkpoint.num_saved_ranks(trainer_checkpoint)
    if num_saved_ranks not in (0, ranks.world_size()):  # transformers' Trainer cannot combine them
        raise UserError(
            f"--resume: {checkpoint} was written by {num_saved_ranks} ranks, and this run has "
            f"{ranks.world_size()}: resume `grpo sft` with {num_saved_ranks} ranks"
        )
    context.resume_after(num_updates, "update")
    return ResumePoint(num_updates, str(trainer_checkpoint))


class TrainerCallbacks:
    """The functions that the trainer calls: to record metrics, to save, and to decide to stop."""

    def __init__(self, config: SftConfig, context: RunContext) -> None:
        """Reads the metrics of earlier updates if the run is resumed."""
        self.stop_request: RunInterruptedError | None = None  # of any rank
        self._config = config
        self._context = context
        self._latest: dict[str, Any] = {}
        rows = ranks.all_gather("the metrics so far", context.run.read_metrics())[0]
        accuracies = [row["policy/token_accuracy"] for row in rows]
        self._accuracies: deque[float] = deque(accuracies, maxlen=STOP_WINDOW)

    def on_update(self, row: dict[str, Any]) -> None:
        """Records and displays the metrics of an update."""
        self._latest.update(row)
        self._accuracies.append(row["policy/token_accuracy"])
        self._context.record(row)
        self._context.display.row(row)
        self._context.display.phase(row["step"], "update")

    def save(self, update: int, write: Callable[[Path], None]) -> None:
        """Writes a checkpoint after an update.

        Args:
            update: Number of updates so far.
            write: `write(directory)` writes the trainer's state.
        """
        run, settings = self._context.run, self._config.checkpoint
        self._context.display.phase(update, "checkpoint")
        state = {"updates": update, "seed": self._config.seed, "metrics": self._latest}
        run.save_checkpoint(update, state, write)
        run.prune_checkpoints(settings.keep_last, settings.keep_best)

    def should_stop(self) -> bool:
        """Returns whether to stop: a rank was interrupted, or the model reached `sft.stop_at`."""
        stop_requests = ranks.all_gather("the update", self._context.signals.stop_request)
        self.stop_request = next((request for request in stop_requests if request), None)
        return self.stop_request is not None or self._is_accurate_enough()

    def _is_accurate_enough(self) -> bool:
        stop_at = self._config.sft.stop_at
        if stop_at is None or len(self._accuracies) < STOP_WINDOW:
            return False
        return bool(sum(self._accuracies) / STOP_WINDOW >= stop_at)


def training_rows(
    problems: Sequence[Problem], prompts: Prompts, max_tokens: int
) -> Iterator[dict[str, list[int]]]:
    """Yields `{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}` per problem.

    The labels are -100 on the prompt, which has no loss.

    Raises:
        UserError: A problem has no solution, or is too long with it. The message names the problem.
    """
    for solution in tokenize_solutions(problems, prompts, max_tokens, "sft"):
        yield {
            "input_ids": [*solution.prompt_ids, *solution.target_ids],
            "labels": [-100] * len(solution.prompt_ids) + list(solution.target_ids),
        }


class _SftStage:
    command = "sft"
    config_class = SftConfig
    sections = ("sft",)

    def run(self, config: SftConfig, *, resume: bool) -> None:
        sft(config, resume=resume)

    def batch_arithmetic(self, config: SftConfig) -> str:
        batch_size = config.sft.batch_size
        num_problems = config.sft.updates * batch_size
        learner = config.learner
        division = f"micro-batches of at most {learner.micro_batch_tokens:,} tokens"
        if learner.sequence_parallel > 1:
            division += f", each shared by {learner.sequence_parallel} ranks"
        return (
            f"update      {batch_size} solutions in {division}\n"
            f"run         {config.sft.updates} updates, {num_problems:,} solutions drawn"
        )

    def needs(self, config: SftConfig) -> StageNeeds:
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                training=config.data, num_training=config.sft.updates * config.sft.batch_size
            ),
            memory=MemoryNeeds(learner=True),
            disk=DiskNeeds(checkpoints=max_checkpoints_on_disk(config), models=1),
            shows_solution=True,
        )

    def parts(self, config: SftConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def dry_run_lines(self, config: SftConfig) -> list[str]:
        return []

    def checks(
        self, config: SftConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return check_solutions(_limits(config), problems, prompts)


STAGE: Stage[SftConfig] = _SftStage()
