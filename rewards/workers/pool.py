"""Worker processes that score completions. A call that exceeds its time limit is killed.

A pool can be used from any thread of any process. A worker is `python -m rewards.workers.pool`. It
is started for the first call and kept; between calls it blocks on a pipe and uses no processor
time. It imports functions by name and sends back their values. The result of a call that fails is a
`Failure`.

A frozen worker (such as one stopped by SIGSTOP) neither reads a call that is larger than the buffer
of its socket nor completes an answer. The socket therefore has time limits in both directions, so
that no wait is unlimited.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple

from grpo.rewards.workers.modules import import_module
from grpo.rewards.workers.stopwatch import processor_time_s

START_TIMEOUT_S = 120.0  # to import a function, which is slow from a cold disk
MAX_CALLS_PER_WORKER = 5_000  # then the worker is replaced, because caches of libraries grow
END_LIMIT_S = 10.0  # longest wait for the exit of a worker that was killed or closed its pipe
# A call that times out with less processor time than this share of its limit was starved by other
# processes. It counts as lost, not as timed out.
MIN_CPU_SHARE = 0.5
MAX_ATTEMPTS = 2  # per call, if its worker is lost or crashes
# Signals that are sent from outside, not raised by the call itself.
OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# The answer of a worker that has imported a function: the time limit of the call starts now.
LOADED = object()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The result of a call that failed, in its last attempt if it was repeated.

    Kinds:
        error: The function raised an exception.
        timeout, memory: The call exceeded its time or memory limit.
        crash: The call ended its process.
        lost: The worker was killed from outside or got too little processor time.
    """

    kind: Literal["error", "timeout", "memory", "crash", "lost"]
    reason: str


class _Function(NamedTuple):
    """A function to call, with its time limit and keyword arguments. It is sent to the worker."""

    name: str  # module:function or FILE.py:function
    timeout_s: float
    options: dict[str, Any]


class _Job(NamedTuple):
    """A call that waits or runs: its index in the list of calls, and the attempt from 1 on."""

    call_index: int
    attempt: int


