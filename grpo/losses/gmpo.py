"""GMPO: the geometric mean of a sequence's clipped token ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -A exp(mean over tokens of the clipped log ratio) on every token of a sequence.

    `clip_low` and `clip_high` bound log r: clipped from above where A > 0, from below where A < 0,
    as PPO does.
    Source: GMPO 2507.20673 Eq. 4 (0.4 there).
    """
    logs = _terms.log_ratio(logprobs, batch.old_logprobs)
    low, high = (
        (logs < -algorithm.clip_low) & (batch.advantages < 0),
        (logs > algorithm.clip_high) & (batch.advantages > 0),
    )
    bounded = torch.where(
        low | high, logs.clamp(-algorithm.clip_low, algorithm.clip_high).detach(), logs
    )
    ratios = torch.exp(_terms.row_mean(bounded, batch.token_mask))
    return -ratios * batch.advantages, {
        "clip/low": low.float(),
        "clip/high": high.float(),
        "ratio/mean": ratios,
    }
