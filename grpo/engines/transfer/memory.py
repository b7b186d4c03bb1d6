"""Transport `memory`: shared memory between processes of one machine.

The memory is a memfd, which engines open as /proc/PID/fd/N: it has no name, so nothing is left
behind however either side dies.
"""

from __future__ import annotations

import os
from typing import ClassVar

from grpo.engines import EngineError
from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.interface import SenderOptions, WeightReceiver
from grpo.engines.transfer.layout import MappedWeights, required_bytes


class MemorySender:
    """Writes the weights into shared memory, which is reused by the next send."""

    backend: ClassVar[str] = "grpo_memory"
    keeps_weights: ClassVar[bool] = True

    def __init__(self, options: SenderOptions) -> None:
        """Creates the shared memory; `options` are not used."""
        self.buffer_bytes = 0
        self._file_descriptor = os.memfd_create("grpo-weights", os.MFD_CLOEXEC)
        self._mapped = MappedWeights(self._file_descriptor)
        self.path = f"/proc/{os.getpid()}/fd/{self._file_descriptor}"

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Writes the weights, then has the receiver load them. Raises EngineError."""
        receiver.load_stored_weights(self.write(stream))

    def write(self, stream: WeightStream) -> dict[str, object]:
        """Writes the weights and returns the `UpdateInfo` (receivers.py) of their place.

        Raises EngineError if there is no room.
        """
        num_bytes = required_bytes(stream)
        try:
            self._mapped.reserve(num_bytes, allocate=False)
        except OSError as error:
            raise EngineError(
                f"no room for {num_bytes / 2**30:.2f} GB of weights in shared memory: "
                f"{error.strerror}"
            ) from None
        self._mapped.fill(stream)
        return {"path": self.path, "names": [info.name for info in stream.metadata()]}

    def close(self) -> None:
        """Frees the memory; an engine that still maps it keeps its own mapping."""
        self._mapped.close()
        if self._file_descriptor >= 0:
            os.close(self._file_descriptor)
            self._file_descriptor = -1
