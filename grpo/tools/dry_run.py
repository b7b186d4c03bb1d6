"""`--dry-run`: the resolved config, the batch arithmetic and one rendered prompt.

Starts no engine and loads no weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo import config as configs
from grpo.config import (
    CollectConfig,
    Config,
    Data,
    DistillConfig,
    EvalConfig,
    PipelineConfig,
    QuantizeConfig,
    RunConfig,
    SampledConfig,
    SftConfig,
)
from grpo.config.algorithm import describe
from grpo.experience import plugins
from grpo.experience.prompts import EXAMPLE, R1_ZERO, Prompts, visible
from grpo.learning import models
from grpo.run.display import quiet
from grpo.stages.eval import of_finished
from grpo.stages.pipeline import checked
from grpo.stages.problems import load_problems
from grpo.stages.train import warm_start_config
from grpo.types import Problem, Unreachable
from rewards.workers.pool import Pool


def dry_run(config: RunConfig | PipelineConfig) -> None:
    """Prints what a run would do.

    Raises UserError for what would stop it early; a tokenizer or data out of reach is only told.
    """
    if isinstance(config, PipelineConfig):
        for name, command, arguments in checked(config):
            print(f"{name:24} grpo {command} {' '.join(arguments)}")
        return
    print(configs.dump(config))
    print(arithmetic(config))
    judged: list[Data] = []
    if isinstance(config, SampledConfig):
        plugins.rewards(config.rewards, Pool())
    if isinstance(config, EvalConfig):
        judged = list(config.judged.values())
        config = of_finished(config.by_protocol())
    elif isinstance(config, Config):
        plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
        if config.model.warm_start:
            print(
                "warm start  "
                f"{config.model.warm_start}\n{sft_arithmetic(warm_start_config(config))}"
            )
        judged = [config.eval.data or config.data] if config.eval.every else []
    problems: list[Sequence[Problem]] = []
    try:
        problems += (
            []
            if isinstance(config, EvalConfig)
            else load_problems(config.data, "train", config.seed).values()
        )
        for data in judged:
            problems += load_problems(data, "test", config.seed).values()
    except Unreachable as error:
        print(f"data: {error}")
    print(_prompt(config, problems or [[EXAMPLE]]))


def arithmetic(config: RunConfig) -> str:
    """Returns the batch arithmetic of a stage in plain words."""
    kinds: dict[type, Any] = {
        Config: train_arithmetic,
        SftConfig: sft_arithmetic,
        CollectConfig: collect_arithmetic,
        EvalConfig: eval_arithmetic,
        QuantizeConfig: lambda part: (
            f"schemes     {', '.join(part.quantize.schemes)}; int4 in groups of "
            f"{part.quantize.group_size}"
        ),
        DistillConfig: soft_arithmetic,
    }
    parts = (list(config.parts().values()) if isinstance(config, DistillConfig) else []) or [config]
    return "\n".join(kinds[type(part)](part) for part in parts)


def train_arithmetic(config: Config) -> str:
    """Returns the batch arithmetic in plain words."""
    train, sampling, learner = config.train, config.sampling, config.learner
    per_update = train.completions // train.updates_per_rollout
    longest = max(1, learner.micro_batch_tokens // config.max_sequence_tokens)
    return "\n".join(
        [
            f"algorithm   {describe(config.algorithm)}",
            f"a rollout   {train.problems} problems x {train.group_size} completions = "
            f"{train.completions} completions, "
            f"at most {train.completions * sampling.max_tokens:,} sampled tokens",
            f"an update   {per_update} completions ({train.updates_per_rollout * train.epochs} "
            f"updates a rollout, epochs: {train.epochs})",
            f"micro-batch {learner.micro_batch_tokens:,} tokens, padding included: {longest} or "
            "more sequences of "
            f"{config.max_sequence_tokens}",
            f"the run     {train.rollouts} rollouts = {train.total_updates} updates, "
            f"{train.rollouts * train.problems:,} problems drawn",
        ]
    )


def sft_arithmetic(config: SftConfig) -> str:
    """Returns the batch arithmetic in plain words."""
    sft = config.sft
    return (
        f"an update   {sft.batch_size} solutions in {sft.batch_size // config.micro_batch} "
        f"micro-batches of {config.micro_batch}\n"
        f"the run     {sft.updates} updates, {sft.updates * sft.batch_size:,} solutions drawn"
    )


def soft_arithmetic(config: DistillConfig) -> str:
    """Returns the batch arithmetic in plain words."""
    assert config.soft is not None
    return (
        f"an update   {config.soft.batch_size} texts of at most {config.soft.max_tokens} tokens, "
        f"{config.soft.divergence} to the teacher\n"
        f"the run     {config.soft.updates} updates, "
        f"{config.soft.updates * config.soft.batch_size:,} texts drawn"
    )


def collect_arithmetic(config: CollectConfig) -> str:
    """Returns the batch arithmetic in plain words."""
    collect = config.collect
    source = config.teacher.url if config.teacher else "model.path"
    return (
        f"a chunk     {collect.chunk} problems x {collect.samples} completions, at most "
        f"{collect.keep} kept a problem\n"
        f"the run     {collect.problems:,} problems, {collect.problems * collect.samples:,} "
        "completions, at most "
        f"{collect.problems * collect.samples * config.sampling.max_tokens:,} tokens, from {source}"
    )


def eval_arithmetic(config: EvalConfig) -> str:
    """Returns the arithmetic of the samples in plain words."""
    config = config.by_protocol()
    settings, sampling = config.eval, config.sampling
    samples = (
        "64 (sets of at most 100 problems) or 16"
        if settings.protocol == "r1"
        else str(settings.samples)
    )
    return (
        f"a problem   {samples} completions of at most {sampling.max_tokens} tokens at "
        f"temperature {settings.temperature:g}\n"
        f"the sets    {', '.join(config.sets) or 'one'}, at most {settings.problems} problems each"
    )


def _prompt(config: RunConfig, problems: Sequence[Sequence[Problem]]) -> str:
    """Returns the first prompt as text, after checking that every prompt fits."""
    problem = problems[0][0]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with quiet(Path(scratch) / "log"):
                model_dir = models.locate(config.model, Path(scratch), config.seed, weights=False)
                tokenizer = models.load_tokenizer(model_dir)
                prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
            models.check_context(model_dir, config.max_sequence_tokens)  # type: ignore[attr-defined]
        except Unreachable as error:
            text = (
                R1_ZERO.replace("{question}", problem.question)
                if config.prompt.template == "r1_zero"
                else problem.question
            )
            return f"prompt ({config.prompt.template}; no tokenizer: {error}):\n{text}"
        for rows in problems:
            prompts.fitting(rows)
        ids = prompts.ids(problem)
        target = ""
        if isinstance(config, SftConfig):
            target = str(tokenizer.decode(list(prompts.target_ids(problem))))
        ends = ", ".join(tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids)))
        stop = f", stop strings {', '.join(prompts.stop)}" if prompts.stop else ""
        return (
            f"prompt ({len(ids)} tokens, ends at "
            f"{ends}{stop}):\n{visible(prompts.text(problem) + target, tokenizer)}"
        )
