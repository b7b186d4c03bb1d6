"""`grpo doctor CONFIG`: what will go wrong, before it costs anything.

Each finding has a name, what was found, and the way out.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo.config import (
    CollectConfig,
    Config,
    Data,
    DistillConfig,
    EvalConfig,
    PipelineConfig,
    RunConfig,
    SftConfig,
    Teacher,
)
from grpo.experience import rollout
from grpo.experience.prompts import Chat, Prompts
from grpo.learning import models
from grpo.metrics import roofline
from grpo.run import ranks
from grpo.run.display import quiet
from grpo.stages.engine import send_weights
from grpo.stages.eval import of_finished
from grpo.stages.problems import held_out, load_problems, mixture
from grpo.stages.run_context import open_stage
from grpo.stages.sampling import Sampler, load_rewards
from grpo.tools import checks
from grpo.tools.checks import SAMPLED, Check
from grpo.tools.dry_run import arithmetic
from grpo.types import Problem, ScoredGroup, UserError

SUMMED = 2**26  # bytes
USUAL = 2.5  # times the roofline's bound, as measured (docs/benchmarks.md)


def doctor(
    config: Any, *, sample: bool = True, price: float | None = None, gpus: bool = False
) -> int:
    """Prints every finding as it is made; returns how many failed.

    `price`: of an hour of the machine; `gpus`: only what the run needs of how many. Raises
    UserError, EngineError.
    """
    if isinstance(config, PipelineConfig):
        raise UserError(
            "grpo doctor takes the config of one stage; `grpo pipeline CONFIG --dry-run` checks "
            "the chain"
        )
    if gpus and not isinstance(config, Config):
        raise UserError("--gpus: the table is of a train config")
    if ranks.count() > 1 and not gpus:
        return _between(config)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as scratch:
        if gpus:
            print(_sized(config, Path(scratch)))
            return 0
        for name, part in _parts(config).items():
            if name:
                print(f"{name}:")
            for check in _findings(
                part, Path(scratch) / (name or "stage"), sample, price, to_come=name == "sft"
            ):
                print(check, flush=True)
                failed += check.level == "fail"
    print(f"{failed} failed" if failed else "nothing failed")
    return failed


def _parts(config: RunConfig) -> dict[str, RunConfig]:
    """Returns the stages that a config is of, by name; their traces are still to come."""
    parts = (config.parts() if isinstance(config, DistillConfig) else {}) or {"": config}
    return {
        name: part.model_copy(update={"data": config.data}) if name == "sft" else part
        for name, part in parts.items()
    }


def _sized(config: Config, scratch: Path) -> str:
    model_dir, _, _, weights = _model(config, scratch)
    raw = json.loads((model_dir / "config.json").read_text())
    shape = roofline.shape(model_dir, weights, config.model.dtype)
    return "\n".join(roofline.sizing(config, shape, raw["hidden_size"], raw["vocab_size"]))


def _model(config: RunConfig, scratch: Path) -> tuple[Path, Any, Prompts, int]:
    """Returns directory, tokenizer, prompts and number of weights."""
    scratch.mkdir(exist_ok=True)
    with quiet(scratch / "log"):
        model_dir = models.locate(config.model, scratch, config.seed)
        tokenizer = models.load_tokenizer(model_dir)
        prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
        return model_dir, tokenizer, prompts, models.num_weights(model_dir)


def _findings(
    config: RunConfig, scratch: Path, sample: bool, price: float | None, *, to_come: bool
) -> Iterator[Check]:
    """Yields what is found of one stage. `to_come`: what it learns from is not there yet."""
    scratch.mkdir(exist_ok=True)
    if isinstance(config, EvalConfig):
        config = of_finished(config.by_protocol())
    yield Check("ok", "batch", arithmetic(config))
    yield from checks.versions()
    train = (
        {} if isinstance(config, EvalConfig) else load_problems(config.data, "train", config.seed)
    )
    asked = _endpoint(config)
    prompts: Prompts | Chat = Chat(config.prompt)
    model_dir, weights = scratch, 0
    if not asked:
        model_dir, tokenizer, prompts, weights = _model(config, scratch)
        models.check_context(model_dir, config.max_sequence_tokens)  # type: ignore[attr-defined]
    judged = _judged(config, prompts)
    stream = mixture(config.data, train, prompts, config.seed) if train else None
    problems = (
        list({problem.id: problem for problem in stream.take(0, _drawn(config))}.values())
        if stream
        else judged
    )
    if isinstance(prompts, Prompts):
        shape = roofline.shape(model_dir, weights, config.model.dtype)
        yield from checks.prompt(config, prompts, tokenizer, problems[0])
        reference = weights
        if config.model.teacher:
            with quiet(scratch / "log"):
                teacher_dir = models.resolve(
                    config.model.teacher, None, scratch / "teacher", config.seed
                )
            yield from checks.vocabulary(tokenizer, models.load_tokenizer(teacher_dir))
            reference = models.num_weights(teacher_dir)
        if isinstance(config, SftConfig | DistillConfig) and not to_come:
            yield from checks.solutions(config, problems, prompts)
        yield from checks.memory(config, shape, model_dir, reference)
    yield from checks.disk(config, weights)
    if judged and stream:
        yield from checks.contamination(config, problems, judged)
    if not sample or not isinstance(config, Config | CollectConfig):
        return
    groups, rate, synced = _sample(
        config, scratch, asked, model_dir, problems[: 1 if asked else SAMPLED], weights
    )
    yield from checks.samples(groups)
    if isinstance(config, Config) and not isinstance(config, EvalConfig):
        told = (
            f"{synced:.2f} s for {weights * shape.weight_bytes / 1e9:.2f} GB, through the real "
            "way into the engine"
        )
        yield Check("ok", "sync", told)
        yield from _time(config, shape, groups, rate, price)


def _endpoint(config: RunConfig) -> Teacher | None:
    return (
        config.teacher
        if isinstance(config, CollectConfig)
        else config.endpoint
        if isinstance(config, EvalConfig)
        else None
    )


def _drawn(config: RunConfig) -> int:
    """Returns how many problems are looked at: those that the run draws, at most 2,000."""
    count = config.train.rollouts * config.train.problems if isinstance(config, Config) else 0
    count = config.sft.updates * config.sft.batch_size if isinstance(config, SftConfig) else count
    count = (
        config.soft.updates * config.soft.batch_size
        if isinstance(config, DistillConfig) and config.soft
        else count
    )
    count = config.collect.problems if isinstance(config, CollectConfig) else count
    return max(SAMPLED, min(2000, count))


def _judged(config: RunConfig, prompts: Prompts | Chat) -> list[Problem]:
    """Returns the problems that the run is judged by, or keeps out of its traces."""
    if isinstance(config, CollectConfig):
        named = config.collect.decontaminate
        sets = (
            load_problems(Data(mixture=named, path=config.data.path), "test", config.seed)
            if named
            else {}
        )
        return [problem for rows in sets.values() for problem in rows]
    if not isinstance(config, Config) or not (config.eval.every or isinstance(config, EvalConfig)):
        return []
    judged = (
        config.judged.values()
        if isinstance(config, EvalConfig)
        else [config.eval.data or config.data]
    )
    return [
        p
        for own in judged
        for p in held_out(
            own, load_problems(own, "test", config.seed), prompts, config.eval.problems
        )
    ]


def _between(config: Config) -> int:
    """Under torchrun: what lies between the ranks.

    The rate is nccl-tests' bus bandwidth, 2 (n - 1) / n of the bytes a second.
    """
    ranks.join(config.learner.timeout_s)
    wait, seconds = ranks.sum_seconds(4), ranks.sum_seconds(SUMMED)
    if ranks.rank() == 0:
        rate = 2 * (ranks.count() - 1) / ranks.count() * SUMMED / seconds
        told = (
            f"{ranks.count()} ranks sum {SUMMED / 1e6:.0f} MB in {1e3 * seconds:.1f} ms "
            f"({rate / 1e9:.2f} GB/s)"
        )
        told += f", 4 bytes in {1e6 * wait:.0f} us"
        print(
            Check("ok", "interconnect", told, "all else: grpo doctor without torchrun"), flush=True
        )
    return 0


def _sample(
    config: Config | CollectConfig,
    scratch: Path,
    asked: Teacher | None,
    model_dir: Path,
    problems: Sequence[Problem],
    weights: int,
) -> tuple[list[ScoredGroup], float, float]:
    """Returns scored groups, tokens per second, and the seconds of a real sync (0 without one).

    The groups come from the real engine or endpoint.
    """
    logging = config.logging.model_copy(update={"trackers": []})
    own = config.model_copy(update={"run_dir": str(scratch / "run"), "logging": logging})
    with open_stage(own, "doctor", total=1, unit="check", resume=False) as stage:
        pool, rewards = load_rewards(config)
        stage.stack.callback(pool.close)
        sampler = Sampler(own, stage, asked)
        synced = 0.0
        if isinstance(config, Config) and not isinstance(config, EvalConfig):
            with quiet(scratch / "log"):
                synced = send_weights(sampler.engine, model_dir)
        start = time.monotonic()
        groups = sampler.sample(problems, SAMPLED, config.sampling.temperature, lambda *_: None)
        seconds = time.monotonic() - start
        scored = rollout.score(groups, rewards, sampler.prompts.for_rewards)
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    return scored, tokens / seconds, synced


def _time(
    config: Config,
    shape: roofline.Shape,
    groups: Sequence[ScoredGroup],
    rate: float,
    price: float | None,
) -> Iterator[Check]:
    machine = roofline.measure(config.model.dtype)
    count = max(1, round(config.train.problems / len(groups)) * config.train.group_size // SAMPLED)
    rows = [scored.group for scored in groups] * count
    least = roofline.bounds(
        machine,
        shape,
        rows,
        updates=config.train.updates_per_rollout,
        reference=config.algorithm.kl_coef > 0,
    )
    seconds = USUAL * sum(least.values())
    hours = seconds * config.train.rollouts / 3600
    told = ", ".join(f"{name} {value:.1f}" for name, value in least.items())
    cost = f", {price * hours:,.2f} at {price:g} an hour" if price else ""
    yield Check(
        "ok",
        "time",
        f"a rollout with its updates at least {sum(least.values()):.1f} s ({told}) at today's "
        f"lengths, usually {seconds:.0f} s; the "
        f"run {hours:.1f} hours{cost}; lengths may grow to {config.sampling.max_tokens} tokens. "
        f"Sampled now: {rate:,.0f} tokens/s",
    )
