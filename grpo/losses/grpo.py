"""PPO's clipped loss. With group-relative advantages this is the loss of GRPO.

DAPO, Dr.GRPO, R1 and REINFORCE++ use the same loss. They differ in the advantage, the reduction,
the bounds or the KL (grpo/config/presets.py).
"""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput, clipped_loss, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    With `algorithm.dual_clip`, r is replaced by min(r, dual_clip) where A < 0 (INTELLECT-2
    2505.07291, which sets it to 4).

    Source: DeepSeekMath 2402.03300 Eq. 3, with the sign of a loss. The mean over completions and
    tokens, 1/G sum 1/|o_i| sum, is in `batch.token_weights`.
    """
    ratios = ratio(logprobs, batch.old_logprobs)
    bounded_ratios = ratios
    if algorithm.dual_clip is not None:
        capped = ratios.clamp(max=algorithm.dual_clip)
        bounded_ratios = ratios.where(batch.advantages >= 0, capped)
    clipped = clipped_loss(
        bounded_ratios, batch.advantages, algorithm.clip_low, algorithm.clip_high
    )
    return LossOutput(
        per_token=clipped.per_token,
        metrics={
            "clip/low": clipped.clipped_low,
            "clip/high": clipped.clipped_high,
            "ratio/mean": ratios,
        },
    )
