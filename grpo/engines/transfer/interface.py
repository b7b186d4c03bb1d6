"""What the two sides of a weight transfer expect of each other.

An engine hands its sender the weights and a receiver; it does not know the transport. A new
transport is one file with a `WeightSender`, a receiving engine in receivers.py and its name in
receiver_registration.py; choose.py chooses it, and `Servers.transfer` of grpo/config/sections.py
allows its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from grpo.engines.transfer.checksums import WeightStream


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderOptions:
    """What a sender is made with.

    Attributes:
        folder: a directory of this run's own, visible to every engine (transport `file`).
        limit_s: the longest time of one send, in seconds (transport `nccl`).
        on_wait: called while a send waits; may raise.
        say: prints a line for the user.
    """

    folder: Path | None = None
    limit_s: float = 600.0
    on_wait: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda _: None


class WeightReceiver(Protocol):
    """The engine, or all servers of a pool at once, as a sender drives it.

    The first four methods are those of vLLM's `VLLMWeightSyncClient`. Every method raises
    EngineError when the engine fails or does not answer in time.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the engine to the transport."""

    def start_weight_update(self) -> None:
        """Begins an update; the engine samples nothing until it is finished."""

    def update_weights(self, update_info: Any) -> None:
        """Loads the weights that `update_info` describes."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends an update. The engine must acknowledge the receiver's weight version."""

    def load_stored_weights(self, update_info: dict[str, Any]) -> None:
        """Runs a whole update from weights that stay readable at the place `update_info` names.

        Each of several engines takes them at its own pace.
        """


class WeightSender(Protocol):
    """One transport, seen from the trainer.

    Attributes:
        backend: the name of the receiving engine for vLLM (receiver_registration.py).
        keeps_weights: whether the weights sent last stay readable, so that an engine that starts
            later takes them without another send.
        buffer_bytes: device memory that a send needs on each side, in bytes.
    """

    backend: ClassVar[str]
    keeps_weights: ClassVar[bool]
    buffer_bytes: int

    def __init__(self, options: SenderOptions) -> None:
        """Prepares the transport, as far as that is possible without an engine."""

    def send(self, stream: WeightStream, receiver: WeightReceiver) -> None:
        """Sends every weight. Raises EngineError."""

    def close(self) -> None:
        """Frees what the transport holds."""
