"""Tests the progress output and the timer of a run."""

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from grpo.run.display import Timer, caller_output, redirect_output

ROW = {
    "step": 3,
    "reward/mean": 0.25,
    "reward/accuracy": 0.5,
    "completion/length": 12.0,
    "time/total_s": 2.0,
    "note": "not a number",
}
# A run of 10 rollouts that was resumed after 2. The third one takes two minutes.
RESUMED_RUN = f"""
import time

from grpo.run.display import Display

display = Display("auto", 10)
display.phase(0, "starting the engine")
display.begin(2)
two_minutes_later = time.monotonic() + 120
time.monotonic = lambda: two_minutes_later
display.row({ROW})
display.phase(3, "update", "1/4")
time.sleep(0.3)  # the status line is redrawn several times per second
display.say("held-out accuracy [50 %]")
display.close()
"""


def stderr_on_terminal(program: str) -> str:
    """Runs a program whose standard error is a terminal and returns the text on the terminal."""
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
        except OSError:  # all text is read, and the child's end is closed
            return text.decode()


def test_a_terminal_shows_a_status_line_with_the_time_left_since_the_resume():
    text = stderr_on_terminal(RESUMED_RUN)
    # One rollout took 2 minutes, so the 7 remaining ones take 14 minutes.
    assert (
        "rollout 4/10 · update 1/4 · reward 0.250 · accuracy 50.0% · length 12 · 14:00 left" in text
    )
    assert "held-out accuracy [50 %]" in text


def test_a_pipe_gets_one_line_per_rollout():
    process = subprocess.run(
        [sys.executable, "-c", RESUMED_RUN], stderr=subprocess.PIPE, text=True, check=True
    )
    assert process.stderr.splitlines() == [
        "starting the engine",
        "rollout 3/10 · reward 0.250 · accuracy 50.0% · length 12 · 2.0 s",
        "held-out accuracy [50 %]",
    ]


# A start of one second, of which a log shows the phase after a silence of 0.3 s.
SLOW_START = """
import time

from grpo.run import display as module

module.MAX_SILENCE_S = 0.3
module.MIN_ELAPSED_S = 0.5
module.TICK_S = 0.1
display = module.Display("auto", 10)
display.phase(0, "downloading", "owner/name, 0.10 of 3.09 GB")
display.phase(0, "downloading", "owner/name, 0.20 of 3.09 GB")
time.sleep(1)
display.close()
time.sleep(0.5)
"""


def test_a_log_shows_the_phase_again_after_a_silence():
    process = subprocess.run(
        [sys.executable, "-c", SLOW_START], stderr=subprocess.PIPE, text=True, check=True
    )
    first_line, *later_lines = process.stderr.splitlines()
    assert first_line == "downloading owner/name, 0.10 of 3.09 GB"
    assert later_lines
    for line in later_lines:
        assert re.fullmatch(r"downloading owner/name, 0\.20 of 3\.09 GB( for 0:0\d)?", line)


# A stage within a stage has a display of its own.
PAUSED = SLOW_START.replace("time.sleep(1)", "display.pause(); time.sleep(1)", 1)


def test_a_paused_display_shows_nothing_until_the_next_phase():
    program = PAUSED.replace("display.close()", 'display.phase(0, "canary"); display.close()')
    process = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=True
    )
    assert process.stderr.splitlines() == ["downloading owner/name, 0.10 of 3.09 GB", "canary"]
    assert "canary" in stderr_on_terminal(program)


def test_a_terminal_shows_how_long_a_phase_has_taken():
    text = stderr_on_terminal(SLOW_START)
    assert "downloading owner/name, 0.20 of 3.09 GB" in text
    assert "0.20 of 3.09 GB for 0:00" in text


def test_redirected_output_is_in_the_file_also_if_the_streams_are_those_of_a_notebook(
    tmp_path, monkeypatch, capfd
):
    """The streams of a notebook send text to the browser. They write to no file descriptor."""
    stdout, stderr = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    log = tmp_path / "library.log"
    print("before")
    with redirect_output(log):
        print("from Python")
        handler = logging.StreamHandler()  # as a library that is imported now
        os.system("echo from a child; echo its error >&2")
        with redirect_output(tmp_path / "other.log"):
            print("other")
        with caller_output():
            print("to the caller")
            os.system("echo child to the caller")
        print("an error", file=sys.stderr)
    print("after")
    assert log.read_text() == "from Python\nfrom a child\nits error\nan error\n"
    assert (tmp_path / "other.log").read_text() == "other\n"
    assert stdout.getvalue() == "before\nto the caller\nafter\n"
    assert stderr.getvalue() == ""
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert capfd.readouterr() == ("child to the caller\n", "")
    handler.emit(logging.makeLogRecord({"msg": "later"}))  # its stream is still open
    assert capfd.readouterr().err == "later\n"


def test_the_output_is_restored_after_an_exception(tmp_path, capfd):
    with pytest.raises(KeyError), redirect_output(tmp_path / "log"):
        raise KeyError
    os.system("echo visible")
    assert capfd.readouterr().out == "visible\n"


def test_the_seconds_of_the_phases_and_the_rest_add_up_to_the_total():
    timer = Timer()
    with timer("rollout"):
        pass
    with timer("update"):
        pass
    metrics = timer.metrics()
    assert set(metrics) == {"time/rollout_s", "time/update_s", "time/rest_s", "time/total_s"}
    parts_s = metrics["time/rollout_s"] + metrics["time/update_s"] + metrics["time/rest_s"]
    assert parts_s == pytest.approx(metrics["time/total_s"])
