"""Weights to servers on other GPUs: vLLM's own NCCL transfer, one group of the learner's rank 0 and every server's workers."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from grpo.engines import EngineError
from grpo.engines._weights import Sent
from grpo.engines.server import Server, free_port

if TYPE_CHECKING:
    from grpo.engines.fleet import Fleet


class NcclSender:
    """Sends to the servers that are up. The group is made anew when they are not the processes that it was made of."""

    def __init__(self, fleet: Fleet, tensor_parallel: int) -> None:
        self._fleet, self._size = fleet, tensor_parallel
        self._trainer: Any = None
        self._members: list[tuple[str, int]] = []

    def send(self, servers: Sequence[Server], sent: Sent, *, version: int, limit_s: float) -> None:
        """Raises EngineError, also when a server is lost on the way and the others wait for it."""
        client = _Client(self._fleet, servers, version, self._size)
        failed: list[BaseException] = []

        def work() -> None:
            try:
                torch.cuda.set_device(torch.cuda.current_device())
                self._join(servers, client, sent)
                self._trainer.client, self._trainer.source = client, sent
                self._trainer.send_weights()
            except BaseException as error:
                failed.append(error)

        thread, deadline = threading.Thread(target=work, daemon=True), time.monotonic() + limit_s
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.2)
        if failed or thread.is_alive():
            self._members = []
            why = str(failed[0]) if failed else f"not done within {limit_s:g} s"
            raise EngineError(f"weights {version} to {len(servers)} servers by NCCL: {why}")

    def _join(self, servers: Sequence[Server], client: Any, source: Any) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        members = [(server.url, server.starts) for server in servers]
        if members != self._members:
            size = 1 + len(servers) * self._size
            info = NCCLTrainerInitInfo(rank=0, master_address=_seen_by(servers[0]), master_port=free_port(), world_size=size)
            self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
            self._members = members


def _seen_by(server: Server) -> str:
    """Returns the address of this machine on the way to a server."""
    url = urlsplit(server.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((url.hostname or "127.0.0.1", url.port or 80))  # sends nothing
        return str(way.getsockname()[0])


class _Client:
    """What vLLM's sending side calls (VLLMWeightSyncClient), for all servers at once."""

    def __init__(self, fleet: Fleet, servers: Sequence[Server], version: int, size: int) -> None:
        self._fleet, self._servers, self._version, self._size = fleet, servers, version, size

    def _all(self, path: str, bodies: Sequence[Any]) -> None:
        async def call() -> None:
            await asyncio.gather(*(self._fleet._call(server, path, body) for server, body in zip(self._servers, bodies, strict=True)))

        self._fleet._submit(call()).result()  # each call has its limit

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        own = [{"init_info": init_info | {"rank_offset": 1 + i * self._size}} for i in range(len(self._servers))]
        self._all("/init_weight_transfer_engine", own)

    def start_weight_update(self) -> None:
        for server in self._servers:
            server.version = -1  # nothing is asked of it from here on
        self._all("/pause?mode=keep", [{}] * len(self._servers))
        self._all("/start_weight_update", [{}] * len(self._servers))

    def update_weights(self, update_info: Any) -> None:
        self._all("/update_weights", [{"update_info": update_info}] * len(self._servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        async def call() -> None:
            await asyncio.gather(*(self._fleet._finish(server, self._version) for server in self._servers))

        self._fleet._submit(call()).result()
        self._all("/resume", [{}] * len(self._servers))
