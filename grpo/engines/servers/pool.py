"""A pool of vLLM servers as an engine: tokens in, tokens out.

Every rank asks the servers. Rank 0 alone starts, watches and updates them, and verifies their
weights. A server that comes back gets the weights that the others hold before it is asked anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from grpo import config as configs
from grpo.engines import EngineError, Request, SamplingOptions, SyncReport, Weights
from grpo.engines.servers import command_line
from grpo.engines.servers.availability import Availability, UnwatchedServers, WatchedServers
from grpo.engines.servers.client import ServerClient
from grpo.engines.servers.loop_thread import LoopThread
from grpo.engines.servers.scheduler import Scheduler
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import ReferenceSamples, Supervisor
from grpo.engines.servers.weight_updates import ServersReceiver, WeightUpdates
from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.choose import choose_sender
from grpo.engines.transfer.interface import SenderOptions, WeightSender
from grpo.engines.vllm_options import ServedModel
from grpo.run import ranks
from grpo.run.addresses import free_port
from grpo.types import Completion, UserError


class ServerPool:
    """An `Engine` of several servers.

    Args:
        model: what each server serves.
        settings: the engine's settings, with `servers`.
        run_dir: of the run: logs, and the weights of the transport `file`.
        decode: returns the text of tokens.
        on_wait: called five times a second while waiting; may raise.
        say: prints a line for the user about lost servers.
    """

    def __init__(
        self,
        *,
        model: ServedModel,
        settings: configs.Engine,
        run_dir: Path,
        decode: Callable[[Sequence[int]], str],
        on_wait: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Starts the local servers and the watch over all servers; waits for none.

        Raises UserError if this machine or this model cannot do what the settings ask for.
        """
        servers = _reachable_servers(settings)
        sender_class = choose_sender(servers)
        command_line.check_tensor_parallel(model.model_dir, servers.tensor_parallel)
        token = command_line.request_token(servers)
        arguments = command_line.server_arguments(
            model, settings, servers.tensor_parallel, sender_class.backend
        )
        self._settings = settings
        self._dtype = getattr(torch, model.dtype)
        self._num_workers = servers.tensor_parallel
        self._client = _make_client(settings, servers, token, decode)
        self._sender: WeightSender | None = None  # on rank 0
        if ranks.rank() == 0:
            folder = _weights_folder(servers, run_dir)
            options = SenderOptions(
                folder=folder, limit_s=servers.sync_timeout_s, on_wait=on_wait, say=say
            )
            self._sender = sender_class(options)
        self._state = PoolState(_make_servers(servers, arguments, token, run_dir))
        self._loop = LoopThread("engine pool", on_wait=on_wait, describe=self._state.describe)
        self._updates = WeightUpdates(self._client, servers.sync_timeout_s)
        self._supervisor: Supervisor | None = None  # on rank 0
        if self._sender is not None:
            keeps_weights = sender_class.keeps_weights
            self._supervisor = Supervisor(
                self._state, self._updates, settings, keeps_weights=keeps_weights, say=say
            )
            self._supervisor.start(self._loop)
        self._scheduler = Scheduler(
            self._state,
            self._client,
            self._availability(),
            max_sequences=settings.max_sequences,
            retries=servers.retries,
        )

    def _availability(self) -> Availability:
        if self._supervisor is None:
            return UnwatchedServers(self._state, self._client, self._settings.start_timeout_s)
        return WatchedServers(self._state, self._supervisor)

    @property
    def counts(self) -> dict[str, int]:
        """Returns how many servers were lost and restarted, and how many requests retried."""
        return self._state.counts

    def wait_ready(self) -> dict[str, Any]:
        """Waits until every server answers. Raises EngineError naming one that does not start."""
        if self._supervisor is not None:
            limit_s = self._settings.start_timeout_s + 5
            self._loop.run(self._supervisor.wait_all_up(), limit_s)
        urls = ranks.all_gather("the servers", [server.url for server in self._state.servers])[0]
        for server, url in zip(self._state.servers, urls, strict=True):
            server.url = url
        return {"servers": urls}

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns each request's completions, in order; any server may sample them."""
        work = self._generate(requests, options, on_progress)
        return self._loop.run(work, self._settings.timeout_s)

    def begin(self, request: Request, options: SamplingOptions) -> Future[tuple[Completion, ...]]:
        """Begins a request without waiting for it.

        Weights may change while it is sampled: its completions carry the versions.
        """
        return self._loop.submit(self._scheduler.sample(request, options))

    def prove(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Returns what each server that is up samples; nothing on other ranks than rank 0.

        The samples of a server that comes back later must agree with them.
        """
        if self._supervisor is None:
            return []
        work = self._sample_on_every_server(self._supervisor, requests, options)
        rows_per_server = self._loop.run(work, self._settings.timeout_s)
        self._supervisor.reference = ReferenceSamples(requests, options, rows_per_server[0])
        return rows_per_server

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Sends the weights to every server that is up.

        A server that fails at it is lost, and gets them when it is back. Raises EngineError.
        """
        start = time.monotonic()
        if self._supervisor is None or self._sender is None:
            for _ in weights:  # ZeRO-3: all ranks gather them together
                pass
            self._state.version = version
            return SyncReport(version=version, seconds=time.monotonic() - start, num_bytes=0)
        stream = WeightStream(weights, self._dtype)
        with self._supervisor.sync_in_progress(self._loop):
            # it is of the old weights: a server that comes back now is probed with all others
            self._supervisor.reference = None
            self._sender.send(stream, self._receiver(self._supervisor, version))
            self._state.version = version
        self._loop.submit(self._state.notify())
        return SyncReport(
            version=version, seconds=time.monotonic() - start, num_bytes=stream.num_bytes
        )

    def idle(self) -> float:
        """Returns for how many seconds since the last call no server had anything to do."""
        return self._scheduler.idle_clock.take()

    def reset_cache(self) -> None:
        """Does nothing: requests carry the weights' version as the salt of their cache."""

    def sleep(self) -> None:
        """Does nothing: the servers keep their memory."""

    def wake(self) -> None:
        """Does nothing: the servers do not sleep."""

    def close(self) -> None:
        """Ends the watch, kills the servers that were started here, frees the transport."""
        if self._supervisor is not None:
            self._supervisor.stop_watch()
        self._loop.close(self._client.close())
        if self._supervisor is not None:
            self._supervisor.kill_servers()
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _receiver(self, supervisor: Supervisor, version: int) -> ServersReceiver:
        return ServersReceiver(
            supervisor,
            self._updates,
            self._loop,
            version=version,
            num_workers=self._num_workers,
        )

    async def _generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[tuple[Completion, ...]]:
        total = sum(request.n for request in requests)
        done = 0

        async def sample(request: Request) -> tuple[Completion, ...]:
            nonlocal done
            completions = await self._scheduler.sample(request, options)
            done += request.n
            if on_progress is not None:
                on_progress(done, total)
            return completions

        tasks = [asyncio.ensure_future(sample(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _sample_on_every_server(
        self, supervisor: Supervisor, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Returns the rows of each server with the current weights that stays up, at least one."""

        async def sample(server: Server, request: Request) -> tuple[Completion, ...]:
            server.load += request.n  # a server that stalls in it is lost
            try:
                return await self._scheduler.sample_on(server, request, options)
            finally:
                server.load -= request.n

        async def sample_all(server: Server) -> list[tuple[Completion, ...]]:
            return list(await asyncio.gather(*(sample(server, request) for request in requests)))

        while True:
            servers = self._state.current_servers()
            results = await asyncio.gather(*map(sample_all, servers), return_exceptions=True)
            rows_per_server = []
            for server, result in zip(servers, results, strict=True):
                if isinstance(result, EngineError):
                    server.up = False
                elif isinstance(result, BaseException):
                    raise result
                else:
                    rows_per_server.append(result)
            if rows_per_server:
                return rows_per_server
            supervisor.raise_if_watch_ended()
            await asyncio.sleep(0.2)


def _reachable_servers(settings: configs.Engine) -> configs.Servers:
    """Returns `settings.servers`. Raises UserError if a rank cannot reach the local servers."""
    if settings.servers is None:
        raise ValueError("a pool needs settings.servers")
    if settings.servers.count and ranks.world_size() > ranks.local_world_size():
        raise UserError(
            "engine.servers.count: ranks on several machines do not reach rank 0's own: use "
            "urls (launch/server.sh)"
        )
    return settings.servers


def _make_client(
    settings: configs.Engine,
    servers: configs.Servers,
    token: str,
    decode: Callable[[Sequence[int]], str],
) -> ServerClient:
    return ServerClient(
        token=token,
        token_env=servers.token_env,
        timeout_s=settings.timeout_s,
        decode=decode,
        cache_salt=ranks.all_gather("the caches' salt", secrets.token_hex(8))[0],
    )


def _make_servers(
    servers: configs.Servers, arguments: Sequence[str], token: str, run_dir: Path
) -> list[Server]:
    """Returns the servers of `urls`, then the local ones, which rank 0 starts."""
    is_rank0 = ranks.rank() == 0
    free_ports = [free_port() for _ in range(servers.count)] if is_rank0 else []
    ports = ranks.all_gather("the servers' ports", free_ports)[0]
    now = time.monotonic()
    pool = [Server(url=url.rstrip("/"), last_response_at=now) for url in servers.urls]
    for number, port in enumerate(ports):
        cores = command_line.server_cores(number, servers)
        server = Server(
            url=f"http://127.0.0.1:{port}",
            log_file=run_dir / "logs" / f"server-{number}.log",
            command=[
                *command_line.COMMAND,
                *arguments,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            environment=command_line.server_environment(token, number, servers, cores),
            cores=cores,
            last_response_at=now,
        )
        pool.append(server)
        if is_rank0:
            server.start()
    return pool


def _weights_folder(servers: configs.Servers, run_dir: Path) -> Path:
    """Returns the directory of the transport `file`, which no other run uses."""
    if not servers.folder:
        return run_dir / "weights"
    name = f"{socket.gethostname()} {run_dir.resolve()}"
    return Path(servers.folder, hashlib.sha256(name.encode()).hexdigest()[:16])
