"""The functions that receive the metrics of a run while it runs, and may stop it.

The stages do not pass them on: `active_callbacks` sets those of the current context, and every
stage that starts in it uses them, also one that runs inside another stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from grpo.run import ranks
from grpo.run.display import caller_output
from grpo.run.signals import RunInterruptedError

RowCallback = Callable[[dict[str, Any]], object]  # receives a row of metrics


class StopRun(RunInterruptedError):  # noqa: N818 - a request, not an error, as StopIteration
    """Raise it in a callback to stop the run. Its state is saved, as after Ctrl-C."""


class CallbackError(RunInterruptedError):
    """A callback raised an exception: the run saves its state and stops."""


class RowCallbacks:
    """Calls the user's functions with each row of metrics.

    An exception of a function does not end the run in the middle of a step. It becomes the
    `stop_request`, which is raised where the run can be saved.

    Attributes:
        error: The exception that a function raised. No function is called after it.
    """

    def __init__(self, functions: Sequence[RowCallback] = ()) -> None:
        """`functions` are called in order."""
        self._functions = tuple(functions)
        self.error: BaseException | None = None

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Calls every function with a copy of the row. Only rank 0 calls them.

        Their output is that of the caller, also while the output of libraries is redirected to a
        log file.
        """
        if not self._functions or self.error is not None or ranks.rank() != 0:
            return
        with caller_output():
            try:
                for function in self._functions:
                    function(dict(row))
            except BaseException as error:  # also KeyboardInterrupt and SystemExit
                self.error = error

    @property
    def stop_request(self) -> RunInterruptedError | None:
        """The error that stops the run because of a function, None if no function has raised."""
        if self.error is None or isinstance(self.error, StopRun):
            return self.error
        return CallbackError(f"{type(self.error).__name__}: {self.error}")


_active: ContextVar[RowCallbacks | None] = ContextVar("row_callbacks", default=None)


@contextlib.contextmanager
def active_callbacks(callbacks: RowCallbacks) -> Iterator[None]:
    """Makes the stages that start within the context use these callbacks."""
    token = _active.set(callbacks)
    try:
        yield
    finally:
        _active.reset(token)


def current_callbacks() -> RowCallbacks:
    """Returns the callbacks of the current context; without any, an object that calls nothing."""
    return _active.get() or RowCallbacks()
