"""Shows a run's progress on standard error: a live status line, or one line per step.

The same numbers are in metrics.jsonl and in the trackers (grpo/run/trackers.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

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


class Display:
    """Progress output on standard error.

    Mode `live` keeps a status line on a terminal, `line` prints one line per step, and `off` prints
    nothing. `auto` is `live` on a terminal and `line` elsewhere.
    """

    def __init__(self, mode: str, total: int, unit: str = "rollout") -> None:
        """Starts the output.

        Args:
            mode: "auto", "live", "line" or "off".
            total: The number of steps of the run.
            unit: The name of a step: "rollout", "update", ...
        """
        # A copy of stderr, because `redirect_output` sends stderr to a file while libraries load.
        stderr = os.fdopen(os.dup(2), "w")
        self._console = Console(file=stderr, highlight=False, soft_wrap=True)
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

    def say(self, text: str) -> None:
        """Prints a line of text, unless the mode is off."""
        if self._mode != "off":
            self._console.print(text, markup=False)

    def begin(self, done: int) -> None:
        """Starts the clock for the estimate of the remaining time.

        Call it after models are loaded. `done` is the number of steps that an earlier process has
        made.
        """
        self._start = _Start(done, time.monotonic())

    def phase(self, step: int, name: str, detail: str = "") -> None:
        """Updates the status line, e.g. "rollout 4/10 · update 1/4 · reward 0.250 · 14:00 left".

        Args:
            step: The number of steps that are done.
            name: The current phase of the next step, e.g. "update".
            detail: The progress within the phase, e.g. "1/4".
        """
        if self._status is None:
            return
        parts = [
            f"{self._unit} {min(step + 1, self._total)}/{self._total}",
            f"{name} {detail}".strip(),
            *self._metric_texts(),
            self._time_left(step),
        ]
        text = " · ".join(part for part in parts if part)
        self._status.update(text.replace("[", "\\["))  # "[" would start a style tag of rich

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

    def close(self) -> None:
        """Ends the status line."""
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
        return f"{int(left_s // 60)}:{int(left_s % 60):02d} left"


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


@contextlib.contextmanager
def redirect_output(log_file: Path) -> Iterator[None]:
    """Redirects standard output and error, also of C libraries, to a file within the context."""
    sys.stdout.flush()
    sys.stderr.flush()
    log_file.parent.mkdir(parents=True, exist_ok=True)
    saved_stdout = os.dup(1)
    saved_stderr = os.dup(2)
    with log_file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, target in ((saved_stdout, 1), (saved_stderr, 2)):
            os.dup2(saved, target)
            os.close(saved)
