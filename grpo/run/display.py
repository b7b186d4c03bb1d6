"""What a person sees of a run.

It is one line per rollout or a live status. The same numbers are in metrics.jsonl and in trackers
(grpo/run/trackers.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console


class Display:
    """Progress on standard error.

    `live` keeps a status line on a terminal, `line` prints one line a rollout, `off` nothing.
    """

    def __init__(self, mode: str, total: int, unit: str = "rollout") -> None:
        """`total`: how many `unit`s the run has; mode auto is live on a terminal, else line."""
        # A copy of stderr: libraries' output is sent elsewhere while models load.
        self._console = Console(file=os.fdopen(os.dup(2), "w"), highlight=False, soft_wrap=True)
        self._mode = {"auto": "live" if self._console.is_terminal else "line"}.get(mode, mode)
        self._status = self._console.status("starting") if self._mode == "live" else None
        self._total, self._unit = total, unit
        self._began: tuple[int, float] | None = None
        self._row: dict[str, Any] = {}
        if self._status:
            self._status.start()

    def say(self, text: str) -> None:
        """Prints a line of text, unless the mode is off."""
        if self._mode != "off":
            self._console.print(text, markup=False)

    def begin(self, done: int) -> None:
        """Marks the start of the work from which the time left is estimated.

        It is called after loading, at `done` steps when resumed.
        """
        self._began = (done, time.monotonic())

    def phase(self, step: int, name: str, detail: str = "") -> None:
        """Shows what the run is doing now."""
        if self._status is None:
            return
        parts = [
            f"{self._unit} {min(step + 1, self._total)}/{self._total}",
            f"{name} {detail}".strip(),
            *self._numbers(),
            self._left(step),
        ]
        self._status.update(" · ".join(part for part in parts if part).replace("[", "\\["))

    def row(self, row: dict[str, Any]) -> None:
        """Prints a finished step's line."""
        self._row = row
        if self._mode == "line":
            seconds = row.get("time/total_s", 0.0)
            self.say(
                " · ".join(
                    [
                        f"{self._unit} {row['step']}/{self._total}",
                        *self._numbers(),
                        f"{seconds:.1f} s",
                    ]
                )
            )

    def close(self) -> None:
        """Ends the live status, if there is one."""
        if self._status:
            self._status.stop()

    def _numbers(self) -> list[str]:
        shown = {
            "loss": "loss {:.3f}",
            "policy/token_accuracy": "token accuracy {:.1%}",
            "reward/mean": "reward {:.3f}",
            "reward/accuracy": "accuracy {:.1%}",
            "completion/length": "length {:.0f}",
            "rollout/tokens_per_s": "{:,.0f} tok/s",
            "probe/gap": "gap {:.1e}",
        }
        if "reward/mean" in self._row:
            del shown["loss"]
        return [
            text.format(self._row[key])
            for key, text in shown.items()
            if self._row.get(key) is not None
        ]

    def _left(self, step: int) -> str:
        if self._began is None or step <= self._began[0]:
            return ""
        left = (time.monotonic() - self._began[1]) / (step - self._began[0]) * (self._total - step)
        return f"{int(left // 60)}:{int(left % 60):02d} left"


class Timer:
    """Seconds a phase, exclusive and in order.

    `with timer("rollout"): ...` -> timer.seconds["rollout"].
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
        """Returns the seconds of each phase, of the rest and in total, as `time/` metrics."""
        total = time.monotonic() - self._start
        phases = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return phases | {"time/rest_s": total - sum(self.seconds.values()), "time/total_s": total}


@contextlib.contextmanager
def quiet(log_file: Path) -> Iterator[None]:
    """Sends everything that libraries print, from Python or C, to a file while the block runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    log_file.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(1), os.dup(2)]
    with log_file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
