"""The engine's process: holds vLLM's `LLM` with its core inside and answers calls over a pipe.

Started by grpo/engines/local/engine.py.

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
    # sent to the whole group they are the parent's to handle
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(pipe_fd)
    server: Server | None = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if method == "start":
                server = Server(pipe, **arguments)
                result = server.describe()
            else:
                result = getattr(server, method)(**arguments)
            reply: tuple[str, Any] = ("ok", result)
        except Exception as error:
            traceback.print_exc()
            reply = ("error", f"{type(error).__name__}: {error}")
        with contextlib.suppress(BrokenPipeError):
            pipe.send(reply)


class Server:
    """The calls that the parent can make; their names are the messages."""

    def __init__(self, pipe: Connection, llm: dict[str, Any], backend: str) -> None:
        from vllm import LLM

        from grpo.engines.servers import plugin

        plugin.register()
        self._pipe = pipe
        self._version = -1
        self._llm = LLM(
            **llm,
            weight_transfer_config={"backend": f"grpo_{backend}"},
            logprobs_mode="processed_logprobs",
        )
        self._tokenizer = self._llm.get_tokenizer()
        if backend != "ipc":
            self._llm.init_weight_transfer_engine({"init_info": {}})

    def describe(self) -> dict[str, Any]:
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
            # vLLM wraps the adding of requests in it too: that iterable goes back as it came
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
        found = []
        for output, (ids, prompt_length) in zip(outputs, sequences, strict=True):
            flat: Any = output.prompt_logprobs
            # of k + 1 entries: the text's own token, then the likeliest
            starts = flat.start_indices[prompt_length : len(ids)]
            places = (np.asarray(starts)[:, None] + np.arange(1, k + 1)).ravel()
            ranks, tokens, logprobs = (
                np.asarray(values)[places].reshape(-1, k)
                for values in (flat.ranks, flat.token_ids, flat.logprobs)
            )
            assert (ranks == np.arange(1, k + 1)).all(), (
                "vLLM's flat logprobs are not the text's token and then the likeliest in order"
            )
            found.append((tokens.astype(np.int32), logprobs.astype(np.float16)))
        return found

    def _completion(self, output: Any) -> tuple[Any, ...]:
        ids = tuple(output.token_ids)
        stopped_by_token = output.finish_reason == "stop" and not isinstance(
            output.stop_reason, str
        )
        text = self._tokenizer.decode(
            ids[:-1] if stopped_by_token else ids, skip_special_tokens=False
        )
        assert len(output.logprobs) == len(ids), (
            f"got {len(output.logprobs)} logprobs for {len(ids)} tokens"
        )
        logprobs = tuple(output.logprobs.logprobs[start] for start in output.logprobs.start_indices)
        return ids, logprobs, text, output.finish_reason, self._version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> int:
        """Returns the version that the engine has from here on.

        Cached prefixes belong to the old weights and go.
        """
        self._llm.finish_weight_update(weight_version=weight_version)
        self.reset_cache()
        self._version = int(self._llm.get_weight_version())
        return self._version

    def reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied: requests are still running")

    def sleep(self) -> None:
        self._llm.sleep(level=2)

    def wake(self) -> None:
        self._llm.wake_up()


class _Progress:
    """Looks like tqdm to vLLM.

    Tells the parent how many completions are finished, at most ten times a second.
    """

    def __init__(self, pipe: Connection, total: int) -> None:
        self._pipe, self._total = pipe, total
        self._start = self._told = time.monotonic()
        self.n = 0
        self.postfix = ""

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": time.monotonic() - self._start + 1e-9}

    def update(self, n: int) -> None:
        self.n += n
        if time.monotonic() - self._told > 0.1:
            self._told = time.monotonic()
            self._pipe.send(("progress", (self.n, self._total)))

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
