"""vLLM servers that are kept alive and hold the right weights.

Rank 0 starts, watches, restarts and updates them. They are asked over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from grpo import config as configs
from grpo.engines import EngineError, RefusedError, Request, SamplingOptions
from grpo.engines.servers.server import (
    COMMAND,
    Server,
    arguments,
    check_split,
    completion_of,
    cores_of,
    difference,
    environment_of,
    free_port,
    token_of,
    transfer_of,
)
from grpo.engines.transfer.nccl import NcclSender
from grpo.engines.transfer.weights import SharedWeights
from grpo.run import ranks
from grpo.types import Completion, UserError

T = TypeVar("T")
WATCH_S = 1.0  # between looks at the servers
HEALTH_S = 20.0  # a server that says nothing for so long is lost
GENERATED = re.compile(r"^vllm:generation_tokens_total\S* (\S+)$", re.MULTILINE)


class Fleet:
    """What is common to all that is done with servers.

    Rank 0 leads; on other ranks it only knows where they are.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        settings: configs.Engine,
        dtype: str,
        max_model_len: int,
        run_dir: Path,
        decode: Callable[[Sequence[int]], str],
        load_weights: bool = False,
        float32_head: bool = False,
        on_wait: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`load_weights=False` starts from random weights: a sync must come first.

        `decode` makes text of tokens. `on_wait` is called five times a second while waiting and may
        raise; `say` tells what is done about lost servers. Raises UserError for what cannot be.
        """
        assert settings.servers is not None
        self._settings, self._pool, self._decode, self._on_wait, self._say = (
            settings,
            settings.servers,
            decode,
            on_wait,
            say,
        )
        self._leads, self._dtype = ranks.rank() == 0, getattr(torch, dtype)
        if self._pool.count and ranks.count() > ranks.local_count():
            raise UserError(
                "engine.servers.count: ranks on several machines do not reach rank 0's own: use "
                "urls (launch/server.sh)"
            )
        self._transfer = transfer_of(self._pool, torch.cuda.is_available())
        check_split(model_dir, self._pool.tensor_parallel)
        token = token_of(self._pool)
        # other runs may have this folder
        ours = hashlib.sha256(f"{socket.gethostname()} {run_dir.resolve()}".encode()).hexdigest()[
            :16
        ]
        folder = Path(self._pool.folder, ours) if self._pool.folder else run_dir / "weights"
        carried = self._leads and self._transfer != "nccl"
        self._weights = (
            SharedWeights(folder if self._transfer == "file" else None) if carried else None
        )
        # another run's prefixes are not ours
        self._salt = ranks.gather("the caches' salt", secrets.token_hex(8))[0]
        self._update_info: dict[str, Any] = {}  # of the weights sent last
        self._version, self._restarts, self._closed = -1, 0, False
        self._idle_s, self._idle_since = 0.0, time.monotonic() if self._leads else None
        self._nccl = NcclSender(self, self._pool.tensor_parallel)
        self._proof: (
            tuple[Sequence[Request], SamplingOptions, list[tuple[Completion, ...]]] | None
        ) = None
        self.counts = {"lost": 0, "restarted": 0, "retried": 0}
        words = arguments(model_dir, settings, dtype, max_model_len, float32_head)
        words += ["--weight-transfer-config", json.dumps({"backend": f"grpo_{self._transfer}"})]
        words += ["--load-format", "auto" if load_weights else "dummy"]
        ports = ranks.gather(
            "the servers' ports",
            [free_port() for _ in range(self._pool.count)] if self._leads else [],
        )[0]
        self._servers = [
            Server(url=url.rstrip("/"), heard=time.monotonic()) for url in self._pool.urls
        ]
        for i, port in enumerate(ports):
            server = Server(
                url=f"http://127.0.0.1:{port}",
                log_file=run_dir / "logs" / f"server-{i}.log",
                heard=time.monotonic(),
            )
            server.command = [*COMMAND, *words, "--host", "127.0.0.1", "--port", str(port)]
            server.cores = cores_of(i, self._pool)
            server.environment = environment_of(token, i, self._pool, server.cores)
            self._servers.append(server)
            if self._leads:
                server.start()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="engine pool").start()
        self._http, self._changed, self._sending = self._run(_made(token))
        self._watching = (
            [self._submit(self._watch(server)) for server in self._servers] if self._leads else []
        )

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T], limit_s: float = 60.0) -> T:
        """Runs a coroutine in the pool's loop; given up, it is cancelled there."""
        future, deadline = self._submit(work), time.monotonic() + limit_s
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(0.2)
                self._on_wait()
                if time.monotonic() > deadline:
                    waiting = ", ".join(
                        f"{server.url} {'up' if server.up else 'lost'}, {server.load} asked"
                        for server in self._servers
                    )
                    raise EngineError(
                        f"the engine pool did not answer within {limit_s:g} s: {waiting}"
                    )
        finally:
            future.cancel()

    async def _call(
        self,
        server: Server,
        path: str,
        body: Any = None,
        timeout_s: float | None = None,
        method: str = "POST",
    ) -> Any:
        """Returns a server's answer. Raises EngineError: refused, broken off, or too late."""
        import httpx
        import msgspec

        try:
            answer = await self._http.request(
                method,
                server.url + path,
                content=None if body is None else msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
                timeout=httpx.Timeout(timeout_s or self._settings.timeout_s, connect=10),
            )
        except httpx.HTTPError as error:
            raise EngineError(
                f"{path} at {server.told()}: {type(error).__name__} {error}".rstrip()
            ) from None
        server.heard = time.monotonic()
        if answer.status_code in (401, 403):
            raise UserError(
                f"{server.url}{path} refuses our token ({answer.status_code}): set "
                f"{self._pool.token_env} to the server's own"
            )
        if answer.status_code != 200:
            kind = RefusedError if 400 <= answer.status_code < 500 else EngineError
            raise kind(f"{path} at {server.told()}: {answer.status_code} {answer.text[:300]}")
        return (
            msgspec.json.decode(answer.content)
            if "json" in answer.headers.get("content-type", "")
            else answer.text
        )

    async def _ask(
        self, server: Server, request: Request, options: SamplingOptions, version: int
    ) -> tuple[Completion, ...]:
        more: dict[str, Any] = (
            {"stop": list(options.stop), "include_stop_str_in_output": True}
            if options.stop
            else {"detokenize": False}
        )
        params = {
            "n": request.n,
            "seed": request.seed,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "stop_token_ids": list(options.stop_token_ids),
            "ignore_eos": options.ignore_eos,
            "logprobs": 0,
            "skip_special_tokens": False,
            **more,
        }
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": params,
            "cache_salt": f"{self._salt} {version}",
        }
        answer = await self._call(server, "/inference/v1/generate", body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = tuple(completion_of(choice, self._decode, self._version) for choice in choices)
        ended = all(completion.finish_reason in ("stop", "length") for completion in found)
        if (
            len(found) != request.n
            or not ended
            or (version >= 0 and any(v[0] < 0 for one in found for v in one.versions))
        ):
            raise EngineError(
                f"{server.url}: {len(found)} of {request.n} completions, or broken off, or from "
                "weights that we did not send"
            )
        return found

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _all_up(self) -> None:
        while not all(server.up for server in self._servers):
            await self._watched()
            await asyncio.sleep(0.1)

    async def _watched(self) -> None:
        """Raises what ended the watch over the servers: without it none would come back."""
        for task in self._watching:
            if task.done() and not self._closed:
                task.result()

    async def _watch(self, server: Server) -> None:
        """Brings a server up, watches it, and brings it up again when it is lost.

        This goes on for as long as the pool exists.
        """
        while True:
            try:
                await self._bring_up(server)
                async with self._sending:  # a sync may have gone by meanwhile
                    if self._transfer != "nccl" and server.version != self._version:
                        await self._update(server, self._version)
                    server.heard = server.moved = time.monotonic()
                    server.tokens, server.up, server.starts = -1.0, True, server.starts + 1
                await self._notify()
                why = await self._until_lost(server)
            except EngineError as error:
                # nothing has run yet: a server that does not start is the user's to mend
                if self._version < 0:
                    raise
                why = str(error)
                await asyncio.sleep(WATCH_S)
            server.up, server.version = False, -1
            self.counts["lost"] += 1
            self._say(f"engine: lost {server.told()}: {why}")
            if server.local:
                self._restarts += 1
                if self._restarts > self._pool.restarts:
                    raise EngineError(
                        f"{self._restarts} servers were lost (engine.servers.restarts), the last: "
                        f"{server.told()}: {why}"
                    )
                server.kill()
                server.start()
                self.counts["restarted"] += 1
            await self._notify()

    async def _until_lost(self, server: Server) -> str:
        while True:
            await asyncio.sleep(WATCH_S)
            if not server.up:
                return "a request to it failed"
            if server.process is not None and server.process.poll() is not None:
                return "its process ended"
            try:
                await self._call(server, "/health", timeout_s=WATCH_S, method="GET")
            except EngineError as error:
                if ": 503" in str(error):
                    return "it says that its engine is dead"
            if time.monotonic() - server.heard > HEALTH_S:
                return f"no answer for {HEALTH_S:g} s"
            with contextlib.suppress(EngineError):
                found = GENERATED.search(
                    await self._call(server, "/metrics", timeout_s=WATCH_S, method="GET")
                )
                made = float(found[1]) if found else 0.0
                # it may be taking weights
                if made != server.tokens or not server.load or server.version != self._version:
                    server.tokens, server.moved = made, time.monotonic()
            if time.monotonic() - server.moved > self._pool.stall_s:
                return f"it made no token for {self._pool.stall_s:g} s (engine.servers.stall_s)"

    async def _bring_up(self, server: Server) -> None:
        """Waits until the server answers, sends it the current weights and checks what it samples.

        The weights are those that the other servers have, and its samples are compared with theirs.
        """
        deadline, tries = time.monotonic() + self._settings.start_timeout_s, 0
        while True:
            try:
                await self._call(server, "/health", timeout_s=5, method="GET")
                break
            except EngineError:
                if server.process is not None and server.process.poll() is not None:
                    tries += 1
                    if tries > 1:
                        raise EngineError(f"the server does not start: {server.told()}") from None
                    # its port may have been taken
                    server.start(free_port() if self._version < 0 else None)
                elif time.monotonic() > deadline and server.local:
                    raise EngineError(
                        f"the server did not start within {self._settings.start_timeout_s:g} s: "
                        f"{server.told()}"
                    ) from None
                await asyncio.sleep(0.2)
        if not server.local:  # it may have been left in the middle of something
            for path in ("/abort_requests", "/finish_weight_update", "/resume"):
                with contextlib.suppress(EngineError):
                    await self._call(server, path, {}, timeout_s=60)
            # asks the engine: it may hang while /health answers
            await self._call(server, "/weight_info", timeout_s=60, method="GET")
        if self._transfer == "nccl":  # until the next sync it waits
            return
        async with self._sending, self._taking(server, self._version):
            await self._call(server, "/init_weight_transfer_engine", {"init_info": {}})
            if self._version < 0:
                return
            # what other ranks asked too early, of random weights
            await self._call(server, "/pause?mode=abort", {})
            await self._update(server, self._version)
            await self._call(server, "/reset_prefix_cache", {})
            await self._call(server, "/resume", {})
        if self._proof is not None:
            requests, options, expected = self._proof
            async with self._taking(server, self._version):
                found = [
                    await self._ask(server, request, options, self._version) for request in requests
                ]
            gap = difference(expected, found)
            if not gap < 0.5:
                raise EngineError(
                    f"{server.told()} came back and disagrees with the others: mean |difference "
                    f"of logprobs| {gap:.4g}"
                )
            self._say(f"engine: {server.url} is back with weights {self._version} (gap {gap:.1e})")

    async def _update(self, server: Server, version: int) -> None:
        server.version = -1
        async with self._taking(server, version), self._held(server):
            await self._call(server, "/start_weight_update", {})
            await self._call(server, "/update_weights", {"update_info": self._update_info})
            await self._finish(server, version)

    @contextlib.asynccontextmanager
    async def _taking(self, server: Server, version: int) -> AsyncIterator[None]:
        """Limits a sync: of a hung engine's server /health may still answer. Raises EngineError."""
        limit = self._pool.sync_timeout_s
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError:
            told = (
                f"{server.told()} was not done with weights {version} within {limit:g} s "
                "(engine.servers.sync_timeout_s)"
            )
            raise EngineError(told) from None

    @contextlib.asynccontextmanager
    async def _held(self, server: Server) -> AsyncIterator[None]:
        """Within it what the server samples stands still.

        It goes on, with what it has in its cache, afterwards.
        """
        sampling = server.load > 0
        if sampling:
            await self._call(server, "/pause?mode=keep", {})
        yield  # after an error the server is lost: nothing to go on with
        if sampling:
            await self._call(server, "/resume", {})

    async def _finish(self, server: Server, version: int) -> None:
        await self._call(server, "/finish_weight_update", {"weight_version": str(version)})
        held = (await self._call(server, "/weight_info", method="GET"))["weight_version"]
        if held != str(version):
            raise EngineError(f"{server.told()} acknowledged weight version {held}, sent {version}")
        server.version = version

    async def _end(self) -> None:
        """Nobody may be left waiting for an answer.

        A thread that did would keep this process from ending.
        """
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=2) if left else None
        await self._http.aclose()

    def close(self) -> None:
        """Stops the watch, kills the servers started here and frees the weights' carrier."""
        self._closed = True
        for task in self._watching:
            task.cancel()
        for server in self._servers if self._leads else ():
            server.kill()
        with contextlib.suppress(Exception):
            self._submit(self._end()).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._weights is not None:
            self._weights.close()
            self._weights = None


async def _made(token: str) -> tuple[Any, asyncio.Condition, asyncio.Lock]:
    """Returns what belongs to the loop that it is made in."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(
        headers={"Authorization": f"Bearer {token}"}, limits=limits, trust_env=False
    )
    return client, asyncio.Condition(), asyncio.Lock()
