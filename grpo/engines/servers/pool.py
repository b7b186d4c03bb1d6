"""An engine that consists of several vLLM servers.

Every rank sends requests to the servers. Only rank 0 starts and watches the servers, sends them
weights and verifies these weights. A recovered server loads the current weights before it gets a
request.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo import config as configs
from grpo.engines import EngineError, Request, SamplingOptions, SyncReport, Weights
from grpo.engines.servers import command_line
from grpo.engines.servers.availability import (
    Availability,
    InferredAvailability,
    SupervisedAvailability,
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCallbacks:
    """Functions that a pool calls.

    Attributes:
        on_wait: called five times per second while the pool waits; may raise.
        say: prints a line for the user, for example about a lost server.
    """

    on_wait: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda _: None


NO_CALLBACKS = PoolCallbacks()


class ServerPool:
    """An `Engine` that consists of several servers."""

    def __init__(
        self,
        *,
        model: ServedModel,
        settings: configs.EngineSettings,
        run_dir: Path,
        decode: Callable[[Sequence[int]], str],
        callbacks: PoolCallbacks = NO_CALLBACKS,
    ) -> None:
        """Starts the local servers and the supervision of all servers. Does not wait for them.

        Args:
            model: the model that each server serves.
            settings: the engine section of the config, with `servers`.
            run_dir: the run directory; holds the servers' logs and the weights of the transport
                `file`.
            decode: converts token ids to text.
            callbacks: functions that the pool calls.

        Raises:
            UserError: The settings do not fit this machine or the model.
        """
        servers = _checked_server_settings(settings)
        sender_class = choose_sender(servers)
        command_line.check_tensor_parallel(model.model_dir, servers.tensor_parallel)
        token = command_line.server_token(servers)
        arguments = command_line.server_arguments(
            model, settings, servers.tensor_parallel, sender_class.backend
        )
        self._settings = settings
        self._dtype = getattr(torch, model.dtype)
        self._num_workers = servers.tensor_parallel
        self._client = _create_client(settings, servers, token, decode)
        self._sender: WeightSender | None = None  # on rank 0
        if ranks.rank() == 0:
            self._sender = sender_class(_sender_options(servers, run_dir, callbacks))
        self._state = PoolState(_create_servers(settings, arguments, token, run_dir))
        self._loop = LoopThread(
            "engine pool", on_wait=callbacks.on_wait, describe=self._state.describe
        )
        self._updates = WeightUpdates(self._client, servers.sync_timeout_s)
        self._supervisor: Supervisor | None = None  # on rank 0
        if self._sender is not None:
            self._supervisor = Supervisor(
                self._state,
                self._updates,
                settings,
                keeps_weights=sender_class.keeps_weights,
                say=callbacks.say,
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
            return InferredAvailability(self._state, self._client, self._settings.start_timeout_s)
        return SupervisedAvailability(self._state, self._supervisor)

    @property
    def counts(self) -> dict[str, int]:
        """Returns event counts since the start: `{"lost": 1, "restarted": 1, "retried": 3}`."""
        return self._state.counts

    def wait_ready(self) -> dict[str, Any]:
        """Waits until every server is up.

        Returns:
            The URLs of all servers: `{"servers": ["http://127.0.0.1:8000"]}`.

        Raises:
            EngineError: A server does not start. Only rank 0 raises it; the other ranks wait for
                rank 0 in an exchange (grpo/run/ranks.py).
        """
        if self._supervisor is not None:
            timeout_s = self._settings.start_timeout_s + 5
            self._loop.run(self._supervisor.wait_all_up(), timeout_s)
        local_urls = [server.url for server in self._state.servers]
        urls = ranks.all_gather("the server URLs", local_urls)[0]  # rank 0 may have changed a port
        for server, url in zip(self._state.servers, urls, strict=True):
            server.url = url
        return {"servers": urls}

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of each request, in the order of the requests.

        Args:
            requests: each request is sampled by one server.
            options: the sampling options.
            on_progress: called as `on_progress(num_finished, num_total)`, in completions, from
                the thread of the pool.

        Raises:
            EngineTimeoutError: The requests are not finished within `engine.timeout_s`.
            RejectedRequestError: A server rejects a request. It is not sent again.
            EngineError: A request failed after its last retry.
        """
        work = self._generate(requests, options, on_progress)
        return self._loop.run(work, self._settings.timeout_s)

    def submit(self, request: Request, options: SamplingOptions) -> Future[tuple[Completion, ...]]:
        """Starts a request and returns its future without waiting.

        The weights may change during sampling. The completions record the weight version of each
        token.
        """
        return self._loop.submit(self._scheduler.sample(request, options))

    def generate_on_every_copy(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Samples all requests on every server that is up and has the current weights.

        The completions of the first server become the reference for servers that recover before the
        next sync.

        Returns:
            `result[server][request]`: the completions of the request. Servers that fail are
            missing. Ranks other than rank 0 return an empty list.

        Raises:
            EngineError: No server can sample the requests.
        """
        if self._supervisor is None:
            return []
        work = self._sample_on_every_server(self._supervisor, requests, options)
        rows_per_server = self._loop.run(work, self._settings.timeout_s)
        self._supervisor.reference = ReferenceSamples(requests, options, rows_per_server[0])
        return rows_per_server

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Sends the weights to every server that is up.

        A server that fails is lost. When it recovers, it loads the weights from the shared memory
        or the file of the transport; with NCCL, it receives them in the next sync.

        Args:
            weights: the weights of the learner; all ranks must iterate over them.
            version: the version of the weights.

        Raises:
            EngineError: The transfer failed, or every server rejected the weights.
        """
        started_at = time.monotonic()
        if self._supervisor is None or self._sender is None:
            for _ in weights:  # With ZeRO-3, all ranks take part in gathering the weights.
                pass
            self._state.version = version
            seconds = time.monotonic() - started_at
            return SyncReport(version=version, seconds=seconds, num_bytes=0)
        stream = WeightStream(weights, self._dtype)
        receiver = self._receiver(self._supervisor, version)
        with self._supervisor.sync_in_progress(self._loop):
            # The reference samples are from the old weights. A server that recovers now is verified
            # with the other servers after the sync (`generate_on_every_copy`).
            self._supervisor.reference = None
            self._sender.send(stream, receiver)
            self._state.version = version
        self._loop.submit(self._state.notify())
        seconds = time.monotonic() - started_at
        return SyncReport(version=version, seconds=seconds, num_bytes=stream.num_bytes)

    def take_idle_seconds(self) -> float:
        """Returns the seconds since the last call during which this rank had no request pending.

        Requests of `generate_on_every_copy` do not count.
        """
        return self._scheduler.idle_clock.read_and_reset()

    def reset_cache(self) -> None:
        """Does nothing: each request has a cache salt that contains the weight version."""

    def sleep(self) -> None:
        """Does nothing: the servers keep their memory."""

    def wake(self) -> None:
        """Does nothing: the servers never sleep."""

    def close(self) -> None:
        """Stops watching the servers, kills the local servers and closes the transport."""
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
        num_total = sum(request.n for request in requests)
        num_done = 0

        async def sample(request: Request) -> tuple[Completion, ...]:
            nonlocal num_done
            completions = await self._scheduler.sample(request, options)
            num_done += request.n
            if on_progress is not None:
                on_progress(num_done, num_total)
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
        """Returns the completions of every current server that stays up.

        If all of them are lost, waits for a server and tries again.
        """
        while True:
            servers = self._state.current_servers()
            results = await asyncio.gather(
                *(self._sample_all_on(server, requests, options) for server in servers),
                return_exceptions=True,
            )
            rows_per_server = []
            for server, result in zip(servers, results, strict=True):
                if isinstance(result, EngineError):
                    server.up = False  # the supervisor's next check counts it as lost
                elif isinstance(result, BaseException):
                    raise result
                else:
                    rows_per_server.append(result)
            if rows_per_server:
                return rows_per_server
            supervisor.raise_if_watch_ended()
            await asyncio.sleep(0.2)

    async def _sample_all_on(
        self, server: Server, requests: Sequence[Request], options: SamplingOptions
    ) -> list[tuple[Completion, ...]]:
        async def sample(request: Request) -> tuple[Completion, ...]:
            server.load += request.n  # the supervisor detects a stall only if the server has load
            try:
                return await self._scheduler.sample_on(server, request, options)
            finally:
                server.load -= request.n

        return list(await asyncio.gather(*(sample(request) for request in requests)))


def _checked_server_settings(settings: configs.EngineSettings) -> configs.ServerSettings:
    """Returns `settings.servers`.

    Raises:
        UserError: The servers are local, but there are ranks on other machines.
        ValueError: `settings.servers` is None.
    """
    if settings.servers is None:
        raise ValueError("a server pool needs settings.servers")
    if settings.servers.count and ranks.world_size() > ranks.local_world_size():
        raise UserError(
            "engine.servers.count: ranks on other machines cannot connect to the local servers of "
            "rank 0: use engine.servers.urls (launch/server.sh)"
        )
    return settings.servers


def _create_client(
    settings: configs.EngineSettings,
    servers: configs.ServerSettings,
    token: str,
    decode: Callable[[Sequence[int]], str],
) -> ServerClient:
    return ServerClient(
        token=token,
        token_env=servers.token_env,
        timeout_s=settings.timeout_s,
        decode=decode,
        cache_salt=ranks.all_gather("the cache salt", secrets.token_hex(8))[0],
    )


def _create_servers(
    settings: configs.EngineSettings, arguments: Sequence[str], token: str, run_dir: Path
) -> list[Server]:
    """Returns the servers of `urls`, then the local servers. Rank 0 starts the local servers."""
    servers = settings.servers
    assert servers is not None
    is_rank0 = ranks.rank() == 0
    free_ports = [free_port() for _ in range(servers.count)] if is_rank0 else []
    ports = ranks.all_gather("the server ports", free_ports)[0]
    now = time.monotonic()
    pool_servers = [Server(url=url.rstrip("/"), last_response_at=now) for url in servers.urls]
    for server_index, port in enumerate(ports):
        address = ["--host", "127.0.0.1", "--port", str(port)]
        cores = command_line.server_cores(server_index, servers)
        server = Server(
            url=f"http://127.0.0.1:{port}",
            log_file=run_dir / "logs" / f"server-{server_index}.log",
            command=[*command_line.COMMAND, *arguments, *address],
            environment=command_line.server_environment(token, server_index, settings, cores),
            cores=cores,
            last_response_at=now,
        )
        pool_servers.append(server)
        if is_rank0:
            server.start()
    return pool_servers


def _sender_options(
    servers: configs.ServerSettings, run_dir: Path, callbacks: PoolCallbacks
) -> SenderOptions:
    return SenderOptions(
        folder=_weights_folder(servers, run_dir),
        limit_s=servers.sync_timeout_s,
        on_wait=callbacks.on_wait,
        say=callbacks.say,
    )


def _weights_folder(servers: configs.ServerSettings, run_dir: Path) -> Path:
    """Returns the directory of the transport `file`, a different one for each run."""
    if not servers.folder:
        return run_dir / "weights"
    run_name = f"{socket.gethostname()} {run_dir.resolve()}"
    return Path(servers.folder, hashlib.sha256(run_name.encode()).hexdigest()[:16])
