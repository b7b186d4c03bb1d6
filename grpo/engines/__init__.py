"""Engines sample completions. This file defines the `Engine` protocol, its types and its errors.

    local/      vLLM in one child process per rank
    servers/    vLLM servers over HTTP, monitored and restarted by rank 0
    transfer/   sends weights to an engine, one file per transport
    endpoint    an OpenAI-compatible endpoint, for a teacher or for evaluation

grpo/stages constructs engines; other packages use them through this protocol. vLLM is imported only
in this package. This file imports neither vLLM nor torch.
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
    """Base class of the engines' errors: an engine died, failed or did not answer in time.

    Pass the fields of a subclass as positional arguments. An error is pickled to be sent to other
    ranks, and the pickle of an exception contains its positional arguments only.
    """


@dataclass(eq=False)
class EngineTimeoutError(EngineError):
    """A time limit was exceeded.

    Example:
        `EngineTimeoutError("the engine did not answer `generate`", 5.0, "its log: engine.log")`

    Attributes:
        event: a clause that names the missing event. The message continues with "within 5 s".
        limit_s: the time limit in seconds.
        details: the log file, a config key or the state at that time.
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
class EngineProcessDiedError(EngineError):
    """The engine's child process ended, or closed its connection, during a call.

    Attributes:
        method: the name of the call.
        exit_code: the exit code of the process: negative for a signal, None if the process has not
            ended yet.
        log_file: the file with the output of the process.
    """

    method: str
    exit_code: int | None
    log_file: str

    def __str__(self) -> str:
        """Returns the message, with a hint when the process was probably out of memory."""
        if self.exit_code is None:
            return (
                f"the connection to the engine closed during `{self.method}`, but its process has "
                f"not ended; its log: {self.log_file}"
            )
        cause = describe_exit(self.exit_code)
        if self.exit_code == -signal.SIGKILL:
            cause += " (out of memory? Lower engine.kv_cache_gb or engine.max_sequences)"
        return f"the engine died during `{self.method}`: {cause}; its log: {self.log_file}"


@dataclass(eq=False)
class ProcessNotEndedError(EngineError):
    """A killed process did not end within the time limit.

    Attributes:
        process: the description of the process.
        limit_s: the time limit after SIGKILL, in seconds.
    """

    process: str
    limit_s: float

    def __str__(self) -> str:
        """Returns the message."""
        return (
            f"{self.process} did not end within {self.limit_s:g} s after SIGKILL: it is blocked in "
            "the kernel (a hung GPU driver or network disk?). Its memory and port stay in use."
        )


@dataclass(eq=False)
class NoResponseError(EngineError):
    """A server did not answer a request: no connection, a broken connection or a timeout.

    Attributes:
        server: the server's description.
        path: the route, such as "/health".
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
        body: the beginning of the response's body.
    """

    server: str
    path: str
    status: int
    body: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.path} at {self.server}: {self.status} {self.body}"


class RejectedRequestError(ServerError):
    """A server rejected a request (status 4xx).

    The server works. The request would fail again, on this server and on any other.
    """


class EngineDeadError(ServerError):
    """A server reports that its engine is dead (status 503)."""


@dataclass(eq=False)
class MalformedResponseError(EngineError):
    """A server's response cannot be decoded: no JSON, missing keys or values of a wrong type.

    Attributes:
        server: the server's description.
        path: the route.
        reason: the defect of the response.
    """

    server: str
    path: str
    reason: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"{self.path} at {self.server}: the response cannot be decoded: {self.reason}"


@dataclass(eq=False)
class IncompleteResponseError(EngineError):
    """A server did not return the requested number of completions.

    Attributes:
        url: the server's URL.
        num_completions: the number of completions in the response.
        num_requested: the number of completions in the request.
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
        url: the server's URL.
        finish_reason: the finish reason in the response, for example "abort".
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
        url: the server's URL.
        expected: the version of the weights that the trainer sent last.
    """

    url: str
    expected: int

    def __str__(self) -> str:
        """Returns the message."""
        return (
            f"{self.url}: unknown weight version: the server sampled with weights that this "
            f"trainer did not send (current version {self.expected})"
        )


