"""Cross-entropy of given tokens.

Supervised fine-tuning minimises it, with a weight for each token in place of an advantage.
"""

from __future__ import annotations

from torch import Tensor

from grpo.config.algorithm import Algorithm
from grpo.types import Batch


def loss(logprobs: Tensor, batch: Batch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns -A log pi."""
    return -batch.advantages * logprobs, {"policy/cross_entropy": -logprobs}
