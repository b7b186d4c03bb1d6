"""Shows a run's progress on standard error: a live status line, or one line per step.

The same numbers are in metrics.jsonl and in the trackers (grpo/run/trackers.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console

# In mode `line`, something is printed at least this often, so that no log looks dead.
MAX_SILENCE_S = 30.0
MIN_ELAPSED_S = 5.0  # in mode `live`, a phase shows its duration from then on
TICK_S = 1.0

# The metrics in a progress line, in order, with their formats.
METRIC_FORMATS = {
    "loss": "loss {:.3f}",
    "policy/token_accuracy": "token accuracy {:.1%}",
    "reward/mean": "reward {:.3f}",
    "reward/accuracy": "accuracy {:.1%}",
    "completion/length": "length {:.0f}",
    "rollout/tokens_per_s": "{:,.0f} tok/s",
    "probe/gap": "gap {:.1e}",
}


class _Start(NamedTuple):
    """The point from which the remaining time is estimated."""

    num_done: int
    time_s: float  # of time.monotonic()


class _Phase(NamedTuple):
    """What the run is doing: "update 1/4" of the step after `step` steps."""

    step: int
    name: str
    detail: str
    start_s: float  # of time.monotonic(), when the phase `name` began


class Display:
    """Progress output on standard error.

    Mode `live` keeps a status line on a terminal. `line` prints one line per step; before the first
    step, one per phase; and the current phase after 30 s without a line. `off` prints nothing.
    `auto` is `live` on a terminal and `line` elsewhere.
    """

    def __init__(self, mode: str, total: int, unit: str = "rollout") -> None:
        """Starts the output.

        Args:
            mode: "auto", "live", "line" or "off".
            total: The number of steps of the run.
            unit: The name of a step: "rollout", "update", ...
        """
        # A copy of stderr, because `redirect_output` sends stderr to a file while libraries load.
        self._stderr = os.fdopen(os.dup(2), "w")
        self._console = Console(file=self._stderr, highlight=False, soft_wrap=True)
        self._mode = mode
        if mode == "auto":
            self._mode = "live" if self._console.is_terminal else "line"
        self._total = total
        self._unit = unit
        self._start: _Start | None = None
        self._last_row: dict[str, Any] = {}
        self._status = None
        if self._mode == "live":
            self._status = self._console.status("starting")
            self._status.start()
        self._lock = threading.RLock()  # guards the fields below
        self._phase: _Phase | None = None
        self._last_line_s = time.monotonic()
        self._closed = threading.Event()
        if not self.is_off:
            threading.Thread(target=self._tick, daemon=True).start()

    @property
    def is_off(self) -> bool:
        """Whether the mode is off: nothing is printed."""
        return self._mode == "off"

    def say(self, text: str) -> None:
        """Prints a line of text, unless the mode is off."""
        if self.is_off:
            return
        with self._lock:
            self._console.print(text, markup=False)
            self._last_line_s = time.monotonic()

    def warn(self, text: str) -> None:
        """Prints a line of text in every mode, also in mode off."""
        if not self.is_off:
            self.say(text)
            return
        with caller_output():
            print(text, file=sys.stderr, flush=True)

    def begin(self, done: int) -> None:
        """Starts the clock for the estimate of the remaining time.

        Call it after models are loaded. `done` is the number of steps that an earlier process has
        made.
        """
        self._start = _Start(done, time.monotonic())

    def phase(self, step: int, name: str, detail: str = "") -> None:
        """Sets what the run is doing: "rollout 4/10 · update 1/4 · reward 0.250 · 14:00 left".

        Mode `live` shows it. Mode `line` prints the phases before the first step, which can take
        minutes: a download, the start of the engine.

        Args:
            step: The number of steps that are done.
            name: The current phase of the next step, e.g. "update".
            detail: The progress within the phase, e.g. "1/4".
        """
        with self._lock:
            is_new = self._phase is None or (step, name) != self._phase[:2]
            start_s = time.monotonic() if self._phase is None or is_new else self._phase.start_s
            self._phase = _Phase(step, name, detail, start_s)
            self._show_phase()
            if self._mode == "line" and is_new and self._start is None:
                self.say(self._phase_text())

    def pause(self) -> None:
        """Shows no phase until the next call of `phase`, while another display shows its own."""
        with self._lock:
            self._phase = None
            if self._status is not None:
                self._status.stop()

    def download(self, model: str, progress: str) -> None:
        """Shows the download of a model: "downloading owner/name, 1.20 of 3.09 GB"."""
        self.phase(0, "downloading", f"{model}, {progress}")

    def _show_phase(self) -> None:
        """Updates the status line, if there is one."""
        if self._status is not None:
            self._status.start()  # if it is paused
            text = self._phase_text()
            self._status.update(text.replace("[", "\\["))  # "[" would start a style tag of rich

    def _phase_text(self) -> str:
        """Returns the current phase as a line."""
        assert self._phase is not None
        step, name, detail, start_s = self._phase
        count = ""
        if self._start is not None:
            count = f"{self._unit} {min(step + 1, self._total)}/{self._total}"
        elapsed_s = time.monotonic() - start_s
        elapsed = f"for {_minutes(elapsed_s)}" if elapsed_s >= MIN_ELAPSED_S else ""
        parts = [
            count,
            f"{name} {detail} {elapsed}",
            *self._metric_texts(),
            self._time_left(step),
        ]
        return " · ".join(" ".join(part.split()) for part in parts if part)

    def _tick(self) -> None:
        """Shows the duration of the current phase. Runs in a thread until the display is closed."""
        while not self._closed.wait(TICK_S):
            with self._lock:
                if self._phase is None or self._closed.is_set():
                    continue
                self._show_phase()
                silence_s = time.monotonic() - self._last_line_s
                if self._mode == "line" and silence_s >= MAX_SILENCE_S:
                    self._last_line_s = time.monotonic()
                    # Not by the console, which reacts to a closed pipe by ending this thread and
                    # staying silent. The main thread's next line meets the same error.
                    with contextlib.suppress(OSError):
                        print(self._phase_text(), file=self._stderr, flush=True)

    def row(self, row: dict[str, Any]) -> None:
        """Takes the metrics of a finished step.

        Mode `line` prints them; mode `live` shows them at the next call of `phase`.

        Args:
            row: The metrics, e.g. `{"step": 3, "reward/mean": 0.25, "time/total_s": 2.0}`.
        """
        self._last_row = row
        if self._mode == "line":
            seconds = row.get("time/total_s", 0.0)
            parts = [
                f"{self._unit} {row['step']}/{self._total}",
                *self._metric_texts(),
                f"{seconds:.1f} s",
            ]
            self.say(" · ".join(parts))

    def __enter__(self) -> Display:
        """Returns the display; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the display."""
        self.close()

    def close(self) -> None:
        """Ends the output of phases."""
        self._closed.set()
        with self._lock:
            if self._status is not None:
                self._status.stop()

    def _metric_texts(self) -> list[str]:
        """Returns the metrics of the last step as text: `["reward 0.250", "accuracy 50.0%"]`."""
        texts = []
        for key, text_format in METRIC_FORMATS.items():
            if key == "loss" and "reward/mean" in self._last_row:
                continue  # GRPO's loss does not measure progress
            value = self._last_row.get(key)
            if value is not None:
                texts.append(text_format.format(value))
        return texts

    def _time_left(self, step: int) -> str:
        """Returns the estimated remaining time, "14:00 left"; "" until a step is done."""
        if self._start is None or step <= self._start.num_done:
            return ""
        elapsed_s = time.monotonic() - self._start.time_s
        left_s = elapsed_s / (step - self._start.num_done) * (self._total - step)
        return f"{_minutes(left_s)} left"


def _minutes(seconds: float) -> str:
    """Returns a duration as minutes and seconds: "14:00"."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


