"""Every wait for the child process has a limit; without vLLM."""

import subprocess
import time
from pathlib import Path

import pytest
from limits import run_within

from grpo import config as configs
from grpo.engines import EngineDiedError, EngineTimeoutError, Request, SamplingOptions
from grpo.engines.local import engine as engine_module
from grpo.engines.local.engine import VllmEngine
from grpo.engines.vllm_options import ServedModel

SUPPORT = str(Path(__file__).parents[3] / "support")  # where stuck_child.py lies
SETTINGS = configs.Engine(timeout_s=1.0, start_timeout_s=20.0)
OPTIONS = SamplingOptions(max_tokens=4)


class StuckEngine(VllmEngine):
    child_module = "stuck_child"


@pytest.fixture
def start_stuck(tmp_path, monkeypatch):
    """Returns a function that starts an engine whose child is stuck."""
    engines = []

    def start(stuck_in, on_wait=lambda: None):
        monkeypatch.setenv("PYTHONPATH", SUPPORT)
        monkeypatch.setenv("GRPO_TEST_STUCK", stuck_in)
        engine = StuckEngine(
            model=ServedModel(model_dir="nowhere", dtype="float32", max_model_len=16),
            settings=SETTINGS,
            log_file=tmp_path / "engine.log",
            on_wait=on_wait,
        )
        engines.append(engine)
        engine.wait_ready()
        return engine

    yield start
    for engine in engines:
        engine._child.kill()


def test_a_message_that_a_frozen_child_does_not_take_ends_at_the_time_limit(start_stuck):
    waits = []
    engine = start_stuck("message", on_wait=lambda: waits.append(time.monotonic()))
    large = Request(prompt_ids=tuple(range(1_000_000)), seed=1)  # more than a pipe's buffer
    num_waits = len(waits)
    with pytest.raises(
        EngineTimeoutError, match="did not read the message `generate` within 1 s; its log"
    ):
        run_within(15, lambda: engine.generate([large], OPTIONS))
    assert len(waits) >= num_waits + 3  # Ctrl-C is seen meanwhile
    with pytest.raises(EngineDiedError, match="killed by SIGKILL"):
        run_within(15, lambda: engine.generate([large], OPTIONS))
    run_within(15, engine.close)


def test_an_answer_that_a_frozen_child_does_not_end_ends_at_the_time_limit(start_stuck):
    engine = start_stuck("answer")
    small = Request(prompt_ids=(1,), seed=1)
    with pytest.raises(EngineTimeoutError, match="did not answer `generate` within 1 s"):
        run_within(15, lambda: engine.generate([small], OPTIONS))
    run_within(15, engine.close)


def test_a_child_that_does_not_end_when_killed_is_given_up(start_stuck, monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "KILL_LIMIT_S", 0.5)
    engine = start_stuck("message")
    monkeypatch.setattr(engine._child, "kill", lambda: None)  # as if the kernel held it
    run_within(15, engine.close)
    assert "did not end within 0.5 s after SIGKILL" in caplog.text
    assert isinstance(engine._child, subprocess.Popen) and engine._child.poll() is None
    monkeypatch.undo()
