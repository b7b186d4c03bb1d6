"""The weights of a learner as complete tensors, for the engine and for the final model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo.learning import lora, moe

BUCKET_BYTES = 2**28  # approximate size of the weights that ZeRO-3 gathers at once


def gathered(
    parameters: Sequence[nn.Parameter], zero_stage: int
) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which the parameters are complete on every rank.

    ZeRO-3 keeps a part of each parameter per rank. In the lower stages parameters are complete.
    """
    if zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    context: contextlib.AbstractContextManager[Any]
    context = deepspeed.zero.GatheredParameters(list(parameters))
    return context


class LearnerWeights:
    """The weights of a model under training, by their Hugging Face names.

    Implements the protocol `Weights` of grpo/engines: `for name, tensor in weights` and
    `weights.layout()`.

    The tensors have the dtype of the forward pass; buffers keep their own dtype. Tied weights occur
    once. Adapters are merged.

    All ranks must iterate together. Copy a tensor before you take the next one: ZeRO-3 gathers one
    bucket of weights at a time.
    """

    def __init__(self, model: nn.Module, zero_stage: int) -> None:
        """Keeps a reference to the model. Each iteration reads its current weights.

        Args:
            model: The transformers model.
            zero_stage: The ZeRO stage it is trained with.
        """
        self._model = model
        self._zero_stage = zero_stage

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight."""
        adapted_layers = lora.adapted_layers(self._model)
        for bucket in self._buckets():
            with gathered([parameter for _, parameter in bucket], self._zero_stage):
                for name, parameter in bucket:
                    weight = parameter.data
                    if name in adapted_layers:
                        weight = lora.merged_weight(weight, adapted_layers[name])
                    yield from moe.hub_weights(self._model, name, weight)
        yield from self._saved_buffers()

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Returns `(name, dtype, shape)` of every weight without gathering any."""
        layout = []
        for bucket in self._buckets():
            for name, parameter in bucket:
                # Under ZeRO-3, `shape` is that of a placeholder and `ds_shape` the complete one.
                shape = getattr(parameter, "ds_shape", parameter.shape)
                empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                for hub_name, weight in moe.hub_weights(self._model, name, empty):
                    layout.append((hub_name, weight.dtype, tuple(weight.shape)))
        for name, buffer in self._saved_buffers():
            layout.append((name, buffer.dtype, tuple(buffer.shape)))
        return layout

    def _buckets(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Returns the model's parameters without adapters, in buckets of about BUCKET_BYTES."""
        buckets: list[list[tuple[str, nn.Parameter]]] = [[]]
        bucket_bytes = 0
        for name, parameter in self._model.named_parameters():
            if "lora_" in name:
                continue
            # Under ZeRO-3, `ds_numel` is the size of the complete parameter.
            num_weights = getattr(parameter, "ds_numel", parameter.numel())
            num_bytes = num_weights * parameter.itemsize
            if bucket_bytes and bucket_bytes + num_bytes > BUCKET_BYTES:
                buckets.append([])
                bucket_bytes = 0
            # peft moves the weight of an adapted layer into `base_layer`.
            buckets[-1].append((name.replace(".base_layer.", "."), parameter))
            bucket_bytes += num_bytes
        return buckets

    def _saved_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the buffers that are part of a checkpoint, e.g. DeepSeek's router bias."""
        saved_names = self._model.state_dict().keys()
        for name, buffer in self._model.named_buffers():
            if name in saved_names:
                yield name, buffer
