"""`grpo replay RUN`: makes a step's updates again from what was kept of them.

They have the same bits on a CPU, or follow another recipe.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from grpo import config as configs
from grpo.config import Config
from grpo.config.presets import BOUNDS, describe
from grpo.config.reading import apply_overrides
from grpo.experience import plugins
from grpo.learning import lora, models
from grpo.learning.advantages import advantages, unflatten
from grpo.run.directory import read_metrics, read_update
from grpo.run.display import quiet
from grpo.stages.registry import stage_of
from grpo.types import Sample, UserError

if TYPE_CHECKING:
    from grpo.training.updates import Updater

SHOWN = (
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
class Kept:
    """What a run has kept of a step's updates."""

    run_dir: Path
    step: int
    metrics: dict[str, Any]  # as they were
    samples: list[Sample]
    checkpoint: Path | None  # from before the updates; None: they were the first


def replay(folder: str, *, step: int | None, overrides: list[str]) -> bool:
    """Prints the metrics of the step's updates then and now; returns whether they are the same.

    `overrides` change the recipe.

    Needs a checkpoint after step - 1, or the first step. Raises UserError.
    """
    run_dir = Path(folder)
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir}: no run in it (no config.yaml)")
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    stage = stage_of(tree)
    if stage.command != "train":
        raise UserError(
            f"{run_dir}: a run of grpo {stage.command}, which keeps no updates: grpo replay takes "
            "a run of grpo train"
        )
    config: Config = configs.parse(tree, str(run_dir / "config.yaml"))
    changed = _with_overrides(tree, overrides) if overrides else config
    kept = _find_step(run_dir, step)
    is_other_recipe = (
        changed.algorithm != config.algorithm or changed.model.teacher != config.model.teacher
    )
    if is_other_recipe and "mask" in (config.algorithm.truncated, changed.algorithm.truncated):
        raise UserError(
            "truncated=mask: what was cut off counts in the means but is not kept; such a step "
            "has no other recipe"
        )
    metrics = _update(changed, kept, with_new_advantages=is_other_recipe)
    print(describe(changed.algorithm))
    print(f"{f'step {kept.step}':20}{'then':>16}{'now':>16}")
    for key in SHOWN:
        if key in metrics:
            then = f"{kept.metrics[key]:.9g}" if key in kept.metrics else ""
            now = f"{metrics[key]:.9g}"
            print(f"{key:20}{then:>16}{now:>16}{'' if then == now else '  differs'}")
    return all(kept.metrics.get(key) == metrics.get(key) for key in ("loss", "policy/grad_norm"))


def _with_overrides(tree: dict[str, Any], overrides: list[str]) -> Config:
    """Returns the run's config with another recipe.

    A preset replaces the whole recipe of the run. Another loss has clipping bounds of its own.
    """
    algorithm = dict(tree["algorithm"])
    if any(override.startswith("algorithm.preset=") for override in overrides):
        algorithm = {}
    if any(override.startswith("algorithm.loss=") for override in overrides):
        for key in BOUNDS:
            algorithm.pop(key, None)
    return configs.parse(apply_overrides({**tree, "algorithm": algorithm}, overrides))


def _find_step(run_dir: Path, step: int | None) -> Kept:
    """Returns what was kept of a step, by default of the last one that can be replayed.

    Raises UserError if the step, its samples or the checkpoint before it is missing.
    """
    rows = {
        row["step"]: row for row in read_metrics(run_dir / "metrics.jsonl") if "update/made" in row
    }
    checkpoints = {
        int(checkpoint.name.partition("-")[2]): checkpoint
        for checkpoint in sorted((run_dir / "checkpoints").glob("step-*"))
    }
    if not step:
        candidates = [number + 1 for number in (0, *checkpoints)]
        step = max((number for number in candidates if number in rows), default=0)
    if step not in rows:
        raise UserError(f"{run_dir}: no step {step} to replay; it has {len(rows)}")
    if step > 1 and step - 1 not in checkpoints:
        raise UserError(
            f"{run_dir}: step {step} needs the checkpoint of step {step - 1}; have "
            f"{sorted(checkpoints)} (checkpoint.every=1 keeps them)"
        )
    return Kept(
        run_dir=run_dir,
        step=step,
        metrics=rows[step],
        samples=read_update(run_dir, step),
        checkpoint=checkpoints[step - 1] if step > 1 else None,
    )


def _update(config: Config, kept: Kept, *, with_new_advantages: bool) -> dict[str, float]:
    """Returns the metrics of the step's updates, made again."""
    from grpo.training.updates import Updater

    with tempfile.TemporaryDirectory(prefix="grpo-replay-") as scratch:
        with quiet(Path(scratch) / "log"):
            learner = _load_learner(config, kept, Path(scratch))
        updater = Updater(config=config, learner=learner)
        samples = kept.samples
        if with_new_advantages:
            samples = _with_advantages(samples, updater)
        report = updater.update(samples, rollout=kept.step - 1)
        metrics = dict(report.metrics)
        metrics["update/made"] = float(report.num_made)
        metrics["update/skipped"] = float(report.num_skipped)
        return metrics


def _load_learner(config: Config, kept: Kept, scratch: Path) -> Any:
    """Returns the run's learner as it was before the step."""
    from grpo.learning.learner import Learner

    run_dir, source = kept.run_dir, config.model
    model_dir = run_dir / "warm_start" / "final"
    if not model_dir.exists():
        model_dir = models.resolve(source.path, source.revision, run_dir / "model", config.seed)
    model_dir = models.extended(model_dir, source.rope, scratch / "extended")
    teacher_dir = None
    if source.teacher:
        teacher_dir = models.resolve(source.teacher, None, run_dir / "teacher", config.seed)
    reference = lora.load_reference(config, model_dir, teacher_dir)
    loss = plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
    policy = lora.load_policy(config, model_dir, source.attention)
    learner = Learner(policy, config, loss, reference)
    if kept.checkpoint is not None:
        learner.load(kept.checkpoint)
    return learner


def _with_advantages(samples: list[Sample], updater: Updater) -> list[Sample]:
    """Returns the samples with the advantages of another recipe, from the same rewards."""
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    sizes = [len(group) for group in groups.values()]
    ordered = [sample for group in groups.values() for sample in group]
    penalties = updater.kl_penalties(ordered)
    values = advantages(
        unflatten([sample.reward for sample in ordered], sizes),
        unflatten([sample.completion_length for sample in ordered], sizes),
        updater.config.algorithm.advantage,
        None if penalties is None else unflatten(penalties, sizes),
    )
    return [
        replace(sample, advantages=value)
        for sample, value in zip(ordered, itertools.chain.from_iterable(values), strict=True)
    ]
