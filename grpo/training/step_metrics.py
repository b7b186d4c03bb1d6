"""Computes the row of metrics of one training step from the reports of its parts.

The functions have no side effects. docs/metrics.md describes the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import TrainConfig
from grpo.engines import SyncReport
from grpo.experience.group_metrics import advantage_histogram, group_metrics, mean, staleness
from grpo.experience.selection import pass_rate
from grpo.metrics import roofline
from grpo.rewards import language
from grpo.run import ranks
from grpo.run.display import Timer
from grpo.training.rollouts import RolloutGroups
from grpo.training.updates import UpdateReport
from grpo.training.weight_sync import ProbeReport
from grpo.types import Sample, ScoredGroup

NUM_LANGUAGE_COMPLETIONS = 32  # completions per rollout in `completion/language`


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The results of one training step.

    `sync`, `probe` and `evaluation` are None if they were not reached or failed.

    Attributes:
        rollout: Number of completed rollouts, including this one.
        updates: Number of optimizer updates so far, including those of this step.
        groups: The groups of the rollout.
        samples: The samples of the updates.
        kl_penalty: Mean KL per token that was subtracted from the rewards, before its coefficient;
            None if the recipe has no penalty.
        update: The updates of the step.
        sync: The weight sync.
        probe: The comparison of engine and learner after the sync.
        evaluation: The metrics of the evaluation; None if none was due.
        merged_share: With LoRA, the share of the adapters' change in the weights that were sent.
    """

    rollout: int
    updates: int
    groups: RolloutGroups
    samples: list[Sample]
    kl_penalty: float | None
    update: UpdateReport
    sync: SyncReport | None = None
    probe: ProbeReport | None = None
    evaluation: Mapping[str, float] | None = None
    merged_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """The limits of the machine, and the state of the engine.

    Attributes:
        limits: The measured rates of the machine and the shape of the model.
        engine_counts: Events since the start of the run: `{"lost": 0, "restarted": 0, ...}`.
        engine_idle_s: Asynchronous rollouts: seconds of the step that the engine was idle.
    """

    limits: roofline.Roofline
    engine_counts: Mapping[str, int]
    engine_idle_s: float | None = None


def step_row(
    report: StepReport, machine: MachineReport, config: TrainConfig, timer: Timer
) -> dict[str, Any]:
    """Returns the metrics of a step by name."""
    row: dict[str, Any] = {"step": report.rollout, "rollout": report.rollout}
    row.update(_rollout_metrics(report, config))
    row.update(_update_metrics(report))
    row.update(_sync_metrics(report))
    row.update(report.evaluation or {})
    row.update(timer.metrics())
    row.update(_time_bounds(report, machine, config))
    row.update(_utilization(row, machine, timer))
    return row


def start_row(
    rollout: int, updates: int, machine: roofline.Machine, probe: ProbeReport
) -> dict[str, Any]:
    """Returns the metrics at the start of a run, before its first step."""
    return {
        "step": rollout,
        "rollout": rollout,
        "update": updates,
        "machine/gflops": machine.flops / 1e9,
        "machine/gb_per_s": machine.bandwidth / 1e9,
        **probe.metrics(),
    }


def _rollout_metrics(report: StepReport, config: TrainConfig) -> dict[str, Any]:
    groups = report.groups
    metrics = group_metrics(groups.sampled)
    metrics["completion/language"] = _language_share(groups.sampled)
    for name, count in groups.verifier_counts.items():
        metrics[f"verifier/{name}"] = count
    metrics["group/sampled"] = float(len(groups.sampled))
    metrics["group/used"] = float(len(groups.used))
    metrics["group/carried"] = float(groups.num_carried)
    if config.algorithm.has_pass_rate_filter:
        max_reward = config.algorithm.max_reward
        pass_rates = [pass_rate(scored, max_reward) for scored in groups.sampled]
        metrics["group/rate_unknown"] = mean([float(rate is None) for rate in pass_rates])
    if config.train.max_staleness:
        # The learner's weights had version `rollout` before this step's updates.
        metrics.update(staleness(groups.used or groups.sampled, report.rollout))
        metrics.update(groups.queue_depths)
    return metrics


def _language_share(groups: list[ScoredGroup]) -> float:
    """Returns the mean share of letters in the question's language.

    It is over the first completion of each of the first NUM_LANGUAGE_COMPLETIONS groups.
    """
    shares = []
    for scored in groups[:NUM_LANGUAGE_COMPLETIONS]:
        expected = language.detect_language(scored.group.problem.question)
        shares.append(language.share_in_language(scored.group.completions[0].text, expected))
    return mean(shares)


def _update_metrics(report: StepReport) -> dict[str, Any]:
    metrics: dict[str, Any] = {"histogram/advantage": advantage_histogram(report.samples)}
    if report.kl_penalty is not None:
        metrics["kl/ref"] = report.kl_penalty
    metrics.update(report.update.metrics)
    metrics["update/made"] = float(report.update.num_updates)
    metrics["update/skipped"] = float(report.update.num_skipped)
    metrics["update"] = report.updates
    return metrics


def _sync_metrics(report: StepReport) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if report.sync is not None:
        metrics["sync/seconds"] = report.sync.seconds
        metrics["sync/bytes"] = report.sync.num_bytes
    if report.merged_share is not None:
        metrics["lora/merged"] = report.merged_share
    if report.probe is not None:
        metrics.update(report.probe.metrics())
    return metrics


def _time_bounds(
    report: StepReport, machine: MachineReport, config: TrainConfig
) -> dict[str, float]:
    """Returns the shortest possible time of each phase of the step on this machine."""
    seconds = machine.limits.bounds(
        [scored.group for scored in report.groups.sampled],
        updates=report.update.num_updates,
        reference=config.algorithm.kl_coef > 0,
        ranks=ranks.world_size(),
    )
    bounds = {f"bound/{phase}_s": value for phase, value in seconds.items()}
    bounds["bound/total_s"] = sum(seconds.values())
    return bounds


def _utilization(row: Mapping[str, Any], machine: MachineReport, timer: Timer) -> dict[str, float]:
    """Returns the sampling rate, the idle shares of engine and learner, and the engine's events."""
    total_s = row["time/total_s"]
    if machine.engine_idle_s is not None:
        engine_idle = min(1.0, machine.engine_idle_s / total_s)
    else:
        engine_idle = 1 - timer.seconds["rollout"] / total_s
    metrics = {
        "rollout/tokens_per_s": row["completion/tokens"] / row["time/rollout_s"],
        "idle/engine": engine_idle,
        "idle/learner": 1 - timer.seconds["update"] / total_s,
    }
    for name, count in machine.engine_counts.items():
        metrics[f"engine/{name}"] = float(count)
    return metrics
