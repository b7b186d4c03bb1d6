"""The NCCL transport when a server fails or is lost during a transfer. NCCL itself is replaced."""

import threading
import time

import pytest

from grpo.engines import EngineError, ServerError
from grpo.engines.transfer.interface import SenderOptions
from grpo.engines.transfer.nccl import NcclSender


class FakeGroup:
    """Two servers whose first calls of `update_weights` fail."""

    version = 3
    num_workers = 1

    def __init__(self, num_failures):
        self.num_failures = num_failures  # the number of calls of `update_weights` that will fail
        self.num_ended_updates = 0

    def members(self):
        return [("s0", 1), ("s1", 1)]

    def init_weight_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        pass

    def update_weights(self, update_info):
        if self.num_failures > 0:
            self.num_failures -= 1
            raise ServerError("s0", "/update_weights", 500, "broken off")

    def finish_weight_update(self, weight_version=None):
        pass

    def load_stored_weights(self, update_info):
        raise NotImplementedError

    def end_failed_update(self):
        self.num_ended_updates += 1


class FakeTrainer:
    """Stands in for vLLM's sender.

    vLLM's sender reads the result of `update_weights` only after its broadcast, and the broadcast
    waits for all servers. After a failure, `send_weights` therefore blocks until `shutdown`.
    """

    def __init__(self):
        self.is_shut_down = threading.Event()
        self.update_failed = False

    def send_weights(self):
        thread = threading.Thread(target=self.update)
        thread.start()
        thread.join()
        if self.update_failed:
            assert self.is_shut_down.wait(60)

    def update(self):
        try:
            self.client.update_weights({})
        except EngineError:
            self.update_failed = True

    def shutdown(self):
        self.is_shut_down.set()


@pytest.fixture
def messages():
    """The messages that the sender prints."""
    return []


@pytest.fixture
def sender(messages):
    return NcclSender(SenderOptions(limit_s=50, say=messages.append))


@pytest.fixture
def trainers(sender, monkeypatch):
    """The fake trainers that the sender has created, one per attempt to send."""
    trainers = []

    def form_group(*_):
        trainer = FakeTrainer()
        trainers.append(trainer)
        sender._trainer = trainer

    monkeypatch.setattr(sender, "_form_group", form_group)
    return trainers


def test_failure_of_a_server_ends_a_transfer_that_still_waits_for_all_servers(sender, trainers):
    group = FakeGroup(num_failures=2)
    start = time.monotonic()
    with pytest.raises(
        EngineError,
        match="weights 3 to 2 servers by NCCL failed: /update_weights at s0: 500 broken off",
    ):
        sender.send(None, group)
    assert time.monotonic() - start < 10
    assert all(trainer.is_shut_down.is_set() for trainer in trainers)
    assert sender._trainer is None
    assert group.num_ended_updates == 2


def test_failed_transfer_is_tried_a_second_time(sender, trainers, messages):
    group = FakeGroup(num_failures=1)
    sender.send(None, group)
    assert len(trainers) == 2
    assert group.num_ended_updates == 1
    assert "trying again without the lost servers" in messages[0]


def test_receiver_must_be_a_group_of_servers():
    with pytest.raises(TypeError, match="a group of servers"):
        NcclSender(SenderOptions()).send(None, object())
