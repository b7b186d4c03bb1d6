"""DPPO with a trust region of the KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput
from grpo.losses.dppo import sampler_logprobs, trust_region_loss
from grpo.types import Batch

# Lower bound of the probability of all other tokens, whose logarithm is taken. verl and SkyRL add
# the same number.
MIN_REMAINING = 1e-8


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -sg(min(r, ratio_max)) A log pi, and 0 for tokens outside of the trust region.

    A token is outside if its binary KL exceeds `clip_high` where A > 0 and r > 1, or `clip_low`
    where A < 0 and r < 1.

    Source: DPPO 2602.04879 Eq. 12, 14 (Binary-KL). See grpo/losses/dppo.py for the differences.
    """
    policy = logprobs.detach()
    sampler = sampler_logprobs(logprobs, batch)
    divergences = binary_kl(sampler, policy)
    return trust_region_loss(
        logprobs,
        batch,
        algorithm,
        is_too_low=(divergences > algorithm.clip_low) & (policy < sampler),
        is_too_high=(divergences > algorithm.clip_high) & (policy > sampler),
    )


def binary_kl(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Returns p log(p / q) + (1 - p) log((1 - p) / (1 - q)) for each token, [B, T].

    This is the KL divergence of two distributions that know only the token and all others. It is
    at most the divergence over the vocabulary.

    Args:
        logprobs: [B, T], log p.
        other_logprobs: [B, T], log q.
    """
    remaining = -torch.expm1(logprobs)  # 1 - p, without the rounding error near p = 1
    other_remaining = -torch.expm1(other_logprobs)
    log_remaining_ratio = torch.log(
        remaining.clamp(min=MIN_REMAINING) / other_remaining.clamp(min=MIN_REMAINING)
    )
    return logprobs.exp() * (logprobs - other_logprobs) + remaining * log_remaining_ratio
