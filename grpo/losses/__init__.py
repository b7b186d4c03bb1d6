"""The per-token losses, one file each, and the terms that they share.

A file `NAME.py` has `loss(logprobs, batch, algorithm) -> LossOutput`; a config names it as
`algorithm.loss=NAME`. All tensors are [B, T]. No loss reduces over tokens: the reduction is in
`batch.token_weights`. A loss must be homogeneous in the advantage, because the weight that corrects
the sampler's mismatch is multiplied into the advantage (grpo/learning/objective.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss at every token: `LossOutput(per_token=-ratios * advantages, metrics={...})`.

    `per_token` [B, T] is minimised. `metrics` are quantities [B, T] by name; their means over
    completion tokens are reported.
    """

    per_token: Tensor
    metrics: dict[str, Tensor]


Loss = Callable[[Tensor, Batch, Algorithm], LossOutput]


def log_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns log(pi / pi_old) [B, T].

    Without old logprobs the policy is its own old policy: the value is 0, and the gradient is that
    of the logprob.
    """
    if old_logprobs is None:
        return logprobs - logprobs.detach()
    return logprobs - old_logprobs


def ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns pi / pi_old [B, T]."""
    return torch.exp(log_ratio(logprobs, old_logprobs))


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each row where `mask` is set, repeated at every position of the row."""
    sums = (values * mask).sum(-1, keepdim=True)
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    return (sums / counts).expand_as(values)


@dataclass(frozen=True, slots=True)
class Clipped:
    """The clipped objective of PPO; `low` and `high` [B, T] are 1.0 where the gradient is cut."""

    per_token: Tensor
    low: Tensor
    high: Tensor


def clipped(ratios: Tensor, advantages: Tensor, low: float, high: float) -> Clipped:
    """Returns -min(r A, clip(r, 1 - low, 1 + high) A), and where the gradient is cut."""
    bounded = ratios.clamp(1 - low, 1 + high)
    return Clipped(
        per_token=-torch.minimum(ratios * advantages, bounded * advantages),
        low=((ratios < 1 - low) & (advantages < 0)).float(),
        high=((ratios > 1 + high) & (advantages > 0)).float(),
    )
