"""Supervision of the servers on rank 0: health checks, restarts and recovery."""

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

CHECK_INTERVAL_S = 1.0  # interval between two checks of a server, and timeout of each check
HEALTH_TIMEOUT_S = 20.0  # a server that does not respond for this long is lost
START_CHECK_TIMEOUT_S = 5.0  # timeout of a health check while a server starts
RESET_TIMEOUT_S = 60.0  # timeout of each request that resets a remote server
# The largest mean |logprob difference| between a recovered server and the reference samples.
MAX_LOGPROB_GAP = 0.5


@dataclass(frozen=True, slots=True)
class ReferenceSamples:
    """Samples of a server with the current weights. A recovered server must reproduce them."""

    requests: Sequence[Request]
    options: SamplingOptions
    completions: Sequence[tuple[Completion, ...]]


class Supervisor:
    """Keeps the servers running and their weights current."""

    def __init__(
        self,
        state: PoolState,
        updates: WeightUpdates,
        settings: configs.EngineSettings,
        *,
        keeps_weights: bool,
        say: Callable[[str], None],
    ) -> None:
        """Stores the options. `start` starts the supervision.

        Args:
            state: the pool's servers.
            updates: updates the weights of a server.
            settings: the engine section of the config, with `servers`.
            keeps_weights: whether a server can load the current weights without another send
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
        self._update_info: dict[str, Any] = {}  # where the weights stored last can be read
        self._num_restarts = 0
        # Held during a sync, and by a server that loads weights outside of a sync.
        self._sync_lock = asyncio.Lock()
        self._watch_tasks: list[Future[None]] = []

    def start(self, loop: LoopThread) -> None:
        """Starts watching every server."""
        self._watch_tasks = [loop.submit(self._watch(server)) for server in self.state.servers]

    def stop_watch(self) -> None:
        """Stops watching the servers. No server is restarted afterwards."""
        tasks = self._watch_tasks
        self._watch_tasks = []
        for task in tasks:
            task.cancel()

    def kill_servers(self) -> None:
        """Kills the local servers."""
        for server in self.state.servers:
            try:
                server.kill()
            except EngineError as error:
                self._say(f"engine: {error}")

    @contextlib.contextmanager
    def sync_in_progress(self, loop: LoopThread) -> Iterator[None]:
        """Prevents recovered servers from loading weights while a sync replaces them.

        Raises:
            EngineError: A server that is loading weights does not finish in time.
        """
        timeout_s = self._settings.timeout_s + self._servers.sync_timeout_s
        loop.run(self._acquire_sync_lock(), timeout_s)
        try:
            yield
        finally:
            loop.call_soon(self._sync_lock.release)

    async def _acquire_sync_lock(self) -> None:
        await self._sync_lock.acquire()

    async def wait_all_up(self) -> None:
        """Waits until every server is up. Raises the error that ended the watch of a server."""
        while len(self.state.up_servers()) < len(self.state.servers):
            self.raise_if_watch_ended()
            await asyncio.sleep(0.1)

    def raise_if_watch_ended(self) -> None:
        """Raises the error that ended the watch of a server, if one has ended.

        A server that is not watched cannot recover.
        """
        for task in self._watch_tasks:
            if task.done():
                task.result()

    def raise_if_unrecoverable(self) -> None:
        """Raises EngineError if waiting for a server with the current weights cannot succeed.

        Either the watch of a server has ended, or every server was lost and the transport cannot
        send the current weights again before the next sync.
        """
        self.raise_if_watch_ended()
        if self._keeps_weights or self._sync_lock.locked():
            return
        all_up = len(self.state.up_servers()) == len(self.state.servers)
        if all_up and not self.state.current_servers():
            raise EngineError(
                "every server was lost, and the transport nccl sends weights to restarted servers "
                "only in the next sync: continue the run with --resume"
            )

    async def report_failure(self, server: Server, num_starts: int) -> None:
        """Marks a server as lost after a failed request, unless it has been restarted since."""
        if server.num_starts == num_starts:
            server.up = False
            await self.state.notify()

    async def load_stored_weights(self, version: int, update_info: dict[str, Any]) -> None:
        """Loads stored weights on all servers that are up, concurrently.

        A server that fails is lost. It loads the weights when it recovers.

        Args:
            version: the version of the weights.
            update_info: where the weights can be read.

        Raises:
            EngineError: Every server reports that the weights are wrong (status 500).
        """
        self._update_info = update_info
        servers = self.state.up_servers()
        results = await asyncio.gather(
            *(self._updates.load_stored(server, version, update_info) for server in servers),
            return_exceptions=True,
        )
        rejections = []
        for server, error in zip(servers, results, strict=True):
            if isinstance(error, EngineError):
                self._say(f"engine: weights {version} did not reach {server.url}: {error}")
                server.up = False
                if isinstance(error, ServerError) and error.status == 500:
                    rejections.append(error)
            elif error is not None:
                raise error
        if rejections and len(rejections) == len(servers):
            raise EngineError(f"every server rejected weights {version}: {rejections[0]}")

    async def _watch(self, server: Server) -> None:
        """Brings a server up, and again each time that it is lost, until cancelled.

        Raises:
            EngineError: The server cannot be brought up before the first sync, local servers were
                lost more than `engine.servers.restarts` times, or a lost process did not end.
        """
        while True:
            try:
                await self._bring_up(server)
                await self._mark_up(server)
                reason = await self._wait_until_lost(server)
            except EngineError as error:
                # A server that does not start before the first sync is probably misconfigured.
                if self.state.version < 0:
                    raise
                reason = str(error)
                await asyncio.sleep(CHECK_INTERVAL_S)
            server.up = False
            server.version = -1
            self.state.counts["lost"] += 1
            self._say(f"engine: lost {server.describe()}: {reason}")
            if server.is_local:
                await self._restart(server, reason)
            await self.state.notify()

    async def _bring_up(self, server: Server) -> None:
        """Waits until the server responds, loads the current weights and verifies its samples."""
        await self._wait_for_health(server)
        if not server.is_local:
            await self._reset_remote_server(server)
        if not self._keeps_weights:  # the next sync sends weights to the server
            return
        await self._load_current_weights(server)
        if self.reference is not None:
            await self._compare_samples(server, self.reference)

    async def _wait_for_health(self, server: Server) -> None:
        """Waits until the server responds. The wait for a remote server has no time limit.

        If the process of a local server ends, it is started a second time.

        Raises:
            EngineError: The second process of a local server ended too, or a local server did not
                start in time.
        """
        timeout_s = self._settings.start_timeout_s
        deadline = time.monotonic() + timeout_s
        started_again = False
        while not await self._is_healthy(server):
            if server.has_ended:
                if started_again:
                    raise EngineError(f"the server does not start: {server.describe()}")
                started_again = True
                server.start(self._port_for_second_start())
            elif server.is_local and time.monotonic() > deadline:
                raise EngineTimeoutError("the server did not start", timeout_s, server.describe())
            await asyncio.sleep(0.2)

    async def _is_healthy(self, server: Server) -> bool:
        try:
            await self._client.check_health(server, START_CHECK_TIMEOUT_S)
        except EngineError:
            return False
        return True

    def _port_for_second_start(self) -> int | None:
        """Returns a new port, because another process may use the first one.

        Returns None (the same port) after the first sync, when the other ranks use the URL.
        """
        if self.state.version < 0:
            return free_port()
        return None

    async def _reset_remote_server(self, server: Server) -> None:
        """Ends requests and updates that another trainer did not finish. Raises EngineError."""
        for path in ("/abort_requests", "/finish_weight_update", "/resume"):
            with contextlib.suppress(EngineError):
                await self._client.post(server, path, {}, RESET_TIMEOUT_S)
        await self._client.weight_version(server, RESET_TIMEOUT_S)

    async def _load_current_weights(self, server: Server) -> None:
        """Connects a server to the transport and loads the current weights, if there are any.

        Raises EngineError.
        """
        async with self._sync_lock, self._updates.time_limit(server, self.state.version):
            await self._updates.init(server, {})
            if self.state.version < 0:
                return
            # Other ranks may have sent requests already: abort them, the weights are still random.
            await self._client.post(server, "/pause?mode=abort", {})
            await self._updates.load_stored(server, self.state.version, self._update_info)
            await self._client.post(server, "/reset_prefix_cache", {})
            await self._client.post(server, "/resume", {})

    async def _compare_samples(self, server: Server, reference: ReferenceSamples) -> None:
        """Raises EngineError if the server's samples differ from the reference samples."""
        version = self.state.version
        completions = []
        async with self._updates.time_limit(server, version):
            for request in reference.requests:
                completions.append(
                    await self._client.generate(server, request, reference.options, version)
                )
        gap = mean_logprob_gap(reference.completions, completions)
        if not gap < MAX_LOGPROB_GAP:  # `not <` also rejects NaN
            raise EngineError(
                f"{server.describe()}: the recovered server disagrees with the others: mean "
                f"|logprob difference| {gap:.4g}, limit {MAX_LOGPROB_GAP:g}"
            )
        self._say(
            f"engine: {server.url} is back with weights {version} "
            f"(mean |logprob difference| {gap:.1e})"
        )

    async def _mark_up(self, server: Server) -> None:
        """Marks a server as up, after it has loaded the latest weights. Raises EngineError.

        If the transport does not keep the weights, the server gets them in the next sync.
        """
        async with self._sync_lock:
            # A sync may have ended after the server loaded its weights.
            if self._keeps_weights and server.version != self.state.version:
                await self._updates.load_stored(server, self.state.version, self._update_info)
            now = time.monotonic()
            server.last_response_at = now
            server.last_progress_at = now
            server.num_generated_tokens = -1.0
            server.num_starts += 1
            server.up = True
        await self.state.notify()

    async def _wait_until_lost(self, server: Server) -> str:
        """Checks a server until it is lost. Returns the reason."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            reason = await self._reason_for_loss(server)
            if reason is not None:
                return reason

    async def _reason_for_loss(self, server: Server) -> str | None:
        """Checks a server once. Returns why it is lost, or None if it is not."""
        if not server.up:
            return "a request to it failed"
        if server.has_ended:
            return "its process ended"
        try:
            await self._client.check_health(server, CHECK_INTERVAL_S)
        except EngineDeadError:
            return "it reports that its engine is dead"
        except EngineError:
            pass  # One late response is not a loss: the time since the last response decides.
        if time.monotonic() - server.last_response_at > HEALTH_TIMEOUT_S:
            return f"no response for {HEALTH_TIMEOUT_S:g} s"
        await self._update_progress(server)
        stall_s = self._servers.stall_s
        if time.monotonic() - server.last_progress_at > stall_s:
            return f"no token generated for {stall_s:g} s (engine.servers.stall_s)"
        return None

    async def _update_progress(self, server: Server) -> None:
        """Sets `last_progress_at` if the server generated tokens, is idle or is loading weights."""
        try:
            num_tokens = await self._client.num_generated_tokens(server, CHECK_INTERVAL_S)
        except EngineError:
            return
        is_loading_weights = server.version != self.state.version
        is_waiting_for_tokens = server.load > 0 and not is_loading_weights
        if num_tokens != server.num_generated_tokens or not is_waiting_for_tokens:
            server.num_generated_tokens = num_tokens
            server.last_progress_at = time.monotonic()

    async def _restart(self, server: Server, reason: str) -> None:
        self._num_restarts += 1
        max_restarts = self._servers.restarts
        if self._num_restarts > max_restarts:
            raise EngineError(
                f"{self._num_restarts} local servers were lost, more than "
                f"engine.servers.restarts={max_restarts}; the last one: {server.describe()}: "
                f"{reason}"
            )
        await asyncio.to_thread(server.kill)
        server.start()
        self.state.counts["restarted"] += 1


def mean_logprob_gap(
    first: Sequence[tuple[Completion, ...]], second: Sequence[tuple[Completion, ...]]
) -> float:
    """Returns the mean |logprob difference| between two samplings of the same requests.

    Two completions are compared up to their first different token. If the first pair of nonempty
    completions differs in its first token, it counts as a gap of 1, so that the mean is defined. A
    later pair that differs in its first token does not count.

    Args:
        first: the completions of each request in one sampling.
        second: the completions of each request in the other sampling.
    """
    gaps: list[float] = []
    for first_row, second_row in zip(first, second, strict=True):
        for first_completion, second_completion in zip(first_row, second_row, strict=True):
            gaps += _logprob_gaps(first_completion, second_completion)
            if not gaps and first_completion.token_ids and second_completion.token_ids:
                gaps.append(1.0)
    return sum(gaps) / len(gaps)


def _logprob_gaps(first: Completion, second: Completion) -> list[float]:
    """Returns the |logprob difference| of each token before the first different token."""
    gaps = []
    for first_token, second_token, first_logprob, second_logprob in zip(
        first.token_ids, second.token_ids, first.logprobs, second.logprobs, strict=False
    ):
        if first_token != second_token:
            break
        gaps.append(abs(first_logprob - second_logprob))
    return gaps
