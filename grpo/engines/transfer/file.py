"""Transport `file`: a safetensors file in a directory that every machine sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.interface import SenderOptions, WeightReceiver
from grpo.engines.transfer.layout import MappedWeights, no_room, required_bytes, update_info


class FileSender:
    """Writes the weights into a new file per send and deletes the file before it.

    A network file system shows a reader the content at the time when it opened the file, so a file
    is never written twice.
    """

    backend: ClassVar[str] = "grpo_file"
    keeps_weights: ClassVar[bool] = True

    def __init__(self, options: SenderOptions) -> None:
        """Creates the directory and a first, empty file.

        Deletes files that a killed trainer left there: nobody else uses `options.folder`.
        """
        if options.folder is None:
            raise ValueError("the transport `file` needs a folder")
        self.buffer_bytes = 0
        self._folder = options.folder
        self._num_written = 0
        for leftover in self._folder.glob("weights-*.safetensors"):
            leftover.unlink(missing_ok=True)
        self._open()

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_written += 1
        self.path = str((self._folder / f"weights-{self._num_written}.safetensors").absolute())
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._mapped = MappedWeights(os.open(self.path, flags, 0o600))

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Writes the weights, then has the receiver load them. Raises EngineError."""
        receiver.load_stored_weights(self.write(stream))

    def write(self, stream: WeightStream) -> dict[str, object]:
        """Writes the weights and returns the `UpdateInfo` (receivers.py) of their place.

        Raises EngineError if there is no room.
        """
        num_bytes = required_bytes(stream)
        try:
            self.close()
            self._open()
            self._mapped.reserve(num_bytes, allocate=True)
        except OSError as error:
            raise no_room(num_bytes, f"at {self.path}", error) from None
        self._mapped.fill(stream)
        self._mapped.flush()
        return update_info(self.path, stream)

    def close(self) -> None:
        """Deletes the file."""
        self._mapped.close()
        Path(self.path).unlink(missing_ok=True)
