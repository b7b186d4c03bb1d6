"""A pool of vLLM servers as an engine: tokens in, tokens out.

A request goes to the server with the least to do, a prompt's completions together; it is asked
again, with the same seed, elsewhere or later when its server is lost. A server that comes back gets
the weights that the others have before it is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo.engines import EngineError, RefusedError, Request, SamplingOptions, SyncReport, Weights
from grpo.engines.servers.fleet import HEALTH_S, Fleet
from grpo.engines.servers.server import Server
from grpo.engines.transfer.weights import Sent
from grpo.run import ranks
from grpo.types import Completion

# for so long a rank that does not watch the servers asks others than the one that failed
AVOID_S = 10.0


class Pool(Fleet):
    """An `Engine` of many. Every rank asks; rank 0 alone updates, and has the servers proved."""

    def wait_ready(self) -> dict[str, Any]:
        """Waits until every server answers. Raises EngineError naming one that does not start."""
        if self._leads:
            self._run(self._all_up(), self._settings.start_timeout_s + 5)
        urls = ranks.gather("the servers", [server.url for server in self._servers])[0]
        for server, url in zip(self._servers, urls, strict=True):
            server.url = url
        return {"servers": urls}

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns each request's completions, in order; any server may sample them."""
        return self._run(self._generate(requests, options, on_progress), self._settings.timeout_s)

    def prove(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Returns what each server that is up samples.

        A server that comes back later is held to it.
        """
        if not self._leads:
            return []
        found = self._run(self._prove(requests, options), self._settings.timeout_s)
        self._proof = (requests, options, found[0])
        return found

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Sends the weights to every server that is up.

        One that fails at it is lost, and gets them when it is back.
        """
        start, sent = time.monotonic(), Sent(weights, self._dtype)
        if not self._leads:
            for _ in weights:  # ZeRO-3: all ranks make them whole together
                pass
            self._version = version
            return SyncReport(version=version, seconds=time.monotonic() - start, num_bytes=0)
        self._run(self._sending.acquire(), self._settings.timeout_s + self._pool.sync_timeout_s)
        self._proof = None  # of other weights: who comes back now is proved with all
        try:
            if self._weights is None:
                self._by_nccl(sent, version)
            else:
                self._update_info = self._weights.write(sent)
                self._run(self._update_all(version), self._pool.sync_timeout_s + 60)
            self._version = version
        finally:
            self._loop.call_soon_threadsafe(self._sending.release)
        self._submit(self._notify())
        return SyncReport(
            version=version, seconds=time.monotonic() - start, num_bytes=sent.num_bytes
        )

    def _by_nccl(self, sent: Sent, version: int) -> None:
        """A server that is lost on the way is left out of a second try.

        It gets weights with the next sync.
        """
        for last in (False, True):
            ready = [server for server in self._servers if server.up]
            if not ready:
                raise EngineError(
                    f"weights {version}: no server is up: "
                    f"{', '.join(server.told() for server in self._servers)}"
                )
            try:
                return self._nccl.send(
                    ready, sent, version=version, limit_s=self._pool.sync_timeout_s
                )
            except EngineError as error:
                for server in ready:
                    self._run(self._settle(server), 60)
                # ZeRO-3 makes the weights whole with all ranks, once
                if last or self._nccl.stuck or ranks.count() > 1:
                    raise
                self._say(f"engine: {error}; once more without those that are lost")
        raise AssertionError

    async def _update_all(self, version: int) -> None:
        """Updates the servers that are up, all at once.

        Raises EngineError when all that are there refuse them.
        """
        found = [server for server in self._servers if server.up]
        errors = await asyncio.gather(
            *(self._update(server, version) for server in found), return_exceptions=True
        )
        for server, error in zip(found, errors, strict=True):
            if isinstance(error, EngineError):
                self._say(f"engine: weights {version} did not reach {server.url}: {error}")
                server.up = False
            elif error is not None:
                raise error
        if errors and all(
            isinstance(error, EngineError) and ": 500" in str(error) for error in errors
        ):
            # who is lost gets them when it is back
            raise EngineError(f"weights {version} were refused by every server: {errors[0]}")

    async def _settle(self, server: Server) -> None:
        """Ends a transfer that failed; a server whose engine does not answer then is lost."""
        with contextlib.suppress(EngineError):
            await self._call(server, "/finish_weight_update", {}, timeout_s=20)
        try:
            await self._call(server, "/weight_info", timeout_s=20, method="GET")
        except EngineError:
            server.up = False

    def begin(self, request: Request, options: SamplingOptions) -> Future[tuple[Completion, ...]]:
        """Begins a request without waiting for it.

        Weights may change while it is sampled: its completions tell which.
        """
        return self._submit(self._sampled(request, options))

    def idle(self) -> float:
        """Returns for how many seconds, since it was last asked, no server had anything to do."""
        if self._idle_since is not None:
            now = time.monotonic()
            self._idle_s, self._idle_since = self._idle_s + now - self._idle_since, now
        seconds, self._idle_s = self._idle_s, 0.0
        return seconds

    def reset_cache(self) -> None:
        """Nothing to do: requests carry the weights' version as their cache's salt."""

    def sleep(self) -> None:
        """Does nothing: the servers keep their memory."""

    def wake(self) -> None:
        """Does nothing: the servers do not sleep."""

    async def _generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[tuple[Completion, ...]]:
        done, total = 0, sum(request.n for request in requests)

        async def one(request: Request) -> tuple[Completion, ...]:
            nonlocal done
            found = await self._sampled(request, options)
            done += request.n
            if on_progress is not None:
                on_progress(done, total)
            return found

        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _sampled(self, request: Request, options: SamplingOptions) -> tuple[Completion, ...]:
        """Returns a request's completions, from whichever server.

        The number of retries is bounded; each has the request's seed.
        """
        # rank 0 alone knows which is up
        tries = self._pool.retries + (0 if self._leads else int(self._settings.start_timeout_s))
        for attempt in range(tries + 1):
            server = await self._free(request.n)
            starts = server.starts
            try:
                if not self._leads and self._version >= 0:  # rank 0 may be bringing it up
                    held = await self._call(server, "/weight_info", timeout_s=60, method="GET")
                    if held["weight_version"] != str(self._version):
                        raise EngineError(
                            f"{server.url} has weights {held['weight_version']}, not "
                            f"{self._version}"
                        )
                return await self._ask_while_up(server, request, options)
            except RefusedError:
                raise
            except EngineError as error:
                self.counts["retried"] += 1
                if not self._leads:
                    server.avoid = time.monotonic() + AVOID_S
                    await asyncio.sleep(1.0)
                elif server.starts == starts:  # and not back already
                    server.up = False
                    await self._notify()
                if attempt == tries:
                    raise EngineError(
                        f"a request failed {attempt + 1} times (engine.servers.retries): the last "
                        f"time, {error}"
                    ) from None
            finally:
                server.load -= request.n
                if not any(each.load for each in self._servers):
                    self._idle_since = time.monotonic()
                await self._notify()
        raise AssertionError

    async def _ask_while_up(
        self, server: Server, request: Request, options: SamplingOptions
    ) -> tuple[Completion, ...]:
        """Asks a server as `_ask` does, and gives up when the server is lost meanwhile.

        A machine that is gone breaks no connection.
        """
        starts, asked = (
            server.starts,
            asyncio.ensure_future(self._ask(server, request, options, self._version)),
        )
        try:
            while not (await asyncio.wait({asked}, timeout=1.0 if self._leads else HEALTH_S))[0]:
                if not self._leads:
                    await self._call(server, "/health", timeout_s=HEALTH_S, method="GET")
                elif not server.up or server.starts != starts:
                    raise EngineError(f"{server.told()} was lost")
            return asked.result()
        finally:
            asked.cancel()

    async def _free(self, count: int) -> Server:
        """Returns the least loaded server, with `count` completions added to its load.

        Waits until a server has room for them. A server without load has room for any number.
        """
        async with self._changed:
            while True:
                now = time.monotonic()
                if self._leads:
                    ready = [s for s in self._servers if s.up and s.version == self._version]
                else:
                    ready = [s for s in self._servers if s.avoid <= now] or self._servers
                room = [
                    s for s in ready if not s.load or s.load + count <= self._settings.max_sequences
                ]
                if room:
                    server = min(room, key=lambda s: s.load)
                    server.load += count
                    if self._idle_since is not None:
                        self._idle_s, self._idle_since = self._idle_s + now - self._idle_since, None
                    server.moved = max(server.moved, now) if server.load == count else server.moved
                    return server
                await self._watched()
                behind = self._leads and not ready and all(s.up for s in self._servers)
                if self._transfer == "nccl" and behind and not self._sending.locked():
                    raise EngineError(
                        "every server was lost; by NCCL they get weights with the next sync only: "
                        "go on with --resume"
                    )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 1.0)

    async def _prove(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        async def by(server: Server) -> list[tuple[Completion, ...]]:
            return list(await asyncio.gather(*(one(server, request) for request in requests)))

        async def one(server: Server, request: Request) -> tuple[Completion, ...]:
            server.load += request.n  # watched, then, for a stall
            try:
                return await self._ask_while_up(server, request, options)
            finally:
                server.load -= request.n

        ready = [
            server for server in self._servers if server.up and server.version == self._version
        ]
        while not ready:
            await self._watched()
            await asyncio.sleep(0.2)
            ready = [
                server for server in self._servers if server.up and server.version == self._version
            ]
        found = await asyncio.gather(*map(by, ready), return_exceptions=True)
        for server, rows in zip(ready, found, strict=True):
            if isinstance(rows, EngineError):
                server.up = False
            elif isinstance(rows, BaseException):
                raise rows
        good = [rows for rows in found if not isinstance(rows, BaseException)]
        return good or await self._prove(requests, options)
