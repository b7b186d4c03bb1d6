"""Weights in the safetensors format in a memory-mapped file, for memory.py and file.py."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.engines import EngineError
from grpo.engines.transfer.checksums import TensorInfo, WeightStream

HEADER_LENGTH_BYTES = 8  # the file begins with the length of the header, a 64-bit integer
ALIGNMENT_BYTES = 64  # the first tensor begins at a multiple of this
# Dtypes and their names in the safetensors format.
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
    """A writable mapping of a file with the weights of one model.

    Call `reserve` before `fill`.

    Attributes:
        mapping: `[file size in bytes]`, uint8.
    """

    def __init__(self, file_descriptor: int) -> None:
        """Owns the file, which is open for reading and writing, until `close`."""
        self._file_descriptor = file_descriptor
        self.mapping = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int, *, allocate: bool) -> None:
        """Sets the size of the file and maps it.

        Args:
            num_bytes: the size of the file, see `required_bytes`.
            allocate: allocate the disk space now. A full disk is then an OSError of this call
                instead of a SIGBUS during a write to the mapping.

        Raises:
            OSError: there is not enough space.
        """
        if self.mapping.numel() == num_bytes:
            return
        os.ftruncate(self._file_descriptor, num_bytes)
        if allocate:
            os.posix_fallocate(self._file_descriptor, 0, num_bytes)
        file_mapping = mmap.mmap(self._file_descriptor, num_bytes)
        self.mapping = torch.frombuffer(file_mapping, dtype=torch.uint8)

    def fill(self, stream: WeightStream) -> None:
        """Writes every tensor of the stream to the mapping.

        Args:
            stream: the weights. Call `reserve(required_bytes(stream))` first.

        Raises:
            RuntimeError: the stream does not yield a tensor that its metadata list.
            KeyError: the stream yields a tensor that its metadata do not list.
        """
        layout = _file_layout(stream.metadata())
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self.mapping[: len(header)] = header
        unwritten_ranges = dict(layout.byte_ranges)
        for name, tensor in stream:
            target = self.mapping[unwritten_ranges.pop(name)]
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if unwritten_ranges:
            raise RuntimeError(
                "weights that the stream's metadata lists but its iteration did not yield: "
                f"{', '.join(unwritten_ranges)}"
            )

    def flush(self) -> None:
        """Writes the file to its disk."""
        os.fsync(self._file_descriptor)

    def close(self) -> None:
        """Closes the file. The memory is unmapped when no tensor refers to it any more."""
        self.mapping = torch.empty(0, dtype=torch.uint8)
        if self._file_descriptor >= 0:
            os.close(self._file_descriptor)
            self._file_descriptor = -1


def required_bytes(stream: WeightStream) -> int:
    """Returns the size of a file that holds the tensors of the stream, in bytes."""
    return _file_layout(stream.metadata()).num_bytes


def no_space_error(num_bytes: int, location: str, error: OSError) -> EngineError:
    """Returns the error for weights that do not fit at a location, such as "in shared memory"."""
    return EngineError(
        f"no space for {num_bytes / 1e9:.2f} GB of weights {location}: {error.strerror}"
    )


def update_info(path: str, stream: WeightStream) -> dict[str, object]:
    """Returns the fields of `UpdateInfo` (receivers.py) for a stream that is stored at `path`."""
    return {"path": path, "names": [info.name for info in stream.metadata()]}


def read_tensors(path: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields `(name, tensor)` from a file, in the order of `names`.

    The tensors are views of the mapped file. Copy a tensor that must survive the next send.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


@dataclass(frozen=True, slots=True)
class _FileLayout:
    """The layout of a safetensors file.

    Attributes:
        header: the first bytes of the file, before the tensors.
        byte_ranges: the bytes of each tensor in the file, by the tensor's name.
        num_bytes: the size of the file.
    """

    header: bytes
    byte_ranges: dict[str, slice]
    num_bytes: int


def _file_layout(metadata: Sequence[TensorInfo]) -> _FileLayout:
    """Lays out tensors in a safetensors file, wide dtypes first, so that all are aligned."""
    entries: dict[str, object] = {}
    offsets: dict[str, tuple[int, int]] = {}  # start and end, relative to the end of the header
    end = 0
    for info in sorted(metadata, key=lambda info: -info.dtype.itemsize):
        start = end
        end = start + info.num_bytes
        offsets[info.name] = (start, end)
        entries[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(entries).encode()
    text += b" " * (-(HEADER_LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
    header = len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
    byte_ranges = {
        name: slice(len(header) + start, len(header) + end)
        for name, (start, end) in offsets.items()
    }
    return _FileLayout(header, byte_ranges, num_bytes=len(header) + end)
