"""The objective that an update minimizes, at each token.

It is the recipe's loss, with advantages that may be weighted for the mismatch between learner and
sampler, plus three optional terms: the KL to the reference, the drift from the sampler, and an
entropy bonus. All tensors are [B, T]. The reduction over tokens is not part of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings, MismatchSettings
from grpo.losses import Loss, LossOutput, clamp_log_ratio, ratio, sequence_mean
from grpo.types import Batch, UserError

# Upper limit of k3, as in verl and OpenRLHF. Without it, a token that the policy has made much less
# likely than the reference (d = -10: k3 = 22,000) outweighs all others. A token at the limit (d
# below -2.6 or above 11) has no gradient.
MAX_K3 = 10.0


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
    log_ratios = _sampler_log_ratios(old_logprobs, batch)
    weights = mismatch_weights(log_ratios, batch.token_mask, algorithm.mismatch)
    advantages = batch.advantages * weights
    if algorithm.off_policy_max is not None:
        is_dropped = off_policy_mask(logprobs, batch, algorithm.off_policy_max)
        advantages = advantages.masked_fill(is_dropped, 0.0)
    output = loss(logprobs, replace(batch, advantages=advantages), algorithm)
    if not isinstance(output, LossOutput):
        raise UserError(
            f"algorithm.loss={algorithm.loss}: the loss returned {type(output).__name__}, "
            "expected grpo.losses.LossOutput(per_token=..., metrics=...)"
        )
    per_token = output.per_token
    metrics = dict(output.metrics)
    if not algorithm.mismatch.is_none:
        metrics["mismatch/weight"] = weights
        metrics["mismatch/dropped"] = (weights == 0).float()
    if algorithm.off_policy_max is not None:
        metrics["mismatch/off_policy"] = is_dropped.float()
    if batch.ref_logprobs is not None:
        kl = kl_estimate(logprobs, batch.ref_logprobs, algorithm.kl_estimator)
        metrics["kl/ref"] = kl
        if algorithm.kl_in == "loss":
            per_token = per_token + _kl_coefficient(logprobs, batch, algorithm) * kl
    if algorithm.drift_coef:
        drift = clamp_log_ratio(logprobs - batch.sampler_logprobs).square()
        metrics["kl/drift"] = drift
        per_token = per_token + algorithm.drift_coef * drift
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * entropies
    if algorithm.old_logprobs == "sampler":
        # `batch.old_logprobs` are the sampler's, so their ratio to the sampler is 1. Report the
        # ratio of the current policy instead.
        log_ratios = _sampler_log_ratios(logprobs, batch)
    sampler_ratios = log_ratios.exp()
    metrics["policy/entropy"] = entropies
    metrics["mismatch/k3"] = sampler_ratios - 1 - log_ratios
    metrics["mismatch/abs"] = log_ratios.abs()
    return Objective(per_token=per_token, metrics=metrics, sampler_ratios=sampler_ratios)


def _sampler_log_ratios(logprobs: Tensor, batch: Batch) -> Tensor:
    """Returns log(pi / pi_sampler) [B, T] without a gradient, 0 outside the completions."""
    log_ratios = clamp_log_ratio(logprobs.detach() - batch.sampler_logprobs)
    return log_ratios * batch.token_mask


def off_policy_mask(logprobs: Tensor, batch: Batch, max_divergence: float) -> Tensor:
    """Returns which tokens the off-policy sequence mask drops, [B, T] bool.

    It drops a token with A < 0 if the mean of log(pi_sampler / pi) over its sequence exceeds
    `max_divergence`: a wrong completion that the policy would hardly sample any more.

    Source: DeepSeek-V3.2 2512.02556 Eq. 8, 9. As in the paper and in TRL, the divergence is that
    from the sampler, so that it includes the difference between learner and engine; slime takes the
    learner's own old log-probabilities.
    """
    log_ratios = _sampler_log_ratios(logprobs, batch)
    divergences = -sequence_mean(log_ratios, batch.token_mask)
    return (divergences > max_divergence) & (batch.advantages < 0)


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

    d in k3 is clamped to +-MAX_LOG_RATIO, and k3 to MAX_K3.

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
        clamped = clamp_log_ratio(difference)
        return (torch.exp(-clamped) + clamped - 1).clamp(max=MAX_K3)
    raise ValueError(f"unknown KL estimator {estimator!r}. Available: k1, k2, k3.")


def mismatch_weights(log_ratios: Tensor, mask: Tensor, settings: MismatchSettings) -> Tensor:
    """Returns the factors [B, T] of the advantages that correct for the engine's distribution.

    A factor is the weight, or 0 if the mask drops the token.

    Args:
        log_ratios: log rho [B, T], with rho = pi_old / pi_sampler; 0 outside the completions.
        mask: The completion tokens [B, T], bool.
        settings: The mask and the weight.

    Source: a mask and a weight in one correction are verl's rollout correction (Geo-RS-Token-TIS)
    and OpenRLHF's seq-mask-tis. Dropped tokens stay in the normalizer of the loss, as in OpenRLHF.
    """
    weights = torch.ones_like(log_ratios)
    if settings.weight != "none":
        weights = _ratios(log_ratios, mask, settings.weight)
        if settings.max is not None:
            weights = weights.clamp(max=settings.max)
    if settings.mask != "none":
        assert settings.bounds is not None
        low, high = settings.bounds
        ratios = _ratios(log_ratios, mask, settings.mask)
        weights = weights.where((ratios >= low) & (ratios <= high), 0.0)
    return weights


def _ratios(log_ratios: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Returns rho [B, T]: of the token, of its sequence, or the geometric mean of its sequence."""
    if kind == "token":
        return torch.exp(log_ratios)
    log_means = sequence_mean(log_ratios, mask)
    if kind == "geometric":
        return torch.exp(log_means)
    if kind == "sequence":
        return torch.exp(clamp_log_ratio(log_means * mask.sum(-1, keepdim=True)))
    raise ValueError(f"unknown kind of ratio {kind!r}")
