"""`grpo train`: puts a run together from its config and runs the loop.

Cheap checks come first and models last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo import config as configs
from grpo.config import Config, SftConfig
from grpo.config.algorithm import describe
from grpo.engines import Request
from grpo.experience import plugins, rollout
from grpo.experience.prompts import Prompts
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
from grpo.stages.sampling import check_rewards, load_rewards
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
from grpo.stages.start_model import (
    find_model,
    find_teacher,
    require_same_start,
)
from grpo.types import Completion, Exhausted, Problem, RunError, ScoredGroup
from rewards.workers.pool import Pool

if TYPE_CHECKING:
    from grpo.training.loop import Loop


def train(config: Config, *, resume: bool, keep: bool = True) -> None:
    """Trains to the last rollout and writes `final/`.

    Without `keep` (a benchmark) it writes no model and no checkpoint.

    Raises UserError before anything heavy is done, RunError when the run cannot go on, Interrupted
    after Ctrl-C or SIGTERM (saved).
    """
    pool, rewards = load_rewards(config)
    parts: dict[str, Any] = {
        "pool": pool,
        "rewards": rewards,
        "loss": plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss"),
        "problems": load_problems(config.data, "train", config.seed),
        "held_out_problems": load_problems(config.eval.data or config.data, "test", config.seed)
        if config.eval.every
        else {},
    }
    first = warm_start_config(config) if config.model.warm_start else None
    with open_stage(
        config, "train", total=config.train.rollouts, unit="rollout", resume=resume
    ) as context:
        context.stack.callback(pool.close)
        if first:
            config = config.model_copy(
                update={
                    "model": config.model.model_copy(update={"path": _warm_started(first, context)})
                }
            )
        _run(config, context, resume=resume, keep=keep, **parts)


def _run(
    config: Config,
    context: RunContext,
    *,
    resume: bool,
    keep: bool,
    pool: Pool,
    rewards: Any,
    loss: Any,
    problems: Any,
    held_out_problems: Any,
) -> None:
    import torch

    from grpo.experience.selection import Selection
    from grpo.learning.learner import Learner
    from grpo.metrics import roofline
    from grpo.training.journal import Journal
    from grpo.training.loop import Loop
    from grpo.training.rollouts import Rollouts
    from grpo.training.updates import Updater
    from grpo.training.weight_sync import WeightCheck, check_settings, probe_prompts

    run, display = context.run, context.display
    display.say(f"algorithm: {describe(config.algorithm)}")
    display.phase(0, "loading the model")
    model_dir, tokenizer, prompts = find_model(config, run)
    models.check_context(model_dir, config.max_sequence_tokens)
    stream = mixture(config.data, problems, prompts, config.seed)
    require_same_start(tokenizer, stream)
    num_weights = models.num_weights(model_dir)
    machine, shape = (
        roofline.measure(config.model.dtype),
        roofline.shape(model_dir, num_weights, config.model.dtype),
    )
    engine_model = EngineModel(model_dir=model_dir, num_weights=num_weights)
    engine = start_engine(config, context, engine_model)
    with quiet(run.log_file("learner")):
        model = lora.load_policy(config, model_dir, config.model.attention)
        reference = _reference(config, run, model_dir, tokenizer)
        if torch.cuda.is_available() and not config.engine.servers:
            # The engine measures the GPU's free memory while it starts: what a learner took
            # meanwhile would be missing in its KV cache.
            engine.wait_ready()
        learner = Learner(model, config, loss, reference)
        engine.wait_ready()
    drawn = (prompts.ids(stream[i]) for i in itertools.count())
    max_prompt_tokens = config.max_sequence_tokens - config.probe.tokens
    weight_check = WeightCheck(
        engine,
        learner,
        probe_prompts(drawn, config.probe.prompts, max_prompt_tokens),
        check_settings(config),
    )
    test = (
        held_out(config.eval.data or config.data, held_out_problems, prompts, config.eval.problems)
        if held_out_problems
        else []
    )
    loop = Loop(
        config=config,
        run=run,
        engine=engine,
        rollouts=Rollouts(
            config=config,
            engine=engine,
            prompts=prompts,
            rewards=rewards,
            selection=Selection(
                algorithm=config.algorithm, size=config.train.problems, take=stream.take
            ),
            workers=pool,
            display=display,
            held_out=test,
        ),
        updater=Updater(config=config, learner=learner, check_signals=context.signals.check),
        weight_check=weight_check,
        journal=Journal(
            record_row=context.record, display=display, alarm_rules=config.logging.alarms
        ),
        display=display,
        signals=context.signals,
        machine=machine,
        shape=shape,
    )
    checkpoint, state = run.last_state() if resume else (None, {})
    if checkpoint:
        with quiet(run.log_file("learner")):
            learner.load(checkpoint)
        loop.resume(state)
    if resume:
        done = loop.progress.rollout
        run.cut(done if checkpoint else -1)
        loop.journal.watch = Watch(ranks.all_gather("the metrics so far", run.read_metrics())[0])
        display.say(
            f"resumed after rollout {done}" if checkpoint else "no checkpoint yet: starting again"
        )
    try:
        loop.start(fresh=checkpoint is None)
        if config.train.max_staleness:
            _stream(loop, context, state["selection"].get("stream") if checkpoint else None)
        loop.train()
    except Exception as error:
        _save_if_possible(loop, error)
        raise
    if not keep:
        return
    loop.save()
    write_final(context, config, model_dir, tokenizer, learner)


def _save_if_possible(loop: Loop, error: Exception) -> None:
    """Saves the last whole rollout before a run stops, where all ranks can do so together."""
    progress = loop.progress
    stops_between_rollouts = isinstance(error, Interrupted | Exhausted)
    if not stops_between_rollouts and not (progress.savable and ranks.known_to_all(error)):
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
    from grpo.experience.stream import Stream

    config, prompts, selection = loop.config, loop.rollouts.prompts, loop.rollouts.selection
    engine: Any = loop.engine
    options, train = (
        rollout.sampling_options(config, prompts, config.sampling.temperature),
        config.train,
    )

    def request(problem: Problem, number: int) -> Request:
        seed = rollout.seed_of(config.seed, f"stream/{number}", problem.id)
        return Request(prompt_ids=prompts.ids(problem), seed=seed, n=train.group_size)

    def finish(
        problem: Problem, request: Request, completions: tuple[Completion, ...]
    ) -> ScoredGroup:
        group = rollout.group_of(problem, request.prompt_ids, prompts, completions)
        return rollout.score([group], loop.rollouts.rewards, prompts.for_rewards)[0]

    if ranks.rank() == 0:
        stream = selection.stream = Stream(
            begin=lambda one: engine.begin(one, options),
            request=request,
            finish=finish,
            draw=lambda: selection.draw(1)[0],
            ahead=train.problems * train.max_staleness,
            timeout_s=config.engine.timeout_s,
            on_wait=context.signals.check,
            idle=engine.idle,
            last=None
            if config.algorithm.no_signal == "resample"
            else train.problems * train.rollouts,
        )
        context.stack.callback(stream.close)
        if state:
            stream.load(state, scored_group)
    take = selection.stream.take if selection.stream else lambda count: []
    selection.streamed = lambda count: ranks.all_gather_or_raise(
        "the groups to learn from next", lambda: take(count)
    )[0]


def _reference(config: Config, run: Any, model_dir: Path, tokenizer: Any) -> Any:
    """Returns the model that the KL is measured to, or the teacher.

    Returns None where there is none, or where it lies under the adapters.
    """
    if config.model.teacher:
        return models.load_model(
            find_teacher(config, run, tokenizer, config.max_sequence_tokens), config.model.attention
        )
    own = config.algorithm.kl_coef > 0 and not config.model.lora
    return models.load_model(model_dir, config.model.attention) if own else None


def warm_start_config(config: Config) -> SftConfig:
    """Returns the config of the run's supervised start.

    It writes into the run's directory, with the run's seed, progress and data.path.
    """
    assert config.model.warm_start
    sft = configs.load(config.model.warm_start, kind=SftConfig)
    data = sft.data.model_copy(update={"path": sft.data.path or config.data.path})
    own = {
        "run_dir": str(Path(config.run_dir) / "warm_start"),
        "seed": config.seed,
        "logging": config.logging,
        "data": data,
    }
    return sft.model_copy(update=own)


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
    summary = "train by GRPO"
    config_class = Config
    sections = ()
    multi_rank = True

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
