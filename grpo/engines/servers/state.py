"""What the parts of a pool share: its servers and the version of the weights sent last."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from grpo.engines.servers.server import Server


class PoolState:
    """The servers, the current weight version and counts of what happened to the servers.

    Once the watch runs, a server's health and load change in the pool's event loop only; `version`
    changes while no request is sent. Whoever changes what a waiting request may depend on calls
    `notify`.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        """The servers hold no weights of this run yet: the version is -1."""
        self.servers = list(servers)
        self.version = -1
        self.counts = {"lost": 0, "restarted": 0, "retried": 0}
        self.changed = asyncio.Condition()

    def up_servers(self) -> list[Server]:
        """Returns the servers that are up, whatever weights they hold."""
        return [server for server in self.servers if server.up]

    def current_servers(self) -> list[Server]:
        """Returns the servers that are up and hold the current weights."""
        return [server for server in self.up_servers() if server.version == self.version]

    def describe(self) -> str:
        """Returns `"http://127.0.0.1:8000 up, 12 asked"` per server, for messages."""
        parts = []
        for server in self.servers:
            status = "up" if server.up else "lost"
            parts.append(f"{server.url} {status}, {server.load} asked")
        return ", ".join(parts)

    async def notify(self) -> None:
        """Wakes the requests that wait for a server."""
        async with self.changed:
            self.changed.notify_all()
