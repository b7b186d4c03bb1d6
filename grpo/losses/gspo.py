"""GSPO: the clipped ratio of a whole sequence, to the power of one over its length."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -min(s A, clip(s) A) on every token of a sequence.

    s is exp(mean over the sequence's tokens of log(pi / pi_old)).

    Source: GSPO 2507.18071 Eq. 5, 7; with reduction `sequence` its 1/G sum over sequences.
    """
    ratios = torch.exp(
        _terms.row_mean(_terms.log_ratio(logprobs, batch.old_logprobs), batch.token_mask)
    )
    per_token, low, high = _terms.clipped(
        ratios, batch.advantages, algorithm.clip_low, algorithm.clip_high
    )
    return per_token, {"clip/low": low, "clip/high": high, "ratio/mean": ratios}
