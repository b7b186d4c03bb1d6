"""State that the modules of a pool share: the servers and the current weight version."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from grpo.engines.servers.server import Server


class PoolState:
    """The servers, the current weight version and event counts.

    Once the supervisor runs, `Server.up` and `Server.load` change only in the pool's event loop.
    `version` changes only while no request is being sent. Code that changes a condition on which
    requests wait calls `notify`.

    Attributes:
        servers: all servers of the pool.
        version: the version of the weights sent last, -1 before the first sync.
        counts: how many servers were lost and restarted, and how many requests were retried:
            `{"lost": 1, "restarted": 1, "retried": 3}`.
        changed: the condition on which requests wait for a server.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        """Starts with version -1: no server holds weights of this run."""
        self.servers = list(servers)
        self.version = -1
        self.counts = {"lost": 0, "restarted": 0, "retried": 0}
        self.changed = asyncio.Condition()

    def up_servers(self) -> list[Server]:
        """Returns the servers that are up, with any weight version."""
        return [server for server in self.servers if server.up]

    def current_servers(self) -> list[Server]:
        """Returns the servers that are up and hold the current weights."""
        return [server for server in self.up_servers() if server.version == self.version]

    def describe(self) -> str:
        """Returns the state of each server for messages.

        Example: `"http://127.0.0.1:8000 up, 12 completions pending"`.
        """
        descriptions = []
        for server in self.servers:
            status = "up" if server.up else "lost"
            descriptions.append(f"{server.url} {status}, {server.load} completions pending")
        return ", ".join(descriptions)

    async def notify(self) -> None:
        """Wakes the requests that wait for a server."""
        async with self.changed:
            self.changed.notify_all()
