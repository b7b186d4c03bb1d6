"""The objective that an update minimizes, at each token.

It is the recipe's loss, with advantages that may be weighted for the mismatch between learner and
sampler, plus two optional terms: the KL to the reference and an entropy bonus. All tensors are
[B, T]. The reduction over tokens is not part of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import Loss, LossOutput, ratio, sequence_mean
from grpo.types import Batch, UserError

# Default bounds (min, max) of pi_old / pi_sampler for each kind of mismatch correction.
MISMATCH_BOUNDS = {
    # Truncated importance sampling: "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    # Training".
    "tis": (0.0, 2.0),
    "mis_token": (0.0, 3.0),  # TRL's cap
    "mis_sequence": (0.0, 3.0),
    "icepop": (0.5, 5.0),  # Ring-1T 2510.18855
    "mask_sequence": (0.5, 2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The objective at each token of a micro-batch.

    Attributes:
        per_token: [B, T], to be minimized.
        metrics: Quantities [B, T] by metric name. Their means over completion tokens are reported.
        sampler_ratios: [B, T], pi_old / pi_sampler, without a gradient. With
            `algorithm.old_logprobs=sampler`, where this ratio is 1, pi / pi_sampler.
    """

    per_token: Tensor
    metrics: dict[str, Tensor]
    sampler_ratios: Tensor


def objective(
    logprobs: Tensor, entropies: Tensor, batch: Batch, algorithm: AlgorithmSettings, loss: Loss
) -> Objective:
    """Returns the objective of a micro-batch.

    Args:
        logprobs: The policy's log-probabilities [B, T], with a gradient.
        entropies: The policy's entropies [B, T].
        batch: The micro-batch.
        algorithm: The recipe.
        loss: The recipe's loss.

    Raises:
        UserError: `loss` does not return a LossOutput.
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
            f"algorithm.loss={algorithm.loss}: the loss returned {type(output).__name__}, "
            "expected grpo.losses.LossOutput(per_token=..., metrics=...)"
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
            per_token = per_token + _kl_coefficient(logprobs, batch, algorithm) * kl
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * entropies
    if algorithm.old_logprobs == "sampler":
        # `batch.old_logprobs` are the sampler's, so their ratio to the sampler is 1. Report the
        # ratio of the current policy instead.
        log_ratios = (logprobs.detach() - batch.sampler_logprobs) * batch.token_mask
    sampler_ratios = log_ratios.exp()
    metrics["policy/entropy"] = entropies
    metrics["mismatch/k3"] = sampler_ratios - 1 - log_ratios
    metrics["mismatch/abs"] = log_ratios.abs()
    return Objective(per_token=per_token, metrics=metrics, sampler_ratios=sampler_ratios)


def _kl_coefficient(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> Tensor | float:
    """Returns the factor of the KL term in the loss.

    With `kl_unbiased` it contains pi / pi_old [B, T], so that the expected gradient of the term is
    the gradient of the KL.

    Source: DeepSeek-V3.2 2512.02556 Eq. 7.
    """
    if algorithm.kl_unbiased:
        return algorithm.kl_coef * ratio(logprobs, batch.old_logprobs)
    return algorithm.kl_coef


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Returns an estimate of KL(pi || ref) at each token [B, T], with d = log pi - log ref.

    The estimators are:

    - `k1`: d
    - `k2`: d^2 / 2
    - `k3`: exp(-d) + d - 1

    k1 and k3 are unbiased. k2 is biased, but its gradient is unbiased if the tokens were sampled
    from the current policy.

    Raises:
        ValueError: `estimator` is unknown.

    Source: Schulman, "Approximating KL divergence"; k3 is DeepSeekMath 2402.03300 Eq. 4.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.exp(-difference) + difference - 1
    raise ValueError(f"unknown KL estimator {estimator!r}. Available: k1, k2, k3.")


def mismatch_weights(
    log_ratios: Tensor, mask: Tensor, kind: str, low: float | None, high: float | None
) -> Tensor:
    """Returns weights [B, T] that correct for sampling from the engine's distribution.

    They are functions of rho = pi_old / pi_sampler:

    - `none`: 1
    - `tis`: rho clamped to [low, high]
    - `mis_token`, `icepop`: rho if low <= rho <= high, else 0
    - `mis_sequence`: as `mis_token`, with the product of rho over the sequence
    - `mask_sequence`: 1 if the geometric mean of rho over the sequence is within the bounds, else 0

    Args:
        log_ratios: log rho [B, T], 0 outside the completions.
        mask: The completion tokens [B, T], bool.
        kind: `none` or a key of MISMATCH_BOUNDS.
        low: Lower bound of rho, of its product or of its geometric mean. None: the default.
        high: Upper bound. None: the default.

    Raises:
        KeyError: `kind` is unknown.
    """
    if kind == "none":
        return torch.ones_like(log_ratios)
    default_low, default_high = MISMATCH_BOUNDS[kind]
    if low is None:
        low = default_low
    if high is None:
        high = default_high
    if kind == "mis_sequence":
        # log of the product of rho
        log_ratios = sequence_mean(log_ratios, mask) * mask.sum(-1, keepdim=True)
    elif kind == "mask_sequence":
        log_ratios = sequence_mean(log_ratios, mask)  # log of the geometric mean of rho
    ratios = torch.exp(log_ratios)
    if kind == "tis":
        return ratios.clamp(min=low, max=high)
    is_within_bounds = (ratios >= low) & (ratios <= high)
    if kind == "mask_sequence":
        return is_within_bounds.float()
    return torch.where(is_within_bounds, ratios, 0.0)
