"""Two real vLLM servers.

What they sample, who may ask them, what is done when one is killed, hangs or gets broken weights.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from server_pools import OPTIONS, REQUESTS, pool_of, settings, weights
from tiny_models import tiny_config
from whole_runs import wait_for

from grpo import config as configs
from grpo.engines import EngineError, RefusedError, Request
from grpo.engines.local.engine import VllmEngine
from grpo.engines.servers import fleet
from grpo.engines.servers import pool as pool_module
from grpo.engines.servers.plugin import TOKEN
from grpo.engines.servers.pool import Pool
from grpo.engines.servers.server import Server
from grpo.engines.transfer.nccl import NcclSender
from grpo.run import ranks
from grpo.types import UserError

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[4]


def test_two_servers_sample_what_one_child_process_samples(pool, tiny, tmp_path):
    engine = VllmEngine(
        model_dir=str(tiny()),
        settings=settings(),
        dtype="float32",
        max_model_len=160,
        log_file=tmp_path / "log",
        load_weights=True,
    )
    expected = engine.generate(REQUESTS, OPTIONS)
    engine.close()
    done = []
    found = pool.generate(REQUESTS, OPTIONS, lambda *progress: done.append(progress))
    made = [pool._run(pool._call(server, "/metrics", method="GET")) for server in pool._servers]
    # both had work
    assert done[-1] == (36, 36) and all(float(fleet.GENERATED.search(text)[1]) > 0 for text in made)
    for ours, theirs in zip(found, expected, strict=True):
        assert [(c.token_ids, c.text, c.finish_reason) for c in ours] == [
            (c.token_ids, c.text, c.finish_reason) for c in theirs
        ]
        assert all(c.versions == ((1, 0, 24),) for c in ours)
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_every_route_asks_for_the_token_and_pickles_are_not_served(pool):
    url, token = pool._servers[0].url, pool._servers[0].environment[TOKEN]
    for method, path in (
        ("GET", "/health"),
        ("POST", "/update_weights"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/pause"),
        ("GET", "/docs"),
    ):
        assert httpx.request(method, url + path).status_code == 401
        assert (
            httpx.request(
                method, url + path, headers={"Authorization": "Bearer " + token[:-1]}
            ).status_code
            == 401
        )
    right = {"Authorization": f"Bearer {token}"}
    assert (
        httpx.post(url + "/collective_rpc", headers=right, json={"method": "x"}).status_code == 403
    )
    assert httpx.get(url + "/health", headers=right).status_code == 200
    assert url.startswith("http://127.0.0.1:")


def test_new_weights_reach_every_server_and_their_prefixes_are_not_those_of_the_old(pool, tiny):
    before = pool.prove(REQUESTS[:4], OPTIONS)
    pool.load_weights(weights(tiny(), 0.7), 2)
    after = pool.prove(REQUESTS[:4], OPTIONS)
    assert len(after) == 2 and fleet.difference(after[0], after[1]) < 1e-4 < fleet.difference(
        before[0], after[0]
    )
    pool.load_weights(weights(tiny()), 3)
    assert fleet.difference(before[0], pool.prove(REQUESTS[:4], OPTIONS)[1]) < 1e-4


def test_a_server_whose_trainer_was_killed_while_it_started_ends():
    dead = subprocess.Popen(["true"])
    dead.wait()
    program = f"""import os, subprocess; from grpo.engines.servers.plugin import _end_with
