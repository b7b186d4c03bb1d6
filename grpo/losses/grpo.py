"""The clipped ratio of PPO.

With a group-relative advantage it is GRPO; DAPO, Dr.GRPO, R1 and REINFORCE++ differ elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -min(r A, clip(r) A), and per-token quantities to report.

    The quantities are reported as means over completion tokens.
    `dual_clip`: where A < 0 the ratio counts as at most that (INTELLECT-2 2505.07291: 4).
    Source: DeepSeekMath 2402.03300 Eq. 3 (sign turned: it is minimised). The reduction 1/G sum
    1/|o_i| is in `batch.token_weights`.
    """
    ratios = _terms.ratio(logprobs, batch.old_logprobs)
    capped = (
        ratios
        if algorithm.dual_clip is None
        else ratios.where(batch.advantages >= 0, ratios.clamp(max=algorithm.dual_clip))
    )
    per_token, low, high = _terms.clipped(
        capped, batch.advantages, algorithm.clip_low, algorithm.clip_high
    )
    return per_token, {"clip/low": low, "clip/high": high, "ratio/mean": ratios}
