"""Messages between processes: JSON with its length in front, on a stream socket."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

LENGTH = struct.Struct("!I")
MAX_FRAME_BYTES = 16 << 20


class FrameError(Exception):
    """The other process sent something that is not a message."""


class ClosedError(FrameError):
    """The other process has ended or closed the socket."""


def pack(message: Any) -> bytes:
    """Returns a message as bytes.

    Raises:
        FrameError: It has more than MAX_FRAME_BYTES.
    """
    data = json.dumps(message, separators=(",", ":"), check_circular=False).encode()
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(data):,} bytes, at most {MAX_FRAME_BYTES:,}")
    return LENGTH.pack(len(data)) + data


def unpack_length(header: bytes | bytearray, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """Returns the length of a message, which the first LENGTH.size bytes of `header` contain.

    Raises:
        FrameError: The message has more than `max_bytes`.
    """
    (length,) = LENGTH.unpack_from(header)
    if length > max_bytes:
        raise FrameError(f"a message of {length:,} bytes, at most {max_bytes:,}")
    return int(length)


def unpack(data: bytes) -> Any:
    """Returns the message in `data` (without its length). Raises FrameError if it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a message that is no JSON: {error}") from None


def send(descriptor: int, message: Any) -> None:
    """Writes a message to a blocking socket.

    Raises:
        ClosedError: The other side is closed.
        FrameError: The message is too long.
    """
    data = memoryview(pack(message))
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            raise ClosedError(f"the other process has ended ({error})") from None


def receive(descriptor: int) -> Any:
    """Reads a message from a blocking socket.

    Raises:
        ClosedError: The other side is closed.
        FrameError: The message is too long or no JSON.
    """
    length = unpack_length(_read_exactly(descriptor, LENGTH.size))
    return unpack(_read_exactly(descriptor, length))


def without_surrogates(text: str) -> str:
    """Returns a text that can be encoded. JSON can contain lone surrogates, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _read_exactly(descriptor: int, length: int) -> bytes:
    parts = []
    while length > 0:
        try:
            part = os.read(descriptor, min(length, 1 << 20))
        except OSError as error:
            raise ClosedError(f"the other process has ended ({error})") from None
        if not part:
            raise ClosedError("the other process has ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
