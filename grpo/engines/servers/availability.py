"""The servers that a rank can send requests to.

Rank 0 supervises the servers and reads their state (`SupervisedAvailability`). The other ranks
infer it from the outcome of their own requests (`InferredAvailability`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from grpo.engines import ServerLostError, WrongWeightVersionError
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import HEALTH_TIMEOUT_S, Supervisor

# How long a rank other than rank 0 sends no requests to a server after a failure.
AVOID_FAILED_S = 10.0
VERSION_TIMEOUT_S = 60.0  # the longest wait for a server's weight version
RETRY_INTERVAL_S = 1.0  # between two attempts of a request on a rank other than rank 0


class Availability(Protocol):
    """A rank's view of the servers.

    In all methods, `num_starts` is the value of `server.num_starts` when the request was sent.

    Attributes:
        num_extra_retries: retries per request in addition to `engine.servers.retries`.
        check_interval_s: the interval between two checks of a server during a request.
    """

    num_extra_retries: int
    check_interval_s: float

    def candidates(self) -> list[Server]:
        """Returns the servers that currently accept requests."""

    def raise_if_unrecoverable(self) -> None:
        """Raises EngineError if no server can become a candidate."""

    async def check_before_request(self, server: Server) -> None:
        """Raises EngineError if the server may not have the current weights."""

    async def check_during_request(self, server: Server, num_starts: int) -> None:
        """Raises EngineError if the server was lost after the request was sent."""

    async def report_failure(self, server: Server, num_starts: int) -> None:
        """Records that a request to the server failed."""


class SupervisedAvailability:
    """The view of rank 0, which supervises the servers and knows their state."""

    num_extra_retries = 0
    check_interval_s = 1.0

    def __init__(self, state: PoolState, supervisor: Supervisor) -> None:
        """Stores the state that `supervisor` keeps up to date."""
        self._state = state
        self._supervisor = supervisor

    def candidates(self) -> list[Server]:
        """Returns the servers that are up and hold the current weights."""
        return self._state.current_servers()

    def raise_if_unrecoverable(self) -> None:
        """Raises EngineError if the supervisor cannot bring a server back."""
        self._supervisor.raise_if_unrecoverable()

    async def check_before_request(self, server: Server) -> None:
        """Does nothing: every candidate holds the current weights."""

    async def check_during_request(self, server: Server, num_starts: int) -> None:
        """Raises ServerLostError if the server was lost after the request was sent."""
        if not server.up or server.num_starts != num_starts:
            raise ServerLostError(server.describe())

    async def report_failure(self, server: Server, num_starts: int) -> None:
        """Reports the server to the supervisor, which brings it up again."""
        await self._supervisor.report_failure(server, num_starts)


class InferredAvailability:
    """The view of the other ranks, inferred from recent failures of their requests.

    Rank 0 may be restarting a server. Requests are therefore retried for as long as a start takes.
    """

    check_interval_s = HEALTH_TIMEOUT_S

    def __init__(self, state: PoolState, client: ServerClient, start_timeout_s: float) -> None:
        """Stores the state and the client.

        Args:
            state: the pool's servers and the current weight version.
            client: sends requests to a server.
            start_timeout_s: the longest time that rank 0 takes to start a server.
        """
        self.num_extra_retries = int(start_timeout_s / RETRY_INTERVAL_S)
        self._state = state
        self._client = client

    def candidates(self) -> list[Server]:
        """Returns the servers without a recent failure. If all failed recently, returns all."""
        now = time.monotonic()
        candidates = [server for server in self._state.servers if server.avoid_until <= now]
        return candidates or self._state.servers

    def raise_if_unrecoverable(self) -> None:
        """Does nothing: rank 0 raises the error."""

    async def check_before_request(self, server: Server) -> None:
        """Raises EngineError unless the server holds the current weights.

        It does not hold them if rank 0 has restarted it and has not sent the weights yet.
        """
        version = self._state.version
        if version < 0:
            return  # before the first sync, any weights are accepted
        reported_version = await self._client.weight_version(server, VERSION_TIMEOUT_S)
        if reported_version != str(version):
            raise WrongWeightVersionError(server.describe(), reported_version, version)

    async def check_during_request(self, server: Server, num_starts: int) -> None:
        """Raises EngineError if the server does not respond."""
        await self._client.check_health(server, HEALTH_TIMEOUT_S)

    async def report_failure(self, server: Server, num_starts: int) -> None:
        """Excludes the server for AVOID_FAILED_S seconds and waits RETRY_INTERVAL_S seconds."""
        server.avoid_until = time.monotonic() + AVOID_FAILED_S
        await asyncio.sleep(RETRY_INTERVAL_S)
