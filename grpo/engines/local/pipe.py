"""Messages to a child process over a pipe, with a time limit in both directions.

A process that is frozen (SIGSTOP, a hung driver) takes no bytes: a message that is larger than the
pipe's buffer would be sent for ever, and one that it was sending would be received for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

POLL_S = 0.2  # between calls of `on_wait`


class LimitedPipe:
    """A `Connection` whose `send` and `receive` have time limits.

    After a TimeoutError a part of a message may be in the pipe, and a thread may still work on it:
    kill the child, and send nothing more.
    """

    def __init__(self, connection: Connection, on_wait: Callable[[], None]) -> None:
        """`on_wait` is called five times a second while waiting and may raise."""
        self._connection = connection
        self._on_wait = on_wait

    def send(self, message: Any, timeout_s: float) -> None:
        """Sends a message.

        Raises TimeoutError, or OSError (BrokenPipeError, ConnectionResetError) if the child ended.
        """
        self._run(lambda: self._connection.send(message), time.monotonic() + timeout_s)

    def receive(self, deadline: float) -> Any:
        """Returns the next message; `deadline` is a time of time.monotonic().

        Raises TimeoutError, or EOFError or ConnectionResetError if the child ended.
        """
        while True:
            self._on_wait()
            remaining_s = max(0.0, deadline - time.monotonic())
            if self._connection.poll(min(POLL_S, remaining_s)):
                return self._run(self._connection.recv, deadline)
            if remaining_s == 0.0:
                raise TimeoutError

    def close(self) -> None:
        """Closes this end. End the child before: a thread may still be sending to it."""
        self._connection.close()

    def _run(self, work: Callable[[], Any], deadline: float) -> Any:
        """Returns what `work` returns in a thread. Raises what it raises, or TimeoutError."""
        results: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(min(POLL_S, max(0.0, deadline - time.monotonic())))
        while thread.is_alive():
            if time.monotonic() >= deadline:
                raise TimeoutError
            self._on_wait()
            thread.join(min(POLL_S, max(0.0, deadline - time.monotonic())))
        if errors:
            raise errors[0]
        return results[0]
