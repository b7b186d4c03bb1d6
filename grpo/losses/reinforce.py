"""REINFORCE: the policy gradient with importance weights and without clipping."""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -r A. On-policy, where r is 1, its gradient is -A grad log pi.

    Source: RLOO 2402.14740 Eq. 6, per token; the paper sums over the tokens of a completion.
    """
    ratios = ratio(logprobs, batch.old_logprobs)
    return LossOutput(per_token=-ratios * batch.advantages, metrics={"ratio/mean": ratios})
