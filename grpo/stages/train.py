"""`grpo train`: puts a run together from its config and runs the loop.

Cheap checks come first and models last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo import config as configs
from grpo.config import Config, SftConfig
from grpo.config.presets import describe
from grpo.engines import Request
from grpo.experience import plugins
from grpo.experience.prompts import Prompts
from grpo.experience.sampling import group_of, sampling_options, seed_of
from grpo.experience.scoring import score
from grpo.learning import lora, models
from grpo.metrics.diagnosis import Watch
from grpo.run import ranks
from grpo.run.display import quiet
from grpo.run.signals import Interrupted
from grpo.stages import sft
from grpo.stages.engine import EngineModel, start_engine
from grpo.stages.final_model import write_final
from grpo.stages.problems import held_out, load_problems, mixture
from grpo.stages.run_context import RunContext, open_stage
from grpo.stages.sampling import Rewards, check_rewards, load_rewards
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
from grpo.stages.start_model import find_model, find_teacher, require_same_start
from grpo.types import Completion, Exhausted, Problem, RunError, ScoredGroup
from rewards.workers.pool import Pool

if TYPE_CHECKING:
    from data.common.mixture import Mixture
    from grpo.training.loop import Loop
    from grpo.training.weight_sync import WeightCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What is loaded and checked before the run is opened. The run closes `workers`."""

    workers: Pool
    rewards: Rewards
    loss: Any
    problems: dict[str, Sequence[Problem]]
    held_out_problems: dict[str, Sequence[Problem]]  # empty without evaluations


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """The loop with its learner, and the model that they started from."""

    loop: Loop
    learner: Any
    model_dir: Path
    tokenizer: Any


def train(config: Config, *, resume: bool, keep: bool = True) -> None:
    """Trains to the last rollout and writes `final/`.

    Without `keep` (a benchmark) it writes no model and no checkpoint.

    Raises UserError before anything heavy is done, RunError when the run cannot go on, Interrupted
    after Ctrl-C or SIGTERM (saved).
    """
    inputs = _load_inputs(config)
    warm_start = warm_start_config(config) if config.model.warm_start else None
    with open_stage(
        config, "train", total=config.train.rollouts, unit="rollout", resume=resume
    ) as context:
        context.stack.callback(inputs.workers.close)
        if warm_start is not None:
            path = _warm_started(warm_start, context)
            model = config.model.model_copy(update={"path": path})
            config = config.model_copy(update={"model": model})
        _run(config, context, inputs, resume=resume, keep=keep)


def _load_inputs(config: Config) -> Inputs:
    """Returns rewards, loss and problems. Raises UserError."""
    workers, rewards = load_rewards(config)
    loss = plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    problems = load_problems(config.data, "train", config.seed)
    held_out_problems = {}
    if config.eval.every:
        held_out_problems = load_problems(config.eval.data or config.data, "test", config.seed)
    return Inputs(
        workers=workers,
        rewards=rewards,
        loss=loss,
        problems=problems,
        held_out_problems=held_out_problems,
    )


def _run(config: Config, context: RunContext, inputs: Inputs, *, resume: bool, keep: bool) -> None:
    context.display.say(f"algorithm: {describe(config.algorithm)}")
    assembly = _assemble(config, context, inputs)
    loop = assembly.loop
    state = _load_checkpoint(assembly, context) if resume else None
    try:
        loop.start(fresh=state is None)
        if config.train.max_staleness:
            _stream(loop, context, state["selection"].get("stream") if state else None)
        loop.train()
    except Exception as error:
        _save_if_possible(loop, error)
        raise
    if not keep:
        return
    loop.save()
    write_final(context, config, assembly.model_dir, assembly.tokenizer, assembly.learner)


