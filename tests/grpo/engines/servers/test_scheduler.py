"""Which server a request goes to, and when it is sent again."""

import asyncio

import pytest

from grpo import config as configs
from grpo.engines import EngineError, RefusedError, Request, SamplingOptions
from grpo.engines.servers import availability
from grpo.engines.servers.availability import UnwatchedServers, WatchedServers
from grpo.engines.servers.scheduler import Scheduler
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import Supervisor
from grpo.engines.servers.weight_updates import WeightUpdates

REQUEST = Request(prompt_ids=(1,), seed=7)
OPTIONS = SamplingOptions(max_tokens=24)
SETTINGS = configs.Engine(servers=configs.Servers(count=1), max_sequences=8, start_timeout_s=1.0)


class Client:
    """Answers `generate` with a function of ours."""

    def __init__(self, answer=None):
        self.generate = answer


def make_scheduler(*loads, client=None, keeps_weights=True):
    """Returns the scheduler of rank 0 over servers that are up, without processes."""
    servers = [Server(url=f"s{i}", up=True, version=1, load=load) for i, load in enumerate(loads)]
    state = PoolState(servers)
    state.version = 1
    client = client or Client()
    updates = WeightUpdates(client, sync_timeout_s=10.0)
    supervisor = Supervisor(
        state, updates, SETTINGS, keeps_weights=keeps_weights, say=lambda _: None
    )
    watched = WatchedServers(state, supervisor)
    scheduler = Scheduler(state, client, watched, max_sequences=8, retries=2)
    return scheduler, state, supervisor


def test_a_request_goes_where_the_least_is_to_do_and_waits_where_all_is_full():
    async def drill():
        scheduler, state, _ = make_scheduler(6, 2)
        # loads are now 8 and 6
        assert [(await scheduler._reserve(size)).url for size in (4, 2)] == ["s1", "s0"]
        waiting = asyncio.ensure_future(scheduler._reserve(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        state.servers[1].load -= 4
        await state.notify()
        assert (await asyncio.wait_for(waiting, 5)).url == "s1" and state.servers[1].load == 6

    asyncio.run(drill())


def test_a_request_that_fails_everywhere_is_asked_again_so_often_and_no_more():
    asked = []

    async def answer(server, request, options, version):
        asked.append((server.url, request.seed))
        raise EngineError("broken off")

    async def drill():
        scheduler, state, _ = make_scheduler(0, 0, 0, 0, client=Client(answer))
        with pytest.raises(
            EngineError,
            match=r"failed 3 times \(engine.servers.retries\); the last error: broken off",
        ):
            await scheduler.sample(REQUEST, OPTIONS)
        assert not any(server.load for server in state.servers)
        assert sum(server.up for server in state.servers) == 1
        assert state.counts["retried"] == 3

    asyncio.run(drill())
    assert asked == [("s0", 7), ("s1", 7), ("s2", 7)]


def test_a_request_that_is_refused_costs_no_server_and_is_not_asked_again():
    async def answer(server, request, options, version):
        raise RefusedError("s0", "/generate", 400, "the prompt is too long")

    async def drill():
        scheduler, state, _ = make_scheduler(0, 0, client=Client(answer))
        with pytest.raises(RefusedError, match="too long"):
            await scheduler.sample(REQUEST, OPTIONS)
        assert all(server.up and not server.load for server in state.servers)

    asyncio.run(drill())


def test_what_a_lost_machine_was_asked_is_asked_elsewhere_though_its_connection_stays_open():
    async def answer(server, request, options, version):
        if server.url == "s0":
            await asyncio.sleep(1000)
        return server.url

    async def drill():
        scheduler, state, _ = make_scheduler(0, 0, client=Client(answer))
        asked = asyncio.ensure_future(scheduler.sample(REQUEST, OPTIONS))
        await asyncio.sleep(0.1)
        state.servers[0].up = False  # the watch over it says so
        assert await asyncio.wait_for(asked, 10) == "s1"

    asyncio.run(drill())


def test_a_rank_that_does_not_watch_the_servers_asks_others_than_the_one_that_failed(monkeypatch):
    monkeypatch.setattr(availability, "AVOID_FAILED_S", 1000)
    asked = []

    async def answer(server, request, options, version):
        asked.append(server.url)
        if server.url == "s0":
            raise EngineError("nobody there")
        return server.url

    async def drill():
        state = PoolState([Server(url=f"s{i}") for i in range(3)])
        client = Client(answer)
        unwatched = UnwatchedServers(state, client, start_timeout_s=1.0)
        scheduler = Scheduler(state, client, unwatched, max_sequences=8, retries=2)
        for _ in range(3):
            assert await asyncio.wait_for(scheduler.sample(REQUEST, OPTIONS), 10) == "s1"

    asyncio.run(drill())
    assert asked == ["s0", "s1", "s1", "s1"]


def test_by_nccl_a_full_pool_is_waited_for_and_one_without_weights_is_an_error():
    async def drill():
        scheduler, state, supervisor = make_scheduler(8, 8, keeps_weights=False)
        waiting = asyncio.ensure_future(scheduler._reserve(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        for server in state.servers:
            server.version = -1
        async with supervisor._sync_lock:  # a sync is under way
            await state.notify()
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await state.notify()
        with pytest.raises(EngineError, match="every server was lost"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(drill())
