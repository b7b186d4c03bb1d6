"""What a person and a tracker see of a run."""

import os
import pty
import subprocess
import sys

import pytest

from grpo.run.display import Timer
from grpo.run.trackers import TrackedRun, Trackers

ROW = {
    "step": 3,
    "reward/mean": 0.25,
    "reward/accuracy": 0.5,
    "completion/length": 12.0,
    "time/total_s": 2.0,
    "note": "not a number",
}
STATUS = f"""
import time
from grpo.run.display import Display
display = Display("auto", 10)
display.phase(0, "starting the engine")
display.begin(2)
start = time.monotonic()
time.monotonic = lambda: start + 120
display.row({ROW})
display.phase(3, "update", "1/4")
time.sleep(0.3)
display.say("held-out accuracy [50 %]")
display.close()
"""


def on_terminal(program: str) -> str:
    parent, child = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", program],
        stderr=child,
        check=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "150"},
    )
    os.close(child)
    text = b""
    while True:
        try:
            text += os.read(parent, 65536)
        except OSError:  # the other end is closed and read to its end
            return text.decode()


def test_on_a_terminal_a_status_line_shows_phase_numbers_and_time_left_since_the_resume():
    """A run resumed after 2 of 10 rollouts, one done in 2 minutes: 7 to go, 14 minutes."""
    text = on_terminal(STATUS)
    assert (
        "rollout 4/10 · update 1/4 · reward 0.250 · accuracy 50.0% · length 12 · 14:00 left" in text
    )
    assert "held-out accuracy [50 %]" in text


def test_elsewhere_one_line_a_rollout():
    done = subprocess.run(
        [sys.executable, "-c", STATUS], stderr=subprocess.PIPE, text=True, check=True
    )
    assert done.stderr.splitlines() == [
        "rollout 3/10 · reward 0.250 · accuracy 50.0% · length 12 · 2.0 s",
        "held-out accuracy [50 %]",
    ]


def tracked_run(run_dir):
    return TrackedRun(project="grpo", run_dir=run_dir, run_id="id", config={})


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    with Trackers(["tensorboard"], tracked_run(tmp_path)) as trackers:
        trackers.log(ROW)
        trackers.log(ROW | {"step": 4, "reward/mean": 0.75})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [
        (3, 0.25),
        (4, 0.75),
    ]
    assert "note" not in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_a_users_error(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        Trackers([name], tracked_run(tmp_path))


def test_phases_and_the_rest_add_up_to_the_whole():
    timer = Timer()
    with timer("rollout"):
        pass
    with timer("update"):
        pass
    metrics = timer.metrics()
    parts = [value for key, value in metrics.items() if key != "time/total_s"]
    assert set(metrics) == {"time/rollout_s", "time/update_s", "time/rest_s", "time/total_s"}
    assert sum(parts) == pytest.approx(metrics["time/total_s"])
