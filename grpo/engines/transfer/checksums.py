"""Checksums of a weight sync: the stream that carries them, and the check on arrival.

The sending side and the receiving side use this module. It must not import vLLM, because the
sending side runs in the learner's process.
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

# The name of the last tensor of a sync, which holds the checksums of all other tensors in the order
# of sending. Its dtype is uint8 because tensors in a packed buffer are not aligned.
CHECKSUMS_NAME = "grpo.checksums"
# Weights whose names end with this suffix keep their dtype. DeepSeek-V3's router adds this bias to
# scores in [0, 1]; rounded to bfloat16 it would select different experts.
KEEP_DTYPE_SUFFIX = "e_score_correction_bias"


def checksum(tensor: Tensor) -> Tensor:
    """Returns the sum of the tensor's bytes as int64 words, modulo 2^64.

    Bytes after the last complete word are added one by one. Any single flipped bit changes the sum.

    Returns:
        A tensor of shape `[]` and dtype int64 on the device of `tensor`.
    """
    flat = tensor.detach().reshape(-1)
    offset_bytes = flat.storage_offset() * flat.itemsize
    if flat.nbytes % 8 == 0 and offset_bytes % 8 == 0:
        return flat.view(torch.int64).sum()
    data = flat.view(torch.uint8).clone()  # the new storage is aligned to 8 bytes
    num_word_bytes = data.numel() // 8 * 8
    return data[:num_word_bytes].view(torch.int64).sum() + data[num_word_bytes:].sum()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The description of a tensor that will be sent. vLLM uses it as a `ParamMeta`.

    Example:
        `TensorInfo("model.norm.weight", torch.bfloat16, (896,))`
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightStream:
    """The tensors of one weight sync in the order of sending. vLLM uses it as a `WeightSource`.

    The last tensor, CHECKSUMS_NAME, is computed while the weights are iterated.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        """Prepares the stream without reading any weight.

        Args:
            weights: the weights. Each iteration of the stream iterates them once.
            dtype: the dtype to which floating-point weights are cast, except those whose names end
                with KEEP_DTYPE_SUFFIX.
        """
        self._weights = weights
        self._dtype = dtype

    def metadata(self) -> list[TensorInfo]:
        """Describes the tensors that the iteration yields, without gathering any weight."""
        infos = [
            TensorInfo(name, self._sent_dtype(name, dtype), shape)
            for name, dtype, shape in self._weights.layout()
        ]
        checksums_info = TensorInfo(CHECKSUMS_NAME, torch.uint8, (8 * len(infos),))
        return [*infos, checksums_info]

    @property
    def num_bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(info.num_bytes for info in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight, then the checksums."""
        sums = []
        for name, tensor in self._weights:
            cast = tensor.detach().to(self._sent_dtype(name, tensor.dtype))
            sums.append(checksum(cast))
            yield name, cast
        if sums[0].is_cuda:
            torch.cuda.synchronize()  # vLLM's sender alternates between CUDA streams
        yield CHECKSUMS_NAME, torch.stack(sums).view(torch.uint8)

    def _sent_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_floating_point and not name.endswith(KEEP_DTYPE_SUFFIX):
            return self._dtype
        return dtype


class ArrivalCheck:
    """Loads weights into an engine's model and verifies them with the checksums, which arrive last.

    A receiving engine calls `load_weights` of this object in place of the model's.
    """

    def __init__(self, model: Any) -> None:
        """Begins the check of one update, in which every parameter of `model` must arrive."""
        self._model = model
        self._expected = {name for name, _ in model.named_parameters()}
        self._loaded: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._sent_sums: Tensor | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights into the model. Checks all weights once the checksums have arrived.

        Raises:
            RuntimeError: a tensor differs from the one that was sent, or a weight of the model did
                not arrive. The message names the tensors.
        """
        self._loaded |= set(self._model.load_weights(self._record_sums(weights)))
        if self._sent_sums is None:
            return
        if self._sent_sums.is_cuda:
            torch.cuda.synchronize()  # vLLM's receiver alternates between CUDA streams
        self._check_sums(self._sent_sums)
        self._check_missing()

    def _record_sums(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name == CHECKSUMS_NAME:
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
        corrupted = []
        for name, arrived_sum, sent_sum in zip(self._sums, arrived, sent, strict=True):
            if arrived_sum != sent_sum:
                corrupted.append(name)
        if corrupted:
            raise RuntimeError(
                f"weight transfer: the bytes of {', '.join(corrupted[:5])} differ from those that "
                "were sent (checksum)"
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
    """Returns the output head of a vLLM model if it shares the embedding's weight, else None.

    On a CPU, vLLM keeps a second, packed copy of that weight for the head.
    """
    head = getattr(model, "lm_head", None)
    config = getattr(model, "config", None)
    if head is not None and getattr(config, "tie_word_embeddings", False):
        return head
    return None
