"""The row of metrics of one step, made from what the step's parts report.

Names of metrics are `noun/quantity` (docs/watching.md). Nothing here has an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import Config
from grpo.engines import SyncReport
from grpo.experience.describing import advantage_histogram, describe, mean, staleness
from grpo.metrics import roofline
from grpo.run import ranks
from grpo.run.display import Timer
from grpo.training.rollouts import RolloutGroups
from grpo.training.updates import UpdateReport
from grpo.training.weight_sync import ProbeReport
from grpo.types import Sample, ScoredGroup
from rewards import language

LANGUAGE_COMPLETIONS = 32  # completions of a rollout whose language is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did. What comes after the updates is None if it failed."""

    rollout: int  # rollouts done, with this one
    updates: int  # optimizer updates done, with this step's
    groups: RolloutGroups
    samples: list[Sample]
    kl_penalty: float | None  # mean KL per token that was charged in the rewards
    update: UpdateReport
    sync: SyncReport | None = None
    probe: ProbeReport | None = None
    evaluation: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """What the machine can do, what happened to the engine, and for how long it was idle."""

    machine: roofline.Machine
    shape: roofline.Shape
    engine_counts: Mapping[str, int]  # servers lost, restarted, requests retried
    engine_idle_s: float | None = None  # asynchronous rollouts: seconds without work


def step_row(
    report: StepReport, machine: MachineReport, config: Config, timer: Timer
) -> dict[str, Any]:
    """Returns the metrics of a step by name."""
    row: dict[str, Any] = {"step": report.rollout, "rollout": report.rollout}
    row.update(describe(report.groups.sampled))
    row["completion/language"] = _language_share(report.groups.sampled)
    for name, count in report.groups.verifier_counts.items():
        row[f"verifier/{name}"] = count
    row["group/sampled"] = float(len(report.groups.sampled))
    row["group/used"] = float(len(report.groups.used))
    row["group/carried"] = float(report.groups.num_carried)
    if config.train.max_staleness:
        learned_from = report.groups.used or report.groups.sampled
        row.update(staleness(learned_from, report.rollout))
        row.update(report.groups.queue)
    row["histogram/advantage"] = advantage_histogram(report.samples)
    if report.kl_penalty is not None:
        row["kl/ref"] = report.kl_penalty
    row.update(report.update.metrics)
    row["update/made"] = float(report.update.num_made)
    row["update/skipped"] = float(report.update.num_skipped)
    row["update"] = report.updates
    if report.sync is not None:
        row["sync/seconds"] = report.sync.seconds
        row["sync/bytes"] = report.sync.num_bytes
    if report.probe is not None:
        row.update(report.probe.metrics())
    row.update(report.evaluation or {})
    row.update(timer.metrics())
    row.update(_bounds(report, machine, config))
    row["rollout/tokens_per_s"] = row["completion/tokens"] / row["time/rollout_s"]
    row["idle/engine"] = 1 - timer.seconds["rollout"] / row["time/total_s"]
    row["idle/learner"] = 1 - timer.seconds["update"] / row["time/total_s"]
    for name, count in machine.engine_counts.items():
        row[f"engine/{name}"] = float(count)
    if machine.engine_idle_s is not None:
        row["idle/engine"] = min(1.0, machine.engine_idle_s / row["time/total_s"])
    return row


def start_row(
    rollout: int, updates: int, machine: roofline.Machine, probe: ProbeReport
) -> dict[str, Any]:
    """Returns the metrics of a run's start, before its first step."""
    return {
        "step": rollout,
        "rollout": rollout,
        "update": updates,
        "machine/gflops": machine.flops / 1e9,
        "machine/gb_per_s": machine.bandwidth / 1e9,
        **probe.metrics(),
    }


def _language_share(groups: list[ScoredGroup]) -> float:
    """Returns the mean share of the first completions' text in their question's language."""
    shares = []
    for scored in groups[:LANGUAGE_COMPLETIONS]:
        expected = language.of(scored.group.problem.question)
        shares.append(language.share(scored.group.completions[0].text, expected))
    return mean(shares)


def _bounds(report: StepReport, machine: MachineReport, config: Config) -> dict[str, float]:
    """Returns the least seconds that the step's phases take on this machine."""
    limits = roofline.Roofline(machine=machine.machine, shape=machine.shape)
    seconds = limits.bounds(
        [scored.group for scored in report.groups.sampled],
        updates=report.update.num_made,
        reference=config.algorithm.kl_coef > 0,
        ranks=ranks.world_size(),
    )
    bounds = {f"bound/{phase}_s": value for phase, value in seconds.items()}
    bounds["bound/total_s"] = sum(seconds.values())
    return bounds