print(subprocess.Popen(['sleep', '60']).pid, flush=True); _end_with(os.getppid(), {dead.pid})"""
    server = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    core = int(server.stdout.readline())
    assert server.wait(timeout=60) == -signal.SIGKILL
    wait_for(
        lambda: (
            not psutil.pid_exists(core) or psutil.Process(core).status() == psutil.STATUS_ZOMBIE
        ),
        seconds=5,
    )


def bare(*loads):
    """A pool of servers that are up, without servers."""
    made = object.__new__(Pool)
    made._servers = [
        Server(url=f"s{i}", up=True, version=1, load=load) for i, load in enumerate(loads)
    ]
    made._leads, made._version, made._watching, made._transfer, made._idle_since, made._idle_s = (
        True,
        1,
        [],
        "memory",
        None,
        0.0,
    )
    made._settings, made._pool = (
        SimpleNamespace(max_sequences=8, start_timeout_s=1.0),
        SimpleNamespace(retries=2),
    )
    made._changed, made._sending, made.counts = asyncio.Condition(), asyncio.Lock(), {"retried": 0}
    return made


def test_a_request_goes_where_the_least_is_to_do_and_waits_where_all_is_full():
    async def drill():
        pool = bare(6, 2)
        # loads are now 8 and 6
        assert [(await pool._free(size)).url for size in (4, 2)] == ["s1", "s0"]
        waiting = asyncio.ensure_future(pool._free(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pool._servers[1].load -= 4
        await pool._notify()
        assert (await asyncio.wait_for(waiting, 5)).url == "s1" and pool._servers[1].load == 6

    asyncio.run(drill())


def test_a_request_that_fails_everywhere_is_asked_again_so_often_and_no_more():
    asked = []

    async def drill():
        pool = bare(0, 0, 0, 0)

        async def ask(server, request, options, version):
            asked.append((server.url, request.seed))
            raise EngineError("broken off")

        pool._ask = ask
        with pytest.raises(
            EngineError,
            match=r"a request failed 3 times \(engine.servers.retries\): the last time, broken off",
        ):
            await pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS)
        assert (
            not any(server.load for server in pool._servers)
            and sum(server.up for server in pool._servers) == 1
        )

    asyncio.run(drill())
    assert asked == [("s0", 7), ("s1", 7), ("s2", 7)]


def test_a_request_that_is_refused_costs_no_server_and_is_not_asked_again():
    async def drill():
        pool = bare(0, 0)

        async def ask(server, request, options, version):
            raise RefusedError("400 the prompt is too long")

        pool._ask = ask
        with pytest.raises(RefusedError, match="too long"):
            await pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS)
        assert all(server.up and not server.load for server in pool._servers)

    asyncio.run(drill())


def test_what_a_lost_machine_was_asked_is_asked_elsewhere_though_its_connection_stays_open():
    async def drill():
        pool = bare(0, 0)

        async def ask(server, request, options, version):
            if server.url == "s0":
                await asyncio.sleep(1000)
            return server.url

        pool._ask = ask
        asked = asyncio.ensure_future(pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS))
        await asyncio.sleep(0.1)
        pool._servers[0].up = False  # the watch over it says so
        assert await asyncio.wait_for(asked, 10) == "s1"

    asyncio.run(drill())


def test_a_rank_that_does_not_watch_the_servers_asks_others_than_the_one_that_failed(monkeypatch):
    monkeypatch.setattr(pool_module, "AVOID_S", 1000)
    asked = []

    async def drill():
        pool = bare(0, 0, 0)
        pool._leads, pool._version = False, -1

        async def ask(server, request, options, version):
            asked.append(server.url)
            if server.url == "s0":
                raise EngineError("nobody there")
            return server.url

        pool._ask = ask
        for _ in range(3):
            assert (
                await asyncio.wait_for(pool._sampled(Request(prompt_ids=(1,), seed=7), OPTIONS), 10)
                == "s1"
            )

    asyncio.run(drill())
    assert asked == ["s0", "s1", "s1", "s1"]


def test_by_nccl_a_full_pool_is_waited_for_and_one_without_weights_is_an_error():
    async def drill():
        pool = bare(8, 8)
        pool._transfer = "nccl"
        waiting = asyncio.ensure_future(pool._free(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        for server in pool._servers:
            server.version = -1
        async with pool._sending:  # a sync is under way
            await pool._notify()
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await pool._notify()
        with pytest.raises(EngineError, match="every server was lost"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(drill())


def test_a_server_that_fails_in_a_transfer_by_nccl_ends_it_though_the_learner_waits():
    class Trainer:
        """vLLM's sending side.

        It hears of the failure when its broadcast is over, which waits for all.
        """

        def __init__(self):
            self.ended = threading.Event()

        def send_weights(self):
            threading.Thread(target=self.tell).start()
            assert self.ended.wait(60)

        def tell(self):
            with contextlib.suppress(EngineError):
                self.client.update_weights({})

        def shutdown(self):
            self.ended.set()

    async def call(server, path, body):
        raise EngineError(f"{path} at {server.url}: broken off")

    async def run_in_loop():
        loop = asyncio.get_running_loop()
        fleet = SimpleNamespace(
            _call=call,
            _submit=lambda work: asyncio.run_coroutine_threadsafe(work, loop),
            _on_wait=lambda: None,
        )
        sender, trainer = NcclSender(fleet, 1), Trainer()
        sender._join = lambda *_: setattr(sender, "_trainer", trainer)
        servers = [Server(url="s0"), Server(url="s1")]
        start = time.monotonic()
        with pytest.raises(
            EngineError, match="weights 3 to 2 servers by NCCL: /update_weights at s0: broken off"
        ):
            await asyncio.to_thread(sender.send, servers, None, version=3, limit_s=50)
        assert time.monotonic() - start < 10 and trainer.ended.is_set() and sender._trainer is None

    asyncio.run(run_in_loop())


def test_what_cannot_be_is_told_before_anything_starts(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs GPUs on both sides"):
        pool_of(tiny(), tmp_path, transfer="nccl")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "count", lambda: 4)
        patch.setattr(ranks, "local_count", lambda: 2)
        with pytest.raises(
            UserError,
            match=r"engine.servers.count: ranks on several "
            r"machines do not reach rank 0's own: use urls",
        ):
            pool_of(tiny(), tmp_path)
    with pytest.raises(UserError, match="tensor_parallel=3 does not divide the model's 2 heads"):
        pool_of(tiny(), tmp_path, tensor_parallel=3)
    monkeypatch.delenv("GRPO_ENGINE_TOKEN", raising=False)
    with pytest.raises(UserError, match="GRPO_ENGINE_TOKEN is not set"):
        pool_of(tiny(), tmp_path, count=0, urls=["http://127.0.0.1:9"])
    for servers, message in (
        ({}, "give count"),
        ({"urls": ["http://x"], "transfer": "memory"}, "reaches this machine only"),
    ):
        with pytest.raises(UserError, match=message):
            configs.parse(
                {"engine": {"servers": servers}}
                | json.loads(
                    json.dumps(tiny_config(tmp_path, tiny()).model_dump(exclude={"engine"}))
                )
            )


def test_staleness_needs_servers(tiny, tmp_path):
    with pytest.raises(UserError, match="max_staleness needs servers"):
        tiny_config(tmp_path, tiny(), train={"rollouts": 1, "max_staleness": 1})
