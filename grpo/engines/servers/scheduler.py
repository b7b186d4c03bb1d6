"""Selects a server for each request and retries failed requests.

A request goes to the least loaded server. All completions of a prompt are sampled by the same
server. If the server is lost, the request is sent again with the same seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from grpo.engines import (
    EngineError,
    MalformedResponseError,
    RejectedRequestError,
    Request,
    SamplingOptions,
)
from grpo.engines.servers.availability import Availability
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.types import Completion


class IdleClock:
    """Measures the time during which no request of this rank is pending."""

    def __init__(self) -> None:
        """Starts the clock: the pool is idle."""
        self._seconds = 0.0
        self._idle_since: float | None = time.monotonic()

    def start(self) -> None:
        """Starts the clock when the last request has ended."""
        self._idle_since = time.monotonic()

    def stop(self) -> None:
        """Stops the clock when a request begins."""
        if self._idle_since is not None:
            self._seconds += time.monotonic() - self._idle_since
            self._idle_since = None

    def read_and_reset(self) -> float:
        """Returns the idle seconds since the last call."""
        if self._idle_since is not None:
            now = time.monotonic()
            self._seconds += now - self._idle_since
            self._idle_since = now
        seconds = self._seconds
        self._seconds = 0.0
        return seconds


class Scheduler:
    """Samples requests on the available servers."""

    def __init__(
        self,
        state: PoolState,
        client: ServerClient,
        availability: Availability,
        *,
        max_sequences: int,
        retries: int,
    ) -> None:
        """Stores the options and starts the idle clock.

        Args:
            state: the pool's servers.
            client: sends requests to a server.
            availability: the servers that accept requests.
            max_sequences: number of completions that a server decodes at once.
            retries: retries per request, in addition to those of `availability`.
        """
        self.idle_clock = IdleClock()
        self._state = state
        self._client = client
        self._availability = availability
        self._max_sequences = max_sequences
        self._retries = retries

    async def sample(self, request: Request, options: SamplingOptions) -> tuple[Completion, ...]:
        """Returns the completions of a request, sampled by any server.

        Raises:
            RejectedRequestError: A server rejects the request. It is not retried.
            EngineError: The last retry failed, or no server can become available.
        """
        max_attempts = 1 + self._retries + self._availability.num_extra_retries
        attempt = 0
        while True:
            attempt += 1
            server = await self._reserve(request.n)
            num_starts = server.num_starts
            try:
                await self._availability.check_before_request(server)
                return await self.sample_on(server, request, options)
            except RejectedRequestError:
                raise
            except EngineError as error:
                await self._record_failure(server, num_starts, error)
                if attempt == max_attempts:
                    raise EngineError(
                        f"a request failed {attempt} times (engine.servers.retries); the last "
                        f"error: {error}"
                    ) from None
            finally:
                await self._release(server, request.n)

    async def sample_on(
        self, server: Server, request: Request, options: SamplingOptions
    ) -> tuple[Completion, ...]:
        """Returns the completions of a request, sampled by the given server.

        Checks the server while it waits, because the connection to a machine that disappears stays
        open.

        Raises:
            EngineError: The request failed, or the server was lost.
        """
        num_starts = server.num_starts
        generation = asyncio.ensure_future(
            self._client.generate(server, request, options, self._state.version)
        )
        try:
            while True:
                await asyncio.wait({generation}, timeout=self._availability.check_interval_s)
                if generation.done():
                    return generation.result()
                await self._availability.check_during_request(server, num_starts)
        finally:
            generation.cancel()

    async def _record_failure(self, server: Server, num_starts: int, error: EngineError) -> None:
        self._state.counts["retried"] += 1
        # A server that sends malformed responses is alive; a restart would not help.
        if not isinstance(error, MalformedResponseError):
            await self._availability.report_failure(server, num_starts)

    async def _reserve(self, num_completions: int) -> Server:
        """Waits for a server with room, adds the completions to its load and returns it.

        Chooses the least loaded server. A server without load has room for any number.
        """
        async with self._state.changed:
            while True:
                candidates = self._availability.candidates()
                with_room = [
                    server for server in candidates if self._has_room(server, num_completions)
                ]
                if with_room:
                    server = min(with_room, key=lambda server: server.load)
                    self._add_load(server, num_completions)
                    return server
                self._availability.raise_if_unrecoverable()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._state.changed.wait(), 1.0)

    def _has_room(self, server: Server, num_completions: int) -> bool:
        return server.load == 0 or server.load + num_completions <= self._max_sequences

    def _add_load(self, server: Server, num_completions: int) -> None:
        if server.load == 0:
            # The server was idle: the time until its first token counts from now.
            server.last_progress_at = max(server.last_progress_at, time.monotonic())
        server.load += num_completions
        self.idle_clock.stop()

    async def _release(self, server: Server, num_completions: int) -> None:
        server.load -= num_completions
        if not any(server.load for server in self._state.servers):
            self.idle_clock.start()
        await self._state.notify()
