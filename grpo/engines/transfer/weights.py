"""What a weight sync sends, how its arrival is checked, and a carrier without a common accelerator.

The carrier is shared memory or a file. Both are laid out as safetensors. The memory is a memfd,
which receivers open as /proc/PID/fd/N: it has no name, so nothing is left behind however either
side dies.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo.engines import EngineError

if TYPE_CHECKING:
    from grpo.engines import Weights

# the last tensor of a sync: the others' checksums in the order sent, as bytes, which lie anywhere
CHECKSUMS = "grpo.checksums"
# DeepSeek-V3's router adds it to scores in [0, 1]: in bfloat16 it would choose other experts
KEPT = "e_score_correction_bias"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def checksum(tensor: Tensor) -> Tensor:
    """Returns, [] on the tensor's device, its bytes as int64 words summed modulo 2^64.

    Any flipped bit changes it.
    """
    flat = tensor.detach().reshape(-1)
    if flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        return flat.view(torch.int64).sum()
    data = flat.view(torch.uint8).clone()  # a new storage begins at a multiple of 8 bytes
    whole = data.numel() // 8 * 8
    return data[:whole].view(torch.int64).sum() + data[whole:].sum()


@dataclass(frozen=True, slots=True)
class Meta:
    """A tensor to come, as vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Sent:
    """Weights as a sync sends them (vLLM's `WeightSource`).

    Floating-point weights come in `dtype`, except KEPT. CHECKSUMS is made on the way and comes
    last.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def metadata(self) -> list[Meta]:
        found = [
            Meta(name, self._cast(name, of), shape) for name, of, shape in self._weights.layout()
        ]
        return [*found, Meta(CHECKSUMS, torch.uint8, (8 * len(found),))]

    @property
    def num_bytes(self) -> int:
        return sum(meta.num_bytes for meta in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        sums = []
        for name, tensor in self._weights:
            cast = tensor.detach().to(self._cast(name, tensor.dtype))
            sums.append(checksum(cast))
            yield name, cast
        if sums[0].is_cuda:
            torch.cuda.synchronize()  # vLLM's sending side takes turns between streams
        yield CHECKSUMS, torch.stack(sums).view(torch.uint8)

    def _cast(self, name: str, of: torch.dtype) -> torch.dtype:
        return self._dtype if of.is_floating_point and not name.endswith(KEPT) else of


class SharedWeights:
    """The sender's side: `write` copies a model into what lies at `path`.

    With a folder, which nobody else uses, it is a file there, a new one each time (a network file
    system shows a reader what was there when it opened).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._written = folder, 0
        # by a trainer that was killed
        for left in folder.glob("weights-*.safetensors") if folder else ():
            left.unlink(missing_ok=True)
        self._open()

    def _open(self) -> None:
        self._fd, self._bytes = -1, torch.empty(0, dtype=torch.uint8)
        if self._folder is None:
            self._fd = os.memfd_create("grpo-weights", os.MFD_CLOEXEC)
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._written += 1
            self.path = str((self._folder / f"weights-{self._written}.safetensors").absolute())
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def write(self, sent: Sent) -> dict[str, Any]:
        """Returns what receivers are told (`UpdateInfo` in grpo/engines/transfer/receivers.py).

        Raises EngineError where there is no room.
        """
        metadata = sent.metadata()
        header, places = _layout(metadata)
        size = max(end for _, end in places.values())
        try:
            if self._folder is not None:
                self.close()
                self._open()
            if self._bytes.numel() != size:
                os.ftruncate(self._fd, size)
                if self._folder is not None:
                    # a full disk is an error here, and not SIGBUS at a write through the mapping
                    os.posix_fallocate(self._fd, 0, size)
                self._bytes = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)
        except OSError as error:
            raise EngineError(
                f"no room for {size / 2**30:.2f} GB of weights at {self.path}: {error.strerror}"
            ) from None
        self._bytes[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for name, tensor in sent:
            start, end = places.pop(name)
            self._bytes[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        assert not places, f"weights that were announced and not sent: {', '.join(places)}"
        if self._folder is not None:
            os.fsync(self._fd)
        return {"path": self.path, "names": [meta.name for meta in metadata]}

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)  # the mapping goes with its last view
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        if self._folder is not None:
            Path(self.path).unlink(missing_ok=True)


def _layout(metadata: Sequence[Meta]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns the header of a safetensors file, and where in the file each tensor starts and ends.

    Wide dtypes come first, so all tensors are aligned.
    """
    header: dict[str, object] = {}
    places, end = {}, 0
    for meta in sorted(metadata, key=lambda meta: -meta.dtype.itemsize):
        start, end = end, end + meta.num_bytes
        header[meta.name] = {
            "dtype": DTYPES[meta.dtype],
            "shape": meta.shape,
            "data_offsets": (start, end),
        }
        places[meta.name] = (start, end)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    shift = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: (start + shift, end + shift) for name, (start, end) in places.items()
    }


def read(path: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields what was written, in this order.

    The tensors lie in the memory itself: copy what must outlive the next write.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


class Arrivals:
    """Loads weights into an engine's model and compares them with the checksums that come last.

    The transfer engine loads into it in place of the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._expected = {name for name, _ in model.named_parameters()}
        self._loaded: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._sent: Tensor | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights into the model and checks all of them once the checksums have arrived.

        Raises RuntimeError naming the tensors whose bytes are not those that were sent, or the
        model's weights that did not arrive.
        """
        self._loaded |= set(self._model.load_weights(self._passing(weights)))
        if self._sent is None:
            return
        if self._sent.is_cuda:
            torch.cuda.synchronize()  # vLLM's receiving side takes turns between streams
        found, sent = (
            torch.stack(list(self._sums.values())).tolist(),
            self._sent.view(torch.int64).tolist(),
        )
        if len(found) != len(sent):
            raise RuntimeError(
                f"weight transfer: {len(found)} tensors arrived, {len(sent)} were sent"
            )
        wrong = [
            name for name, one, other in zip(self._sums, found, sent, strict=True) if one != other
        ]
        if wrong:
            raise RuntimeError(
                f"weight transfer: the bytes of {', '.join(wrong[:5])} are not those that were "
                "sent (checksum)"
            )
        missing = sorted(self._expected - self._loaded)
        if tied_head(self._model) is not None:
            missing = [name for name in missing if not name.endswith("lm_head.weight")]
        if missing:
            raise RuntimeError(
                f"weight transfer: {len(missing)} weights of the engine's model did not arrive: "
                f"{', '.join(missing[:5])}"
            )

    def _passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name == CHECKSUMS:
                self._sent = tensor.clone()
            else:
                self._sums[name] = checksum(tensor)
                yield name, tensor


def tied_head(model: Any) -> Any:
    """Returns the output head if it shares the embedding's weight, otherwise None.

    On a CPU vLLM then keeps a second, packed copy of that weight.
    """
    config = getattr(model, "config", None)
    head = getattr(model, "lm_head", None)
    return head if head is not None and getattr(config, "tie_word_embeddings", False) else None
