"""The transport nccl, without NCCL: what it does when a server fails or is lost."""

import threading
import time

import pytest

from grpo.engines import EngineError, ServerError
from grpo.engines.transfer.interface import SenderOptions
from grpo.engines.transfer.nccl import NcclSender


class Group:
    """Two servers, of which `update_weights` fails."""

    version = 3
    num_workers = 1

    def __init__(self, failures):
        self.failures = failures  # how often `update_weights` fails
        self.num_settled = 0

    def members(self):
        return [("s0", 1), ("s1", 1)]

    def init_weight_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        pass

    def update_weights(self, update_info):
        if self.failures:
            self.failures -= 1
            raise ServerError("s0", "/update_weights", 500, "broken off")

    def finish_weight_update(self, weight_version=None):
        pass

    def load_stored_weights(self, update_info):
        raise NotImplementedError

    def end_failed_update(self):
        self.num_settled += 1


class Trainer:
    """vLLM's sending side.

    It asks for the result of `update_weights` when its broadcast is over, and the broadcast waits
    for all servers.
    """

    def __init__(self):
        self.ended = threading.Event()
        self.update_failed = False

    def send_weights(self):
        thread = threading.Thread(target=self.update)
        thread.start()
        thread.join()
        if self.update_failed:
            assert self.ended.wait(60)

    def update(self):
        try:
            self.client.update_weights({})
        except EngineError:
            self.update_failed = True

    def shutdown(self):
        self.ended.set()


def make_sender(monkeypatch, said=None):
    """Returns a sender without NCCL and the list of its trainers."""
    lines = [] if said is None else said
    sender = NcclSender(SenderOptions(limit_s=50, say=lines.append))
    trainers = []

    def form_group(*_):
        trainers.append(Trainer())
        sender._trainer = trainers[-1]

    monkeypatch.setattr(sender, "_form_group", form_group)
    return sender, trainers


def test_a_server_that_fails_in_a_transfer_ends_it_though_the_learner_waits(monkeypatch):
    sender, trainers = make_sender(monkeypatch)
    group = Group(failures=2)
    start = time.monotonic()
    with pytest.raises(
        EngineError,
        match="weights 3 to 2 servers by NCCL failed: /update_weights at s0: 500 broken off",
    ):
        sender.send(None, group)
    assert time.monotonic() - start < 10
    assert all(trainer.ended.is_set() for trainer in trainers) and sender._trainer is None
    assert group.num_settled == 2


def test_a_transfer_that_failed_once_is_tried_once_more(monkeypatch):
    said = []
    sender, trainers = make_sender(monkeypatch, said)
    group = Group(failures=1)
    sender.send(None, group)
    assert len(trainers) == 2 and group.num_settled == 1
    assert "trying again without the lost servers" in said[0]


def test_it_sends_to_a_group_of_servers_only():
    with pytest.raises(TypeError, match="a group of servers"):
        NcclSender(SenderOptions()).send(None, object())
