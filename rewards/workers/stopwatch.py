"""Measures the time of processes fairly on a busy machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

# A program that still has time left after this many times its limit gets too little processor time.
MAX_STARVATION = 8
MAX_CHECK_S = 0.25  # between two readings of the clocks


class TimeLimitError(RuntimeError):
    """The time of a job is over. `is_starved`: it got too little processor time to use it."""

    def __init__(self, is_starved: bool) -> None:
        """Stores the cause."""
        super().__init__("too little processor time" if is_starved else "took too long")
        self.is_starved = is_starved


class Stopwatch:
    """Measures the time that processes need: real time, except while they wait for a processor.

    A program that takes 1 second on an idle machine takes 1 second by this clock on a busy one. It
    cannot make itself wait: its processor time counts in any case.
    """

    def __init__(
        self, pids: Sequence[int], limit_s: float, max_real_s: float | None = None
    ) -> None:
        """Starts the stopwatch.

        Args:
            pids: The processes. They take turns: one of them waits for the other.
            limit_s: Time limit.
            max_real_s: Limit of real time. Processes that reach it are starved. None:
                MAX_STARVATION times the time limit.
        """
        self.limit_s = limit_s
        self._max_real_s = MAX_STARVATION * limit_s if max_real_s is None else max_real_s
        self._clocks = [ProcessClock(pid) for pid in pids]
        self._start = time.monotonic()

    def elapsed_s(self) -> float:
        """Returns the time that counts, in seconds."""
        real_s = time.monotonic() - self._start
        waited_s = sum(clock.waited_s() for clock in self._clocks)
        used_s = sum(clock.used_s() for clock in self._clocks)
        return max(real_s - waited_s, used_s)

    def next_check_s(self) -> float:
        """Returns in how many seconds the limit must be checked again.

        Raises:
            TimeLimitError: The limit is reached.
        """
        real_s = time.monotonic() - self._start
        # The clocks are read regularly, because they stop when a process has ended.
        first_check_s = min(self.limit_s, MAX_CHECK_S)
        if real_s < first_check_s:
            return first_check_s - real_s
        left_s = self.limit_s - self.elapsed_s()
        if left_s <= 0:
            raise TimeLimitError(is_starved=False)
        if real_s >= self._max_real_s:
            raise TimeLimitError(is_starved=True)
        return max(min(left_s, self._max_real_s - real_s, MAX_CHECK_S), 0.001)


class ProcessClock:
    """Times of a process since the clock was made, in seconds. They stay when it has ended."""

    def __init__(self, pid: int) -> None:
        """Starts the clock."""
        self._pid = pid
        self._waited_s = 0.0
        self._used_s = 0.0
        self._waited_s_at_start = self._read_waited_s()
        self._used_s_at_start = self._read_used_s()

    def waited_s(self) -> float:
        """Returns how long the process was ready to run and did not: the longest of its threads."""
        return self._read_waited_s() - self._waited_s_at_start

    def used_s(self) -> float:
        """Returns the processor time of all its threads."""
        return self._read_used_s() - self._used_s_at_start

    def _read_waited_s(self) -> float:
        # Without CONFIG_SCHED_INFO, the kernel has no such file or reports 0.
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{self._pid}/task").iterdir():
                _, waited_ns, _ = (thread / "schedstat").read_text().split()
                self._waited_s = max(self._waited_s, int(waited_ns) / 1e9)
        return self._waited_s

    def _read_used_s(self) -> float:
        with contextlib.suppress(OSError):
            self._used_s = processor_time_s(self._pid)
        return self._used_s


def processor_time_s(pid: int) -> float:
    """Returns the processor time that all threads of a process have used, in seconds.

    Raises:
        OSError: The process has ended.
    """
    # CPUCLOCK_SCHED of a process, see clock_getcpuclockid(3).
    return time.clock_gettime((~pid << 3) | 2)
