"""The child process of the local engine: runs vLLM's `LLM` and executes calls from a pipe.

engine.py starts this module as a program.

vLLM's engine core runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). All requests of a
call are therefore queued before the first scheduling step, so equal calls form equal batches. No
thread of this process polls while the learner computes.
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

from grpo.engines import Request, SamplingOptions
from grpo.types import Completion

PR_SET_PDEATHSIG = 1  # prctl: send this process a signal when its parent ends
MIN_REPORT_INTERVAL_S = 0.1  # between two progress messages


def main(pipe_fd: int, parent_pid: int) -> None:
    """Executes the parent's calls until the parent closes the pipe.

    The parent sends `(method, arguments)`. The first call is `start`, which creates the engine; the
    others are methods of `ChildEngine`. This process replies with any number of
    `("progress", (num_finished, num_total))`, then `("ok", result)` or `("error", message)`.

    Args:
        pipe_fd: the file descriptor of this process's end of the pipe.
        parent_pid: the process id of the parent.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the call of prctl
        return
    # A signal to the process group, such as Ctrl-C, is handled by the parent alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(pipe_fd)
    engine: ChildEngine | None = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        reply: tuple[str, Any]
        try:
            if method == "start":
                engine = ChildEngine(pipe, **arguments)
                result = engine.describe()
            else:
                result = getattr(engine, method)(**arguments)
            reply = ("ok", result)
        except Exception as error:
            traceback.print_exc()
            reply = ("error", f"{type(error).__name__}: {error}")
        with contextlib.suppress(BrokenPipeError):
            pipe.send(reply)


class ChildEngine:
    """The methods that the parent calls by name."""

    def __init__(self, pipe: Connection, llm_arguments: dict[str, Any], backend: str) -> None:
        """Creates vLLM's `LLM`.

        Args:
            pipe: the pipe to the parent, for progress messages.
            llm_arguments: keyword arguments of `LLM`.
            backend: the `WeightSender.backend` of the parent's weight sender.
        """
        from vllm import LLM

        from grpo.engines.transfer.receiver_registration import register_receiving_engines

        register_receiving_engines()
        self._pipe = pipe
        self._version = -1  # until the first weight update
        self._llm = LLM(
            **llm_arguments,
            weight_transfer_config={"backend": backend},
            logprobs_mode="processed_logprobs",
        )
        self._tokenizer = self._llm.get_tokenizer()

    def describe(self) -> dict[str, Any]:
        """Returns vLLM's version: `{"vllm": "0.32.0"}`."""
        import vllm

        return {"vllm": vllm.__version__}

    def generate(
        self, requests: list[Request], options: SamplingOptions
    ) -> list[tuple[Completion, ...]]:
        """Returns the completions of each request, in the order of the requests."""
        prompts: list[Any] = [
            {"prompt_token_ids": list(request.prompt_ids)} for request in requests
        ]
        params = [_sampling_params(request, options) for request in requests]
        num_total = sum(request.n for request in requests)

        def progress_bar(iterable: Any = None, **_: Any) -> Any:
            # vLLM also wraps the requests in a progress bar while it adds them. That iterable is
            # returned unchanged.
            if iterable is not None:
                return iterable
            return _Progress(self._pipe, num_total)

        outputs = self._llm.generate(prompts, params, use_tqdm=progress_bar)
        groups = []
        for output in outputs:
            groups.append(tuple(self._completion(completion) for completion in output.outputs))
        return groups

    def top_logprobs(
        self, sequences: list[tuple[tuple[int, ...], int]], k: int
    ) -> list[tuple[Any, Any]]:
        """Returns the k most likely tokens at each completion token of the sequences.

        Args:
            sequences: `(token_ids, prompt_length)` per sequence.
            k: the number of tokens per position.

        Returns:
            `(token ids, logprobs)` per sequence, int32 and float16 arrays `[T, k]` for its T
            completion tokens, the most likely token first.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False, flat_logprobs=True
        )
        prompts: list[Any] = [{"prompt_token_ids": list(token_ids)} for token_ids, _ in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        top_tokens = []
        for output, (token_ids, prompt_length) in zip(outputs, sequences, strict=True):
            completion = slice(prompt_length, len(token_ids))
            top_tokens.append(_top_tokens(output.prompt_logprobs, completion, k))
        return top_tokens

    def _completion(self, output: Any) -> Completion:
        """Converts vLLM's `CompletionOutput`."""
        token_ids = tuple(output.token_ids)
        # After a stop string, `stop_reason` is that string.
        ended_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        text_ids = token_ids[:-1] if ended_by_token else token_ids
        text = self._tokenizer.decode(text_ids, skip_special_tokens=False)
        flat = output.logprobs
        if len(flat) != len(token_ids):
            raise RuntimeError(f"vLLM returned {len(flat)} logprobs for {len(token_ids)} tokens")
        return Completion(
            token_ids=token_ids,
            # The first entry of each position is the sampled token.
            logprobs=tuple(flat.logprobs[start] for start in flat.start_indices),
            text=text,
            finish_reason=output.finish_reason,
            versions=((self._version, 0, len(token_ids)),),
        )

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

        Empties the prefix cache, because its entries were computed with the old weights.
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
        """Allocates the GPU memory again. The weights must be loaded afterwards."""
        self._llm.wake_up()


