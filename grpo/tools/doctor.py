"""`grpo doctor CONFIG`: what will go wrong, before it costs anything.

Each finding has a name, what was seen, and the remedy.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.experience import rollout
from grpo.experience.prompts import Chat, Prompts
from grpo.learning import models
from grpo.metrics import roofline
from grpo.run import ranks
from grpo.run.display import quiet
from grpo.stages.engine import send_weights
from grpo.stages.problems import held_out, load_problems, mixture, without_repeats
from grpo.stages.run_context import open_stage
from grpo.stages.sampling import Sampler, load_rewards
from grpo.stages.stage import Check, Part, ProblemNeeds, Stage, StageNeeds
from grpo.tools import checks
from grpo.tools.checks import SAMPLED
from grpo.types import Problem, ScoredGroup, UserError

SUMMED_BYTES = 2**26
MAX_INSPECTED = 2000  # problems
USUAL_RATIO = 2.5  # a step's time over the roofline's bound, as measured (docs/benchmarks.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """The model of a stage, on disk."""

    model_dir: Path
    tokenizer: Any
    prompts: Prompts
    num_weights: int
    shape: roofline.Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A few completions, sampled and scored as the run would."""

    groups: list[ScoredGroup]
    tokens_per_s: float
    sync_s: float  # of a real sync; 0 if the stage has none


def doctor(
    stage: Stage[Any],
    config: Any,
    *,
    sample: bool = True,
    price: float | None = None,
    gpus: bool = False,
) -> int:
    """Prints every finding as it is made; returns how many failed.

    Args:
        stage: The kind of the config.
        config: Its config.
        sample: Whether to start the engine and sample a few completions.
        price: Of one hour of the machine.
        gpus: Only print what the run needs of 1 to 64 GPUs.

    Raises:
        UserError: The config cannot be inspected.
        EngineError: The engine failed.
    """
    parts = stage.parts(config)
    if gpus:
        print(_sizing(stage, config))
        return 0
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
            for check in _inspect(part, folder, sample=sample, price=price):
                print(check, flush=True)
                num_failed += check.level == "fail"
    print(f"{num_failed} failed" if num_failed else "nothing failed")
    return num_failed


def _sizing(stage: Stage[Any], config: Any) -> str:
    """Returns the table of what the run needs of how many GPUs. Raises UserError."""
    needs = stage.needs(config)
    if needs is None or not needs.memory.syncs_weights:
        raise UserError("--gpus: the table is of a train config")
    with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as scratch:
        model = _find_model(needs, Path(scratch))
        raw = json.loads((model.model_dir / "config.json").read_text())
        rows = roofline.sizing(config, model.shape, raw["hidden_size"], raw["vocab_size"])
        return "\n".join(rows)


def _find_model(needs: StageNeeds, scratch: Path) -> LocalModel:
    """Returns the stage's model; a model that is made on the spot lies in `scratch`."""
    config = needs.config
    with quiet(scratch / "log"):
        model_dir = models.locate(config.model, scratch, config.seed)
        tokenizer = models.load_tokenizer(model_dir)
        prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
        num_weights = models.num_weights(model_dir)
    return LocalModel(
        model_dir=model_dir,
        tokenizer=tokenizer,
        prompts=prompts,
        num_weights=num_weights,
        shape=roofline.shape(model_dir, num_weights, config.model.dtype),
    )


def _inspect(part: Part, scratch: Path, *, sample: bool, price: float | None) -> Iterator[Check]:
    """Yields the findings about one stage."""
    needs = part.stage.needs(part.config)
    assert needs is not None  # a chain has no parts that are chains
    config = needs.config
    yield Check("ok", "batch", part.stage.arithmetic(config))
    yield from checks.versions()
    training: dict[str, Sequence[Problem]] = {}
    if needs.problems.training is not None:
        training = load_problems(needs.problems.training, "train", config.seed)
    model = None
    prompts: Prompts | Chat = Chat(config.prompt)
    if needs.endpoint is None:
        model = _find_model(needs, scratch)
        prompts = model.prompts
        models.check_context(model.model_dir, needs.max_sequence_tokens)
    evaluated = _evaluation_problems(needs.problems, prompts, config.seed)
    problems = _training_problems(needs.problems, training, prompts, config.seed) or evaluated
    if model is not None:
        yield from _inspect_model(part, needs, model, problems, scratch)
    yield from checks.disk(config, needs.disk, model.num_weights if model else 0)
    if evaluated and training:
        yield from checks.contamination(
            problems, evaluated, needs.problems.overlap_words, needs.problems.overlap_remedy
        )
    if sample and needs.memory.max_sequences:
        yield from _inspect_samples(needs, model, problems, scratch, price)


def _training_problems(
    needs: ProblemNeeds,
    training: dict[str, Sequence[Problem]],
    prompts: Prompts | Chat,
    seed: int,
) -> list[Problem]:
    """Returns the first problems that the run draws, each once, at most `MAX_INSPECTED`."""
    if needs.training is None:
        return []
    stream = mixture(needs.training, training, prompts, seed)
    count = max(SAMPLED, min(MAX_INSPECTED, needs.num_training))
    return without_repeats(stream.take(0, count))


