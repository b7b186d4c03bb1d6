"""Terms that per-token losses are made of. Shapes [B, T] in and out; reductions happen nowhere here."""

from __future__ import annotations

import torch
from torch import Tensor


def ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns pi / pi_old. Without old logprobs the policy is its own old policy: the value is 1, the gradient that of the logprob."""
    return torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))


def clipped(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(-min(r A, clip(r, 1 - low, 1 + high) A), clipped low, clipped high)`; the latter are 1.0 where the gradient is cut."""
    loss = -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    clipped_low = ((ratios < 1 - low) & (advantages < 0)).float()
    clipped_high = ((ratios > 1 + high) & (advantages > 0)).float()
    return loss, clipped_low, clipped_high


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Returns Schulman's unbiased, non-negative estimate of KL(pi || ref): exp(d) - d - 1, d = ref - pi. DeepSeekMath 2402.03300 Eq. 4."""
    difference = ref_logprobs - logprobs
    return torch.exp(difference) - difference - 1
