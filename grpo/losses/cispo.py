"""CISPO: the ratio is a capped weight without a gradient, so every token keeps its gradient."""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import LossOutput, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> LossOutput:
    """Returns -sg(min(r, ratio_max)) A log pi.

    Source: MiniMax-M1 2506.13585 Eq. 4, 5; `ratio_max` is the cap itself, not 1 + epsilon.
    """
    ratios = ratio(logprobs, batch.old_logprobs).detach()
    weights = ratios.clamp(max=algorithm.ratio_max)
    return LossOutput(
        per_token=-weights * batch.advantages * logprobs,
        metrics={"clip/high": (ratios > algorithm.ratio_max).float(), "ratio/mean": ratios},
    )
