"""`grpo train`: builds the training loop from its config and runs it.

Inexpensive checks come first, so that a user's mistake is reported before a model is loaded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo import config as configs
from grpo.config import SftConfig, TrainConfig
from grpo.config.recipe import recipe_lines, recipe_warnings
from grpo.engines import Request
from grpo.experience import plugins
from grpo.experience.hints import OtherVocabulary
from grpo.experience.prompts import Prompts
from grpo.experience.sampling import derive_seed, make_group, sampling_options
from grpo.experience.scoring import score
from grpo.learning import lora, models, moe
from grpo.metrics.diagnosis import Diagnosis
from grpo.rewards.workers.pool import WorkerPool
from grpo.run import ranks
from grpo.run.display import redirect_output
from grpo.run.signals import RunInterruptedError
from grpo.stages import sft
from grpo.stages.engine import EngineModel, start_engine
from grpo.stages.final_model import write_final
from grpo.stages.problems import load_problems, make_mixture, select_held_out
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
    max_checkpoints_on_disk,
)
from grpo.stages.start_model import (
    StartModel,
    Teachers,
    find_other_vocabularies,
    find_start_model,
    find_teachers,
    require_for_other_vocabulary,
    require_same_start,
)
from grpo.types import Completion, Problem, RunError, ScoredGroup, TrainingStoppedError

if TYPE_CHECKING:
    from grpo.data.common.mixture import Mixture
    from grpo.experience.stream import Stream
    from grpo.metrics import roofline
    from grpo.training.loop import Loop
    from grpo.training.weight_sync import WeightCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The plug-ins and problems, loaded and checked before the run is opened."""

    workers: WorkerPool  # closed at the end of the run
    rewards: Rewards
    loss: Any
    problems: dict[str, Sequence[Problem]]
    held_out_problems: dict[str, Sequence[Problem]]  # empty without evaluations


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The model, problems, engine and learner that the training loop is built from."""

    start: StartModel
    mixture: Mixture  # training problems in the order in which the run draws them
    limits: roofline.Roofline
    engine: Any
    learner: Any
    vocabularies: Mapping[str, OtherVocabulary]  # of teachers, by name


class LearnerModels(NamedTuple):
    """The models that the learner loads."""

    start: StartModel
    teachers: Teachers


def train(config: TrainConfig, *, resume: bool, keep: bool = True) -> None:
    """Trains until the last rollout and writes `final/`.

    Args:
        config: The config of the run.
        resume: Whether to continue the run in `config.run_dir`.
        keep: Whether to write the last checkpoint and `final/`. A benchmark needs neither.

    Raises:
        UserError: The config, the data or a model is wrong.
        RunError: The run cannot continue.
        RunInterruptedError: A signal stopped the run. The last complete rollout, if any, is saved.
    """
    if config.engine.deterministic:
        _make_deterministic()
    warm_start = warm_start_config(config) if config.model.warm_start else None
    with open_stage(
        config, "train", total=config.train.rollouts, unit="rollout", resume=resume
    ) as context:
        with context.loading_problems():
            inputs = _load_inputs(config, context.display.say)
        context.stack.callback(inputs.workers.close)
        if warm_start is not None:
            path = _run_warm_start(warm_start, context)
            model = config.model.model_copy(update={"path": path})
            config = config.model_copy(update={"model": model})
        _run(config, context, inputs, resume=resume, keep=keep)


def _make_deterministic() -> None:
    """Makes the learner deterministic, also in the warm start. Raises UserError if vLLM cannot."""
    from grpo.engines.determinism import require_batch_invariant_kernels
    from grpo.learning.deepspeed_setup import use_deterministic_operations

    require_batch_invariant_kernels()
    use_deterministic_operations()


def _load_inputs(config: TrainConfig, say: Callable[[str], None]) -> Inputs:
    workers, rewards = load_rewards(config)
    loss = plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    problems = load_problems(config.data, "train", config.seed, config.rewards, say)
    held_out_problems = {}
    if config.eval.every:
        held_out_problems = load_problems(
            config.eval.data or config.data, "test", config.seed, config.rewards, say
        )
    return Inputs(
        workers=workers,
        rewards=rewards,
        loss=loss,
        problems=problems,
        held_out_problems=held_out_problems,
    )


def _run(
    config: TrainConfig, context: RunContext, inputs: Inputs, *, resume: bool, keep: bool
) -> None:
    context.display.say("algorithm: " + "\n".join(recipe_lines(config)))
    components = _load_components(config, context, inputs)
    loop = _make_loop(config, context, inputs, components)
    state = _load_checkpoint(loop, context) if resume else None
    try:
        loop.start(fresh=state is None)
        if config.train.max_staleness:
            stream_state = state["selection"].get("stream") if state is not None else None
            if stream_state is not None:
                stream_state = _with_current_problems(stream_state, inputs.problems)
            _attach_stream(loop, context, stream_state)
        loop.train()
    except Exception as error:
        _save_if_possible(loop, error)
        raise
    if not keep:
        return
    loop.save()
    start = components.start
    write_final(context, config, start.model_dir, start.tokenizer, components.learner)


def _load_components(config: TrainConfig, context: RunContext, inputs: Inputs) -> Components:
    """Starts the engine and loads the learner while the engine starts."""
    from grpo.metrics import roofline

    context.display.phase(0, "loading the model")
    start = find_start_model(config, context)
    models.check_context(start.model_dir, config.max_sequence_tokens, config.length_keys)
    if config.algorithm.teacher_hint != "none" and not config.model.all_teachers:
        length_keys = f"{config.length_keys} + algorithm.teacher_hint_tokens"
        models.check_context(start.model_dir, config.max_teacher_tokens, length_keys)
    mixture = make_mixture(config.data, inputs.problems, start.prompts, config.seed)
    require_same_start(start.tokenizer, mixture)
    if config.engine.deterministic:
        moe.require_no_experts(start.model_dir, "engine.deterministic")
    num_weights = models.num_weights(start.model_dir)
    # The machine is measured before the engine starts to use it.
    limits = roofline.Roofline(
        machine=roofline.measure_machine(config.model.dtype),
        shape=roofline.model_shape(start.model_dir, num_weights, config.model.dtype),
    )
    engine_model = EngineModel(model_dir=start.model_dir, num_weights=num_weights)
    teachers = _find_teachers(config, context, start)
    engine = start_engine(config, context, engine_model)
    learner_models = LearnerModels(start, teachers)
    learner = _load_learner(config, context, learner_models, engine, inputs.loss)
    return Components(
        start=start,
        mixture=mixture,
        limits=limits,
        engine=engine,
        learner=learner,
        vocabularies=teachers.vocabularies,
    )


def _find_teachers(config: TrainConfig, context: RunContext, start: StartModel) -> Teachers:
    """Returns the teachers. Raises UserError if one does not fit the config."""
    with redirect_output(context.run.log_file("learner")):
        model_dirs = find_teachers(config, context, config.max_teacher_tokens)
        vocabularies = find_other_vocabularies(
            config.prompt, start.tokenizer, start.prompts, model_dirs
        )
    if vocabularies:
        _check_other_vocabulary(config)
    return Teachers(model_dirs, vocabularies)


def _check_other_vocabulary(config: TrainConfig) -> None:
    """Raises UserError if a setting needs student and teacher to have the same vocabulary."""
    algorithm = config.algorithm
    require_for_other_vocabulary(
        {
            "an exact divergence (algorithm.preset=on_policy_distill_exact, or "
            "teacher_divergence=reverse_kl; in grpo distill, on_policy_divergence=reverse_kl)": (
                algorithm.has_teacher_loss
            ),
            "algorithm.teacher_top_k=": algorithm.teacher_top_k is None,
            "algorithm.kl_coef=0": algorithm.kl_coef == 0,
            "learner.sequence_parallel=1": config.learner.sequence_parallel == 1,
        }
    )


def _load_learner(
    config: TrainConfig, context: RunContext, learner_models: LearnerModels, engine: Any, loss: Any
) -> Any:
    """Returns the learner with its reference or teacher. The engine is ready afterwards."""
    import torch

    from grpo.learning.learner import Learner

    context.display.phase(0, "loading the learner")
    with redirect_output(context.run.log_file("learner")):
        model_dir = learner_models.start.model_dir
        policy = lora.load_policy(config, model_dir, config.model.attention)
        teachers = learner_models.teachers
        references = lora.load_references(
            config, model_dir, teachers.model_dirs, teachers.common_tokens()
        )
        if torch.cuda.is_available() and not config.engine.servers:
            # The engine measures the free GPU memory while it starts. GPU memory that the learner
            # allocated during that time would be missing in the KV cache.
            engine.wait_ready()
        learner = Learner(policy, config, loss, references)
        context.stack.callback(learner.close)
        context.display.phase(0, "waiting for the engine")
        engine.wait_ready()
    context.display.say(f"attention: {learner.attention}")
    return learner


def _make_loop(
    config: TrainConfig, context: RunContext, inputs: Inputs, components: Components
) -> Loop:
    from grpo.experience.selection import Selection
    from grpo.training.journal import Journal
    from grpo.training.loop import Loop
    from grpo.training.rollouts import Rollouts
    from grpo.training.updates import Updater

    display = context.display
    engine = components.engine
    prompts = components.start.prompts
    rollouts = Rollouts(
        config=config,
        engine=engine,
        prompts=prompts,
        rewards=inputs.rewards,
        selection=Selection(
            algorithm=config.algorithm,
            num_groups=config.train.problems,
            take_problems=components.mixture.take,
            max_undecided=config.max_undecided,
        ),
        workers=inputs.workers,
        display=display,
        held_out=_held_out(config, inputs, prompts),
    )
    updater = Updater(
        config=config, learner=components.learner, check_signals=context.signals.raise_if_received
    )
    journal = Journal(record_row=context.record, display=display, alarm_rules=config.logging.alarms)
    return Loop(
        config=config,
        run=context.run,
        engine=engine,
        rollouts=rollouts,
        updater=updater,
        weight_check=_make_weight_check(config, components),
        journal=journal,
        display=display,
        signals=context.signals,
        limits=components.limits,
        vocabularies=components.vocabularies,
    )


def _held_out(config: TrainConfig, inputs: Inputs, prompts: Prompts) -> list[Problem]:
    """Returns the problems that every evaluation uses, an empty list without evaluations."""
    if not inputs.held_out_problems:
        return []
    data = config.eval.data or config.data
    return select_held_out(data, inputs.held_out_problems, prompts, config.eval.problems)


def _make_weight_check(config: TrainConfig, components: Components) -> WeightCheck:
    """Returns the check of the engine's weights. It probes the first prompts that are short enough.

    A prompt and the probe's tokens must fit into the longest sequence of the config.
    """
    from grpo.training.weight_sync import WeightCheck, check_settings, probe_prompts

    prompts, mixture = components.start.prompts, components.mixture
    prompts_in_order = (prompts.token_ids(mixture[position]) for position in itertools.count())
    max_prompt_tokens = config.max_sequence_tokens - config.probe.tokens
    return WeightCheck(
        components.engine,
        components.learner,
        probe_prompts(prompts_in_order, config.probe.prompts, max_prompt_tokens),
        check_settings(config),
    )


def _load_checkpoint(loop: Loop, context: RunContext) -> dict[str, Any] | None:
    """Loads the last checkpoint and removes the records that are newer.

    Returns:
        The state of the checkpoint, None if the run has no checkpoint yet.
    """
    run = context.run
    checkpoint, state = run.read_last_checkpoint()
    if checkpoint is None:
        context.resume_after(None, "rollout")
    else:
        with redirect_output(run.log_file("learner")):
            loop.updater.learner.load(checkpoint)
        loop.resume(state)
        context.resume_after(loop.progress.rollout, "rollout")
    earlier_metrics = ranks.all_gather("the metrics so far", run.read_metrics())[0]
    loop.journal.watch = Diagnosis(earlier_metrics)
    return state if checkpoint is not None else None


def _save_if_possible(loop: Loop, error: Exception) -> None:
    """Saves the last complete rollout before the run stops, if all ranks can save together."""
    progress = loop.progress
    # These two errors are raised only while no update is partly applied.
    is_at_safe_point = isinstance(error, RunInterruptedError | TrainingStoppedError)
    can_save = is_at_safe_point or (progress.is_savable and ranks.is_raised_on_all_ranks(error))
    if not can_save:
        return
    if progress.rollout == 0:
        outcome = "nothing to save yet"
    else:
        try:
            loop.save()
            outcome = "saved; continue with --resume"
        except RunError as save_error:
            outcome = f"not saved: {save_error}"
    loop.display.say(f"stopped after rollout {progress.rollout}: {outcome}")


def _with_current_problems(
    stream_state: dict[str, Any], problems: Mapping[str, Sequence[Problem]]
) -> dict[str, Any]:
    """Returns a stream's state with the problems as the data contains them now.

    A gold answer may have been corrected since the checkpoint. A problem is replaced if the data
    has one with the same id and question. Data sets that are no lists generate their problems.
    """
    current_problems: dict[tuple[str, str], Problem] = {}
    for problems_of_set in problems.values():
        if isinstance(problems_of_set, list):
            for problem in problems_of_set:
                current_problems[problem.id, problem.question] = problem
    items = []
    for item in stream_state["items"]:
        stored = item["problem"]
        current = current_problems.get((stored["id"], stored["question"]))
        items.append({**item, "problem": stored if current is None else asdict(current)})
    return {**stream_state, "items": items}


def _attach_stream(loop: Loop, context: RunContext, stream_state: dict[str, Any] | None) -> None:
    """Makes the loop take its groups from a stream that samples them asynchronously.

    Rank 0 has the stream and sends the groups that it takes to all ranks.

    Args:
        loop: The training loop.
        context: The run.
        stream_state: State of the stream in the checkpoint, None for a new stream.
    """
    from grpo.experience.selection import parse_scored_group

    selection = loop.rollouts.selection
    stream: Stream | None = None
    if ranks.rank() == 0:
        stream = _start_stream(loop, context)
        selection.stream = stream
        context.stack.callback(stream.close)
        if stream_state:
            stream.load(stream_state, parse_scored_group)

    def take(count: int) -> list[ScoredGroup]:
        return stream.take(count) if stream is not None else []

    def take_on_all_ranks(count: int) -> list[ScoredGroup]:
        groups_by_rank = ranks.all_gather_or_raise(
            "the groups to learn from next", functools.partial(take, count)
        )
        return groups_by_rank[0]

    selection.take_from_stream = take_on_all_ranks


def _start_stream(loop: Loop, context: RunContext) -> Stream:
    """Returns a stream that samples with the loop's engine and draws from its selection."""
    from grpo.experience.stream import Stream, StreamCallbacks, StreamLimits

    config = loop.config
    settings = config.train
    prompts = loop.rollouts.prompts
    engine: Any = loop.engine
    options = sampling_options(config, prompts, config.sampling.temperature)

    def begin(request: Request) -> Any:
        return engine.submit(request, options)

    def make_request(problem: Problem, number: int) -> Request:
        seed = derive_seed(config.seed, f"stream/{number}", problem.id)
        return Request(prompt_ids=prompts.token_ids(problem), seed=seed, n=settings.group_size)

    def score_completions(
        problem: Problem, request: Request, completions: tuple[Completion, ...]
    ) -> ScoredGroup:
        group = make_group(problem, request.prompt_ids, prompts, completions)
        return score([group], loop.rollouts.rewards, prompts.reward_prompt)[0]

    def draw_problem() -> Problem:
        return loop.rollouts.selection.draw(1)[0]

    num_groups: int | None = settings.problems * settings.rollouts
    if config.algorithm.no_signal == "resample":
        num_groups = None  # depends on the number of groups without signal
    callbacks = StreamCallbacks(
        draw=draw_problem,
        request=make_request,
        begin=begin,
        finish=score_completions,
        on_wait=context.signals.raise_if_received,
        engine_idle_s=engine.take_idle_seconds,
    )
    limits = StreamLimits(
        num_ahead=settings.problems * settings.max_staleness,
        num_groups=num_groups,
        timeout_s=config.engine.timeout_s,
    )
    return Stream(callbacks, limits)


