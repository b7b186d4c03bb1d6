"""`grpo doctor CONFIG`: finds problems of a config before the run.

Each finding has a level, a name, an observation and a remedy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import TrainConfig
from grpo.experience.prompts import ChatPrompts, Prompts
from grpo.experience.scoring import score
from grpo.learning import models
from grpo.metrics import roofline
from grpo.metrics.memory import MemoryTable
from grpo.run import ranks
from grpo.run.display import Display, redirect_output
from grpo.stages.engine import send_weights
from grpo.stages.problems import load_problems, make_mixture, select_held_out, without_repeats
from grpo.stages.run_context import open_stage
from grpo.stages.sampling import Sampler, load_rewards
from grpo.stages.stage import Check, Part, ProblemNeeds, Stage, StageNeeds
from grpo.tools import checks
from grpo.tools.checks import SAMPLED
from grpo.tools.gold_answers import gold_answers
from grpo.types import Problem, ScoredGroup, UserError

ALL_REDUCE_BYTES = 2**26  # size of the all-reduce that measures the bandwidth between ranks
MAX_PROBLEMS = 2000  # maximum number of training problems that are checked
TYPICAL_RATIO = 2.5  # measured time of a step over its lower bound (docs/benchmarks.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """The model of a stage, and its prompts."""

    model_dir: Path
    tokenizer: Any
    prompts: Prompts
    num_weights: int
    shape: roofline.ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A few completions, sampled and scored as in the run."""

    groups: list[ScoredGroup]
    tokens_per_s: float  # sampling rate
    sync_s: float  # seconds of a real weight sync; 0 if the stage has none


def doctor(
    stage: Stage[Any],
    config: Any,
    *,
    sample: bool = True,
    price: float | None = None,
) -> int:
    """Runs the checks, prints each finding, and returns the number of failed checks.

    In a job of several ranks it only measures the interconnect.

    Args:
        stage: The stage of the config.
        config: Its config.
        sample: Whether to start the engine and sample a few completions.
        price: Price of the machine per hour, for the estimated cost of the run.

    Raises:
        UserError: The config cannot be checked.
        EngineError: The engine failed.
    """
    parts = stage.parts(config)
    if ranks.world_size() > 1:
        _measure_interconnect(config)
        return 0
    num_failed = 0
    with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as scratch:
        for part in parts:
            if part.name:
                print(f"{part.name}:")
            folder = Path(scratch) / (part.name or "stage")
            folder.mkdir()
            for check in _check_part(part, folder, sample=sample, price=price):
                print(check, flush=True)
                if check.level == "fail":
                    num_failed += 1
    print(f"{num_failed} failed" if num_failed else "nothing failed")
    return num_failed


def print_memory_table(stage: Stage[Any], config: Any, gpu_gb: float) -> None:
    """Prints the memory per GPU of each stage with a learner, on 1 to 64 GPUs.

    Args:
        stage: The stage of the config.
        config: Its config.
        gpu_gb: Memory of a GPU in GiB.

    Raises:
        UserError: No stage has a learner.
    """
    num_tables = 0
    for part in stage.parts(config):
        needs = part.stage.needs(part.config)
        if needs is None or not needs.memory.learner:
            continue
        if part.name:
            print(f"{part.name}:")
        with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as scratch:
            table = _memory_table(needs, Path(scratch), gpu_gb)
        print("\n".join(table.lines()))
        num_tables += 1
    if num_tables == 0:
        raise UserError("--gpus: the config has no stage that trains a model")


def _memory_table(needs: StageNeeds, scratch: Path, gpu_gb: float) -> MemoryTable:
    """Returns the table of a stage. A generated model is written to `scratch`."""
    config = needs.config
    model = _find_model(needs, scratch)
    num_reference_weights = None
    if config.model.all_teachers and needs.memory.reference:
        num_reference_weights = _num_weights(_find_teachers(config, scratch))
    return MemoryTable(
        config=config,
        shape=model.shape,
        gpu_gb=gpu_gb,
        reference_weights=num_reference_weights,
        has_reference=needs.memory.reference,
        has_engine=needs.memory.engine and not config.engine.servers,
    )


def _find_model(needs: StageNeeds, scratch: Path) -> LocalModel:
    """Returns the model of the stage. A generated model is written to `scratch`."""
    config = needs.config
    with Display("auto", 1, "check") as display, redirect_output(scratch / "log"):
        model_dir = models.locate(config.model, scratch, config.seed, on_progress=display.download)
        tokenizer = models.load_tokenizer(model_dir)
        prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
        num_weights = models.num_weights(model_dir)
    return LocalModel(
        model_dir=model_dir,
        tokenizer=tokenizer,
        prompts=prompts,
        num_weights=num_weights,
        shape=roofline.model_shape(model_dir, num_weights, config.model.dtype),
    )


