"""What every recipe adds to its per-token loss.

This is the correction of the sampler's mismatch, the KL to the reference and an entropy bonus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch

Loss = Callable[[Tensor, Batch, Algorithm], tuple[Tensor, dict[str, Tensor]]]


def objective(
    logprobs: Tensor, entropies: Tensor, batch: Batch, algorithm: Algorithm, loss: Loss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the per-token objective [B, T] to be minimised and what to report of it.

    Every loss is homogeneous in the advantage, so the mismatch's weight goes in there.
    `kl_unbiased`: the KL term times pi / pi_old, whose gradient has the right mean (DeepSeek-V3.2
    2512.02556 Eq. 7).
    """
    old = (logprobs if batch.old_logprobs is None else batch.old_logprobs).detach()
    log_rho = (old - batch.sampler_logprobs) * batch.token_mask
    weights = _terms.mismatch(
        log_rho,
        batch.token_mask,
        algorithm.mismatch,
        algorithm.mismatch_min,
        algorithm.mismatch_max,
    )
    per_token, report = loss(
        logprobs, replace(batch, advantages=batch.advantages * weights), algorithm
    )
    if algorithm.mismatch != "none":
        report |= {"mismatch/weight": weights, "mismatch/dropped": (weights == 0).float()}
    if batch.ref_logprobs is not None:
        kl = _terms.kl(logprobs, batch.ref_logprobs, algorithm.kl_estimator)
        report |= {"kl/ref": kl}
        if algorithm.kl_in == "loss":
            weight = _terms.ratio(logprobs, batch.old_logprobs) if algorithm.kl_unbiased else 1.0
            per_token = per_token + algorithm.kl_coef * weight * kl
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * entropies
    # the gap is in the ratio: what is reported is the policy's own
    if algorithm.old_logprobs == "sampler":
        log_rho = (logprobs.detach() - batch.sampler_logprobs) * batch.token_mask
    rho = log_rho.exp()
    return per_token, report | {
        "policy/entropy": entropies,
        "mismatch/k3": rho - 1 - log_rho,
        "mismatch/abs": log_rho.abs(),
        "_rho": rho,
    }
