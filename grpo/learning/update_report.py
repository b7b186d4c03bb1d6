"""What the micro-batches of an update report, added up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo.learning.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchReport:
    """Sums over a micro-batch's completion tokens, scalars on the device.

    To read a value waits for everything that runs there, so they are read once per update.
    """

    loss: Tensor  # the micro-batch's part of the update's loss
    metrics: dict[str, Tensor]
    ratio_sum: Tensor  # of pi / pi_sampler
    ratio_squared_sum: Tensor
    max_ratio: Tensor


def report_of(loss: Tensor, result: Objective, mask: Tensor) -> MicroBatchReport:
    """Returns the report of a micro-batch.

    Args:
        loss: [], the micro-batch's part of the update's loss.
        result: the objective at every token, [B, T].
        mask: [B, T], the completion tokens.
    """
    ratios = result.sampler_ratios.detach()[mask]
    return MicroBatchReport(
        loss=loss.detach(),
        metrics={name: value.detach()[mask].sum() for name, value in result.metrics.items()},
        ratio_sum=ratios.sum(),
        ratio_squared_sum=ratios.square().sum(),
        max_ratio=ratios.max(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTotals:
    """An update's sums over tokens: of one rank, or of all. A rank without tokens has the default.

    `UpdateTotals(loss=0.1, metrics={"policy/entropy": 82.5}, ratio_sum=40.2)`.
    """

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    ratio_sum: float = 0.0
    ratio_squared_sum: float = 0.0
    max_ratio: float = 0.0


def total_of_micro_batches(reports: Sequence[MicroBatchReport]) -> UpdateTotals:
    """Returns the sums over one rank's micro-batches, read from the device in one transfer."""
    if not reports:
        return UpdateTotals()
    names = list(reports[0].metrics)
    rows = []
    for report in reports:
        scalars = [report.loss, report.ratio_sum, report.ratio_squared_sum, report.max_ratio]
        scalars += [report.metrics[name] for name in names]
        rows.append(torch.stack([scalar.double() for scalar in scalars]))
    columns = torch.stack(rows).T.tolist()
    losses, ratio_sums, ratio_squared_sums, max_ratios, *metrics = columns
    return UpdateTotals(
        loss=sum(losses),
        metrics={name: sum(column) for name, column in zip(names, metrics, strict=True)},
        ratio_sum=sum(ratio_sums),
        ratio_squared_sum=sum(ratio_squared_sums),
        max_ratio=max(max_ratios),
    )


def total_of_ranks(parts: Sequence[UpdateTotals]) -> UpdateTotals:
    """Returns the sums over all ranks; a rank without tokens has no metrics."""
    names = max((part.metrics for part in parts), key=len)
    return UpdateTotals(
        loss=sum(part.loss for part in parts),
        metrics={name: sum(part.metrics.get(name, 0.0) for part in parts) for name in names},
        ratio_sum=sum(part.ratio_sum for part in parts),
        ratio_squared_sum=sum(part.ratio_squared_sum for part in parts),
        max_ratio=max(part.max_ratio for part in parts),
    )
