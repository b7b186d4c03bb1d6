"""Turns Ctrl-C, SIGTERM and stopping callbacks into an exception where a run can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grpo.types import GrpoError

if TYPE_CHECKING:
    from grpo.run.callbacks import RowCallbacks


class RunInterruptedError(GrpoError):
    """The run received Ctrl-C or SIGTERM: it saves its state and stops."""


class Signals:
    """Stores the first SIGINT or SIGTERM, for which `raise_if_received` raises.

    The first signal restores the previous handlers, so a second one ends the process as usual.

    In a thread other than the main one, Python allows no handlers: a signal does not stop the run.
    """

    def __init__(
        self, callbacks: RowCallbacks | None = None, *, replaces_handlers: bool = True
    ) -> None:
        """Replaces the handlers of SIGINT and SIGTERM.

        Args:
            callbacks: Callbacks of the run. `raise_if_received` also raises if one of them has
                stopped the run.
            replaces_handlers: False to leave the handlers as they are: Ctrl-C then raises
                KeyboardInterrupt, and there is nothing to save.
        """
        self._received: str | None = None  # name of the first signal, e.g. "SIGTERM"
        self._callbacks = callbacks
        self._is_deferred = False
        self._previous_handlers: dict[int, Any] = {}
        is_main_thread = threading.current_thread() is threading.main_thread()
        if replaces_handlers and is_main_thread:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._received = signal.Signals(number).name
        self.restore_handlers()

    @property
    def stop_request(self) -> RunInterruptedError | None:
        """The error that stops the run: for a signal, or for a callback. None without one."""
        if self._received is not None:
            return RunInterruptedError(self._received)
        if self._callbacks is not None:
            return self._callbacks.stop_request
        return None

    def raise_if_received(self) -> None:
        """Raises the `stop_request`, if there is one, except within `deferred`."""
        if self._is_deferred:
            return
        stop_request = self.stop_request
        if stop_request is not None:
            raise stop_request

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
