"""GSPO: the clipped loss of a sequence's ratio, normalized by its length."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, clipped_loss, log_ratio, sequence_mean
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) at every token of a sequence.

    s is the ratio of the sequence's probabilities to the power of 1 / length. It is computed as
    exp(mean over the sequence of log(pi / pi_old)).

    Source: GSPO 2507.18071 Eq. 5, 7. `algorithm.reduction=sequence` gives the paper's mean over
    sequences, because all tokens of a sequence have the same loss.
    """
    log_ratios = log_ratio(logprobs, batch.old_logprobs)
    ratios = torch.exp(sequence_mean(log_ratios, batch.token_mask))
    clipped = clipped_loss(ratios, batch.advantages, algorithm.clip_low, algorithm.clip_high)
    return LossOutput(
        per_token=clipped.per_token,
        metrics={
            "clip/low": clipped.clipped_low,
            "clip/high": clipped.clipped_high,
            "ratio/mean": ratios,
        },
    )
