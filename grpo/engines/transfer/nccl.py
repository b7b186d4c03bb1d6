"""Sends weights to servers on other GPUs.

It uses vLLM's own NCCL transfer, with one group of the learner's rank 0 and every server's workers.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from grpo.engines import EngineError
from grpo.engines.servers.server import Server, free_port
from grpo.engines.transfer.weights import Sent

if TYPE_CHECKING:
    from grpo.engines.servers.fleet import Fleet


class NcclSender:
    """Sends to the servers that are up.

    The group is made anew when they are not the processes that it was made of.
    """

    def __init__(self, fleet: Fleet, tensor_parallel: int) -> None:
        self._fleet, self._size = fleet, tensor_parallel
        self._trainer: Any = None
        self._members: list[tuple[str, int]] = []
        self.stuck = False  # whether a transfer that was given up still goes through the weights

    def send(self, servers: Sequence[Server], sent: Sent, *, version: int, limit_s: float) -> None:
        """Raises EngineError, also when a server is lost on the way and the others wait for it."""
        failed: list[BaseException] = []
        client = _Client(self._fleet, servers, version, self._size, failed)

        def work() -> None:
            try:
                self._join(servers, client, sent)
                client.check()
                self._trainer.client, self._trainer.source = client, sent
                self._trainer.send_weights()
            except BaseException as error:
                failed.append(error)

        thread, deadline = threading.Thread(target=work, daemon=True), time.monotonic() + limit_s
        thread.start()
        try:
            while thread.is_alive() and not failed and time.monotonic() < deadline:
                thread.join(0.2)
                self._fleet._on_wait()
            if thread.is_alive() and not failed:
                failed.append(EngineError(f"not done within {limit_s:g} s"))
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            if failed:
                self._leave()
                thread.join(20)
                self.stuck = thread.is_alive()
        if failed:
            raise EngineError(f"weights {version} to {len(servers)} servers by NCCL: {failed[0]}")

    def _join(self, servers: Sequence[Server], client: Any, source: Any) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        members = [(server.url, server.starts) for server in servers]
        if members != self._members:
            self._leave()
            size = 1 + len(servers) * self._size
            info = NCCLTrainerInitInfo(
                rank=0,
                master_address=_seen_by(servers[0]),
                master_port=free_port(),
                world_size=size,
            )
            trainer = NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=client, source=source
            )
            self._trainer, self._members = trainer, members

    def _leave(self) -> None:
        """Aborts the group: what still waits in it for somebody who is gone goes on."""
        self._members = []
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None


def _seen_by(server: Server) -> str:
    """Returns the address of this machine on the way to a server."""
    url = urlsplit(server.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((url.hostname or "127.0.0.1", url.port or 80))  # sends nothing
        return str(way.getsockname()[0])


class _Client:
    """What vLLM's sending side calls (VLLMWeightSyncClient), for all servers at once."""

    def __init__(
        self,
        fleet: Fleet,
        servers: Sequence[Server],
        version: int,
        size: int,
        failed: list[BaseException],
    ) -> None:
        self._fleet, self._servers, self._version, self._size, self._failed = (
            fleet,
            servers,
            version,
            size,
            failed,
        )

    def _all(self, path: str, bodies: Sequence[Any]) -> None:
        self._wait(
            *(
                self._fleet._call(server, path, body)
                for server, body in zip(self._servers, bodies, strict=True)
            )
        )

    def check(self) -> None:
        """Raises what the transfer was given up for."""
        if self._failed:
            raise EngineError(f"given up: {self._failed[0]}")

    def _wait(self, *calls: Coroutine[Any, Any, Any]) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*calls)

        if self._failed:
            for call in calls:
                call.close()
        self.check()
        try:
            # each call has its limit, and ends with the fleet
            self._fleet._submit(all_of_them()).result()
        except BaseException as error:
            # at once: vLLM asks for it after a broadcast that may wait for the server that is lost
            self._failed.append(error)
            raise

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        own = [
            {"init_info": init_info | {"rank_offset": 1 + i * self._size}}
            for i in range(len(self._servers))
        ]
        self._all("/init_weight_transfer_engine", own)

    def start_weight_update(self) -> None:
        for server in self._servers:
            server.version = -1  # nothing is asked of it from here on
        self._all("/pause?mode=keep", [{}] * len(self._servers))
        self._all("/start_weight_update", [{}] * len(self._servers))

    def update_weights(self, update_info: Any) -> None:
        self._all("/update_weights", [{"update_info": update_info}] * len(self._servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait(*(self._fleet._finish(server, self._version) for server in self._servers))
        self._all("/resume", [{}] * len(self._servers))
