"""One vLLM server of a pool: its URL, its process if it is local, and its state."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from grpo.engines import ProcessNotEndedError, describe_exit

KILL_TIMEOUT_S = 10.0  # the longest wait for the end of a killed process


@dataclass(kw_only=True, eq=False)
class Server:
    """One server of a pool.

    The pool starts local servers (`engine.servers.count`) itself. Remote servers
    (`engine.servers.urls`) have neither a command nor a process. Times are values of
    `time.monotonic()`.

    Attributes:
        url: `"http://127.0.0.1:8000"`. The port may change when a local server is restarted.
        log_file: where the process of a local server writes its output.
        command: the command line of a local server; its last element is the port. Empty for a
            remote server.
        environment: the environment of the process of a local server.
        cores: the CPU cores that the process is bound to; empty for all cores.
        process: the process of a local server after its start.
        up: whether the server is believed to accept requests; kept up to date on rank 0 only.
        version: the version of the weights that it holds, -1 if they are not from this run.
        num_starts: how often the server has come up.
        load: number of completions that this rank has requested and that are not returned yet.
        last_response_at: time of the last response.
        num_generated_tokens: tokens generated since the server's start, as of the last check; -1
            before the first check.
        last_progress_at: last time at which `num_generated_tokens` changed, or the server had no
            requests or was loading weights.
        avoid_until: ranks other than rank 0 send no requests to the server before this time.
    """

    url: str
    log_file: Path | None = None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()
    process: subprocess.Popen[bytes] | None = None
    up: bool = False
    version: int = -1
    num_starts: int = 0
    load: int = 0
    last_response_at: float = 0.0
    num_generated_tokens: float = -1.0
    last_progress_at: float = 0.0
    avoid_until: float = 0.0

    @property
    def is_local(self) -> bool:
        """Returns whether the pool starts this server."""
        return bool(self.command)

    @property
    def has_ended(self) -> bool:
        """Returns whether the process of a local server has ended."""
        return self.process is not None and self.process.poll() is not None

    def start(self, port: int | None = None) -> None:
        """Starts the process of a local server.

        Args:
            port: a new port; None keeps the current one.

        Raises:
            ValueError: The server is remote.
        """
        if self.log_file is None:
            raise ValueError(f"{self.url} is not a local server: it has no log file")
        if port is not None:
            self.command[-1] = str(port)
            self.url = f"http://127.0.0.1:{port}"

        def bind_to_cores() -> None:
            os.sched_setaffinity(0, self.cores)

        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=bind_to_cores if self.cores else None,
            )

    def kill(self) -> None:
        """Kills the process of a local server with its process group and waits for its end.

        Blocks for up to KILL_TIMEOUT_S seconds: call it in a thread, not in the event loop.

        Raises:
            ProcessNotEndedError: The process did not end in time.
        """
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(timeout=KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ProcessNotEndedError(
                f"the server {self.url} (process {self.process.pid})", KILL_TIMEOUT_S
            ) from None

    def describe(self) -> str:
        """Returns the URL, the exit status of an ended process and the log file.

        Example: `"http://127.0.0.1:8000 (killed by SIGKILL); log: runs/a/logs/server-0.log"`.
        """
        description = self.url
        if self.process is not None and self.process.poll() is not None:
            description += f" ({describe_exit(self.process.returncode)})"
        if self.log_file is not None:
            description += f"; log: {self.log_file}"
        return description
