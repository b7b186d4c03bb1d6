"""The measurements of an update: sums over the tokens of a micro-batch, of a rank, of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo.learning.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchReport:
    """Sums over the completion tokens of a micro-batch, as scalars on the learner's device.

    Reading a value synchronizes with the GPU, so `sum_micro_batches` reads all values of an update
    at once.

    Attributes:
        loss: The micro-batch's part of the update's loss.
        metrics: The sum of each metric of the objective.
        ratio_sum: The sum of the ratios to the sampler (`Objective.sampler_ratios`).
        ratio_squared_sum: The sum of their squares.
        max_ratio: Their maximum.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    ratio_sum: Tensor
    ratio_squared_sum: Tensor
    max_ratio: Tensor


def report_micro_batch(loss: Tensor, objective: Objective, mask: Tensor) -> MicroBatchReport:
    """Returns the report of a micro-batch.

    Args:
        loss: The micro-batch's part of the update's loss, [].
        objective: The objective at each token, [B, T].
        mask: The completion tokens, [B, T].
    """
    ratios = objective.sampler_ratios.detach()[mask]
    metrics = {name: value.detach()[mask].sum() for name, value in objective.metrics.items()}
    return MicroBatchReport(
        loss=loss.detach(),
        metrics=metrics,
        ratio_sum=ratios.sum(),
        ratio_squared_sum=ratios.square().sum(),
        max_ratio=ratios.max(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTotals:
    """Sums over the completion tokens of an update, of one rank or of all ranks.

    The fields are those of MicroBatchReport. A rank without tokens has the default values.

    `UpdateTotals(loss=0.1, metrics={"policy/entropy": 82.5}, ratio_sum=40.2,
    ratio_squared_sum=41.0, max_ratio=1.3)`
    """

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    ratio_sum: float = 0.0
    ratio_squared_sum: float = 0.0
    max_ratio: float = 0.0


def sum_micro_batches(reports: Sequence[MicroBatchReport]) -> UpdateTotals:
    """Returns the totals of one rank's micro-batches, read from the device in one transfer."""
    if not reports:
        return UpdateTotals()
    metric_names = list(reports[0].metrics)
    table = torch.stack([_scalars(report, metric_names) for report in reports])
    return sum_totals([_totals(scalars, metric_names) for scalars in table.tolist()])


def _scalars(report: MicroBatchReport, metric_names: Sequence[str]) -> Tensor:
    """Returns all values of a report as one float64 tensor, in the order that `_totals` reads."""
    scalars = [report.loss, report.ratio_sum, report.ratio_squared_sum, report.max_ratio]
    scalars += [report.metrics[name] for name in metric_names]
    return torch.stack([scalar.double() for scalar in scalars])


def _totals(scalars: Sequence[float], metric_names: Sequence[str]) -> UpdateTotals:
    loss, ratio_sum, ratio_squared_sum, max_ratio, *metrics = scalars
    return UpdateTotals(
        loss=loss,
        metrics=dict(zip(metric_names, metrics, strict=True)),
        ratio_sum=ratio_sum,
        ratio_squared_sum=ratio_squared_sum,
        max_ratio=max_ratio,
    )


def sum_totals(parts: Sequence[UpdateTotals]) -> UpdateTotals:
    """Returns the totals of all parts, of which there is at least one."""
    # A part without tokens has no metrics; all others have the same ones.
    metric_names = max((list(part.metrics) for part in parts), key=len)
    metrics = {name: sum(part.metrics.get(name, 0.0) for part in parts) for name in metric_names}
    return UpdateTotals(
        loss=sum(part.loss for part in parts),
        metrics=metrics,
        ratio_sum=sum(part.ratio_sum for part in parts),
        ratio_squared_sum=sum(part.ratio_squared_sum for part in parts),
        max_ratio=max(part.max_ratio for part in parts),
    )
