"""All servers as one receiver of weights, with a client that only records."""

import asyncio
import time

import pytest

from grpo import config as configs
from grpo.engines import EngineError, WrongWeightVersionError
from grpo.engines.servers.loop_thread import LoopThread
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import Supervisor
from grpo.engines.servers.weight_updates import ServersReceiver, WeightUpdates
from grpo.engines.transfer.nccl import EngineGroup

SETTINGS = configs.Engine(servers=configs.Servers(count=1))


class Client:
    """Records what is posted; its servers hold the version that was sent last, or `held`."""

    def __init__(self):
        self.posts = []
        self.held = None

    async def post(self, server, path, body, timeout_s=None):
        self.posts.append((server.url, path, body))

    async def weight_version(self, server, timeout_s=None):
        return self.held or self.posts[-1][2]["weight_version"]


@pytest.fixture
def group():
    """Yields `(receiver, client, servers)`: two servers that are up and one that is lost."""
    servers = [Server(url=f"s{i}", up=i != 1, version=2, num_starts=1) for i in range(3)]
    state = PoolState(servers)
    client = Client()
    updates = WeightUpdates(client, sync_timeout_s=10.0)
    supervisor = Supervisor(state, updates, SETTINGS, keeps_weights=False, say=lambda _: None)
    loop = LoopThread("drill")
    receiver = ServersReceiver(supervisor, updates, loop, version=3, num_workers=4)

    async def nothing():
        pass

    yield receiver, client, servers
    loop.close(nothing())


def test_a_live_transfer_drives_all_servers_that_are_up(group):
    receiver, client, servers = group
    assert isinstance(receiver, EngineGroup)  # what the transport nccl asks for
    assert receiver.members() == [("s0", 1), ("s2", 1)]
    receiver.init_weight_transfer_engine({"rank_offset": 1, "world_size": 9})
    assert [(url, body["init_info"]["rank_offset"]) for url, _, body in client.posts] == [
        ("s0", 1),
        ("s2", 5),
    ]
    client.posts.clear()
    receiver.start_weight_update()
    assert [server.version for server in servers] == [-1, 2, -1]  # nothing is asked of them
    receiver.update_weights({"names": ["a"]})
    client.held = "3"
    receiver.finish_weight_update()
    assert [server.version for server in servers] == [3, 2, 3]
    assert [path for url, path, _ in client.posts if url == "s0"] == [
        "/pause?mode=keep",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/resume",
    ]


def test_after_a_server_has_failed_no_step_of_another_goes_on(group):
    """What it still posted would stand in the way of the second try."""
    receiver, client, _ = group
    receiver.members()
    post = client.post

    async def slow_or_refused(server, path, body, timeout_s=None):
        if server.url == "s2":
            raise EngineError("lost")
        await asyncio.sleep(0.2)
        await post(server, path, body)

    client.post = slow_or_refused
    with pytest.raises(EngineError, match="lost"):
        receiver.start_weight_update()
    time.sleep(0.5)
    assert client.posts == []


def test_a_server_that_acknowledges_another_version_is_an_error(group):
    receiver, client, _ = group
    receiver.members()
    client.held = "2"
    with pytest.raises(WrongWeightVersionError, match="weight version 2, expected version 3"):
        receiver.finish_weight_update()


def test_without_a_server_that_is_up_there_is_nobody_to_send_to(group):
    receiver, _, servers = group
    for server in servers:
        server.up = False
    with pytest.raises(EngineError, match="weights 3: no server is up: s0, s1, s2"):
        receiver.members()


def test_only_a_server_that_samples_is_paused_for_stored_weights(group):
    receiver, client, servers = group
    servers[2].load = 5
    client.held = "3"
    receiver.load_stored_weights({"path": "p", "names": []})
    paths = {url: [path for name, path, _ in client.posts if name == url] for url in ("s0", "s2")}
    assert paths["s0"] == ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert paths["s2"] == ["/pause?mode=keep", *paths["s0"], "/resume"]
    assert [server.version for server in servers] == [3, 2, 3]
