"""Engines sample completions.

What the rest of the program knows of one is the `Engine` protocol; vLLM is imported only in this
folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from grpo.types import Completion, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class EngineError(RunError):
    """The engine died, failed or did not answer in time."""


class RefusedError(EngineError):
    """The engine is there and does not do what it was asked.

    Asking again, or another one, would not help.
    """


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

    Copy a tensor before going on to the next: they may be made one by one.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight."""

    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Returns names, dtypes and shapes without making anything whole."""


class Engine(Protocol):
    """Samples, takes weights, frees its memory, goes away.

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
        """Returns what each copy of the model samples (one here; every server of a pool)."""

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
        """Stops what the engine has started and frees what it holds."""