def _find_teachers(config: Any, scratch: Path) -> set[Path]:
    """Returns the directories of all teachers. Generated models are written to `scratch`."""
    with Display("auto", 1, "check") as display, redirect_output(scratch / "log"):
        teacher_dirs = models.resolve_teachers(
            config.model, scratch, config.seed, on_progress=display.download
        )
    return set(teacher_dirs.values())


def _num_weights(model_dirs: Iterable[Path]) -> int:
    return sum(models.num_weights(model_dir) for model_dir in model_dirs)


def _check_part(part: Part, scratch: Path, *, sample: bool, price: float | None) -> Iterator[Check]:
    """Yields the findings about one stage."""
    needs = part.stage.needs(part.config)
    assert needs is not None  # only a pipeline has no needs, and a pipeline is no part
    config = needs.config
    yield Check("ok", "batch", part.stage.batch_arithmetic(config))
    yield from checks.versions()
    training: dict[str, Sequence[Problem]] = {}
    if needs.problems.training is not None:
        training = load_problems(needs.problems.training, "train", config.seed, needs.rewards)
    model = None
    prompts: Prompts | ChatPrompts = ChatPrompts(config.prompt)
    if needs.endpoint is None:
        model = _find_model(needs, scratch)
        prompts = model.prompts
        models.check_context(model.model_dir, needs.max_sequence_tokens, config.length_keys)
    held_out = [
        load_problems(data, "test", config.seed, needs.rewards) for data in needs.problems.held_out
    ]
    held_out_problems = _held_out_problems(needs.problems, held_out, prompts, config.seed)
    problems = _training_problems(needs.problems, training, prompts, config.seed)
    if not problems:
        problems = held_out_problems
    if model is not None:
        yield from _check_model(part, needs, model, problems, scratch)
    yield from checks.disk(config, needs.disk, model.num_weights if model else 0)
    if held_out_problems and training:
        yield from checks.contamination(
            problems, held_out_problems, needs.problems.overlap_words, needs.problems.overlap_remedy
        )
    if needs.memory.max_sequences:  # the stage samples completions and scores them
        yield from gold_answers(needs, training, held_out)
    if sample and needs.memory.max_sequences:
        yield from _check_samples(needs, model, problems, scratch, price)


def _training_problems(
    needs: ProblemNeeds,
    training: dict[str, Sequence[Problem]],
    prompts: Prompts | ChatPrompts,
    seed: int,
) -> list[Problem]:
    """Returns the first problems that the run draws, without repeats, at most `MAX_PROBLEMS`."""
    if needs.training is None:
        return []
    mixture = make_mixture(needs.training, training, prompts, seed)
    count = max(SAMPLED, min(MAX_PROBLEMS, needs.num_training))
    return without_repeats(mixture.take(0, count))


def _held_out_problems(
    needs: ProblemNeeds,
    held_out: Sequence[Mapping[str, Sequence[Problem]]],
    prompts: Prompts | ChatPrompts,
    seed: int,
) -> list[Problem]:
    """Returns the problems of the evaluation and those that traces must not overlap with.

    `held_out` has the problems of each section in `needs.held_out`, by name of the data set.
    """
    problems: list[Problem] = []
    if needs.excluded is not None:
        for problems_of_set in load_problems(needs.excluded, "test", seed).values():
            problems += problems_of_set
    for data, problems_by_set in zip(needs.held_out, held_out, strict=True):
        problems += select_held_out(data, problems_by_set, prompts, needs.num_held_out)
    return problems


def _check_model(
    part: Part, needs: StageNeeds, model: LocalModel, problems: list[Problem], scratch: Path
) -> Iterator[Check]:
    """Yields the findings about prompts, teacher and memory, and those specific to the stage."""
    config, prompts = needs.config, model.prompts
    yield from checks.dtype(config)
    yield from checks.prompt(config, prompts, model.tokenizer, problems[0], needs.rewards)
    num_reference_weights = model.num_weights
    if config.model.all_teachers:
        teacher_dirs = _find_teachers(config, scratch)
        for teacher_dir in sorted(teacher_dirs):
            teacher_tokenizer = models.load_tokenizer(teacher_dir)
            yield from checks.vocabulary(needs, model.tokenizer, teacher_tokenizer)
        num_reference_weights = _num_weights(teacher_dirs)
    if not part.traces_pending:
        yield from part.stage.checks(config, problems, prompts)
    yield from checks.memory(config, needs.memory, model.shape, num_reference_weights)


