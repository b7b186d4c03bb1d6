"""Checksums of a weight sync: what is sent with them, and the check of what arrives.

Must not import vllm: the learner's side uses it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grpo.engines import Weights

# The name of the last tensor of a sync: the checksums of all other tensors in the order sent,
# as uint8 because a packed buffer does not align its tensors.
CHECKSUMS = "grpo.checksums"
# Weights that keep their dtype. DeepSeek-V3's router adds this bias to scores in [0, 1]: in
# bfloat16 it would choose other experts.
KEEPS_DTYPE = "e_score_correction_bias"


def checksum(tensor: Tensor) -> Tensor:
    """Returns, [] on the tensor's device, its bytes as int64 words summed modulo 2^64.

    Any flipped bit changes it.
    """
    flat = tensor.detach().reshape(-1)
    if flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        return flat.view(torch.int64).sum()
    data = flat.view(torch.uint8).clone()  # a new storage begins at a multiple of 8 bytes
    num_whole = data.numel() // 8 * 8
    return data[:num_whole].view(torch.int64).sum() + data[num_whole:].sum()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that will be sent, as vLLM's `ParamMeta`.

    `TensorInfo("model.norm.weight", torch.bfloat16, (896,))`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Returns the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightStream:
    """The tensors of one weight sync, in the order sent (a `WeightSource` of vLLM).

    Floating-point weights are cast to `dtype`, except KEEPS_DTYPE. CHECKSUMS is computed while the
    weights are iterated and comes last.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        """Iterates `weights` once per iteration of the stream."""
        self._weights = weights
        self._dtype = dtype

    def metadata(self) -> list[TensorInfo]:
        """Returns what iteration yields, without gathering any weight."""
        infos = [
            TensorInfo(name, self._sent_dtype(name, dtype), shape)
            for name, dtype, shape in self._weights.layout()
        ]
        return [*infos, TensorInfo(CHECKSUMS, torch.uint8, (8 * len(infos),))]

    @property
    def num_bytes(self) -> int:
        """Returns the size of all tensors in bytes."""
        return sum(info.num_bytes for info in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight, then the checksums."""
        sums = []
        for name, tensor in self._weights:
            cast = tensor.detach().to(self._sent_dtype(name, tensor.dtype))
            sums.append(checksum(cast))
            yield name, cast
        if sums[0].is_cuda:
            torch.cuda.synchronize()  # vLLM's sending side alternates between streams
        yield CHECKSUMS, torch.stack(sums).view(torch.uint8)

    def _sent_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_floating_point and not name.endswith(KEEPS_DTYPE):
            return self._dtype
        return dtype


class ArrivalCheck:
    """Loads weights into an engine's model and compares them with the checksums that come last.

    A transfer engine loads into it in place of the model.
    """

    def __init__(self, model: Any) -> None:
        """Expects every parameter of `model`."""
        self._model = model
        self._expected = {name for name, _ in model.named_parameters()}
        self._loaded: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._sent_sums: Tensor | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights into the model; once the checksums have arrived, checks every weight.

        Raises:
            RuntimeError: bytes differ from those sent, or a weight of the model did not arrive. The
                message names the tensors.
        """
        self._loaded |= set(self._model.load_weights(self._record_sums(weights)))
        if self._sent_sums is None:
            return
        if self._sent_sums.is_cuda:
            torch.cuda.synchronize()  # vLLM's receiving side alternates between streams
        self._check_sums(self._sent_sums)
        self._check_missing()

    def _record_sums(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name == CHECKSUMS:
                self._sent_sums = tensor.clone()
            else:
                self._sums[name] = checksum(tensor)
                yield name, tensor

    def _check_sums(self, sent_sums: Tensor) -> None:
        arrived = torch.stack(list(self._sums.values())).tolist()
        sent = sent_sums.view(torch.int64).tolist()
        if len(arrived) != len(sent):
            raise RuntimeError(
                f"weight transfer: {len(arrived)} tensors arrived, {len(sent)} were sent"
            )
        wrong = []
        for name, arrived_sum, sent_sum in zip(self._sums, arrived, sent, strict=True):
            if arrived_sum != sent_sum:
                wrong.append(name)
        if wrong:
            raise RuntimeError(
                f"weight transfer: the bytes of {', '.join(wrong[:5])} are not those that were "
                "sent (checksum)"
            )

    def _check_missing(self) -> None:
        missing = sorted(self._expected - self._loaded)
        if tied_head(self._model) is not None:
            missing = [name for name in missing if not name.endswith("lm_head.weight")]
        if missing:
            raise RuntimeError(
                f"weight transfer: {len(missing)} weights of the engine's model did not arrive: "
                f"{', '.join(missing[:5])}"
            )


def tied_head(model: Any) -> Any:
    """Returns the output head if it shares the embedding's weight, otherwise None.

    On a CPU vLLM then keeps a second, packed copy of that weight.
    """
    head = getattr(model, "lm_head", None)
    config = getattr(model, "config", None)
    if head is not None and getattr(config, "tie_word_embeddings", False):
        return head
    return None
