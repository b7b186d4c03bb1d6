"""`grpo replay RUN`: repeats the updates of a step from its stored samples.

On a CPU the result is bit-identical. Overrides repeat the updates with another algorithm.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from grpo import config as configs
from grpo.config import TrainConfig
from grpo.config.algorithm import AlgorithmSettings
from grpo.config.model import ModelSettings
from grpo.config.presets import CLIPPING_KEYS, describe_recipe
from grpo.config.reading import apply_overrides
from grpo.experience import plugins
from grpo.experience.prompts import Prompts
from grpo.learning import lora, models
from grpo.learning.advantages import recipe_advantages, unflatten
from grpo.run.directory import read_metrics, read_update_samples
from grpo.run.display import redirect_output
from grpo.stages.registry import stage_for_config
from grpo.stages.start_model import Teachers, find_other_vocabularies
from grpo.types import Sample, UserError

if TYPE_CHECKING:
    from grpo.training.updates import Updater

PRINTED_METRICS = (
    "loss",
    "policy/grad_norm",
    "policy/entropy",
    "ratio/mean",
    "clip/low",
    "clip/high",
    "kl/ref",
    "mismatch/abs",
    "update/tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStep:
    """A step of a run, with everything that is needed to repeat its updates."""

    run_dir: Path
    step: int
    metrics: dict[str, Any]  # of the original updates
    samples: list[Sample]
    checkpoint: Path | None  # before the updates; None for the first step


def replay(folder: str, *, step: int | None, overrides: list[str]) -> bool:
    """Repeats the updates of a step, and prints their metrics then and now.

    Args:
        folder: Directory of a run of `grpo train`.
        step: The step to repeat, from 1. It needs a checkpoint of step - 1, unless it is the first.
            Default: the last step that can be repeated.
        overrides: `key=value` overrides of the run's config.

    Returns:
        Whether loss and gradient norm are bit-identical.

    Raises:
        UserError: The run, its samples or the checkpoint is missing, or the overrides are invalid.
    """
    run_dir = Path(folder)
    tree = _read_config(run_dir)
    config: TrainConfig = configs.parse(tree, str(run_dir / "config.yaml"))
    new_config = _with_overrides(tree, overrides) if overrides else config
    stored = _find_step(run_dir, step)
    has_new_algorithm = (
        new_config.algorithm != config.algorithm
        or new_config.model.all_teachers != config.model.all_teachers
    )
    if has_new_algorithm:
        _check_stored_values(config.algorithm, new_config.algorithm)
        _check_same_data_sets(config.model, new_config.model)
    if new_config.algorithm.teacher_hint != config.algorithm.teacher_hint:
        _check_no_aligned_tokens(stored.samples)
    metrics = _repeat_updates(new_config, stored, with_new_advantages=has_new_algorithm)
    print(describe_recipe(new_config.algorithm))
    _print_comparison(stored, metrics)
    return all(stored.metrics.get(key) == metrics.get(key) for key in ("loss", "policy/grad_norm"))


def _check_stored_values(stored: AlgorithmSettings, new: AlgorithmSettings) -> None:
    """Raises UserError if the new algorithm needs values that the samples do not have.

    Args:
        stored: The algorithm of the run.
        new: The algorithm of the replay.
    """
    if "mask" in (stored.truncated, new.truncated):
        raise UserError(
            "grpo replay: with algorithm.truncated=mask, the samples of truncated completions are "
            "not stored, but the advantages depend on them; such a step cannot be repeated with "
            "another algorithm"
        )
    if new.advantage == "per_reward":
        raise UserError(
            "grpo replay: algorithm.advantage=per_reward needs the value of each reward, and the "
            "stored samples have only their sum; such a step can be repeated only with its own "
            "algorithm"
        )
    if new.teacher_hint not in ("none", stored.teacher_hint):
        raise UserError(
            f"grpo replay: algorithm.teacher_hint={new.teacher_hint} needs the teacher's prompts, "
            f"and the run has teacher_hint={stored.teacher_hint}; it can be repeated with that "
            "hint, or without one"
        )


def _check_same_data_sets(stored: ModelSettings, new: ModelSettings) -> None:
    """Raises UserError if a new teacher is for a data set whose samples are not marked as such."""
    if not new.teachers.keys() <= stored.teachers.keys():
        names = ", ".join(stored.teachers) or "none"
        raise UserError(
            f"grpo replay: the samples name only the data sets of the run's model.teachers "
            f"({names}); it can be repeated with other teachers for these"
        )


def _read_config(run_dir: Path) -> dict[str, Any]:
    """Returns the config tree of a run of `grpo train`. Raises UserError for other runs."""
    file = run_dir / "config.yaml"
    if not file.exists():
        raise UserError(f"{run_dir}: not a run directory (no config.yaml)")
    tree: dict[str, Any] = yaml.safe_load(file.read_text())
    command = stage_for_config(tree).command
    if command != "train":
        raise UserError(
            f"{run_dir}: a run of grpo {command}, which stores no updates; grpo replay needs a run "
            "of grpo train"
        )
    return tree


def _print_comparison(stored: StoredStep, metrics: dict[str, float]) -> None:
    heading = f"step {stored.step}"
    print(f"{heading:20}{'then':>16}{'now':>16}")
    for key in PRINTED_METRICS:
        if key not in metrics:
            continue
        then = f"{stored.metrics[key]:.9g}" if key in stored.metrics else ""
        now = f"{metrics[key]:.9g}"
        mark = "" if then == now else "  differs"
        print(f"{key:20}{then:>16}{now:>16}{mark}")


def _with_overrides(tree: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """Returns the config of the run with overrides.

    An override of `algorithm.preset` discards all `algorithm` keys of the run. An override of
    `algorithm.loss` discards the clipping bounds, whose meaning differs between losses.
    """
    algorithm = dict(tree["algorithm"])
    if any(override.startswith("algorithm.preset=") for override in overrides):
        algorithm = {}
    if any(override.startswith("algorithm.loss=") for override in overrides):
        for key in CLIPPING_KEYS:
            algorithm.pop(key, None)
    return configs.parse(apply_overrides({**tree, "algorithm": algorithm}, overrides))


def _find_step(run_dir: Path, step: int | None) -> StoredStep:
    """Returns a step of the run; by default, the last one that can be repeated.

    Raises:
        UserError: The step, its samples or the checkpoint before it is missing.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        if "update/made" in row:
            rows[row["step"]] = row
    checkpoints: dict[int, Path] = {}
    for checkpoint in sorted((run_dir / "checkpoints").glob("step-*")):
        checkpoints[int(checkpoint.name.partition("-")[2])] = checkpoint
    if not step:
        candidates = [number + 1 for number in (0, *checkpoints)]
        step = max((number for number in candidates if number in rows), default=0)
    if step not in rows:
        raise UserError(f"{run_dir}: no step {step} to replay; the run has {len(rows)} steps")
    if step > 1 and step - 1 not in checkpoints:
        raise UserError(
            f"{run_dir}: step {step} needs the checkpoint of step {step - 1}; the run has "
            f"{sorted(checkpoints)} (checkpoint.every=1 keeps all)"
        )
    return StoredStep(
        run_dir=run_dir,
        step=step,
        metrics=rows[step],
        samples=read_update_samples(run_dir, step),
        checkpoint=checkpoints[step - 1] if step > 1 else None,
    )


