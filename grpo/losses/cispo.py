"""CISPO: the ratio is a capped weight without a gradient of its own.

Every token therefore keeps its gradient.
"""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.losses import _terms
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -sg(min(r, ratio_max)) A log pi.

    Source: MiniMax-M1 2506.13585 Eq. 4, 5; `ratio_max` is the cap itself, not 1 + epsilon.
    """
    ratios = _terms.ratio(logprobs, batch.old_logprobs).detach()
    per_token = -ratios.clamp(max=algorithm.ratio_max) * batch.advantages * logprobs
    return per_token, {"clip/high": (ratios > algorithm.ratio_max).float(), "ratio/mean": ratios}
