"""vLLM in one child process (child.py).

This side starts it, asks it over a pipe and notices when it dies.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from grpo import config as configs
from grpo.engines import (
    EngineDiedError,
    EngineError,
    EngineTimeoutError,
    Request,
    SamplingOptions,
    SyncReport,
    Weights,
)
from grpo.engines.local.pipe import LimitedPipe
from grpo.engines.local.weight_receiver import ChildReceiver
from grpo.engines.transfer.checksums import WeightStream
from grpo.engines.transfer.choose import choose_sender
from grpo.engines.transfer.interface import SenderOptions
from grpo.engines.vllm_options import ServedModel, llm_arguments, vllm_environment
from grpo.types import Completion, UserError

KILL_LIMIT_S = 10.0  # the longest wait for the end of the killed child
EXIT_LIMIT_S = 5.0  # the longest wait for the exit code of a child whose pipe is closed
SPARE_BYTES = 2**29  # GPU memory that stays free beside the engine and the sync's buffers

logger = logging.getLogger(__name__)


class VllmEngine:
    """An `Engine`.

    The child starts in the background: construct the engine, do other work, then `wait_ready`.

    Args:
        model: what the child serves.
        settings: the engine's settings.
        log_file: where the child writes its messages.
        max_logprobs: the largest k of `top_logprobs`.
        on_wait: called five times a second while waiting; may raise.
        module: the child's program; tests inject faults with it.
    """

    def __init__(
        self,
        *,
        model: ServedModel,
        settings: configs.Engine,
        log_file: Path,
        max_logprobs: int = 20,
        on_wait: Callable[[], None] = lambda: None,
        module: str = "grpo.engines.local.child",
    ) -> None:
        """Starts the child; does not wait for it."""
        self._on_wait = on_wait
        self._settings = settings
        self._log_file = log_file
        self._dtype = getattr(torch, model.dtype)
        self._cuda = torch.cuda.is_available()
        self._sender = choose_sender(None)(SenderOptions(on_wait=on_wait))
        # GPU memory that the engine freed when it fell asleep and takes back when it wakes
        self._slept_bytes = 0
        self._description: dict[str, Any] | None = None  # None until the child has answered `start`
        self._child, connection = _spawn(module, log_file)
        self._pipe = LimitedPipe(connection, on_wait)
        llm = llm_arguments(model, settings, cuda=self._cuda)
        llm["max_logprobs"] = max_logprobs
        start = ("start", {"llm": llm, "backend": self._sender.backend})
        try:
            self._pipe.send(start, settings.start_timeout_s)
        except TimeoutError:
            self._child.kill()  # it reads nothing: wait_ready reports its end
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("the engine's child ended before `start`: wait_ready reports it")

    def wait_ready(self) -> dict[str, Any]:
        """Waits until the child can sample and returns its description of itself.

        Later calls return the same. Raises EngineError.
        """
        if self._description is None:
            self._description = {}  # a failed start raises once and is not waited for again
            self._description = self._receive("start", self._settings.start_timeout_s, None)
        return self._description

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns each request's completions, in order, as the child samples them."""
        rows = self._call(
            "generate",
            {
                "requests": [(r.prompt_ids, r.seed, r.n) for r in requests],
                "options": asdict(options),
            },
            on_progress=on_progress,
        )
        if len(rows) != len(requests):
            raise EngineError(
                f"the engine returned {len(rows)} groups for {len(requests)} requests; its log: "
                f"{self._log_file}"
            )
        return [tuple(_completion(fields) for fields in row) for row in rows]

    def top_logprobs(
        self, sequences: Sequence[tuple[tuple[int, ...], int]], k: int
    ) -> list[tuple[Any, Any]]:
        """Returns, per sequence, ids and logprobs of the k likeliest tokens at temperature 1.

        A sequence is `(token_ids, prompt_length)`. Both results are NumPy arrays [T, k], with a row
        for each of the sequence's T completion tokens.
        """
        ids_and_logprobs: list[tuple[Any, Any]] = self._call(
            "top_logprobs", {"sequences": list(sequences), "k": k}
        )
        return ids_and_logprobs

    def prove(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Returns the completions of the one copy of the model, as a list of one."""
        return [self.generate(requests, options)]

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Sends every weight to the child; raises EngineError unless it acknowledges `version`."""
        start = time.monotonic()
        stream = WeightStream(weights, self._dtype)
        self._sender.send(stream, ChildReceiver(self._call, version))
        return SyncReport(
            version=version, seconds=time.monotonic() - start, num_bytes=stream.num_bytes
        )

    def reset_cache(self) -> None:
        """Empties the child's prefix cache."""
        self._call("reset_cache", {})

    def sleep(self) -> None:
        """Frees the engine's GPU memory, if `engine.sleep` is set and there is a GPU."""
        if self._cuda and self._settings.sleep:
            free_before, _ = torch.cuda.mem_get_info()
            self._call("sleep", {})
            free_after, _ = torch.cuda.mem_get_info()
            self._slept_bytes = max(0, free_after - free_before)

    def wake(self) -> None:
        """Takes the engine's GPU memory back, if `engine.sleep` is set and there is a GPU."""
        if self._cuda and self._settings.sleep:
            # PyTorch keeps the memory that the update has freed. It is given back only where the
            # engine has no room without it: getting it again costs the next update time. The sync
            # that follows needs a buffer on each side too.
            free, _ = torch.cuda.mem_get_info()
            if free < self._slept_bytes + 2 * self._sender.buffer_bytes + SPARE_BYTES:
                torch.cuda.empty_cache()
            self._call("wake", {})

    def close(self) -> None:
        """Kills the child in whatever it is doing; it has nothing to save."""
        self._child.kill()
        try:
            self._child.wait(timeout=KILL_LIMIT_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the engine's child %d did not end within %g s after SIGKILL; its memory stays in "
                "use",
                self._child.pid,
                KILL_LIMIT_S,
            )
        self._pipe.close()
        self._sender.close()

    def _call(
        self,
        method: str,
        arguments: dict[str, Any],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Returns the child's answer. Raises EngineError."""
        self.wait_ready()
        try:
            self._pipe.send((method, arguments), self._settings.timeout_s)
        except TimeoutError:
            raise self._timed_out(
                f"the engine did not take the message `{method}`", self._settings.timeout_s
            ) from None
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(method) from None
        return self._receive(method, self._settings.timeout_s, on_progress)

    def _receive(
        self, method: str, timeout_s: float, on_progress: Callable[[int, int], None] | None
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                kind, value = self._pipe.receive(deadline)
            except TimeoutError:
                raise self._timed_out(f"the engine did not answer `{method}`", timeout_s) from None
            except (EOFError, ConnectionResetError):
                raise self._died(method) from None
            if kind == "ok":
                return value
            if kind == "error":
                raise EngineError(
                    f"the engine failed in `{method}`: {value}; its log: {self._log_file}"
                )
            if on_progress is not None:
                on_progress(*value)

    def _timed_out(self, event: str, timeout_s: float) -> EngineTimeoutError:
        """Kills the child: its late answer would be taken for that of the next call."""
        self._child.kill()
        return EngineTimeoutError(event, timeout_s, f"its log: {self._log_file}")

    def _died(self, method: str) -> EngineDiedError:
        # a signal to the whole group may have reached the child before it could ignore it
        self._on_wait()
        try:
            exit_code: int | None = self._child.wait(timeout=EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        return EngineDiedError(method, exit_code, str(self._log_file))


def _spawn(module: str, log_file: Path) -> tuple[subprocess.Popen[bytes], Connection]:
    """Starts `python -m module` with one end of a pipe and returns the process and the other end.

    It does not use multiprocessing's spawn, which would run the user's script again.
    """
    parent_end, child_end = Pipe()
    command = [sys.executable, "-m", module, str(child_end.fileno()), str(os.getpid())]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        child = subprocess.Popen(
            command,
            env=vllm_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[child_end.fileno()],
        )
    child_end.close()
    return child, parent_end


def cpu_bytes(settings: configs.Engine, weight_bytes: int) -> float:
    """Returns the bytes that an engine needs on a CPU.

    They hold its cache, the weights, the packed weights, their shared copy and libraries.
    """
    return settings.kv_cache_gb * 2**30 + 3 * weight_bytes + 1.5 * 2**30


def check_memory(settings: configs.Engine, weight_bytes: int, count: int = 1) -> None:
    """Raises UserError when `count` engines do not fit beside what already runs (CPU only).

    vLLM itself checks a GPU.
    """
    import psutil

    if torch.cuda.is_available():
        return
    needed = count * cpu_bytes(settings, weight_bytes)
    free = psutil.virtual_memory().available
    if needed > free:
        who = "the engine needs" if count == 1 else f"{count} engines need"
        raise UserError(
            f"{who} about {needed / 2**30:.1f} GB of memory (KV cache {settings.kv_cache_gb:g} "
            "GB, three copies of the "
            f"weights), {free / 2**30:.1f} GB are free: lower engine.kv_cache_gb or use a smaller "
            "model"
        )


def _completion(row: tuple[Any, ...]) -> Completion:
    token_ids, logprobs, text, finish_reason, version = row
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        text=text,
        finish_reason=finish_reason,
        versions=((version, 0, len(token_ids)),),
    )
