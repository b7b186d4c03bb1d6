"""GMPO: the geometric mean of a sequence's clipped token ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import LossOutput, log_ratio, row_mean
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> LossOutput:
    """Returns -A exp(mean over tokens of the clipped log ratio) on every token of a sequence.

    `clip_low` and `clip_high` bound log r: clipped from above where A > 0, from below where A < 0,
    as PPO does.

    Source: GMPO 2507.20673 Eq. 4 (0.4 there).
    """
    log_ratios = log_ratio(logprobs, batch.old_logprobs)
    low = (log_ratios < -algorithm.clip_low) & (batch.advantages < 0)
    high = (log_ratios > algorithm.clip_high) & (batch.advantages > 0)
    bounds = log_ratios.clamp(-algorithm.clip_low, algorithm.clip_high).detach()
    bounded = torch.where(low | high, bounds, log_ratios)
    ratios = torch.exp(row_mean(bounded, batch.token_mask))
    return LossOutput(
        per_token=-ratios * batch.advantages,
        metrics={"clip/low": low.float(), "clip/high": high.float(), "ratio/mean": ratios},
    )
