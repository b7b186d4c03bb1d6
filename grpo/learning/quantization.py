"""Rounding of weights and activations to int8 and int4, and training with that rounding.

compressed-tensors computes the rounding of weights. `grpo quantize` writes models with it, and
quantization-aware training (QAT, `model.qat`) applies it in the forward pass. Both use the same
scales, clipping included. Activations are rounded as vLLM rounds them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.types import UserError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor

# Fractions of the largest value to which the range of a 4-bit scale is clipped. The one with the
# smallest squared error is used.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Rounding(NamedTuple):
    """How a scheme rounds; compressed-tensors describes each with a `QuantizationArgs`."""

    weights: QuantizationArgs
    activations: QuantizationArgs | None  # None if activations are not rounded


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    """Returns the layers whose weights are rounded, `(name, layer)`.

    These are all linear layers except the output head. The experts of a mixture of experts are not
    linear layers and are not rounded.
    """
    import torch

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


def quantization_args(scheme: str, group_size: int) -> Rounding:
    """Returns how a scheme rounds weights and activations.

    int8         weights with one scale per output channel, activations with one scale per token
    int8_tensor  weights with one scale per tensor, activations with one scale per token
    int4         weights with one scale per `group_size` inputs, activations are not rounded
    """
    from compressed_tensors.quantization import QuantizationArgs

    if scheme == "int4":
        weights = QuantizationArgs(
            num_bits=4, strategy="group", group_size=group_size, symmetric=True
        )
        return Rounding(weights, activations=None)
    strategies = {"int8": "channel", "int8_tensor": "tensor"}
    return Rounding(
        weights=QuantizationArgs(num_bits=8, strategy=strategies[scheme], symmetric=True),
        activations=QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True),
    )


def best_scales(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns the scales of a weight, float32.

    With 8 bits, a scale covers the largest value. With 4 bits, it is clipped where the squared
    error of its values is smallest, so that a few large values do not make the steps too coarse.

    Args:
        weight: [out, in].
        args: how the weight is rounded.

    Returns:
        Scales [1], [out, 1] or [out, groups], by `args.strategy`.
    """
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    stored_dtype = weight.dtype
    weight = weight.float()
    parts = _values_per_scale(weight, args)
    min_values = parts.amin(-1)
    max_values = parts.amax(-1)
    clips = CLIPS if args.num_bits == 4 else (1.0,)
    best: Tensor | None = None
    min_errors = torch.empty(())
    for clip in clips:
        scales, zero_points = calculate_qparams(min_values * clip, max_values * clip, args)
        scales = scales.to(stored_dtype).float()  # files hold scales in the dtype of the weights
        if args.strategy == "tensor":
            scales = scales.reshape(1)
            zero_points = zero_points.reshape(1)
        rounded = fake_quantize(weight, scales, zero_points, args)
        differences = _values_per_scale(rounded, args) - parts
        errors = differences.square().sum(-1).reshape(scales.shape)
        if best is None:
            best = scales
            min_errors = errors
            continue
        is_better = errors < min_errors
        best = torch.where(is_better, scales, best)
        min_errors = torch.where(is_better, errors, min_errors)
    assert best is not None
    return best


def _values_per_scale(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns a weight [out, in] as [.., .., number of values that share a scale]."""
    if args.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    if args.strategy == "channel":
        return weight.unsqueeze(1)
    if args.strategy == "group":
        groups: Tensor = weight.unflatten(1, (-1, args.group_size or 1))
        return groups
    raise ValueError(f"unsupported strategy {args.strategy}")


def check_group_size(model: Any, key: str, group_size: int) -> None:
    """Raises UserError if the inputs of a linear layer are not divisible by `group_size`.

    Args:
        model: a transformers model.
        key: config key of `group_size`, for the message.
        group_size: number of inputs that share a scale (int4).
    """
    for name, layer in linear_layers(model):
        if layer.in_features % group_size:
            raise UserError(
                f"{key}={group_size} does not divide the {layer.in_features} inputs of {name}. "
                "Try 32 or 64."
            )


def enable_qat(model: Any, scheme: str, group_size: int) -> None:
    """Makes every linear layer except the output head compute with rounded weights, in place.

    In int8 the layers also round their inputs. The stored weights are not rounded. The gradient
    treats the rounding as the identity (straight-through estimator).

    Args:
        model: a transformers model.
        scheme: `int8`, `int8_tensor` or `int4`.
        group_size: number of inputs that share a scale (int4).

    Raises:
        UserError: `group_size` does not divide the inputs of a layer.

    Source: straight-through estimator 1308.3432; training with it, Jacob et al. 1712.05877.
    """
    if scheme == "int4":
        check_group_size(model, "model.qat.group_size", group_size)
    rounding = quantization_args(scheme, group_size)
    for _, layer in linear_layers(model):
        layer.forward = functools.partial(_forward, layer, rounding)


def _forward(layer: Any, rounding: Rounding, x: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        rounded_layer_weight = rounded_weight(layer.weight, rounding.weights)
        rounded_x = x
        if rounding.activations is not None:
            rounded_x = rounded_activations(x)
    weight = _straight_through(layer.weight, rounded_layer_weight)
    x = _straight_through(x, rounded_x)
    return torch.nn.functional.linear(x, weight, layer.bias)


def rounded_activations(x: Tensor) -> Tensor:
    """Returns activations rounded to int8 with one scale per token, in their own dtype.

    The scale is absmax / 127 in float32, and values are multiplied by its inverse, as in vLLM's CPU
    kernel (`onednn_scaled_int8_quant`). compressed-tensors divides by 127.5 instead, in the dtype
    of the activations.

    Args:
        x: [..., in].
    """
    import torch

    scales = x.float().abs().amax(-1, keepdim=True) / 127
    has_inverse = scales >= torch.finfo(torch.float32).tiny
    inverses = torch.where(has_inverse, 1 / scales, 0.0)
    levels = (x.float() * inverses).round()
    return (levels * scales).to(x.dtype)


def rounded_weight(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns the weight with the values that `grpo quantize` writes, in its own dtype.

    Args:
        weight: [out, in].
        args: how the weight is rounded.
    """
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    scales = best_scales(weight, args)
    zero_points = torch.zeros_like(scales)  # the rounding is symmetric
    rounded: Tensor = fake_quantize(weight.float(), scales, zero_points, args)
    return rounded.to(weight.dtype)


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Returns `rounded`, with the gradient of `value`."""
    return rounded + (value - value.detach())
