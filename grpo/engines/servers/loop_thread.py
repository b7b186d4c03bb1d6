"""An asyncio event loop in a background thread, for callers in synchronous code."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from grpo.engines import EngineTimeoutError

T = TypeVar("T")
POLL_INTERVAL_S = 0.2
CLOSE_TIMEOUT_S = 5.0


class LoopThread:
    """Runs coroutines in the event loop of a daemon thread."""

    def __init__(
        self,
        name: str,
        *,
        on_wait: Callable[[], None] = lambda: None,
        describe: Callable[[], str] = lambda: "",
    ) -> None:
        """Starts the thread.

        Args:
            name: the component that uses the loop, for messages.
            on_wait: called five times per second while `run` waits; may raise.
            describe: returns the state of that component, for the message of a timeout.
        """
        self._name = name
        self._on_wait = on_wait
        self._describe = describe
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name=name).start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine in the loop and returns its future without waiting."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Runs a coroutine in the loop and returns its result.

        The coroutine is cancelled after `timeout_s` seconds or when `on_wait` raises.

        Raises:
            EngineTimeoutError: The coroutine did not end in time.
        """
        future = self.submit(work)
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                concurrent.futures.wait([future], timeout=POLL_INTERVAL_S)
                if future.done():
                    return future.result()
                self._on_wait()
                if time.monotonic() > deadline:
                    raise EngineTimeoutError(
                        f"the {self._name} did not respond", timeout_s, self._describe()
                    )
        finally:
            future.cancel()

    def call_soon(self, function: Callable[[], None]) -> None:
        """Schedules a function in the loop's thread without waiting for it."""
        self._loop.call_soon_threadsafe(function)

    def close(self, cleanup: Coroutine[Any, Any, None]) -> None:
        """Cancels every coroutine, runs `cleanup` and stops the loop.

        Waits at most CLOSE_TIMEOUT_S seconds. Ignores exceptions of `cleanup`.
        """
        with contextlib.suppress(Exception):
            self.submit(_cancel_all_then(cleanup)).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _cancel_all_then(cleanup: Coroutine[Any, Any, None]) -> None:
    """Cancels all other tasks of the loop, then runs `cleanup`.

    A thread that waits for a task that is not cancelled would keep the process alive.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=2)
    await cleanup
