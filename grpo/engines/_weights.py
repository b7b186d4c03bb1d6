"""The carrier of weights between processes without an accelerator in common: shared memory, or a file that all machines see; read in place.

The memory is a memfd, which receivers open as /proc/PID/fd/N: it has no name, so nothing is left behind however either side dies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

KEPT = "e_score_correction_bias"  # DeepSeek-V3's router adds it to scores in [0, 1]: in bfloat16 it would choose other experts
ALIGNMENT = 64  # bytes; the checksum reads whole int64 words


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies in the shared memory. `checksum`: its bytes as int64 words, summed modulo 2^64 (any flipped bit changes it)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    checksum: int


class SharedWeights:
    """The sender's side: `write` copies a model into what lies at `path` and says where everything is. With a folder it is a file there, a
    new one each time (a network file system shows a reader what was there when it opened)."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._written = folder, 0
        self._open()

    def _open(self) -> None:
        if self._folder is None:
            fd = os.memfd_create("grpo-weights", os.MFD_CLOEXEC)
            self.path = f"/proc/{os.getpid()}/fd/{fd}"
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._written += 1
            self.path = str((self._folder / f"weights-{self._written}.bin").absolute())
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._fd, self._map = fd, _Mapping(fd)

    def write(self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> list[TensorSpec]:
        """Returns the layout of the copied weights. Floating-point tensors are cast to `dtype` on the way, but KEPT."""
        if self._folder is not None:
            self.close()
            self._open()
        specs, offset = [], 0
        for name, tensor in weights:
            wanted = dtype if tensor.is_floating_point() and not name.endswith(KEPT) else tensor.dtype
            num_bytes = tensor.numel() * wanted.itemsize
            padded = _padded(num_bytes)
            words = self._map.words(offset, padded, grow=True)
            words[-ALIGNMENT // 8 :] = 0  # padding counts in the checksum
            words.view(torch.uint8)[:num_bytes].view(wanted).view(tensor.shape).copy_(tensor.detach())
            specs.append(TensorSpec(name, str(wanted).removeprefix("torch."), tuple(tensor.shape), offset, num_bytes, _checksum(words)))
            offset += padded
        if self._folder is not None:
            os.fsync(self._fd)
        return specs

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)
        if self._folder is not None:
            Path(self.path).unlink(missing_ok=True)


class SharedWeightsReader:
    """The receiver's side. Yields tensors that lie in the shared memory itself: copy what must outlive the next write."""

    def __init__(self, path: str) -> None:
        self.path, self._fd = path, os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map = _Mapping(self._fd)

    def read(self, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)`. Raises RuntimeError naming the tensor whose bytes are not those that were sent."""
        for spec in specs:
            words = self._map.words(spec.offset, _padded(spec.num_bytes))
            if _checksum(words) != spec.checksum:
                raise RuntimeError(f"weight transfer: the bytes of {spec.name} are not those that were sent (checksum)")
            yield spec.name, words.view(torch.uint8)[: spec.num_bytes].view(getattr(torch, spec.dtype)).view(spec.shape)

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


class _Mapping:
    """A shared memory file seen as int64 words; mapped anew when it grew."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._words = torch.empty(0, dtype=torch.int64)

    def words(self, offset: int, num_bytes: int, grow: bool = False) -> Tensor:
        if offset + num_bytes > self._words.numel() * 8:
            if grow:
                os.ftruncate(self._fd, max(2 * self._words.numel() * 8, offset + num_bytes))
            self._words = torch.frombuffer(mmap.mmap(self._fd, os.fstat(self._fd).st_size), dtype=torch.int64)
        return self._words[offset // 8 : (offset + num_bytes) // 8]

    def close(self) -> None:
        self._words = torch.empty(0, dtype=torch.int64)  # the mapping goes with its last view


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _checksum(words: Tensor) -> int:
    return int(words.sum())
