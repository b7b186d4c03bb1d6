"""Fewer bits: how weights and activations are rounded, and a model that learns with that rounding.

compressed-tensors does the rounding. Learning with it is quantisation-aware training (QAT). The
rounding is the same in training and in what `grpo quantize` writes, clipped ranges included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grpo.types import UserError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a 4-bit range that are tried


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    """Returns what is rounded: every linear layer but the output head.

    A mixture's experts are no linear layers and stay.
    """
    import torch

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


def arguments(scheme: str, group_size: int) -> tuple[QuantizationArgs, QuantizationArgs | None]:
    """Returns how weights are rounded, and activations where they are."""
    from compressed_tensors.quantization import QuantizationArgs

    by_token = QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True)
    return {
        "int8": (QuantizationArgs(num_bits=8, strategy="channel", symmetric=True), by_token),
        "int8_tensor": (QuantizationArgs(num_bits=8, strategy="tensor", symmetric=True), by_token),
        "int4": (
            QuantizationArgs(num_bits=4, strategy="group", group_size=group_size, symmetric=True),
            None,
        ),
    }[scheme]


def best_scale(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns the scales of a weight [out, in].

    They are [1], [out, 1] or [out, groups], each clipped where its own squared error is least.
    """
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    dtype, weight = weight.dtype, weight.float()
    parts: Callable[[Tensor], Tensor] = {
        "tensor": lambda w: w.reshape(1, 1, -1),
        "channel": lambda w: w.unsqueeze(1),
        "group": lambda w: w.unflatten(1, (-1, args.group_size or 1)),
    }[args.strategy]  # [.., .., values of one scale]
    low, high = parts(weight).amin(-1), parts(weight).amax(-1)
    best: Tensor | None = None
    least = torch.empty(())
    for clip in CLIPS if args.num_bits == 4 else (1.0,):
        scale, zero = calculate_qparams(low * clip, high * clip, args)
        scale = scale.to(dtype).float()  # as it will be written, beside weights of that precision
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        error = (
            (parts(fake_quantize(weight, scale, zero, args)) - parts(weight))
            .square()
            .sum(-1)
            .reshape(scale.shape)
        )
        if best is None:
            best, least = scale, error
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    assert best is not None
    return best


def check_groups(model: Any, key: str, group_size: int) -> None:
    """Raises UserError for a model with layers that the groups of int4 do not divide."""
    for name, layer in linear_layers(model):
        if layer.in_features % group_size:
            raise UserError(
                f"{key}={group_size} does not divide the {layer.in_features} inputs of {name}: "
                "try 32 or 64"
            )


def learn_rounded(model: Any, scheme: str, group_size: int) -> None:
    """Makes every linear layer but the head compute with rounded weights, in place.

    In int8 the activations are rounded too. Gradients pass the rounding as if it were not there
    (straight-through, 1308.3432; Jacob et al. 1712.05877). The weights stay as they are. Raises
    UserError.
    """
    weights, activations = arguments(scheme, group_size)
    if scheme == "int4":
        check_groups(model, "model.qat.group_size", group_size)
    for _, layer in linear_layers(model):
        layer.forward = functools.partial(_forward, layer, weights, activations)


def _forward(
    layer: Any, weights: QuantizationArgs, activations: QuantizationArgs | None, x: Tensor
) -> Tensor:
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    with torch.no_grad():
        weight = rounded_weight(layer.weight, weights)
        rounded = (
            x
            if activations is None
            else fake_quantize(
                x, *compute_dynamic_scales_and_zp(x, activations, layer), activations
            )
        )
    weight, x = _through(layer.weight, weight), _through(x, rounded)
    return torch.nn.functional.linear(x, weight, layer.bias)


def rounded_weight(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns the weight as it will be once quantised, in its own dtype."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    scale = best_scale(weight, args)
    rounded: Tensor = fake_quantize(weight.float(), scale, torch.zeros_like(scale), args)
    return rounded.to(weight.dtype)


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """Returns `rounded`, with `value`'s gradient."""
    return rounded + (value - value.detach())
