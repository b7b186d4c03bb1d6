"""The engine's process: holds vLLM's `LLM` with its core inside and answers calls over a pipe.

Started by engine.py.

With the core in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) every request is queued before the
first scheduling step, so batches are the same each time, and nothing spins while the learner
computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any


def main(pipe_fd: int, parent_pid: int) -> None:
    """Serves `(method, arguments)` messages until the pipe closes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    if os.getppid() != parent_pid:
        return
    # signals to the whole group are the parent's to handle
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(pipe_fd)
    engine: ChildEngine | None = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if method == "start":
                engine = ChildEngine(pipe, **arguments)
                result = engine.describe()
            else:
                result = getattr(engine, method)(**arguments)
            reply: tuple[str, Any] = ("ok", result)
        except Exception as error:
            traceback.print_exc()
            reply = ("error", f"{type(error).__name__}: {error}")
        with contextlib.suppress(BrokenPipeError):
            pipe.send(reply)


class ChildEngine:
    """The calls that the parent can make; their names are the messages."""

    def __init__(self, pipe: Connection, llm: dict[str, Any], backend: str) -> None:
        """Makes vLLM's `LLM` of the arguments `llm`; `backend` is the weight sender's."""
        from vllm import LLM

        from grpo.engines.transfer.receiver_registration import register_receiving_engines

        register_receiving_engines()
        self._pipe = pipe
        self._version = -1
        self._llm = LLM(
            **llm,
            weight_transfer_config={"backend": backend},
            logprobs_mode="processed_logprobs",
        )
        self._tokenizer = self._llm.get_tokenizer()

    def describe(self) -> dict[str, Any]:
        """Returns vLLM's version."""
        import vllm

        return {"vllm": vllm.__version__}

    def generate(
        self, requests: list[tuple[tuple[int, ...], int, int]], options: dict[str, Any]
    ) -> list[list[tuple[Any, ...]]]:
        """Returns the completions of each request.

        A completion is `(token_ids, logprobs, text, finish_reason, version)`.
        """
        from vllm import SamplingParams

        stop = list(options.pop("stop"))
        common = {
            **options,
            "stop_token_ids": list(options.pop("stop_token_ids")),
            "stop": stop,
            "include_stop_str_in_output": bool(stop),
        }
        params = [
            SamplingParams(
                **common,
                n=n,
                seed=seed,
                logprobs=0,
                skip_special_tokens=False,
                detokenize=bool(stop),
                flat_logprobs=True,
            )
            for _, seed, n in requests
        ]
        total = sum(n for _, _, n in requests)
        prompts: list[Any] = [
            {"prompt_token_ids": list(prompt_ids)} for prompt_ids, _, _ in requests
        ]
        outputs = self._llm.generate(
            prompts,
            params,
            # vLLM wraps the adding of requests in it too: that iterable is returned unchanged
            use_tqdm=lambda iterable=None, **_: (
                _Progress(self._pipe, total) if iterable is None else iterable
            ),
        )
        return [[self._completion(c) for c in output.outputs] for output in outputs]

    def top_logprobs(
        self, sequences: list[tuple[tuple[int, ...], int]], k: int
    ) -> list[tuple[Any, Any]]:
        """Returns, per sequence, ids and logprobs [T, k] of the k likeliest tokens per position.

        A sequence is `(token_ids, prompt_length)`; T is the number of its completion tokens.
        """
        import numpy as np
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False, flat_logprobs=True
        )
        prompts: list[Any] = [{"prompt_token_ids": list(ids)} for ids, _ in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        rows = []
        for output, (ids, prompt_length) in zip(outputs, sequences, strict=True):
            flat: Any = output.prompt_logprobs
            # of k + 1 entries: the text's own token, then the likeliest
            starts = flat.start_indices[prompt_length : len(ids)]
            places = (np.asarray(starts)[:, None] + np.arange(1, k + 1)).ravel()
            ranks = np.asarray(flat.ranks)[places].reshape(-1, k)
            tokens = np.asarray(flat.token_ids)[places].reshape(-1, k)
            logprobs = np.asarray(flat.logprobs)[places].reshape(-1, k)
            if not (ranks == np.arange(1, k + 1)).all():
                raise RuntimeError(
                    "vLLM's flat logprobs are not the text's token and then the likeliest in order"
                )
            rows.append((tokens.astype(np.int32), logprobs.astype(np.float16)))
        return rows

    def _completion(self, output: Any) -> tuple[Any, ...]:
        ids = tuple(output.token_ids)
        stopped_by_token = output.finish_reason == "stop" and not isinstance(
            output.stop_reason, str
        )
        text = self._tokenizer.decode(
            ids[:-1] if stopped_by_token else ids, skip_special_tokens=False
        )
        if len(output.logprobs) != len(ids):
            raise RuntimeError(
                f"vLLM returned {len(output.logprobs)} logprobs for {len(ids)} tokens"
            )
        logprobs = tuple(output.logprobs.logprobs[start] for start in output.logprobs.start_indices)
        return ids, logprobs, text, output.finish_reason, self._version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the engine to the transport of the weights."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begins an update of the weights."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads the weights that `update_info` describes."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> int:
        """Ends an update and returns the version of the weights that the engine now holds.

        Empties the prefix cache: its prefixes were computed with the old weights.
        """
        self._llm.finish_weight_update(weight_version=weight_version)
        self.reset_cache()
        self._version = int(self._llm.get_weight_version())
        return self._version

    def reset_cache(self) -> None:
        """Empties the prefix cache. Raises RuntimeError while requests are running."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied: requests are still running")

    def sleep(self) -> None:
        """Frees the GPU memory, weights included."""
        self._llm.sleep(level=2)

    def wake(self) -> None:
        """Takes the GPU memory back, without the weights."""
        self._llm.wake_up()


class _Progress:
    """Reports progress to the parent, at most ten times a second, in place of vLLM's tqdm."""

    def __init__(self, pipe: Connection, total: int) -> None:
        self._pipe = pipe
        self._total = total
        self._start = time.monotonic()
        self._last_report_at = self._start
        self.n = 0
        self.postfix = ""

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": time.monotonic() - self._start + 1e-9}

    def update(self, n: int) -> None:
        self.n += n
        if time.monotonic() - self._last_report_at > 0.1:
            self._last_report_at = time.monotonic()
            self._pipe.send(("progress", (self.n, self._total)))

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
