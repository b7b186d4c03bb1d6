"""Weights laid out as safetensors in memory that engines map: used by memory.py and file.py."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo.engines import EngineError
from grpo.engines.transfer.checksums import TensorInfo, WeightStream

DTYPE_NAMES = {
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


class MappedWeights:
    """A writable mapping of a file that holds one model's weights as safetensors."""

    def __init__(self, file_descriptor: int) -> None:
        """Maps nothing yet; `close` closes `file_descriptor` too."""
        self._file_descriptor = file_descriptor
        self.bytes = torch.empty(0, dtype=torch.uint8)  # [file size], the mapping

    def reserve(self, num_bytes: int, *, allocate: bool) -> None:
        """Maps a file of that size.

        Args:
            num_bytes: the size, see `required_bytes`.
            allocate: reserve the space, so that a full disk is an error here and not SIGBUS during
                a write through the mapping.

        Raises:
            OSError: there is no room.
        """
        if self.bytes.numel() == num_bytes:
            return
        os.ftruncate(self._file_descriptor, num_bytes)
        if allocate:
            os.posix_fallocate(self._file_descriptor, 0, num_bytes)
        mapping = mmap.mmap(self._file_descriptor, num_bytes)
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    def fill(self, stream: WeightStream) -> None:
        """Writes every tensor of the stream into the reserved space."""
        header, places = _layout(stream.metadata())
        self.bytes[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for name, tensor in stream:
            start, end = places.pop(name)
            self.bytes[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if places:
            raise RuntimeError(f"weights that were announced and not sent: {', '.join(places)}")

    def flush(self) -> None:
        """Writes the file to its disk."""
        os.fsync(self._file_descriptor)

    def close(self) -> None:
        """Drops the mapping, which is unmapped with the last tensor that views it."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        if self._file_descriptor >= 0:
            os.close(self._file_descriptor)
            self._file_descriptor = -1


def required_bytes(stream: WeightStream) -> int:
    """Returns the size in bytes of a file that holds the stream."""
    _, places = _layout(stream.metadata())
    return max(end for _, end in places.values())


def no_room(num_bytes: int, place: str, error: OSError) -> EngineError:
    """Returns the error for weights that a place has no room for: "in shared memory"."""
    return EngineError(
        f"no room for {num_bytes / 2**30:.2f} GB of weights {place}: {error.strerror}"
    )


def update_info(path: str, stream: WeightStream) -> dict[str, object]:
    """Returns what a receiver must know of stored weights (`UpdateInfo` in receivers.py)."""
    return {"path": path, "names": [info.name for info in stream.metadata()]}


def read_tensors(path: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields `(name, tensor)` of a file, in the order of `names`.

    The tensors view the mapped file: copy what must outlive the next write.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def _layout(metadata: Sequence[TensorInfo]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns the header of a safetensors file, and where in the file each tensor starts and ends.

    Wide dtypes come first, so all tensors are aligned.
    """
    header: dict[str, object] = {}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for info in sorted(metadata, key=lambda info: -info.dtype.itemsize):
        start = end
        end = start + info.num_bytes
        offsets[info.name] = (start, end)
        header[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data_start = 8 + len(text)
    places = {
        name: (start + data_start, end + data_start) for name, (start, end) in offsets.items()
    }
    return len(text).to_bytes(8, "little") + text, places