def _assemble(config: Config, context: RunContext, inputs: Inputs) -> Assembly:
    """Returns the loop, its engine ready and its learner loaded."""
    import torch

    from grpo.experience.selection import Selection
    from grpo.learning.learner import Learner
    from grpo.metrics import roofline
    from grpo.training.journal import Journal
    from grpo.training.loop import Loop
    from grpo.training.rollouts import Rollouts
    from grpo.training.updates import Updater

    run, display = context.run, context.display
    display.phase(0, "loading the model")
    model_dir, tokenizer, prompts = find_model(config, run)
    models.check_context(model_dir, config.max_sequence_tokens)
    stream = mixture(config.data, inputs.problems, prompts, config.seed)
    require_same_start(tokenizer, stream)
    num_weights = models.num_weights(model_dir)
    machine = roofline.measure(config.model.dtype)
    shape = roofline.shape(model_dir, num_weights, config.model.dtype)
    engine_model = EngineModel(model_dir=model_dir, num_weights=num_weights)
    engine = start_engine(config, context, engine_model)
    with quiet(run.log_file("learner")):
        model = lora.load_policy(config, model_dir, config.model.attention)
        teacher_dir = None
        if config.model.teacher:
            teacher_dir = find_teacher(config, run, tokenizer, config.max_sequence_tokens)
        reference = lora.load_reference(config, model_dir, teacher_dir)
        if torch.cuda.is_available() and not config.engine.servers:
            # The engine measures the GPU's free memory while it starts: what a learner took
            # meanwhile would be missing in its KV cache.
            engine.wait_ready()
        learner = Learner(model, config, inputs.loss, reference)
        engine.wait_ready()
    loop = Loop(
        config=config,
        run=run,
        engine=engine,
        rollouts=Rollouts(
            config=config,
            engine=engine,
            prompts=prompts,
            rewards=inputs.rewards,
            selection=Selection(
                algorithm=config.algorithm, size=config.train.problems, take=stream.take
            ),
            workers=inputs.workers,
            display=display,
            held_out=_held_out(config, inputs, prompts),
        ),
        updater=Updater(config=config, learner=learner, check_signals=context.signals.check),
        weight_check=_weight_check(config, engine, learner, prompts, stream),
        journal=Journal(
            record_row=context.record, display=display, alarm_rules=config.logging.alarms
        ),
        display=display,
        signals=context.signals,
        machine=machine,
        shape=shape,
    )
    return Assembly(loop=loop, learner=learner, model_dir=model_dir, tokenizer=tokenizer)


def _held_out(config: Config, inputs: Inputs, prompts: Prompts) -> list[Problem]:
    """Returns the problems of every evaluation, none without evaluations."""
    if not inputs.held_out_problems:
        return []
    data = config.eval.data or config.data
    return held_out(data, inputs.held_out_problems, prompts, config.eval.problems)


def _weight_check(
    config: Config, engine: Any, learner: Any, prompts: Prompts, stream: Mixture
) -> WeightCheck:
    """Returns the check of the engine's weights, on the first prompts that leave room for it."""
    from grpo.training.weight_sync import WeightCheck, check_settings, probe_prompts

    drawn = (prompts.ids(stream[i]) for i in itertools.count())
    max_prompt_tokens = config.max_sequence_tokens - config.probe.tokens
    return WeightCheck(
        engine,
        learner,
        probe_prompts(drawn, config.probe.prompts, max_prompt_tokens),
        check_settings(config),
    )


def _load_checkpoint(assembly: Assembly, context: RunContext) -> dict[str, Any] | None:
    """Loads the last checkpoint and drops what was written after it.

    Returns its state, None if the run has no checkpoint yet.
    """
    run, loop = context.run, assembly.loop
    checkpoint, state = run.last_state()
    if checkpoint:
        with quiet(run.log_file("learner")):
            assembly.learner.load(checkpoint)
        loop.resume(state)
    context.continue_after(loop.progress.rollout if checkpoint else None, "rollout")
    loop.journal.watch = Watch(ranks.all_gather("the metrics so far", run.read_metrics())[0])
    return state if checkpoint else None


def _save_if_possible(loop: Loop, error: Exception) -> None:
    """Saves the last whole rollout before a run stops, where all ranks can do so together."""
    progress = loop.progress
    # these two are raised only where nothing of a rollout's updates is half applied
    learner_is_whole = isinstance(error, Interrupted | Exhausted)
    if not learner_is_whole and not (progress.savable and ranks.known_to_all(error)):
        return
    outcome = ": nothing to save yet"
    if progress.rollout:
        try:
            loop.save()
            outcome = ", saved; go on with --resume"
        except RunError as save_error:
            outcome = f", not saved: {save_error}"
    loop.display.say(f"stopped after rollout {progress.rollout}{outcome}")


