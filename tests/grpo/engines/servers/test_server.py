"""The process of a local server: waits for its end have a limit and do not block the event loop."""

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
        url="http://127.0.0.1:9",
        log_file=tmp_path / "log",
        command=["sleep", "60"],
        environment=dict(os.environ),
    )
    server.start()
    first_pid = server.process.pid
    yield server
    for pid in {first_pid, server.process.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait(timeout=10)


def test_server_process_that_does_not_end_when_killed_is_an_error(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "KILL_TIMEOUT_S", 0.3)
        patch.setattr(os, "killpg", lambda *_: None)  # simulates a process that SIGKILL cannot end
        with pytest.raises(ProcessNotEndedError, match=r"127.0.0.1:9 \(process \d+\) did not end"):
            run_within(15, server.kill)
    server.kill()
    assert "killed by SIGKILL" in server.describe()


def test_event_loop_keeps_running_while_a_lost_server_is_killed(server, monkeypatch):
    state = PoolState([server])
    settings = configs.EngineSettings(servers=configs.ServerSettings(count=1))
    updates = WeightUpdates(None, sync_timeout_s=10.0)
    supervisor = Supervisor(state, updates, settings, keeps_weights=True, say=lambda _: None)
    intervals_s = []  # between iterations of the event loop

    async def measure_intervals():
        last_time = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            intervals_s.append(time.monotonic() - last_time)
            last_time = time.monotonic()

    async def restart_server():
        measurement = asyncio.ensure_future(measure_intervals())
        await supervisor._restart(server, "lost")
        measurement.cancel()

    wait = server.process.wait

    def slow_wait(timeout=None):
        time.sleep(1.0)  # like a process that frees much memory when it ends
        return wait(timeout)

    first_pid = server.process.pid
    monkeypatch.setattr(server.process, "wait", slow_wait)
    asyncio.run(restart_server())
    assert max(intervals_s) < 0.5
    assert len(intervals_s) > 20
    assert server.process.pid != first_pid
    assert state.counts["restarted"] == 1
