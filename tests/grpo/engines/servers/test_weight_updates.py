"""`ServersReceiver`, which updates the weights of all servers, with a client that records."""

import asyncio
import time
from typing import NamedTuple

import pytest

from grpo import config as configs
from grpo.engines import EngineError, WrongWeightVersionError
from grpo.engines.servers.loop_thread import LoopThread
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import Supervisor
from grpo.engines.servers.weight_updates import ServersReceiver, WeightUpdates
from grpo.engines.transfer.nccl import EngineGroup

SETTINGS = configs.EngineSettings(servers=configs.ServerSettings(count=1))


class Post(NamedTuple):
    """A POST request."""

    url: str
    path: str
    body: dict


class RecordingClient:
    """Records POST requests instead of sending them.

    Attributes:
        posts: the requests.
        reported_version: the weight version that every server reports. If it is None, the servers
            report the version in the last request.
    """

    def __init__(self):
        self.posts = []
        self.reported_version = None

    async def post(self, server, path, body, timeout_s=None):
        self.posts.append(Post(server.url, path, body))

    async def weight_version(self, server, timeout_s=None):
        if self.reported_version is not None:
            return self.reported_version
        return self.posts[-1].body["weight_version"]

    def paths(self, url):
        """Returns the paths of the requests to a server."""
        return [post.path for post in self.posts if post.url == url]


class ReceiverSetup(NamedTuple):
    """A receiver for weight version 3, with its client and its servers."""

    receiver: ServersReceiver
    client: RecordingClient
    servers: list[Server]


@pytest.fixture
def receiver_setup():
    """A receiver of three servers: s0 and s2 are up, s1 is lost."""
    servers = [Server(url=f"s{i}", up=i != 1, version=2, num_starts=1) for i in range(3)]
    state = PoolState(servers)
    client = RecordingClient()
    updates = WeightUpdates(client, sync_timeout_s=10.0)
    supervisor = Supervisor(state, updates, SETTINGS, keeps_weights=False, say=lambda _: None)
    loop = LoopThread("engine pool")
    receiver = ServersReceiver(supervisor, updates, loop, version=3, num_workers=4)

    async def no_cleanup():
        pass

    yield ReceiverSetup(receiver, client, servers)
    loop.close(no_cleanup())


def test_nccl_transfer_updates_all_servers_that_are_up(receiver_setup):
    receiver, client, servers = receiver_setup
    assert isinstance(receiver, EngineGroup)  # the transport `nccl` requires it
    assert receiver.members() == [("s0", 1), ("s2", 1)]
    receiver.init_weight_transfer_engine({"rank_offset": 1, "world_size": 9})
    # Rank 0 is the sender. Ranks 1 to 4 are the workers of s0, ranks 5 to 8 those of s2.
    rank_offsets = [(post.url, post.body["init_info"]["rank_offset"]) for post in client.posts]
    assert rank_offsets == [("s0", 1), ("s2", 5)]
    client.posts.clear()
    receiver.start_weight_update()
    # Version -1: servers get no requests during the update.
    assert [server.version for server in servers] == [-1, 2, -1]
    receiver.update_weights({"names": ["a"]})
    client.reported_version = "3"
    receiver.finish_weight_update()
    assert [server.version for server in servers] == [3, 2, 3]
    assert client.paths("s0") == [
        "/pause?mode=keep",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/resume",
    ]


def test_failure_of_one_server_cancels_the_steps_of_the_others(receiver_setup):
    """A late request of the failed update would make the second attempt fail."""
    receiver, client, _ = receiver_setup
    receiver.members()
    record_post = client.post

    async def fail_or_record_late(server, path, body, timeout_s=None):
        if server.url == "s2":
            raise EngineError("lost")
        await asyncio.sleep(0.2)
        await record_post(server, path, body)

    client.post = fail_or_record_late
    with pytest.raises(EngineError, match="lost"):
        receiver.start_weight_update()
    time.sleep(0.5)
    assert client.posts == []


def test_server_that_acknowledges_a_wrong_version_is_an_error(receiver_setup):
    receiver, client, _ = receiver_setup
    receiver.members()
    client.reported_version = "2"
    with pytest.raises(WrongWeightVersionError, match="weight version 2, expected version 3"):
        receiver.finish_weight_update()


def test_sending_weights_fails_if_no_server_is_up(receiver_setup):
    receiver, _, servers = receiver_setup
    for server in servers:
        server.up = False
    with pytest.raises(EngineError, match="weights 3: no server is up: s0, s1, s2"):
        receiver.members()


def test_only_servers_that_are_sampling_are_paused_to_load_stored_weights(receiver_setup):
    receiver, client, servers = receiver_setup
    servers[2].load = 5
    client.reported_version = "3"
    receiver.load_stored_weights({"path": "p", "names": []})
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert client.paths("s0") == update
    assert client.paths("s2") == ["/pause?mode=keep", *update, "/resume"]
    assert [server.version for server in servers] == [3, 2, 3]
