"""Ctrl-C and SIGTERM, seen at safe points only."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from grpo.types import GrpoError


class Interrupted(GrpoError):
    """Ctrl-C or SIGTERM: the run saves and stops."""


class Signals:
    """Turns SIGINT and SIGTERM into `Interrupted` at safe points.

    A second one ends the process the ordinary way.
    """

    def __init__(self) -> None:
        """Installs the handlers of SIGINT and SIGTERM in place of those that were there."""
        self.got: str | None = None
        self._held = False
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number: int, frame: Any) -> None:
        self.got = signal.Signals(number).name
        self.restore()

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come, except within `held`."""
        if self.got and not self._held:
            raise Interrupted(self.got)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within this context no `check` interrupts.

        It is for an exchange of several ranks, which one of them must not leave.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