def _sampling_params(request: Request, options: SamplingOptions) -> Any:
    """Returns vLLM's `SamplingParams` of a request."""
    from vllm import SamplingParams

    has_stop_strings = bool(options.stop)
    return SamplingParams(
        n=request.n,
        seed=request.seed,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        stop=list(options.stop),
        stop_token_ids=list(options.stop_token_ids),
        ignore_eos=options.ignore_eos,
        include_stop_str_in_output=has_stop_strings,
        detokenize=has_stop_strings,  # vLLM searches the text for stop strings
        skip_special_tokens=False,
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
    )


def _top_tokens(flat: Any, positions: slice, k: int) -> tuple[Any, Any]:
    """Returns the ids and the logprobs `[T, k]` of the k most likely tokens at T positions.

    `flat` is vLLM's `FlatLogprobs`. Each position has k + 1 entries: the token of the sequence,
    then the k most likely tokens.
    """
    import numpy as np

    starts = np.asarray(flat.start_indices[positions])  # [T]
    indices = (starts[:, None] + np.arange(1, k + 1)).ravel()  # [T * k]
    ranks = np.asarray(flat.ranks)[indices].reshape(-1, k)
    if not (ranks == np.arange(1, k + 1)).all():
        raise RuntimeError(
            "unexpected order of vLLM's flat logprobs: expected the token of the sequence, then "
            "the most likely tokens in order"
        )
    token_ids = np.asarray(flat.token_ids)[indices].reshape(-1, k)
    logprobs = np.asarray(flat.logprobs)[indices].reshape(-1, k)
    return token_ids.astype(np.int32), logprobs.astype(np.float16)


class _Progress:
    """Sends the progress of a call to the parent. Replaces the tqdm bar that vLLM updates."""

    def __init__(self, pipe: Connection, num_total: int) -> None:
        self._pipe = pipe
        self._num_total = num_total
        self._started_at = time.monotonic()
        self._last_report_at = self._started_at
        self.n = 0
        self.postfix = ""

    @property
    def format_dict(self) -> dict[str, float]:
        # vLLM divides by the elapsed time.
        return {"elapsed": time.monotonic() - self._started_at + 1e-9}

    def update(self, n: int) -> None:
        self.n += n
        if time.monotonic() - self._last_report_at > MIN_REPORT_INTERVAL_S:
            self._last_report_at = time.monotonic()
            self._pipe.send(("progress", (self.n, self._num_total)))

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
