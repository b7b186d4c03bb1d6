"""Which servers a rank may ask: rank 0 watches them, the other ranks find out by asking."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from grpo.engines import ServerLostError, WrongWeightVersionError
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import HEALTH_S, Supervisor

AVOID_S = 10.0  # a rank that does not watch the servers does not ask one for so long that failed
VERSION_LIMIT_S = 60.0  # the longest wait for the version of a server's weights


class Availability(Protocol):
    """What a rank knows about the servers.

    Attributes:
        num_extra_tries: retries of a request beyond `engine.servers.retries`.
        check_every_s: how often a server is checked while it works on a request.
    """

    num_extra_tries: int
    check_every_s: float

    def candidates(self) -> list[Server]:
        """Returns the servers that may be asked now."""

    def raise_if_hopeless(self) -> None:
        """Raises an error if waiting for a candidate is in vain."""

    async def check_before(self, server: Server) -> None:
        """Raises EngineError unless the server holds the current weights."""

    async def check_during(self, server: Server, starts: int) -> None:
        """Raises EngineError if the server was lost since its `starts`-th start."""

    async def report_failure(self, server: Server, starts: int) -> None:
        """Takes note that a request to the server failed."""


class WatchedServers:
    """Rank 0's knowledge: the supervisor's."""

    num_extra_tries = 0
    check_every_s = 1.0

    def __init__(self, state: PoolState, supervisor: Supervisor) -> None:
        """Reads what `supervisor` writes to `state`."""
        self._state = state
        self._supervisor = supervisor

    def candidates(self) -> list[Server]:
        """Returns the servers that are up and hold the current weights."""
        return self._state.current_servers()

    def raise_if_hopeless(self) -> None:
        """Raises what the supervisor raises."""
        self._supervisor.raise_if_hopeless()

    async def check_before(self, server: Server) -> None:
        """Does nothing: a candidate holds the current weights."""

    async def check_during(self, server: Server, starts: int) -> None:
        """Raises ServerLostError if the server was lost since its `starts`-th start."""
        if not server.up or server.starts != starts:
            raise ServerLostError(server.describe())

    async def report_failure(self, server: Server, starts: int) -> None:
        """Has the supervisor bring the server up again."""
        await self._supervisor.report_failure(server, starts)


class UnwatchedServers:
    """Another rank's knowledge: which servers failed lately.

    Rank 0 may be starting a server again, so requests are retried for as long as that may take.
    """

    check_every_s = HEALTH_S

    def __init__(self, state: PoolState, client: ServerClient, start_timeout_s: float) -> None:
        """`start_timeout_s`: the longest time that rank 0 takes to start a server."""
        self.num_extra_tries = int(start_timeout_s)  # one per second
        self._state = state
        self._client = client

    def candidates(self) -> list[Server]:
        """Returns the servers that did not fail lately, or all servers if all did."""
        now = time.monotonic()
        candidates = [server for server in self._state.servers if server.avoid_until <= now]
        return candidates or self._state.servers

    def raise_if_hopeless(self) -> None:
        """Does nothing: rank 0 raises."""

    async def check_before(self, server: Server) -> None:
        """Raises EngineError unless the server holds the current weights.

        Rank 0 may have started it again and not sent them yet.
        """
        version = self._state.version
        if version < 0:
            return
        held = await self._client.weight_version(server, VERSION_LIMIT_S)
        if held != str(version):
            raise WrongWeightVersionError(server.describe(), held, version)

    async def check_during(self, server: Server, starts: int) -> None:
        """Raises EngineError if the server does not answer."""
        await self._client.check_health(server, HEALTH_S)

    async def report_failure(self, server: Server, starts: int) -> None:
        """Avoids the server for AVOID_S and waits for a second."""
        server.avoid_until = time.monotonic() + AVOID_S
        await asyncio.sleep(1.0)
