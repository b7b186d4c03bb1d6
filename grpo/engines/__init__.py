"""Engines sample completions: the `Engine` protocol, its values and its errors.

    local/      vLLM in one child process per rank
    servers/    vLLM servers over HTTP, watched and restarted by rank 0
    transfer/   how weights reach an engine, one file per transport
    endpoint    an OpenAI-compatible endpoint, for a teacher

The rest of the program knows an engine by this file only. vLLM is imported only in this package;
this file imports neither vLLM nor torch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from grpo.types import Completion, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class EngineError(RunError):
    """An engine died, failed or did not answer in time. The base of every error of an engine.

    Pass the fields of a subclass by position: the pickled form, which other ranks receive, holds
    positional arguments only.
    """


@dataclass(eq=False)
class EngineTimeoutError(EngineError):
    """Something did not happen within its time limit.

    `EngineTimeoutError("the engine did not answer `generate`", 5.0, "its log: engine.log")`.

    Attributes:
        event: what did not happen, as a sentence.
        limit_s: the time limit in seconds.
        details: where to look next, or the state at that time.
    """

    event: str
    limit_s: float
    details: str = ""

    def __str__(self) -> str:
        """Returns the message."""
        message = f"{self.event} within {self.limit_s:g} s"
        if self.details:
            message += f"; {self.details}"
        return message


@dataclass(eq=False)
class EngineDiedError(EngineError):
    """The engine's child process ended during a call.

    Attributes:
        method: the call.
        exit_code: of the process, negative for a signal, None if the process has not ended yet.
        log_file: where the process wrote its messages.
    """

    method: str
    exit_code: int | None
    log_file: str

    def __str__(self) -> str:
        """Returns the message, with a hint when the process was probably out of memory."""
        how = describe_exit(self.exit_code)
        if self.exit_code == -signal.SIGKILL:
            how += " (out of memory? lower engine.kv_cache_gb or engine.max_sequences)"
        return f"the engine died during `{self.method}`: {how}; its log: {self.log_file}"


@dataclass(eq=False)
class ProcessNotEndedError(EngineError):
    """A killed process did not end within the time limit.

    Attributes:
        process: which one.
        limit_s: how long it was waited for after SIGKILL.
    """

    process: str
    limit_s: float

    def __str__(self) -> str:
        """Returns the message."""
        return (
            f"{self.process} did not end within {self.limit_s:g} s after SIGKILL: the kernel holds "
            "it (a hung GPU driver or network disk?); its memory and port stay in use"
        )


@dataclass(eq=False)
class NoResponseError(EngineError):
    """A server did not answer a request: no connection, a broken one, or too late.

    Attributes:
        server: the server's description.
        path: the route.
        reason: the kind of failure.
    """

    server: str
    path: str
    reason: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.path} at {self.server}: {self.reason}"


@dataclass(eq=False)
class ServerError(EngineError):
    """A server answered a request with an HTTP error status.

    Attributes:
        server: the server's description.
        path: the route.
        status: the HTTP status.
        text: the beginning of the answer.
    """

    server: str
    path: str
    status: int
    text: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.path} at {self.server}: {self.status} {self.text}"


class RefusedError(ServerError):
    """A server refused a request (status 4xx).

    The server is well. Asking again, or asking another server, would not help.
    """


class EngineDeadError(ServerError):
    """A server reports that its engine is dead (status 503)."""


@dataclass(eq=False)
class MalformedResponseError(EngineError):
    """A server's answer cannot be decoded: no JSON, missing keys, or values of a wrong type.

    Attributes:
        server: the server's description.
        path: the route.
        problem: what is wrong with the answer.
    """

    server: str
    path: str
    problem: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.path} at {self.server}: the answer cannot be decoded: {self.problem}"


@dataclass(eq=False)
class IncompleteResponseError(EngineError):
    """A server returned another number of completions than the request asked for.

    Attributes:
        url: of the server.
        num_completions: in the answer.
        num_requested: in the request.
    """

    url: str
    num_completions: int
    num_requested: int

    def __str__(self) -> str:
        """Returns the message."""
        return (
            f"{self.url}: incomplete response: {self.num_completions} of {self.num_requested} "
            "completions"
        )


@dataclass(eq=False)
class AbortedRequestError(EngineError):
    """A server ended a completion before a stop token, a stop string or the token limit.

    Attributes:
        url: of the server.
        finish_reason: as the server gives it, for example "abort".
    """

    url: str
    finish_reason: str | None

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.url}: aborted request: finish_reason={self.finish_reason}"


@dataclass(eq=False)
class UnknownWeightVersionError(EngineError):
    """A server sampled tokens with weights that the trainer did not send.

    Attributes:
        url: of the server.
        expected: the version of the weights sent last.
    """

    url: str
    expected: int

    def __str__(self) -> str:
        """Returns the message."""
        return (
            f"{self.url}: unknown weight version: sampled with weights that were not sent "
            f"(current version {self.expected})"
        )


@dataclass(eq=False)
class WrongWeightVersionError(EngineError):
    """An engine holds another weight version than the one it should hold.

    Attributes:
        engine: its description.
        held: the version that it reports.
        expected: the version that was sent.
    """

    engine: str
    held: str | int | None
    expected: int

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.engine} holds weight version {self.held}, expected version {self.expected}"


@dataclass(eq=False)
class ServerLostError(EngineError):
    """A server was lost while it worked on a request.

    Attributes:
        server: the server's description.
    """

    server: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.server} was lost"


def describe_exit(exit_code: int | None) -> str:
    """Returns how a process ended: "exit code 7", "killed by SIGKILL" or "not ended"."""
    if exit_code is None:
        return "not ended"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Sample `n` completions of one prompt.

    Completion i has seed `seed + i`, so a group, single requests and retries agree.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    n: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How an engine samples: the token limit, temperature, filters, and what ends a completion."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a weight sync reports: the weight version sent, its duration and the bytes sent."""

    version: int
    seconds: float
    num_bytes: int


class Weights(Protocol):
    """A model's weights by their Hugging Face names.

    Copy a tensor before taking the next one: a tensor may be gathered only when it is asked for.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight."""

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Returns names, dtypes and shapes without gathering any weight."""


class Engine(Protocol):
    """Samples completions with weights that it is sent.

    Every wait has a limit; a lost engine raises EngineError.
    """

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns each request's completions, in order.

        `on_progress(done, total)` counts finished completions.
        """

    def prove(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Returns the completions of every copy of the model: one, or one per server of a pool."""

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Replaces every weight and empties the prefix cache.

        Completions carry `version` from here on.
        """

    def reset_cache(self) -> None:
        """Empties the prefix cache.

        The last bits of later results then do not depend on earlier requests.
        """

    def sleep(self) -> None:
        """Frees device memory, weights included: `load_weights` must follow `wake`."""

    def wake(self) -> None:
        """Takes back the device memory that `sleep` freed, without the weights that were in it."""

    def close(self) -> None:
        """Ends the processes that the engine has started and frees its memory."""
