"""GSPO: the clipped ratio of a whole sequence, to the power of one over its length."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import LossOutput, clipped, log_ratio, row_mean
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> LossOutput:
    """Returns -min(s A, clip(s) A) on every token of a sequence.

    s is exp(mean over the sequence's tokens of log(pi / pi_old)).

    Source: GSPO 2507.18071 Eq. 5, 7; with reduction `sequence` its 1/G sum over sequences.
    """
    log_ratios = log_ratio(logprobs, batch.old_logprobs)
    ratios = torch.exp(row_mean(log_ratios, batch.token_mask))
    clip = clipped(ratios, batch.advantages, algorithm.clip_low, algorithm.clip_high)
    return LossOutput(
        per_token=clip.per_token,
        metrics={"clip/low": clip.low, "clip/high": clip.high, "ratio/mean": ratios},
    )
