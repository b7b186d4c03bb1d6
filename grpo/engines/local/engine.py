"""vLLM in one child process (grpo/engines/local/child.py).

This side starts it, talks to it over a pipe and notices when it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
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
from grpo.engines import EngineError, Request, SamplingOptions, SyncReport, Weights
from grpo.engines.transfer.weights import Sent, SharedWeights
from grpo.run import ranks
from grpo.types import Completion, UserError

GROUP = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)


class VllmEngine:
    """An `Engine`.

    The child starts in the background: construct it, do other work, then `wait_ready`.
    """

    def __init__(
        self,
        *,
        model_dir: str,
        settings: configs.Engine,
        dtype: str,
        max_model_len: int,
        log_file: Path,
        load_weights: bool = False,
        float32_head: bool = False,
        max_logprobs: int = 20,
        on_wait: Callable[[], None] = lambda: None,
        module: str = "grpo.engines.local.child",
    ) -> None:
        """`load_weights=False` starts from random weights: a sync must come first.

        `on_wait` is called five times a second while waiting and may raise. `max_logprobs`: most
        that `top_logprobs` may ask for. `module`: the child's program (tests put faults in).
        """
        self._on_wait = on_wait
        self._settings = settings
        self._log_file = log_file
        self._dtype = getattr(torch, dtype)
        self._cuda = torch.cuda.is_available()
        self._weights = None if self._cuda else SharedWeights()
        self._trainer: Any = None  # vLLM's own sending side, CUDA IPC only
        self._packed_bytes = 2**30  # the buffer that weights are sent in
        # of the GPU's memory, which the engine gave away when it fell asleep and wants back
        self._slept_bytes = 0
        self._version = -1
        self._child, self._pipe = _spawn(module, log_file)
        llm = llm_arguments(model_dir, settings, dtype, max_model_len, self._cuda)
        llm |= {} if load_weights else {"load_format": "dummy"}
        llm["max_logprobs"] = max_logprobs
        llm |= {"hf_overrides": {"head_dtype": "float32"}} if float32_head else {}
        # a child that is dead already is reported by wait_ready
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(
                ("start", {"llm": llm, "backend": "memory" if self._weights else "ipc"})
            )
        self._description: dict[str, Any] | None = None  # None until the child has answered `start`

    def wait_ready(self) -> dict[str, Any]:
        """Waits until the child can sample and returns what it says of itself.

        Later calls return the same.
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
        assert len(rows) == len(requests), f"got {len(rows)} groups for {len(requests)} requests"
        return [tuple(_completion(c) for c in row) for row in rows]

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
        start, sent = time.monotonic(), Sent(weights, self._dtype)
        if self._weights is not None:
            told = self._weights.write(sent)
            self._call("start_weight_update", {})
            self._call("update_weights", {"update_info": told})
            acknowledged = self._call("finish_weight_update", {"weight_version": str(version)})
        else:
            acknowledged = self._send_ipc(sent, version)
        if acknowledged != version:
            raise EngineError(
                f"the engine acknowledged weight version {acknowledged}, sent {version}"
            )
        self._version = version
        return SyncReport(
            version=version, seconds=time.monotonic() - start, num_bytes=sent.num_bytes
        )

    def _send_ipc(self, sent: Sent, version: int) -> int:
        """One device: vLLM's CUDA IPC engine, in packed buffers, driven over our pipe."""
        from vllm.distributed.weight_transfer.ipc_engine import (
            IPCTrainerInitInfo,
            IPCTrainerWeightTransferEngine,
        )

        client: Any = _SyncClient(self._call, version)
        source: Any = sent
        if self._trainer is None:
            largest = max(meta.num_bytes for meta in sent.metadata())
            # a 7B model's embedding has more than 1 GiB
            self._packed_bytes = max(self._packed_bytes, largest)
            info = IPCTrainerInitInfo(
                rank=0, packed=True, packed_buffer_size_bytes=self._packed_bytes
            )
            self._trainer = IPCTrainerWeightTransferEngine.trainer_init(
                info, client=client, source=source
            )
        self._trainer.client, self._trainer.source = client, source
        self._trainer.send_weights()
        return int(client.acknowledged)

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
            # PyTorch keeps what the update has freed. It is given back only where the engine has no
            # room without it, because getting it again costs the next update time. The sync that
            # follows needs a buffer on each side too.
            free, _ = torch.cuda.mem_get_info()
            if free < self._slept_bytes + 2 * self._packed_bytes + 2**29:
                torch.cuda.empty_cache()
            self._call("wake", {})

    def close(self) -> None:
        """Ends the child whatever it is doing; it has nothing to save."""
        self._pipe.close()
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def _call(
        self,
        method: str,
        arguments: dict[str, Any],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        self.wait_ready()
        try:
            self._pipe.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise self._lost(method) from None
        return self._receive(method, self._settings.timeout_s, on_progress)

    def _receive(
        self, method: str, timeout_s: float, on_progress: Callable[[int, int], None] | None
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            self._on_wait()
            try:
                if not self._pipe.poll(min(0.2, max(0.0, deadline - time.monotonic()))):
                    if time.monotonic() >= deadline:
                        raise EngineError(
                            f"the engine did not answer `{method}` within {timeout_s:g} s; its "
                            f"log: {self._log_file}"
                        )
                    continue
                kind, value = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise self._lost(method) from None
            if kind == "ok":
                return value
            if kind == "error":
                raise EngineError(
                    f"the engine failed in `{method}`: {value}; its log: {self._log_file}"
                )
            if on_progress is not None:
                on_progress(*value)

    def _lost(self, method: str) -> EngineError:
        # a signal to the whole group may have reached the child before it could ignore it
        self._on_wait()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=5)
        code = self._child.returncode
        how = (
            f"killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        hint = (
            " (out of memory? lower engine.kv_cache_gb or engine.max_sequences)"
            if code == -signal.SIGKILL
            else ""
        )
        return EngineError(
            f"the engine died during `{method}`: {how}{hint}; its log: {self._log_file}"
        )


class _SyncClient:
    """What vLLM's trainer side calls (VLLMWeightSyncClient), over our pipe."""

    def __init__(self, call: Callable[..., Any], version: int) -> None:
        self._call, self._version, self.acknowledged = call, version, -1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.acknowledged = self._call(
            "finish_weight_update", {"weight_version": str(self._version)}
        )


def environment() -> dict[str, str]:
    """Returns the environment of a vLLM process of ours.

    It has nothing of the learner's process group. With several ranks it has this rank's GPU and
    cores.
    """
    found = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in [
        name
        for name in found
        if name in GROUP or name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    ]:
        del found[name]  # the learner's process group is not the engine's
    if ranks.count() > 1:  # beside this rank's learner: its GPU, its share of the cores
        own = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        found["CUDA_VISIBLE_DEVICES"] = own[ranks.local_rank()] if own else str(ranks.local_rank())
        found["OMP_NUM_THREADS"] = str(max(1, ranks.num_cores() // ranks.local_count()))
    return found


def _spawn(module: str, log_file: Path) -> tuple[subprocess.Popen[bytes], Connection]:
    """Starts `python -m module` with one end of a pipe.

    It does not use multiprocessing's spawn, which would run the user's script again.
    """
    ours, theirs = Pipe()
    command = [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        child = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
        )
    theirs.close()
    return child, ours


def llm_arguments(
    model_dir: str, settings: configs.Engine, dtype: str, max_model_len: int, cuda: bool
) -> dict[str, Any]:
    """Returns the arguments of vLLM's `LLM` for the settings, on a GPU (`cuda`) or a CPU."""
    arguments: dict[str, Any] = {
        "model": model_dir,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_sequences,
        "enforce_eager": not cuda if settings.eager is None else settings.eager,
        "enable_prefix_caching": True,
        "seed": 0,  # every request has its own
    }
    if settings.block_size or not cuda:
        arguments["block_size"] = settings.block_size or 32
    if cuda:
        arguments |= {
            "gpu_memory_utilization": settings.memory_fraction,
            "enable_sleep_mode": settings.sleep,
        }
    else:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gb * 2**30)
        # A prompt in pieces makes vLLM 0.32 take a random number back, which a CPU's generator
        # cannot: whole prompts, as many as fit.
        arguments |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_model_len, 4096),
        }
    return arguments


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