def _evaluation_problems(needs: ProblemNeeds, prompts: Prompts | Chat, seed: int) -> list[Problem]:
    """Returns the problems that the run is evaluated on, or that its traces must not overlap."""
    problems: list[Problem] = []
    if needs.excluded is not None:
        for rows in load_problems(needs.excluded, "test", seed).values():
            problems += rows
    for data in needs.held_out:
        problems += held_out(data, load_problems(data, "test", seed), prompts, needs.num_held_out)
    return problems


def _inspect_model(
    part: Part, needs: StageNeeds, model: LocalModel, problems: list[Problem], scratch: Path
) -> Iterator[Check]:
    """Yields the findings about prompts, teacher, the kind's own matters, and memory."""
    config, prompts = needs.config, model.prompts
    yield from checks.prompt(config, prompts, model.tokenizer, problems[0], needs.rewards)
    num_reference_weights = model.num_weights
    if config.model.teacher:
        with quiet(scratch / "log"):
            teacher_dir = models.resolve(
                config.model.teacher, None, scratch / "teacher", config.seed
            )
        yield from checks.vocabulary(model.tokenizer, models.load_tokenizer(teacher_dir))
        num_reference_weights = models.num_weights(teacher_dir)
    if not part.traces_to_come:
        yield from part.stage.checks(config, problems, prompts)
    yield from checks.memory(
        config, needs.memory, model.shape, model.model_dir, num_reference_weights
    )


def _inspect_samples(
    needs: StageNeeds,
    model: LocalModel | None,
    problems: list[Problem],
    scratch: Path,
    price: float | None,
) -> Iterator[Check]:
    """Yields the findings about a few completions, and about a real sync if there is one."""
    count = 1 if needs.endpoint else SAMPLED
    trial = _sample(needs, model, problems[:count], scratch)
    yield from checks.samples(trial.groups)
    if model is not None and needs.memory.syncs_weights:
        num_bytes = model.num_weights * model.shape.weight_bytes
        yield Check(
            "ok",
            "sync",
            f"{trial.sync_s:.2f} s for {num_bytes / 1e9:.2f} GB, through the real way into the "
            "engine",
        )
        yield _time(needs.config, model.shape, trial, price)


def _sample(
    needs: StageNeeds, model: LocalModel | None, problems: Sequence[Problem], scratch: Path
) -> Trial:
    """Returns a trial on the real engine or endpoint, in a run directory that is thrown away."""
    logging = needs.config.logging.model_copy(update={"trackers": []})
    config = needs.config.model_copy(update={"run_dir": str(scratch / "run"), "logging": logging})
    with open_stage(config, "doctor", total=1, unit="check", resume=False) as context:
        pool, rewards = load_rewards(config)
        context.stack.callback(pool.close)
        sampler = Sampler(config, context, needs.endpoint)
        sync_s = 0.0
        if model is not None and needs.memory.syncs_weights:
            with quiet(scratch / "log"):
                sync_s = send_weights(sampler.engine, model.model_dir)
        start = time.monotonic()
        groups = sampler.sample(problems, SAMPLED, config.sampling.temperature, lambda *_: None)
        seconds = time.monotonic() - start
        scored = rollout.score(groups, rewards, sampler.prompts.for_rewards)
    num_tokens = sum(
        len(completion.token_ids) for group in groups for completion in group.completions
    )
    return Trial(groups=scored, tokens_per_s=num_tokens / seconds, sync_s=sync_s)


def _time(config: Config, shape: roofline.Shape, trial: Trial, price: float | None) -> Check:
    """Returns how long a step and the run take, at the lengths of the trial's completions."""
    settings = config.train
    machine = roofline.measure(config.model.dtype)
    num_copies = round(settings.problems / len(trial.groups)) * settings.group_size // SAMPLED
    groups = [scored.group for scored in trial.groups] * max(1, num_copies)
    bounds = roofline.bounds(
        machine,
        shape,
        groups,
        updates=settings.updates_per_rollout,
        reference=config.algorithm.kl_coef > 0,
    )
    bound_s = sum(bounds.values())
    step_s = USUAL_RATIO * bound_s
    hours = step_s * settings.rollouts / 3600
    phases = ", ".join(f"{name} {value:.1f}" for name, value in bounds.items())
    cost = f", {price * hours:,.2f} at {price:g} an hour" if price else ""
    return Check(
        "ok",
        "time",
        f"a rollout with its updates at least {bound_s:.1f} s ({phases}) at today's "
        f"lengths, usually {step_s:.0f} s; the "
        f"run {hours:.1f} hours{cost}; lengths may grow to {config.sampling.max_tokens} tokens. "
        f"Sampled now: {trial.tokens_per_s:,.0f} tokens/s",
    )


def _measure_interconnect(config: Any) -> None:
    """Prints the rate between the ranks of a launcher.

    The rate is the bus bandwidth of nccl-tests: 2 (n - 1) / n of the bytes per second.
    """
    ranks.join(config.learner.timeout_s)
    latency_s = ranks.sum_seconds(4)
    seconds = ranks.sum_seconds(SUMMED_BYTES)
    if ranks.rank() > 0:
        return
    rate = 2 * (ranks.world_size() - 1) / ranks.world_size() * SUMMED_BYTES / seconds
    message = (
        f"{ranks.world_size()} ranks sum {SUMMED_BYTES / 1e6:.0f} MB in {1e3 * seconds:.1f} ms "
        f"({rate / 1e9:.2f} GB/s), 4 bytes in {1e6 * latency_s:.0f} us"
    )
    print(
        Check("ok", "interconnect", message, "all else: grpo doctor without torchrun"), flush=True
    )
