"""A pool of vLLM servers as an engine: tokens in, tokens out.

A request goes to the server with the least to do, a prompt's completions together; it is asked again, with the same seed, elsewhere or
later when its server is lost. A server that comes back gets the weights that the others have before it is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo import ranks
from grpo.engines import EngineError, Request, SamplingOptions, SyncReport, Weights
from grpo.engines._weights import Sent
from grpo.engines.fleet import Fleet
from grpo.engines.server import Server
from grpo.types import Completion


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
        self, requests: Sequence[Request], options: SamplingOptions, on_progress: Callable[[int, int], None] | None = None
    ) -> list[tuple[Completion, ...]]:
        return self._run(self._generate(requests, options, on_progress), self._settings.timeout_s)

    def prove(self, requests: Sequence[Request], options: SamplingOptions) -> list[list[tuple[Completion, ...]]]:
        """Returns what each server that is up samples; a server that comes back later is held to it."""
        if not self._leads:
            return []
        found = self._run(self._prove(requests, options), self._settings.timeout_s)
        self._proof = (requests, options, found[0])
        return found

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Sends the weights to every server that is up; one that fails at it is lost, and gets them when it is back."""
        start, sent = time.monotonic(), Sent(weights, self._dtype)
        if not self._leads:
            for _ in weights:  # ZeRO-3: all ranks make them whole together
                pass
            self._version = version
            return SyncReport(version=version, seconds=time.monotonic() - start, num_bytes=0)
        self._run(self._sending.acquire(), self._settings.timeout_s)
        try:
            if self._weights is None:
                self._by_nccl(sent, version)
            else:
                self._update_info = self._weights.write(sent)
                self._run(self._update_all(version), self._settings.timeout_s)
            self._version = version
        finally:
            self._loop.call_soon_threadsafe(self._sending.release)
        self._submit(self._notify())
        return SyncReport(version=version, seconds=time.monotonic() - start, num_bytes=sent.num_bytes)

    def _by_nccl(self, sent: Sent, version: int) -> None:
        """A server that is lost on the way is left out of a second try; it gets weights with the next sync."""
        for last in (False, True):
            ready = [server for server in self._servers if server.up]
            if not ready:
                raise EngineError(f"weights {version}: no server is up: {', '.join(server.told() for server in self._servers)}")
            try:
                return self._nccl.send(ready, sent, version=version, limit_s=self._settings.timeout_s)
            except EngineError as error:
                if last:
                    raise
                self._say(f"engine: {error}; once more without those that are lost")
                for server in ready:
                    try:
                        self._run(self._call(server, "/health", timeout_s=10, method="GET"), 15)
                    except EngineError:
                        server.up = False
        raise AssertionError

    def begin(self, request: Request, options: SamplingOptions) -> Future[tuple[Completion, ...]]:
        """Begins a request without waiting for it. Weights may change while it is sampled: its completions tell which."""
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

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    async def _generate(
        self, requests: Sequence[Request], options: SamplingOptions, on_progress: Callable[[int, int], None] | None
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
        """Returns a request's completions, from whichever server; bounded retries, always with its seed."""
        tries = self._pool.retries + (0 if self._leads else int(self._settings.start_timeout_s))  # rank 0 alone knows which is up
        for attempt in range(tries + 1):
            server = await self._free(request.n)
            try:
                if not self._leads and self._version >= 0:  # rank 0 may be bringing it up
                    held = await self._call(server, "/weight_info", method="GET")
                    if held["weight_version"] != str(self._version):
                        raise EngineError(f"{server.url} has weights {held['weight_version']}, not {self._version}")
                return await self._ask(server, request, options, self._version)
            except EngineError as error:
                self.counts["retried"] += 1
                if self._leads:
                    server.up = False
                    await self._notify()
                else:
                    await asyncio.sleep(1.0)
                if attempt == tries:
                    raise EngineError(f"a request failed {attempt + 1} times (engine.servers.retries): the last time, {error}") from None
            finally:
                server.load -= request.n
                if not any(each.load for each in self._servers):
                    self._idle_since = time.monotonic()
                await self._notify()
        raise AssertionError

    async def _free(self, count: int) -> Server:
        """Returns the server with the least to do once it has room for `count` completions (or nothing to do), and counts them to it."""
        async with self._changed:
            while True:
                ready = [s for s in self._servers if not self._leads or (s.up and s.version == self._version)]
                room = [s for s in ready if not s.load or s.load + count <= self._settings.max_sequences]
                if room:
                    server = min(room, key=lambda s: s.load)
                    server.load += count
                    if self._idle_since is not None:
                        self._idle_s, self._idle_since = self._idle_s + time.monotonic() - self._idle_since, None
                    server.moved = max(server.moved, time.monotonic()) if server.load == count else server.moved
                    return server
                await self._watched()
                if self._transfer == "nccl" and self._leads and all(s.up for s in self._servers):
                    raise EngineError("every server was lost; by NCCL they get weights with the next sync only: go on with --resume")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 1.0)

    async def _prove(self, requests: Sequence[Request], options: SamplingOptions) -> list[list[tuple[Completion, ...]]]:
        async def by(server: Server) -> list[tuple[Completion, ...]]:
            return list(await asyncio.gather(*(self._ask(server, request, options, self._version) for request in requests)))

        ready = [server for server in self._servers if server.up and server.version == self._version]
        while not ready:
            await self._watched()
            await asyncio.sleep(0.2)
            ready = [server for server in self._servers if server.up and server.version == self._version]
        found = await asyncio.gather(*map(by, ready), return_exceptions=True)
        for server, rows in zip(ready, found, strict=True):
            if isinstance(rows, EngineError):
                server.up = False
            elif isinstance(rows, BaseException):
                raise rows
        good = [rows for rows in found if not isinstance(rows, BaseException)]
        return good or await self._prove(requests, options)
