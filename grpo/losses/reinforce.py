"""REINFORCE: the policy gradient as it is, clipped nowhere.

It is importance-weighted when the policy has moved.
"""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -(pi / pi_old) A, whose gradient on-policy is -A grad log pi.

    Source: RLOO 2402.14740 Eq. 6 (its sum over tokens).
    """
    ratios = _terms.ratio(logprobs, batch.old_logprobs)
    return -ratios * batch.advantages, {"ratio/mean": ratios}
