"""Weights changed at random, by a seed.

The canary sends such weights through the real sync: no stale copy resembles them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturbed(weight: Tensor, seed: int) -> Tensor:
    """Returns the weight scaled by 0.8 or 1.2, with noise of a tenth of its spread.

    GPUs of one kind, and CPUs, draw the same numbers.
    """
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device)
    factor = 1.2 if torch.rand((), generator=generator, device=weight.device) < 0.5 else 0.8
    # norms and fresh biases have no spread of their own
    constant = bool((weight == weight.flatten()[0]).all())
    spread = weight.float().abs().mean().clamp(min=1.0) if constant else weight.float().std()
    return weight * factor + 0.1 * spread * noise


def jittered(weight: Tensor, seed: int) -> Tensor:
    """Returns the weight changed at random by up to 2^-8 of itself.

    In bfloat16 about a third of its elements move, by one step.
    """
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    steps = 2 * torch.rand(weight.shape, generator=generator, device=weight.device) - 1
    return weight * (1 + 2**-8 * steps)
