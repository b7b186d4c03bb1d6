"""SAPO: a soft gate in place of the clip."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch

TEMPERATURE_POSITIVE, TEMPERATURE_NEGATIVE = 1.0, 1.05  # the paper's


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A.

    Source: SAPO 2511.20347 Eq. 5, 6.
    """
    ratios = _terms.ratio(logprobs, batch.old_logprobs)
    tau = torch.full_like(ratios, TEMPERATURE_NEGATIVE).masked_fill(
        batch.advantages > 0, TEMPERATURE_POSITIVE
    )
    return -torch.sigmoid(tau * (ratios - 1)) * 4 / tau * batch.advantages, {"ratio/mean": ratios}
