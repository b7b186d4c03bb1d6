"""Runs untrusted Python programs in a sandbox.

    run(source, timeout_s=5)              one program, then the sandbox ends
    with Sandbox() as sandbox:            a warm sandbox, for many programs
        sandbox.run(source, timeout_s=5)

session.py runs a program that gets its source in parts.

docs/code_reward.md lists what the sandbox stops and what not. In short:

- User, mount, pid, network, ipc and uts namespaces: no network, no other processes, the folders of
  the system and the interpreter read-only, and an empty folder of 16 MiB.
- A list of the system calls that are allowed (inside/seccomp.py). A program cannot start processes.
- Limits on address space, processor time, threads, file size and open files. The calls that would
  allocate memory outside of the address space are not allowed.

With `isolation="rlimits"` there are no namespaces. The list of system calls and the limits hold.
Where the kernel has no Landlock, a program can open the files of the machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

import grpo
from grpo.rewards.workers.inside import frames, namespaces
from grpo.rewards.workers.stopwatch import Stopwatch, TimeLimitError

Isolation = Literal["namespaces", "rlimits"]

MAX_OUTPUT_BYTES = 1 << 20
START_LIMIT_S = 60.0  # to start a sandbox, or to clear it after a job
DEFAULT_MEMORY_MB = 1024
MAX_TIMEOUT_S = 86_400.0
# All that a program sees of the environment. Hashes of texts, and with them the order of sets, are
# the same in each run. Threads of libraries and arenas of malloc would reserve address space.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
PARENT_FOLDER = str(Path(grpo.__file__).resolve().parents[1])
# The keeper imports grpo's files from their folder. Programs must not have it in their path.
START_KEEPER = (
    f"import sys; sys.path.insert(0, {PARENT_FOLDER!r}); "
    "from grpo.rewards.workers.inside import keeper; sys.path.pop(0); keeper.main()"
)
INCOMPLETE = object()  # the rest of a message has not arrived
CREDENTIALS = struct.Struct("3i")  # process, user, group


class SandboxUnavailableError(RuntimeError):
    """The system does not allow the sandbox."""


class SandboxLostError(RuntimeError):
    """The sandbox was killed from outside, or does not answer."""


class Outcome(NamedTuple):
    r"""The result of a program: `Outcome(0, "3\n", limit=None, elapsed_s=0.1)`.

    Attributes:
        code: The exit code; minus the signal that ended the program (-9 at a limit).
        output: The start of its standard output, at most MAX_OUTPUT_BYTES.
        limit: Why the program was ended: its time was over, its output too long, or it was starved:
            it had time left, but got too little processor time. None if it ended by itself.
        elapsed_s: The time that counted for the limit, in seconds; see `Stopwatch`.
    """

    code: int
    output: str
    limit: Literal["time", "output", "starved"] | None
    elapsed_s: float


class JobEndedError(RuntimeError):
    """The process of a job has ended. `code` is its exit code."""

    def __init__(self, code: int) -> None:
        """Stores the exit code."""
        super().__init__(f"the program ended with code {code}")
        self.code = code


class Sandbox:
    """A warm sandbox. It runs one job at a time; each job finds it as new.

    A sandbox is used by one thread. It ends when it is closed or its owner's process ends.
    """

    def __init__(
        self,
        *,
        memory_mb: int = DEFAULT_MEMORY_MB,
        isolation: Isolation = "namespaces",
        modules: Sequence[str] = (),
    ) -> None:
        """Starts the sandbox.

        Args:
            memory_mb: Address space of a job, in MiB.
            isolation: `namespaces` is the sandbox. `rlimits` does without namespaces.
            modules: Modules of grpo that the targets of `start_job` are in.

        Raises:
            SandboxUnavailableError: The system does not allow the sandbox.
        """
        self._memory_bytes = memory_mb << 20
        self._control, keeper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec = {
            "control": keeper_end.fileno(),
            "isolation": isolation,
            "prefixes": _folders_of_interpreter(),
            "modules": list(modules),
        }
        options = ("-s", "-P", "-S", "-B")
        with keeper_end:
            self._process = subprocess.Popen(
                [sys.executable, *options, "-c", START_KEEPER, json.dumps(spec)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[keeper_end.fileno()],
                env=_environment(),
                start_new_session=True,
            )
        self._control.settimeout(START_LIMIT_S)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        message = self._receive()
        if "unshared" in message:
            try:
                namespaces.map_users(self._process.pid)
            except OSError as error:
                raise SandboxUnavailableError(f"user namespace: {error}") from None
            with contextlib.suppress(OSError):  # `_receive` reports it
                self._control.send(json.dumps({"mapped": True}).encode())
            message = self._receive()
        if "unavailable" in message:
            raise SandboxUnavailableError(message["unavailable"])

    def __enter__(self) -> Self:
        """Returns the sandbox; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the sandbox."""
        self.close()

    def close(self) -> None:
        """Kills all processes of the sandbox. Does nothing if it is closed."""
        self._control.close()
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def run(
        self,
        source: str,
        stdin: str = "",
        *,
        timeout_s: float,
        max_real_s: float | None = None,
    ) -> Outcome:
        """Runs a Python program and returns its exit code and output.

        Args:
            source: Source code of the program, which runs as `__main__`.
            stdin: Text on its standard input.
            timeout_s: Time limit; see `Stopwatch`.
            max_real_s: Limit of real time; see `Stopwatch`.

        Raises:
            SandboxUnavailableError: The program cannot be confined.
            ValueError: The source is too long, or the time limit is out of range.
            SandboxLostError: The sandbox was killed from outside. It must be closed.
        """
        check_time_limit(timeout_s)
        with _memory_file(stdin) as stdin_file, _Pipe() as output:
            job = self.start_job(
                "grpo.rewards.workers.inside.child:run_script",
                timeout_s=timeout_s,
                stdin=stdin_file.fileno(),
                stdout=output.writer,
            )
            output.close_writer()
            with job:
                stopwatch = Stopwatch([job.pid], timeout_s, max_real_s)
                limit = _run_to_its_end(job, source, output, stopwatch)
                elapsed_s = stopwatch.elapsed_s()
            output.read_rest()
            return Outcome(job.end(), output.text(), limit, elapsed_s)

    def start_job(
        self,
        target: str,
        *,
        timeout_s: float,
        stdin: int | None = None,
        stdout: int | None = None,
        peer: int | None = None,
    ) -> Job:
        """Starts a function of grpo in a new process of the sandbox, which is not ready yet.

        Args:
            target: The function as `module:function`. Its result is the exit code.
            timeout_s: Processor time after which the kernel ends the process.
            stdin: Descriptor of its standard input. None: empty.
            stdout: Descriptor of its standard output. None: discarded.
            peer: Descriptor of a socket to another job.

        Raises:
            SandboxLostError: The sandbox was killed from outside. It must be closed.
        """
        message = {
            "target": target,
            "memory": self._memory_bytes,
            "cpu_s": math.ceil(timeout_s) + 1,
        }
        channel, job_end = socket.socketpair()
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        null = os.open(os.devnull, os.O_RDWR)
        descriptors = [
            null if stdin is None else stdin,
            null if stdout is None else stdout,
            job_end.fileno(),
        ]
        if peer is not None:
            descriptors.append(peer)
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            channel.close()
            raise SandboxLostError(f"the sandbox has ended ({error})") from None
        finally:
            os.close(null)
            job_end.close()
        return Job(self, channel)

    def wait_for_end(self) -> int:
        """Returns the exit code of the current job when it has ended. Reads one message."""
        code: int = self._receive()["ended"]
        return code

    def kill_job(self) -> None:
        """Asks the keeper to end the current job."""
        with contextlib.suppress(OSError):
            self._control.send(json.dumps({"kill": True}).encode())

    def fileno(self) -> int:
        """Returns the descriptor that becomes readable when the current job has ended."""
        return self._control.fileno()

    def _receive(self) -> dict[str, Any]:
        try:
            data = self._control.recv(1 << 16)
        except OSError as error:
            raise SandboxLostError(f"the sandbox does not answer ({error})") from None
        if not data:
            raise SandboxLostError("the sandbox has ended")
        message: dict[str, Any] = json.loads(data)
        return message


def _folders_of_interpreter() -> list[str]:
    """Returns the folders that Python and its packages are in, with the targets of links."""
    folders = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    return sorted(folders | {os.path.realpath(folder) for folder in folders})


def _environment() -> dict[str, str]:
    """Returns ENVIRONMENT, and where the interpreter finds its shared libraries."""
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return ENVIRONMENT if libraries is None else {**ENVIRONMENT, "LD_LIBRARY_PATH": libraries}


def _run_to_its_end(
    job: Job, source: str, output: _Pipe, stopwatch: Stopwatch
) -> Literal["time", "output", "starved"] | None:
    """Runs a program. Returns the limit at which it must be ended, None if it has ended."""
    try:
        job.send({"source": source}, stopwatch)
        return None if job.read_until_end(output, stopwatch) else "output"
    except TimeLimitError as error:
        return "starved" if error.is_starved else "time"
    except JobEndedError:
        return None


def check_time_limit(timeout_s: float) -> None:
    """Raises ValueError unless a time limit is more than 0 and at most MAX_TIMEOUT_S."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(
            f"timeout_s: got {timeout_s}, expected more than 0 and at most {MAX_TIMEOUT_S:g}"
        )


