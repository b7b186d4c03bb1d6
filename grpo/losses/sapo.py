"""SAPO: a smooth gate of the ratio instead of clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, ratio
from grpo.types import Batch

# The paper's temperatures tau for A > 0 and for A <= 0.
TEMPERATURE_POSITIVE = 1.0
TEMPERATURE_NEGATIVE = 1.05


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -(4 / tau) sigmoid(tau (r - 1)) A. tau depends on the sign of A.

    Source: SAPO 2511.20347 Eq. 5, 6.
    """
    ratios = ratio(logprobs, batch.old_logprobs)
    tau = torch.full_like(ratios, TEMPERATURE_NEGATIVE)
    tau = tau.masked_fill(batch.advantages > 0, TEMPERATURE_POSITIVE)
    per_token = -torch.sigmoid(tau * (ratios - 1)) * 4 / tau * batch.advantages
    return LossOutput(per_token=per_token, metrics={"ratio/mean": ratios})
