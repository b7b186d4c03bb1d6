"""Weights to servers on other GPUs: vLLM's own NCCL transfer, one group of the learner's rank 0 and every server's workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from grpo.engines import Weights
from grpo.engines.server import Server, free_port
from grpo.engines.vllm import weight_source

if TYPE_CHECKING:
    from grpo.engines.fleet import Fleet


class NcclSender:
    """Sends to the servers that are up. `forget` it when one has come back: its processes are others."""

    def __init__(self, fleet: Fleet, address: str | None, tensor_parallel: int) -> None:
        self._fleet, self._size = fleet, tensor_parallel
        self._trainer: Any = None
        self._address = address or socket.gethostbyname(socket.gethostname())

    def forget(self) -> None:
        self._trainer = None

    def send(self, servers: Sequence[Server], weights: Weights, dtype: torch.dtype, version: int) -> int:
        """Returns how many bytes each server got. Raises EngineError."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        client, source = _Client(self._fleet, servers, version, self._size), weight_source(weights, dtype)
        if self._trainer is None:
            size = 1 + len(servers) * self._size
            info = NCCLTrainerInitInfo(rank=0, master_address=self._address, master_port=free_port(), world_size=size)
            self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
        self._trainer.client, self._trainer.source = client, source
        self._trainer.send_weights()
        return source.num_bytes


class _Client:
    """What vLLM's sending side calls (VLLMWeightSyncClient), for all servers at once."""

    def __init__(self, fleet: Fleet, servers: Sequence[Server], version: int, size: int) -> None:
        self._fleet, self._servers, self._version, self._size = fleet, servers, version, size

    def _all(self, path: str, bodies: Sequence[Any], servers: Sequence[Server] | None = None) -> None:
        found = self._servers if servers is None else servers

        async def call() -> None:
            await asyncio.gather(*(self._fleet._call(server, path, body) for server, body in zip(found, bodies, strict=True)))

        self._fleet._submit(call()).result()  # each call has its limit

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        own = [{"init_info": init_info | {"rank_offset": 1 + i * self._size}} for i in range(len(self._servers))]
        self._all("/init_weight_transfer_engine", own)

    def start_weight_update(self) -> None:
        self._busy = [server for server in self._servers if server.load]
        self._all("/pause?mode=keep", [{}] * len(self._busy), self._busy)
        self._all("/start_weight_update", [{}] * len(self._servers))

    def update_weights(self, update_info: Any) -> None:
        self._all("/update_weights", [{"update_info": update_info}] * len(self._servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        async def call() -> None:
            await asyncio.gather(*(self._fleet._finish(server, self._version) for server in self._servers))

        self._fleet._submit(call()).result()
        self._all("/resume", [{}] * len(self._busy), self._busy)