class Job:
    """A process in a sandbox, which runs a function of grpo.

    As a context, it waits until the process is ready, and ends it.
    """

    def __init__(self, sandbox: Sandbox, channel: socket.socket) -> None:
        """Stores the connection to the process. `Sandbox.start_job` calls it."""
        self.pid = 0  # when it is ready
        self._sandbox = sandbox
        self._channel = channel
        self._buffer = bytearray()
        self._is_killed = False
        self._code: int | None = None  # when the process has ended

    def __enter__(self) -> Self:
        """Waits until the process is ready; see `wait_until_ready`."""
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process. Otherwise the sandbox could not start another one."""
        self.end()

    def wait_until_ready(self) -> None:
        """Waits until the process is confined. On an error, it closes the sandbox.

        Raises:
            SandboxUnavailableError: The process cannot be confined.
            SandboxLostError: The sandbox was killed from outside.
        """
        try:
            self._read_first_message()
        except BaseException:
            self._channel.close()
            self._sandbox.close()
            raise

    def _read_first_message(self) -> None:
        self._channel.settimeout(START_LIMIT_S)
        credentials_bytes = socket.CMSG_SPACE(CREDENTIALS.size)
        try:
            data, ancillary, _, _ = self._channel.recvmsg(1 << 16, credentials_bytes)
        except OSError as error:
            raise SandboxLostError(f"the sandbox does not answer ({error})") from None
        if not data:
            raise SandboxLostError("a job ended before it was confined")
        self._buffer += data
        message = self._next_message(frames.MAX_FRAME_BYTES)
        if message != {"ready": True}:
            raise SandboxUnavailableError(f"a job cannot be confined: {message}")
        self.pid, _, _ = CREDENTIALS.unpack(ancillary[0][2])
        self._channel.setblocking(False)

    def send(self, message: Any, stopwatch: Stopwatch) -> None:
        """Sends a message to the process, which must read it.

        Raises:
            TimeLimitError: The time of the stopwatch is over.
            JobEndedError: The process has ended.
            ValueError: The message is too long.
        """
        try:
            data = memoryview(frames.pack(message))
        except frames.FrameError as error:
            raise ValueError(str(error)) from None
        while data:
            if _wait([self._channel.fileno()], stopwatch, select.POLLOUT):
                try:
                    data = data[self._channel.send(data) :]
                except BlockingIOError:
                    continue
                except OSError:
                    raise JobEndedError(self.end()) from None

    def receive(self, stopwatch: Stopwatch, max_bytes: int = frames.MAX_FRAME_BYTES) -> Any:
        """Returns the next message of the process.

        Raises:
            TimeLimitError: The time of the stopwatch is over.
            JobEndedError: The process has ended without a message.
            frames.FrameError: The message is too long or no JSON.
        """
        while True:
            message = self._next_message(max_bytes)
            if message is not INCOMPLETE:
                return message
            if not _wait([self._channel.fileno()], stopwatch):
                continue
            try:
                data = self._channel.recv(1 << 20)
            except ConnectionResetError:  # it has not read all that was sent
                data = b""
            if not data:
                raise JobEndedError(self.end())
            self._buffer += data

    def read_until_end(self, output: _Pipe, stopwatch: Stopwatch) -> bool:
        """Reads the output of the process until it ends.

        Returns False if the output is too long. The process has then not ended.

        Raises:
            TimeLimitError: The time of the stopwatch is over.
        """
        while True:
            descriptors = [self._sandbox.fileno()]
            if not output.is_at_end:
                descriptors.append(output.reader)
            ready = _wait(descriptors, stopwatch)
            if output.reader in ready and not output.read():
                return False
            if self._sandbox.fileno() in ready:
                self._wait_for_end()
                return True

    def kill(self) -> None:
        """Kills the process, unless it has ended. `end` must follow."""
        self._channel.close()
        if self._code is None and not self._is_killed:
            self._is_killed = True
            self._sandbox.kill_job()

    def end(self) -> int:
        """Kills the process, unless it has ended, and returns its exit code.

        Raises:
            SandboxLostError: The sandbox does not answer. It must be closed.
        """
        self.kill()
        return self._wait_for_end()

    def _wait_for_end(self) -> int:
        if self._code is None:
            self._code = self._sandbox.wait_for_end()
        return self._code

    def _next_message(self, max_bytes: int) -> Any:
        """Returns the first message of the buffer, INCOMPLETE if a part of it is missing."""
        if len(self._buffer) < frames.LENGTH.size:
            return INCOMPLETE
        end = frames.LENGTH.size + frames.unpack_length(self._buffer, max_bytes)
        if len(self._buffer) < end:
            return INCOMPLETE
        message = frames.unpack(bytes(self._buffer[frames.LENGTH.size : end]))
        del self._buffer[:end]
        return message


def _wait(descriptors: list[int], stopwatch: Stopwatch, events: int = select.POLLIN) -> list[int]:
    """Returns the descriptors that are ready, none if the limit must be checked again.

    Raises:
        TimeLimitError: The time of the stopwatch is over.
    """
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, events)
    timeout_ms = math.ceil(1000 * stopwatch.next_check_s())
    return [descriptor for descriptor, _ in poller.poll(timeout_ms)]


class _Pipe:
    """A pipe, of which the start of the content is kept."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.is_at_end = False
        self._content = bytearray()
        self._is_writer_open = True
        os.set_blocking(self.reader, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_writer()
        os.close(self.reader)

    def close_writer(self) -> None:
        if self._is_writer_open:
            self._is_writer_open = False
            os.close(self.writer)

    def read(self) -> bool:
        """Reads what there is. Returns False if the content has more than MAX_OUTPUT_BYTES."""
        with contextlib.suppress(BlockingIOError):
            self._read_part()
        return len(self._content) <= MAX_OUTPUT_BYTES

    def read_rest(self) -> None:
        """Reads what a program that has ended left in the pipe, up to the limit."""
        with contextlib.suppress(BlockingIOError):
            while not self.is_at_end and len(self._content) <= MAX_OUTPUT_BYTES:
                self._read_part()

    def _read_part(self) -> None:
        data = os.read(self.reader, 1 << 16)
        self.is_at_end = not data
        self._content += data

    def text(self) -> str:
        return self._content[:MAX_OUTPUT_BYTES].decode("utf-8", "replace")


@contextlib.contextmanager
def _memory_file(text: str) -> Iterator[IO[bytes]]:
    """Opens a file in memory with a text, for reading only."""
    descriptor = os.memfd_create("stdin")
    with os.fdopen(descriptor, "wb") as writer:
        writer.write(text.encode("utf-8", "replace"))
        writer.flush()
        with open(f"/proc/self/fd/{descriptor}", "rb") as reader:
            yield reader


def run(
    source: str,
    stdin: str = "",
    *,
    timeout_s: float,
    memory_mb: int = DEFAULT_MEMORY_MB,
    isolation: Isolation = "namespaces",
) -> Outcome:
    """Runs a Python program in a sandbox of its own. See `Sandbox` for the arguments.

    Raises:
        SandboxUnavailableError: The system does not allow the sandbox.
        SandboxLostError: The sandbox was killed from outside.
    """
    with Sandbox(memory_mb=memory_mb, isolation=isolation) as sandbox:
        return sandbox.run(source, stdin, timeout_s=timeout_s)
