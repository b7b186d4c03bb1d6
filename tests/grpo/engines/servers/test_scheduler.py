"""The scheduler: which server gets a request, and when a request is retried. No real servers."""

import asyncio
from typing import NamedTuple

import pytest

from grpo import config as configs
from grpo.engines import EngineError, RejectedRequestError, Request, SamplingOptions
from grpo.engines.servers import availability as availability_module
from grpo.engines.servers.availability import InferredAvailability, SupervisedAvailability
from grpo.engines.servers.scheduler import Scheduler
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import Supervisor
from grpo.engines.servers.weight_updates import WeightUpdates

REQUEST = Request(prompt_ids=(1,), seed=7)
OPTIONS = SamplingOptions(max_tokens=24)
SETTINGS = configs.EngineSettings(
    servers=configs.ServerSettings(count=1), max_sequences=8, start_timeout_s=1.0
)


class FakeClient:
    """A client whose method `generate` is a function of the test."""

    def __init__(self, generate):
        self.generate = generate


class Rank0(NamedTuple):
    """The objects of rank 0 that schedule requests."""

    scheduler: Scheduler
    state: PoolState
    supervisor: Supervisor


def make_rank0(*loads, generate=None, keeps_weights=True):
    """Returns the objects of rank 0 for servers that are up and have these loads."""
    servers = [Server(url=f"s{i}", up=True, version=1, load=load) for i, load in enumerate(loads)]
    state = PoolState(servers)
    state.version = 1
    client = FakeClient(generate)
    updates = WeightUpdates(client, sync_timeout_s=10.0)
    supervisor = Supervisor(
        state, updates, SETTINGS, keeps_weights=keeps_weights, say=lambda _: None
    )
    availability = SupervisedAvailability(state, supervisor)
    scheduler = Scheduler(state, client, availability, max_sequences=8, retries=2)
    return Rank0(scheduler, state, supervisor)


def test_request_goes_to_the_least_loaded_server_and_waits_while_all_are_full():
    async def reserve_three_times():
        rank0 = make_rank0(6, 2)
        server = await rank0.scheduler._reserve(4)
        assert server.url == "s1"  # the loads are now 6 and 6
        server = await rank0.scheduler._reserve(2)
        assert server.url == "s0"  # the loads are now 8 and 6
        waiting = asyncio.ensure_future(rank0.scheduler._reserve(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        rank0.state.servers[1].load -= 4
        await rank0.state.notify()
        server = await asyncio.wait_for(waiting, 5)
        assert server.url == "s1"
        assert server.load == 6

    asyncio.run(reserve_three_times())


def test_request_fails_after_the_configured_number_of_retries_on_different_servers():
    attempts = []

    async def fail(server, request, options, version):
        attempts.append((server.url, request.seed))
        raise EngineError("broken off")

    async def sample():
        rank0 = make_rank0(0, 0, 0, 0, generate=fail)
        with pytest.raises(
            EngineError,
            match=r"failed 3 times \(engine.servers.retries\); the last error: broken off",
        ):
            await rank0.scheduler.sample(REQUEST, OPTIONS)
        assert all(server.load == 0 for server in rank0.state.servers)
        assert len(rank0.state.up_servers()) == 1
        assert rank0.state.counts["retried"] == 3

    asyncio.run(sample())
    assert attempts == [("s0", 7), ("s1", 7), ("s2", 7)]


def test_rejected_request_is_not_retried_and_its_server_stays_up():
    async def reject(server, request, options, version):
        raise RejectedRequestError("s0", "/generate", 400, "the prompt is too long")

    async def sample():
        rank0 = make_rank0(0, 0, generate=reject)
        with pytest.raises(RejectedRequestError, match="too long"):
            await rank0.scheduler.sample(REQUEST, OPTIONS)
        for server in rank0.state.servers:
            assert server.up
            assert server.load == 0

    asyncio.run(sample())


def test_request_to_a_lost_server_is_retried_although_its_connection_stays_open():
    async def hang_on_s0(server, request, options, version):
        if server.url == "s0":
            await asyncio.sleep(1000)
        return server.url

    async def sample():
        rank0 = make_rank0(0, 0, generate=hang_on_s0)
        completions = asyncio.ensure_future(rank0.scheduler.sample(REQUEST, OPTIONS))
        await asyncio.sleep(0.1)
        rank0.state.servers[0].up = False  # as the supervisor does for a lost server
        assert await asyncio.wait_for(completions, 10) == "s1"

    asyncio.run(sample())


def test_rank_that_does_not_supervise_the_servers_avoids_a_server_that_failed(monkeypatch):
    monkeypatch.setattr(availability_module, "AVOID_FAILED_S", 1000)
    attempts = []

    async def fail_on_s0(server, request, options, version):
        attempts.append(server.url)
        if server.url == "s0":
            raise EngineError("no response")
        return server.url

    async def sample_three_times():
        state = PoolState([Server(url=f"s{i}") for i in range(3)])
        client = FakeClient(fail_on_s0)
        availability = InferredAvailability(state, client, start_timeout_s=1.0)
        scheduler = Scheduler(state, client, availability, max_sequences=8, retries=2)
        for _ in range(3):
            assert await asyncio.wait_for(scheduler.sample(REQUEST, OPTIONS), 10) == "s1"

    asyncio.run(sample_three_times())
    assert attempts == ["s0", "s1", "s1", "s1"]


def test_with_nccl_a_request_waits_for_a_full_pool_and_fails_if_no_server_has_weights():
    async def reserve():
        rank0 = make_rank0(8, 8, keeps_weights=False)  # as with the transport `nccl`
        waiting = asyncio.ensure_future(rank0.scheduler._reserve(4))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        for server in rank0.state.servers:
            server.version = -1
        async with rank0.supervisor._sync_lock:  # during a sync, which may send weights
            await rank0.state.notify()
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await rank0.state.notify()
        with pytest.raises(EngineError, match="every server was lost"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(reserve())
