"""Seeded random changes of weights.

The canary check sends perturbed weights to the engine through the normal weight sync. The engine
cannot reproduce the perturbed log-probabilities from an old copy of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturbed(weight: Tensor, seed: int) -> Tensor:
    """Returns the weight scaled by 0.8 or 1.2, plus noise of a tenth of its standard deviation.

    For a constant weight, the mean absolute value (at least 1) replaces the standard deviation. The
    same seed gives the same numbers on all CPUs, and on all GPUs of the same type.
    """
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, device=weight.device)
    is_enlarged = torch.rand((), generator=generator, device=weight.device) < 0.5
    factor = 1.2 if is_enlarged else 0.8
    return weight * factor + 0.1 * _noise_scale(weight) * noise


def _noise_scale(weight: Tensor) -> Tensor:
    # Norm weights and newly initialized biases are constant: their standard deviation is 0.
    is_constant = bool((weight == weight.flatten()[0]).all())
    if is_constant:
        return weight.float().abs().mean().clamp(min=1.0)
    return weight.float().std()


def jittered(weight: Tensor, seed: int) -> Tensor:
    """Returns the weight with each element changed by a random relative amount up to 2^-8.

    In bfloat16 this moves about a third of the elements, each by one representable value.
    """
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    relative_changes = 2 * torch.rand(weight.shape, generator=generator, device=weight.device) - 1
    return weight * (1 + 2**-8 * relative_changes)
