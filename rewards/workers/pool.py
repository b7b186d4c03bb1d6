"""Worker processes that judge completions, each call under a wall-clock limit enforced by killing.

Works from any thread of any process.

A worker is `python -m rewards.workers.pool`. It is started for the first call and kept: between
calls it waits on a pipe and costs nothing. It knows functions by name and answers with the value
that they return; a call without an answer returns a `Failure`.

No wait is unlimited: a frozen worker neither takes a call that is larger than its socket's buffer
nor ends an answer that it has begun, so the socket has time limits in both directions.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

START_TIMEOUT_S = 120.0  # importing sympy from a cold disk
RECYCLE = 5_000  # calls after which a worker is replaced: sympy's caches grow
END_LIMIT_S = 10.0  # the longest wait for the end of a worker that was killed or closed its pipe
LOADED = object()  # stands for a worker's first message: the time of the call begins
# a call that had less than this share of its time on a processor was starved by the machine
STARVED = 0.5

logger = logging.getLogger(__name__)

_How = tuple[str, float, dict[str, Any]]  # function, time limit, options


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a call has no answer.

    `error`: the function raised an exception. `timeout`, `memory`, `crash`: the call took too long,
    too much memory, or ended its process. `lost`: the call is not to blame, and was lost twice.
    """

    kind: Literal["error", "timeout", "memory", "crash", "lost"]
    reason: str


