"""An asyncio event loop in a thread of its own, used from threads that do not know asyncio."""

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
CLOSE_LIMIT_S = 5.0


class LoopThread:
    """Runs coroutines in an event loop in a daemon thread."""

    def __init__(
        self,
        name: str,
        *,
        on_wait: Callable[[], None] = lambda: None,
        describe: Callable[[], str] = lambda: "",
    ) -> None:
        """Starts the thread.

        Args:
            name: of what works in the loop, for messages.
            on_wait: called five times a second while `run` waits; may raise.
            describe: the state of what works in the loop, for the message of a timeout.
        """
        self._name = name
        self._on_wait = on_wait
        self._describe = describe
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name=name).start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine in the loop and returns its future without waiting."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], limit_s: float = 60.0) -> T:
        """Runs a coroutine in the loop and returns its result.

        It is cancelled when the limit has passed or `on_wait` raises. Raises EngineTimeoutError.
        """
        future = self.submit(work)
        deadline = time.monotonic() + limit_s
        try:
            while True:
                concurrent.futures.wait([future], timeout=0.2)
                if future.done():
                    return future.result()
                self._on_wait()
                if time.monotonic() > deadline:
                    raise EngineTimeoutError(
                        f"the {self._name} did not answer", limit_s, self._describe()
                    )
        finally:
            future.cancel()

    def call_soon(self, function: Callable[[], None]) -> None:
        """Calls a function in the loop's thread, without waiting for it."""
        self._loop.call_soon_threadsafe(function)

    def close(self, cleanup: Coroutine[Any, Any, None]) -> None:
        """Cancels every coroutine, runs `cleanup` and stops the loop, within CLOSE_LIMIT_S."""
        with contextlib.suppress(Exception):
            self.submit(_cancel_all_then(cleanup)).result(CLOSE_LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _cancel_all_then(cleanup: Coroutine[Any, Any, None]) -> None:
    """Cancels all other tasks of the loop.

    A thread that waits for one of them would keep this process from ending.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=2)
    await cleanup
