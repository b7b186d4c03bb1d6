"""New weights for servers: the steps of one server's update, and all servers as one receiver."""

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

SETTLE_LIMIT_S = 20.0  # the longest wait for an answer of a server whose update failed


class WeightUpdates:
    """The steps of an update of one server."""

    def __init__(self, client: ServerClient, sync_timeout_s: float) -> None:
        """`sync_timeout_s`: the longest time of an update of one server."""
        self.client = client
        self.sync_timeout_s = sync_timeout_s

    async def load_stored(self, server: Server, version: int, update_info: dict[str, Any]) -> None:
        """Has a server load weights that are stored where it can read them. Raises EngineError."""
        server.version = -1
        async with self.limit(server, version), self._paused(server):
            await self.client.post(server, "/start_weight_update", {})
            await self.update(server, update_info)
            await self.finish(server, version)

    async def init(self, server: Server, init_info: dict[str, Any]) -> None:
        """Connects a server to the transport. Raises EngineError."""
        await self.client.post(server, "/init_weight_transfer_engine", {"init_info": init_info})

    async def pause(self, server: Server) -> None:
        """Has a server sample nothing until `resume`. Raises EngineError."""
        server.version = -1
        await self.client.post(server, "/pause?mode=keep", {})

    async def start(self, server: Server) -> None:
        """Begins an update. Raises EngineError."""
        await self.client.post(server, "/start_weight_update", {})

    async def resume(self, server: Server) -> None:
        """Has a server sample again; its cache is kept. Raises EngineError."""
        await self.client.post(server, "/resume", {})

    async def update(self, server: Server, update_info: Any) -> None:
        """Has a server load the weights that `update_info` describes. Raises EngineError."""
        await self.client.post(server, "/update_weights", {"update_info": update_info})

    async def finish(self, server: Server, version: int) -> None:
        """Ends an update. Raises EngineError unless the server acknowledges `version`."""
        await self.client.post(server, "/finish_weight_update", {"weight_version": str(version)})
        held = await self.client.weight_version(server)
        if held != str(version):
            raise WrongWeightVersionError(server.describe(), held, version)
        server.version = version

    async def settle(self, server: Server) -> None:
        """Ends an update that failed; a server whose engine does not answer then is lost."""
        with contextlib.suppress(EngineError):
            await self.client.post(server, "/finish_weight_update", {}, SETTLE_LIMIT_S)
        try:
            await self.client.weight_version(server, SETTLE_LIMIT_S)
        except EngineError:
            server.up = False

    @contextlib.asynccontextmanager
    async def limit(self, server: Server, version: int) -> AsyncIterator[None]:
        """Limits an update to `sync_timeout_s`. Raises EngineError past it.

        A server whose engine hangs may still answer /health.
        """
        limit_s = self.sync_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise EngineTimeoutError(
                f"{server.describe()} was not done with weights {version}",
                limit_s,
                "see engine.servers.sync_timeout_s",
            ) from None

    @contextlib.asynccontextmanager
    async def _paused(self, server: Server) -> AsyncIterator[None]:
        """Pauses the server if it samples; it continues with its cache afterwards."""
        is_sampling = server.load > 0
        if is_sampling:
            await self.client.post(server, "/pause?mode=keep", {})
        yield  # after an error the server is lost and not resumed
        if is_sampling:
            await self.client.post(server, "/resume", {})


class ServersReceiver:
    """All servers that are up, as one `WeightReceiver` of one weight version.

    The methods block: a sender calls them from threads outside the event loop.
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
        """Chooses no servers yet.

        Args:
            supervisor: knows which servers are up.
            updates: updates one server.
            loop: where `updates` runs.
            version: of the weights.
            num_workers: GPUs per server.
        """
        self.version = version
        self.num_workers = num_workers
        self._supervisor = supervisor
        self._updates = updates
        self._loop = loop
        self._servers: list[Server] = []

    def members(self) -> list[tuple[str, int]]:
        """Takes the servers that are up now, and returns their URLs and numbers of starts.

        Raises EngineError if none is up.
        """
        state = self._supervisor.state
        self._servers = state.up_servers()
        if not self._servers:
            descriptions = ", ".join(server.describe() for server in state.servers)
            raise EngineError(f"weights {self.version}: no server is up: {descriptions}")
        return [(server.url, server.starts) for server in self._servers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects every server to the transport.

        The ranks of a server's workers follow those of the servers before it.
        """

        def connect(server: Server) -> Coroutine[Any, Any, None]:
            first_rank = 1 + self._servers.index(server) * self.num_workers
            return self._updates.init(server, init_info | {"rank_offset": first_rank})

        self._for_each(connect)

    def start_weight_update(self) -> None:
        """Pauses every server, then begins an update on each. Raises EngineError."""
        self._for_each(self._updates.pause)
        self._for_each(self._updates.start)

    def update_weights(self, update_info: Any) -> None:
        """Has every server load weights. Raises EngineError."""
        self._for_each(lambda server: self._updates.update(server, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends the update of every server, then resumes them. Raises EngineError."""
        self._for_each(lambda server: self._updates.finish(server, self.version))
        self._for_each(self._updates.resume)

    def load_stored_weights(self, update_info: dict[str, Any]) -> None:
        """Has every server load stored weights; one that fails at it is lost.

        Raises EngineError if every server refuses them.
        """
        limit_s = self._updates.sync_timeout_s + 60
        self._loop.run(self._supervisor.load_stored_weights(self.version, update_info), limit_s)

    def end_failed_update(self) -> None:
        """Ends an update that failed; a server whose engine does not answer then is lost."""
        for server in self._servers:
            self._loop.run(self._updates.settle(server))

    def _for_each(self, step: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        """Runs a step for all servers at once. Raises the first EngineError.

        After an error no step of any server is running: a server that would still begin an update
        could not begin the next one. Each HTTP request has its limit, and ends when the pool is
        closed.
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
