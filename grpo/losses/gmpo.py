"""GMPO: the geometric mean of a sequence's clipped token ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, log_ratio, row_mean
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -A exp(mean over the sequence of the clipped log r) at every token of a sequence.

    As in PPO, log r is clipped from above where A > 0 and from below where A < 0. The bounds are
    -`algorithm.clip_low` and `algorithm.clip_high`; they bound log r, not r.

    Source: GMPO 2507.20673 Eq. 4, which sets both bounds to 0.4.
    """
    log_ratios = log_ratio(logprobs, batch.old_logprobs)
    clipped_low = (log_ratios < -algorithm.clip_low) & (batch.advantages < 0)
    clipped_high = (log_ratios > algorithm.clip_high) & (batch.advantages > 0)
    bounds = log_ratios.clamp(-algorithm.clip_low, algorithm.clip_high).detach()
    clipped_log_ratios = torch.where(clipped_low | clipped_high, bounds, log_ratios)
    ratios = torch.exp(row_mean(clipped_log_ratios, batch.token_mask))
    return LossOutput(
        per_token=-ratios * batch.advantages,
        metrics={
            "clip/low": clipped_low.float(),
            "clip/high": clipped_high.float(),
            "ratio/mean": ratios,
        },
    )
