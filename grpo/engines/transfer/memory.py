"""Transport `memory`: shared memory between processes of one machine.

The memory is a memfd, which engines open as /proc/PID/fd/N. It has no name in a file system, so the
kernel frees it when both sides have ended, also after a crash.
"""

from __future__ import annotations

import os
from typing import ClassVar

from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.interface import SenderOptions, WeightReceiver
from grpo.engines.transfer.layout import (
    MappedWeights,
    no_space_error,
    required_bytes,
    update_info,
)


class MemorySender:
    """Writes the weights to shared memory. Every send reuses the same memory."""

    backend: ClassVar[str] = "grpo_memory"
    keeps_weights: ClassVar[bool] = True

    def __init__(self, options: SenderOptions) -> None:
        """Creates the shared memory. `options` are not used."""
        self.buffer_bytes = 0
        file_descriptor = os.memfd_create("grpo-weights", os.MFD_CLOEXEC)
        self._mapped = MappedWeights(file_descriptor)
        self._path = f"/proc/{os.getpid()}/fd/{file_descriptor}"

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Writes the weights, then makes the receiver load them. Raises EngineError."""
        receiver.load_stored_weights(self.write(stream))

    def write(self, stream: WeightStream) -> dict[str, object]:
        """Writes the weights and returns their location: the fields of `UpdateInfo` (receivers.py).

        Raises EngineError if there is not enough memory for them.
        """
        num_bytes = required_bytes(stream)
        try:
            self._mapped.reserve(num_bytes, allocate=False)
        except OSError as error:
            raise no_space_error(num_bytes, "in shared memory", error) from None
        self._mapped.fill(stream)
        return update_info(self._path, stream)

    def close(self) -> None:
        """Frees the memory. An engine that still maps it keeps its own mapping."""
        self._mapped.close()
