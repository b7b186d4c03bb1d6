"""GRPO's per-token loss: the clipped ratio of PPO with a group-relative advantage, plus k3 KL to a reference model."""

from __future__ import annotations

from torch import Tensor

from grpo.config import Algorithm
from grpo.losses import _terms
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the per-token loss [B, T] and per-token quantities to report as means over completion tokens.

    Source: DeepSeekMath 2402.03300 Eq. 3 (sign turned: it is minimised). The reduction 1/G sum 1/|o_i| is in `batch.token_weights`.
    """
    ratios = _terms.ratio(logprobs, batch.old_logprobs)
    per_token, low, high = _terms.clipped(ratios, batch.advantages, algorithm.clip_low, algorithm.clip_high)
    report = {"clip/low": low, "clip/high": high, "ratio/mean": ratios}
    if batch.ref_logprobs is not None:
        kl = _terms.k3(logprobs, batch.ref_logprobs)
        per_token = per_token + algorithm.kl_coef * kl
        report["kl/ref"] = kl
    return per_token, report
