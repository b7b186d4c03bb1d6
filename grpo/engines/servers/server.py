"""One vLLM server of a pool: its URL, its process if it is a local one, and its state."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from grpo.engines import ProcessNotEndedError, describe_exit

KILL_LIMIT_S = 10.0  # the longest wait for the end of a killed process


@dataclass(kw_only=True, eq=False)
class Server:
    """One server as the pool sees it.

    Attributes:
        url: `"http://127.0.0.1:8000"`; a local server that is started again may get another port.
        log_file: of a local server's process.
        command: of a local server's process, ending in its port; empty for `engine.servers.urls`.
        environment: of a local server's process.
        cores: of this machine, which the process is bound to; empty for all.
        process: of a local server, once it was started.
        up: whether it may be asked, as far as is known.
        version: of the weights that it holds, -1 for none of this run's.
        starts: how often it was started here, or came up.
        load: completions that it was asked for and has not returned yet.
        last_response_at: when it last answered.
        num_generated_tokens: since its start, at the last look; -1 before the first look.
        last_progress_at: when that number last changed, or the server had nothing to do.
        avoid_until: on a rank that does not watch it: when it may be asked again after a failure.
    """

    url: str
    log_file: Path | None = None
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()
    process: subprocess.Popen[bytes] | None = None
    up: bool = False
    version: int = -1
    starts: int = 0
    load: int = 0
    last_response_at: float = 0.0
    num_generated_tokens: float = -1.0
    last_progress_at: float = 0.0
    avoid_until: float = 0.0

    @property
    def local(self) -> bool:
        """Returns whether the pool starts this server; it does not for `engine.servers.urls`."""
        return bool(self.command)

    @property
    def has_ended(self) -> bool:
        """Returns whether its process was started here and has ended."""
        return self.process is not None and self.process.poll() is not None

    def start(self, port: int | None = None) -> None:
        """Starts the process of a local server, at another port if one is given."""
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
        """Kills the process, if one was started, with its group, and waits for its end.

        Blocks for up to KILL_LIMIT_S: call it in a thread from the event loop. Raises
        ProcessNotEndedError.
        """
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(timeout=KILL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise ProcessNotEndedError(
                f"the server {self.url} (process {self.process.pid})", KILL_LIMIT_S
            ) from None

    def describe(self) -> str:
        """Returns its URL, how its process ended if it did, and its log file."""
        text = self.url
        if self.process is not None and self.process.poll() is not None:
            text += f" ({describe_exit(self.process.returncode)})"
        if self.log_file is not None:
            text += f"; its log: {self.log_file}"
        return text
