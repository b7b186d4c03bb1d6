"""Messages between a process and its child over a pipe, with a time limit in both directions.

A frozen process (SIGSTOP, a hung driver) reads and writes no bytes. Without a limit, `send` would
block forever once the pipe's buffer is full, and `recv` would block forever on a message that the
process has written only partly.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

POLL_S = 0.2  # between two calls of `on_wait`


class LimitedPipe:
    """A `Connection` whose `send` and `receive` have time limits.

    After a TimeoutError or an exception of `on_wait`, the pipe may contain a part of a message, and
    a thread may still use it: kill the child and send nothing more.
    """

    def __init__(self, connection: Connection, on_wait: Callable[[], None]) -> None:
        """Takes over a connection.

        Args:
            connection: this process's end of the pipe.
            on_wait: called five times per second while a method waits. An exception that it raises
                ends the wait.
        """
        self._connection = connection
        self._on_wait = on_wait

    def send(self, message: Any, timeout_s: float) -> None:
        """Sends a message.

        Args:
            message: a value that can be pickled.
            timeout_s: the longest time in seconds.

        Raises:
            TimeoutError: the child did not read the message within `timeout_s`.
            OSError: the child ended (BrokenPipeError, ConnectionResetError).
        """
        deadline = time.monotonic() + timeout_s
        self._run_in_thread(functools.partial(self._connection.send, message), deadline)

    def receive(self, deadline: float) -> Any:
        """Returns the next message.

        Args:
            deadline: the end of the wait, on the clock of `time.monotonic()`.

        Raises:
            TimeoutError: no complete message arrived before the deadline.
            EOFError, ConnectionResetError: the child ended.
        """
        while True:
            self._on_wait()
            remaining_s = _seconds_until(deadline)
            if self._connection.poll(min(POLL_S, remaining_s)):
                return self._run_in_thread(self._connection.recv, deadline)
            if remaining_s == 0.0:
                raise TimeoutError

    def close(self) -> None:
        """Closes this end of the pipe. End the child first: a thread may still be sending to it."""
        self._connection.close()

    def _run_in_thread(self, work: Callable[[], Any], deadline: float) -> Any:
        """Runs `work` in a thread and returns its result.

        Raises the exception of `work`, or TimeoutError if it is still running at the deadline.
        """
        results: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(min(POLL_S, _seconds_until(deadline)))
        while thread.is_alive():
            if time.monotonic() >= deadline:
                raise TimeoutError
            self._on_wait()
            thread.join(min(POLL_S, _seconds_until(deadline)))
        if errors:
            raise errors[0]
        return results[0]


def _seconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
