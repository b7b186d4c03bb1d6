"""REINFORCE: the policy gradient without a clip, importance-weighted if the policy has moved."""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import LossOutput, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> LossOutput:
    """Returns -(pi / pi_old) A, whose gradient on-policy is -A grad log pi.

    Source: RLOO 2402.14740 Eq. 6 (its sum over tokens).
    """
    ratios = ratio(logprobs, batch.old_logprobs)
    return LossOutput(per_token=-ratios * batch.advantages, metrics={"ratio/mean": ratios})
