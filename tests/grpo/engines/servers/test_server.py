"""A server's process: waits for its end have a limit and do not stop the event loop."""

import asyncio
import contextlib
import os
import signal
import time

import pytest
from limits import run_within

from grpo import config as configs
from grpo.engines import ProcessNotEndedError
from grpo.engines.servers import server as server_module
from grpo.engines.servers.server import Server
from grpo.engines.servers.state import PoolState
from grpo.engines.servers.supervisor import Supervisor
from grpo.engines.servers.weight_updates import WeightUpdates


@pytest.fixture
def server(tmp_path):
    """A server whose process only sleeps."""
    server = Server(
        url="http://127.0.0.1:9", log_file=tmp_path / "log", command=["sleep", "60"], environment={}
    )
    server.environment = dict(os.environ)
    server.start()
    pid = server.process.pid
    yield server
    for number in {pid, server.process.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    server.process.wait(timeout=10)


def test_a_server_that_does_not_end_when_killed_is_an_error_that_names_it(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "KILL_TIMEOUT_S", 0.3)
        patch.setattr(os, "killpg", lambda *_: None)  # as if the kernel held it
        with pytest.raises(ProcessNotEndedError, match=r"127.0.0.1:9 \(process \d+\) did not end"):
            run_within(15, server.kill)
    server.kill()
    assert "killed by SIGKILL" in server.describe()


def test_the_event_loop_goes_on_while_a_lost_server_is_killed(server, monkeypatch):
    state = PoolState([server])
    settings = configs.Engine(servers=configs.Servers(count=1))
    updates = WeightUpdates(None, sync_timeout_s=10.0)
    supervisor = Supervisor(state, updates, settings, keeps_weights=True, say=lambda _: None)
    gaps = []

    async def measure():
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    async def drill():
        measuring = asyncio.ensure_future(measure())
        await supervisor._restart(server, "a drill")
        measuring.cancel()

    wait = server.process.wait

    def slow_wait(timeout=None):
        time.sleep(1.0)  # a process that frees much memory takes its time
        return wait(timeout)

    first = server.process.pid
    monkeypatch.setattr(server.process, "wait", slow_wait)
    asyncio.run(drill())
    assert max(gaps) < 0.5 and len(gaps) > 20
    assert server.process.pid != first and state.counts["restarted"] == 1
