"""The engine's child process (grpo/engines/local/child.py) with timers and a profile.

Prints the seconds of each call, those of the parts of a weight sync, and where the Python code of
one call of `generate` spends its time.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
from types import FrameType
from typing import Any

from grpo.engines.local import child
from grpo.engines.local.child import ChildEngine
from grpo.engines.transfer.checksums import ArrivalCheck

TIMED_METHODS = (
    "generate",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "sleep",
    "wake",
)
PROFILED_CALL = 8  # number of the call of `generate` that is profiled, among those of MIN_SEQUENCES
MIN_SEQUENCES = 32
SAMPLING_INTERVAL_S = 0.002
# The main thread passes the interpreter to the sampling thread this often. With Python's 5 ms, most
# samples would show the next place where the main thread passes it by itself.
SWITCH_INTERVAL_S = 0.0001
PROFILE_ROWS = 40


class StackSampler:
    """Samples the stack of the main thread while it is entered, then prints the functions."""

    def __init__(self) -> None:
        self._on_stack: collections.Counter[str] = collections.Counter()
        self._innermost: collections.Counter[str] = collections.Counter()
        self._num_samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> None:
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(self._switch_interval_s)
        print(f"PROFILE of generate: {self._num_samples} samples, % of them")
        for title, counter in (("innermost", self._innermost), ("on the stack", self._on_stack)):
            for name, count in counter.most_common(PROFILE_ROWS):
                print(f"PROFILE {title} {100 * count / max(1, self._num_samples):5.1f} {name}")
        sys.stdout.flush()

    def _sample(self) -> None:
        main_thread_id = threading.main_thread().ident
        while not self._stop.wait(SAMPLING_INTERVAL_S):
            frame = sys._current_frames().get(main_thread_id or 0)
            if frame is None:
                continue
            self._num_samples += 1
            self._innermost[f"{_function_name(frame)}:{frame.f_lineno}"] += 1
            names = set()
            caller: FrameType | None = frame
            while caller is not None:
                names.add(_function_name(caller))
                caller = caller.f_back
            self._on_stack.update(names)


def _function_name(frame: FrameType) -> str:
    folder_and_file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{folder_and_file} {frame.f_code.co_qualname}"


def time_calls(owner: Any, name: str) -> None:
    """Replaces a function of a class or of a module by one that prints its duration."""
    function = getattr(owner, name)
    num_profiled = 0

    def timed_function(*positional: Any, **arguments: Any) -> Any:
        nonlocal num_profiled
        size = ""
        is_profiled = False
        if name == "generate":
            num_sequences = sum(request.n for request in arguments["requests"])
            size = f" of {num_sequences}"
            if num_sequences >= MIN_SEQUENCES:
                num_profiled += 1
                is_profiled = num_profiled == PROFILED_CALL
        start = time.perf_counter()
        if is_profiled:
            with StackSampler():
                result = function(*positional, **arguments)
        else:
            result = function(*positional, **arguments)
        print(f"TIMED {name}{size}: {time.perf_counter() - start:.4f} s", flush=True)
        return result

    setattr(owner, name, timed_function)


def time_weight_sync() -> None:
    """Times the parts of `update_weights`: mapping the buffer, copying out of it, loading."""
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter

    time_calls(PackedBufferImporter, "rebuild")
    time_calls(PackedBufferImporter, "close")
    time_calls(ipc_engine, "packed_ipc_consumer")
    time_calls(ArrivalCheck, "load_weights")


def main(pipe_fd: int, parent_pid: int) -> None:
    """Times the calls of the parent. The arguments are those of the child process."""
    for name in TIMED_METHODS:
        time_calls(ChildEngine, name)
    time_weight_sync()
    child.main(pipe_fd, parent_pid)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
