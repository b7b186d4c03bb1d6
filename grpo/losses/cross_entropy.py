"""Cross-entropy of given tokens, weighted per token by the advantage."""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import AlgorithmSettings
from grpo.losses import LossOutput
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossOutput:
    """Returns -A log pi, the cross-entropy if all advantages are 1."""
    return LossOutput(
        per_token=-batch.advantages * logprobs, metrics={"policy/cross_entropy": -logprobs}
    )