class Timer:
    """Measures the seconds of the phases of a step. Phases do not overlap.

    After `with timer("rollout"): ...`, `timer.seconds["rollout"]` has the seconds of the block.
    """

    def __init__(self) -> None:
        """Starts the clock of `time/total_s`."""
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        """Returns the seconds of each phase, outside of all phases, and in total.

        `{"time/rollout_s": 3.0, "time/rest_s": 0.5, "time/total_s": 3.5}`.
        """
        total_s = time.monotonic() - self._start
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/rest_s"] = total_s - sum(self.seconds.values())
        metrics["time/total_s"] = total_s
        return metrics


class _Output(NamedTuple):
    """Standard output and error: the file descriptors and Python's streams."""

    descriptors: tuple[int, int]
    streams: tuple[TextIO, TextIO]


# The output of the caller, while it is redirected.
_caller_output: _Output | None = None


@contextlib.contextmanager
def redirect_output(log_file: Path) -> Iterator[None]:
    """Redirects standard output and error, also of C libraries, to a file within the context.

    In a notebook, Python's streams do not write to the file descriptors. They are redirected, too.
    """
    global _caller_output
    log_file.parent.mkdir(parents=True, exist_ok=True)
    previous_caller_output = _caller_output
    with _saved_output() as output:
        if previous_caller_output is None:
            _caller_output = output
        try:
            with log_file.open("ab") as log:
                _set_output((log.fileno(), log.fileno()), _descriptor_streams())
            yield
        finally:
            _caller_output = previous_caller_output


@contextlib.contextmanager
def caller_output() -> Iterator[None]:
    """Undoes `redirect_output` within the context."""
    if _caller_output is None:
        yield
        return
    with _saved_output():
        _set_output(*_caller_output)
        yield


@contextlib.contextmanager
def _saved_output() -> Iterator[_Output]:
    """Yields the current output, and restores it at the end of the context."""
    output = _Output((os.dup(1), os.dup(2)), (sys.stdout, sys.stderr))
    try:
        _flush_streams()
        yield output
    finally:
        _flush_streams()
        _set_output(*output)
        for descriptor in output.descriptors:
            os.close(descriptor)


def _set_output(descriptors: tuple[int, int], streams: tuple[TextIO, TextIO]) -> None:
    for descriptor, target in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, target)
    sys.stdout, sys.stderr = streams


def _flush_streams() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@functools.cache
def _descriptor_streams() -> tuple[TextIO, TextIO]:
    """Returns streams that write to the file descriptors 1 and 2.

    They are never closed: a logger that is created while they are in use may keep them.
    """

    def stream(descriptor: int) -> TextIO:
        return os.fdopen(
            descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )

    return stream(1), stream(2)
