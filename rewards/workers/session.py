"""A program in a sandbox that gets its source in parts."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

from grpo.rewards.workers.inside import frames
from grpo.rewards.workers.sandbox import JobEndedError, Sandbox, check_time_limit
from grpo.rewards.workers.stopwatch import ProcessClock, Stopwatch, TimeLimitError

MAX_SESSION_S = 3600.0  # processor time of a session
MAX_ANSWER_BYTES = 4 << 20


class Exchange(NamedTuple):
    r"""The result of a part of a session's program: `Exchange("1\n", error="", limit=None)`.

    Attributes:
        output: The text that it printed.
        error: The traceback of its exception; "" without one.
        limit: Why the session has ended, as in `Outcome`; "exit" if the program ended it.
    """

    output: str
    error: str
    limit: Literal["time", "starved", "exit"] | None


class Session:
    r"""A program in a sandbox that gets its source in parts, which share one namespace.

    Example::

        with Sandbox() as sandbox, Session(sandbox) as session:
            session.exchange("x = 1", timeout_s=5)
            session.exchange("print(x)", timeout_s=5)  # Exchange("1\n", error="", limit=None)
    """

    def __init__(self, sandbox: Sandbox) -> None:
        """Starts the process in a sandbox, which it occupies until it is closed.

        Raises:
            SandboxLostError: The sandbox was killed from outside. It must be closed.
        """
        self._job = sandbox.start_job(
            "grpo.rewards.workers.inside.child:run_session", timeout_s=MAX_SESSION_S
        )
        self._job.wait_until_ready()
        self._is_open = True
        # Threads of the program run between the exchanges, too. Their time counts for the next one.
        self._clock = ProcessClock(self._job.pid)

    def __enter__(self) -> Self:
        """Returns the session; leaving the context closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the session."""
        self.close()

    def close(self) -> None:
        """Ends the program."""
        if self._is_open:
            self._is_open = False
            self._job.end()

    def exchange(self, source: str, *, timeout_s: float) -> Exchange:
        """Runs the next part of the program.

        Args:
            source: Source code. It sees the names of the earlier parts.
            timeout_s: Time limit; see `Stopwatch`. The program is ended if it takes longer.

        Raises:
            ValueError: The session has ended.
            SandboxLostError: The sandbox was killed from outside. It must be closed.
        """
        if not self._is_open:
            raise ValueError("the session has ended")
        check_time_limit(timeout_s)
        left_s = timeout_s - self._clock.used_s()
        try:
            if left_s <= 0:
                raise TimeLimitError(is_starved=False)
            stopwatch = Stopwatch([self._job.pid], left_s)
            self._job.send({"source": source}, stopwatch)
            exchange = _read_exchange(self._job.receive(stopwatch, MAX_ANSWER_BYTES))
        except TimeLimitError as error:
            self.close()
            return Exchange("", "", "starved" if error.is_starved else "time")
        except (JobEndedError, frames.FrameError):
            self.close()
            return Exchange("", "", "exit")
        self._clock = ProcessClock(self._job.pid)
        return exchange


def _read_exchange(answer: Any) -> Exchange:
    """Returns the answer of a session's process.

    Raises:
        frames.FrameError: The program has written something else to the socket.
    """
    return Exchange(_text(answer, "output"), _text(answer, "error"), limit=None)


def _text(answer: Any, key: str) -> str:
    text = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(text, str):
        raise frames.FrameError(f"an answer without text {key!r}")
    return frames.without_surrogates(text)