@dataclass(eq=False)
class WrongWeightVersionError(EngineError):
    """An engine does not hold the weight version that was sent to it.

    Attributes:
        engine: the engine's description.
        reported: the version that the engine reports.
        expected: the version that was sent.
    """

    engine: str
    reported: str | int | None
    expected: int

    def __str__(self) -> str:
        """Returns the message."""
        return f"weight version {self.reported}, expected version {self.expected}: {self.engine}"


@dataclass(eq=False)
class ServerLostError(EngineError):
    """A server was lost while it processed a request.

    Attributes:
        server: the server's description.
    """

    server: str

    def __str__(self) -> str:
        """Returns the message."""
        return f"lost the server {self.server}"


def describe_exit(exit_code: int | None) -> str:
    """Describes the end of a process: "exit code 7", "killed by SIGKILL" or "not ended"."""
    if exit_code is None:
        return "not ended"
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:  # a real-time signal
            name = f"signal {-exit_code}"
        return f"killed by {name}"
    return f"exit code {exit_code}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for `n` completions of one prompt.

    Example:
        `Request(prompt_ids=(5, 6), seed=100, n=2)`

    Attributes:
        prompt_ids: the tokens of the prompt.
        seed: the seed of the first completion. Completion i is sampled with `seed + i`. A retry
            uses the same seeds. G requests with n = 1 and the seeds `seed` to `seed + G - 1` are
            equivalent to one request with n = G. In both cases, the completions are the same if
            the engine's logits do not depend on the batch.
        n: the number of completions.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    n: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """The sampling parameters of an engine.

    Attributes:
        max_tokens: the largest number of tokens per completion.
        temperature: divides the logits; 0 samples greedily.
        top_p: samples from the smallest set of most likely tokens with at least this probability; 1
            for all tokens.
        top_k: samples from this number of most likely tokens; 0 for all tokens.
        stop: strings that end a completion. They remain in its text.
        stop_token_ids: tokens that end a completion, in addition to the EOS token.
        ignore_eos: do not end a completion at the EOS token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """The report of a weight sync.

    Attributes:
        version: the weight version that was sent.
        seconds: the duration of the sync.
        num_bytes: the size of the tensors that this rank sent, in bytes; 0 if it sent none.
    """

    version: int
    seconds: float
    num_bytes: int


class Weights(Protocol):
    """A model's weights by their Hugging Face names.

    A tensor is valid until the iterator advances: sharded weights are gathered during the iteration
    and released again. Copy a tensor that is needed for longer.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight."""

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Returns `(name, dtype, shape)` of every weight, without gathering any weight."""


class Engine(Protocol):
    """Samples completions with the weights that the trainer sends to it.

    Every wait has a time limit. Every method raises EngineError if the engine is lost.
    """

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of each request, in the order of the requests.

        Args:
            requests: the prompts and their seeds.
            options: the sampling parameters, the same for all requests.
            on_progress: called as `on_progress(num_finished, num_total)`, in completions.
        """

    def generate_on_every_copy(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Samples all requests on every copy of the model, so that the weights can be compared.

        A child process holds one copy, a pool holds one per server.

        Returns:
            `result[copy][request]`: the completions of the request from this copy, for the copies
            that this rank manages. With a pool of servers, rank 0 manages all copies.
        """

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Replaces every weight. Cached results of older weights are not used afterwards.

        All ranks call it together. Completions that start afterwards carry `version`.

        Args:
            weights: all weights of the model.
            version: the number that identifies these weights.

        Raises:
            EngineError: the weights did not arrive completely and unchanged.
        """

    def reset_cache(self) -> None:
        """Empties the prefix cache of a child process.

        Later results then do not depend on earlier requests, not even in the last bits.
        """

    def sleep(self) -> None:
        """Frees the device memory of the engine, weights included. Servers keep their memory."""

    def wake(self) -> None:
        """Allocates the device memory that `sleep` freed. Call `load_weights` next."""

    def close(self) -> None:
        """Ends the processes that the engine started and frees its memory."""
