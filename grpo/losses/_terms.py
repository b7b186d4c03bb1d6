"""Terms that per-token losses are made of.

Shapes [B, T] in and out; reductions happen nowhere here.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {  # of the correction of the sampler's mismatch, where the config gives none
    # truncated importance sampling, "Your efficient RL framework secretly brings you off-policy RL
    # training"
    "tis": (0.0, 2.0),
    "mis_token": (0.0, 3.0),  # TRL's cap
    "mis_sequence": (0.0, 3.0),
    "icepop": (0.5, 5.0),  # Ring-1T 2510.18855
    "mask_sequence": (0.5, 2.0),
}


def log_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns log(pi / pi_old).

    Without old logprobs the policy is its own old policy: the value is 0, the gradient the
    logprob's.
    """
    return logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)


def ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Returns pi / pi_old."""
    return torch.exp(log_ratio(logprobs, old_logprobs))


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each row where the mask is set, on every place of the row."""
    return (
        (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ).expand_as(values)


def clipped(
    ratios: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(-min(r A, clip(r, 1 - low, 1 + high) A), clipped low, clipped high)`.

    The latter are 1.0 where the gradient is cut.
    """
    loss = -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    clipped_low = ((ratios < 1 - low) & (advantages < 0)).float()
    clipped_high = ((ratios > 1 + high) & (advantages > 0)).float()
    return loss, clipped_low, clipped_high


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Returns an estimate of KL(pi || ref) at each token, with d = log pi - log ref.

    The estimators are k1 = d, k2 = d^2 / 2 and k3 = exp(-d) + d - 1.

    Source: Schulman, "Approximating KL divergence"; k3 is DeepSeekMath 2402.03300 Eq. 4. k1 and k3
    have the right mean; k2 the right gradient when the samples are the policy's own.
    """
    d = logprobs - ref_logprobs
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.exp(-d) + d - 1}[
        estimator
    ]()


def mismatch(
    log_rho: Tensor, mask: Tensor, kind: str, low: float | None, high: float | None
) -> Tensor:
    """Returns the weights [B, T] that correct sampling from the engine's distribution.

    They are functions of rho = pi_old / pi_sampler, by `kind`:
    - none: 1.
    - tis: min(rho, high).
    - mis_token and icepop: rho where low <= rho <= high, else 0.
    - mis_sequence: the same of the whole sequence's rho.
    - mask_sequence: 1 where the geometric mean of a sequence's rho is within the bounds, else 0.
    """
    if kind == "none":
        return torch.ones_like(log_rho)
    least, most = (
        given if given is not None else bound
        for given, bound in zip((low, high), BOUNDS[kind], strict=True)
    )
    if kind.endswith("sequence"):
        log_rho = row_mean(log_rho, mask) * (
            mask.sum(-1, keepdim=True) if kind == "mis_sequence" else 1
        )
    rho = torch.exp(log_rho)
    if kind == "tis":
        return rho.clamp(min=least, max=most)
    inside = (rho >= least) & (rho <= most)
    return inside.float() if kind == "mask_sequence" else torch.where(inside, rho, 0.0)
