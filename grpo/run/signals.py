"""Turns Ctrl-C and SIGTERM into an exception at points where a run can be saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from grpo.types import GrpoError


class RunInterruptedError(GrpoError):
    """The run received Ctrl-C or SIGTERM: it saves its state and stops."""


class Signals:
    """Handles SIGINT and SIGTERM: stores the first one, for which `raise_if_received` raises.

    The first signal restores the previous handlers, so a second one ends the process as usual.
    """

    def __init__(self) -> None:
        """Replaces the handlers of SIGINT and SIGTERM."""
        self.received: str | None = None  # name of the first signal, e.g. "SIGTERM"
        self._is_deferred = False
        self._previous_handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        self.restore_handlers()

    def raise_if_received(self) -> None:
        """Raises `RunInterruptedError` if a signal was received, except within `deferred`."""
        if self.received and not self._is_deferred:
            raise RunInterruptedError(self.received)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Prevents `raise_if_received` from raising within the context. Contexts do not nest.

        The first call after the context raises for a signal that arrived in it. Use it around a
        collective of several ranks: if one rank leaves, the others hang.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def restore_handlers(self) -> None:
        """Restores the previous handlers of SIGINT and SIGTERM."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