class Pool:
    """Worker processes that call functions by name, each call under a time limit.

    `Pool(2).map("rewards.accuracy:verify", [("1/2", "0.5")], timeout_s=5)` ->
    `[Verdict(value="correct")]`.
    """

    def __init__(self, workers: int | None = None, *, memory_gb: float = 4.0) -> None:
        """Sets the limits; starts no process yet.

        There are at most `workers` processes (default: the cores, up to 8) of `memory_gb` of
        address space each.
        """
        self._most = workers or min(len(os.sched_getaffinity(0)), 8)
        self._memory_gb = memory_gb
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        # calls, failures by kind (every try), restarts; whoever reads them may clear them
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Pool:
        """Returns the pool; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pool."""
        self.close()

    def close(self) -> None:
        """Ends the workers; a later `map` starts new ones."""
        workers = self._workers
        self._workers = []
        for worker in workers:
            worker.end()

    def map(
        self,
        function: str,
        calls: Sequence[tuple[Any, ...]],
        *,
        timeout_s: float,
        options: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Returns, in order, what `module:function` returns for each call, or a `Failure`.

        The function gets the call's arguments and the common `options`. A call past its limit is
        killed. A call whose worker was killed from outside, crashed, or had no processor is made
        once more. Raises RuntimeError when a worker cannot load the function.
        """
        # forked: the workers, and whoever holds the lock, are the parent's
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._workers = []
            self._lock = threading.Lock()
        with self._lock:
            try:
                return self._map((function, timeout_s, dict(options or {})), calls)
            except BaseException:  # Ctrl-C too: a late answer must not be the next call's
                self.close()
                raise

    def _map(self, how: _How, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        todo = deque((i, 1) for i in range(len(calls)))  # position, which try
        self.counts["calls"] += len(calls)
        while todo or any(worker.job for worker in self._workers):
            self._hand_out(how, calls, todo)
            busy = [worker for worker in self._workers if worker.job]
            ready = wait(
                [worker.pipe for worker in busy],
                max(min(worker.deadline for worker in busy) - time.monotonic(), 0),
            )
            for worker in busy:
                if worker.pipe not in ready and time.monotonic() < worker.deadline:
                    continue
                answer = worker.answer() if worker.pipe in ready else worker.overdue()
                if answer is LOADED or worker.job is None:
                    continue
                (position, tries), worker.job = worker.job, None
                if isinstance(answer, Failure) and answer.kind != "error":
                    self.counts.update([answer.kind, "restarts"])
                    self._workers.remove(worker)
                    worker.end()
                if isinstance(answer, Failure) and answer.kind in ("lost", "crash") and tries == 1:
                    todo.appendleft((position, 2))
                else:
                    results[position] = answer
        return results

    def _hand_out(
        self, how: _How, calls: Sequence[tuple[Any, ...]], todo: deque[tuple[int, int]]
    ) -> None:
        for worker in [
            worker for worker in self._workers if not worker.job and worker.served >= RECYCLE
        ]:
            self._workers.remove(worker)
            worker.end()
        idle = [worker for worker in self._workers if not worker.job]
        while todo and (idle or len(self._workers) < self._most):
            if not idle:
                idle = [_Worker(self._memory_gb)]
                self._workers += idle
            job = todo.popleft()
            idle.pop().begin(job, how, calls[job[0]])


class _Worker:
    """One process; at its other end `main`."""

    def __init__(self, memory_gb: float) -> None:
        parent_end, child_end = socket.socketpair()
        command = [
            sys.executable,
            "-P",
            "-m",
            "rewards.workers.pool",
            str(child_end.fileno()),
            str(int(memory_gb * 2**30)),
        ]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            command,
            pass_fds=[child_end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # a session of its own: Ctrl-C is the trainer's to handle
        child_end.close()
        self._socket = parent_end  # shares its file with `pipe`, to set the time limits
        self.pipe = Connection(os.dup(parent_end.fileno()))
        self.job: tuple[int, int] | None = None
        self.deadline = 0.0
        self.served = 0
        self._timeout_s = 0.0
        self._loaded: set[str] = set()
        # the function that is being imported: what fails then is no call's fault
        self._loading = ""
        self._cpu_s = 0.0  # at the call's begin

    def begin(self, job: tuple[int, int], how: _How, arguments: tuple[Any, ...]) -> None:
        """Sends a call to the worker."""
        function, timeout_s, _ = how
        self.job = job
        self.served += 1
        self._timeout_s = timeout_s
        self._cpu_s = self._cpu()
        self._loading = "" if function in self._loaded else function
        self._loaded.add(function)
        limit_s = START_TIMEOUT_S if self._loading else timeout_s
        self._limit_socket(limit_s)
        self.deadline = time.monotonic() + limit_s
        try:
            self.pipe.send((how, arguments))
        except BlockingIOError:  # frozen: part of the call is sent, `overdue` ends the worker
            self.deadline = time.monotonic()
        except OSError:
            pass  # a dead worker is found out when its answer is read

    def answer(self) -> Any:
        """Returns the next message over the pipe: the call's answer, or `LOADED`."""
        try:
            kind, value = self.pipe.recv()
        except BlockingIOError:  # frozen in the middle of its answer
            return self.overdue()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._ended()
        if kind == "loaded":
            self._loading = ""
            self._limit_socket(self._timeout_s)
            self.deadline = time.monotonic() + self._timeout_s
            self._cpu_s = self._cpu()
            return LOADED
        return value

    def _ended(self) -> Failure:
        """Returns why the worker closed its pipe. Raises RuntimeError if it was loading."""
        code = self._wait()
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT):
            return Failure(
                kind="lost", reason=f"its worker was killed by {signal.Signals(-code).name}"
            )
        if self._loading:
            raise RuntimeError(
                f"a worker ended with code {code} while it loaded {self._loading}: see its "
                "message above"
            )
        if code is None:
            return Failure(kind="crash", reason="its worker closed its pipe and did not end")
        return Failure(kind="crash", reason=f"its worker ended with code {code}")

    def overdue(self) -> Failure:
        """Returns why the call is late. Raises RuntimeError if the worker is still loading."""
        if self._loading:
            raise RuntimeError(
                f"a worker needs more than {START_TIMEOUT_S:g} s to load {self._loading}"
            )
        if self._cpu() - self._cpu_s < STARVED * self._timeout_s:
            return Failure(
                kind="lost",
                reason=f"its worker got too little processor time in {self._timeout_s:g} s",
            )
        return Failure(kind="timeout", reason=f"longer than {self._timeout_s:g} s")

    def end(self) -> None:
        """Kills the worker."""
        self.pipe.close()
        self._socket.close()
        self._process.kill()
        if self._wait() is None:
            logger.warning(
                "worker %d did not end within %g s after SIGKILL", self._process.pid, END_LIMIT_S
            )

    def _wait(self) -> int | None:
        """Returns the exit code of the worker, None if it does not end within END_LIMIT_S."""
        try:
            return self._process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return None

    def _limit_socket(self, limit_s: float) -> None:
        """Makes a write or a read that makes no progress for `limit_s` raise BlockingIOError."""
        seconds = int(limit_s)
        timeval = struct.pack("ll", seconds, int((limit_s - seconds) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    def _cpu(self) -> float:
        """Returns the processor seconds of the worker so far."""
        with contextlib.suppress(OSError):
            # CPUCLOCK_SCHED of a process, see clock_getcpuclockid(3)
            return time.clock_gettime((~self._process.pid << 3) | 2)
        return self._cpu_s


def main(pipe_fd: int, memory: int) -> None:
    """Runs a worker: answers calls until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(pipe_fd)
    loaded: dict[str, Any] = {}
    while True:
        try:
            (name, timeout_s, options), arguments = pipe.recv()
        except EOFError:
            return
        try:
            if name not in loaded:
                loaded[name] = _load(name)
                pipe.send(("loaded", None))
            # without a parent to kill it, it ends by itself
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
            answer = loaded[name](*arguments, **options)
        except MemoryError:
            answer = Failure(kind="memory", reason=f"more than {memory / 2**30:g} GB")
        except Exception as error:
            answer = Failure(kind="error", reason=f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            pipe.send(("answer", answer))
        except BrokenPipeError:
            return
        except Exception as error:  # pickle's: the answer cannot be sent
            pipe.send(
                ("answer", Failure(kind="error", reason=f"its answer cannot be sent: {error}"))
            )


def _load(name: str) -> Any:
    """Returns the function, warmed up. A failure ends the worker: no call is to blame."""
    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        getattr(sys.modules[module], "warm_up", lambda: None)()
        return function
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    from rewards.workers import pool

    pool.main(int(sys.argv[1]), int(sys.argv[2]))
