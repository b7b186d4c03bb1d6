"""CISPO: REINFORCE with a capped importance weight. No token loses its gradient."""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -sg(min(r, ratio_max)) A log pi.

    The gradient flows through log pi only. `algorithm.ratio_max` is the cap of the ratio itself,
    not 1 + epsilon.

    Source: MiniMax-M1 2506.13585 Eq. 4, 5.
    """
    ratios = ratio(logprobs, batch.old_logprobs).detach()
    weights = ratios.clamp(max=algorithm.ratio_max)
    return LossOutput(
        per_token=-weights * batch.advantages * logprobs,
        metrics={"clip/high": (ratios > algorithm.ratio_max).float(), "ratio/mean": ratios},
    )
