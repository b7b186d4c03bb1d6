"""Chooses a server for each request and retries a request that failed.

A request goes to the server with the least to do, the completions of a prompt together. When its
server is lost it is sent again, with the same seed, to another server or later.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from grpo.engines import (
    EngineError,
    MalformedResponseError,
    RefusedError,
    Request,
    SamplingOptions,
)
from grpo.engines.servers.availability import Availability
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.types import Completion


class IdleClock:
    """Measures for how many seconds no server has anything to do."""

    def __init__(self) -> None:
        """Starts idle."""
        self._seconds = 0.0
        self._idle_since: float | None = time.monotonic()

    def start(self) -> None:
        """Starts to count: no server has anything to do from now on."""
        self._idle_since = time.monotonic()

    def stop(self) -> None:
        """Stops counting: a server has something to do from now on."""
        if self._idle_since is not None:
            self._seconds += time.monotonic() - self._idle_since
            self._idle_since = None

    def take(self) -> float:
        """Returns the seconds counted since the last call."""
        if self._idle_since is not None:
            now = time.monotonic()
            self._seconds += now - self._idle_since
            self._idle_since = now
        seconds = self._seconds
        self._seconds = 0.0
        return seconds


class Scheduler:
    """Samples requests on the servers that are available."""

    def __init__(
        self,
        state: PoolState,
        client: ServerClient,
        availability: Availability,
        *,
        max_sequences: int,
        retries: int,
    ) -> None:
        """Begins nothing yet.

        Args:
            state: the pool's servers.
            client: asks a server.
            availability: which servers may be asked.
            max_sequences: completions that a server decodes at once.
            retries: of a request that failed.
        """
        self.idle_clock = IdleClock()
        self._state = state
        self._client = client
        self._availability = availability
        self._max_sequences = max_sequences
        self._retries = retries

    async def sample(self, request: Request, options: SamplingOptions) -> tuple[Completion, ...]:
        """Returns a request's completions, from any server.

        Raises RefusedError at once, another EngineError after the last retry.
        """
        num_tries = 1 + self._retries + self._availability.num_extra_tries
        attempt = 0
        while True:
            attempt += 1
            server = await self._reserve(request.n)
            starts = server.starts
            try:
                await self._availability.check_before(server)
                return await self.sample_on(server, request, options)
            except RefusedError:
                raise
            except EngineError as error:
                self._state.counts["retried"] += 1
                # a server whose answer cannot be decoded is alive: starting it again helps nobody
                if not isinstance(error, MalformedResponseError):
                    await self._availability.report_failure(server, starts)
                if attempt == num_tries:
                    raise EngineError(
                        f"a request failed {attempt} times (engine.servers.retries): the last "
                        f"time, {error}"
                    ) from None
            finally:
                await self._release(server, request.n)

    async def sample_on(
        self, server: Server, request: Request, options: SamplingOptions
    ) -> tuple[Completion, ...]:
        """Returns a request's completions from this server.

        Gives up when the server is lost meanwhile: a machine that is gone breaks no connection.
        Raises EngineError.
        """
        starts = server.starts
        answer = asyncio.ensure_future(
            self._client.generate(server, request, options, self._state.version)
        )
        try:
            while True:
                await asyncio.wait({answer}, timeout=self._availability.check_every_s)
                if answer.done():
                    return answer.result()
                await self._availability.check_during(server, starts)
        finally:
            answer.cancel()

    async def _reserve(self, count: int) -> Server:
        """Returns the least loaded server, with `count` completions added to its load.

        Waits until a server has room for them. A server without load has room for any number.
        """
        async with self._state.changed:
            while True:
                candidates = self._availability.candidates()
                with_room = [server for server in candidates if self._has_room(server, count)]
                if with_room:
                    server = min(with_room, key=lambda server: server.load)
                    self._add_load(server, count)
                    return server
                self._availability.raise_if_hopeless()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._state.changed.wait(), 1.0)

    def _has_room(self, server: Server, count: int) -> bool:
        return server.load == 0 or server.load + count <= self._max_sequences

    def _add_load(self, server: Server, count: int) -> None:
        if server.load == 0:  # it had nothing to do: the time until its first token begins now
            server.last_progress_at = max(server.last_progress_at, time.monotonic())
        server.load += count
        self.idle_clock.stop()

    async def _release(self, server: Server, count: int) -> None:
        server.load -= count
        if not any(server.load for server in self._state.servers):
            self.idle_clock.start()
        await self._state.notify()