def _check_samples(
    needs: StageNeeds,
    model: LocalModel | None,
    problems: list[Problem],
    scratch: Path,
    price: float | None,
) -> Iterator[Check]:
    """Yields the findings about a few completions, and about a weight sync if the stage has one."""
    num_problems = 1 if needs.endpoint else SAMPLED
    trial = _run_trial(needs, model, problems[:num_problems], scratch)
    yield from checks.samples(trial.groups)
    if model is not None and needs.memory.syncs_weights:
        gigabytes = model.shape.weight_bytes / 1e9
        message = f"{trial.sync_s:.2f} s for {gigabytes:.2f} GB, sent as in the run"
        yield Check("ok", "sync", message)
        yield _estimate_time(needs.config, model.shape, trial, price)


def _run_trial(
    needs: StageNeeds, model: LocalModel | None, problems: Sequence[Problem], scratch: Path
) -> Trial:
    """Samples and scores a few problems with the real engine or endpoint.

    The run directory is temporary.
    """
    logging = needs.config.logging.model_copy(update={"trackers": []})
    config = needs.config.model_copy(update={"run_dir": str(scratch / "run"), "logging": logging})
    with open_stage(config, "doctor", total=1, unit="check", resume=False) as context:
        pool, rewards = load_rewards(config)
        context.stack.callback(pool.close)
        sampler = Sampler(config, context, needs.endpoint)
        sampler.start()
        sync_s = 0.0
        if model is not None and needs.memory.syncs_weights:
            with redirect_output(scratch / "log"):
                sync_s = send_weights(sampler.engine, model.model_dir)
        start = time.monotonic()
        groups = sampler.sample(problems, SAMPLED, config.sampling.temperature, lambda *_: None)
        seconds = time.monotonic() - start
        scored = score(groups, rewards, sampler.prompts.reward_prompt)
    num_tokens = 0
    for group in groups:
        num_tokens += sum(len(completion.token_ids) for completion in group.completions)
    return Trial(groups=scored, tokens_per_s=num_tokens / seconds, sync_s=sync_s)


def _estimate_time(
    config: TrainConfig, shape: roofline.ModelShape, trial: Trial, price: float | None
) -> Check:
    """Estimates the duration of a step and of the run, at the completion lengths of the trial."""
    settings = config.train
    limits = roofline.Roofline(machine=roofline.measure_machine(config.model.dtype), shape=shape)
    # The groups of the trial are repeated to about as many completions as a rollout has.
    problems_ratio = round(settings.problems / len(trial.groups))
    num_copies = problems_ratio * settings.group_size // SAMPLED
    groups = [scored.group for scored in trial.groups] * max(1, num_copies)
    bounds = limits.bounds(
        groups,
        updates=settings.updates_per_rollout,
        reference=config.algorithm.kl_coef > 0,
    )
    bound_s = sum(bounds.values())
    step_s = TYPICAL_RATIO * bound_s
    hours = step_s * settings.rollouts / 3600
    phases = ", ".join(f"{name} {value:.1f}" for name, value in bounds.items())
    cost = f", cost {price * hours:,.2f} at {price:g} per hour" if price else ""
    message = (
        f"a step takes at least {bound_s:.1f} s ({phases}), typically {step_s:.0f} s, at these "
        f"completion lengths; the run {hours:.1f} hours{cost}. Lengths may grow to "
        f"{config.sampling.max_tokens} tokens. Sampling rate now: {trial.tokens_per_s:,.0f} "
        "tokens/s"
    )
    return Check("ok", "time", message)


def _measure_interconnect(config: Any) -> None:
    """Prints bandwidth and latency of an all-reduce over the ranks.

    The bandwidth is the bus bandwidth of nccl-tests: 2 (n - 1) / n times the bytes per second.
    """
    ranks.join_process_group(config.learner.timeout_s)
    latency_s = ranks.measure_all_reduce_s(4)
    seconds = ranks.measure_all_reduce_s(ALL_REDUCE_BYTES)
    if ranks.rank() > 0:
        return
    num_ranks = ranks.world_size()
    bandwidth = 2 * (num_ranks - 1) / num_ranks * ALL_REDUCE_BYTES / seconds
    message = (
        f"{num_ranks} ranks all-reduce {ALL_REDUCE_BYTES / 1e6:.0f} MB in {1e3 * seconds:.1f} ms "
        f"({bandwidth / 1e9:.2f} GB/s), 4 bytes in {1e6 * latency_s:.0f} us"
    )
    remedy = "for all other checks, run grpo doctor without torchrun"
    print(Check("ok", "interconnect", message, remedy), flush=True)