def _stream(loop: Loop, context: RunContext, state: dict[str, Any] | None) -> None:
    """Puts asynchronous rollouts under the loop's selection.

    The stream is on rank 0, which gives every rank what it takes.
    """
    from grpo.experience.selection import scored_group
    from grpo.experience.stream import Stream, StreamCallbacks, StreamLimits

    config = loop.config
    prompts = loop.rollouts.prompts
    selection = loop.rollouts.selection
    settings = config.train
    engine: Any = loop.engine
    options = sampling_options(config, prompts, config.sampling.temperature)

    def request(problem: Problem, number: int) -> Request:
        seed = seed_of(config.seed, f"stream/{number}", problem.id)
        return Request(prompt_ids=prompts.ids(problem), seed=seed, n=settings.group_size)

    def finish(
        problem: Problem, request: Request, completions: tuple[Completion, ...]
    ) -> ScoredGroup:
        group = group_of(problem, request.prompt_ids, prompts, completions)
        return score([group], loop.rollouts.rewards, prompts.for_rewards)[0]

    stream: Stream | None = None
    if ranks.rank() == 0:
        num_groups = settings.problems * settings.rollouts
        callbacks = StreamCallbacks(
            draw=lambda: selection.draw(1)[0],
            request=request,
            begin=lambda request: engine.begin(request, options),
            finish=finish,
            on_wait=context.signals.check,
            engine_idle_s=engine.idle,
        )
        limits = StreamLimits(
            num_ahead=settings.problems * settings.max_staleness,
            num_groups=None if config.algorithm.no_signal == "resample" else num_groups,
            timeout_s=config.engine.timeout_s,
        )
        stream = Stream(callbacks, limits)
        selection.stream = stream
        context.stack.callback(stream.close)
        if state:
            stream.load(state, scored_group)

    def take(count: int) -> list[ScoredGroup]:
        return stream.take(count) if stream is not None else []

    def take_on_all_ranks(count: int) -> list[ScoredGroup]:
        return ranks.all_gather_or_raise("the groups to learn from next", lambda: take(count))[0]

    selection.streamed = take_on_all_ranks


def warm_start_config(config: Config) -> SftConfig:
    """Returns the config of the run's supervised start.

    It begins from the run's `model.path` and writes into the run's directory, with the run's seed,
    progress and data.path.
    """
    assert config.model.warm_start
    sft_config = configs.load(config.model.warm_start, kind=SftConfig)
    data = sft_config.data
    return sft_config.model_copy(
        update={
            "run_dir": str(Path(config.run_dir) / "warm_start"),
            "seed": config.seed,
            "logging": config.logging,
            "model": sft_config.model.model_copy(update={"path": config.model.path}),
            "data": data.model_copy(update={"path": data.path or config.data.path}),
        }
    )


def _warm_started(config: SftConfig, context: RunContext) -> str:
    """Returns the directory of the model after its supervised start.

    If the model is not there, the supervised start is made, or finished.
    """
    target = Path(config.run_dir)
    if not ranks.all_gather("the warm start", (target / "final").exists())[0]:
        context.display.say(
            f"warm start: {config.sft.updates} supervised updates of {config.sft.batch_size} "
            "solutions"
        )
        sft.sft(config, resume=(target / "manifest.json").exists())
    return str(target / "final")


class _TrainStage:
    command = "train"
    config_class = Config
    sections = ()

    def run(self, config: Config, *, resume: bool) -> None:
        train(config, resume=resume)

    def arithmetic(self, config: Config) -> str:
        settings = config.train
        num_completions = settings.completions
        per_update = num_completions // settings.updates_per_rollout
        micro_batch_tokens = config.learner.micro_batch_tokens
        num_longest = max(1, micro_batch_tokens // config.max_sequence_tokens)
        return "\n".join(
            [
                f"algorithm   {describe(config.algorithm)}",
                f"a rollout   {settings.problems} problems x {settings.group_size} completions = "
                f"{num_completions} completions, "
                f"at most {num_completions * config.sampling.max_tokens:,} sampled tokens",
                f"an update   {per_update} completions "
                f"({settings.updates_per_rollout * settings.epochs} "
                f"updates a rollout, epochs: {settings.epochs})",
                f"micro-batch {micro_batch_tokens:,} tokens, padding included: {num_longest} or "
                f"more sequences of {config.max_sequence_tokens}",
                f"the run     {settings.rollouts} rollouts = {settings.total_updates} updates, "
                f"{settings.rollouts * settings.problems:,} problems drawn",
            ]
        )

    def needs(self, config: Config) -> StageNeeds:
        settings = config.train
        held_out = (config.eval.data or config.data,) if config.eval.every else ()
        num_completions = settings.rollouts * settings.completions
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                training=config.data,
                num_training=settings.rollouts * settings.problems,
                held_out=held_out,
                num_held_out=config.eval.problems,
            ),
            memory=MemoryNeeds(learner=True, engine=True, max_sequences=settings.completions),
            disk=DiskNeeds(
                checkpoints=num_checkpoints(config),
                models=1,
                sampled_tokens=num_completions * config.sampling.max_tokens,
            ),
            rewards=tuple(config.rewards),
        )

    def parts(self, config: Config) -> list[Part]:
        return [Part(stage=self, config=config)]

    def preview(self, config: Config) -> list[str]:
        check_rewards(config)
        plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
        if not config.model.warm_start:
            return []
        warm_start = sft.STAGE.arithmetic(warm_start_config(config))
        return [f"warm start  {config.model.warm_start}", warm_start]

    def checks(
        self, config: Config, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        return iter(())


STAGE: Stage[Config] = _TrainStage()
