"""An engine that runs vLLM in one child process (child.py).

This module is the parent's side: it starts the child, calls it over a pipe and detects its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from grpo import config as configs
from grpo.engines import (
    EngineError,
    EngineProcessDiedError,
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
from grpo.metrics.memory import cpu_engine_memory
from grpo.types import Completion, UserError

KILL_TIMEOUT_S = 10.0  # the longest wait for the end of the killed child
EXIT_LIMIT_S = 5.0  # the longest wait for the exit code of a child whose pipe is closed
# GPU memory that stays free in addition to the engine's memory and the buffers of a weight sync
SPARE_BYTES = 2**29

logger = logging.getLogger(__name__)


class VllmEngine:
    """An `Engine` in a child process.

    The child starts in the background: construct the engine, do other work, then call `wait_ready`.

    Attributes:
        child_module: the module that the child runs. Tests replace it with one that has a fault.
    """

    child_module: ClassVar[str] = "grpo.engines.local.child"

    def __init__(
        self,
        *,
        model: ServedModel,
        settings: configs.EngineSettings,
        log_file: Path,
        max_logprobs: int = 20,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the child and does not wait for it.

        Args:
            model: the model that the child serves.
            settings: the section `engine` of the config.
            log_file: the file for the output of the child.
            max_logprobs: the largest k of `top_logprobs`.
            on_wait: called five times per second while this process waits for the child. An
                exception that it raises ends the wait.
        """
        self._on_wait = on_wait
        self._settings = settings
        self._log_file = log_file
        self._dtype = getattr(torch, model.dtype)
        self._cuda = torch.cuda.is_available()
        sender_class = choose_sender(None)
        self._sender = sender_class(SenderOptions(on_wait=on_wait))
        self._bytes_freed_by_sleep = 0  # GPU memory that `wake` allocates again
        self._description: dict[str, Any] | None = None  # None until the reply to `start`
        self._child, connection = _spawn(self.child_module, vllm_environment(settings), log_file)
        self._pipe = LimitedPipe(connection, on_wait)
        arguments = llm_arguments(model, settings, cuda=self._cuda)
        arguments["max_logprobs"] = max_logprobs
        self._send_start(arguments)

    def _send_start(self, arguments: dict[str, Any]) -> None:
        """Sends the call `start`. Leaves the report of any failure to `wait_ready`."""
        call = ("start", {"llm_arguments": arguments, "backend": self._sender.backend})
        try:
            self._pipe.send(call, self._settings.start_timeout_s)
        except TimeoutError:
            self._child.kill()  # the child does not read its pipe
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("the engine's child ended before it received `start`")

    def wait_ready(self) -> dict[str, Any]:
        """Waits until the child can sample and returns `{"vllm": "0.32.0"}`, vLLM's version.

        Later calls return the same value at once. If the start fails, the first call raises
        EngineError and later calls return `{}`.
        """
        if self._description is None:
            # Set first, so that only the first call waits for a start that fails.
            self._description = {}
            self._description = self._receive("start", self._settings.start_timeout_s)
        return self._description

    def generate(
        self,
        requests: Sequence[Request],
        options: SamplingOptions,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of each request, in the order of the requests."""
        arguments = {"requests": list(requests), "options": options}
        groups: list[tuple[Completion, ...]] = self._call("generate", arguments, on_progress)
        if len(groups) != len(requests):
            raise EngineError(
                f"the engine returned {len(groups)} groups for {len(requests)} requests; its log: "
                f"{self._log_file}"
            )
        return groups

    def top_logprobs(
        self, sequences: Sequence[tuple[tuple[int, ...], int]], k: int
    ) -> list[tuple[Any, Any]]:
        """Returns the k most likely tokens at each completion token, at temperature 1.

        Args:
            sequences: `(token_ids, prompt_length)` per sequence.
            k: the number of tokens per position, at most `max_logprobs`.

        Returns:
            `(token ids, logprobs)` per sequence, NumPy arrays `[T, k]` for its T completion tokens,
            the most likely token first.
        """
        arguments = {"sequences": list(sequences), "k": k}
        top_tokens: list[tuple[Any, Any]] = self._call("top_logprobs", arguments)
        return top_tokens

    def generate_on_every_copy(
        self, requests: Sequence[Request], options: SamplingOptions
    ) -> list[list[tuple[Completion, ...]]]:
        """Returns the completions of the only copy of the model, in a list of length 1."""
        return [self.generate(requests, options)]

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Sends every weight. Raises EngineError unless the child acknowledges `version`."""
        started_at = time.monotonic()
        stream = WeightStream(weights, self._dtype)
        self._sender.send(stream, ChildReceiver(self._call, version))
        seconds = time.monotonic() - started_at
        return SyncReport(version=version, seconds=seconds, num_bytes=stream.num_bytes)

    def reset_cache(self) -> None:
        """Empties the child's prefix cache."""
        self._call("reset_cache", {})

    def sleep(self) -> None:
        """Frees the engine's GPU memory. Does nothing on a CPU or without `engine.sleep`."""
        if not (self._cuda and self._settings.sleep):
            return
        free_before, _ = torch.cuda.mem_get_info()
        self._call("sleep", {})
        free_after, _ = torch.cuda.mem_get_info()
        self._bytes_freed_by_sleep = max(0, free_after - free_before)

    def wake(self) -> None:
        """Allocates the memory that `sleep` freed. Does nothing if `sleep` does nothing."""
        if not (self._cuda and self._settings.sleep):
            return
        # PyTorch caches the memory that the learner has freed. It is returned to the GPU only if
        # the engine needs it, because allocating it again slows down the next update.
        free_bytes, _ = torch.cuda.mem_get_info()
        if free_bytes < bytes_to_wake(self._bytes_freed_by_sleep, self._sender.buffer_bytes):
            torch.cuda.empty_cache()
        self._call("wake", {})

    def close(self) -> None:
        """Kills the child, which has no state to save."""
        self._child.kill()
        try:
            self._child.wait(timeout=KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the engine's child %d did not end within %g s after SIGKILL; its memory stays in "
                "use",
                self._child.pid,
                KILL_TIMEOUT_S,
            )
        self._pipe.close()
        self._sender.close()

    def _call(
        self,
        method: str,
        arguments: dict[str, Any],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Calls a method of the child and returns its result. Raises EngineError."""
        self.wait_ready()
        timeout_s = self._settings.timeout_s
        try:
            self._pipe.send((method, arguments), timeout_s)
        except TimeoutError:
            event = f"the engine did not read the message `{method}`"
            raise self._kill_after_timeout(event, timeout_s) from None
        except (BrokenPipeError, ConnectionResetError):
            raise self._died_error(method) from None
        return self._receive(method, timeout_s, on_progress)

    def _receive(
        self,
        method: str,
        timeout_s: float,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Waits for the reply to a call and returns the result. Raises EngineError."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                kind, value = self._pipe.receive(deadline)
            except TimeoutError:
                event = f"the engine did not answer `{method}`"
                raise self._kill_after_timeout(event, timeout_s) from None
            except (EOFError, ConnectionResetError):
                raise self._died_error(method) from None
            if kind == "ok":
                return value
            if kind == "error":
                raise EngineError(
                    f"the engine failed in `{method}`: {value}; its log: {self._log_file}"
                )
            if on_progress is not None:
                num_finished, num_total = value
                on_progress(num_finished, num_total)

    def _kill_after_timeout(self, event: str, timeout_s: float) -> EngineTimeoutError:
        """Kills the child and returns the error.

        A late reply of the child would be taken for the reply to the next call.
        """
        self._child.kill()
        return EngineTimeoutError(event, timeout_s, f"its log: {self._log_file}")

    def _died_error(self, method: str) -> EngineProcessDiedError:
        # If a signal to the process group ended the child, this process received it too, and
        # `on_wait` raises the exception for it.
        self._on_wait()
        exit_code: int | None
        try:
            exit_code = self._child.wait(timeout=EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        return EngineProcessDiedError(method, exit_code, str(self._log_file))


def _spawn(
    module: str, environment: dict[str, str], log_file: Path
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Starts `python -m module` with one end of a new pipe.

    It does not use the start method "spawn" of multiprocessing, which would run the user's script
    again.

    The child is killed when the thread that started it ends (PR_SET_PDEATHSIG in child.py). The
    caller's thread may end earlier than the engine, so it is a thread that waits for the child.

    Returns:
        The process and the parent's end of the pipe.
    """
    parent_end, child_end = Pipe()
    command = [sys.executable, "-m", module, str(child_end.fileno()), str(os.getpid())]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    started: Future[subprocess.Popen[bytes]] = Future()

    def start_and_wait(log: IO[bytes]) -> None:
        try:
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[child_end.fileno()],
            )
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(child)
        with contextlib.suppress(ChildProcessError):  # `close` has seen the exit code before
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    with log_file.open("ab") as log:
        threading.Thread(target=start_and_wait, args=[log], daemon=True).start()
        child = started.result()
    child_end.close()
    return child, parent_end


def bytes_to_wake(bytes_freed_by_sleep: int, buffer_bytes: int) -> int:
    """Returns the GPU memory that must be free before a sleeping engine wakes.

    The weight sync that follows needs a buffer in both processes.

    Args:
        bytes_freed_by_sleep: the memory that the engine allocates again.
        buffer_bytes: `WeightSender.buffer_bytes`.
    """
    return bytes_freed_by_sleep + 2 * buffer_bytes + SPARE_BYTES


def check_memory(settings: configs.EngineSettings, weight_bytes: int, num_engines: int = 1) -> None:
    """Raises UserError if the free memory of the machine is too small for the engines.

    Does nothing if there is a GPU, whose memory vLLM checks.

    Args:
        settings: the section `engine` of the config.
        weight_bytes: the size of the weights in the engine's dtype, in bytes.
        num_engines: the number of engines on this machine.
    """
    import psutil

    if torch.cuda.is_available():
        return
    memory = cpu_engine_memory(settings, weight_bytes)
    needed_bytes = num_engines * memory.total_bytes
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        engines_need = "the engine needs" if num_engines == 1 else f"{num_engines} engines need"
        raise UserError(
            f"{engines_need} about {needed_bytes / 2**30:.1f} GiB of memory (per engine: KV cache "
            f"{memory.kv_cache_bytes / 2**30:g} GiB and three copies of the weights), but "
            f"{free_bytes / 2**30:.1f} GiB are free: lower engine.kv_cache_gb or use a smaller "
            "model"
        )
