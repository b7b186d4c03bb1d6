"""DPPO: REINFORCE within a trust region of probabilities, instead of a clipped ratio."""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -sg(min(r, ratio_max)) A log pi, and 0 for tokens outside of the trust region.

    A token is outside if its probability has moved too far in the direction of its advantage:
    pi - pi_sampler > `clip_high` where A > 0, or pi - pi_sampler < -`clip_low` where A < 0.

    Source: DPPO 2602.04879 Eq. 12, 13 (Binary-TV). The gradient flows through log pi only, as in
    the authors' code and in verl; SkyRL and prime-rl differentiate r and have no `ratio_max`.
    """
    change = logprobs.detach().exp() - sampler_logprobs(logprobs, batch).exp()
    return trust_region_loss(
        logprobs,
        batch,
        algorithm,
        is_too_low=change < -algorithm.clip_low,
        is_too_high=change > algorithm.clip_high,
    )


def sampler_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:
    """Returns log pi_sampler [B, T]: the old log-probabilities (`old_logprobs=sampler`)."""
    return logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs


def trust_region_loss(
    logprobs: Tensor,
    batch: Batch,
    algorithm: AlgorithmSettings,
    *,
    is_too_low: Tensor,
    is_too_high: Tensor,
) -> LossOutput:
    """Returns -sg(min(r, ratio_max)) A log pi, 0 for dropped tokens.

    Args:
        logprobs: [B, T], of the policy, with a gradient.
        batch: the micro-batch.
        algorithm: the recipe.
        is_too_low: [B, T], bool: drop the token if A < 0.
        is_too_high: [B, T], bool: drop the token if A > 0.
    """
    dropped_low = is_too_low & (batch.advantages < 0)
    dropped_high = is_too_high & (batch.advantages > 0)
    ratios = ratio(logprobs, batch.old_logprobs).detach()
    weights = ratios.clamp(max=algorithm.ratio_max)
    weights = weights.masked_fill(dropped_low | dropped_high, 0.0)
    return LossOutput(
        per_token=-weights * batch.advantages * logprobs,
        metrics={
            "clip/low": dropped_low.float(),
            "clip/high": dropped_high.float(),
            "ratio/mean": ratios,
        },
    )
