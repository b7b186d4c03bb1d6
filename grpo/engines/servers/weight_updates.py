"""Weight updates: the steps for one server, and a receiver that updates all servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from grpo.engines import EngineError, EngineTimeoutError, WrongWeightVersionError
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.loop_thread import LoopThread
from grpo.engines.servers.server import Server

if TYPE_CHECKING:
    from grpo.engines.servers.supervisor import Supervisor

# The longest wait for each request that ends a failed update.
END_FAILED_TIMEOUT_S = 20.0


class WeightUpdates:
    """The steps of a weight update of one server."""

    def __init__(self, client: ServerClient, sync_timeout_s: float) -> None:
        """Stores the client and the time limit.

        Args:
            client: sends requests to a server.
            sync_timeout_s: the longest duration of an update of one server.
        """
        self.client = client
        self.sync_timeout_s = sync_timeout_s

    async def load_stored(self, server: Server, version: int, update_info: dict[str, Any]) -> None:
        """Runs a complete update from weights that are stored where the server can read them.

        Args:
            server: the server to update.
            version: the version of the weights.
            update_info: where the weights can be read.

        Raises:
            EngineError: The update failed or took longer than `sync_timeout_s`.
        """
        server.version = -1
        async with self.time_limit(server, version), self._paused(server):
            await self.start(server)
            await self.update(server, update_info)
            await self.finish(server, version)

    async def init(self, server: Server, init_info: dict[str, Any]) -> None:
        """Connects a server to the transport. Raises EngineError."""
        await self.client.post(server, "/init_weight_transfer_engine", {"init_info": init_info})

    async def pause(self, server: Server) -> None:
        """Pauses sampling until `resume`; running requests are kept. Raises EngineError."""
        server.version = -1
        await self.client.post(server, "/pause?mode=keep", {})

    async def start(self, server: Server) -> None:
        """Begins an update. Raises EngineError."""
        await self.client.post(server, "/start_weight_update", {})

    async def update(self, server: Server, update_info: Any) -> None:
        """Loads the weights that `update_info` describes. Raises EngineError."""
        await self.client.post(server, "/update_weights", {"update_info": update_info})

    async def finish(self, server: Server, version: int) -> None:
        """Ends an update. Raises EngineError unless the server acknowledges `version`."""
        await self.client.post(server, "/finish_weight_update", {"weight_version": str(version)})
        reported_version = await self.client.weight_version(server)
        if reported_version != str(version):
            raise WrongWeightVersionError(server.describe(), reported_version, version)
        server.version = version

    async def resume(self, server: Server) -> None:
        """Resumes sampling; the prefix cache is kept. Raises EngineError."""
        await self.client.post(server, "/resume", {})

    async def end_failed(self, server: Server) -> None:
        """Ends a failed update. A server whose engine does not respond afterwards is lost."""
        with contextlib.suppress(EngineError):
            await self.client.post(server, "/finish_weight_update", {}, END_FAILED_TIMEOUT_S)
        try:
            await self.client.weight_version(server, END_FAILED_TIMEOUT_S)
        except EngineError:
            server.up = False

    @contextlib.asynccontextmanager
    async def time_limit(self, server: Server, version: int) -> AsyncIterator[None]:
        """Limits an update to `sync_timeout_s`. Raises EngineTimeoutError after that time.

        The limit is needed because a server with a hanging engine may still respond to /health.
        """
        limit_s = self.sync_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise EngineTimeoutError(
                f"{server.describe()} did not load weights {version}",
                limit_s,
                "see engine.servers.sync_timeout_s",
            ) from None

    @contextlib.asynccontextmanager
    async def _paused(self, server: Server) -> AsyncIterator[None]:
        """Pauses a server that is sampling, and resumes it afterwards with its cache."""
        is_sampling = server.load > 0
        if is_sampling:
            await self.client.post(server, "/pause?mode=keep", {})
        yield  # after an error the server is lost, so it is not resumed
        if is_sampling:
            await self.resume(server)


class ServersReceiver:
    """A `WeightReceiver` that loads one weight version on all servers that are up.

    It is also the `EngineGroup` of transfer/nccl.py. The methods block. Senders call them from
    threads outside the event loop.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        updates: WeightUpdates,
        loop: LoopThread,
        *,
        version: int,
        num_workers: int,
    ) -> None:
        """Stores the options. `members` selects the servers.

        Args:
            supervisor: has the state of the servers and loads stored weights on them.
            updates: the steps of an update of one server.
            loop: the event loop in which `updates` runs.
            version: the version of the weights.
            num_workers: GPUs per server.
        """
        self.version = version
        self.num_workers = num_workers
        self._supervisor = supervisor
        self._updates = updates
        self._loop = loop
        self._servers: list[Server] = []

    def members(self) -> list[tuple[str, int]]:
        """Selects the servers that are up and returns `(url, num_starts)` of each.

        Example: `[("http://127.0.0.1:8000", 1), ("http://127.0.0.1:8001", 2)]`.

        Raises:
            EngineError: No server is up.
        """
        state = self._supervisor.state
        self._servers = state.up_servers()
        if not self._servers:
            descriptions = ", ".join(server.describe() for server in state.servers)
            raise EngineError(f"weights {self.version}: no server is up: {descriptions}")
        return [(server.url, server.num_starts) for server in self._servers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects every server to the transport. Raises EngineError.

        Rank 0 of the transfer group is the sender. The workers of the servers have the following
        ranks, in the order of the servers.
        """

        def connect(server: Server) -> Coroutine[Any, Any, None]:
            first_rank = 1 + self._servers.index(server) * self.num_workers
            return self._updates.init(server, init_info | {"rank_offset": first_rank})

        self._run_on_all(connect)

    def start_weight_update(self) -> None:
        """Pauses every server, then begins an update on each. Raises EngineError."""
        self._run_on_all(self._updates.pause)
        self._run_on_all(self._updates.start)

    def update_weights(self, update_info: Any) -> None:
        """Loads weights on every server. Raises EngineError."""

        def update(server: Server) -> Coroutine[Any, Any, None]:
            return self._updates.update(server, update_info)

        self._run_on_all(update)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends the update of every server, then resumes them. Raises EngineError.

        `weight_version`, which vLLM's senders leave at None, is not used.
        """

        def finish(server: Server) -> Coroutine[Any, Any, None]:
            return self._updates.finish(server, self.version)

        self._run_on_all(finish)
        self._run_on_all(self._updates.resume)

    def load_stored_weights(self, update_info: dict[str, Any]) -> None:
        """Loads stored weights on every server. A server that fails is lost.

        Raises:
            EngineError: Every server rejects the weights, or the updates did not end in time.
        """
        # The time limit of each server's update (`WeightUpdates.time_limit`) must expire first.
        timeout_s = self._updates.sync_timeout_s + 60
        self._loop.run(self._supervisor.load_stored_weights(self.version, update_info), timeout_s)

    def end_failed_update(self) -> None:
        """Ends a failed update. A server whose engine does not respond afterwards is lost."""
        for server in self._servers:
            self._loop.run(self._updates.end_failed(server))

    def _run_on_all(self, step: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        """Runs a step for all servers concurrently. Raises the first EngineError.

        After an error, the steps of all servers are cancelled and awaited: a late request that
        begins an update would make the next update fail. The wait has no timeout of its own,
        because each HTTP request has one and closing the pool cancels them.
        """

        async def run_all() -> None:
            tasks = [asyncio.ensure_future(step(server)) for server in self._servers]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        self._loop.submit(run_all()).result()
