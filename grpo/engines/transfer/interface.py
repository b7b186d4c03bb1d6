"""The protocols of a weight transfer: the sender of a transport and the receiver of an engine.

An engine passes the weights and a receiver to its sender and does not depend on the transport.

To add a transport, write

1. a `WeightSender` in a file of its own,
2. a receiving engine in receivers.py, registered in receiver_registration.py,
3. the condition of its use in choose.py, and its name in `ServerSettings.transfer` of
   grpo/config/sections.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from grpo.engines.transfer.checksums import WeightStream


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderOptions:
    """The options of a weight sender. Each transport uses some of them.

    Attributes:
        folder: a directory that only this run uses and all engines can read (transport `file`).
        limit_s: the time limit of one attempt of a send, in seconds (transport `nccl`).
        on_wait: called five times per second while a send waits. An exception that it raises ends
            the wait (transport `nccl`).
        say: prints a line for the user (transport `nccl`).
    """

    folder: Path | None = None
    limit_s: float = 600.0
    on_wait: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda _: None


class WeightReceiver(Protocol):
    """The receiver of weights: one engine, or all servers of a pool together.

    The first four methods are those of vLLM's `VLLMWeightSyncClient`. Every method raises
    EngineError if an engine fails or does not answer in time.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the engine to the transport. The keys of `init_info` depend on the transport."""

    def start_weight_update(self) -> None:
        """Begins an update. The engine does not sample until the update has ended."""

    def update_weights(self, update_info: Any) -> None:
        """Loads the weights that `update_info` describes."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends an update. The engine must acknowledge the weight version of this receiver."""

    def load_stored_weights(self, update_info: dict[str, Any]) -> None:
        """Runs a complete update from weights in shared memory or a file.

        The weights remain stored, so that several engines can load them independently.

        Args:
            update_info: the location of the weights: the fields of `UpdateInfo` (receivers.py).
        """


class WeightSender(Protocol):
    """The sending side of a transport.

    Attributes:
        backend: the name under which the receiving engine is registered with vLLM
            (receiver_registration.py).
        keeps_weights: True if the weights of the last send remain stored, so that an engine that
            starts later can load them without another send.
        buffer_bytes: the device memory that a send needs in each process, in bytes.
    """

    backend: ClassVar[str]
    keeps_weights: ClassVar[bool]
    buffer_bytes: int

    def __init__(self, options: SenderOptions) -> None:
        """Prepares the transport. No engine needs to be ready."""

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Sends every weight. Raises EngineError if the transfer or the receiver failed."""

    def close(self) -> None:
        """Frees the resources of the transport."""