def _repeat_updates(
    config: TrainConfig, stored: StoredStep, *, with_new_advantages: bool
) -> dict[str, float]:
    """Returns the metrics of the repeated updates."""
    from grpo.training.updates import Updater

    with tempfile.TemporaryDirectory(prefix="grpo-replay-") as scratch:
        with redirect_output(Path(scratch) / "log"):
            learner = _load_learner(config, stored, Path(scratch))
        updater = Updater(config=config, learner=learner)
        samples = stored.samples
        if config.algorithm.teacher_hint == "none":
            samples = [_without_hint(sample) for sample in samples]
        samples = [_with_teacher_of(sample, config.model.teachers) for sample in samples]
        if with_new_advantages:
            samples = _with_new_advantages(samples, updater)
        report = updater.update(samples, rollout=stored.step - 1)
        metrics = dict(report.metrics)
        metrics["update/made"] = float(report.num_updates)
        metrics["update/skipped"] = float(report.num_skipped)
        return metrics


def _without_hint(sample: Sample) -> Sample:
    """Returns the sample without the prompt of a teacher that has the policy's vocabulary."""
    text = sample.teacher_text
    return sample if text is None or text.spans is not None else replace(sample, teacher_text=None)


def _with_teacher_of(sample: Sample, teachers: Collection[str]) -> Sample:
    """Returns the sample without the name of its teacher if the replay has no such teacher."""
    return sample if sample.teacher in teachers else replace(sample, teacher="")


