"""Every wait for the child process of an engine has a time limit. The child is not vLLM."""

import subprocess
import time
from pathlib import Path

import pytest
from limits import run_within

from grpo import config as configs
from grpo.engines import EngineProcessDiedError, EngineTimeoutError, Request, SamplingOptions
from grpo.engines.local import engine as engine_module
from grpo.engines.local.engine import VllmEngine
from grpo.engines.vllm_options import ServedModel

SUPPORT = str(Path(__file__).parents[3] / "support")  # contains stuck_child.py
SETTINGS = configs.EngineSettings(timeout_s=1.0, start_timeout_s=20.0)
OPTIONS = SamplingOptions(max_tokens=4)


class StuckEngine(VllmEngine):
    child_module = "stuck_child"


@pytest.fixture
def start_stuck_engine(tmp_path, monkeypatch):
    """A function that starts an engine whose child freezes after its start.

    `stuck_in` is "message" (the child does not read the next message) or "answer" (the child
    freezes while it sends the next answer).
    """
    engines = []

    def start(stuck_in, **options):
        monkeypatch.setenv("PYTHONPATH", SUPPORT)
        monkeypatch.setenv("GRPO_TEST_STUCK", stuck_in)
        engine = StuckEngine(
            model=ServedModel(model_dir="nowhere", dtype="float32", max_model_len=16),
            settings=SETTINGS,
            log_file=tmp_path / "engine.log",
            **options,
        )
        engines.append(engine)
        engine.wait_ready()
        return engine

    yield start
    for engine in engines:
        engine._child.kill()


def test_message_to_a_frozen_child_times_out(start_stuck_engine):
    wait_times = []

    def record_wait():
        wait_times.append(time.monotonic())

    engine = start_stuck_engine("message", on_wait=record_wait)
    large_request = Request(prompt_ids=tuple(range(1_000_000)), seed=1)  # exceeds a pipe's buffer
    num_waits_at_start = len(wait_times)
    with pytest.raises(
        EngineTimeoutError, match="did not read the message `generate` within 1 s; its log"
    ):
        run_within(15, lambda: engine.generate([large_request], OPTIONS))
    # `on_wait` is called during the wait, so that Ctrl-C is handled.
    assert len(wait_times) >= num_waits_at_start + 3
    with pytest.raises(EngineProcessDiedError, match="killed by SIGKILL"):
        run_within(15, lambda: engine.generate([large_request], OPTIONS))
    run_within(15, engine.close)


def test_incomplete_answer_of_a_frozen_child_times_out(start_stuck_engine):
    engine = start_stuck_engine("answer")
    small_request = Request(prompt_ids=(1,), seed=1)
    with pytest.raises(EngineTimeoutError, match="did not answer `generate` within 1 s"):
        run_within(15, lambda: engine.generate([small_request], OPTIONS))
    run_within(15, engine.close)


def test_close_returns_although_the_killed_child_does_not_end(
    start_stuck_engine, monkeypatch, caplog
):
    monkeypatch.setattr(engine_module, "KILL_TIMEOUT_S", 0.5)
    engine = start_stuck_engine("message")
    # Simulates a child that SIGKILL cannot end.
    monkeypatch.setattr(engine._child, "kill", lambda: None)
    run_within(15, engine.close)
    assert "did not end within 0.5 s after SIGKILL" in caplog.text
    assert isinstance(engine._child, subprocess.Popen)
    assert engine._child.poll() is None
    monkeypatch.undo()  # the fixture kills the child
