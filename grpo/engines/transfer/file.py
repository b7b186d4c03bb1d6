"""Transport `file`: a safetensors file in a directory that all machines can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import ClassVar

from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.interface import SenderOptions, WeightReceiver
from grpo.engines.transfer.layout import (
    MappedWeights,
    no_space_error,
    required_bytes,
    update_info,
)
from grpo.types import UserError


class FileSender:
    """Deletes the file of the previous send and writes the weights to a new file.

    No file is written twice, because on a network file system a process may continue to read the
    content that a file had when the process opened it.
    """

    backend: ClassVar[str] = "grpo_file"
    keeps_weights: ClassVar[bool] = True

    def __init__(self, options: SenderOptions) -> None:
        """Creates the directory and a first, empty file.

        Deletes files that a killed trainer left in `options.folder`, which no other run may use.

        Raises:
            UserError: The directory is a link or belongs to another user.
        """
        if options.folder is None:
            raise ValueError("the transport `file` needs SenderOptions.folder")
        self.buffer_bytes = 0
        self._folder = options.folder
        self._num_files = 0
        _make_private(self._folder)
        for old_file in self._folder.glob("weights-*.safetensors"):
            old_file.unlink(missing_ok=True)
        self._open_new_file()

    def _open_new_file(self) -> None:
        self._num_files += 1
        self._file = (self._folder / f"weights-{self._num_files}.safetensors").absolute()
        # The file is new, and no link to another file that somebody else has created.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._mapped = MappedWeights(os.open(self._file, flags, 0o600))

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Writes the weights, then makes the receiver load them. Raises EngineError."""
        receiver.load_stored_weights(self.write(stream))

    def write(self, stream: WeightStream) -> dict[str, object]:
        """Writes the weights and returns their location: the fields of `UpdateInfo` (receivers.py).

        Raises EngineError if the disk has no space for them.
        """
        num_bytes = required_bytes(stream)
        try:
            self.close()
            self._open_new_file()
            self._mapped.reserve(num_bytes, allocate=True)
        except OSError as error:
            raise no_space_error(num_bytes, f"at {self._file}", error) from None
        self._mapped.fill(stream)
        self._mapped.flush()
        return update_info(str(self._file), stream)

    def close(self) -> None:
        """Deletes the file."""
        self._mapped.close()
        self._file.unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    """Creates a directory that only this user can read and write, or checks an existing one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
        return
    except FileExistsError:
        status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UserError(
            f"{folder}: a link, or the directory of another user. The weights are only written to "
            "a directory of your own: remove it or choose another run_dir"
        )
    folder.chmod(0o700)
