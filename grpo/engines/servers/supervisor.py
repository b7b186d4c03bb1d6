"""Rank 0's watch over the servers: starts, health, restarts, and the way back of a lost server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from grpo import config as configs
from grpo.engines import (
    EngineDeadError,
    EngineError,
    EngineTimeoutError,
    Request,
    SamplingOptions,
    ServerError,
)
from grpo.engines.servers.loop_thread import LoopThread
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.weight_updates import WeightUpdates
from grpo.run.addresses import free_port
from grpo.types import Completion

WATCH_S = 1.0  # between looks at a server
HEALTH_S = 20.0  # a server that does not answer for so long is lost
RECOVER_S = 60.0  # the longest wait for an answer of a server that the pool did not start
MAX_SAMPLE_GAP = 0.5  # mean |difference of logprobs| of a server that came back to the others


@dataclass(frozen=True, slots=True)
class ReferenceSamples:
    """What servers with the current weights sampled: a server that comes back must agree."""

    requests: Sequence[Request]
    options: SamplingOptions
    completions: Sequence[tuple[Completion, ...]]


class Supervisor:
    """Keeps the servers alive and their weights current."""

    def __init__(
        self,
        state: PoolState,
        updates: WeightUpdates,
        settings: configs.Engine,
        *,
        keeps_weights: bool,
        say: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            state: the pool's servers.
            updates: the steps of an update of a server's weights.
            settings: the engine's settings, with `servers`.
            keeps_weights: whether a server can take the current weights without another send
                (`WeightSender.keeps_weights`).
            say: prints a line for the user.
        """
        if settings.servers is None:
            raise ValueError("a supervisor needs settings.servers")
        self.state = state
        self.reference: ReferenceSamples | None = None
        self._client = updates.client
        self._updates = updates
        self._settings = settings
        self._servers = settings.servers
        self._keeps_weights = keeps_weights
        self._say = say
        self._update_info: dict[str, Any] = {}  # of the weights stored last
        self._num_restarts = 0
        self._sync_lock = asyncio.Lock()  # held during a sync and by a server that catches up
        self._watch_tasks: list[Future[None]] = []

    def start(self, loop: LoopThread) -> None:
        """Starts the watch over every server."""
        self._watch_tasks = [loop.submit(self._watch(server)) for server in self.state.servers]

    def stop_watch(self) -> None:
        """Ends the watch: no server is started after it."""
        tasks = self._watch_tasks
        self._watch_tasks = []
        for task in tasks:
            task.cancel()

    def kill_servers(self) -> None:
        """Kills the servers that were started here."""
        for server in self.state.servers:
            try:
                server.kill()
            except EngineError as error:
                self._say(f"engine: {error}")

    @contextlib.contextmanager
    def sync_in_progress(self, loop: LoopThread) -> Iterator[None]:
        """Within it no server catches up with the weights: a sync replaces them.

        Raises EngineError if a server that catches up does not end in time.
        """
        limit_s = self._settings.timeout_s + self._servers.sync_timeout_s
        loop.run(self._acquire_sync_lock(), limit_s)
        try:
            yield
        finally:
            loop.call_soon(self._sync_lock.release)

    async def _acquire_sync_lock(self) -> None:
        await self._sync_lock.acquire()

    async def wait_all_up(self) -> None:
        """Waits until every server is up. Raises what ended the watch over one."""
        while len(self.state.up_servers()) < len(self.state.servers):
            self.raise_if_watch_ended()
            await asyncio.sleep(0.1)

    def raise_if_watch_ended(self) -> None:
        """Raises what ended the watch over a server: without the watch no server comes back."""
        for task in self._watch_tasks:
            if task.done():
                task.result()

    def raise_if_hopeless(self) -> None:
        """Raises an error if waiting for a server with the current weights is in vain.

        The watch has ended, or every server was lost and none can get weights before the next sync.
        """
        self.raise_if_watch_ended()
        if self._keeps_weights or self._sync_lock.locked():
            return
        all_up = len(self.state.up_servers()) == len(self.state.servers)
        if all_up and not self.state.current_servers():
            raise EngineError(
                "every server was lost; by NCCL they get weights with the next sync only: "
                "go on with --resume"
            )

    async def report_failure(self, server: Server, starts: int) -> None:
        """Marks a server as lost after a failed request, unless it was started again since."""
        if server.starts == starts:
            server.up = False
            await self.state.notify()

    async def load_stored_weights(self, version: int, update_info: dict[str, Any]) -> None:
        """Has all servers that are up load stored weights, all at once.

        A server that fails at it is lost and gets them when it is back. Raises EngineError if every
        server answers that the weights are wrong.
        """
        self._update_info = update_info
        servers = self.state.up_servers()
        results = await asyncio.gather(
            *(self._updates.load_stored(server, version, update_info) for server in servers),
            return_exceptions=True,
        )
        refusals = []
        for server, error in zip(servers, results, strict=True):
            if isinstance(error, EngineError):
                self._say(f"engine: weights {version} did not reach {server.url}: {error}")
                server.up = False
                if isinstance(error, ServerError) and error.status == 500:
                    refusals.append(error)
            elif error is not None:
                raise error
        if refusals and len(refusals) == len(servers):
            raise EngineError(f"weights {version} were refused by every server: {refusals[0]}")

    async def _watch(self, server: Server) -> None:
        """Brings a server up, watches it, and brings it up again when it is lost, for ever.

        Raises EngineError when the server cannot be started before the first weights were sent, or
        when there were too many restarts.
        """
        while True:
            try:
                await self._bring_up(server)
                await self._mark_up(server)
                reason = await self._wait_until_lost(server)
            except EngineError as error:
                # nothing has run yet: a server that does not start is the user's to repair
                if self.state.version < 0:
                    raise
                reason = str(error)
                await asyncio.sleep(WATCH_S)
            server.up = False
            server.version = -1
            self.state.counts["lost"] += 1
            self._say(f"engine: lost {server.describe()}: {reason}")
            if server.local:
                await self._restart(server, reason)
            await self.state.notify()

    async def _mark_up(self, server: Server) -> None:
        async with self._sync_lock:
            # a sync may have ended since the server was brought up
            if self._keeps_weights and server.version != self.state.version:
                await self._updates.load_stored(server, self.state.version, self._update_info)
            now = time.monotonic()
            server.last_response_at = now
            server.last_progress_at = now
            server.num_generated_tokens = -1.0
            server.starts += 1
            server.up = True
        await self.state.notify()

    async def _restart(self, server: Server, reason: str) -> None:
        self._num_restarts += 1
        if self._num_restarts > self._servers.restarts:
            raise EngineError(
                f"{self._num_restarts} servers were lost (engine.servers.restarts), the last: "
                f"{server.describe()}: {reason}"
            )
        await asyncio.to_thread(server.kill)
        server.start()
        self.state.counts["restarted"] += 1

    async def _wait_until_lost(self, server: Server) -> str:
        """Returns why the server is lost, once it is."""
        while True:
            await asyncio.sleep(WATCH_S)
            reason = await self._reason_for_loss(server)
            if reason is not None:
                return reason

    async def _reason_for_loss(self, server: Server) -> str | None:
        """Returns why the server is lost, None if it is well or may still be."""
        if not server.up:
            return "a request to it failed"
        if server.has_ended:
            return "its process ended"
        try:
            await self._client.check_health(server, WATCH_S)
        except EngineDeadError:
            return "it says that its engine is dead"
        except EngineError:
            pass  # late once: the time since its last answer decides
        if time.monotonic() - server.last_response_at > HEALTH_S:
            return f"no answer for {HEALTH_S:g} s"
        await self._look_at_progress(server)
        if time.monotonic() - server.last_progress_at > self._servers.stall_s:
            return f"it made no token for {self._servers.stall_s:g} s (engine.servers.stall_s)"
        return None

    async def _look_at_progress(self, server: Server) -> None:
        """Notes the time if the server has generated tokens, or has none to generate."""
        try:
            num_tokens = await self._client.num_generated_tokens(server, WATCH_S)
        except EngineError:
            return
        is_taking_weights = server.version != self.state.version
        has_nothing_to_do = server.load == 0 or is_taking_weights
        if num_tokens != server.num_generated_tokens or has_nothing_to_do:
            server.num_generated_tokens = num_tokens
            server.last_progress_at = time.monotonic()

    async def _bring_up(self, server: Server) -> None:
        """Waits until the server answers, gives it the current weights and checks its samples."""
        await self._wait_for_health(server)
        if not server.local:
            await self._recover(server)
        if not self._keeps_weights:  # it gets weights with the next sync
            return
        await self._catch_up(server)
        if self.reference is not None:
            await self._compare_samples(server, self.reference)

    async def _wait_for_health(self, server: Server) -> None:
        """Waits until the server answers.

        A local process that ends is started once more. Raises EngineError if that one ends too, or
        if a local server takes too long.
        """
        limit_s = self._settings.start_timeout_s
        deadline = time.monotonic() + limit_s
        started_again = False
        while True:
            try:
                await self._client.check_health(server, 5.0)
            except EngineError:
                pass
            else:
                return
            if server.has_ended:
                if started_again:
                    raise EngineError(f"the server does not start: {server.describe()}")
                started_again = True
                # its port may have been taken; later the other ranks know the port
                server.start(free_port() if self.state.version < 0 else None)
            elif server.local and time.monotonic() > deadline:
                raise EngineTimeoutError("the server did not start", limit_s, server.describe())
            await asyncio.sleep(0.2)

    async def _recover(self, server: Server) -> None:
        """Ends what another trainer may have left unfinished. Raises EngineError."""
        for path in ("/abort_requests", "/finish_weight_update", "/resume"):
            with contextlib.suppress(EngineError):
                await self._client.post(server, path, {}, RECOVER_S)
        await self._client.weight_version(server, RECOVER_S)

    async def _catch_up(self, server: Server) -> None:
        """Has a server load the current weights, if there are any. Raises EngineError."""
        async with self._sync_lock, self._updates.limit(server, self.state.version):
            await self._updates.init(server, {})
            if self.state.version < 0:
                return
            # requests that other ranks sent too early are sampled from random weights
            await self._client.post(server, "/pause?mode=abort", {})
            await self._updates.load_stored(server, self.state.version, self._update_info)
            await self._client.post(server, "/reset_prefix_cache", {})
            await self._client.post(server, "/resume", {})

    async def _compare_samples(self, server: Server, reference: ReferenceSamples) -> None:
        """Raises EngineError if the server's samples differ from the other servers'."""
        version = self.state.version
        completions = []
        async with self._updates.limit(server, version):
            for request in reference.requests:
                completions.append(
                    await self._client.generate(server, request, reference.options, version)
                )
        gap = sample_gap(reference.completions, completions)
        if not gap < MAX_SAMPLE_GAP:
            raise EngineError(
                f"{server.describe()} came back and disagrees with the others: mean |difference "
                f"of logprobs| {gap:.4g}"
            )
        self._say(f"engine: {server.url} is back with weights {version} (gap {gap:.1e})")


def sample_gap(
    first: Sequence[tuple[Completion, ...]], second: Sequence[tuple[Completion, ...]]
) -> float:
    """Returns the mean |difference of logprobs| of two samplings of the same requests.

    Two completions are compared as far as their tokens agree. If the first tokens compared differ
    already, that counts as a gap of 1.
    """
    gaps: list[float] = []
    for first_row, second_row in zip(first, second, strict=True):
        for one, other in zip(first_row, second_row, strict=True):
            gaps += _logprob_gaps(one, other)
            if not gaps and one.token_ids and other.token_ids:
                gaps.append(1.0)
    return sum(gaps) / len(gaps)


def _logprob_gaps(one: Completion, other: Completion) -> list[float]:
    gaps = []
    tokens = zip(one.token_ids, other.token_ids, strict=False)
    logprobs = zip(one.logprobs, other.logprobs, strict=False)
    for (one_token, other_token), (one_logprob, other_logprob) in zip(
        tokens, logprobs, strict=False
    ):
        if one_token != other_token:
            break
        gaps.append(abs(one_logprob - other_logprob))
    return gaps