class WorkerPool:
    """Worker processes that call functions by name, each call under a time limit.

    `WorkerPool(2).map("grpo.rewards.accuracy:verify", [("1/2", "0.5")], timeout_s=5)` returns
    `[Verdict(value="correct")]`.

    `counts` has the number of calls (`calls`), of failed attempts by kind (`timeout`, `memory`,
    `crash`, `lost`), and of workers that were ended because of them (`restarts`). The reader may
    clear it.
    """

    def __init__(self, workers: int | None = None, *, memory_gb: float = 4.0) -> None:
        """Sets the limits. `map` starts the workers.

        Args:
            workers: Largest number of worker processes. None: the number of cores, at most 8.
            memory_gb: Address space of each worker in GiB.
        """
        self._max_workers = workers or min(len(os.sched_getaffinity(0)), 8)
        self._memory_gb = memory_gb
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> WorkerPool:
        """Returns the pool; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pool."""
        self.close()

    def close(self) -> None:
        """Kills the workers. A later `map` starts new ones."""
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
        """Calls a function once per element of `calls`.

        A call is repeated once if it was lost or crashed.

        Args:
            function: Name of the function as `module:function` or `FILE.py:function`.
            calls: Positional arguments of each call.
            timeout_s: Time limit of each call.
            options: Keyword arguments of all calls.

        Returns:
            The value of each call, or a `Failure`, in the order of `calls`.

        Raises:
            RuntimeError: A worker failed to import the function or took longer than
                START_TIMEOUT_S.
        """
        # In a forked child, the workers and the holder of the lock belong to the parent.
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._workers = []
            self._lock = threading.Lock()
        with self._lock:
            try:
                return self._map(_Function(function, timeout_s, dict(options or {})), calls)
            # Including KeyboardInterrupt: a pending answer must not be taken for that of a later
            # call.
            except BaseException:
                self.close()
                raise

    def _map(self, function: _Function, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        queue = deque(_Job(call_index, attempt=1) for call_index in range(len(calls)))
        self.counts["calls"] += len(calls)
        while queue or self._busy_workers():
            self._start_jobs(function, calls, queue)
            for worker, answer in self._wait_for_answers():
                job = worker.job
                if answer is LOADED or job is None:
                    continue
                worker.job = None
                if isinstance(answer, Failure) and answer.kind != "error":
                    self.counts.update([answer.kind, "restarts"])
                    self._remove(worker)
                if _may_retry(answer) and job.attempt < MAX_ATTEMPTS:
                    queue.appendleft(_Job(job.call_index, job.attempt + 1))
                else:
                    results[job.call_index] = answer
        return results

    def _busy_workers(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    def _idle_workers(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is None]

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()

    def _start_jobs(
        self, function: _Function, calls: Sequence[tuple[Any, ...]], queue: deque[_Job]
    ) -> None:
        """Gives jobs to idle workers and starts new workers while there are fewer than allowed."""
        for worker in self._idle_workers():
            if worker.num_calls >= MAX_CALLS_PER_WORKER:
                self._remove(worker)
        idle = self._idle_workers()
        while queue and (idle or len(self._workers) < self._max_workers):
            if not idle:
                worker = _Worker(self._memory_gb)
                self._workers.append(worker)
                idle.append(worker)
            job = queue.popleft()
            idle.pop().begin(job, function, calls[job.call_index])

    def _wait_for_answers(self) -> Iterator[tuple[_Worker, Any]]:
        """Waits for the first answer or deadline. Yields workers with their answers.

        The answer is a value of the function or LOADED. For a worker that has ended or has passed
        its deadline, it is a `Failure`.

        Raises:
            RuntimeError: A worker ended or passed its deadline while it imported the function.
        """
        busy = self._busy_workers()
        next_deadline = min(worker.deadline for worker in busy)
        timeout_s = max(next_deadline - time.monotonic(), 0)
        ready = wait([worker.pipe for worker in busy], timeout_s)
        for worker in busy:
            if worker.pipe in ready:
                yield worker, worker.read_answer()
            elif time.monotonic() >= worker.deadline:
                yield worker, worker.fail_overdue()


def _may_retry(answer: Any) -> bool:
    return isinstance(answer, Failure) and answer.kind in ("lost", "crash")


class _Worker:
    """The parent's side of a worker process. The child runs `main`."""

    def __init__(self, memory_gb: float) -> None:
        parent_end, child_end = socket.socketpair()
        command = [
            sys.executable,
            "-P",
            "-m",
            "grpo.rewards.workers.pool",
            str(child_end.fileno()),
            str(int(memory_gb * 2**30)),
        ]
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
        environment["OMP_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            command,
            pass_fds=[child_end.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C interrupts the trainer only
        )
        child_end.close()
        # The socket and the pipe are the same file. The socket is kept to set the time limits.
        self._socket = parent_end
        self.pipe = Connection(os.dup(parent_end.fileno()))
        self.job: _Job | None = None
        self.deadline = 0.0  # of the job, or of importing its function
        self.num_calls = 0
        self._timeout_s = 0.0
        self._loaded: set[str] = set()
        self._loading = ""  # name of the function that is being imported, "" if none is
        self._cpu_s_at_begin = 0.0

    def begin(self, job: _Job, function: _Function, arguments: tuple[Any, ...]) -> None:
        """Sends a call to the worker."""
        self.job = job
        self.num_calls += 1
        self._timeout_s = function.timeout_s
        self._cpu_s_at_begin = self._cpu_s()
        self._loading = "" if function.name in self._loaded else function.name
        self._loaded.add(function.name)
        limit_s = START_TIMEOUT_S if self._loading else function.timeout_s
        self._limit_socket(limit_s)
        self.deadline = time.monotonic() + limit_s
        try:
            self.pipe.send((function, arguments))
        except BlockingIOError:  # frozen; a part of the call is sent, so the worker must be ended
            self.deadline = time.monotonic()
        except OSError:
            pass  # the worker has ended; `read_answer` reports it

    def read_answer(self) -> Any:
        """Returns the value of the call, a `Failure`, or LOADED.

        Raises:
            RuntimeError: The worker ended while it imported the function.
        """
        try:
            kind, value = self.pipe.recv()
        except BlockingIOError:  # frozen in the middle of its answer
            return self.fail_overdue()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._fail_ended()
        if kind == "loaded":
            self._loading = ""
            self._limit_socket(self._timeout_s)
            self.deadline = time.monotonic() + self._timeout_s
            self._cpu_s_at_begin = self._cpu_s()
            return LOADED
        return value

    def _fail_ended(self) -> Failure:
        """Returns the failure of a worker that has closed its pipe.

        Raises:
            RuntimeError: The worker was importing the function.
        """
        code = self._wait()
        if code is not None and -code in OUTSIDE_SIGNALS:
            return Failure(
                kind="lost", reason=f"its worker was killed by {signal.Signals(-code).name}"
            )
        if self._loading:
            raise RuntimeError(
                f"a worker ended with code {code} while it loaded {self._loading}. Its error "
                "message is printed above."
            )
        if code is None:
            return Failure(kind="crash", reason="its worker closed its pipe and did not end")
        return Failure(kind="crash", reason=f"its worker ended with code {code}")

    def fail_overdue(self) -> Failure:
        """Returns the failure of a call that has passed its deadline.

        Raises:
            RuntimeError: The worker is still importing the function.
        """
        if self._loading:
            raise RuntimeError(
                f"a worker needs more than {START_TIMEOUT_S:g} s to load {self._loading}"
            )
        if self._cpu_s() - self._cpu_s_at_begin < MIN_CPU_SHARE * self._timeout_s:
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
        """Makes a read or write raise BlockingIOError if it makes no progress for `limit_s`."""
        seconds = int(limit_s)
        microseconds = int((limit_s - seconds) * 1e6)
        timeval = struct.pack("ll", seconds, microseconds)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    def _cpu_s(self) -> float:
        """Returns the processor time that the worker has used, in seconds.

        Returns the value at the beginning of the call if the worker is gone.
        """
        with contextlib.suppress(OSError):
            return processor_time_s(self._process.pid)
        return self._cpu_s_at_begin


def main(pipe_fd: int, memory_bytes: int) -> None:
    """Runs a worker: answers calls until the pipe closes.

    It receives `(function, arguments)`. It sends `("loaded", None)` after the import of a function
    that is new to it, then `("answer", value)`.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(pipe_fd)
    loaded: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if function.name not in loaded:
                loaded[function.name] = _load(function.name)
                pipe.send(("loaded", None))
            # Ends a call whose parent is dead and cannot kill it.
            signal.setitimer(signal.ITIMER_REAL, 2 * function.timeout_s + 1)
            answer = loaded[function.name](*arguments, **function.options)
        except MemoryError:
            answer = Failure(kind="memory", reason=f"more than {memory_bytes / 2**30:g} GB")
        except Exception as error:
            answer = Failure(kind="error", reason=f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            pipe.send(("answer", answer))
        except BrokenPipeError:
            return
        except Exception as error:  # the value cannot be pickled
            pipe.send(
                ("answer", Failure(kind="error", reason=f"its answer cannot be sent: {error}"))
            )


def _load(name: str) -> Callable[..., Any]:
    """Imports a function and calls `warm_up()` of its module, if there is one.

    If this fails, the worker ends. The failure then does not count as the failure of a call.
    """
    try:
        module_name, _, attribute = name.rpartition(":")
        module = import_module(module_name)
        function: Callable[..., Any] = getattr(module, attribute)
        if hasattr(module, "warm_up"):
            module.warm_up()
        return function
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    # The module is imported under its full name, so that unpickled classes are those of `main`.
    from grpo.rewards.workers import pool

    pool.main(int(sys.argv[1]), int(sys.argv[2]))