def _load_learner(config: TrainConfig, stored: StoredStep, scratch: Path) -> Any:
    """Returns the learner in its state before the step."""
    from grpo.learning.learner import Learner

    run_dir = stored.run_dir
    settings = config.model
    model_dir = run_dir / "warm_start" / "final"
    if not model_dir.exists():
        model_dir = models.resolve(settings.path, settings.revision, run_dir / "model", config.seed)
    model_dir = models.extend_context(model_dir, settings.rope, scratch / "extended")
    teachers = _find_teachers(config, model_dir, run_dir)
    _check_same_tokens(stored.samples, teachers)
    references = lora.load_references(
        config, model_dir, teachers.model_dirs, teachers.common_tokens()
    )
    loss = plugins.find_function("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    policy = lora.load_policy(config, model_dir, settings.attention)
    learner = Learner(policy, config, loss, references)
    if stored.checkpoint is not None:
        learner.load(stored.checkpoint)
    return learner


def _find_teachers(config: TrainConfig, model_dir: Path, run_dir: Path) -> Teachers:
    teacher_dirs = models.resolve_teachers(config.model, run_dir, config.seed)
    tokenizer = models.load_tokenizer(model_dir)
    prompts = Prompts(config.prompt, tokenizer, models.eos_token_ids(model_dir))
    vocabularies = find_other_vocabularies(config.prompt, tokenizer, prompts, teacher_dirs)
    return Teachers(teacher_dirs, vocabularies)


def _check_no_aligned_tokens(samples: Sequence[Sample]) -> None:
    """Raises UserError if samples have the prompts of a teacher with another vocabulary."""
    for sample in samples:
        if sample.teacher_text is not None and sample.teacher_text.spans is not None:
            raise UserError(
                "grpo replay: the samples have the prompts of a teacher with another vocabulary; "
                "the step can be repeated only with the run's algorithm.teacher_hint"
            )


def _check_same_tokens(samples: Sequence[Sample], teachers: Teachers) -> None:
    """Raises UserError if samples are not stored in the tokens of their teacher."""
    for sample in samples:
        text = sample.teacher_text
        is_stored = text is not None and text.spans is not None
        if is_stored != (sample.teacher in teachers.vocabularies):
            raise UserError(
                "grpo replay: the stored samples are in the tokens of the run's teachers; the step "
                "can be repeated only with teachers of the same vocabularies"
            )


def _with_new_advantages(samples: list[Sample], updater: Updater) -> list[Sample]:
    """Returns the samples with advantages of the updater's algorithm, from the stored rewards.

    The samples of a group are adjacent in the result.
    """
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    group_sizes = [len(group) for group in groups.values()]
    ordered = list(itertools.chain.from_iterable(groups.values()))
    penalties = updater.kl_penalties(ordered)
    advantages_PG = recipe_advantages(
        updater.config.algorithm,
        unflatten([sample.reward for sample in ordered], group_sizes),
        unflatten([sample.completion_length for sample in ordered], group_sizes),
        None if penalties is None else unflatten(penalties, group_sizes),
    )
    return [
        replace(sample, advantages=values)
        for sample, values in zip(
            ordered, itertools.chain.from_iterable(advantages_PG), strict=True
        )
    ]
