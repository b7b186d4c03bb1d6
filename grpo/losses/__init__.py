"""The losses, one file each, and the terms that they share.

A file `NAME.py` defines `loss(logprobs, batch, algorithm) -> LossOutput`, and a config selects it
with `algorithm.loss=NAME`.

- All tensors are [B, T]: B sequences, T positions. Position t predicts `batch.labels[:, t]`.
- A loss does not reduce over tokens. The reduction is in `batch.token_weights`: the learner
  minimizes `(batch.token_weights * per_token).sum()`.
- A loss must be homogeneous in the advantage: for c >= 0, advantages c A give c times the loss.
  grpo/learning/objective.py multiplies the advantages by weights that correct the mismatch with the
  sampler.

Symbols in docstrings: r the ratio pi / pi_old of a token, A its advantage, sg stop-gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The loss of each token, for example `LossOutput(per_token=-ratios * advantages, metrics={})`.

    Attributes:
        per_token: [B, T], minimized. Values outside the completions are ignored.
        metrics: tensors [B, T] by metric name, for example `{"ratio/mean": ratios}`. Their means
            over the completion tokens are reported.
    """

    per_token: Tensor
    metrics: dict[str, Tensor]


Loss = Callable[[Tensor, Batch, AlgorithmSettings], LossOutput]

# Log-ratios are clamped to this distance from 0, so that their exponentials stay finite (exp(20) =
# 5e8). The gradient beyond is 0. verl and OpenRLHF have the same limit.
MAX_LOG_RATIO = 20.0


def clamp_log_ratio(log_ratios: Tensor) -> Tensor:
    """Returns the log-ratios, clamped to [-MAX_LOG_RATIO, MAX_LOG_RATIO]."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def log_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns log(pi / pi_old) of each token, [B, T], clamped to +-MAX_LOG_RATIO.

    Args:
        logprobs: [B, T], of the policy, with a gradient.
        old_logprobs: [B, T]; `None` if the policy itself is the old policy. The result is then 0,
            with the gradient of `logprobs`.
    """
    if old_logprobs is None:
        return logprobs - logprobs.detach()
    return clamp_log_ratio(logprobs - old_logprobs)


def ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns pi / pi_old of each token, [B, T]. The arguments are those of `log_ratio`."""
    return torch.exp(log_ratio(logprobs, old_logprobs))


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each sequence over its masked positions, repeated at all T positions.

    Args:
        values: [B, T].
        mask: [B, T] bool, the positions that count.
    """
    sums = (values * mask).sum(-1, keepdim=True)  # [B, 1]
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    return (sums / counts).expand_as(values)


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """PPO's clipped loss, and the tokens whose gradient is clipped away.

    Attributes:
        per_token: [B, T].
        clipped_low: [B, T], 1.0 where the ratio is below its lower bound and A < 0, otherwise 0.0.
        clipped_high: [B, T], 1.0 where the ratio is above its upper bound and A > 0, otherwise 0.0.
    """

    per_token: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def clipped_loss(
    ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> ClippedLoss:
    """Returns -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    Args:
        ratios: [B, T], r.
        advantages: [B, T], A.
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.

    Source: PPO 1707.06347 Eq. 7, with the sign of a loss and two bounds (DAPO 2503.14476 Eq. 10).
    """
    bounded = ratios.clamp(1 - clip_low, 1 + clip_high)
    return ClippedLoss(
        per_token=-torch.minimum(ratios * advantages, bounded * advantages),
        clipped_low=((ratios < 1 - clip_low) & (advantages < 0)).float(),
        clipped_high=((ratios > 1 + clip_high) & (advantages > 0)).float(),
    )
