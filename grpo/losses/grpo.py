"""The clipped ratio of PPO.

With a group-relative advantage it is GRPO; DAPO, Dr.GRPO, R1 and REINFORCE++ differ elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import LossOutput, clipped, ratio
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> LossOutput:
    """Returns -min(r A, clip(r) A).

    `dual_clip`: where A < 0 the ratio counts as at most that (INTELLECT-2 2505.07291: 4).

    Source: DeepSeekMath 2402.03300 Eq. 3, with the sign of a loss. The reduction 1/G sum 1/|o_i| is
    in `batch.token_weights`.
    """
    ratios = ratio(logprobs, batch.old_logprobs)
    bounded = ratios
    if algorithm.dual_clip is not None:
        bounded = ratios.where(batch.advantages >= 0, ratios.clamp(max=algorithm.dual_clip))
    clip = clipped(bounded, batch.advantages, algorithm.clip_low, algorithm.clip_high)
    return LossOutput(
        per_token=clip.per_token,
        metrics={"clip/low": clip.low, "clip/high": clip.high, "ratio/mean": ratios},
    )
