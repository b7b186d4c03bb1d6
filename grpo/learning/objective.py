"""What an update minimises at each token: a loss, and what every recipe may add to it.

Added are the correction of the sampler's mismatch, the KL to the reference, and an entropy bonus.
All tensors are [B, T]; nothing here reduces over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import Loss, LossOutput, ratio, row_mean
from grpo.types import Batch, UserError

# The default bounds (min, max) of pi_old / pi_sampler by the kind of correction.
MISMATCH_BOUNDS = {
    # truncated importance sampling, "Your efficient RL framework secretly brings you off-policy RL
    # training"
    "tis": (0.0, 2.0),
    "mis_token": (0.0, 3.0),  # TRL's cap
    "mis_sequence": (0.0, 3.0),
    "icepop": (0.5, 5.0),  # Ring-1T 2510.18855
    "mask_sequence": (0.5, 2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The objective at every token.

    `per_token` [B, T] is minimised. `metrics` are quantities [B, T] whose means over completion
    tokens are reported. `sampler_ratios` [B, T] are pi / pi_sampler, without a gradient.
    """

    per_token: Tensor
    metrics: dict[str, Tensor]
    sampler_ratios: Tensor


def objective(
    logprobs: Tensor, entropies: Tensor, batch: Batch, algorithm: Algorithm, loss: Loss
) -> Objective:
    """Returns the objective of a micro-batch.

    With `kl_unbiased` the KL term is multiplied by pi / pi_old, whose gradient has the right mean.

    Args:
        logprobs: [B, T], of the policy, with a gradient.
        entropies: [B, T], of the policy.
        batch: the micro-batch.
        algorithm: the recipe.
        loss: the recipe's loss.

    Source: the unbiased KL is DeepSeek-V3.2 2512.02556 Eq. 7.
    """
    old_logprobs = logprobs if batch.old_logprobs is None else batch.old_logprobs
    log_ratios = (old_logprobs.detach() - batch.sampler_logprobs) * batch.token_mask
    weights = mismatch_weights(
        log_ratios,
        batch.token_mask,
        algorithm.mismatch,
        algorithm.mismatch_min,
        algorithm.mismatch_max,
    )
    output = loss(logprobs, replace(batch, advantages=batch.advantages * weights), algorithm)
    if not isinstance(output, LossOutput):
        raise UserError(
            f"algorithm.loss={algorithm.loss}: it returned {type(output).__name__}, expected "
            "LossOutput(per_token=..., metrics=...) of grpo.losses"
        )
    per_token = output.per_token
    metrics = dict(output.metrics)
    if algorithm.mismatch != "none":
        metrics["mismatch/weight"] = weights
        metrics["mismatch/dropped"] = (weights == 0).float()
    if batch.ref_logprobs is not None:
        kl = kl_estimate(logprobs, batch.ref_logprobs, algorithm.kl_estimator)
        metrics["kl/ref"] = kl
        if algorithm.kl_in == "loss":
            coefficient: Tensor | float = algorithm.kl_coef
            if algorithm.kl_unbiased:
                coefficient = algorithm.kl_coef * ratio(logprobs, batch.old_logprobs)
            per_token = per_token + coefficient * kl
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * entropies
    if algorithm.old_logprobs == "sampler":
        # old_logprobs are the sampler's here, so their ratio is 1: report the policy's own
        log_ratios = (logprobs.detach() - batch.sampler_logprobs) * batch.token_mask
    sampler_ratios = log_ratios.exp()
    metrics["policy/entropy"] = entropies
    metrics["mismatch/k3"] = sampler_ratios - 1 - log_ratios
    metrics["mismatch/abs"] = log_ratios.abs()
    return Objective(per_token=per_token, metrics=metrics, sampler_ratios=sampler_ratios)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Returns an estimate of KL(pi || ref) at each token, with d = log pi - log ref.

    The estimators are k1 = d, k2 = d^2 / 2 and k3 = exp(-d) + d - 1.

    Source: Schulman, "Approximating KL divergence"; k3 is DeepSeekMath 2402.03300 Eq. 4. k1 and k3
    have the right mean; k2 has the right gradient when the samples are the policy's own.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.exp(-difference) + difference - 1
    raise ValueError(f"unknown KL estimator {estimator!r}")


def mismatch_weights(
    log_ratios: Tensor, mask: Tensor, kind: str, low: float | None, high: float | None
) -> Tensor:
    """Returns the weights [B, T] that correct sampling from the engine's distribution.

    They are functions of rho = pi_old / pi_sampler, by `kind`:
    - none: 1.
    - tis: min(rho, high).
    - mis_token and icepop: rho where low <= rho <= high, else 0.
    - mis_sequence: the same of the whole sequence's rho.
    - mask_sequence: 1 where the geometric mean of a sequence's rho is within the bounds, else 0.

    Args:
        log_ratios: [B, T], log rho, 0 outside the completions.
        mask: [B, T], the completion tokens.
        kind: the correction.
        low: the lower bound of rho; default: MISMATCH_BOUNDS.
        high: the upper bound of rho; default: MISMATCH_BOUNDS.
    """
    if kind == "none":
        return torch.ones_like(log_ratios)
    default_low, default_high = MISMATCH_BOUNDS[kind]
    low = default_low if low is None else low
    high = default_high if high is None else high
    if kind == "mis_sequence":
        log_ratios = row_mean(log_ratios, mask) * mask.sum(-1, keepdim=True)
    elif kind == "mask_sequence":
        log_ratios = row_mean(log_ratios, mask)
    ratios = torch.exp(log_ratios)
    if kind == "tis":
        return ratios.clamp(min=low, max=high)
    inside = (ratios >= low) & (ratios <= high)
    if kind == "mask_sequence":
        return inside.float()
    return torch.where(inside, ratios, 0.0)
