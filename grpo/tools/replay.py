"""`grpo replay RUN`: makes a step's updates again from what was kept of them.

They have the same bits on a CPU, or follow another recipe.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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


def replay(folder: str, *, step: int | None, overrides: list[str]) -> bool:
    """Prints the metrics of the step's updates then and now; returns whether they are the same.

    `overrides` change the recipe.

    Needs a checkpoint after step - 1, or the first step. Raises UserError.
    """
    path = Path(folder)
    if not (path / "config.yaml").exists():
        raise UserError(f"{path}: no run in it (no config.yaml)")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    config: Config = configs.parse(tree, str(path / "config.yaml"))
    changed = config
    if overrides:
        # it fills what the run's own has said
        recipe = any(override.startswith("algorithm.preset=") for override in overrides)
        # another loss has its own
        bounds = (
            BOUNDS if any(override.startswith("algorithm.loss=") for override in overrides) else ()
        )
        own = (
            {}
            if recipe
            else {key: value for key, value in tree["algorithm"].items() if key not in bounds}
        )
        changed = configs.parse(apply_overrides(tree | {"algorithm": own}, overrides))
    rows = {
        row["step"]: row for row in read_metrics(path / "metrics.jsonl") if "update/made" in row
    }
    have = sorted(
        int(checkpoint.name.partition("-")[2])
        for checkpoint in (path / "checkpoints").glob("step-*")
    )
    step = step or max((one + 1 for one in [0, *have] if one + 1 in rows), default=0)
    if step not in rows:
        raise UserError(f"{path}: no step {step} to replay; it has {len(rows)}")
    if step > 1 and step - 1 not in have:
        raise UserError(
            f"{path}: step {step} needs the checkpoint of step {step - 1}; have {have} "
            "(checkpoint.every=1 keeps them)"
        )
    other = changed.algorithm != config.algorithm or changed.model.teacher != config.model.teacher
    if other and "mask" in (config.algorithm.truncated, changed.algorithm.truncated):
        raise UserError(
            "truncated=mask: what was cut off counts in the means but is not kept; such a step "
            "has no other recipe"
        )
    samples = read_update(path, step)
    checkpoint = path / "checkpoints" / f"step-{step - 1:06d}" if step > 1 else None
    found = _update(changed, path, samples, step, checkpoint, other=other)
    before = rows[step]
    print(describe(changed.algorithm))
    print(f"{'step ' + str(step):20}{'then':>16}{'now':>16}")
    for key in SHOWN:
        if key in found:
            then, now = (f"{row[key]:.9g}" if key in row else "" for row in (before, found))
            print(f"{key:20}{then:>16}{now:>16}{'' if then == now else '  differs'}")
    return all(before.get(key) == found.get(key) for key in ("loss", "policy/grad_norm"))


def _update(
    config: Config,
    path: Path,
    samples: list[Sample],
    step: int,
    checkpoint: Path | None,
    *,
    other: bool,
) -> dict[str, float]:
    from grpo.learning.learner import Learner
    from grpo.training.updates import Updater

    with tempfile.TemporaryDirectory(prefix="grpo-replay-") as scratch:
        log = Path(scratch) / "log"
        with quiet(log):
            start = path / "warm_start" / "final"
            model_dir = (
                start
                if start.exists()
                else models.resolve(
                    config.model.path, config.model.revision, path / "model", config.seed
                )
            )
            model_dir = models.extended(model_dir, config.model.rope, Path(scratch) / "extended")
            wants = config.model.teacher or (config.algorithm.kl_coef and not config.model.lora)
            teacher = (
                models.resolve(config.model.teacher, None, path / "teacher", config.seed)
                if config.model.teacher
                else model_dir
            )
            reference = models.load_model(teacher, config.model.attention) if wants else None
            loss = plugins.find("grpo.losses", config.algorithm.loss, "loss", "algorithm.loss")
            learner = Learner(
                lora.load_policy(config, model_dir, config.model.attention), config, loss, reference
            )
            if checkpoint:
                learner.load(checkpoint)
        updater = Updater(config=config, learner=learner)
        if other:
            samples = _with_advantages(samples, updater)
        report = updater.update(samples, rollout=step - 1)
        metrics = dict(report.metrics)
        metrics["update/made"] = float(report.num_made)
        metrics["update/skipped"] = float(report.num_skipped)
        return metrics


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
        for sample, value in zip(ordered, [v for group in values for v in group], strict=True)
    ]