def warm_start_config(config: TrainConfig) -> SftConfig:
    """Returns the config of the supervised fine-tuning that precedes the first rollout.

    It starts from the run's `model.path`, writes to `warm_start/` in the run directory, and uses
    the run's seed and logging. If it does not set `data.path`, it uses the run's.
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
            "data": data.model_copy(update={"path": data.path or config.data.shared_path}),
        }
    )


def _run_warm_start(config: SftConfig, context: RunContext) -> str:
    """Returns the directory of the fine-tuned model, after running or resuming the fine-tuning.

    A finished fine-tuning is not repeated.
    """
    folder = Path(config.run_dir)
    is_finished = ranks.all_gather("the warm start", (folder / "final").exists())[0]
    if not is_finished:
        context.display.say(
            f"warm start: {config.sft.updates} supervised updates of {config.sft.batch_size} "
            "solutions"
        )
        is_started = (folder / "manifest.json").exists()
        with context.inner_run():
            sft.sft(config, resume=is_started)
    return str(folder / "final")


class _TrainStage:
    command = "train"
    config_class = TrainConfig
    sections = ()

    def run(self, config: TrainConfig, *, resume: bool) -> None:
        train(config, resume=resume)

    def batch_arithmetic(self, config: TrainConfig) -> str:
        settings = config.train
        num_completions = settings.num_completions
        max_sampled_tokens = num_completions * config.sampling.max_tokens
        completions_per_update = num_completions // settings.updates_per_rollout
        num_updates = settings.updates_per_rollout * settings.epochs  # per rollout
        micro_batch_tokens = config.learner.micro_batch_tokens
        min_sequences = max(1, micro_batch_tokens // config.max_sequence_tokens)
        num_problems = settings.rollouts * settings.problems
        recipe, *remarks = recipe_lines(config)
        lines = [
            f"algorithm   {recipe}",
            *remarks,
            f"rollout     {settings.problems} problems x {settings.group_size} completions = "
            f"{num_completions} completions, at most {max_sampled_tokens:,} sampled tokens",
            f"update      {completions_per_update} completions ({num_updates} updates per "
            f"rollout, epochs: {settings.epochs})",
            f"micro-batch {micro_batch_tokens:,} tokens with padding: at least {min_sequences} "
            f"sequences of {config.max_sequence_tokens}",
            f"run         {settings.rollouts} rollouts = {settings.total_updates} updates, "
            f"{num_problems:,} problems drawn",
        ]
        return "\n".join(lines)

    def needs(self, config: TrainConfig) -> StageNeeds:
        settings = config.train
        held_out_data = (config.eval.data or config.data,) if config.eval.every else ()
        num_completions = settings.rollouts * settings.num_completions
        return StageNeeds(
            config=config,
            max_sequence_tokens=config.max_sequence_tokens,
            problems=ProblemNeeds(
                training=config.data,
                num_training=settings.rollouts * settings.problems,
                held_out=held_out_data,
                num_held_out=config.eval.problems,
            ),
            memory=MemoryNeeds(learner=True, engine=True, max_sequences=settings.num_completions),
            check_other_vocabulary=_check_other_vocabulary,
            disk=DiskNeeds(
                checkpoints=max_checkpoints_on_disk(config),
                models=1,
                sampled_tokens=num_completions * config.sampling.max_tokens,
            ),
            rewards=tuple(config.rewards),
        )

    def parts(self, config: TrainConfig) -> list[Part]:
        return [Part(stage=self, config=config)]

    def dry_run_lines(self, config: TrainConfig) -> list[str]:
        check_rewards(config)
        plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
        if not config.model.warm_start:
            return []
        warm_start = sft.STAGE.batch_arithmetic(warm_start_config(config))
        return [f"warm start  {config.model.warm_start}", warm_start]

    def checks(
        self, config: TrainConfig, problems: Sequence[Problem], prompts: Prompts
    ) -> Iterator[Check]:
        for warning in recipe_warnings(config):
            yield Check("warn", "recipe", warning)


STAGE: Stage[TrainConfig] = _TrainStage()
